# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes and reads the files of `ijepa extract`, and tells how their images differ from those of another run."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import written_aside


Columns: TypeAlias = dict[str, list]  # by name, an entry per image
_FORMATS = (".parquet", ".safetensors")


def shard_files(output_dir: Path) -> list[Path]:
    """The files that are called like shards, sorted."""
    return sorted(path for path in output_dir.glob("features-*") if path.suffix in _FORMATS)


def write_shard(path: Path, columns: Columns, features: dict[str, torch.Tensor]) -> None:
    """Writes a shard under another name, and renames it when all of it is on the disk.

    Args:
        columns: `index`, `name`, `error` (None for good images) and, for labelled data, `label`: a list per column.
        features: (images, D) or (images, N, D) by output.
    """
    with written_aside(path) as unfinished:
        (_write_parquet if path.suffix == ".parquet" else _write_safetensors)(unfinished, columns, features)


def _write_parquet(path: Path, columns: Columns, features: dict[str, torch.Tensor]) -> None:
    table = pa.table({**columns, "name": pa.array(columns["name"], pa.string())})
    table = table.set_column(table.column_names.index("error"), "error", pa.array(columns["error"], pa.string()))
    for name, values in features.items():
        array = pa.array(values.float().numpy().reshape(-1))
        for size in reversed(values.shape[1:]):
            array = pa.FixedSizeListArray.from_arrays(array, size)
        table = table.append_column(name, array)
    pa.parquet.write_table(table, path)


def _write_safetensors(path: Path, columns: Columns, features: dict[str, torch.Tensor]) -> None:
    """Numbers become tensors. Names and errors go to the metadata, as JSON under the key `columns`.

    There is only one key, because the library writes several keys in a random order, and then equal shards would be
    different files.
    """
    texts = {name: columns[name] for name in ("name", "error")}
    numbers = {name: torch.tensor(values) for name, values in columns.items() if name not in texts}
    save_file({**numbers, **features}, path, metadata={"columns": json.dumps(texts)})


def read_columns(path: Path) -> Columns:
    """`index`, `name` and `error` of a shard."""
    if path.suffix == ".parquet":
        return dict(pa.parquet.read_table(path, columns=["index", "name", "error"]).to_pydict())
    with safe_open(path, framework="pt") as file:
        return {**json.loads(file.metadata()["columns"]), "index": file.get_tensor("index").tolist()}


def read_bad_images(path: Path) -> list[dict[str, Any]]:
    """`index`, `name` and `reason` of the images of a shard that could not be read."""
    columns = read_columns(path)
    rows = zip(columns["index"], columns["name"], columns["error"], strict=True)
    return [{"index": index, "name": name, "reason": error} for index, name, error in rows if error is not None]


# Another run


def differences(
    output_dir: Path, before: dict[str, Any], changed: dict[str, Any], names: Callable[[], Iterator[list[str]]]
) -> Iterator[str]:
    """What differs from an earlier run. Images are named; hashes would tell nothing."""
    for key, value in changed.items():
        if key == "names_sha256":
            yield _renamed(output_dir, names(), before.get("num_images")) or "the names of the images differ"
        elif key == "weights_sha256":
            yield "the weights of the model differ"
        elif key == "num_images":
            yield f"images: {before.get(key)} then, {value} now"
        elif isinstance(value, dict) and isinstance(before.get(key), dict):  # settings of the image processor
            was = before[key]
            for name in sorted(name for name in {*was, *value} if was.get(name) != value.get(name)):
                yield f"{key}.{name} was {was.get(name)!r}, is {value.get(name)!r}"
        else:
            yield f"{key} was {before.get(key)!r}, is {value!r}"


def _renamed(output_dir: Path, names: Iterator[list[str]], num_before: int | None) -> str | None:
    """The first image that has another name than in the shards of an earlier run. None if they do not tell."""
    now, index = [name for part in names for name in part], -1
    try:
        for columns in map(read_columns, shard_files(output_dir)):
            for index, name in zip(columns["index"], columns["name"], strict=True):
                if index >= len(now):
                    return f"{name!r} was image {index}, and is there no more"
                if now[index] != name:
                    return f"the first image that differs is image {index}: it was {name!r}, is {now[index]!r}"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):  # a damaged shard
        return None
    return f"{now[index + 1]!r} is new" if index + 1 == num_before and index + 1 < len(now) else None
