# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Makes the output directory of a run a model: weights, configuration, image processor, recipe, curves and card.

One process and DDP write the weights once: a checkpoint holds them in the files of a model, and the output directory
gets hard links to these. FSDP2 and DeepSpeed have files of their own, so there the weights are written a second time.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers.utils import CONFIG_NAME

from .. import verdict
from ..distributed import on_main_process, whole_weights
from ..files import disk_errors, link_or_copy, replace_files, write_text
from ..model_card import write_model_card
from ..modeling_ijepa import weight_files
from ..visualization.curves import plot_training_curves
from .arguments import PretrainingArguments
from .build import Run, summarize, with_found_values


def is_exported(arguments: PretrainingArguments, step: int) -> bool:
    """Whether the output directory becomes a model with the checkpoint of this step, which is not the last one."""
    every = arguments.export_every
    return every > 0 and step // arguments.save_steps % every == 0


def export(run: Run) -> None:
    """Makes the output directory a model. A collective call.

    Where it takes the files of a checkpoint, it is done when this is complete; `run.checkpoints.wait` waits for both.

    Raises:
        OSError: if it cannot be written.
    """
    checkpoint, unfinished = run.checkpoints.last, run.output_dir / ".tmp-export"
    told = disk_errors(run.output_dir)  # a plot that cannot be written names no file
    if run.launch.writes_whole_weights and checkpoint is not None:
        on_main_process(run.accelerator, told(lambda: _describe(run, unfinished)))
        run.checkpoints.afterwards(told(lambda: _publish_checkpoint(checkpoint, unfinished, run.output_dir)))
        return
    weights = whole_weights(run.accelerator, run.model)
    on_main_process(run.accelerator, told(lambda: _publish_weights(run, weights, unfinished)))


def _publish_checkpoint(checkpoint: Path, unfinished: Path, output_dir: Path) -> None:
    """Weights get a second name, because nothing changes them in place. The others are small, and people edit them."""
    for file in weight_files(checkpoint):
        link_or_copy(file, unfinished / file.name)
    indices = checkpoint.glob("*.index.json")  # of all networks, and of the encoder if it is in several files
    for file in (checkpoint / CONFIG_NAME, *indices, *checkpoint.glob("*.py")):
        shutil.copyfile(file, unfinished / file.name)
    replace_files(unfinished, output_dir)


def _publish_weights(run: Run, weights: dict[str, torch.Tensor], unfinished: Path) -> None:
    _describe(run, unfinished)
    run.networks.save_pretrained(unfinished, state_dict=weights)
    replace_files(unfinished, run.output_dir)


def _describe(run: Run, unfinished: Path) -> None:
    """Writes all but the model itself to an empty directory."""
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    run.processor.save_pretrained(unfinished)
    arguments = with_found_values(run)
    arguments.save(unfinished / "recipe.yaml")
    if run.metrics:
        plot_training_curves(run.metrics, unfinished / "curves.png", title=run.output_dir.name)
    if run.verdict:
        write_text(unfinished / verdict.FILE_NAME, json.dumps(run.verdict.as_json(), indent=2) + "\n")
    write_model_card(
        unfinished,
        name=run.arguments.hub_model_id or run.output_dir.name,
        summary=summarize(run),
        metrics=run.metrics[-1] if run.metrics else {},
        recipe=arguments.effective(),
        results=run.results,
        verdict=run.verdict.as_markdown() if run.verdict else None,
        base_model=run.arguments.init_from,
    )
