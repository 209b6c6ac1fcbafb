# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Tells whether shards behind URLs are still those of an earlier run, by what servers say of them."""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import fsspec

from .notices import tell


_THREADS = 16  # asking is mostly waiting
_WAITS = (0.0, 0.5, 2.0)  # seconds before each time of asking
_CONTENT_HASHES = ("Content-MD5", "Digest", "md5Hash", "blob_id")  # of web servers, Google's storage and the Hub
_VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified")  # which the same file may have otherwise elsewhere


class RemoteFacts(NamedTuple):
    """What is known about some files.

    Args:
        contents: hash of their sizes, and of their hashes where the server has some.
        place: hash of their URLs without what follows "?".
        versions: hash of their ETags or times of change, which mean nothing at another place.
    """

    contents: str
    place: str
    versions: str

    def __str__(self) -> str:
        return " ".join(self)


def facts_of_urls(urls: Sequence[str]) -> RemoteFacts | None:
    """Asks the servers about all files, as HEAD does for http.

    None if one of them gives no answer: a server that is busy for a moment must not look like other files. This is
    told, and also if nothing is known about any file.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        answers = list(threads.map(_facts_of, urls))
    silent = [url for url, facts in zip(urls, answers, strict=True) if facts is None]
    found = [facts for facts in answers if facts is not None]
    contents = [[facts.get(name) for name in ("size", *_CONTENT_HASHES)] for facts in found]
    versions = [next((facts[name] for name in _VERSIONS if facts.get(name)), None) for facts in found]
    problem = None
    if silent:
        problem = f"There is no answer about {len(silent):,} of {len(urls):,} shards, such as {silent[0]!r}"
    elif not any(map(any, contents)) and not any(versions):
        problem = f"The server of {urls[0]!r} tells neither size nor ETag nor time of change"
    if problem:
        tell(f"{problem}, so a resume cannot notice if the shards are replaced.")
    places = [url.partition("?")[0] for url in urls]
    return None if silent else RemoteFacts(_hash(contents), _hash(places), _hash(versions))


def _facts_of(url: str) -> dict[str, Any] | None:
    """What the file system says of a file; None if it does not say anything, also when it is asked again."""
    for seconds in _WAITS:
        time.sleep(seconds)
        try:
            system, path = fsspec.core.url_to_fs(url)
            return system.info(path)
        except Exception:  # file systems raise errors of many classes; reading the shard will name what is wrong
            continue
    return None


def _hash(values: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:16]


def have_changed(before: str, now: str) -> bool:
    """Whether files are certainly others, given the facts of both as text: `RemoteFacts`, or of local files a hash.

    Empty text and files that moved between a server and this machine tell nothing.
    """
    parts, parts_now = before.split(), now.split()
    if len(parts) != len(parts_now):
        return False
    if len(parts) != len(RemoteFacts._fields):
        return parts != parts_now
    one, other = RemoteFacts(*parts), RemoteFacts(*parts_now)
    return one.contents != other.contents or (one.place == other.place and one.versions != other.versions)
