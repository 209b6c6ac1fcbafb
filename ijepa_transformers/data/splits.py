# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Names of splits, and which split a name asks for."""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable


AUTO = "auto"  # the split to judge on, whatever its name is
AUTO_SPLITS = "validation or test"
OR = " or "  # between names of splits
_MEANINGS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# These name a split only beside another one: a folder may be called so for many reasons.
_RARE_MEANINGS = {
    **dict.fromkeys(("dev", "devel", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("holdout", "heldout"), "test"),
}
_YEAR = re.compile(r"[-_ ]?(19|20)\d\d$")  # as in val2017


@functools.cache
def split_meaning(name: str) -> str | None:
    """ "train", "validation" or "test" for such a name of a folder or split, as "Val", "train2017" or "dev"; else
    None."""
    word = _YEAR.sub("", name.lower())
    return _MEANINGS.get(word) or _RARE_MEANINGS.get(word)


def _is_rare(name: str) -> bool:
    return _YEAR.sub("", name.lower()) in _RARE_MEANINGS


def splits_among(names: Iterable[str]) -> set[str]:
    """Those of these names, which are side by side, that name a split."""
    found = {name: meaning for name in names if (meaning := split_meaning(name))}
    return set() if all(map(_is_rare, found)) and len(set(found.values())) < 2 else set(found)


def words_of(text: str) -> list[str]:
    """The words of a path in lower case, without the signs between them."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def meanings_in(text: str) -> set[str]:
    """The meanings of all words of a path, as {"train"} for "my_train_images"."""
    return {meaning for meaning in map(split_meaning, words_of(text)) if meaning}


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
    names = _meanings_of(splits)
    if len(set(names.values())) < len(names):
        raise ValueError(f"{str(source)!r} has two splits of the same meaning: {', '.join(map(repr, names))}")
    asked = AUTO_SPLITS if asked == AUTO and AUTO not in names else asked
    words = [word.strip() for word in asked.split(OR)]
    wanted = [word if word in names.values() else split_meaning(word) or word for word in words]
    for choice in wanted:
        for name, meaning in names.items():
            if meaning == choice:
                return name
    missing, there = (" or ".join(map(repr, wanted)), ", ".join(map(repr, sorted(names.values()))))
    sentence = f"{str(source)!r} has no split {missing}; it has {there}"
    if os.path.isdir(source):
        held_out = "test" if wanted == ["test"] else "validation"
        folders = " and ".join(repr(os.path.join(source, name)) for name in ("train", held_out))
        sentence += f". In a folder of images, each split is a folder, as {folders}"
    raise ValueError(sentence)


def require_other_split(train: str, validation: str) -> None:
    """Raises ValueError if accuracies would be measured on the images that the probes learn from."""
    if (split_meaning(train) or train) == (split_meaning(validation) or validation):
        raise ValueError(
            f"validation_split {validation!r} is the split whose labels the probes learn from, so every accuracy would"
            " be too high: name a split of other images."
        )


def _meanings_of(splits: Iterable[str]) -> dict[str, str]:
    """The meaning of each split; its own name if it has none, or if another split has the meaning of a rare name."""
    names = {name: split_meaning(str(name)) or str(name) for name in splits}
    counts = Counter(names.values())
    return {
        name: str(name) if counts[meaning] > 1 and _is_rare(str(name)) else meaning for name, meaning in names.items()
    }
