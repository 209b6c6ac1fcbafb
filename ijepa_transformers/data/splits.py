# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Names of splits, and which split a name asks for."""

import functools
import os
import re
from collections.abc import Iterable


AUTO = "auto"  # the split to judge on, whatever its name is
AUTO_SPLITS = "validation or test"
OR = " or "  # between names of splits
_MEANINGS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_YEAR = re.compile(r"[-_ ]?(19|20)\d\d$")  # as in val2017


@functools.cache
def split_meaning(name: str) -> str | None:
    """ "train", "validation" or "test" for such a name of a folder or split, as "Val" or "train2017"; else None."""
    return _MEANINGS.get(_YEAR.sub("", name.lower()))


def meanings_in(text: str) -> set[str]:
    """The meanings of all words of a path, as {"train"} for "my_train_images"."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {meaning for meaning in map(split_meaning, words) if meaning}


def choose_split(source: str | os.PathLike, splits: Iterable[str], asked: str) -> str:
    """The name among `splits` that means the same as `asked`.

    Args:
        source: for messages.
        splits: names of the splits that are there.
        asked: one name, where "val" is "validation"; or several, as in "validation or test". The first that is there
            is chosen. "auto" is "validation or test".

    Raises:
        ValueError: if there is none, or if two of the names mean the same.
    """
    names = {name: split_meaning(str(name)) or str(name) for name in splits}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{str(source)!r} has two splits of the same meaning: {', '.join(map(repr, names))}")
    asked = AUTO_SPLITS if asked == AUTO and AUTO not in names else asked
    wanted = [split_meaning(word.strip()) or word.strip() for word in asked.split(OR)]
    for choice in wanted:
        for name, meaning in names.items():
            if meaning == choice:
                return name
    missing, there = (" or ".join(map(repr, wanted)), ", ".join(map(repr, sorted(names.values()))))
    raise ValueError(f"{str(source)!r} has no split {missing}; it has {there}")
