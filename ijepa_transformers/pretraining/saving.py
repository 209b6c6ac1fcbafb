# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Saves checkpoints and resumes from them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo, upload_folder
from safetensors.torch import load_file, save_file

from .build import Run, is_evaluated
from .evaluate import evaluate
from .exporting import export, is_exported
from .records import continue_records, write_metrics
from .state import read_state, write_state


# Not uploaded to the Hub, because they are of no use there or contain names of the user's files.
LOCAL_FILES = ["checkpoints/*", ".tmp-*", ".lock", "run_status.json", "bad_images.jsonl", "skipped_steps.jsonl"]


def save(run: Run, step: int, goes_on: bool) -> None:
    """Writes a checkpoint to resume from.

    If the run goes on, the checkpoint may be completed later, and the output directory becomes the model of every n-th
    one (`export_every`).

    Raises:
        CheckpointError: if it cannot be written.
        OSError: if the model cannot be written.
    """
    data_state = run.data.state()
    run.checkpoints.save(step, lambda directory: _write_state(run, directory, data_state), waits=not goes_on)
    if goes_on and is_exported(run.arguments, step):
        export(run)


def _write_state(run: Run, directory: Path, data_state: dict[str, Any]) -> None:
    """Every process writes its monitor. The main process also writes the state of the run and the configuration."""
    monitor = {key: torch.as_tensor(value) for key, value in run.monitor.state_dict().items() if value is not None}
    save_file(monitor, directory / f"monitor_{run.accelerator.process_index}.safetensors")
    if not run.accelerator.is_main_process:
        return
    state = {
        "arguments": dataclasses.asdict(run.arguments),
        "baseline": run.baseline,
        **data_state,
        "skipped_steps": run.skipped_steps,
        "launch": dataclasses.asdict(run.launch),
    }
    write_state(directory, state)
    run.data.write(directory)
    run.networks.config.save_pretrained(directory)
    run.processor.save_pretrained(directory)


def resume(run: Run, checkpoint: Path) -> None:
    """Loads the checkpoint, and drops the metrics that were written after it."""
    run.accelerator.load_state(str(checkpoint))
    # Accelerate restores its count of forward passes, but now a step may have another number of them.
    run.accelerator.step = 0
    _load_monitor(run, checkpoint)
    state = read_state(checkpoint)
    run.baseline, run.skipped_steps = state["baseline"], state["skipped_steps"]
    continue_records(run)
    last = run.metrics[-1] if run.metrics else {}
    if last.get("step") == run.first_step and is_evaluated(run, run.first_step) and "knn_accuracy" not in last:
        last.update(evaluate(run))  # a signal has interrupted this evaluation
        write_metrics(run)


def _load_monitor(run: Run, checkpoint: Path) -> None:
    """Loads what this process has seen. A process that did not exist before starts from the main one's monitor."""
    own = checkpoint / f"monitor_{run.accelerator.process_index}.safetensors"
    state = load_file(own if own.exists() else checkpoint / "monitor_0.safetensors")
    run.monitor.load_state_dict({"features": state.get("features"), "num_updates": int(state["num_updates"])})


def push_to_hub(run: Run, repository_name: str) -> None:
    """Uploads the output directory without its checkpoints."""
    repository = create_repo(repository_name, private=run.arguments.hub_private, exist_ok=True)
    upload_folder(repo_id=repository.repo_id, folder_path=run.output_dir, ignore_patterns=LOCAL_FILES)
    run.accelerator.print(f"pushed {repository.repo_id}")
