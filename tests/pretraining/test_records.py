# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a run finds when it starts: damaged rows, rows of an earlier run, other images, another version or run."""

import hashlib
import json
import shutil

import pytest

from ijepa_transformers import __version__
from ijepa_transformers.files import read_rows
from ijepa_transformers.modeling_ijepa import remove_weights
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining.records import is_metrics_row
from tests.data.images import encoded, photo
from tests.runs import assert_equal_weights, pretrain, rows, saved_weights, status, without_speed


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CHANGES = {"num_channels": 3, "keep_checkpoints": 5, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
ROW = json.dumps({"step": 1, "loss": 0.5}).encode()
DAMAGED = {
    "zeros": bytes(50) + b"\n",
    "a list": b"[1]\n",
    "text": b"x\n",
    "a number": b"1\n",
    "no step": b'{"loss": 1}\n',
    "a step that is text": b'{"step": "1"}\n',
    "a step that is a truth value": b'{"step": true, "loss": 1, "learning_rate": 1}\n',
    "a step before the first": b'{"step": 0, "loss": 1, "learning_rate": 1}\n',
    "a loss that is text": b'{"step": 1, "loss": "x", "learning_rate": 1}\n',
    "only a step": b'{"step": 1}\n',
    "no UTF-8": b'{"lo\xff\xfe": 1}\n',
    "two rows in one": ROW[:9] + ROW + b"\n",
    "deep": b"[" * 100_000 + b"\n",
    "half a row": ROW[:9] + b"\n",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of pictures and a finished run on it. Do not change them."""
    place = tmp_path_factory.mktemp("finished")
    for number in range(12):
        path = place / f"pictures/{number % 2}/{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(seed=number)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        pretrain(place / "run", data=place / "pictures", **CHANGES)
    return place


@pytest.fixture
def cut(finished, tmp_path):
    """A copy of the pictures and of the run, as it was after step 2."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    remove_weights(tmp_path / "run")
    return tmp_path


def resume(place, data="pictures"):
    return pretrain(place / "run", data=place / data, resume="true", **CHANGES)


def refusal(capsys, action):
    """The sentence of a refused run."""
    with pytest.raises(SystemExit) as stop:
        action()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return error


# Rows


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_dropped_and_counted_wherever_it_is(tmp_path, line):
    good = [{"step": step, "loss": 1.0, "learning_rate": 1e-3, "reason": ""} for step in (1, 2)]
    lines = [json.dumps(row).encode() + b"\n" for row in good]
    for place in range(3):
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:place], line, *lines[place:]]))
        assert read_rows(tmp_path / "metrics.jsonl", is_metrics_row) == (good, 1)


def test_a_row_that_is_glued_to_half_of_another_is_kept(tmp_path):
    rows = [{"step": step, "loss": 1.0, "learning_rate": 1e-3} for step in (1, 2)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    (tmp_path / "metrics.jsonl").write_bytes(ROW[:9] + lines[0] + bytes(50) + lines[1])
    assert read_rows(tmp_path / "metrics.jsonl", is_metrics_row) == (rows, 2)


def test_half_a_row_at_the_end_is_dropped_and_a_missing_file_has_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(ROW + b"\n" + ROW[:9])
    assert read_rows(tmp_path / "rows.jsonl", lambda row: "step" in row) == ([json.loads(ROW)], 1)
    assert read_rows(tmp_path / "nothing.jsonl", bool) == ([], 0)


def test_a_run_with_damaged_records_ends_like_one_that_was_left_alone(cut, finished, capsys):
    metrics, harm = cut / "run/metrics.jsonl", b"".join(DAMAGED.values())
    first = metrics.read_bytes().splitlines(keepends=True)[0]
    metrics.write_bytes(harm + metrics.read_bytes() + first + harm + ROW[:9])
    for name in ("skipped_steps.jsonl", "bad_images.jsonl"):
        (cut / "run" / name).write_bytes(harm)
    assert_equal_weights(resume(cut), pretrained(finished))
    said = capsys.readouterr().out
    counts = {"metrics": 2 * len(DAMAGED) + 1, "skipped_steps": len(DAMAGED), "bad_images": len(DAMAGED)}
    for name, count in counts.items():
        assert f"{name}.jsonl: {count} damaged rows are dropped." in said
    assert without_speed(rows(cut / "run")) == without_speed(rows(finished / "run"))
    assert not (cut / "run/bad_images.jsonl").exists()
    resume(cut)
    assert "dropped" not in capsys.readouterr().out


def pretrained(place):
    return saved_weights(place / "run")


def test_after_a_kill_before_the_first_checkpoint_the_records_begin_anew(cut, finished, capsys):
    shutil.rmtree(cut / "run/checkpoints")
    with open(cut / "run/metrics.jsonl", "ab") as file:
        file.write(ROW[:9])
    for name in ("skipped_steps.jsonl", "bad_images.jsonl"):
        (cut / "run" / name).write_text('{"step": 1, "index": 3, "name": "3.png", "reason": "gone"}\n')
    resume(cut)
    assert "the run starts at step 0, and metrics.jsonl begins anew" in capsys.readouterr().out
    assert without_speed(rows(cut / "run")) == without_speed(rows(finished / "run"))
    assert not (cut / "run/skipped_steps.jsonl").exists() and not (cut / "run/bad_images.jsonl").exists()


def test_tensorboard_shows_each_step_once_after_a_kill(cut):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shutil.rmtree(cut / "run/checkpoints")
    for _ in range(2):  # from step 0, then again from step 2
        pretrain(cut / "run", data=cut / "pictures", resume="true", trackers="tensorboard", **CHANGES)
        shutil.rmtree(cut / "run/checkpoints/step-00000004")
    events = accumulator.EventAccumulator(str(next((cut / "run").rglob("events.out*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


# Images


def test_a_renamed_picture_is_refused_by_its_name(cut, capsys):
    (cut / "pictures/0/04.png").rename(cut / "pictures/0/05.png")
    error = refusal(capsys, lambda: resume(cut))
    assert f"image 2, '{cut}/pictures/0/05.png', has another name, size or content than before" in error


def test_pictures_that_changed_places_are_refused(cut, capsys):
    one, other = cut / "pictures/0/02.png", cut / "pictures/1/07.png"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second + b"longer")
    other.write_bytes(first)
    assert "image 1, " in refusal(capsys, lambda: resume(cut))


def test_a_missing_picture_is_refused_with_the_first_difference(cut, capsys):
    (cut / "pictures/0/04.png").unlink()
    error = refusal(capsys, lambda: resume(cut))
    assert "had 12 images" in error and "has 11 (first difference: image 2," in error and "06.png" in error


def test_a_moved_folder_of_pictures_goes_on(cut, finished):
    (cut / "pictures").rename(cut / "moved")
    assert_equal_weights(resume(cut, "moved"), pretrained(finished))


# Versions


def change_state(checkpoint, **changes):
    """Other values in run_state.json, with a manifest that knows them."""
    path, manifest = checkpoint / "run_state.json", checkpoint / "manifest.json"
    state = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in state.items() if value is not None}))
    files = json.loads(manifest.read_text())
    files["files"][path.name] = {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(files))


def state_of(checkpoint):
    return json.loads((checkpoint / "run_state.json").read_text())


def test_a_checkpoint_carries_the_version_and_another_one_is_told(cut, capsys):
    checkpoint = cut / "run/checkpoints/step-00000002"
    assert state_of(checkpoint)["version"] == __version__
    change_state(checkpoint, version="9.8.7")
    resume(cut)
    said = f"was written by version 9.8.7 of ijepa-transformers; this is version {__version__}."
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("change", ["surplus setting", "no baseline", "other launch"])
def test_a_state_that_this_version_does_not_understand_is_one_sentence(cut, capsys, change):
    checkpoint = cut / "run/checkpoints/step-00000002"
    settings = state_of(checkpoint)["arguments"]
    changes = {
        "surplus setting": {"arguments": {**settings, "wings": 2}},
        "no baseline": {"baseline": None},
        "other launch": {"launch": {"rockets": 3}},
    }[change]
    change_state(checkpoint, version="9.8.7", **changes)
    error = refusal(capsys, lambda: resume(cut))
    assert "written by version 9.8.7 of ijepa-transformers, and this is version" in error and "--init_from" in error


def test_a_model_without_a_checkpoint_is_not_replaced(finished, tmp_path, capsys):
    """Its checkpoints were removed to save space, or it is a classifier."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    assert "no checkpoint to resume from. A new run would replace it" in refusal(capsys, lambda: resume(tmp_path))
    (tmp_path / "run/metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    error = refusal(capsys, lambda: pretrain(tmp_path / "run", data=tmp_path / "pictures", **CHANGES))
    assert "holds a model (model.safetensors)" in error
    (tmp_path / "metrics.jsonl").rename(tmp_path / "run/metrics.jsonl")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != ".lock"}


# Two starts


def test_the_second_of_two_starts_leaves_the_files_of_the_first_alone(cut, tmp_path, monkeypatch, capsys):
    """The first one begins after the second has found no directory, and ends before the second asks for the lock."""
    original, place = pretraining_command.build_run, cut / "new"

    def build_late(*given):
        built = original(*given)
        shutil.copytree(cut / "run", place)
        return built

    monkeypatch.setattr(pretraining_command, "build_run", build_late)
    error = refusal(capsys, lambda: pretrain(place, data=cut / "pictures", **CHANGES))
    assert f"Another command has just written to {place}" in error
    assert status(place) == "finished" and rows(place) == rows(cut / "run")
