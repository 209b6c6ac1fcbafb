# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""README.md of a fine-tuned classifier."""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from ..data.notices import counted
from ..model_card import fenced_yaml, in_markdown, in_quotes, inherited_license, write_card
from .checkpointing import plain_values


if TYPE_CHECKING:
    from .trainer import ClassificationTrainer


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

An image classifier for {num_classes} classes{each} ({classes}), {origin} by ijepa-transformers.

```python
{usage}
```

## Training

- data: {data}, {images} of the split {split}
- base model: {model}
{history}
Arguments that differ from the defaults (`recipe.yaml`):

{recipe}
{results}"""


def write_readme(trainer: "ClassificationTrainer", directory: Path) -> None:
    """Writes README.md of a directory of the model: base model, data, arguments and results."""
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
    history = "".join(f"- {in_markdown(change)}\n" for change in trainer.run_state["history"])
    lines = [f"- {in_markdown(key.removeprefix('eval_'))}: {value:.4g}" for key, value in trainer.results.items()]
    name = trainer.args.hub_model_id or Path(trainer.args.output_dir).name
    validation = arguments.data.validation_split
    is_grey = getattr(trainer.model.config, "num_channels", 3) == 1
    body = _CARD.format(
        name=in_markdown(name),
        usage=(_USAGE_OF_GREY if is_grey else _USAGE).format(name=in_quotes(name)),
        num_classes=len(names),
        each=", several per image," if trainer.model.config.problem_type == "multi_label_classification" else "",
        classes=", ".join(map(in_markdown, names[:10])) + (", ..." if len(names) > 10 else ""),
        origin="trained from scratch" if arguments.model.from_scratch else origin,
        data=in_markdown(arguments.data.data),
        images=counted(len(trainer.train_dataset), "image"),
        split=in_markdown(repr(arguments.data.train_split)),
        model=in_markdown(source),
        history=history,
        recipe=fenced_yaml(plain_values(arguments.recipe)),
        results=f"\n## Results on {in_markdown(repr(validation))}\n\n" + "\n".join(lines) + "\n" if lines else "",
    )
    write_card(directory, data, body)
