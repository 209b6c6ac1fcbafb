# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The training loop: optimizer steps, metrics, and a warning if the target encoder collapses."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object

from ..data.notices import counted
from ..data.order import forward_seed
from ..data.transforms import normalize_pixel_values
from ..display import Progress, show
from ..distributed import any_process, norm_and_agreement, update_target_encoder
from ..execution import threads
from ..failures import DivergedError
from ..files import append_rows
from ..preemption import Preempted
from ..trackers import log_to_trackers
from .build import Run, is_evaluated
from .evaluate import evaluate
from .messages import show_bad_images
from .saving import save
from .timing import Stopwatch


if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedOptimizerWrapper  # there only if DeepSpeed is installed


# Metrics that are shown while training: short name -> key. metrics.jsonl has all metrics.
SHOWN = {
    "loss": "loss",
    "lr": "learning_rate",
    "images/s": "images_per_second",
    "rank": "effective_rank",
    "k-NN": "knn_accuracy",
    "random k-NN": "random_knn_accuracy",
}
# In a log file, the time that is left is said after so many steps, if the first row of metrics comes later.
FIRST_LINE = 10


class Window:
    """The steps since the last row of metrics.

    Adding a step does not wait for the device. Only `row` does.
    """

    def __init__(self, run: Run, stopwatch: Stopwatch):
        self.run, self.stopwatch = run, stopwatch
        self._clear()

    def _clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.bad_images: list[Any] = []  # in the form that `run.data.log` takes
        self.context_tokens = self.target_tokens = self.grad_norm = float("nan")
        self.images, self.started = 0, self.stopwatch.seconds

    def add(self, step: "Step") -> None:
        """Counts an optimizer step. Of a skipped step, only time, masks and bad images count."""
        for batch in step.batches:
            self.run.data.count(batch)
            self.bad_images += self.run.data.bad_images(batch)
            self.context_tokens = float(batch["context_indices"].shape[-1])
            self.target_tokens = float(batch["target_indices"].shape[-1])
        self.images += self.run.arguments.batch_size
        if step.moved:
            self.grad_norm = step.grad_norm
            self.losses += step.losses
            for pooled in step.pooled_targets:
                self.run.monitor.update(pooled)

    def row(self, step: int) -> dict[str, Any]:
        """The metrics after optimizer step `step` (from 0), over the steps since the last row. Starts a new window.

        Raises:
            BadImageError: if there are too many bad images.
        """
        run = self.run
        run.data.log.add(gather_object(self.bad_images))  # from all processes, so that all stop together
        show_bad_images(run.data.log.newest, run.data.log.path)
        losses = self.losses or [torch.tensor(float("nan"), device=run.accelerator.device)]
        row: dict[str, Any] = {
            "step": step + 1,
            "epoch": (step + 1) * run.arguments.batch_size / run.data.num_images,
            "loss": run.accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item(),
            "learning_rate": run.schedules.learning_rate(step),
            "weight_decay": run.schedules.weight_decay(step),
            "momentum": run.schedules.momentum(step),
            "grad_norm": self.grad_norm,
            "context_tokens": self.context_tokens,
            "target_tokens": self.target_tokens,
            "images_per_second": self.images / (self.stopwatch.seconds - self.started),
            "bad_images": len(run.data.log.indices),
            "skipped_steps": run.skipped_steps,
        }
        if run.monitor.num_updates:
            row.update(run.monitor.report())
        self._clear()
        return row


@dataclass
class Step:
    """One optimizer step of this process: its batches and its results."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    pooled_targets: list[torch.Tensor] = field(default_factory=list)
    grad_norm: float = float("nan")
    moved: bool = False
    stops: bool = False  # a process was asked to stop; all processes know it

    def add(self, batch: dict[str, Any], loss: torch.Tensor, target_hidden_states: torch.Tensor) -> None:
        self.batches.append({key: value for key, value in batch.items() if key != "pixel_values"})  # too large to keep
        self.losses.append(loss.detach())
        self.pooled_targets.append(target_hidden_states.mean(dim=1))


def optimizer_step(run: Run, batches: Iterator[dict[str, Any]], number: int) -> Step:
    """One update of the weights, from as many forward passes as the global batch needs."""
    accelerator, step = run.accelerator, Step()
    for micro_step in range(accelerator.gradient_accumulation_steps):
        batch = next(batches)
        if run.config.drop_path_rate:  # like everything random, a function of the step and the place in the batch
            place = micro_step * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(forward_seed(run.arguments.seed, number, place))
        with accelerator.accumulate(run.model):
            pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            with accelerator.autocast():  # ours, because FSDP2's own mixed precision casts more than it should
                output = run.model(
                    normalize_pixel_values(pixel_values, run.processor.image_mean, run.processor.image_std),
                    batch["context_indices"].to(accelerator.device, non_blocking=True),
                    batch["target_indices"].to(accelerator.device, non_blocking=True),
                )
            accelerator.backward(output.loss)
            step.add(batch, output.loss, output.target_hidden_states)
            del output  # otherwise it would stay in memory during the next forward pass
    _update_weights(run, step)
    return step


def _update_weights(run: Run, step: Step) -> None:
    """Moves the weights if the gradient is finite. Notes the norm of the gradient, and whether the weights moved."""
    accelerator, limit = run.accelerator, run.arguments.max_grad_norm
    if run.launch.uses_deepspeed:  # it has already clipped and stepped, or skipped, at the end of the backward pass
        optimizer = cast("DeepSpeedOptimizerWrapper", run.optimizer)
        step.grad_norm = float(cast(torch.Tensor, accelerator.clip_grad_norm_([], 0.0)))
        step.moved = not optimizer.step_was_skipped
        step.stops = any_process(accelerator, bool(run.stop))
        return
    accelerator.unscale_gradients()
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    step.grad_norm, step.stops = norm_and_agreement(accelerator, parameters, bool(run.stop))
    step.moved = math.isfinite(step.grad_norm)
    if step.moved and limit is not None and step.grad_norm > limit:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, limit / (step.grad_norm + 1e-6))
    if step.moved or accelerator.scaler is not None:  # with fp16 the scaler skips the step itself and lowers its scale
        run.optimizer.step()
    # DDP averages gradients where they lie. If they were freed, the next passes would accumulate into new ones beside
    # its buckets, and there would be two copies of them.
    run.optimizer.zero_grad(set_to_none=run.launch.mode != "ddp")


def train(run: Run) -> None:
    """Trains from the first step of the run to the last one.

    Raises:
        Preempted: if the run was asked to stop. Everything is saved.
        DivergedError: if too many steps had no finite gradient. Everything is saved.
        BadImageError: if too many images cannot be read.
        CheckpointError: if a checkpoint cannot be written.
    """
    with Progress(
        run.schedules.total_steps, "step", done=run.first_step, shown=run.accelerator.is_main_process
    ) as progress:
        try:
            _train(run, progress)
        finally:
            run.checkpoints.join()


def _train(run: Run, progress: Progress) -> None:
    arguments, total_steps = run.arguments, run.schedules.total_steps
    run.model.train()  # from_pretrained leaves a model in evaluation mode
    batches, stopwatch = iter(run.loader), Stopwatch()
    window, num_threads = Window(run, stopwatch), run.num_threads
    for number in range(run.first_step, total_steps):
        done, last = number + 1, number + 1 == total_steps
        run.schedules.apply(run.optimizer, number)
        with threads(num_threads):
            step = optimizer_step(run, batches, number)
            if step.moved:
                update_target_encoder(run.launch, run.networks, run.schedules.momentum(number))
        if not step.moved:
            _report_skipped_step(run, step, done)
        window.add(step)
        progress.update()
        if done - run.first_step == FIRST_LINE < arguments.logging_steps and not (progress.has_bar or last):
            progress.report()
        diverged = run.skipped_steps > arguments.max_skipped_steps
        stops = step.stops or diverged
        saves = last or stops or done % arguments.save_steps == 0
        evaluates = is_evaluated(run, done) and not stops
        # There is a row at every checkpoint, so a resumed run needs nothing of the window before it.
        if saves or evaluates or done % arguments.logging_steps == 0:
            row = window.row(number)
            with stopwatch.paused():
                record(run, {**row, **(evaluate(run) if evaluates else {})}, progress)
        stops = stops or (evaluates and any_process(run.accelerator, bool(run.stop)))
        if saves or stops:
            with stopwatch.paused():
                save(run, done, goes_on=not stops and not last)  # `finish` exports after the last step
            stops = stops or any_process(run.accelerator, bool(run.stop))
        if stops:
            run.checkpoints.wait()
            raise divergence(run) if diverged else Preempted


def record(run: Run, row: dict[str, Any], progress: Progress) -> None:
    """Writes a row of metrics to metrics.jsonl, the trackers and the terminal, and warns of a collapse."""
    run.metrics.append(row)
    if run.accelerator.is_main_process:
        append_rows(run.output_dir / "metrics.jsonl", [row])
    log_to_trackers(run.accelerator, {key: value for key, value in row.items() if key != "reason"}, row["step"])
    if not run.accelerator.is_main_process:
        return
    shown = {name: f"{row[key]:.3g}" for name, key in SHOWN.items() if key in row}
    progress.report(shown)
    if row.get("collapsing"):
        show(f"WARNING at step {row['step']:,}: {row['reason']}")


def _report_skipped_step(run: Run, step: Step, done: int) -> None:
    """Counts a step without a finite gradient, and writes its losses and images on all processes to a file.

    With fp16, a step at a scale of 1 or more does not count: the scaler finds its scale by such steps.
    """
    if run.accelerator.scaler is not None and run.accelerator.scaler.get_scale() >= 1:
        return
    run.skipped_steps += 1
    names = gather_object([name for batch in step.batches for name in run.data.names(batch)])
    losses = gather_object([loss.item() for loss in step.losses])
    if run.accelerator.is_main_process:
        report = {"step": done, "grad_norm": str(step.grad_norm), "losses": list(map(str, losses)), "images": names}
        append_rows(run.output_dir / "skipped_steps.jsonl", [report])
        show(f"WARNING at step {done:,}: the gradient is not finite; the step is skipped.")


def divergence(run: Run) -> DivergedError:
    """The error for a run with too many skipped steps."""
    return DivergedError(
        f"{counted(run.skipped_steps, 'step')} had no finite gradient, more than max_skipped_steps"
        f" {run.arguments.max_skipped_steps}. {run.output_dir / 'skipped_steps.jsonl'} lists their losses and images;"
        f" the state is saved in {run.output_dir / 'checkpoints'}. A lower learning rate, max_grad_norm, or"
        " mixed_precision bf16 in place of fp16 may help, in a new run."
    )
