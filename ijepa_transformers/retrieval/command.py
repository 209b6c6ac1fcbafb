# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa search`: the photos of a folder that are most like a query, near duplicates and outliers."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any

import datasets
from transformers.utils.logging import disable_progress_bar

from ..api import Result, process_as_before
from ..arguments import require
from ..data.notices import counted
from ..display import as_typed, command_again, on_standard_error, show, show_end
from ..failures import FAILED, REFUSED, failures_told
from ..files import check_page, write_text
from .arguments import PROGRAM, SearchArguments, parse_search_arguments, search_arguments
from .doubts import about_similarities
from .finder import Match, PhotoFinder, Query, open_finder
from .page import all_equal, build_page
from .random_pairs import RandomPairs
from .serve import require_gradio, serve
from .similarity import ALL_EQUAL, LEAST_PHOTOS, NEIGHBOURS, TOO_FEW


_MANY, _FEW_NAMES = 20, 8  # groups or unreadable photos in the text, and names of a group; JSON has all


def _find(arguments: SearchArguments) -> tuple[PhotoFinder, dict[str, Any]]:
    """Opens the index and finds what was asked for, in values that JSON keeps.

    Raises:
        ValueError: with one sentence, if something cannot be opened or read.
    """
    if arguments.output is not None:
        check_page(arguments.output)  # before the work
    finder, queries = open_finder(arguments)
    return finder, _results(arguments, finder, queries)


def _results(arguments: SearchArguments, finder: PhotoFinder, queries: Sequence[Query]) -> dict[str, Any]:
    pairs = finder.random_pairs()
    results: dict[str, Any] = {
        "data": arguments.data,
        "model": arguments.model,
        "index": str(finder.index.directory),
        "similarity": "cosine of features that are standardised over the photos",
        "num_photos": len(finder),
        "random_pairs": pairs and dataclasses.asdict(pairs),
        "doubt": finder.doubt,
        "num_computed": finder.index.num_computed,
        "unreadable": [{"name": name, "reason": reason} for name, reason in finder.unreadable],
    }
    if queries:
        results["queries"] = [
            {"query": query.path, "similar": _rows(finder, finder.like_query(query, arguments.k))} for query in queries
        ]
    if arguments.duplicates:
        threshold = finder.usual_threshold() if arguments.threshold is None else arguments.threshold
        results["threshold"] = threshold
        results["duplicates"] = [
            {"similarity": group.similarity, "names": group.names, "rows": group.rows}
            for group in finder.duplicates(threshold)
        ]
    if arguments.outliers:
        results["outliers"] = _rows(finder, finder.outliers(arguments.k))
    return results


def _rows(finder: PhotoFinder, matches: Sequence[Match]) -> list[dict[str, Any]]:
    return [
        {"name": match.name, "path": finder.path(match.row), "row": match.row, "similarity": match.similarity}
        for match in matches
    ]


def format_results(results: dict[str, Any]) -> str:
    """The results as text for a terminal. Names are in quotes, with escapes for what cannot be printed."""
    lines = ["", TOO_FEW] if results["num_photos"] < LEAST_PHOTOS else []
    for part in results.get("queries", ()):
        lines += ["", f"Photos like {part['query']!r}, with their cosine similarity:", *_lines(part["similar"])]
        lines += [ALL_EQUAL] if all_equal(part["similar"], results["num_photos"]) else []
    if "duplicates" in results:
        groups, threshold = results["duplicates"], results["threshold"]
        found = f"{counted(len(groups), 'group')} of near duplicates" if groups else "No near duplicates"
        lines += ["", f"{found} (cosine similarity of at least {threshold:.4f}){':' if groups else '.'}"]
        for group in groups[:_MANY]:
            names = [repr(name) for name in group["names"][:_FEW_NAMES]]
            more = len(group["names"]) - len(names)
            names += [f"and {more:,} more"] if more else []
            lines.append(f"  {group['similarity']:7.4f}  {'  '.join(names)}")
        lines += _more(len(groups), "group")
    if "outliers" in results:
        lines += [
            "",
            f"Outliers, with their mean cosine similarity to their {NEIGHBOURS} nearest photos:",
            *_lines(results["outliers"]),
        ]
    if about := about_similarities(RandomPairs.of(results["random_pairs"]), results["doubt"]):
        lines += ["", *about]
    return "\n".join(lines[1:])


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"  {row['similarity']:6.3f}  {row['name']!r}" for row in rows]


def _more(number: int, noun: str) -> list[str]:
    return [f"  and {counted(number - _MANY, f'more {noun}')}; --json true lists all."] if number > _MANY else []


def _tell_of_unreadable(unreadable: Sequence[dict[str, str]]) -> None:
    """Says which photos are left out. JSON has all."""
    for entry in unreadable[:_MANY]:
        show(f"bad image {entry['name']!r}: {entry['reason']}")
    if len(unreadable) > _MANY:
        show(f"{counted(len(unreadable) - _MANY, 'more image')} could not be read")


def next_commands(arguments: SearchArguments) -> list[str]:
    """What else can be asked of the same photos."""
    again = {"query": None, "output": None, "k": None, "threshold": None}
    both = arguments.duplicates and arguments.outliers
    found = [] if both else [command_again("search", arguments, **again, duplicates=True, outliers=True)]
    if arguments.output is None:
        found.append(command_again("search", arguments, output="search.html"))
    if importlib.util.find_spec("gradio"):
        found.append(command_again("search", arguments, **again, duplicates=None, outliers=None, serve=True))
    return found


def execute(arguments: SearchArguments, argv: Sequence[str] = ()) -> None:
    """Runs the command with its parsed arguments. Exits as a command does."""
    disable_progress_bar()  # Transformers shows one while it loads weights
    datasets.disable_progress_bars()
    with failures_told(PROGRAM, REFUSED):
        if arguments.serve:
            require_gradio()
        finder, results = _find(arguments)
        with on_standard_error():
            _tell_of_unreadable(results["unreadable"])
            show()
    with failures_told(PROGRAM, FAILED):
        if arguments.serve:
            serve(finder, arguments)
            return
        print(json.dumps(results, indent=2) if arguments.json else format_results(results), flush=True)
        places: dict[str, Any] = {}
        if arguments.output is not None:
            page = build_page(finder, results, as_typed(PROGRAM, argv))
            write_text(check_page(arguments.output), page)
            places["page"] = f"{arguments.output} ({len(page) / 1e6:.1f} MB)"
        with on_standard_error():
            show_end(places, [] if arguments.json else next_commands(arguments))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    execute(parse_search_arguments(argv), argv)


def search(**keywords: Any) -> Result:
    """Finds similar photos, near duplicates and outliers: `ijepa search` as a function.

    Args:
        keywords: the flags of `ijepa search --help` by name, but `serve`; `data` is the folder of photos.

    Returns:
        The directory of the features, what was found (as `--json true` prints it) and the same as text.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: with one sentence, where the command would end with an error.
    """
    arguments = search_arguments(**keywords)
    require(not arguments.serve, "serve is for the command: ijepa search PHOTOS --model MODEL --serve true.")
    with process_as_before():
        disable_progress_bar()
        finder, results = _find(arguments)
        if arguments.output is not None:
            write_text(check_page(arguments.output), build_page(finder, results, "search(...)"))
    return Result(finder.index.directory, results, format_results(results))
