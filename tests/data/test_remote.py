"""What servers say of shards: whether these are others than before, and what happens without an answer."""

from types import SimpleNamespace

import pytest

from ijepa_transformers.data import notices, remote
from ijepa_transformers.data.remote import have_changed, may_have_changed
from ijepa_transformers.data.shards import ImageStream


def facts_of(monkeypatch, facts, host="host"):
    system = SimpleNamespace(info=lambda path: facts)
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url, **_: (system, url))
    urls = [f"https://{host}/{number}.tar" for number in (1, 2)]
    return ImageStream("a", urls, None, "image", "webdataset").contents


@pytest.mark.parametrize(
    ("before", "now", "changed", "may_have"),
    [
        ({"size": 1}, {"size": 2, "ETag": "a"}, True, False),
        ({"size": 1}, {"ETag": "a"}, False, False),
        ({"size": 1, "ETag": "a"}, {"size": 1, "ETag": "b"}, False, True),
        ({"size": 1, "Last-Modified": "a"}, {"size": 1, "Last-Modified": "b"}, False, True),
        ({"ETag": "a", "Last-Modified": "a"}, {"ETag": "a", "Last-Modified": "b"}, False, False),
        ({"size": 1, "blob_id": "a"}, {"size": 1, "blob_id": "b"}, True, False),
        ({"md5Hash": "a", "etag": "a"}, {"md5Hash": "a", "etag": "b"}, False, False),
        ({"size": 1, "blob_id": "a"}, {"size": 1}, False, False),
        ({}, {}, False, False),
    ],
)
def test_what_a_server_says_tells_of_other_shards(monkeypatch, capsys, before, now, changed, may_have):
    monkeypatch.setattr(notices, "_told", set())
    found = [facts_of(monkeypatch, facts) for facts in (before, now)]
    assert (have_changed(*found), may_have_changed(*found)) == (changed, may_have)
    assert not have_changed("", found[1]) and not may_have_changed("", found[1])
    told = capsys.readouterr().err
    assert told.count("tells neither size nor ETag nor time of change, so a resume cannot notice") == (not before)


def test_a_mirror_may_hash_in_its_own_way(monkeypatch):
    here = facts_of(monkeypatch, {"size": 1, "blob_id": "a"})
    same = facts_of(monkeypatch, {"size": 1, "md5Hash": "b", "etag": "c"}, host="mirror")
    other = facts_of(monkeypatch, {"size": 2, "md5Hash": "b"}, host="mirror")
    assert not have_changed(here, same) and not may_have_changed(here, same) and have_changed(here, other)


def test_a_server_that_gives_no_answer_is_not_asked_about_each_of_many_shards(monkeypatch):
    """Where a firewall drops the requests, each of them waits for minutes."""
    asked = []

    def ask(path):
        asked.append(path)
        raise TimeoutError

    monkeypatch.setattr(remote, "_WAITS", (0, 0))
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url, **_: (SimpleNamespace(info=ask), url))
    assert remote.facts_of_urls([f"https://host/{number}.tar" for number in range(1000)]) is None
    assert len(asked) <= 2 * remote._THREADS
