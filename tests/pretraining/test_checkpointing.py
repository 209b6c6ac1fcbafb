"""A file is whole, or it is not there, or it is the older one. (Checkpoints: test_run.py.)"""

import pytest

from ijepa_transformers.files import write_text, written_aside


def test_a_text_file_is_the_new_one_or_the_old_one_and_always_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    write_text(path, "älter")
    assert path.read_text(encoding="utf-8") == "älter"

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError):
        write_text(path, "newer")
    assert path.read_text(encoding="utf-8") == "älter"


def test_a_write_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), written_aside(tmp_path / "shard") as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert not (tmp_path / "shard").exists()
