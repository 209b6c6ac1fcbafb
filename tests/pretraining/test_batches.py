"""A streamed run is as good as an indexed one: exact resume, bad images, sentences. (Lanes: test_streaming.py; several
processes: test_distributed.py.)"""

import io
import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from ijepa_transformers import distributed
from ijepa_transformers.data.sources import load_image_dataset
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining import loop
from tests.runs import assert_equal_weights, pretrain, rows, saved_weights, send_in_step, without_speed


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STREAMED = {"streaming": "true", "shuffle_buffer": 5, "min_patches": 2}


@pytest.fixture
def shards(tmp_path):
    """Four Parquet shards of ten digits each."""
    folder, digits = tmp_path / "shards", load_image_dataset("digits")
    folder.mkdir()
    for number in range(4):
        digits.select(range(10 * number, 10 * number + 10)).to_parquet(folder / f"train-{number}.parquet")
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_streamed_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, shards, monkeypatch, num_workers):
    """Images that workers had prepared, but that were not trained on, come again."""
    changes = {"data": shards, "num_workers": num_workers, "max_steps": 12, "save_steps": 50, **STREAMED}
    whole = pretrain(tmp_path / "whole", **changes)
    send_in_step(monkeypatch, 6, 15)
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "cut", **changes)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert stop.value.code == 75
    assert_equal_weights(pretrain(tmp_path / "cut", resume="true", **changes), whole)
    last = [without_speed(rows(tmp_path / name))[-1] for name in ("cut", "whole")]
    assert last[0] == last[1] and last[0]["epoch"] == 12 * 8 / 40
    verdicts = [(tmp_path / name / "verdict.json").read_text() for name in ("cut", "whole")]
    assert verdicts[0] == verdicts[1] and "images differ by" in verdicts[0]


def test_the_order_is_another_one_than_that_of_the_files(tmp_path, shards, monkeypatch):
    seen, original = [], loop.optimizer_step

    def optimizer_step(run, batches, number):
        step = original(run, batches, number)
        seen.extend(name for batch in step.batches for name in run.data.names(batch))
        return step

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    pretrain(tmp_path / "run", data=shards, max_steps=10, **STREAMED)
    names = [f"{shards}/train-{shard}.parquet row {row}" for shard in range(4) for row in range(10)]
    assert sorted(seen[:40]) == sorted(seen[40:]) == names
    assert seen[:40] != names and seen[:40] != seen[40:]


def test_bad_images_of_a_stream_are_written_down_once_and_counted_after_a_resume(tmp_path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    digits = load_image_dataset("digits").select(range(20)).to_list()
    digits[3]["image"] = {"bytes": b"this is not an image", "path": "three.png"}
    dataset = load_image_dataset("digits")
    type(dataset).from_list(digits, features=dataset.features).to_parquet(folder / "train.parquet")
    changes = {"data": folder, "max_bad_images": 1, "max_steps": 6, **STREAMED}
    pretrain(tmp_path / "run", **changes)
    (record,) = map(json.loads, (tmp_path / "run/bad_images.jsonl").read_text().splitlines())
    assert record["name"] == "three.png" and "not an image" in record["reason"]
    assert rows(tmp_path / "run")[-1]["bad_images"] == 1
    with pytest.raises(SystemExit):
        pretrain(tmp_path / "strict", **{**changes, "max_bad_images": 0})
    assert "1 of 20 images cannot be read, more than the limit of 0" in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_vanishes_is_one_sentence_and_the_run_continues_when_it_is_back(
    tmp_path, shards, monkeypatch, capsys, num_workers
):
    changes = {"data": shards, "num_workers": num_workers, "max_steps": 10, "save_steps": 1, **STREAMED}
    whole = pretrain(tmp_path / "whole", **changes)
    send = pretraining_command.start

    def start(run):
        send(run)
        for shard in shards.iterdir():
            shard.rename(shard.with_suffix(".gone"))

    monkeypatch.setattr(pretraining_command, "start", start)
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", **changes)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and error.startswith("ijepa pretrain: error: the shard") and "--resume" in error
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for shard in shards.iterdir():
        shard.rename(shard.with_suffix(".parquet"))
    assert_equal_weights(pretrain(tmp_path / "run", resume="true", **changes), whole)


def test_missing_arguments_of_a_stream_are_one_sentence(tmp_path, shards, capsys):
    tar = tmp_path / "images.tar"
    write_tar(tar, 16)
    mistakes = [
        ({"data": tar}, "does not say how many images it holds: give num_images. The run reads "),
        ({"data": shards, "validation_split": "train"}, "validation_data"),
        ({"data": tmp_path / "nowhere"}, "nowhere"),
    ]
    for changes, message in mistakes:
        with pytest.raises(SystemExit) as stop:
            pretrain(tmp_path / "run", **STREAMED, **changes)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    pretrain(tmp_path / "run", data=tar, num_images=16, num_channels=3, **STREAMED)
    assert rows(tmp_path / "run")[-1]["epoch"] == 6 * 8 / 16


def write_tar(path, count):
    import tarfile

    with tarfile.open(path, "w") as tar:
        for number in range(count):
            image = io.BytesIO()
            Image.new("RGB", (20, 20), (number, 2 * number, 90)).save(image, "PNG")
            entry = tarfile.TarInfo(f"{number:04}.png")
            entry.size = image.tell()
            image.seek(0)
            tar.addfile(entry, image)


def test_the_knn_of_a_streamed_run_comes_from_data_of_its_own(tmp_path, shards):
    changes = {"validation_data": "digits", "validation_split": "test", "max_probe_images": 100}
    pretrain(tmp_path / "run", data=shards, **changes, **STREAMED)
    assert 0 < rows(tmp_path / "run")[-1]["knn_accuracy"] <= 1


def test_a_streamed_run_is_not_resumed_with_passes_of_another_size_or_without_streaming(tmp_path, shards, capsys):
    pretrain(tmp_path / "run", data=shards, **STREAMED)
    before = saved_weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")  # a finished run opens no data
    for changes, message in (
        ({"per_device_batch_size": 4, **STREAMED}, "images per process and pass changed from 8 to 4"),
        ({"min_patches": 2}, "streaming was True, is False"),
    ):
        with pytest.raises(SystemExit) as stop:
            pretrain(tmp_path / "run", data=shards, resume="true", **changes)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert_equal_weights(saved_weights(tmp_path / "run"), before)


def test_only_the_main_process_lists_a_folder(tmp_path, monkeypatch):
    """The others get its table, as two processes would send it. Tables in files are opened by each."""
    for number in range(3):
        (tmp_path / f"folder/{number}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"folder/{number}.png").touch()
    load_image_dataset(tmp_path / "folder").save_to_disk(tmp_path / "saved")
    sent = []
    for source, is_opened_again in ((tmp_path / "folder", False), (tmp_path / "saved", True)):
        opened = []

        def open_dataset(source=source, opened=opened):
            opened.append(source)
            return load_image_dataset(source)

        monkeypatch.setattr(distributed, "broadcast_object_list", lambda outcome: sent.append(pickle.dumps(outcome)))
        main = distributed.shared_dataset(SimpleNamespace(num_processes=2, is_main_process=True), open_dataset)
        assert len(opened) == 1

        def receive(outcome):
            outcome[:] = pickle.loads(sent.pop())

        monkeypatch.setattr(distributed, "broadcast_object_list", receive)
        other = distributed.shared_dataset(SimpleNamespace(num_processes=2, is_main_process=False), open_dataset)
        assert other[:] == main[:] and other.features == main.features and len(main) == 3
        assert len(opened) == 1 + is_opened_again
