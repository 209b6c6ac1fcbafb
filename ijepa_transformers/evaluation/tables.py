# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The tables, the results file and the model card entries of a probing run."""

import dataclasses
import datetime
import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult

from .. import __version__
from ..encoders import EncoderSpec
from ..files import write_text
from ..model_card import in_markdown, update_evaluation
from .arguments import PROGRAM
from .collapse import COLUMN_LEGEND, LayerSpread, collapse_summary
from .features import Run
from .probes import Accuracies, format_table


def border_notes(rows: dict[str, list[dict]]) -> list[str]:
    """One remark for each probe whose sweep should be wider."""
    found = {}
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
def summarize(results: list[dict]) -> dict[str, float | Accuracies]:
    """The cells of a row by column: an accuracy, or several of draws or of entries with the same name."""
    cells = {}
    for column in dict.fromkeys(name for result in results for name in result["probes"]):
        values = [result["probes"][column] for result in results if column in result["probes"]]
        if len(results) > 1:
            cells[column] = Accuracies.of(value["accuracy"] for value in values)
        elif "draws" in values[0]:
            cells[column] = Accuracies.of(values[0]["draws"])
        else:
            cells[column] = values[0]["accuracy"]
    return cells


def accuracy_table(rows: dict[str, list[dict]]) -> str:
    return format_table([{"encoder": name, **summarize(results)} for name, results in rows.items()])


def random_layers(rows: dict[str, list[dict]], all_but_weights: str) -> list[LayerSpread] | None:
    """The layers of the first random encoder that differs from another encoder in the weights alone."""
    for result in (result for results in rows.values() for result in results):
        if is_random(result) and result["all_but_weights_sha256"] == all_but_weights and "collapse" in result:
            return [LayerSpread(**layer) for layer in result["collapse"]]
    return None


def is_random(result: dict) -> bool:
    return EncoderSpec.parse(result["spec"]).kind == "random"


def collapse_readings(rows: dict[str, list[dict]]) -> list[str]:
    """A line of plain words for each encoder."""
    lines = []
    for name, results in rows.items():
        for result in (result for result in results if "collapse" in result):
            title = name if len(results) == 1 else f"{name}, {result['spec']}"
            layers = [LayerSpread(**layer) for layer in result["collapse"]]
            beside = None if is_random(result) else random_layers(rows, result["all_but_weights_sha256"])
            lines.append(f"**{title}** is {collapse_summary(layers, beside)}")
    return lines


def collapse_table(rows: dict[str, list[dict]]) -> str:
    """A row for each layer of each encoder."""
    lines = []
    for name, results in rows.items():
        for result in results:
            title = {"encoder": name if len(results) == 1 else f"{name}, {result['spec']}"}
            for index, layer in enumerate(result.get("collapse", [])):
                place = {"layer": "embedding" if index == 0 else str(index)}
                lines.append({**title, **place, **LayerSpread(**layer).cells()})
    return format_table(lines)


ACCURACY_LEGEND = (
    "Top-1 accuracy of frozen features; ± is the standard deviation of what was averaged: the draws of a few-shot"
    " probe, or the encoders of a row that has several. Compare with the random encoder: what is not above it was not"
    " learned."
)


def report(run: Run, rows: dict[str, list[dict]]) -> str:
    """The tables and readings as markdown."""
    split = run.validation
    parts = [
        f"Measured on {len(split.indices):,} images of the {split.name!r} split of {run.arguments.data!r}; probes"
        f" learn from {len(run.train.indices):,} images of {run.train.name!r}, {len(run.train.labels.unique())}"
        " classes.",
    ]
    if any(result["probes"] for results in rows.values() for result in results):
        parts += [accuracy_table(rows), ACCURACY_LEGEND]
    chosen = [
        f"- {name}: {value['chosen']}"
        for name, results in rows.items()
        for result in results
        for value in result["probes"].values()
        if "chosen" in value
    ]
    parts += ["Best heads:\n\n" + "\n".join(chosen)] if chosen else []
    notes = [*run.notes, *border_notes(rows)]
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    readings = collapse_readings(rows)
    if readings:
        parts += ["### Has it collapsed?", "\n".join(f"- {reading}" for reading in readings)]
        parts += [collapse_table(rows), COLUMN_LEGEND]
    return "\n\n".join(parts)


def provenance(words: Sequence[str]) -> dict:
    packages = ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "numpy")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": f"{PROGRAM} {shlex.join(words)}",
        "versions": {
            "ijepa-transformers": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def write_results(run: Run, rows: dict[str, list[dict]], words: Sequence[str], unmeasured: Sequence[str] = ()) -> None:
    """results.json and results.md; `unmeasured` are the entries whose turn has not come yet."""
    origin = provenance(words)
    results = {
        **origin,
        "arguments": dataclasses.asdict(run.arguments),
        "data": {split.name: len(split.indices) for split in (run.train, run.validation)},
        "num_processes": run.accelerator.num_processes,
        "notes": [*run.notes, *border_notes(rows)],
        "unmeasured": list(unmeasured),
        "rows": [
            {"name": name, "summary": {k: as_json(v) for k, v in summarize(entries).items()}, "entries": entries}
            for name, entries in rows.items()
        ],
    }
    write_text(run.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    text = f"# Frozen encoders on {in_markdown(run.arguments.data)}\n\n{origin['date']}: `{origin['command']}`\n\n"
    text += f"**Unfinished**, still to be measured: {', '.join(unmeasured)}.\n\n" if unmeasured else ""
    write_text(run.output_dir / "results.md", f"{text}{report(run, rows)}\n")


def as_json(value: float | Accuracies) -> float | dict:
    return dataclasses.asdict(value) if isinstance(value, Accuracies) else value


# Model cards
def update_model_cards(run: Run, rows: dict[str, list[dict]], words: Sequence[str]) -> None:
    """The results of every local directory in its README.md, beside those of raw pixels and of the random encoders
    that differ from it in the weights alone."""
    origin = provenance(words)
    specs = [EncoderSpec.parse(result["spec"]) for results in rows.values() for result in results]
    for directory in sorted({spec.source for spec in specs if spec.kind == "model" and os.path.isdir(spec.source)}):
        baselines, own = {}, {}
        kin = {
            result["all_but_weights_sha256"]
            for results in rows.values()
            for result in results
            if EncoderSpec.parse(result["spec"]).source == directory
        }
        for name, results in rows.items():
            for result in results:
                spec = EncoderSpec.parse(result["spec"])
                if spec.kind == "raw_pixels" or (is_random(result) and result["all_but_weights_sha256"] in kin):
                    baselines.setdefault(name, []).append(result)
                elif spec.kind == "model" and spec.source == directory:
                    own[f"{spec.encoder} encoder"] = [result]
        text = f"{report(run, {**baselines, **own})}\n\n{origin['date']}: `{origin['command']}`"
        update_evaluation(Path(directory), text, card_results(run, own))


def card_results(run: Run, rows: dict[str, list[dict]]) -> list[EvalResult]:
    arguments = run.arguments
    name = Path(arguments.data).name if Path(arguments.data).exists() else arguments.data
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            dataset_config=arguments.data_config,
            dataset_split=run.validation.name,
            metric_type="accuracy",
            metric_name=f"{column}, {row}",
            metric_value=round(value["accuracy"], 4),
        )
        for row, results in rows.items()
        for column, value in results[0]["probes"].items()
    ]
