# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of fine-tuning. `Trainer` writes them. Here they get the state of the run and a manifest, and they are
checked before a run continues from one."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from .. import __version__
from ..arguments import require
from ..checkpoints import (
    MANIFEST,
    cannot_write,
    damage_of,
    describe_files,
    newest_whole_checkpoint,
    remove_checkpoint,
    write_manifest,
)
from ..data.contents import image_fingerprints
from ..distributed import on_main_process
from ..files import disk_errors, files_below, sync_to_disk
from .arguments import OWN_GROUPS, PROGRAM
from .training_arguments import Arguments, default_values


RUN_STATE = "run_state.json"
UNFINISHED = ".unfinished"  # is in a checkpoint from its beginning until its manifest is written
_OPTIMIZER_FILES = ("optimizer", "global_step")  # how their names begin: of torch and FSDP, of DeepSpeed
_FREE_ON_RESUME = ("data", "validation_split")  # these may differ in a resumed run: they do not change the training
_FIXED_ON_RESUME = (
    *(entry.name for group in OWN_GROUPS for entry in dataclasses.fields(group) if entry.name not in _FREE_ON_RESUME),
    *("seed", "data_seed", "optim", "optim_args", "dataloader_drop_last"),
)
# These may change too. The start of the run says so, and the model card keeps what they were.
_NOTED_ON_RESUME = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
)
_ADAPTIVE_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # the rate is a state of the run, no function of the step


def plain_values(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with plain values instead of enumerations, so that YAML and JSON can write it."""
    return {name: getattr(value, "value", value) for name, value in recipe.items()}


# What a checkpoint says about its run
def state_of(
    arguments: Arguments, images: datasets.Dataset, class_names: Sequence[str], labels: np.ndarray
) -> dict[str, Any]:
    """The content of run_state.json: what a resumed run must share with this one.

    Args:
        images: the training images.
        class_names: in the order of the rows of the head.
        labels: of the training images, in their order.
    """
    training = arguments.training
    processes = training.distributed_state or PartialState()
    # On the main process only: it asks the file system for the size of every file.
    fingerprints = on_main_process(processes, partial(image_fingerprints, images, arguments.data.data))
    return {
        "version": __version__,
        "recipe": json.loads(json.dumps(plain_values(arguments.recipe), default=str)),
        "class_names": list(class_names),
        "num_images": len(labels),
        "images_sha256": hashlib.sha256(fingerprints.numpy().tobytes()).hexdigest(),
        "labels_sha256": hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest(),
        "batch_size": training.train_batch_size * training.world_size * training.gradient_accumulation_steps,
        "history": [],
    }


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of run_state.json.

    Raises:
        ValueError: if it is of another form, such as that of another version of this package.
    """
    try:
        state = json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))
        expected = {"recipe": dict, "class_names": list, "num_images": int, "batch_size": int}
        expected |= {"images_sha256": str, "labels_sha256": str}
        if all(isinstance(state[name], kind) for name, kind in expected.items()):
            return {"history": [], **state}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{checkpoint / RUN_STATE} cannot be read; was the checkpoint written by another version than {__version__}?"
    )


def check_same_run(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a run that continues from a checkpoint, with the history of its settings.

    Raises:
        ValueError: if arguments, classes, training images or batch size differ, with the first difference.
    """
    before = read_state(checkpoint)
    _check_recipe(checkpoint, before["recipe"], state["recipe"])
    _check_classes(checkpoint, before["class_names"], state["class_names"])
    for name, what in (("num_images", "training images"), ("batch_size", "images per step")):
        require(
            before[name] == state[name],
            f"{checkpoint} belongs to a run with {before[name]:,} {what}, now there are {state[name]:,}.",
        )
    require(
        before["labels_sha256"] == state["labels_sha256"],
        f"{checkpoint} belongs to a run whose {before['num_images']:,} training images had other labels, or another"
        " order.",
    )
    require(
        before["images_sha256"] == state["images_sha256"],
        f"{checkpoint} belongs to a run with other training images: their names, sizes or contents have changed.",
    )
    step = step_of(checkpoint)
    changes = [
        f"{name} was {was!r} until step {step:,}, is {now!r}"
        for name, was, now in _differences(before["recipe"], state["recipe"], _NOTED_ON_RESUME)
    ]
    return {**state, "history": [*before["history"], *changes]}


def _differences(before: dict[str, Any], now: dict[str, Any], names: Sequence[str]) -> list[tuple[str, Any, Any]]:
    defaults = plain_values(default_values())
    pairs = ((name, before.get(name, defaults[name]), now.get(name, defaults[name])) for name in names)
    return [(name, was, value) for name, was, value in pairs if was != value]


def _check_recipe(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{name} was {was!r}, is {is_now!r}" for name, was, is_now in _differences(before, now, _FIXED_ON_RESUME)
    ]
    require(not changed, f"{checkpoint} belongs to a run of other arguments: {'; '.join(changed)}.")
    rates = _differences(before, now, ("learning_rate", "lr_scheduler_type"))
    schedules = {recipe.get("lr_scheduler_type") for recipe in (before, now)}
    require(
        not rates or not schedules & set(_ADAPTIVE_SCHEDULES),
        f"{checkpoint} belongs to a run whose learning rate follows its loss: "
        + "; ".join(f"{name} was {was!r}, is {is_now!r}" for name, was, is_now in rates)
        + ". It cannot change on resume.",
    )


def _check_classes(checkpoint: Path, before: Sequence[str], now: Sequence[str]) -> None:
    """Raises ValueError if the rows of the head would get other names."""
    if list(before) == list(now):
        return
    changes = [
        f"{what} {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"
        for what, names in (
            ("gone:", [name for name in before if name not in now]),
            ("new:", [name for name in now if name not in before]),
        )
        if names
    ]
    raise ValueError(
        f"{checkpoint} belongs to a run with other classes ({'; '.join(changes) or 'in another order'}). Restore their"
        " names, or start a new run from it with --model: rows of the head follow their class names."
    )


# Finding one
def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps that were done when a whole checkpoint was written."""
    return int(json.loads((checkpoint / MANIFEST).read_text())["step"])


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoints of a directory, whole or not, the oldest first."""
    paths = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=_number_of)


def _number_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, for a run that continues. None if it is whole."""
    named = re.fullmatch(r"checkpoint-\d+", checkpoint.name)
    problem = damage_of(checkpoint, _number_of(checkpoint) if named else None)
    if problem is not None:
        return problem
    names = set(json.loads((checkpoint / MANIFEST).read_text())["files"])
    if not any(name.startswith(_OPTIMIZER_FILES) for name in names):
        return "it has no state of the optimizer, as with save_only_model"
    if not any(name.startswith("global_step") for name in names) and SCHEDULER_NAME not in names:
        return f"it has no {SCHEDULER_NAME}"
    return None if TRAINER_STATE_NAME in names else f"it has no {TRAINER_STATE_NAME}"


def find_checkpoint(arguments: Arguments) -> Path | None:
    """The checkpoint from which the run continues. The main process looks for all.

    None stands for a new run, also if the run to continue has no checkpoint yet.

    Raises:
        ValueError: if the checkpoint is missing or damaged, or if output_dir has a run or a model that would be lost.
    """
    output_dir, wanted = Path(arguments.training.output_dir), arguments.training.resume_from_checkpoint
    if wanted is None:
        require(
            not checkpoints_in(output_dir),
            f"{str(output_dir)!r} holds a run: --resume_from_checkpoint last continues it, or choose another"
            " output_dir.",
        )
        _require_no_model(output_dir)
        return None
    processes = arguments.training.distributed_state or PartialState()
    return on_main_process(processes, partial(_wanted_checkpoint, output_dir, wanted))


def _require_no_model(output_dir: Path) -> None:
    """Raises ValueError if a new run would replace a model."""
    require(
        not (output_dir / "config.json").exists(),
        f"{str(output_dir)!r} holds a model and no checkpoint to continue from: choose another output_dir. --model"
        f" {output_dir} starts from its weights.",
    )


def _is_unfinished(checkpoint: Path) -> bool:
    return (checkpoint / UNFINISHED).exists() and not (checkpoint / MANIFEST).exists()


def _wanted_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    if wanted == "last":
        report = partial(print, f"{PROGRAM}:", file=sys.stderr)
        unfinished = [path for path in checkpoints_in(output_dir) if _is_unfinished(path)]
        for path in unfinished:
            report(f"Checkpoint {path} was not finished, and does not count.")
        finished = [path for path in checkpoints_in(output_dir) if path not in unfinished]
        if unfinished and not finished:
            return None  # the run was killed while it wrote its first checkpoint, so it begins again
        found = newest_whole_checkpoint(output_dir, finished, _damage, report)
        if found is None:
            _require_no_model(output_dir)
            report(f"There is no checkpoint in {str(output_dir)!r} yet, so the run starts.")
        return found
    checkpoint = Path(wanted)
    require(checkpoint.is_dir(), f"There is no checkpoint {wanted!r} to continue from.")
    problem = _damage(checkpoint)
    require(problem is None, f"The checkpoint {wanted!r} is damaged: {problem}.")
    return checkpoint


def require_whole(checkpoint: Path) -> None:
    """Raises ValueError if a checkpoint whose weights are to be loaded is damaged."""
    problem = damage_of(checkpoint, None)
    require(problem is None, f"The checkpoint {str(checkpoint)!r} is damaged: {problem}.")


# Writing one
def save_checkpoint(trainer: Trainer, write: Callable[[], None], state: dict[str, Any]) -> None:
    """Writes a checkpoint, then its manifest, then removes the oldest checkpoints.

    Args:
        write: `Trainer`'s own writing.
        state: see `state_of`.

    Raises:
        CheckpointError: if it cannot be written. What there is of it is removed; the older checkpoints stay.
    """
    arguments, step = trainer.args, trainer.state.global_step
    output_dir = Path(str(arguments.output_dir))
    directory, limit = output_dir / f"checkpoint-{step}", arguments.save_total_limit
    arguments.save_total_limit = None  # `Trainer` would remove older ones before this one is complete
    try:
        with disk_errors():
            if arguments.should_save and directory.exists():  # it is damaged, or the run continues from an older one
                remove_checkpoint(directory)
            if arguments.should_save:
                _begin(directory)
            trainer.accelerator.wait_for_everyone()
            write()
            trainer.accelerator.wait_for_everyone()
            if arguments.should_save:
                _complete(directory, step, state)
    except OSError as error:
        if arguments.should_save:
            shutil.rmtree(directory, ignore_errors=True)
        left = next(reversed(checkpoints_in(output_dir)), None)
        raise cannot_write(step, output_dir, error, left) from error
    finally:
        arguments.save_total_limit = limit
    trainer.accelerator.wait_for_everyone()
    if arguments.should_save and limit:
        _prune(directory, limit, trainer.state.best_model_checkpoint)


def _begin(directory: Path) -> None:
    """Makes the directory of a checkpoint with its mark in it, in one step."""
    marked = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(marked, ignore_errors=True)
    marked.mkdir(parents=True)
    (marked / UNFINISHED).touch()
    os.replace(marked, directory)


def _complete(directory: Path, step: int, state: dict[str, Any]) -> None:
    (directory / RUN_STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    files = [file for file in files_below(directory) if file.name != UNFINISHED]
    for file in files:
        sync_to_disk(file)
    write_manifest(directory, step, describe_files(directory, [str(file.relative_to(directory)) for file in files]))
    (directory / UNFINISHED).unlink(missing_ok=True)
    sync_to_disk(directory.parent)


def _prune(newest: Path, keep: int, best: str | None) -> None:
    """Keeps the newest `keep` up to this one, the best among them. The run has not resumed from later ones."""
    checkpoints = checkpoints_in(newest.parent)
    older = [path for path in checkpoints if _number_of(path) < _number_of(newest)]
    protected = [path for path in older if best is not None and path.name == Path(best).name]
    others = [path for path in older if path not in protected]
    kept = {newest, *protected, *others[len(others) - max(keep - 1 - len(protected), 0) :]}
    for checkpoint in set(checkpoints) - kept:
        with suppress(OSError):  # a checkpoint too many costs space, but not the run
            remove_checkpoint(checkpoint)
    for leftover in newest.parent.glob(".tmp-removed-*"):
        shutil.rmtree(leftover, ignore_errors=True)
