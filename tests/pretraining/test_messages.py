"""What a run prints at its start and its end, and what a finished run says if it is resumed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_transformers import pretrain as pretrain_by_keywords
from ijepa_transformers.execution import threads
from ijepa_transformers.pretraining import build, loop, messages
from ijepa_transformers.pretraining.arguments import parse_unchecked_arguments, pretraining_arguments
from ijepa_transformers.pretraining.finished import finished_run
from ijepa_transformers.pretraining.messages import show_bad_images
from ijepa_transformers.pretraining.next_commands import next_commands
from tests.printed import parsed, proposed
from tests.runs import TINY, pretrain, pretraining_argv, rows


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def arguments_with(**changes):
    return pretraining_arguments(**{**TINY, "output_dir": "out", **changes})


def test_the_next_commands_of_a_judged_run_are_accepted_with_its_paths(tmp_path):
    output_dir = str(tmp_path / "my run")
    arguments = arguments_with(output_dir=output_dir, validation_split="test", label_column="label")
    found = dict(map(parsed, next_commands(arguments)))
    assert list(found) == ["visualize", "extract", "probe"]
    assert found["visualize"].model == found["extract"].model == output_dir and found["probe"].models == [output_dir]
    assert {each.data for each in found.values()} == {"digits"} and found["probe"].validation_split == "test"
    assert {each.label_column for each in found.values()} == {"label"}
    assert found["visualize"].split == "test" and found["extract"].split == "train"


def test_a_run_without_labels_is_told_to_search_its_images(tmp_path):
    output_dir = f"{tmp_path / 'my run'}/"  # as a shell completes it
    found = dict(map(parsed, next_commands(arguments_with(output_dir=output_dir, train_split="test"))))
    assert list(found) == ["visualize", "extract", "search"]
    assert {each.model for each in found.values()} == {output_dir[:-1]}
    assert {each.split for each in found.values()} == {"test"} and found["search"].outliers
    assert found["extract"].output_dir == f"{tmp_path / 'my run'}_features"


def test_a_streamed_run_is_told_to_write_onnx_if_that_is_possible(monkeypatch, tmp_path):
    place = {"data": "hf://datasets/someone/photos/*.parquet", "output_dir": str(tmp_path)}
    streamed = arguments_with(**place, streaming=True, num_images=100)
    assert [name for name, _ in map(parsed, next_commands(streamed))] == ["onnx"]
    monkeypatch.setattr("ijepa_transformers.display.ONNX_PACKAGES", ("onnx", "a_package_nobody_has"))
    assert next_commands(streamed) == []


def test_bad_images_are_named_and_many_are_counted(capsys, tmp_path):
    records = [{"name": f"{number}.jpg", "reason": "this is not an image"} for number in range(5)]
    show_bad_images(records, tmp_path / "bad_images.jsonl")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bad image 0.jpg: this is not an image" and len(lines) == 4
    assert lines[-1] == f"2 more images could not be read; {tmp_path / 'bad_images.jsonl'} lists them"


def test_a_run_in_a_file_has_a_short_head_lines_with_times_and_an_end(tmp_path, capsys):
    pretrain(tmp_path / "run", max_steps=14, logging_steps=12, save_steps=100)
    out = capsys.readouterr().out
    head = [line.split()[0] for line in out[out.index("data  ") : out.index("WARNING: 1,297")].splitlines()]
    assert head == ["data", "length", "batch", "encoder", "computation", "output", "For", "The"]
    assert "\nThe splits 'train'" in out  # have labels
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 10 of 14", "step 12 of 14", "step 14 of 14"]
    assert all(" so far, " in line and " left" in line for line in lines[:2])
    assert "loss" in lines[1] and "loss" not in lines[0] and " left" not in lines[2]
    end = out[out.index("\nVerdict\n") :]
    assert f"\nmodel        {tmp_path / 'run'}\n" in end and dict(proposed(end))["search"].duplicates


WITHOUT_TORCH = """
import sys
from ijepa_transformers import cli
cli.main(sys.argv[1:])
print("slow imports:", sorted({"torch", "transformers", "accelerate", "datasets"} & sys.modules.keys()))
"""


def test_a_finished_run_says_so_without_opening_data_or_model(tmp_path, monkeypatch, capsys):
    pretrain(tmp_path / "run", mask_mode="auto")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    argv = pretraining_argv(tmp_path / "run", mask_mode="auto", resume="true")
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "pretrain", *argv], capture_output=True, text=True)
    out, slow = done.stdout.split("slow imports: ")
    assert slow == "[]\n" and done.stderr == ""
    assert out.startswith(f"The run in {tmp_path / 'run'} is finished: all 6 steps are done.")
    assert "\nVerdict\n" in out and [name for name, _ in proposed(out)] == ["visualize", "extract", "search"]
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after
    monkeypatch.setattr(build, "open_batches", lambda *_: pytest.fail("opens the data"))
    result = pretrain_by_keywords(**TINY, output_dir=tmp_path / "run", mask_mode="auto", resume=True)
    assert capsys.readouterr().out == out
    assert result.metrics == rows(tmp_path / "run")[-1] and result.verdict["sentences"] and result.table is None


def test_a_run_is_not_called_finished_unless_its_files_and_the_arguments_say_so(tmp_path):
    pretrain(tmp_path / "run")

    def is_finished(**changes):
        argv = pretraining_argv(tmp_path / "run", **{"resume": "true", **changes})
        return finished_run(parse_unchecked_arguments(argv)) is not None

    assert is_finished() and is_finished(validation_split=None, num_workers=1)
    for other in ({"resume": "false"}, {"max_steps": 7}, {"data": "elsewhere"}, {"print_memory_estimate": "true"}):
        assert not is_finished(**other)
    later = tmp_path / "run" / "checkpoints" / "step-00000007"
    later.mkdir()
    for path, content in (
        (tmp_path / "run" / "run_status.json", '{"status": "failed"}'),
        (tmp_path / "run" / "run_status.json", "[]"),
        (later.with_name("step-00000006") / "run_state.json", "{}"),
        (tmp_path / "run" / "model.safetensors", None),
    ):
        assert not is_finished()  # there is a later checkpoint
        later.rmdir()
        before = path.read_bytes()
        path.write_text(content) if content else path.unlink()
        assert not is_finished(), path
        path.write_bytes(before)
        assert is_finished()
        later.mkdir()


def test_a_finished_run_is_judged_if_labels_are_named_afterwards(tmp_path, capsys):
    pretrain(tmp_path / "run")
    told = "The splits 'train' and 'test' have labels. --validation_split test judges the run by them; after the run,"
    assert capsys.readouterr().out.count(told) == 2  # at the start, and at the end
    pretrain(tmp_path / "run", resume="true", validation_split="test", max_probe_images=60)
    out = capsys.readouterr().out
    assert "Accuracy on the 'test' split" in out and told not in out


def test_labels_that_cannot_judge_a_run_are_not_named(tmp_path, capsys):
    """Only the first folder has classes; the second has no other split."""
    for number, name in enumerate(("a/train/cat", "a/train/dog", "a/test", "b/cat", "b/dog")):
        (tmp_path / name).mkdir(parents=True)
        for seed in range(8):
            pixels = np.random.default_rng((number, seed)).integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{seed}.png")
    for name in ("a", "b"):
        pretrain(tmp_path / f"run {name}", data=tmp_path / name, max_steps=1, warmup_steps=1)
    assert "have labels" not in capsys.readouterr().out


def test_a_run_says_once_what_was_chosen_for_speed(tmp_path, monkeypatch, capsys):
    chosen = "For speed: eager attention."
    monkeypatch.setattr(messages, "keeps_freed_memory", lambda: False)
    pretrain(tmp_path / "run", mixed_precision="bf16")
    out = capsys.readouterr().out
    assert out.count(chosen) == 1 and "Freed memory" not in out
    monkeypatch.setattr(messages, "keeps_freed_memory", lambda: True)
    pretrain(tmp_path / "other", mixed_precision="bf16", attn_implementation="eager")
    out = capsys.readouterr().out
    kept = "\nFreed memory is kept; MALLOC_TOP_PAD_=131072 in the environment turns this off.\n"
    assert out.count(kept) == 1 and "For speed" not in out


def test_one_thread_computes_the_steps_of_a_small_model_and_the_run_says_so(tmp_path, monkeypatch, capsys):
    taken, step = [], loop.optimizer_step
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(loop, "optimizer_step", lambda *own: taken.append(torch.get_num_threads()) or step(*own))
    said = "One thread computes a step; OMP_NUM_THREADS=2 in the environment sets 2."
    with threads(2):
        pretrain(tmp_path / "run", max_steps=2)
        assert said in capsys.readouterr().out and taken == [1, 1]
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        pretrain(tmp_path / "other", max_steps=2)
        assert said not in capsys.readouterr().out and taken == [1, 1, 2, 2]
        assert torch.get_num_threads() == 2


def test_a_run_says_at_its_start_how_a_gpu_multiplies(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "products_on_gpu", lambda *given: f"products {given}")
    pretrain(tmp_path / "run")
    assert "products ('cpu', 'no')" in capsys.readouterr().out
