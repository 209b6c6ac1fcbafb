# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Reads metadata.csv, metadata.jsonl and metadata.parquet beside images, as `datasets` has this convention.

A file has a row for each image. Its column `file_name` (or `image_file_name`, and so on) holds the path of the image,
relative to the folder of the metadata file. The other columns belong to the image.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet


_FILE_NAME = "file_name"


class Metadata:
    """The columns that metadata files give to images.

    Args:
        folder: of the images.
        files: the metadata files.

    Raises:
        ValueError: if a file cannot be read, names an image that is not there, or names an image twice.
    """

    def __init__(self, folder: Path, files: Sequence[Path]):
        self._rows: dict[str, int] = {}  # by path relative to the folder, with "/" between its parts
        self._origins: list[Path] = []  # the metadata file of each row
        self.without_names: dict[Path, list[str]] = {}  # files without a column of names, which are not used: columns
        self.empty: list[Path] = []  # files without a row
        tables = []
        for file in files:
            table = _read(file)
            column = _name_column(table)
            if column is None:
                self.without_names[file] = table.column_names
                continue
            if not table.num_rows:
                self.empty.append(file)
            self._add_rows(folder, file, table[column].to_pylist())
            tables.append(table.drop_columns([column]))
        self._table = _joined(folder, tables) if tables else pa.table({})

    def _add_rows(self, folder: Path, file: Path, names: Sequence[str | None]) -> None:
        for number, name in enumerate(names, start=1):
            if not isinstance(name, str) or not name:
                raise ValueError(f"row {number} of {str(file)!r} has no file name")
            path = _relative(folder, file.relative_to(folder).parent / name.replace("\\", "/"))
            if path in self._rows:
                raise ValueError(f"{str(file)!r} names {name!r}, which has a row already")
            self._rows[path] = len(self._origins)
            self._origins.append(file)

    def columns(self, images: Sequence[str]) -> datasets.Dataset | None:
        """The columns of these images, in this order; null for an image without a row. None if no image has a row."""
        if not self._table.num_columns:
            return None
        rows = [self._rows.get(image) for image in images]
        if all(row is None for row in rows):
            return None
        return datasets.Dataset(self._table.take(pa.array(rows, pa.int64())))

    def require_images(self, images: Mapping[str, Sequence[str]]) -> None:
        """Raises ValueError if a row names an image that is in no split."""
        there = {image for paths in images.values() for image in paths} if self._rows else ()
        missing = [path for path in self._rows if path not in there]
        if missing:
            file = self._origins[self._rows[missing[0]]]
            number = "1 image that is" if len(missing) == 1 else f"{len(missing):,} images that are"
            raise ValueError(f"{str(file)!r} names {number} not there, for example {missing[0]!r}")


def _relative(folder: Path, path: Path) -> str:
    """A path relative to the folder, if it is in it."""
    path, absolute = Path(os.path.normpath(path)), Path(os.path.abspath(folder))
    return (path.relative_to(absolute) if path.is_relative_to(absolute) else path).as_posix()


def _joined(folder: Path, tables: Sequence[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"the metadata files in {str(folder)!r} do not fit together: {error}") from error


def _read(file: Path) -> pa.Table:
    try:
        with open(file, "rb") as start:
            if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{str(file)!r} is UTF-16; save it as UTF-8")
        table = _parsed(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {' '.join(str(error).split())}") from error
    table = table.rename_columns([name.strip() for name in table.column_names])
    table = table.select([place for place, name in enumerate(table.column_names) if name])
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise ValueError(f"{str(file)!r} has two columns {twice[0]!r}")
    binary = [field.name for field in table.schema if file.suffix == ".csv" and pa.types.is_binary(field.type)]
    if binary:
        raise ValueError(f"the column {binary[0]!r} of {str(file)!r} is not UTF-8; save the file as UTF-8")
    return table


def _parsed(file: Path) -> pa.Table:
    if file.suffix == ".csv":
        options = pyarrow.csv.ConvertOptions(column_types={_FILE_NAME: pa.string()})  # 007 is a name too
        return _without_spaces(_with_zeros(file, pyarrow.csv.read_csv(file, convert_options=options)))
    return pyarrow.json.read_json(file) if file.suffix == ".jsonl" else pyarrow.parquet.read_table(file)


def _with_zeros(file: Path, table: pa.Table) -> pa.Table:
    """The table of a .csv, with texts instead of whole numbers in columns where one begins with a zero: the classes 01
    and 1 are two."""
    numbers = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    if not numbers or len(set(table.column_names)) < table.num_columns:
        return table
    options = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(numbers, pa.string()), include_columns=numbers)
    texts = pyarrow.csv.read_csv(file, convert_options=options)
    for name in numbers:
        if pc.any(pc.match_substring_regex(texts[name], r"^\s*0[0-9]")).as_py():
            table = table.set_column(table.column_names.index(name), name, texts[name])
    return table


def _without_spaces(table: pa.Table) -> pa.Table:
    """The table of a .csv, whose texts lose the spaces around them: in `1.png, cat` the class is `cat`. Names of files
    keep theirs."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type) and not field.name.strip().endswith(_FILE_NAME):
            table = table.set_column(place, field.name, pc.utf8_trim_whitespace(table[place]))
    return table


def _name_column(table: pa.Table) -> str | None:
    names = [name for name in table.column_names if name == _FILE_NAME or name.endswith(f"_{_FILE_NAME}")]
    return names[0] if len(names) == 1 else None
