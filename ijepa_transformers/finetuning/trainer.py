# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The loss, the metrics, the Trainer and the model card of fine-tuning."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import FullyShardedDataParallelPlugin
from huggingface_hub import ModelCardData
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_outputs import ImageClassifierOutput

from ..arguments import require
from ..data.datasets import FineTuningImages, LabelledImages
from ..data.order import EpochSampler
from ..evaluation.probes import accuracy_metric
from ..model_card import fenced_yaml, in_markdown, in_quotes, inherited_license, write_card
from ..optimization import layer_decay_groups, parameter_places
from .training_arguments import Arguments, FineTuningArguments


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


def _classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracies of logits (images, classes), and the number of images."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    accuracies = accuracy_metric().compute(predictions=logits, references=prediction.label_ids)
    return {**accuracies, "images": len(prediction.label_ids)}


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
        options: `model`, data sets, image processor and collator for `Trainer`.

    Raises:
        ValueError: if `layer_decay` is below 1 and the layers of the model are unknown.
    """

    args: FineTuningArguments
    model: PreTrainedModel
    train_dataset: FineTuningImages
    eval_dataset: LabelledImages | None

    def __init__(self, arguments: Arguments, checkpoint: str | None, **options: Any):
        self.arguments, self.checkpoint = arguments, checkpoint
        # Read from the model here, because FSDP version 1 wraps it before the optimizer is built.
        self.places = parameter_places(options["model"], arguments.regularization.layer_decay)
        self.train_sampler = EpochSampler(len(options["train_dataset"]), arguments.training.order_seed)
        self.results: dict[str, float] = {}  # of the last evaluation
        smoothing = arguments.regularization.label_smoothing
        super().__init__(
            args=arguments.training,
            callbacks=[_SetEpoch(self.train_sampler)],
            compute_loss_func=partial(classification_loss, label_smoothing=smoothing),
            compute_metrics=_classification_metrics,
            **options,
        )
        self.model_accepts_loss_kwargs = False  # the loss takes the number of items; the model does not

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        return self.train_sampler

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        _check_sharding(getattr(self.accelerator.state, "fsdp_plugin", None))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            # FSDP hands over a wrapped model, which the annotation of `Trainer` does not allow.
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, model))
            groups = self._parameter_groups(model)
            self.optimizer_cls_and_kwargs = optimizer_class, {**settings, "params": groups}
        return super().create_optimizer(model)

    def _parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        layer_decay = self.arguments.regularization.layer_decay
        return layer_decay_groups(model, self.args.learning_rate, self.args.weight_decay, layer_decay, self.places)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises ValueError if weights are missing or unknown. `Trainer` would only warn, and not load them."""
        require(
            not load_result.missing_keys and not load_result.unexpected_keys,
            f"The checkpoint lacks {load_result.missing_keys[:1]} and has {load_result.unexpected_keys[:1]} instead.",
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            write_readme(self)


def _check_sharding(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Raises ValueError if FSDP joins weights into one, so that they can have no learning rates of their own."""
    require(
        plugin is None or plugin.fsdp_version != 1 or plugin.use_orig_params,
        "FSDP version 1 needs use_orig_params (--fsdp_use_orig_params true): otherwise it joins weights into one, and"
        " they cannot have different learning rates and weight decays.",
    )


def plain_values(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with plain values instead of enumerations, so that YAML can write it."""
    return {name: getattr(value, "value", value) for name, value in recipe.items()}


# Model card
_USAGE = """\
from transformers import pipeline

classifier = pipeline("image-classification", "{name}")
classifier("image.png")"""
# The pipeline converts all images to RGB, which an image processor for one channel refuses.
_USAGE_OF_GREY = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModelForImageClassification.from_pretrained("{name}")
logits = model(**processor(Image.open("image.png").convert("L"), return_tensors="pt")).logits
model.config.id2label[logits.argmax().item()]"""
_CARD = """\
# {name}

An image classifier for {num_classes} classes ({classes}), {origin} by ijepa-transformers.

```python
{usage}
```

## Training

- data: {data}, {num_images:,} images of the split {split!r}
- base model: {model}

Arguments that differ from the defaults (`recipe.yaml`):

{recipe}
{results}"""


def write_readme(trainer: ClassificationTrainer) -> None:
    """Writes README.md of the output directory: base model, data, arguments and results."""
    arguments = trainer.arguments
    names, source = list((trainer.model.config.id2label or {}).values()), arguments.model.model
    origin = {"all": "fine-tuned", "head": "with a trained head on a frozen encoder,"}[arguments.model.tune]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["ijepa"] if trainer.model.config.model_type == "ijepa" else [],
        # The Hub refuses a path as base_model. The licence of a local directory is still inherited.
        base_model=None if Path(source).exists() or arguments.model.from_scratch else source,
        license=None if arguments.model.from_scratch else inherited_license(source),
    )
    lines = [f"- {key.removeprefix('eval_')}: {value:.4g}" for key, value in trainer.results.items()]
    name = trainer.args.hub_model_id or Path(trainer.args.output_dir).name
    is_grey = getattr(trainer.model.config, "num_channels", 3) == 1
    body = _CARD.format(
        name=in_markdown(name),
        usage=(_USAGE_OF_GREY if is_grey else _USAGE).format(name=in_quotes(name)),
        num_classes=len(names),
        classes=", ".join(map(in_markdown, names[:10])) + (", ..." if len(names) > 10 else ""),
        origin="trained from scratch" if arguments.model.from_scratch else origin,
        data=in_markdown(arguments.data.data),
        num_images=len(trainer.train_dataset),
        split=arguments.data.train_split,
        model=in_markdown(source),
        recipe=fenced_yaml(plain_values(arguments.recipe)),
        results=f"\n## Results on {arguments.data.validation_split!r}\n\n" + "\n".join(lines) + "\n" if lines else "",
    )
    write_card(Path(trainer.args.output_dir), data, body)
