# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Which files are images, which are shards, and what to do about the others."""

import importlib.util
from collections import Counter
from collections.abc import Iterable

from .notices import counted
from .paths import extension_of, stem_of


_PLAIN_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
ARRAY_EXTENSIONS = (".npy", ".npz")  # images where no others are; beside photographs they may be anything
_HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
SHARD_BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
IGNORED_FOLDERS = ("@eaDir", "__MACOSX", "lost+found")  # file systems and archivers add them
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Files that lie beside images and are none: texts, tables, labels of other programs.
_COMPANIONS = (
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".log"),
    *(".ini", ".cfg", ".toml", ".py", ".ipynb", ".db", ".lock", ".md5", ".sha256", ".aux", ".xmp"),
)
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xlsx", ".xls", ".ods")
_NAMES_OF_LABELS = ("label", "class", "target", "annotation", "train", "metadata")  # in the name of a .txt
_ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tbz", ".txz")
_NO_EXTENSION = "without an extension"
_ADVICE = {
    'are read after pip install "ijepa-transformers[heif]"': _HEIF_EXTENSIONS,
    "are read as images only where no other images are": ARRAY_EXTENSIONS,
    "must be unpacked first": _ARCHIVES,
    "must be renamed: their extension says what they are": (_NO_EXTENSION,),
    "must be converted, for example to 16-bit PNG or TIFF": (
        *(".dcm", ".dicom", ".nii", ".mha", ".mhd", ".nrrd", ".exr", ".hdr", ".psd", ".svg", ".pdf", ".eps", ".jxl"),
        *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".raw", ".czi", ".lif", ".nd2", ".svs"),
        *(".h5", ".hdf5", ".mat", ".pkl", ".pt", ".ico", ".tga", ".j2k", ".jpx", ".jpc"),
    ),
    "are films: store their frames as images": (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"),
}


def reads_heif() -> bool:
    """Whether the package that reads HEIC files is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def image_extensions() -> tuple[str, ...]:
    """The extensions of the files that are read as images, in lower case."""
    return (*_PLAIN_EXTENSIONS, *(_HEIF_EXTENSIONS if reads_heif() else ()))


def may_hold_labels(path: str) -> bool:
    """Whether a file is a table, or a text that is called as if it had labels."""
    extension, stem = extension_of(path), stem_of(path).lower()
    return extension in _TABLES or (extension == ".txt" and any(name in stem for name in _NAMES_OF_LABELS))


def is_archive(path: str) -> bool:
    """Whether a file is compressed or packed in a way that is not read."""
    return extension_of(path) in _ARCHIVES


def count_kinds(files: Iterable[str]) -> Counter[str]:
    """How many of these files have each extension. Texts and other companions of images are not counted."""
    kinds = (extension_of(file) or _NO_EXTENSION for file in files)
    return Counter(kind for kind in kinds if kind not in _COMPANIONS)


def left_out_sentence(source: str, num_read: int, kinds: Counter[str]) -> str:
    """Says how many files of a source are left out, by kind, and what to do."""
    listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(10))
    more = f" and {len(kinds) - 10} more kinds" if len(kinds) > 10 else ""
    found = f"{source!r} has {counted(num_read, 'image')} or shard{'' if num_read == 1 else 's'}"
    others = f"{counted(kinds.total(), 'other file')} {'is' if kinds.total() == 1 else 'are'} left out"
    return f"{found}; {others}: {listed}{more}.{advice(kinds)}"


def advice(kinds: Iterable[str]) -> str:
    """What to do about files of these kinds: sentences that begin with a space, or nothing."""
    found = ((what, [kind for kind in kinds if kind in extensions]) for what, extensions in _ADVICE.items())
    return "".join(f" Files {' and '.join(kinds)} {what}." for what, kinds in found if kinds)
