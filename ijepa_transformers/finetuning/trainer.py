# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The loss, the metrics and the Trainer of fine-tuning."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME

from ..arguments import require
from ..data.datasets import FineTuningImages, LabelledImages
from ..data.order import EpochSampler
from ..evaluation.probes import accuracy_metric, several_labels_scores
from ..failures import DivergedError
from ..files import disk_errors, read_json_object, replace_files, replace_files_but_keep, write_text
from ..optimization import layer_decay_groups, parameter_places
from ..preemption import ignore_stop_signals
from .card import write_readme
from .checkpointing import require_whole, save_checkpoint, step_of
from .divergence import require_finite_evaluation, require_finite_loss, require_finite_weights
from .messages import ShowProgress
from .stopping import stopped_by_signals
from .trackers import GuardedTracker
from .training_arguments import Arguments, FineTuningArguments


_KEPT_SETTINGS = ("weight_decay", "betas", "eps", "momentum")  # of an optimizer, beside its rate


# Loss and metrics
def classification_loss(
    outputs: ImageClassifierOutput,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy in float32, the mean over all images of an optimizer step.

    Args:
        outputs: with `logits` (B, classes).
        labels: (B,) class ids, or (B, classes) shares of mixed images.
        num_items_in_batch: how many numbers the labels of the whole optimizer step have, as Trainer counts them, over
            accumulated batches and processes. So all images of a step have the same weight. By default those of
            `labels`.
        label_smoothing: share of each label that is spread over all classes. It applies only if gradients are
            enabled, so an evaluation measures the plain cross-entropy.
    """
    smoothing = label_smoothing if torch.is_grad_enabled() else 0.0
    logits = cast(torch.Tensor, outputs.logits).float()
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch
    # Mixed labels hold `classes` numbers per image.
    return total * (labels.shape[1] if labels.ndim == 2 else 1) / num_items


def several_labels_loss(
    outputs: ImageClassifierOutput,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Binary cross-entropy in float32, the mean over all images and classes of an optimizer step.

    Args:
        outputs: with `logits` (B, classes).
        labels: (B, classes) in 0..1.
        num_items_in_batch, label_smoothing: as in `classification_loss`. Smoothed labels go towards one half.
    """
    smoothing = label_smoothing if torch.is_grad_enabled() else 0.0
    logits = cast(torch.Tensor, outputs.logits).float()
    labels = labels.float() * (1 - smoothing) + smoothing / 2
    total = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def _several_labels_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean average precision and micro-F1 of logits (images, classes), and the number of images.

    Beside them the mean average precision that random scores have: the mean share of images that have a class.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = np.asarray(prediction.label_ids)
    shares = (labels > 0.5).mean(axis=0)
    chance = float(shares[shares > 0].mean()) if shares.any() else math.nan
    scores = several_labels_scores(logits, labels)
    return {**scores, "random_mean_average_precision": chance, "images": len(labels)}


def _classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracies of logits (images, classes), the one of always guessing the most frequent class, and the number of
    images."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    accuracies = accuracy_metric().compute(predictions=logits, references=prediction.label_ids)
    largest = float(np.bincount(prediction.label_ids).max()) / len(prediction.label_ids)
    return {**accuracies, "most_frequent_class_accuracy": largest, "images": len(prediction.label_ids)}


def _check_best_metric(arguments: FineTuningArguments, several: bool, num_classes: int) -> None:
    """Raises ValueError if `metric_for_best_model` is no metric of this run. `Trainer` finds it after an epoch.

    Args:
        several: whether an image may have several classes.
    """
    top = ["top_5_accuracy"] if num_classes > 5 else []
    known = ["loss", *(["mean_average_precision", "micro_f1"] if several else ["accuracy", "macro_accuracy", *top])]
    name = arguments.metric_for_best_model
    require(
        name is None or arguments.eval_strategy == "no" or name.removeprefix("eval_") in known,
        f"metric_for_best_model must be one of {', '.join(known)}, got {name!r}.",
    )


class _SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins. A resumed run may begin in the middle of an epoch."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.epoch = int(state.epoch or 0)


class ClassificationTrainer(Trainer):
    """`Trainer` with images by (epoch, index), layer-wise learning rates and this package's model card.

    Args:
        checkpoint: the checkpoint from which the run continues, if any.
        state: what every checkpoint says about the run; see `state_of`.
        options: `model`, data sets, image processor and collator for `Trainer`.

    Raises:
        ValueError: if `layer_decay` is below 1 and the layers of the model are unknown.
    """

    args: FineTuningArguments
    model: PreTrainedModel
    train_dataset: FineTuningImages
    eval_dataset: LabelledImages | None

    def __init__(self, arguments: Arguments, checkpoint: Path | None, state: dict[str, Any], **options: Any):
        self.arguments, self.checkpoint, self.run_state = arguments, checkpoint, state
        # Read from the model here, because FSDP version 1 wraps it before the optimizer is built.
        self.places = parameter_places(options["model"], arguments.regularization.layer_decay)
        self.train_sampler = EpochSampler(len(options["train_dataset"]), arguments.training.order_seed)
        self.head = ""  # where the rows of the head come from, in one sentence
        self.results: dict[str, float] = {}  # of the last evaluation
        smoothing = arguments.regularization.label_smoothing
        several = options["model"].config.problem_type == "multi_label_classification"
        if several and arguments.training.metric_for_best_model == "accuracy":  # the default
            arguments.training.metric_for_best_model = "mean_average_precision"
        _check_best_metric(arguments.training, several, options["model"].config.num_labels)
        loss = several_labels_loss if several else classification_loss
        super().__init__(
            args=arguments.training,
            callbacks=[_SetEpoch(self.train_sampler)],
            compute_loss_func=partial(loss, label_smoothing=smoothing),
            compute_metrics=_several_labels_metrics if several else _classification_metrics,
            **options,
        )
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # one of them is there
            self.remove_callback(callback)
        self.add_callback(ShowProgress())
        self._guard_trackers()
        self.model_accepts_loss_kwargs = False  # the loss takes the number of items; the model does not

    def _guard_trackers(self) -> None:
        names = {tracker: name for name, tracker in INTEGRATION_TO_CALLBACK.items()}
        callbacks = self.callback_handler.callbacks
        for place, callback in enumerate(callbacks):
            if type(callback) in names:
                callbacks[place] = GuardedTracker(names[type(callback)], callback)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        return self.train_sampler

    def get_train_dataloader(self) -> DataLoader:
        return _with_prepared_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return _with_prepared_workers(super().get_eval_dataloader(eval_dataset))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        _check_sharding(getattr(self.accelerator.state, "fsdp_plugin", None))
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        check_deepspeed(deepspeed.deepspeed_config if deepspeed else {})

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            # FSDP hands over a wrapped model, which the annotation of `Trainer` does not allow.
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, model))
            groups = self._parameter_groups(model)
            self.optimizer_cls_and_kwargs = optimizer_class, {**settings, "params": groups}
            self.group_settings = [{**settings, **group, "params": None} for group in groups]
        return super().create_optimizer(model)

    def _parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        layer_decay = self.arguments.regularization.layer_decay
        return layer_decay_groups(model, self.args.learning_rate, self.args.weight_decay, layer_decay, self.places)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward pass. Raises DivergedError if the loss is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        require_finite_loss(loss, self.state.global_step + 1, self.args)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and metrics. Raises DivergedError if the loss is not finite. The weights keep their precision."""
        with kept_precision(self.model):
            metrics = super().evaluate(*args, **kwargs)
        require_finite_evaluation(metrics, str(self.arguments.data.validation_split), self.state, self.args)
        return metrics

    def train_to_the_end(self) -> dict[str, float]:
        """Trains from the start or from the checkpoint, and returns the metrics of training.

        From a checkpoint of the last step nothing is trained: `Trainer` would do one step more.

        Raises:
            Preempted: after a signal. A checkpoint is saved.
            DivergedError: if the loss or a weight is not finite.
        """
        total = total_steps(self.args, len(self.train_dataset))
        if self.checkpoint is None or step_of(self.checkpoint) < total:
            with stopped_by_signals(self):
                return self.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None).metrics
        require(
            not (self.is_fsdp_enabled or self.is_deepspeed_enabled),
            f"{self.checkpoint} has all {total:,} steps of the run. Continue it without FSDP and DeepSpeed, which only"
            " load weights to train them.",
        )
        self.state = TrainerState.load_from_json(str(self.checkpoint / TRAINER_STATE_NAME))
        best = self._best_checkpoint() if self.args.load_best_model_at_end else None
        if best is not None:
            require_whole(best)
        self._load_from_checkpoint(str(best or self.checkpoint))
        return {"epoch": float(self.state.epoch or 0)}

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """Makes the output directory a model before the block, which evaluates the model.

        So a process that is killed while it evaluates, which may take long, costs no model. Each file in the directory
        is complete, or still the one of before. If the block shows that the training has diverged, the directory gets
        the files of before again.

        Raises:
            DivergedError: if a weight is not finite. Then nothing is written.
        """
        require_finite_weights(self.model, self.state.global_step, self.args)
        output_dir = Path(str(self.args.output_dir))
        unfinished, before = output_dir / ".tmp-export", output_dir / ".tmp-before"
        with disk_errors(output_dir):
            if self.is_world_process_zero():
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.save_model(str(unfinished), _internal_call=True)  # otherwise it is also uploaded, not yet evaluated
            self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            yield
            return
        with disk_errors(output_dir):
            write_readme(self, unfinished)
            written = replace_files_but_keep(unfinished, output_dir, before)
        try:
            yield
        except DivergedError:
            with disk_errors(output_dir):
                for file in written:
                    file.unlink(missing_ok=True)
                replace_files(before, output_dir)
            raise
        finally:
            shutil.rmtree(before, ignore_errors=True)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        require_finite_weights(self.model, self.state.global_step, self.args)
        save_checkpoint(self, partial(super()._save_checkpoint, model, trial), self.run_state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads the state of the optimizer, but keeps the settings of this run, such as the learning rate."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.optimizer and isinstance(self.lr_scheduler, LambdaLR):
            keep_settings(self.optimizer, self.lr_scheduler, self.group_settings)

    def _load_best_model(self) -> None:
        best = self._best_checkpoint()
        if best is not None:
            require_whole(best)
            self.state.best_model_checkpoint = str(best)
        super()._load_best_model()

    def _best_checkpoint(self) -> Path | None:
        """The best checkpoint, also if the output directory was moved since it was written. None if there is none."""
        if self.state.best_model_checkpoint is None:
            return None
        best = Path(self.state.best_model_checkpoint)
        moved = Path(str(self.args.output_dir)) / best.name
        return best if best.exists() else moved

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises ValueError if weights are missing or unknown. `Trainer` would only warn, and not load them."""
        require(
            not load_result.missing_keys and not load_result.unexpected_keys,
            f"The checkpoint lacks {load_result.missing_keys[:1]} and has {load_result.unexpected_keys[:1]} instead.",
        )

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Writes `{split}_results.json`, and adds the metrics to all_results.json. Each file is complete, or still the
        one of before; a damaged one begins anew."""
        if not self.is_world_process_zero():
            return
        output_dir = Path(str(self.args.output_dir))
        _write_json(output_dir / f"{split}_results.json", metrics)
        if combined:
            path, before = output_dir / "all_results.json", {}
            with suppress(OSError, ValueError):
                before = read_json_object(path)
            _write_json(path, {**before, **metrics})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            write_readme(self, Path(str(self.args.output_dir)))


@contextmanager
def kept_precision(model: torch.nn.Module) -> Iterator[None]:
    """After the block the weights are those of before. `Trainer` rounds them for fp16_full_eval and bf16_full_eval,
    and would save and upload the rounded ones."""
    parameters = [(parameter, parameter.data, parameter.dtype) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.dtype)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for parameter, data, dtype in parameters:
            if parameter.dtype != dtype:
                parameter.data = data
        for module, name, buffer, dtype in buffers:
            if getattr(module, name).dtype != dtype:
                setattr(module, name, buffer)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=4, sort_keys=True))


def _with_prepared_workers(loader: DataLoader) -> DataLoader:
    """No random state of a worker is used, so none is seeded. Accelerate wraps the loader that starts the workers."""
    getattr(loader, "base_dataloader", loader).worker_init_fn = ignore_stop_signals
    return loader


def total_steps(arguments: TrainingArguments, num_images: int) -> int:
    """How many optimizer steps a run on so many images has, as `Trainer` counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    divide = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = divide(num_images / (arguments.train_batch_size * arguments.world_size))
    steps_per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.num_train_epochs * steps_per_epoch)


def keep_settings(
    optimizer: torch.optim.Optimizer, scheduler: LambdaLR, group_settings: Sequence[dict[str, Any]]
) -> None:
    """Gives a loaded optimizer the settings of a resumed run, and the rate that its schedule has at this step.

    A loaded scheduler has the peak rates of the run before, and a loaded optimizer the rate that the old schedule had
    at its end, which is 0 if the run is then extended.

    Args:
        group_settings: for each parameter group "lr", the peak rate, and the other settings of the optimizer.
    """
    rates = []
    for group, settings, schedule in zip(optimizer.param_groups, group_settings, scheduler.lr_lambdas, strict=True):
        group.update({name: settings[name] for name in _KEPT_SETTINGS if name in group and name in settings})
        group["initial_lr"] = settings["lr"]
        rates.append(settings["lr"] * schedule(scheduler.last_epoch))
        group["lr"] = rates[-1]
    scheduler.base_lrs, scheduler._last_lr = [settings["lr"] for settings in group_settings], rates


def _check_sharding(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Raises ValueError if FSDP joins weights into one, so that they can have no learning rates of their own."""
    require(
        plugin is None or plugin.fsdp_version != 1 or plugin.use_orig_params,
        "FSDP version 1 needs use_orig_params (--fsdp_use_orig_params true): otherwise it joins weights into one, and"
        " they cannot have different learning rates and weight decays.",
    )


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raises ValueError if DeepSpeed would make an optimizer or a schedule of its own.

    Its optimizer has one group, so all layers would get one rate and biases would decay. Its schedule comes back from
    a checkpoint as it was, so a new rate on resume would be ignored.
    """
    for name in ("optimizer", "scheduler"):
        require(
            name not in config,
            f"The configuration of DeepSpeed has {name!r}: remove it. The arguments of this command say what it says,"
            " such as learning_rate and lr_scheduler_type.",
        )
