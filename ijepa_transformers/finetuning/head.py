# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The head of a classifier that is fine-tuned on other classes: its rows follow their class names."""

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..arguments import require
from ..encoders import load_classifier, open_classifier


def load_with_matched_head(
    source: str, before: PreTrainedConfig, config: PreTrainedConfig
) -> tuple[PreTrainedModel, str]:
    """The classifier of a directory for the classes of `config`, and one sentence on its head.

    A class that the saved head knows by name keeps its row. Other classes get new rows.

    Args:
        before: the configuration of the directory.
        config: the same with the class names of the new run.

    Raises:
        ValueError: if it cannot be opened, or lacks weights of the encoder.
    """
    model, keys = open_classifier(source, config)
    names, names_before = _class_names(config), _class_names(before)
    if any(not key.startswith(f"{model.base_model_prefix}.") for key in keys.missing):
        return model, "the head is new"
    if names == names_before:
        return model, f"the head is that of {source}"
    places = {name: place for place, name in enumerate(_numbered(names_before))}
    kept = {row: places[name] for row, name in enumerate(_numbered(names)) if name in places}
    if len(names) == len(names_before):  # then all rows were loaded, by their places
        values, fresh = model.state_dict(), _another_head(source, config)
        heads = {key: (values[key].clone(), fresh[key]) for key in fresh}
    else:
        values = load_classifier(source, before).state_dict() if kept else {}
        heads = {key: (values.get(key), model.state_dict()[key]) for key in keys.resized}
    _set_rows(model, heads, kept)
    return model, _describe(source, names, names_before, kept)


def _class_names(config: PreTrainedConfig) -> list[str]:
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Names with a number, because two classes may have one name, as the two cranes of ImageNet."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        result.append((name, seen[name]))
        seen[name] += 1
    return result


def _another_head(source: str, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """New values for the weights that have a row for each class.

    They are those that the class itself draws when the saved head does not fit, so a class more is asked for.
    """
    larger = copy.deepcopy(config)
    count = len(_class_names(config))
    larger.num_labels = count + 1
    model, keys = open_classifier(source, larger)
    return {key: model.state_dict()[key][:count] for key in keys.resized}


def _set_rows(
    model: PreTrainedModel, heads: dict[str, tuple[torch.Tensor | None, torch.Tensor]], kept: dict[int, int]
) -> None:
    """Fills the head: the row of a known class from the saved head, all others from the new one."""
    values = model.state_dict()
    with torch.no_grad():
        for key, (saved, fresh) in heads.items():
            require(values[key].numel() > 0, "The classes differ from those of the head. ZeRO-3 hides its rows.")
            values[key].copy_(fresh)
            if saved is not None:
                for row, place in kept.items():
                    values[key][row].copy_(saved[place])


def _describe(source: str, names: Sequence[str], names_before: Sequence[str], kept: dict[int, int]) -> str:
    if not kept:
        return (
            f"the head is new: none of the {len(names_before):,} classes of {source} is among the {len(names):,} here"
        )
    new = [name for row, name in enumerate(names) if row not in kept]
    gone = [name for place, name in enumerate(names_before) if place not in kept.values()]
    parts = [f"the head of {source} is kept for {_list([names[row] for row in kept])}"]
    parts += [f"new rows for {_list(new)}"] if new else []
    parts += [f"without {_list(gone)}"] if gone else []
    return "; ".join(parts)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5:,} more" if len(names) > 5 else shown
