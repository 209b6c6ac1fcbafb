# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Asks servers: whether they answer, and whether shards behind URLs are still those of an earlier run."""

import hashlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import datasets
import fsspec

from ..url_secrets import without_secrets
from .notices import WAIT, tell, tell_each_minute


_THREADS = 16  # asking is mostly waiting
_WAITS = (0.0, 0.5, 2.0)  # seconds before each time of asking
_CONTENT_HASHES = ("Content-MD5", "Digest", "md5Hash", "blob_id")  # of web servers, Google's storage and the Hub
_VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified")  # the same file has others after it is uploaded again
_UNKNOWN = "-"
_PATIENCE = 5.0  # seconds for an answer at the start; each way of asking has them
_SILENCE = 20.0  # seconds without a byte while a file is read. By default aiohttp waits five minutes
_TRIES = 2  # of `datasets` while shards are opened, with 5 s after each; while they are read it tries 20 times
_RETRYING = re.compile(r"Retrying in (\d+)sec \[(\d+)/(\d+)\]")  # a warning of `datasets`


def web_options(url: str, patience: float | None = None) -> dict[str, Any]:
    """Options of fsspec for a URL: how long a web server may be silent. With `patience`, how long all may take."""
    if not url.startswith(("http://", "https://")):
        return {}
    from aiohttp import ClientTimeout  # fsspec needs it for these URLs only

    silence = ClientTimeout(total=patience, sock_connect=_SILENCE, sock_read=_SILENCE)
    return {"client_kwargs": {"timeout": silence, "trust_env": True}}


def why_no_answer(url: str) -> str | None:
    """Why a web server does not give a file, in a sentence without a full stop, after seconds at most. None if it
    does. Other URLs are not asked."""
    if not url.startswith(("http://", "https://")):
        return None
    failure = _failure(url)
    if failure is not None and not isinstance(failure, TimeoutError):
        time.sleep(_WAITS[1])  # it may have been busy for a moment
        failure = _failure(url)
    return _in_words(url, failure) if failure else None


@contextmanager
def told_of_waiting() -> Iterator[None]:
    """Inside the block, which opens shards, `datasets` soon gives up a server that has gone. From then on it is told
    when `datasets` waits for one."""
    logger = logging.getLogger("datasets.utils.file_utils")
    logger.setLevel(logging.WARNING)  # commands hide warnings of `datasets`
    logger.addFilter(_tell_of_waiting)
    before = datasets.config.STREAMING_READ_MAX_RETRIES, datasets.config.STREAMING_OPEN_MAX_RETRIES
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = _TRIES
    try:
        yield
    finally:
        datasets.config.STREAMING_READ_MAX_RETRIES, datasets.config.STREAMING_OPEN_MAX_RETRIES = before


def _tell_of_waiting(record: logging.LogRecord) -> bool:
    """A filter of warnings: tells what `datasets` waits for, and leaves only errors."""
    if found := _RETRYING.search(record.getMessage()):
        seconds, number, most = map(int, found.groups())
        tell_each_minute(
            WAIT,
            f"The server of the shards does not answer. It is asked again every {seconds} s, for"
            f" {(most - number + 1) * seconds} s at most.",
        )
    return record.levelno >= logging.ERROR


class RemoteFacts(NamedTuple):
    """What is known about some files. Each fact is one hash for all of them, or "-" if the server does not tell it.

    Args:
        place: the URLs without what follows "?".
        sizes: in bytes.
        contents: hashes of the contents. Each kind of server computes them in its own way.
        versions: ETags or times of change.
    """

    place: str
    sizes: str
    contents: str
    versions: str

    def __str__(self) -> str:
        return " ".join(self)


def facts_of_urls(urls: Sequence[str]) -> RemoteFacts | None:
    """Asks the servers about all files, as HEAD does for http.

    None if one of them gives no answer: a server that is busy for a moment must not look like other files. This is
    told, and also if nothing is known about any file.
    """
    silent: list[str] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        answers = list(threads.map(lambda url: _answer(url, silent), urls))
    place = _hash([without_secrets(url).partition("?")[0] for url in urls])
    facts = RemoteFacts(place, *(_known(answers, names) for names in (("size",), _CONTENT_HASHES, _VERSIONS)))
    problem = None
    if silent:
        problem = f"There is no answer about the shard {silent[0]!r}"
    elif {facts.sizes, facts.contents, facts.versions} == {_UNKNOWN}:
        problem = f"The server of {urls[0]!r} tells neither size nor ETag nor time of change"
    if problem:
        tell(f"{problem}, so a resume cannot notice if the shards are replaced.")
    return None if silent else facts


def _answer(url: str, silent: list[str]) -> dict[str, Any]:
    """What the file system says of a file. If it gives no answer, also when it is asked again, the URL is added to
    `silent`. After that nothing more is asked: thousands of times of waiting would delay the start by hours."""
    for seconds in _WAITS:
        time.sleep(seconds)
        if silent:
            return {}
        try:
            system, path = fsspec.core.url_to_fs(url, **web_options(url, _PATIENCE))
            return system.info(path)
        except Exception:  # file systems raise errors of many classes; reading the shard will name what is wrong
            continue
    silent.append(url)
    return {}


def why_not_there(url: str) -> str:
    """Why a file of a web server cannot be opened, in a sentence without a full stop. The server is asked again."""
    failure = _failure(url)
    return (
        _in_words(url, failure) if failure else f"the server did not give {url!r} at first, but does now: start again"
    )


def _failure(url: str) -> BaseException | None:
    """The reason why a file system tells nothing about a URL."""
    try:
        system, path = fsspec.core.url_to_fs(url, **web_options(url, _PATIENCE))
        system.info(path)
    except Exception as error:  # fsspec says only that there is no such file
        return error.__cause__ or error
    return None


def _in_words(url: str, failure: BaseException) -> str:
    status, text = getattr(failure, "status", None), " ".join(str(failure).split())
    if isinstance(failure, TimeoutError):
        return f"the server of {url!r} gives no answer within {_PATIENCE:.0f} s"
    if status:
        return f"the server answers {status} {getattr(failure, 'message', '')}".rstrip() + f" for {url!r}"
    return f"{url!r} cannot be reached: {type(failure).__name__}: {text}"


def _known(answers: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Hash of the first of these facts that is known of each file."""
    values = [next((answer[name] for name in names if answer.get(name) is not None), None) for answer in answers]
    return _UNKNOWN if all(value is None for value in values) else _hash(values)


def _hash(values: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:16]


def have_changed(before: str, now: str) -> bool:
    """Whether files are certainly others, given the facts of both as text: `RemoteFacts`, or of local files a hash.

    Empty text and files that moved between a server and this machine tell nothing.
    """
    parts, parts_now = before.split(), now.split()
    if len(parts) == len(parts_now) == 1:
        return parts != parts_now
    both = _remote_facts(before, now)
    if both is None:
        return False
    one, other = both
    return _differ(one.sizes, other.sizes) or (one.place == other.place and _differ(one.contents, other.contents))


def may_have_changed(before: str, now: str) -> bool:
    """Whether files at the same URLs have other ETags or times of change, and nothing tells if they are others."""
    both = _remote_facts(before, now)
    if both is None or have_changed(before, now):
        return False
    one, other = both
    are_equal = one.contents == other.contents != _UNKNOWN
    return one.place == other.place and _differ(one.versions, other.versions) and not are_equal


def _remote_facts(before: str, now: str) -> tuple[RemoteFacts, RemoteFacts] | None:
    """Both facts, if both are of files behind URLs."""
    parts, parts_now = before.split(), now.split()
    if not len(parts) == len(parts_now) == len(RemoteFacts._fields):
        return None
    return RemoteFacts(*parts), RemoteFacts(*parts_now)


def _differ(fact: str, other: str) -> bool:
    return fact != other and _UNKNOWN not in (fact, other)
