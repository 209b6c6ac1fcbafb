# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes files under another name and renames them, so that a file is complete or absent. Reads JSON lines."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


# What safetensors, torch.save and pyarrow say of a disk.
_DISK_SIGNS = ("os error", "No space left", "File too large", "PytorchStreamWriter", "unexpected pos")
_UNTOLD_SIGNS = ("PytorchStreamWriter", "unexpected pos")  # torch.save does not say why it could not write

_LOGS = (".log", ".out", ".err")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to. It is renamed to `path` when the block ends without an error.

    So a file at `path` is always complete. Folders above it are created. If the block fails, the temporary file is
    removed.

    Raises:
        OSError: with the name of the file, if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "a folder is in the place of this file; move it away", str(path))
    unfinished = path.with_name(f".tmp-{path.name}")
    try:
        with disk_errors_of(path):
            yield unfinished
            sync_to_disk(unfinished)
            os.replace(unfinished, path)
    except Exception as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError) and error.filename == str(unfinished):
            error.filename = str(path)  # the name that the user knows
        raise


@contextmanager
def disk_errors_of(path: Path) -> Iterator[None]:
    """Gives errors of the disk the name of a file. Some libraries raise their own classes for a full disk."""
    try:
        yield
    except OSError as error:
        raise _with_name(error, path) from error
    except Exception as error:
        if not any(sign in str(error) for sign in _DISK_SIGNS):
            raise
        raise OSError(f"{path}: {_reason(error, str(error))}") from error


def _with_name(error: OSError, path: Path) -> OSError:
    """The error, or one with the name of a file if it has none."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, os.strerror(error.errno), str(path))


def _reason(error: Exception, otherwise: str) -> str:
    """What an error of a library says of the disk."""
    is_untold = any(sign in str(error) for sign in _UNTOLD_SIGNS)
    return "torch.save could not write all bytes; is the disk full?" if is_untold else otherwise


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8. After an interruption the file is complete, absent or still the old one."""
    with written_aside(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def disk_errors(path: Path | None = None) -> Iterator[None]:
    """Turns exceptions inside the block into OSErrors, because torch.save and safetensors raise their own classes.

    Args:
        path: what is written, for errors without a name.
    """
    try:
        yield
    except OSError as error:
        if path is None:
            raise
        raise _with_name(error, path) from error
    except Exception as error:
        where = f"{path}: " if path else ""
        raise OSError(where + _reason(error, f"{type(error).__name__}: {error}")) from error


def files_below(directory: Path) -> list[Path]:
    """All files in a directory, at any depth, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def sync_to_disk(path: Path) -> None:
    """Waits until a file or directory is stored on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, destination: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no hard links.

    Raises:
        OSError: if it can be neither linked nor copied.
    """
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def check_output_directory(path: Path, name: str = "output_dir") -> None:
    """Checks that a directory can be made or written to, before hours of computing.

    Args:
        name: of the argument, for the message.

    Raises:
        ValueError: if the path, or one above it, is no directory or may not be written to.
    """
    for place in (path, *path.absolute().parents):
        if os.path.lexists(place):
            break
    reason = None
    if not place.is_dir():
        reason = "is no directory"
    elif not _takes_files(place):
        reason = "may not be written to"
    if reason:
        raise ValueError(f"{name} {str(path)!r} cannot be used: {place} {reason}.")


def refuse_other_files(path: Path, own: Iterable[str], name: str = "output_dir") -> None:
    """Checks that a directory holds nothing that a command could replace, before any work.

    Hidden files and logs, as of a job script, may be there.

    Args:
        own: patterns of files that only an earlier run of the command has left; with one of them all is allowed.
        name: of the argument, for the message.

    Raises:
        ValueError: if the directory holds other files and none of its own.
    """
    if not path.is_dir() or any(True for pattern in own for _ in path.glob(pattern)):
        return
    entries = sorted(entry.name for entry in path.iterdir())
    others = [entry for entry in entries if not entry.startswith(".") and not entry.endswith(_LOGS)]
    if others:
        raise holds_other_files(path, others[0], name)


def holds_other_files(path: Path, example: str, name: str) -> ValueError:
    """The error for a directory with files that a command could replace; `name` is that of the argument."""
    return ValueError(
        f"{name} {str(path)!r} holds other files, such as {example!r}: choose an empty or a new directory."
    )


def refuse_among_images(path: Path, data: str | None, name: str = "output_dir") -> None:
    """Checks that a command does not write pictures or tables into the folder of its images.

    The next command would take them for images, and a resume would find other images than before. Hidden folders are
    no part of the data.

    Args:
        path: what will be written.
        data: what the images are read from.
        name: of the argument of `path`, for the message.

    Raises:
        ValueError: if it lies in this folder.
    """
    folder = Path(data or "").expanduser()
    if not data or not folder.is_dir():
        return
    place, folder = path.expanduser().resolve(), folder.resolve()
    if place.is_relative_to(folder) and not any(part[0] == "." for part in place.relative_to(folder).parts):
        raise ValueError(f"{name} {str(path)!r} lies among the images in {data!r}: choose another place.")


def _takes_files(directory: Path) -> bool:
    """Whether a file can be made in a directory. The rights do not tell: in /proc nobody can, also not root."""
    if not os.access(directory, os.W_OK | os.X_OK):
        return False
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE)  # these have sentences of their own


def check_page(path: str, name: str = "output") -> Path:
    """Checks that an HTML page can be written to a file, before any work, and returns the file.

    An older page is replaced later. Another file, such as a photo or a model, is not. A link stays, and what it leads
    to is written.

    Args:
        name: of the argument, for the message.

    Raises:
        ValueError: if the path is a directory or a file of another kind, or cannot be written.
    """
    if not path.strip():
        raise ValueError(f"{name} must not be empty, got {path!r}.")
    if os.path.isdir(path):
        raise ValueError(f"{name} must be a file, but {path!r} is a directory.")
    file = Path(os.path.realpath(path))
    if file.is_symlink():
        raise ValueError(f"{name} {path!r} is a link that leads back to itself.")
    if file.exists() and file.suffix.lower() not in (".html", ".htm"):
        target = f" is a link to {str(file)!r}, which" if os.path.islink(path) else ""
        raise ValueError(
            f"{name} {path!r}{target} is there already and is no .html file: choose another name for the page."
        )
    check_output_directory(file.parent if os.path.islink(path) else Path(path).parent, f"{name} {path!r}: the folder")
    return file


def replace_files(source: Path, destination: Path) -> None:
    """Moves every file of `source` into `destination`, each in one atomic step, and removes `source`.

    All of them are on the disk first, so that the steps follow one another at once.

    Raises:
        OSError: with the name of the file that cannot be replaced, such as one that is a directory now.
    """
    for file in files_below(source):
        sync_to_disk(file)
    for file in files_below(source):
        target = destination / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(file, target)
        except OSError as error:  # it names the file of `source`
            raise OSError(error.errno, error.strerror, str(target)) from error
    sync_to_disk(destination)
    shutil.rmtree(source)


def replace_files_but_keep(source: Path, destination: Path, before: Path) -> list[Path]:
    """As `replace_files`. The files that are replaced lie in the directory `before` afterwards, which is made anew.

    Returns:
        The files that are new in `destination`, or replaced.
    """
    shutil.rmtree(before, ignore_errors=True)
    before.mkdir()
    written = [destination / file.relative_to(source) for file in files_below(source)]
    for file in written:
        if file.exists():
            kept = before / file.relative_to(destination)
            kept.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, kept)
    replace_files(source, destination)
    return written


def read_rows(path: Path, is_row: Callable[[dict[str, Any]], bool]) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file of JSON lines, and how many of its lines are not rows.

    A killed process may leave half a line, and a machine that loses power zeros. The next row is then glued to it:
    such a line counts as damaged, and its last row is kept. Blank lines are not counted.

    Args:
        path: the file. If it does not exist, there are no rows.
        is_row: whether a JSON object is a row of this file.

    Raises:
        OSError: if the file cannot be read.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = [line for line in content.split(b"\n") if line.strip()]
    rows, num_damaged = [], 0
    for line in lines:
        row = _json_object(line)
        if row is None or not is_row(row):
            num_damaged += 1
            row = _json_object(line[line.rfind(b'{"') :])
        if row is not None and is_row(row):
            rows.append(row)
    return rows, num_damaged


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: with the name of the file, if it holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}, not an object of JSON.")
    return value


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a file of JSON lines, one for each row, as `write_text`."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a file of JSON lines.

    Raises:
        OSError: with the name of the file, if it cannot be written. Then it is as it was.
    """
    with disk_errors_of(path):
        size = path.stat().st_size if path.exists() else None
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError:
            with suppress(OSError):
                path.unlink() if size is None else os.truncate(path, size)
            raise
