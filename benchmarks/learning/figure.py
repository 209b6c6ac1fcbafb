# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Draws the results of studies: a panel for each, with the mean over the seeds and each seed as a dot.

python benchmarks/learning/figure.py --output features.png "photo crops=STUDY.yaml,OUT/results.jsonl" ...

Rows of other settings or another length than the study has today are left out.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.learning.study import finished_rows, read_study, wanted_runs
from ijepa_transformers.arguments import require


MOST_IN_A_ROW = 3
MEASURES = {"knn": "20-NN", "shot5": "5-shot", "linear": "logistic"}
# Line of the study -> label, prefix of its accuracies and colour.
LINES = {
    "raw pixels": ("raw pixels", "", "#bbbbbb"),
    "random encoder": ("random encoder", "", "#888888"),
    "MAE": ("MAE", "encoder ", "#d98c3f"),
    "ours": ("ours, target encoder", "target ", "#2f6fa8"),
}


def accuracies(rows: list[dict[str, Any]], line: str, measure: str) -> list[float]:
    """One for each seed, seed by seed."""
    key = f"{LINES[line][1]}{measure}"
    found = {row["settings"]["seed"]: row[key] for row in rows if row["name"] == line and key in row}
    return [found[seed] for seed in sorted(found)]


def draw_panel(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    width = 0.8 / len(LINES)
    for place, (line, (label, _, colour)) in enumerate(LINES.items()):
        for group, measure in enumerate(MEASURES):
            values = accuracies(rows, line, measure)
            if values:
                x = group + (place - (len(LINES) - 1) / 2) * width
                axes.bar(x, statistics.mean(values), width * 0.92, color=colour, label=label if not group else None)
                axes.plot([x] * len(values), values, ".", color="black", markersize=3)
    axes.set_xticks(range(len(MEASURES)), MEASURES.values())
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, None)


def rows_of(study_file: str, results: str) -> list[dict[str, Any]]:
    """The rows of the table of a study that are there.

    Raises:
        ValueError, OSError: if one of the files is not what it should be, or if there is no row.
    """
    study = read_study(Path(study_file))
    require(Path(results).is_file(), f"there is no file {results!r}")
    rows = finished_rows(wanted_runs(study, "final", study.get("seeds", [0]), None), Path(results))
    require(rows, f"{results!r} has no row of --part final with the settings of {study_file!r}")
    return rows


def draw(studies: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Few panels in a row, so that the words are large enough to read on a page of 700 pixels."""
    columns = min(len(studies), MOST_IN_A_ROW)
    lines = math.ceil(len(studies) / columns)
    figure, panels = plt.subplots(lines, columns, figsize=(2.7 * columns, 2.4 * lines + 0.4), squeeze=False)
    for axes, (title, rows) in zip(panels.flat, studies.items(), strict=False):
        draw_panel(axes, title, rows)
    for axes in panels.flat[len(studies) :]:
        axes.set_axis_off()
    for line in panels:
        line[0].set_ylabel("accuracy")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(LINES), frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    figure.savefig(output, dpi=150)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("studies", nargs="+", metavar="TITLE=STUDY.yaml,RESULTS.jsonl")
    parser.add_argument("--output", type=Path, required=True)
    own = parser.parse_args(words)
    try:
        named = {title: files.split(",") for title, _, files in (word.partition("=") for word in own.studies)}
        if wrong := [title for title, files in named.items() if len(files) != 2]:
            raise ValueError(f"{wrong[0]!r} needs two files: TITLE=STUDY.yaml,RESULTS.jsonl")
        draw({title: rows_of(*files) for title, files in named.items()}, own.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
