# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The tables, the results files and the model card sections of a probing run.

`rows` are results by name of the row: a list with one `Result` for each encoder of that name.
"""

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import EvalResult

from .. import __version__
from ..data.notices import counted
from ..encoders import EncoderSpec
from ..files import write_text
from ..model_card import in_code, in_markdown, in_one_line, update_evaluation
from ..verdict import (
    COLLAPSED,
    PIXELS,
    RANDOM,
    WITH_RANDOM_WEIGHTS,
    Score,
    Verdict,
    judge,
    judge_without_labels,
    with_spread,
)
from .collapse import COLUMN_LEGEND, LayerSpread, collapse_summary
from .features import Run, Split
from .probes import Accuracies, format_table


_PRECISION = "mean_average_precision"  # the measure where an image has several classes
Result: TypeAlias = dict[str, Any]  # all measures of one encoder, in values that JSON keeps
Rows: TypeAlias = dict[str, list[Result]]


def _border_notes(rows: Rows) -> list[str]:
    """A note for each probe whose sweep should be wider."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, results in rows.items():
        for probe, value in (pair for result in results for pair in result["probes"].items()):
            if value.get("border"):
                found.setdefault((probe, value["border"]), []).append(name)
    return [
        f"The best {probe} head has the {border} learning rate of the sweep for {', '.join(dict.fromkeys(names))}:"
        " widen the sweep."
        for (probe, border), names in found.items()
    ]


# Report
def _summarize(results: list[Result]) -> dict[str, float | Accuracies]:
    """The cells of a row by column: one accuracy, or those of several draws or of several encoders."""
    cells: dict[str, float | Accuracies] = {}
    for column in dict.fromkeys(name for result in results for name in result["probes"]):
        values = [result["probes"][column] for result in results if column in result["probes"]]
        if len(results) > 1:
            cells[column] = Accuracies.of(map(_measure, values))
        elif "draws" in values[0]:
            cells[column] = Accuracies.of(values[0]["draws"])
        else:
            cells[column] = _measure(values[0])
    return cells


def _measure(value: dict[str, Any]) -> float:
    """The number that stands in the table."""
    return value["accuracy"] if "accuracy" in value else value[_PRECISION]


def _accuracy_table(rows: Rows) -> str:
    return format_table([{"encoder": name, **_summarize(results)} for name, results in rows.items()])


def _random_layers(rows: Rows, all_but_weights: str) -> list[LayerSpread] | None:
    """The layers of the first random encoder that differs from an encoder in the weights only."""
    for result in (result for results in rows.values() for result in results):
        if _is_random(result) and result["all_but_weights_sha256"] == all_but_weights and "collapse" in result:
            return [LayerSpread(**layer) for layer in result["collapse"]]
    return None


def _is_random(result: Result) -> bool:
    return EncoderSpec.parse(result["spec"]).kind == "random"


def _random_row(rows: Rows, all_but_weights: str) -> list[Result]:
    """The results of the first row of random encoders that differ from an encoder in the weights only."""
    for results in rows.values():
        if all(_is_random(each) and each["all_but_weights_sha256"] == all_but_weights for each in results):
            return results
    return []


def _pixel_row(rows: Rows) -> list[Result]:
    kinds = {name: {EncoderSpec.parse(each["spec"]).kind for each in results} for name, results in rows.items()}
    return next((rows[name] for name, found in kinds.items() if found == {"raw_pixels"}), [])


def _scores(results: list[Result]) -> dict[str, Score]:
    """The accuracies of a row by column."""
    cells = _summarize(results)
    return {
        name: Score(cell.mean, cell.std, len(cell.accuracies)) if isinstance(cell, Accuracies) else Score(cell)
        for name, cell in cells.items()
    }


def _random_scores(results: list[Result]) -> dict[str, Score]:
    """The accuracies of a row of random encoders, with their spread over draws: measured if there are several."""
    scores = _scores(results)
    if len(results) < 2:
        return with_spread(scores)
    return {name: dataclasses.replace(score, spread=score.std) for name, score in scores.items()}


def _state(results: list[Result]) -> str | None:
    """The state of the last layer; that of a collapsed encoder if the row has one. None if it was not measured."""
    states = [result["collapse"][-1]["state"] for result in results if "collapse" in result]
    return COLLAPSED if COLLAPSED in states else next(iter(states), None)


def verdicts(rows: Rows, num_images: int) -> dict[str, Verdict]:
    """The verdict on each row of trained encoders; `num_images` are the validation images."""
    trained = (name for name, results in rows.items() if EncoderSpec.parse(results[0]["spec"]).kind == "model")
    return {name: _verdict(rows, name, num_images) for name in trained}


def _verdict(rows: Rows, name: str, num_images: int) -> Verdict:
    results, all_but_weights = rows[name], rows[name][0]["all_but_weights_sha256"]
    scores, random = _scores(results), _random_row(rows, all_but_weights)
    baselines = {RANDOM: _random_scores(random), PIXELS: _scores(_pixel_row(rows))}
    if set(scores) & set(baselines[RANDOM]):
        return judge(name, scores, baselines, num_images, _state(results))
    if scores:
        reason = f"{name} is not judged, because the table has no random encoder of its architecture."
        return Verdict((reason,), state=_state(results))
    if "collapse" not in results[0]:
        return Verdict((f"{name} has no accuracies, so nothing can be said about it.",))
    layers = _random_layers(rows, all_but_weights)
    last = LayerSpread(**results[0]["collapse"][-1])
    return judge_without_labels(name, last, layers[-1] if layers else None, WITH_RANDOM_WEIGHTS)


def _collapse_summaries(rows: Rows) -> list[str]:
    """One or two sentences for each encoder."""
    lines = []
    for name, results in rows.items():
        for result in (result for result in results if "collapse" in result):
            title = name if len(results) == 1 else f"{name}, {in_markdown(result['spec'])}"
            layers = [LayerSpread(**layer) for layer in result["collapse"]]
            random_layers = None if _is_random(result) else _random_layers(rows, result["all_but_weights_sha256"])
            lines.append(f"**{title}** is {collapse_summary(layers, random_layers)}")
    return lines


def _collapse_table(rows: Rows) -> str:
    """A row for each layer of each encoder."""
    lines = []
    for name, results in rows.items():
        for result in results:
            title = {"encoder": name if len(results) == 1 else f"{name}, {in_markdown(result['spec'])}"}
            for index, layer in enumerate(result.get("collapse", [])):
                place = {"layer": "embedding" if index == 0 else str(index)}
                lines.append({**title, **place, **LayerSpread(**layer).cells()})
    return format_table(lines)


_ACCURACY_LEGEND = (
    "Top-1 accuracy of frozen features; ± is the standard deviation over the draws of a few-shot probe, or over the"
    " encoders of a row if it has several. Compare with the random encoder: an accuracy that is not above its value"
    " shows no learning."
)


_PRECISION_LEGEND = (
    "Mean average precision (mAP) of frozen features over all classes, because an image may have several. Compare with"
    " the random encoder. There is no verdict: it is made for accuracies."
)


def _num_classes(split: Split) -> str:
    if split.has_several:
        return f"{split.labels.shape[1]} classes, several per image"
    return f"{len(split.labels.unique())} classes"


def _verdicts_of(run: Run, rows: Rows) -> dict[str, Verdict]:
    return {} if run.validation.has_several else verdicts(rows, len(run.validation.indices))


def report(run: Run, rows: Rows, with_layers: bool = True) -> str:
    """The verdicts, tables, notes and summaries as markdown.

    Args:
        with_layers: whether the table of every layer is included, which is long.
    """
    rows = {in_markdown(name): results for name, results in rows.items()}
    split, data = run.validation, in_markdown(repr(run.arguments.data))
    names = {each.name: in_markdown(repr(each.name)) for each in (run.train, run.validation)}
    found = _verdicts_of(run, rows)
    parts = ["### Verdict", "\n".join(f"- {verdict}" for verdict in found.values())] if found else []
    parts += [
        *(["### Numbers"] if found else []),
        f"Measured on {counted(len(split.indices), 'image')} of the {names[split.name]} split of {data}; probes"
        f" learn from {counted(len(run.train.indices), 'image')} of {names[run.train.name]},"
        f" {_num_classes(run.train)}.",
    ]
    if any(result["probes"] for results in rows.values() for result in results):
        parts += [_accuracy_table(rows), _PRECISION_LEGEND if split.has_several else _ACCURACY_LEGEND]
    chosen = [
        f"- {name}: {in_markdown(value['chosen'])}"
        for name, results in rows.items()
        for result in results
        for value in result["probes"].values()
        if "chosen" in value
    ]
    parts += ["Best heads:\n\n" + "\n".join(chosen)] if chosen else []
    notes = [*map(in_markdown, run.notes), *_border_notes(rows)]
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    summaries = _collapse_summaries(rows)
    if summaries:
        parts += ["### Has it collapsed?", "\n".join(f"- {summary}" for summary in summaries)]
        parts += [_collapse_table(rows), COLUMN_LEGEND] if with_layers else []
    return "\n\n".join(parts)


def _provenance(command: str) -> dict[str, Any]:
    """Date, command and versions."""
    packages = ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "numpy")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "versions": {
            "ijepa-transformers": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def write_results(run: Run, rows: Rows, command: str, unmeasured: Sequence[str] = ()) -> None:
    """Writes results.json and results.md; `unmeasured` are the names of the entries that are not measured yet."""
    origin = _provenance(command)
    found = _verdicts_of(run, rows)
    results = {
        **origin,
        "arguments": dataclasses.asdict(run.arguments),
        "data": {split.name: len(split.indices) for split in (run.train, run.validation)},
        "num_processes": run.accelerator.num_processes,
        "notes": [*run.notes, *_border_notes(rows)],
        "unmeasured": list(unmeasured),
        "rows": [
            {
                "name": name,
                "summary": summary,
                "verdict": found[name].as_json() if name in found else None,
                "entries": rows[name],
            }
            for name, summary in summaries(rows).items()
        ],
    }
    write_text(run.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    text = (
        f"# Frozen encoders on {in_markdown(run.arguments.data)}\n\n{origin['date']}: {in_code(origin['command'])}\n\n"
    )
    text += f"**Unfinished**, not measured yet: {', '.join(map(in_markdown, unmeasured))}.\n\n" if unmeasured else ""
    write_text(run.output_dir / "results.md", f"{text}{report(run, rows)}\n")


def summaries(rows: Rows) -> dict[str, dict[str, Any]]:
    """The accuracies of each row by column, in values that JSON has."""
    return {name: {k: _as_json(v) for k, v in _summarize(results).items()} for name, results in rows.items()}


def _as_json(value: float | Accuracies) -> float | dict[str, Any]:
    return dataclasses.asdict(value) if isinstance(value, Accuracies) else value


# Model cards
def update_model_cards(run: Run, rows: Rows, command: str) -> None:
    """Writes the results of each local directory into its README.md, with those of raw pixels and random encoders.

    Only random encoders that differ from the directory's encoder in nothing but the weights are included.
    """
    origin = _provenance(command)
    specs = [EncoderSpec.parse(result["spec"]) for results in rows.values() for result in results]
    for directory in sorted({spec.source for spec in specs if spec.kind == "model" and os.path.isdir(spec.source)}):
        baselines, own = _rows_of_card(rows, directory)
        text = f"{report(run, {**baselines, **own})}\n\n{origin['date']}: {in_code(origin['command'])}"
        update_evaluation(Path(directory), text, _card_results(run, own))


def _rows_of_card(rows: Rows, directory: str) -> tuple[Rows, Rows]:
    """The baselines of a local directory, and the results of its own encoders."""
    baselines: Rows = {}
    own: Rows = {}
    all_results = [(name, result) for name, results in rows.items() for result in results]
    specs = [EncoderSpec.parse(result["spec"]) for _, result in all_results]
    architectures = {
        result["all_but_weights_sha256"]
        for (_, result), spec in zip(all_results, specs, strict=True)
        if spec.source == directory
    }
    for (name, result), spec in zip(all_results, specs, strict=True):
        is_related = spec.kind == "random" and result["all_but_weights_sha256"] in architectures
        if spec.kind == "raw_pixels" or is_related:
            baselines.setdefault(name, []).append(result)
        elif spec.kind == "model" and spec.source == directory:
            own[f"{spec.encoder} encoder"] = [result]
    return baselines, own


def _card_results(run: Run, rows: Rows) -> list[EvalResult]:
    """The accuracies for the card's metadata."""
    arguments = run.arguments
    path = Path(arguments.data)
    name = in_one_line(path.absolute().name if path.exists() else arguments.data)
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            dataset_config=arguments.data_config,
            dataset_split=in_one_line(run.validation.name),
            metric_type=_PRECISION if _PRECISION in value else "accuracy",
            metric_name=f"{column}, {row}",
            metric_value=round(_measure(value), 4),
        )
        for row, results in rows.items()
        for column, value in results[0]["probes"].items()
    ]
