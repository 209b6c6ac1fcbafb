# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The training loop: one optimizer step after another, with metrics and collapse alarms."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.order import forward_seed
from ..data.transforms import normalize_pixel_values
from ..distributed import any_process, gradient_norm, update_target_encoder
from .build import DivergenceError, Run, is_evaluated
from .evaluate import evaluate
from .preemption import Preempted
from .saving import save


# Metrics shown while training, under a short name; metrics.jsonl has all of them.
SHOWN = {
    "loss": "loss",
    "lr": "learning_rate",
    "images/s": "images_per_second",
    "rank": "effective_rank",
    "k-NN": "knn_accuracy",
    "random k-NN": "random_knn_accuracy",
}


# Training
class Window:
    """What happened since the last row of metrics; but for the norm of the gradient, nothing here waits for the device
    until the row is asked for."""

    def __init__(self, run: Run):
        self.run = run
        self.clear()

    def clear(self):
        self.losses, self.bad_images, self.masks, self.grad_norm = [], [], None, float("nan")
        self.images, self.started = 0, time.perf_counter()

    @contextmanager
    def paused(self):
        """Evaluating and saving are not training time."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def add(self, step: "Step") -> None:
        """Counts an optimizer step; one that was skipped counts for nothing but time and bad images."""
        for batch in step.batches:
            self.run.data.used(batch)
            self.bad_images += self.run.data.bad_images(batch)
            self.masks = batch["context_indices"], batch["target_indices"]
        self.images += self.run.arguments.batch_size
        if step.moved:
            self.grad_norm = step.grad_norm
            self.losses += step.losses
            for pooled in step.pooled_targets:
                self.run.monitor.update(pooled)

    def row(self, step: int) -> dict:
        """The metrics after optimizer step `step` (from 0), over the steps since the last row."""
        run = self.run
        run.data.log.add(gather_object(self.bad_images))  # of all processes, so that they stop together
        losses = self.losses or [torch.tensor(float("nan"), device=run.accelerator.device)]
        row = {
            "step": step + 1,
            "epoch": (step + 1) * run.arguments.batch_size / run.data.num_images,
            "loss": run.accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item(),
            "learning_rate": run.schedules.learning_rate(step),
            "weight_decay": run.schedules.weight_decay(step),
            "momentum": run.schedules.momentum(step),
            "grad_norm": self.grad_norm,
            "context_tokens": float(self.masks[0].shape[-1]),
            "target_tokens": float(self.masks[1].shape[-1]),
            "images_per_second": self.images / (time.perf_counter() - self.started),
            "bad_images": len(run.data.log.indices),
            "skipped_steps": run.skipped_steps,
            **(run.monitor.report() if run.monitor.num_updates else {}),
        }
        self.clear()
        return row


@dataclass
class Step:
    """One optimizer step of this process: what it saw and what came of it."""

    batches: list[dict] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    pooled_targets: list[torch.Tensor] = field(default_factory=list)
    grad_norm: float = float("nan")
    moved: bool = False

    def add(self, batch: dict, output) -> None:
        self.batches.append({key: value for key, value in batch.items() if key != "pixel_values"})  # too large to keep
        self.losses.append(output.loss.detach())
        self.pooled_targets.append(output.target_hidden_states.mean(dim=1))


def optimizer_step(run: Run, batches: Iterator[dict], number: int) -> Step:
    """One update from as many forward passes as the global batch needs."""
    accelerator, step = run.accelerator, Step()
    for micro_step in range(accelerator.gradient_accumulation_steps):
        batch = next(batches)
        if run.config.drop_path_rate:  # a function of step and place, as everything else that is random
            place = micro_step * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(forward_seed(run.arguments.seed, number, place))
        with accelerator.accumulate(run.model):
            pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            with accelerator.autocast():  # which Accelerate leaves to FSDP2 itself, and that casts more than it should
                output = run.model(
                    normalize_pixel_values(pixel_values, run.processor.image_mean, run.processor.image_std),
                    batch["context_indices"].to(accelerator.device, non_blocking=True),
                    batch["target_indices"].to(accelerator.device, non_blocking=True),
                )
            accelerator.backward(output.loss)
            step.add(batch, output)
            del output  # or it would outlive the next forward pass
    step.grad_norm, step.moved = update_weights(run)
    return step


def update_weights(run: Run) -> tuple[float, bool]:
    """The norm of the gradient, and whether the weights moved: a gradient that is not finite would ruin them."""
    accelerator, limit = run.accelerator, run.arguments.max_grad_norm
    if run.launch.uses_deepspeed:  # DeepSpeed has clipped and stepped, or not, at the end of the backward pass
        return float(accelerator.clip_grad_norm_([], 0.0)), not run.optimizer.step_was_skipped
    accelerator.unscale_gradients()
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    norm = float(gradient_norm(parameters))
    moved = math.isfinite(norm)
    if moved and limit is not None and norm > limit:
        torch._foreach_mul_([parameter.grad for parameter in parameters], limit / (norm + 1e-6))
    if moved or accelerator.scaler is not None:  # fp16: the scaler skips by itself, and lowers its scale
        run.optimizer.step()
    run.optimizer.zero_grad()
    return norm, moved


def train(run: Run) -> None:
    """The loop. Raises Preempted when it was asked to stop and everything is saved."""
    arguments, total_steps = run.arguments, run.schedules.total_steps
    run.model.train()  # from_pretrained leaves a model in evaluation mode
    batches, window = iter(run.loader), Window(run)
    progress = tqdm(
        total=total_steps,
        initial=run.first_step,
        unit="step",
        disable=not (run.accelerator.is_main_process and sys.stderr.isatty()),
    )
    for number in range(run.first_step, total_steps):
        done, last = number + 1, number + 1 == total_steps
        run.schedules.apply(run.optimizer, number)
        step = optimizer_step(run, batches, number)
        if step.moved:
            update_target_encoder(run.launch, run.networks, run.schedules.momentum(number))
        else:
            report_skipped_step(run, step, done)
        window.add(step)
        progress.update()
        diverged = run.skipped_steps > arguments.max_skipped_steps
        stops = any_process(run.accelerator, run.stop) or diverged
        saves = last or stops or done % arguments.save_steps == 0
        evaluates = is_evaluated(run, done) and not stops
        # A row at every checkpoint: nothing that a resumed run would need is left in the window.
        if saves or evaluates or done % arguments.logging_steps == 0:
            row = window.row(number)
            with window.paused():
                record(run, {**row, **(evaluate(run) if evaluates else {})}, progress)
        stops = stops or (evaluates and any_process(run.accelerator, run.stop))
        if saves or stops:
            with window.paused():
                save(run, done, exports=not stops and not last)  # `finish` exports
            stops = stops or any_process(run.accelerator, run.stop)
        if stops:
            progress.close()
            raise divergence(run) if diverged else Preempted
    progress.close()


def record(run: Run, row: dict, progress: tqdm) -> None:
    """A row of metrics to metrics.jsonl, the trackers and the terminal; a collapse is said aloud."""
    run.metrics.append(row)
    run.accelerator.log({key: value for key, value in row.items() if key != "reason"}, step=row["step"])
    if not run.accelerator.is_main_process:
        return
    with open(run.output_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    shown = {name: f"{row[key]:.3g}" for name, key in SHOWN.items() if key in row}
    progress.set_postfix(shown)
    if progress.disable:  # a log file: a line for each row instead of a bar
        line = ", ".join(f"{name} {value}" for name, value in shown.items())
        print(f"step {row['step']:,} of {run.schedules.total_steps:,}: {line}", flush=True)
    if row.get("collapsing"):
        tqdm.write(f"WARNING at step {row['step']:,}: {row['reason']}")


# Steps without a finite gradient
def report_skipped_step(run: Run, step: Step, done: int) -> None:
    """Counts the step and writes down what was in it, from all processes. The scaler of fp16 looks for its scale by
    failing, which is no fault of the images."""
    if run.accelerator.scaler is not None and run.accelerator.scaler.get_scale() >= 1:
        return
    run.skipped_steps += 1
    names = gather_object([name for batch in step.batches for name in run.data.names(batch)])
    losses = gather_object([loss.item() for loss in step.losses])
    if run.accelerator.is_main_process:
        report = {"step": done, "grad_norm": str(step.grad_norm), "losses": list(map(str, losses)), "images": names}
        with open(run.output_dir / "skipped_steps.jsonl", "a") as file:
            file.write(json.dumps(report) + "\n")
        tqdm.write(f"WARNING at step {done:,}: the gradient is not finite; the step is skipped.")


def divergence(run: Run) -> DivergenceError:
    return DivergenceError(
        f"{run.skipped_steps} steps had no finite gradient, more than max_skipped_steps"
        f" {run.arguments.max_skipped_steps}. {run.output_dir / 'skipped_steps.jsonl'} lists their losses and images;"
        f" the state is saved in {run.output_dir / 'checkpoints'}. A lower learning rate, max_grad_norm, or"
        " mixed_precision bf16 in place of fp16 may help, in a new run."
    )
