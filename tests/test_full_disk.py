"""A full disk, whatever a command writes: one sentence with the path, and nothing half-written.

The limit is on the size of a file. So the system itself refuses to write, in every library.
"""

import resource
import tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_transformers import cli
from ijepa_transformers.conversion import convert, export, onnx
from ijepa_transformers.data.sources import load_image_dataset
from ijepa_transformers.evaluation import command as probing
from ijepa_transformers.evaluation import extraction
from ijepa_transformers.files import append_rows
from ijepa_transformers.pretraining.checkpointing import DirectoryLock
from ijepa_transformers.retrieval import command as search
from ijepa_transformers.visualization import command as visualization


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FIXTURES = Path(__file__).parent / "fixtures"


@contextmanager
def room_for(num_bytes):
    """Inside, no file may be longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with labelled pictures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("train/a/1", "train/a/2", "train/b/3", "train/b/4", "validation/a/5", "validation/b/6"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    return tmp_path


# The pictures; what is written whole before features; and what matplotlib keeps.
KEPT = {*(f"{number}.png" for number in range(1, 7)), "settings.json", "contents.json", "fontlist-v3.11.0.json"}
PAGE = "--model M --data photos --num_images 2 --bank_size 4 --output out"
COMMANDS = {
    "extract": (extraction.main, "--model M --data photos --num_workers 0 --output_dir out"),
    "probe": (probing.main, "--models M --data photos --probes knn --k 1 --num_workers 0 --output_dir out"),
    "search": (search.main, "photos --model M --outliers --num_workers 0 --output out"),
    "visualize": (visualization.main, PAGE),
    "visualize with pictures": (visualization.main, f"{PAGE} --pictures_dir out_pictures"),
    "export": (export.main, "--model M --output out"),
    "convert": (convert.main, "--checkpoint C --num_attention_heads 3 --output out"),
    "recipes": (cli.recipes, "copy quickstart out"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_what_it_could_not_write_and_leaves_nothing(name, place, gray_pretrained, capsys):
    main, words = COMMANDS[name]
    paths = {"M": str(gray_pretrained), "C": str(FIXTURES / "meta_tiny_checkpoint.pth.tar")}
    argv = [paths.get(word, word) for word in words.split()]
    with pytest.raises(SystemExit) as stopped, room_for(1000):
        main(argv)
    told = capsys.readouterr()
    sentence = told.err.strip().splitlines()[-1]
    assert stopped.value.code in (1, 2) and sentence.startswith(f"ijepa {name.split()[0]}: error: ")
    assert "Traceback" not in told.err and ("out" in sentence or "cache" in sentence)
    left = {path.name for path in place.rglob("*") if path.is_file()} - KEPT
    assert all(name.endswith(".lock") for name in left), left


@pytest.mark.slow
def test_onnx_names_what_it_could_not_write_and_leaves_nothing(place, gray_pretrained, capsys):
    pytest.importorskip("onnxscript")
    with pytest.raises(SystemExit) as stopped, room_for(1000):
        onnx.main(["--model", str(gray_pretrained), "--output", "out.onnx"])
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code in (1, 2) and sentence.startswith("ijepa onnx: error: ") and "out.onnx" in sentence
    assert [path.name for path in place.iterdir()] == ["photos"]


def test_a_full_cache_of_datasets_is_named(place):
    with tarfile.open(place / "x.tar", "w") as tar:
        for path in (place / "photos").rglob("*.png"):
            tar.add(path, path.name)
    with room_for(1000), pytest.raises(OSError, match=r"File too large; HF_DATASETS_CACHE names .*: '.*/cache'"):
        load_image_dataset(place / "x.tar", cache_dir=place / "cache")
    assert len(load_image_dataset(place / "x.tar", cache_dir=place / "cache")) == 6


def test_a_row_that_does_not_fit_is_not_half_written(tmp_path):
    rows = tmp_path / "metrics.jsonl"
    for before in ("", '{"step": 1}\n'):
        rows.write_text(before) if before else None
        with room_for(20), pytest.raises(OSError, match=f"File too large: '{rows}'"):
            append_rows(rows, [{"step": 2, "loss": "x" * 100}])
        assert (rows.read_text() if rows.exists() else "") == before


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    with room_for(0), pytest.raises(OSError, match=r"File too large: '.*/\.lock'"):
        DirectoryLock(tmp_path).take()
