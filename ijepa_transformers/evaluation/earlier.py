# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Keeps the results of an earlier probing run in the same directory: results_1.json and results_1.md, and so on."""

import os
from contextlib import suppress
from pathlib import Path

from ..files import read_json_object


RESULTS = "results.json"
_SUFFIXES = (".json", ".md")


def keep_earlier(output_dir: Path) -> Path | None:
    """Gives the results in a directory a name with the next number. Returns their JSON file, None without results."""
    number = 1
    while any((output_dir / f"results_{number}{suffix}").exists() for suffix in _SUFFIXES):
        number += 1
    kept = output_dir / f"results_{number}.json"
    found = [suffix for suffix in _SUFFIXES if (output_dir / f"results{suffix}").exists()]
    for suffix in found:
        os.replace(output_dir / f"results{suffix}", kept.with_suffix(suffix))
    return kept if found else None


def drop_if_repeated(output_dir: Path, kept: Path | None) -> Path | None:
    """Removes kept results if the new ones say all that they say. Returns them if they stay."""
    if kept is None:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        earlier, now = read_json_object(kept), read_json_object(output_dir / RESULTS)
        if earlier["data"] == now["data"] and all(row in now["rows"] for row in earlier["rows"]):
            for suffix in _SUFFIXES:
                kept.with_suffix(suffix).unlink(missing_ok=True)
            return None
    return kept
