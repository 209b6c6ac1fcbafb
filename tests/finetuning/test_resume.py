"""`ijepa finetune --resume_from_checkpoint`: a run continues from a whole checkpoint of the same classes, images and
arguments. With another learning rate or length, the schedule is that of the new arguments."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedOptimizerWrapper
from PIL import Image
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from ijepa_transformers.checkpoints import describe_files, write_manifest
from ijepa_transformers.finetuning import checkpointing, command
from ijepa_transformers.finetuning.arguments import parse_fine_tuning_arguments
from ijepa_transformers.finetuning.checkpointing import UNFINISHED
from ijepa_transformers.finetuning.trainer import check_deepspeed, keep_settings
from tests.runs import fine_tune, fine_tuning_argv


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SAVES = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, "logging_steps": 1}


def write_photos(folder, classes, count=4):
    """A folder `train` with a folder of grey pictures for each class."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / "train" / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 255, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), ("cat", "dog"))


@pytest.fixture(scope="module")
def whole(gray_pretrained, photos, tmp_path_factory):
    """A run of four steps with checkpoints after two and four. Do not change it."""
    output_dir = tmp_path_factory.mktemp("whole") / "output"
    fine_tune(gray_pretrained, output_dir, data=photos, images_per_class=None, **SAVES)
    return output_dir


@pytest.fixture
def resume(gray_pretrained, photos):
    def run(output_dir, **changes):
        options = {"data": photos, "images_per_class": None, "resume_from_checkpoint": "last", **SAVES, **changes}
        return fine_tune(gray_pretrained, output_dir, **options)

    return run


@pytest.fixture
def refusal(resume, capsys):
    """The sentence with which a resumed run is refused."""

    def run(output_dir, **changes):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            resume(output_dir, **changes)
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def cut_back(whole, output_dir, *steps):
    for step in steps:
        shutil.copytree(whole / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
    return output_dir


def assert_same_weights(weights, output_dir):
    expected = load_file(output_dir / "model.safetensors")
    assert set(weights) == set(expected) and all(torch.equal(weights[name], expected[name]) for name in weights)


def learning_rates(output_dir, step):
    state = json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]


# Damage


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "model.safetensors has changed": lambda path: flip_a_bit(path / "model.safetensors"),
    "optimizer.pt has changed": lambda path: flip_a_bit(path / "optimizer.pt"),
    "optimizer.pt is missing": lambda path: (path / "optimizer.pt").unlink(),
    "scheduler.pt is missing": lambda path: (path / "scheduler.pt").unlink(),
    "rng_state.pth is missing": lambda path: (path / "rng_state.pth").unlink(),
    "trainer_state.json has 9 bytes": lambda path: (path / "trainer_state.json").write_text('{"global_'),
    "manifest.json, which is written last, is missing": lambda path: (path / "manifest.json").unlink(),
    "manifest is that of step 2": lambda path: shutil.copytree(
        path.with_name("checkpoint-2"), path, dirs_exist_ok=True
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_aloud_for_an_older_one(whole, resume, refusal, tmp_path, capsys, damage):
    output_dir = cut_back(whole, tmp_path / "output", 2, 4)
    DAMAGES[damage](output_dir / "checkpoint-4")
    assert damage in refusal(output_dir, resume_from_checkpoint=output_dir / "checkpoint-4")
    capsys.readouterr()
    weights = resume(output_dir)
    error = capsys.readouterr().err
    assert "checkpoint-4 is damaged" in error and damage in error
    assert_same_weights(weights, whole)
    assert_same_weights(load_file(output_dir / "checkpoint-4" / "model.safetensors"), whole / "checkpoint-4")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(whole, refusal, tmp_path):
    output_dir = cut_back(whole, tmp_path / "output", 2)
    flip_a_bit(output_dir / "checkpoint-2" / "model.safetensors")
    error = refusal(output_dir)
    assert "The only checkpoint" in error and "content of model.safetensors has changed" in error
    assert [path.name for path in output_dir.iterdir()] == ["checkpoint-2"]


def test_a_run_that_was_killed_in_its_first_checkpoint_begins_again(whole, resume, refusal, tmp_path, capsys):
    output_dir = cut_back(whole, tmp_path / "output", 2)
    (output_dir / "checkpoint-2" / "manifest.json").unlink()
    assert "The only checkpoint" in refusal(output_dir)  # nobody knows what it is
    (output_dir / "checkpoint-2" / UNFINISHED).touch()
    weights = resume(output_dir)
    assert "checkpoint-2 was not finished, and does not count" in capsys.readouterr().err
    assert_same_weights(weights, whole)
    assert not list(output_dir.rglob(UNFINISHED))


def test_a_run_without_a_checkpoint_starts_aloud_unless_it_would_replace_a_model(
    whole, resume, refusal, tmp_path, capsys
):
    weights = resume(tmp_path / "output")
    assert f"There is no checkpoint in '{tmp_path / 'output'}' yet, so the run starts." in capsys.readouterr().err
    assert_same_weights(weights, whole)
    for checkpoint in (tmp_path / "output").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert "holds a model and no checkpoint to continue from" in refusal(tmp_path / "output")
    assert_same_weights(weights, tmp_path / "output")


def test_an_unfinished_checkpoint_is_known_by_its_mark(gray_pretrained, photos, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointing, "write_manifest", killed)
    options = {"data": photos, "images_per_class": None, **SAVES}
    with pytest.raises(SystemExit):
        fine_tune(gray_pretrained, tmp_path / "output", **options)
    assert (tmp_path / "output" / "checkpoint-2" / UNFINISHED).exists()


def test_a_checkpoint_of_weights_only_is_refused(gray_pretrained, photos, refusal, tmp_path):
    options = {"data": photos, "images_per_class": None, "save_only_model": True, **SAVES}
    fine_tune(gray_pretrained, tmp_path / "output", **options)
    assert "no state of the optimizer, as with save_only_model" in refusal(tmp_path / "output", max_steps=6)


def test_a_damaged_best_checkpoint_is_not_loaded(whole, gray_pretrained, photos, tmp_path):
    """It is loaded at the end of a run, long after it was written."""
    output_dir = cut_back(whole, tmp_path / "output", 2)
    flip_a_bit(output_dir / "checkpoint-2" / "model.safetensors")
    argv = fine_tuning_argv(gray_pretrained, tmp_path / "new", data=photos, images_per_class=None)
    trainer = command.build_trainer(parse_fine_tuning_arguments(argv))
    trainer.state.best_model_checkpoint = str(output_dir / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2' is damaged: the content of model\.safetensors"):
        trainer._load_best_model()


def test_the_best_checkpoint_is_found_where_the_output_was_moved_to(whole, gray_pretrained, photos, tmp_path):
    output_dir = cut_back(whole, tmp_path / "output", 2)
    argv = fine_tuning_argv(gray_pretrained, output_dir, data=photos, images_per_class=None)
    trainer = command.build_trainer(parse_fine_tuning_arguments([*argv, "--resume_from_checkpoint", "last"]))
    trainer.state.best_model_checkpoint = "where/it/was/checkpoint-2"
    trainer._load_best_model()
    assert_same_weights(trainer.model.state_dict(), output_dir / "checkpoint-2")


def test_old_checkpoints_are_removed_when_the_new_one_is_whole(gray_pretrained, photos, tmp_path):
    options = {"data": photos, "images_per_class": None, **SAVES, "save_steps": 1, "save_total_limit": 2}
    fine_tune(gray_pretrained, tmp_path / "output", **options)
    kept = sorted(path.name for path in (tmp_path / "output").glob("*checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]


# Learning rate and length


def test_a_new_learning_rate_holds_from_the_first_step_and_is_recorded(whole, resume, tmp_path):
    output_dir = cut_back(whole, tmp_path / "output", 4)
    resume(output_dir, max_steps=8, learning_rate=1e-5)
    rates = learning_rates(output_dir, 8)
    expected = [1e-5 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (4, 5, 6, 7)]
    assert rates[4:] == pytest.approx(expected)
    groups = torch.load(output_dir / "checkpoint-8" / "optimizer.pt")["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-5}
    assert "learning_rate was 0.01 until step 4, is 1e-05" in (output_dir / "README.md").read_text()


def test_the_first_step_after_an_extension_has_the_rate_of_the_longer_schedule(whole, resume, tmp_path):
    output_dir = cut_back(whole, tmp_path / "output", 4)
    resume(output_dir, max_steps=8)
    assert learning_rates(output_dir, 8)[4] == pytest.approx(0.01 / 2)


def test_other_settings_of_the_optimizer_hold_on_resume(whole, resume, tmp_path):
    output_dir = cut_back(whole, tmp_path / "output", 2)
    resume(output_dir, weight_decay=0.3, adam_beta2=0.9, layer_decay=1.0)
    groups = torch.load(output_dir / "checkpoint-4" / "optimizer.pt")["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.9)}


def test_the_rate_holds_in_the_optimizer_of_deepspeed_too():
    """It wraps the optimizer whose groups have the rates, and loads them from the checkpoint."""
    Accelerator(cpu=True)  # the wrapper asks for its state
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.1 * rate} for rate in (1, 2)]
    optimizer = DeepSpeedOptimizerWrapper(torch.optim.AdamW(groups))
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 8)
    optimizer.step()
    scheduler.last_epoch = 4
    keep_settings(optimizer, scheduler, [{"lr": 0.01}, {"lr": 0.02}])
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.005, 0.01]
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.01 * 3 / 8, 0.02 * 3 / 8])


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_an_optimizer_or_schedule_of_deepspeed_is_refused(name):
    with pytest.raises(ValueError, match=f"The configuration of DeepSpeed has '{name}': remove it"):
        check_deepspeed({"zero_optimization": {"stage": 2}, name: {"type": "AdamW"}})


def test_a_finished_run_trains_no_further_step(whole, resume, refusal, tmp_path):
    output_dir = cut_back(whole, tmp_path / "output", 4)
    assert_same_weights(resume(output_dir), whole)
    assert "4 steps are done, of 3" in refusal(output_dir, max_steps=3)


# Another run


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda train: (train / "cat").rename(train / "zebra"), "other classes (gone: 'cat'; new: 'zebra')"),
        (lambda train: shutil.copytree(train / "cat", train / "ant"), "other classes (new: 'ant')"),
        (lambda train: shutil.copy(train / "cat" / "0.png", train / "cat" / "9.png"), "8 training images, now there"),
        (lambda train: (train / "cat" / "0.png").rename(train / "dog" / "9.png"), "had other labels"),
        (lambda train: (train / "cat" / "0.png").rename(train / "cat" / "9.png"), "sizes or contents have changed"),
        (lambda train: Image.new("L", (16, 16)).save(train / "cat" / "0.png"), "sizes or contents have changed"),
    ],
)
def test_other_classes_or_images_are_refused(whole, photos, refusal, tmp_path, edit, message):
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    edit(data / "train")
    output_dir = cut_back(whole, tmp_path / "output", 2)
    assert message in refusal(output_dir, data=data)
    assert [path.name for path in output_dir.iterdir()] == ["checkpoint-2"]


def test_a_folder_may_have_moved(whole, photos, resume, tmp_path):
    shutil.copytree(photos, tmp_path / "moved")
    assert_same_weights(resume(cut_back(whole, tmp_path / "output", 2), data=tmp_path / "moved"), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 4}, "8 images per step, now there are 4"),
        ({"seed": 1}, "seed was 42, is 1"),
        ({"horizontal_flip": False}, "horizontal_flip was True, is False"),
        ({"optim": "sgd"}, "optim was"),
    ],
)
def test_arguments_that_change_what_was_trained_are_refused(whole, refusal, tmp_path, changes, message):
    assert message in refusal(cut_back(whole, tmp_path / "output", 2), **changes)


def test_the_state_of_another_version_is_refused(whole, refusal, tmp_path):
    output_dir = cut_back(whole, tmp_path / "output", 2)
    checkpoint = output_dir / "checkpoint-2"
    (checkpoint / "run_state.json").write_text('{"classes": 2}')
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    write_manifest(checkpoint, 2, describe_files(checkpoint, names))
    assert "run_state.json cannot be read" in refusal(output_dir)


def test_results_that_are_damaged_begin_anew(gray_pretrained, tmp_path):
    """As a full disk left them. Before, no later run in this directory could end."""
    saves = {"save_strategy": "steps", "save_steps": 2}
    fine_tune(gray_pretrained, tmp_path, max_steps=2, **saves)
    (tmp_path / "all_results.json").write_text('{"train_loss": 1')
    fine_tune(gray_pretrained, tmp_path, max_steps=3, resume_from_checkpoint="last", **saves)
    assert json.loads((tmp_path / "all_results.json").read_text())["train_loss"]
    assert not list(tmp_path.glob(".tmp-*"))


# Length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"per_device_train_batch_size": 64, "dataloader_drop_last": True},
            "8 training images are fewer than per_device_train_batch_size 64 x 1 process",
        ),
        ({"max_steps": -1, "num_train_epochs": 0}, "The run has no step: num_train_epochs is 0"),
        ({"max_steps": 0}, "The run has no step: max_steps is 0"),
        ({"max_steps": -2}, "The run has no step: max_steps is -2"),
    ],
)
def test_a_run_without_a_step_is_refused(refusal, tmp_path, changes, message):
    assert message in refusal(tmp_path / "output", resume_from_checkpoint=None, **changes)
    assert not (tmp_path / "output").exists()
