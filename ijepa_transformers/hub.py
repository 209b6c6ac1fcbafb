# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Finds out soon whether the Hub can be reached. The libraries that read it try again for half a minute and longer.

This module imports nothing heavy, so that a command can ask before it imports torch.
"""

import os
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


PATIENCE = 3.0  # seconds to wait for a connection
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # of a repository
_MODELS, _DATA = ("--model", "--models", "--init_from"), ("--data", "--validation_data")
_OUT_OF_ORDER = (502, 503, 504)  # what a web server answers in place of one that is not there
_REMEMBERED = 60.0  # seconds
_asked: dict[str, tuple[float, str | None]] = {}  # by address: when, and why it cannot be reached


def why_unreachable() -> str | None:
    """Why the Hub cannot be reached, in a sentence without a full stop. None if it can, or if nobody may ask it."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return None
    address = constants.ENDPOINT
    when, reason = _asked.get(address, (-_REMEMBERED, None))
    if time.monotonic() - when > _REMEMBERED:
        reason = _why_no_connection(address) or _why_no_answer(address)
        _asked[address] = time.monotonic(), reason
    return f"the Hub ({address}) cannot be reached: {reason}" if reason else None


def _why_no_connection(address: str) -> str | None:
    """Why no connection can be opened; None if one can. Asks the proxy if there is one."""
    target = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    place = target.hostname or "", target.port or (443 if target.scheme == "https" else 80)
    found = ["no answer"]  # replaced when there is one

    def connect() -> None:
        try:
            socket.create_connection(place, PATIENCE).close()
            found[0] = ""
        except OSError as error:
            found[0] = error.strerror or str(error)

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name may take longer than the connection
    thread.start()
    thread.join(PATIENCE)
    return found[0] or None


def _why_no_answer(address: str) -> str | None:
    """Why a server that takes a connection is of no use: it does not answer, or says so. None for any other answer."""
    found = [f"no answer within {PATIENCE:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
        except Exception as error:  # an error of HTTP, or of certificates, which the libraries may know better
            if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
                return
            if getattr(error, "code", None) in _OUT_OF_ORDER:
                found[0] = f"it answers {error}"
                return
        found[0] = ""

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0] or None


class HubUnreachable(OSError):
    """Something is not on this machine, and the Hub cannot be reached. `reason` says the latter."""

    def __init__(self, source: str, reason: str):
        super().__init__(f"{source!r} is not on this machine, and {reason}. Check the path or the connection.")
        self.reason = reason


@contextmanager
def hub_or_cache(source: str | os.PathLike) -> Iterator[None]:
    """Inside the block, libraries read only their caches if the Hub cannot be reached. So they do not wait for it.

    Args:
        source: what is opened in the block. A file or directory on this machine needs no Hub.

    Raises:
        HubUnreachable: if `source` is not in a cache either.
    """
    source = os.fspath(source)
    reason = None if os.path.exists(source) else why_unreachable()
    if reason is None:
        yield
        return
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except OSError:  # the libraries' errors for a file that they do not have
        raise HubUnreachable(source, reason) from None  # their tracebacks are long and tell no more
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def sentence_for(argv: Sequence[str]) -> str | None:
    """Why a command cannot start: a model or data that it names is not on this machine, and the Hub cannot be reached.

    None if it may start.
    """
    flag = ""
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            flag, word = name.replace("-", "_").replace("__", "--", 1), value if equals else ""
        kind = "models" if flag in _MODELS else "datasets" if flag in _DATA else None
        source = _source_of(word) if kind == "models" else word
        if kind is None or source == "digits" or not _must_be_fetched(source, kind):
            continue
        reason = why_unreachable()
        if reason and kind == "models":
            return f"The model {source!r} cannot be opened: {HubUnreachable(source, reason)}"
        if reason:
            return (
                f"{source!r} is neither a file nor a folder on this machine, and it cannot be loaded from the Hub,"
                f" because {reason}."
            )
    return None


def _source_of(word: str) -> str:
    """The directory or name in `NAME=SPEC`, as `ijepa probe` takes it, or in a SPEC."""
    if os.path.exists(word):
        return word
    spec = re.sub(r"^[^/=]+=", "", word)
    return re.sub(r"(@(target|context)|#\d+)$", "", re.sub(r"^(random|raw_pixels):", "", spec))


def _must_be_fetched(source: str, kind: str) -> bool:
    """Whether `source` is a name on the Hub of which no cache has anything."""
    from huggingface_hub import constants

    if not _NAME.fullmatch(source) or os.path.exists(source):
        return False
    caches = [
        Path(constants.HF_HUB_CACHE) / f"{kind}--{source.replace('/', '--')}",
        Path(constants.HF_HOME) / "datasets" / source.replace("/", "___"),
    ]
    own = os.environ.get("HF_DATASETS_CACHE")
    return not any(path.exists() for path in caches) and not (kind == "datasets" and own)
