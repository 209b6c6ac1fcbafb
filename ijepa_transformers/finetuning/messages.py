# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What fine-tuning prints: a head, a bar or lines, and an end."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.decoding import StoredImage, path_of_uri
from ..data.labels import describe_classes
from ..data.notices import counted
from ..display import (
    SECONDS_BETWEEN_LINES,
    Progress,
    command,
    data_flags,
    in_python,
    onnx_commands,
    show,
    show_end,
    show_facts,
)
from ..execution import computation_of
from .checkpointing import step_of


if TYPE_CHECKING:
    from .trainer import ClassificationTrainer


# Metrics that are shown while training: key -> short name. Files have all metrics.
_SHOWN = {
    "loss": "loss",
    "learning_rate": "lr",
    "eval_accuracy": "accuracy",
    "eval_mean_average_precision": "mAP",
    "eval_loss": "evaluation loss",
}
_RESULTS = {
    "eval_accuracy": "accuracy",
    "eval_top_5_accuracy": "top-5",
    "eval_macro_accuracy": "mean over classes",
    "eval_mean_average_precision": "mean average precision",
    "eval_micro_f1": "micro-F1",
    "eval_loss": "loss",
}


# What stands beside a result, in brackets: the same measure of guesses that know nothing.
_GUESSES = {
    "eval_accuracy": ("eval_most_frequent_class_accuracy", "always guessing the most frequent class"),
    "eval_mean_average_precision": ("eval_random_mean_average_precision", "random scores"),
}


class ShowProgress(TrainerCallback):
    """Shows training and the evaluation after it, in place of the bars and dictionaries of `Trainer`."""

    def __init__(self) -> None:
        self.training: Progress | None = None
        self.evaluation: Progress | None = None
        self.facts: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_first = state.is_world_process_zero
        self.training = Progress(
            state.max_steps,
            "step",
            done=state.global_step,
            shown=is_first,
            seconds_between_lines=SECONDS_BETWEEN_LINES,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training is not None:
            self.training.update(state.global_step - self.training.done)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        found = {name: f"{logs[key]:.3g}" for key, name in _SHOWN.items() if key in logs} if logs else {}
        if found and self.training is not None:
            self.facts |= found
            self.training.report(self.facts)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training is not None:
            self.training.close()
        self.training = None

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training is not None or eval_dataloader is None:  # one bar is enough
            return
        if self.evaluation is None:
            self.evaluation = Progress(
                len(eval_dataloader),
                "evaluation batch",
                shown=state.is_world_process_zero,
                seconds_between_lines=SECONDS_BETWEEN_LINES,
                leave=False,
            )
        self.evaluation.update()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
        self.evaluation = None


def show_head(trainer: "ClassificationTrainer", total_steps: int) -> None:
    """Prints what is trained, how long, and where it is written. First process only."""
    arguments, model, training = trainer.arguments, trainer.model, trainer.args
    origin = "new weights" if arguments.model.from_scratch else f"{arguments.model.encoder} encoder"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    evaluation = "no validation_split, so nothing is evaluated"
    if trainer.eval_dataset is not None:
        evaluation = f"{counted(len(trainer.eval_dataset), 'image')} to evaluate on"
    num_images = len(trainer.train_dataset)
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    facts = {
        "model": f"{type(model).__name__} of {arguments.model.model}, {origin}: {trained:,} trained weights",
        "head": _explained(trainer.head.removeprefix("the head is ")),
        "data": f"{arguments.data.data}: {counted(num_images, 'image')} to train on; {evaluation}",
        "classes": describe_classes(trainer.train_dataset.dataset),
        "length": f"{counted(total_steps, 'step')} of {counted(batch, 'image')},"
        f" {total_steps * batch / num_images:.1f} epochs",
        "computation": computation_of(training.device.type, training.world_size, training.precision),
        "output": training.output_dir,
    }
    if trainer.checkpoint is not None:
        del facts["head"]
        changes = "".join(f"; {change}" for change in trainer.run_state["history"])
        facts["continues"] = f"{trainer.checkpoint} at step {step_of(trainer.checkpoint):,}{changes}"
    show_facts(facts)


def _explained(head: str) -> str:
    """Where the head comes from, and what it is where there was none before."""
    what = "new (the head is the last layer, which tells the classes)"
    return f"{what}{head[3:]}" if head.startswith("new") else head


def show_results(trainer: "ClassificationTrainer") -> None:
    """Prints the results, where things are, and commands to go on with. First process only."""
    directory = str(Path(str(trainer.args.output_dir)))
    if trainer.results:
        count = counted(int(trainer.results["eval_images"]), "image")
        split = trainer.arguments.data.validation_split
        show(f"\nOn {count} of the {split!r} split: {in_words(trainer.results)}")
    readme = Path(directory) / "README.md"
    places = {"classifier": directory, "how to use": readme, "results": Path(directory) / "all_results.json"}
    show_end(places, next_commands(trainer, directory))


def in_words(results: Mapping[str, float]) -> str:
    """The results of an evaluation, with what guesses reach that know nothing."""
    texts = []
    for key, name in _RESULTS.items():
        if key in results:
            other, guess = _GUESSES.get(key, ("", ""))
            beside = f" ({guess}: {results[other]:.4g})" if other in results else ""
            texts.append(f"{name} {results[key]:.4g}{beside}")
    return ", ".join(texts)


def next_commands(trainer: "ClassificationTrainer", directory: str) -> list[str]:
    """Commands that use the classifier: for an image of the data, as a page, as ONNX."""
    data, images = trainer.arguments.data, trainer.eval_dataset or trainer.train_dataset
    split = data.train_split if trainer.eval_dataset is None else data.validation_split
    shown = command("visualize", model=directory, **data_flags(data), split=split, output=f"{directory}/report.html")
    return [
        *classify_commands(directory, images.dataset[0]["image"], trainer.model.config.num_channels),
        shown,
        *onnx_commands(directory, f"{directory}/classifier.onnx"),
    ]


def classify_commands(directory: str, image: StoredImage, num_channels: int) -> list[str]:
    """The command that classifies an image; none if it is no file, or if it is not RGB, which the pipeline needs."""
    path = image["path"]
    if path is None or image["bytes"] is not None or num_channels != 3:
        return []
    classifier = f'pipeline("image-classification", {in_python(directory)})'
    code = f"from transformers import pipeline; print({classifier}({in_python(path_of_uri(path))}))"
    return [shlex.join(["python", "-c", code])]
