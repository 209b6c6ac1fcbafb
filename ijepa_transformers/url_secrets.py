# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Keeps passwords and signatures of URLs out of all that is printed, saved and uploaded.

The arguments of a command have the public form of a URL, `https://***@host/a.parquet?token=***`. Its secrets stay in
the memory of the process, for whoever opens it. A resumed run needs the whole URL again.
"""

import re
import urllib.parse


_HIDDEN = "***"
_HARMLESS = ("", "true", "false", "0", "1")  # values, as of ?download=true
_SHORTEST = 6  # characters of a secret that is also hidden where it stands alone
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"<>]+", re.IGNORECASE)
_AFTER_A_URL = ".,:;)]}'"  # in a sentence
_LACKS = re.compile(r"://\*\*\*@|[?&=#]\*\*\*(?=$|[&#]|::)")
_whole: dict[str, str] = {}  # by public form


def keep_secrets(source: str) -> str:
    """The public form of a source. Its secrets are remembered for `with_secrets`, and for `without_secrets`."""
    public = _public(source)
    if public != source:
        _whole[public] = source
    return public


def with_secrets(source: str) -> str:
    """The whole URL of a source in its public form; any other source as it is.

    Raises:
        ValueError: if its secrets are not known in this process, as after a restart.
    """
    whole = _whole.get(source, source)
    if "://" in whole and _LACKS.search(whole):
        raise ValueError(
            f"{source!r} lacks its password or signature, which is never saved: give the whole URL again (--data)"
        )
    return whole


def without_secrets(text: str) -> str:
    """Text with all URLs in their public form."""
    for whole in _whole.values():
        for secret in sorted(_secrets_of(whole), key=len, reverse=True):
            text = text.replace(secret, _HIDDEN)
    return _URL.sub(_public_in_sentence, text)


def _public_in_sentence(found: re.Match[str]) -> str:
    url = found[0].rstrip(_AFTER_A_URL)
    return _public(url) + found[0][len(url) :]


def _public(source: str) -> str:
    """A source with `***` for what may be a secret in its URLs. Several are chained by "::", as in fsspec."""
    return "::".join(map(_public_url, source.split("::"))) if "://" in source else source


def _public_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    is_web = scheme.lower() in ("http", "https", "ftp", "ftps")
    end = min((place for sign in "/?#" if (place := rest.find(sign)) >= 0), default=len(rest))
    user, at, host = rest[:end].rpartition("@")
    if at and (is_web or ":" in user):  # abfs://container@account has no password
        rest = f"{_HIDDEN}@{host}{rest[end:]}"
    path = re.split(r"[?#]", rest)[0]
    shown = re.sub(r"([?&;#])([^?&;#]*)", lambda part: part[1] + _public_part(part[2], is_web), rest[len(path) :])
    return scheme + separator + path + shown


def _public_part(part: str, is_web: bool) -> str:
    """A part behind "?", "&" or "#". In other URLs than those of the web, "?" may be part of a glob."""
    name, equals, value = part.partition("=")
    if not equals:
        return _HIDDEN if is_web and name else part
    return part if value.lower() in _HARMLESS else f"{name}={_HIDDEN}"


def _secrets_of(whole: str) -> set[str]:
    """The texts that are secret in a URL, as they are and without their escape sequences."""
    found = set()
    for url in whole.split("::"):
        rest = url.partition("://")[2]
        user = re.split(r"[/?#]", rest)[0].rpartition("@")[0]
        parts = re.split(r"[?&;#]", rest[len(re.split(r"[?#]", rest)[0]) :])[1:]
        values = [part.partition("=")[2] or part for part in parts]
        found |= {user, user.partition(":")[2], *values}
    found |= {urllib.parse.unquote(secret) for secret in found}
    return {secret for secret in found if len(secret) >= _SHORTEST and secret.lower() not in _HARMLESS}
