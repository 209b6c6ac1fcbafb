# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ijepa finetune` that extend `transformers.TrainingArguments`, whose import takes seconds."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import IntervalStrategy, TrainingArguments

from ..arguments import argument, does_nothing, flags_of, require, require_numbers, require_workers
from .arguments import OWN_GROUPS, DataArguments, ModelArguments, RegularizationArguments


# Not written into recipe.yaml: secrets, and arguments that a repeated run must not have.
UNRECORDED = ("hub_token", "push_to_hub_token", "resume_from_checkpoint")


# Settings of `Trainer` that would be ignored here, or would end the run after the training, each with the reason.
_CANNOT_CHANGE = {
    "remove_unused_columns": "nothing that the data set yields is unused",
    "auto_find_batch_size": "it would change the images per step",
    "train_sampling_strategy": "the order of images follows from the seed",
    "prediction_loss_only": "results need the scores",
    "batch_eval_metrics": "accuracies per class need all images",
    "enable_jit_checkpoint": "a signal always saves a checkpoint here",
    "do_predict": "ijepa probe and ijepa extract look at other images",
    "neftune_noise_alpha": "it is for text",
    "use_liger_kernel": "it is for text",
    "include_num_input_tokens_seen": "it is for text",
}


@dataclass
class FineTuningArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of fine-tuning an encoder."""

    argument_group = "training"
    inherited_group = "all other arguments of transformers.TrainingArguments, in its words"

    output_dir: str = argument("", "directory the classifier is written to")
    num_train_epochs: float = argument(50, "length of the run in passes over the training images")
    max_steps: int = argument(-1, "length of the run in optimizer steps, in place of num_train_epochs; -1: not given")
    per_device_train_batch_size: int = argument(64, "images per process and forward pass")
    per_device_eval_batch_size: int = argument(64, "images per process and forward pass in evaluation")
    gradient_accumulation_steps: int = argument(1, "passes per process that an optimizer step adds up")
    learning_rate: float = argument(5e-4, "peak learning rate; with layer_decay below 1 that of the head")
    weight_decay: float = argument(0.05, "weight decay; none on biases and layer norms")
    max_grad_norm: float = argument(1.0, "clip the gradient to this L2 norm; 0: no clipping")
    bf16: bool = argument(False, "compute in bfloat16; weights stay float32")
    use_cpu: bool = argument(False, "compute on the CPU, also if there is a GPU")
    lr_scheduler_type: str = argument("cosine", "schedule of the learning rate")
    warmup_steps: float = argument(0.1, "linear warm-up: from 1 on optimizer steps, below 1 a share of the run")
    logging_steps: float = argument(
        50, "from 1 on optimizer steps between lines of the log, below 1 a share of the run"
    )
    report_to: str | list[str] | None = argument("none", "tracker: tensorboard, wandb, mlflow, trackio or none")
    eval_strategy: IntervalStrategy | str = argument(
        "no", "when the validation split is evaluated, besides at the end: no, steps or epoch"
    )
    save_strategy: str = argument("epoch", "when checkpoints are written: no, steps, epoch or best")
    save_total_limit: int | None = argument(2, "how many checkpoints are kept")
    load_best_model_at_end: bool = argument(
        False, "end with the best checkpoint instead of the last; needs eval_strategy and validation_split"
    )
    metric_for_best_model: str | None = argument("accuracy", "the measure by which load_best_model_at_end chooses")
    resume_from_checkpoint: str | None = argument(
        None,
        "continue from a checkpoint: last (the newest complete one of output_dir; if there is none, the run starts) or"
        " its directory",
    )
    seed: int = argument(42, "seed of new weights, order of images, crops and augmentation")
    dataloader_num_workers: int = argument(4, "processes that load images, per training process; 0: it loads them")
    dataloader_persistent_workers: bool = argument(True, "keep the loading processes from epoch to epoch")
    remove_unused_columns: bool = argument(False, "must stay false: nothing that the data set yields is unused")

    @property
    def precision(self) -> str:
        """Of matrix products: fp32, bf16 or fp16."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @staticmethod
    def unused_settings(values: Mapping[str, Any]) -> dict[str, str]:
        """The settings that do nothing beside other values, each with what makes them useless, in words."""
        strategies = {"save_steps": "save_strategy", "eval_steps": "eval_strategy"}
        found = {name: (strategy, _plain(values.get(strategy))) for name, strategy in strategies.items()}
        return {name: f"{strategy} {value}" for name, (strategy, value) in found.items() if value != "steps"}

    def __post_init__(self):
        require(self.output_dir, "output_dir is missing: name the directory the classifier is written to.")
        for name, reason in _CANNOT_CHANGE.items():
            fixed = getattr(type(self), name)  # the default
            require(getattr(self, name) == fixed, f"{name} must stay {fixed}, because {reason}.")
        self._check_numbers()
        require(
            self.label_smoothing_factor == 0,
            f"Give label_smoothing {self.label_smoothing_factor} instead of label_smoothing_factor: that one cannot"
            " smooth the labels of mixup.",
        )
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # there are none to keep
        super().__post_init__()
        self._check_trackers()
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"

    def _check_numbers(self) -> None:
        """Raises ValueError for numbers with which a run cannot begin, or would train to NaN."""
        require_numbers(
            self, "learning_rate", "weight_decay", "warmup_steps", "adam_epsilon", "max_grad_norm", least=0
        )
        require_workers(self, "dataloader_num_workers")
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        require_numbers(self, *counts, least=1)
        require(
            self.max_steps > 0 or self.max_steps == -1,
            f"The run has no step: max_steps is {self.max_steps}. Give a number above 0, or leave it out and give"
            " num_train_epochs.",
        )
        require(
            0 < self.num_train_epochs < math.inf,
            f"The run has no step: num_train_epochs is {self.num_train_epochs}. Give a number above 0.",
        )

    def _check_trackers(self) -> None:
        from transformers.integrations import (  # slow to import
            INTEGRATION_TO_CALLBACK,
            get_available_reporting_integrations,
        )

        known, installed = list(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
        for name in self.report_to or ():
            require(name in known, f"report_to must be among {', '.join(known)}, got {name!r}.")
            require(name in installed, f"report_to: {name!r} is not installed here (pip install {name}).")

    def __getstate__(self) -> dict[str, Any]:
        """The values without tokens, because `Trainer` pickles them into training_args.bin and uploads this file."""
        return {**vars(self), **{name: None for name in vars(self) if name.endswith("hub_token")}}

    @property
    def order_seed(self) -> int:
        """Seed of the data order, of crops and of augmentation."""
        return self.seed if self.data_seed is None else self.data_seed


GROUPS = (*OWN_GROUPS, FineTuningArguments)


@dataclass
class Arguments:
    """Every argument of `ijepa finetune`.

    Raises:
        ValueError: with the offending value, if two contradict each other.
    """

    data: DataArguments
    model: ModelArguments
    regularization: RegularizationArguments
    training: FineTuningArguments
    recipe: dict[str, Any]  # the given values that differ from the defaults

    def __post_init__(self):
        require(
            self.data.validation_split or self.training.eval_strategy == "no",
            f"eval_strategy {IntervalStrategy(self.training.eval_strategy).value} needs a validation_split.",
        )

    @classmethod
    def build(cls, **values: Any) -> "Arguments":
        """Arguments from the values of all flags by name.

        Raises:
            ValueError: if a value is wrong, or if a package that a flag needs is not installed.
        """

        def values_of(group: type) -> dict[str, Any]:
            return {entry.name: values[entry.name] for entry in dataclasses.fields(group) if entry.init}

        defaults = default_values()
        for name, reason in FineTuningArguments.unused_settings(values).items():
            if values[name] != defaults[name]:
                raise does_nothing(name, values[name], reason)
        given = {name: value for name, value in values.items() if value != defaults[name] and name not in UNRECORDED}
        try:
            return cls(
                data=DataArguments(**values_of(DataArguments)),
                model=ModelArguments(**values_of(ModelArguments)),
                regularization=RegularizationArguments(**values_of(RegularizationArguments)),
                training=FineTuningArguments(**values_of(FineTuningArguments)),
                recipe=given,
            )
        except ImportError as error:  # DeepSpeed, trackers and so on, if a flag needs them
            raise ValueError(" ".join(str(error).split())) from None


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def default_values() -> dict[str, Any]:
    """The value of every flag that is not given."""
    return {name: flag.default for name, flag in flags_of(GROUPS).items()}
