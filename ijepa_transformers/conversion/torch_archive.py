# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Checks the zip archive of `torch.save` before torch reads it.

torch trusts what data.pkl says of the other members. If a member has other bytes, it gives other weights in silence.
"""

import io
import pickle
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # those that torch reads
_OLD_FORMAT = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # a pickle of the magic number of torch
_BYTE_ORDERS = (b"little", b"big")
_ELEMENT_BYTES = {
    **dict.fromkeys(("ComplexDoubleStorage",), 16),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "QInt8Storage", "QUInt8Storage"), 1),
    "UntypedStorage": 1,  # of newer dtypes, such as float8
}


class Storage(NamedTuple):
    """What data.pkl says of one member with numbers."""

    key: str
    num_bytes: int


def check_archive(file: Path) -> bool:
    """Compares the archive with its checksums, and the sizes of its members with those that data.pkl tells.

    Returns:
        whether the numbers are stored as they are, so that the file can be mapped into memory.

    Raises:
        ValueError: if the file is missing, no archive of `torch.save`, cut short or damaged.
    """
    _refuse_other_files(file)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _refuse_other_members(file, members)
            damaged = archive.testzip()  # reads everything and compares it with the checksums of torch.save
            if damaged:
                raise ValueError(f"{file} is damaged: the checksum of its part {damaged!r} is wrong.")
            _check_sizes(file, archive)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {error}.") from None
    return all(member.compress_type == zipfile.ZIP_STORED for member in members)


def _refuse_other_files(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    with open(file, "rb") as stream:
        start = stream.read(len(_OLD_FORMAT))
    starts_as_zip = start.startswith(b"PK")
    described = f"{file} ({file.stat().st_size:,} bytes)"
    if start == _OLD_FORMAT:
        raise ValueError(
            f"{described} has the format of torch before 1.6, which has no checksums. Save it again in the present"
            f" one: torch.save(torch.load({str(file)!r}, map_location='cpu', weights_only=True), 'new.pth.tar')."
        )
    if not zipfile.is_zipfile(file):
        problem = "is cut short: its end is missing" if starts_as_zip else "is not a checkpoint of torch.save"
        raise ValueError(f"{described} {problem}.")
    if not starts_as_zip:
        raise ValueError(
            f"{described} is damaged: it begins with {start[:8]!r}, and the archive of torch.save comes only behind"
            " that. Download it again."
        )


def _refuse_other_members(file: Path, members: list[zipfile.ZipInfo]) -> None:
    name, count = Counter(member.filename for member in members).most_common(1)[0] if members else ("", 0)
    if count > 1:
        raise ValueError(f"{file} is damaged: it has the part {name!r} {count} times.")
    for member in members:
        if member.compress_type not in _METHODS:
            raise ValueError(
                f"{file} is compressed with method {member.compress_type} of zip, which torch cannot read. Unpack it"
                " and zip it again without compression."
            )


def _check_sizes(file: Path, archive: zipfile.ZipFile) -> None:
    sizes = {member.filename: member.file_size for member in archive.infolist()}
    found = [name for name in sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError(f"{file} is not a checkpoint of torch.save (it has {len(found)} parts data.pkl).")
    folder = found[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in sizes and (order := archive.read(f"{folder}byteorder")) not in _BYTE_ORDERS:
        raise ValueError(f"{file} has numbers in the byte order {order[:20]!r}, expected little or big.")
    for storage in _storages(file, archive.read(found[0])):
        name = f"{folder}data/{storage.key}"
        if name not in sizes:
            raise ValueError(f"{file} is damaged: its part {name!r} is missing.")
        if sizes[name] != storage.num_bytes:
            raise ValueError(
                f"{file} is damaged: its part {name!r} has {sizes[name]:,} bytes instead of {storage.num_bytes:,}."
            )


def _storages(file: Path, data: bytes) -> list[Storage]:
    unpickler = _StorageReader(io.BytesIO(data))
    try:
        unpickler.load()
    except Exception as error:  # for broken content pickle raises anything from EOFError to struct.error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is not a checkpoint of torch.save ({reason}).") from error
    return unpickler.storages


class _Inert:
    """Stands for whatever a pickle names. Nothing of it runs."""

    def __new__(cls, *args: Any, **keywords: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    append = add = update = extend


class _StorageReader(pickle.Unpickler):
    """Collects the storages that a pickle of `torch.save` names. It imports and calls nothing of the pickle."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self.storages: list[Storage] = []

    def find_class(self, module: str, name: str) -> type:
        return type(name, (_Inert,), {})

    def persistent_load(self, saved_id: Any) -> _Inert:
        _, kind, key, _, count = saved_id  # "storage", its class, the member, the device, the number of its elements
        self.storages.append(Storage(str(key), count * _ELEMENT_BYTES[kind.__name__]))
        return _Inert()
