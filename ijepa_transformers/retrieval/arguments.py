# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ijepa search`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import (
    CommandParser,
    DatasetArguments,
    argument,
    arguments_from_keywords,
    parse_arguments,
    require,
    require_numbers,
    require_text,
    require_workers,
)


PROGRAM = "ijepa search"
FEW = 10  # photos shown


@dataclass
class SearchArguments(DatasetArguments):
    """Every argument of `ijepa search`.

    Raises:
        ValueError: with the offending value, if one is missing or out of range.
    """

    model: str = argument("", "model directory or Hub name: of this package, or another image encoder of Transformers")
    query: list[str] = argument([], "image files; the most similar photos of each are listed")
    duplicates: bool = argument(False, "list groups of near duplicates")
    outliers: bool = argument(False, "list the photos that are least like their nearest neighbours")
    serve: bool = argument(False, "open a local page for all three; needs the extra 'page'")
    k: int | None = argument(None, f"photos that are listed (default: {FEW}, or all if there are fewer)")
    threshold: float | None = argument(
        None, "least cosine similarity of near duplicates (default: made from the distances of the photos)"
    )
    index: str | None = argument(
        None,
        "directory in which the features are kept; it may be one of `ijepa extract` (default: one in ~/.cache/ijepa)",
    )
    output: str | None = argument(None, "HTML file to write, which shows what was found")
    json: bool = argument(False, "print JSON instead of text")
    host: str = argument("127.0.0.1", "address of the page; 127.0.0.1 is for this machine only")
    port: int | None = argument(None, "port of the page (default: the first free one from 7860)")
    split: str = argument("train", "split to search; a folder without splits is 'train'")
    encoder: str = argument("target", "which encoder of a pretraining directory", ("target", "context"))
    dtype: str = argument("fp32", "precision of weights and computation", ("fp32", "bf16"))
    batch_size: int = argument(32, "images per forward pass")
    num_workers: int = argument(2, "processes that load images; 0: the command loads them itself")

    def __post_init__(self):
        for name in ("data", "model"):
            require(getattr(self, name), f"{name} is missing.")
        require_text(self, "index", "output", "host")
        require(all(map(str.strip, self.query)), "query must name image files, but one of the names is empty.")
        wanted = self.query or self.duplicates or self.outliers or self.serve
        require(wanted, "nothing to do: name a query image, or add --duplicates, --outliers or --serve true.")
        beside = self.query or self.duplicates or self.outliers or self.output or self.json
        require(
            not (self.serve and beside),
            "serve opens a page where all of this is done: leave query, duplicates, outliers, output and json out.",
        )
        require_numbers(self, "k", "batch_size", least=1)
        require_workers(self)
        require_numbers(self, "threshold", least=-1, most=1)
        require_numbers(self, "port", least=1, most=65535)


GROUPS = (SearchArguments,)


def parse_search_arguments(argv: Sequence[str] | None = None) -> SearchArguments:
    """The arguments of `ijepa search`; see `parse_arguments`. The first word may be the folder, without `--data`."""
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    if words and not words[0].startswith("-"):
        if any(word.partition("=")[0] == "--data" for word in words):
            CommandParser(prog=PROGRAM).error(f"the photos are named twice: {words[0]!r} and --data.")
        words = ["--data", *words]
    description = (
        "Finds similar photos, near duplicates and outliers: ijepa search PHOTOS --model MODEL --query PHOTO."
    )
    return parse_arguments(words, GROUPS, SearchArguments, PROGRAM, description)


def search_arguments(**keywords: Any) -> SearchArguments:
    """The arguments of `search(...)`; see `arguments_from_keywords`."""
    return arguments_from_keywords(keywords, GROUPS, SearchArguments, "search")
