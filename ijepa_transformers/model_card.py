# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The model card, README.md of a pretrained directory: what it is, how to use it, its training and its results."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from .data.notices import tell
from .files import write_text, written_aside


USAGE = """\
```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
features = model(**processor(image, return_tensors="pt")).last_hidden_state.mean(1)  # one vector per image
```

The processor takes the pixels that it is given. The commands of ijepa-transformers turn photos upright by their EXIF
data and scale 16-bit values, which PIL does not. For such files read the image as they do, or the features differ
(cosine .99 for a photo on its side, .51 for 16-bit grey):

```python
from ijepa_transformers.data import decode_image

white = getattr(processor, "sixteen_bit_max", None)  # of the 16-bit images that it was trained on
image = decode_image({{"path": "photo.jpg", "bytes": None}}, model.config.num_channels, sixteen_bit_max=white)
```"""
_BODY = """\
# {name}

An I-JEPA encoder ([arXiv 2301.08243](https://arxiv.org/abs/2301.08243)) pretrained without labels by
ijepa-transformers. The directory holds three networks: the target encoder (`ijepa`, the moving average the paper
evaluates, and what `AutoModel` opens), the context encoder and the predictor (for `IJepaForPretraining`, to continue
pretraining). There is no class token: an image's feature is the mean over its patch tokens.

{usage}

## Training

{summary}

Effective recipe (`recipe.yaml`):

{recipe}
{verdict}{results}{metrics}"""
_METRICS = """
## Curves

![loss, rank, k-NN and schedules over the run](curves.png)

Last row of `metrics.jsonl`: {last}
"""


# What can be markup anywhere in a line, and what can be at its beginning or end.
_MARKUP = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])|^[-+=#]|#(?=#*$)|:(?=//)|(?<=\bwww)\.", re.IGNORECASE)
_NUMBER_OF_A_LIST = re.compile(r"^(\d+)([.)])")


def _printable(text: str) -> str:
    """Text with escape sequences for the characters that cannot be printed, such as those that turn its direction."""
    return "".join(c if c.isprintable() or ord(c) > 0xFFFF else f"\\u{ord(c):04x}" for c in text)


def in_one_line(text: object) -> str:
    """Text without line breaks and control characters, because names may contain any character."""
    return _printable(" ".join(str(text).split()))


def in_markdown(text: object) -> str:
    """Text for one line of markdown, with markup and HTML escaped, because names may contain any character."""
    escaped = _MARKUP.sub(lambda found: "\\" + found[0], " ".join(str(text).split()))
    return _printable(_NUMBER_OF_A_LIST.sub(r"\1\\\2", escaped))


def in_code(text: str) -> str:
    """Text as code in one line of markdown. Text that could end the code or the line is written as `in_markdown`."""
    is_plain = text.strip() == text != "" and text.isprintable() and not re.search("[`<>|]", text)
    return f"`{text}`" if is_plain else in_markdown(text)


def in_quotes(text: object) -> str:
    """Text for use between the double quotes of a Python or JSON string."""
    return _printable(json.dumps(str(text), ensure_ascii=False)[1:-1]).replace("<", "\\u003c")


class _LineDumper(yaml.SafeDumper):
    """Writes a text of several lines, and one with HTML, as one line in double quotes."""


def _one_line(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "<" in text or len(text.splitlines()) > 1 else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_LineDumper.add_representer(str, _one_line)


def fenced_yaml(values: Mapping[str, object]) -> str:
    """A code block of YAML. Its fence is longer than every run of backticks in the values, so no value can end it."""
    text = yaml.dump(dict(values), Dumper=_LineDumper, sort_keys=False, width=math.inf).replace("<", "\\x3C")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}"


def inherited_license(source: str | None) -> str | None:
    """The licence in the model card of `source`, if it is a directory with a card; otherwise None.

    If the metadata of the card cannot be read, a notice says so.
    """
    card = Path(source) / "README.md" if source else None
    if card is None or not card.is_file():
        return None
    try:
        return ModelCard.load(card).data.license
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        tell(f"no licence is taken from {card}, because its metadata cannot be read: {' '.join(str(error).split())}")
        return None


def write_card(directory: Path, data: ModelCardData, body: str) -> None:
    """Writes `directory`/README.md from metadata and text. The file is complete or absent.

    File names may contain bytes that are not Unicode; they are written as escape sequences.
    """
    card = ModelCard("---\n{}\n---\n\n" + body)  # the empty metadata avoids a warning
    card.data = data
    write_text(directory / "README.md", str(card).encode("utf-8", "backslashreplace").decode("utf-8"))


def _in_words(metrics: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, int | float)) + "."


def write_model_card(
    directory: Path,
    name: str,
    summary: Mapping[str, object],
    metrics: Mapping[str, object],
    recipe: Mapping[str, object],
    results: str | None = None,
    verdict: str | None = None,
    base_model: str | None = None,
) -> None:
    """Writes `directory`/README.md.

    Args:
        directory: of the model.
        name: of the model, for the title and the example.
        summary: facts of the run, one line each.
        metrics: the last row of metrics; empty if there are no curves yet.
        recipe: the effective arguments.
        results: a table of accuracies, if any were measured.
        verdict: what the measures say, at the end of the run.
        base_model: the directory or the name on the Hub that the run started from. The licence in the card of a
            directory is copied; that of a Hub repository is not looked up.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["ijepa", "self-supervised-learning"],
        # The Hub refuses a card whose base_model is a path.
        base_model=None if base_model and Path(base_model).exists() else base_model,
        license=inherited_license(base_model),
    )
    body = _BODY.format(
        name=in_markdown(name),
        usage=USAGE.format(name=in_quotes(name)),
        summary="\n".join(f"- {key}: {in_markdown(value)}" for key, value in summary.items()),
        recipe=fenced_yaml(recipe),
        verdict=f"\n## Verdict\n\n{verdict}\n" if verdict else "",
        results=f"\n## Results\n\n{results}\n" if results else "",
        metrics=_METRICS.format(last=_in_words(metrics)) if metrics else "",
    )
    write_card(directory, data, body)


# Evaluation results in an existing card, ours or another
_SECTION_BEGIN = "<!-- Evaluation by run_probing.py: replaced when it runs again -->"
_SECTION_END = "<!-- End of the evaluation by run_probing.py -->"
# Suffix of the name of every result in the metadata. Results with it are replaced when probing runs again.
_RESULT_SUFFIX = " (frozen features)"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# A key in the first column and its value: indented lines, and list entries in the first column.
_MODEL_INDEX = re.compile(r"^model-index:.*\n(?:(?:[ \t]|- ).*\n)*", re.MULTILINE)


def update_evaluation(directory: Path, section: str, results: Sequence[EvalResult]) -> None:
    """Writes the section "Evaluation" and the metadata `model-index` into `directory`/README.md, which may be absent.

    The section and the results of an earlier call are replaced. Every other byte of the card stays, also results with
    other names in `model-index`.

    Args:
        directory: of the model.
        section: markdown below the title "Evaluation".
        results: each with a `metric_name`, to which " (frozen features)" is added. `model-index` is left out if there
            are no results at all.

    Raises:
        ValueError: if the metadata of the card is not YAML, or its `model-index` does not have the form that the Hub
            requires.
    """
    path = directory / "README.md"
    card = path.read_bytes().decode("utf-8") if path.exists() else ""
    card = _with_section(_with_results(card, in_one_line(directory.absolute().name), results), section)
    with written_aside(path) as unfinished:
        unfinished.write_bytes(card.encode("utf-8"))


def _with_section(card: str, section: str) -> str:
    text = f"{_SECTION_BEGIN}\n## Evaluation\n\n{section.strip()}\n{_SECTION_END}\n"
    begin, end = card.find(_SECTION_BEGIN), card.find(_SECTION_END)
    if 0 <= begin < end:
        return card[:begin] + text + card[end + len(_SECTION_END) :].removeprefix("\n")
    separator = "" if card.endswith("\n\n") else "\n" if card.endswith("\n") else "\n\n"
    return card + separator + text


def _with_results(card: str, name: str, results: Sequence[EvalResult]) -> str:
    match = _FRONT_MATTER.match(card)
    begin, end = match.span(1) if match else (0, 0)
    metadata = card[begin:end]
    try:
        model_index = (yaml.safe_load(metadata) or {}).get("model-index")
        name, others = model_index_to_eval_results(model_index) if model_index else (name, [])
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"The metadata of the model card of {name!r} cannot be read: {error!r}") from None
    kept = [result for result in others if not (result.metric_name or "").endswith(_RESULT_SUFFIX)]
    ours = [replace(result, metric_name=f"{result.metric_name}{_RESULT_SUFFIX}") for result in results]
    index = {"model-index": eval_results_to_model_index(name, [*kept, *ours])}
    # The Hub refuses an index without results.
    block = yaml.safe_dump(index, sort_keys=False, allow_unicode=True) if kept or ours else ""
    if not match:
        return f"---\n{block}---\n\n{card}" if block else card
    found = _MODEL_INDEX.search(metadata)
    first, last = found.span() if found else (len(metadata), len(metadata))
    return card[:begin] + metadata[:first] + block + metadata[last:] + card[end:]
