# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Curves of one or more pretraining runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry = TypeVar("Entry")


class Panel(NamedTuple):
    """One box of the figure."""

    title: str
    ylabel: str
    lines: dict[str, str]  # metric key -> name in the legend
    from_zero: bool = False  # whether the axis starts at 0


BASELINE_KEY, BASELINE_OF = "random_knn_accuracy", "knn_accuracy"
PANELS = (
    Panel("k-NN accuracy (higher is better)", "share of images right", {"knn_accuracy": "target encoder"}, True),
    Panel("Effective rank (falling to 1 = collapse)", "directions used", {"effective_rank": "target features"}, True),
    Panel("Spread over images (0 = collapse)", "std of the features", {"target_std": "target features"}, True),
    Panel("Loss (not a measure of quality)", "loss per target value", {"loss": "loss"}),
    Panel("Gradient norm", "L2 norm", {"grad_norm": "gradient norm"}, True),
    Panel("Learning rate", "learning rate", {"learning_rate": "learning rate"}, True),
    Panel("Weight decay", "weight decay", {"weight_decay": "weight decay"}),
    Panel("Target momentum", "share kept per step", {"momentum": "momentum"}),
    Panel("Patches per mask", "patches", {"context_tokens": "context", "target_tokens": "one target block"}, True),
    Panel("Speed", "images per second", {"images_per_second": "images per second"}, True),
)
CAPTION = "The loss may rise while rank and k-NN improve: judge by those."
# Blue, orange, green, purple, dark yellow, black. Colour-blind readers can tell them apart.
COLORS = ("#0b5fa5", "#c8511b", "#00805e", "#9b3f86", "#a67c00", "#222222")
RUN_STYLES = (("-", "o"), (":", "x"))  # line and mark of a panel's first and second metric, if a colour means a run
FEW_POINTS, MANY_POINTS = (
    60,
    400,
)  # up to FEW, each point is marked; above MANY, a running mean is drawn over the points
Rows = Sequence[Mapping[str, float]]


def plot_training_curves(
    metrics: Rows | Mapping[str, Rows], path: str | Path | BinaryIO, title: str | None = None
) -> None:
    """Draws the rows of one `metrics.jsonl`, or of several runs together, a panel for each metric that occurs.

    Args:
        metrics: one mapping per logged step, in order; or the name of each run -> its rows. The x axis is `step`, or
            the number of the row if there is no `step`. Known keys are those of `PANELS`, and `random_knn_accuracy`:
            the last value of this k-NN baseline becomes a dashed line. Rows may lack any key. Other keys, None, NaN
            and infinity are not drawn. Several runs differ in colour and share one legend.
        path: where to write. Its ending (.png, .svg, .pdf) decides the format. A file object gets PNG.
        title: first line of the picture, such as the recipe's name.

    Raises:
        ValueError: no row holds a known key.
    """
    runs: Mapping[str, Rows] = metrics if isinstance(metrics, Mapping) else {"": metrics}
    rows = [row for run in runs.values() for row in run]
    panels = [panel for panel in PANELS if any(len(_series(rows, key)[0]) for key in panel.lines)]
    if not panels:
        seen = sorted({key for row in rows for key in row})
        raise ValueError(f"none of the metrics can be drawn: {len(rows)} rows with the keys {seen}")
    figure = _draw_panels(panels, runs, x_label=_x_label(rows))
    if len(runs) > 1:
        _name_runs(figure, list(runs), title)
    elif title:
        figure.suptitle(title, fontsize=15, fontweight="bold", parse_math=False)
    figure.supxlabel(CAPTION, fontsize=12, style="italic")
    figure.savefig(path, dpi=150)


def _x_label(rows: Rows) -> str:
    return "optimizer step" if any("step" in row for row in rows) else "number of the logged row"


def _draw_panels(panels: Sequence[Panel], runs: Mapping[str, Rows], x_label: str) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot, which chooses a backend and can open a window
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    size = max(6, 4.2 * num_columns), 2.8 * num_rows + 0.8
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = None
    for position, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, position, sharex=axes)
        _draw_panel(axes, panel, list(runs.values()))
        if position > len(panels) - num_columns:  # the lowest panel of each column
            axes.set_xlabel(x_label, fontsize=11.5)
    return figure


def _series(metrics: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that hold a finite `key`."""
    found = [(row.get("step", index), row[key]) for index, row in enumerate(metrics) if row.get(key) is not None]
    points = np.array([point for point in found if math.isfinite(point[1])], dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _name_runs(figure: "Figure", names: list[str], title: str | None) -> None:
    """The title and the names of the runs at the top of the figure."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=run_color(number), linewidth=4) for number in range(len(names))]
    columns = max(1, min(len(names), 80 // max(len(name) + 8 for name in names)))
    handles, names = legend_row_by_row(handles, columns), legend_row_by_row(names, columns)
    legend = figure.legend(
        handles, names, title=title, loc="outside upper center", ncols=columns, fontsize=12, frameon=False
    )
    legend.get_title().set(fontsize=15, fontweight="bold")
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)  # a dollar sign in a name does not start a formula


def legend_row_by_row(entries: Sequence[Entry], columns: int) -> list[Entry]:
    """Reorders the entries of a legend to read row by row. matplotlib fills a legend column by column."""
    return [entry for column in range(columns) for entry in entries[column::columns]]


def run_color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _draw_panel(axes: "Axes", panel: Panel, runs: Sequence[Rows]) -> None:
    drawn = [key for key in panel.lines if any(len(_series(rows, key)[0]) for rows in runs)]
    for number, rows in enumerate(runs):
        for place, key in enumerate(drawn):
            label = panel.lines[key] if number == 0 else None  # the legend of the figure names the runs
            _draw_line(axes, *_series(rows, key), label, **_line_style(place, number, len(runs)))
        baseline = _series(rows, BASELINE_KEY)[1]
        if BASELINE_OF in drawn and len(baseline):
            color = "#555555" if len(runs) == 1 else run_color(number)
            axes.axhline(baseline[-1], color=color, linestyle="--", linewidth=1.5, label="random encoder")
    if panel.from_zero:  # two lines leave no free corner, so there is room above them for the legend
        axes.set_ylim(0, (1.5 if len(drawn) > 1 else 1.1) * axes.get_ylim()[1])
    _name_lines(axes, is_grey=len(runs) > 1, loc="upper right" if len(drawn) > 1 else "best")
    _label(axes, panel)


def _line_style(place: int, run: int, num_runs: int) -> dict[str, Any]:
    """The style of a run's line, for the metric at this place of a panel.

    Earlier runs have thicker lines, which stay visible below equal ones.
    """
    if num_runs == 1:
        return {"color": run_color(place), "linestyle": "-", "marker": "o", "linewidth": 1.8}
    linestyle, marker = RUN_STYLES[place]
    linewidth = 1.8 * (2 - run / (num_runs - 1))
    return {"color": run_color(run), "linestyle": linestyle, "marker": marker, "linewidth": linewidth}


def _name_lines(axes: "Axes", is_grey: bool, loc: Literal["upper right", "best"]) -> None:
    """Adds a legend if the lines have at least two names. It is grey if a colour means a run."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if len(handles) > 1:
        legend = axes.legend(handles.values(), handles.keys(), fontsize=11, framealpha=0.8, loc=loc)
        for line in legend.get_lines() if is_grey else ():
            line.set_color("#555555")


def _draw_line(
    axes: "Axes", steps: np.ndarray, values: np.ndarray, label: str | None, marker: str, **style: Any
) -> None:
    """Draws the values as a line. Few values are marked. Many are pale, with their running mean over them."""
    if len(values) <= MANY_POINTS:
        axes.plot(
            steps,
            values,
            marker=marker if len(values) <= FEW_POINTS else "",
            markersize=2.2 + style["linewidth"],
            label=label,
            **style,
        )
        return
    window = len(values) // 100
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps, values, color=style["color"], linewidth=0.5, alpha=0.25)
    axes.plot(steps[window // 2 :][: len(means)], means, label=label, **style)


def _label(axes: "Axes", panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=12.5)
    axes.set_ylabel(panel.ylabel, fontsize=11.5)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axes.locator_params(axis="x", nbins=4, integer=True)
