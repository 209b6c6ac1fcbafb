# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The README.md of a pretrained directory: what it is, how to use it, what it was trained on and what it reached."""

from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData


USAGE = """\
```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
features = model(**processor(image, return_tensors="pt")).last_hidden_state.mean(1)  # one vector per image
```"""

BODY = """\
# {name}

An I-JEPA encoder ([arXiv 2301.08243](https://arxiv.org/abs/2301.08243)) pretrained without labels by
ijepa-transformers. The directory holds three networks: the target encoder (`ijepa`, the moving average the paper
evaluates, and what `AutoModel` opens), the context encoder and the predictor (for `IJepaForPretraining`, to continue
pretraining). There is no class token: an image's feature is the mean over its patch tokens.

{usage}

## Training

{summary}

Effective recipe (`recipe.yaml`):

```yaml
{recipe}```
{results}{metrics}"""

METRICS = """
## Curves

![loss, rank, k-NN and schedules over the run](curves.png)

Last row of `metrics.jsonl`: {last}
"""


def inherited_license(source: str | None) -> str | None:
    """The licence named in the model card of the directory a run starts from, or None."""
    card = Path(source) / "README.md" if source else None
    return ModelCard.load(card).data.license if card and card.is_file() else None


def _in_words(metrics: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, int | float)) + "."


def write_model_card(
    directory: Path,
    name: str,
    summary: Mapping[str, object],
    metrics: Mapping[str, object],
    recipe: Mapping[str, object],
    results: str | None = None,
    base_model: str | None = None,
) -> None:
    """Writes `directory`/README.md.

    Args:
        name: name of the model, in the title and in the example.
        summary: facts of the run, one line each.
        metrics: the last row of metrics; empty when there are no curves yet.
        recipe: the effective arguments.
        results: a table of accuracies, if any were measured.
        base_model: what the run started from, a Hub name or a directory; the licence in a directory's card is carried
            over, that of a Hub repository is not looked up.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["ijepa", "self-supervised-learning"],
        # The Hub refuses a card whose base_model is a path; the licence of a local directory still carries over.
        base_model=None if base_model and Path(base_model).exists() else base_model,
        license=inherited_license(base_model),
    )
    body = BODY.format(
        name=name,
        usage=USAGE.format(name=name),
        summary="\n".join(f"- {key}: {value}" for key, value in summary.items()),
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False),
        results=f"\n## Results\n\n{results}\n" if results else "",
        metrics=METRICS.format(last=_in_words(metrics)) if metrics else "",
    )
    # Written directly: ModelCard.save and ModelCard.validate may ask the Hub.
    (directory / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{body}")
