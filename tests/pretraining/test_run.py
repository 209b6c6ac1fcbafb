"""Promises of the training script: it learns nothing wrong from interruption, accumulation, workers or bad files, and
what it leaves behind is a model."""

import dataclasses
import json
import re
import shutil
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image

from ijepa_transformers import IJepaForPretraining, configuration_ijepa, masking
from ijepa_transformers.encoders import RawPixels
from ijepa_transformers.model_card import write_model_card
from ijepa_transformers.modeling_ijepa import remove_weights
from ijepa_transformers.preemption import StopRequest
from ijepa_transformers.pretraining import build as pretraining_build
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining import evaluate as pretraining_evaluate
from ijepa_transformers.pretraining import loop
from ijepa_transformers.pretraining import saving as pretraining_saving
from ijepa_transformers.pretraining.arguments import ModelArguments, parse_pretraining_arguments
from ijepa_transformers.pretraining.checkpointing import DirectoryLock, damage
from ijepa_transformers.pretraining.collapse_monitor import CollapseMonitor
from ijepa_transformers.pretraining.defaults import with_masks_for
from tests import forked
from tests.runs import (
    TINY,
    assert_close_weights,
    assert_equal_weights,
    pretrain,
    pretraining_argv,
    reset_accelerate,
    rows,
    saved_weights,
    without_speed,
)


REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ARCHITECTURE = [entry.name for entry in dataclasses.fields(ModelArguments)]


def build_run(arguments):
    return pretraining_build.build_run(arguments, DirectoryLock(Path(arguments.output_dir)), StopRequest())


@pytest.fixture
def stop_after(monkeypatch):
    """Kills the run, as a signal would, in the middle of the step after `steps`."""

    def arrange(steps):
        original, calls = loop.optimizer_step, []

        def optimizer_step(*args, **kwargs):
            calls.append(1)
            if len(calls) > steps:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(loop, "optimizer_step", optimizer_step)

    yield arrange


# Interruption


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop_after, monkeypatch, num_workers):
    """Mid-epoch, with workers, random crops, stochastic depth and a moving average; weights, optimizer and metrics."""
    changes = {"drop_path_rate": 0.3, "num_workers": num_workers, "logging_steps": 2, "keep_checkpoints": 5}
    whole = pretrain(tmp_path / "whole", **changes)
    with monkeypatch.context():
        stop_after(5)  # two steps after the checkpoint of step 3
        with pytest.raises(KeyboardInterrupt):
            pretrain(tmp_path / "cut", **changes)
        monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert [row["step"] for row in rows(tmp_path / "cut")] == [2, 3, 4]
    resumed = pretrain(tmp_path / "cut", resume="true", **changes)
    assert_equal_weights(resumed, whole)
    assert without_speed(rows(tmp_path / "cut")) == without_speed(rows(tmp_path / "whole"))
    optimizers = [torch.load(tmp_path / name / "checkpoints/step-00000006/optimizer.bin") for name in ("whole", "cut")]
    for ours, others in zip(*(optimizer["state"].values() for optimizer in optimizers), strict=True):
        assert all(torch.equal(ours[key], others[key]) for key in ours)


@pytest.mark.parametrize(
    "masks", [{"mask_mode": "random"}, {"mask_mode": "inverse_block", "num_contexts": 2}], ids=str
)
def test_a_run_with_masks_of_fixed_lengths_resumes_bit_for_bit_and_may_cut_its_batch_otherwise(
    tmp_path, masks, capsys
):
    changes = {**masks, "min_patches": None, "visible_share": 0.25, "keep_checkpoints": 5, "verbose": "true"}
    whole = pretrain(tmp_path / "whole", **changes)
    who = "each of 2 contexts" if "num_contexts" in masks else "the context"
    assert f"{masks['mask_mode']}: {who} has 4 of 16 patches; the other 12 are its targets" in capsys.readouterr().out
    assert {(row["context_tokens"], row["target_tokens"]) for row in rows(tmp_path / "whole")} == {(4, 12)}
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000006")
    assert_equal_weights(pretrain(tmp_path / "cut", resume="true", num_workers=2, **changes), whole)
    halved = pretrain(tmp_path / "halved", **changes, per_device_batch_size=4)
    assert_close_weights(halved, whole, tolerance=1e-6)


def test_a_run_continues_from_the_newest_whole_checkpoint(tmp_path, capsys):
    whole = pretrain(tmp_path / "run", keep_checkpoints=5)
    weights = tmp_path / "run/checkpoints/step-00000006/model.safetensors"
    content = weights.read_bytes()
    weights.unlink()  # a new file, because the old one is also the model in the output directory, which is open
    weights.write_bytes(content[:-1])
    assert "model.safetensors has" in damage(weights.parent)
    remove_weights(tmp_path / "run")  # a finished run needs no checkpoint
    again = pretrain(tmp_path / "run", resume="true")
    assert_equal_weights(again, whole)
    output = capsys.readouterr().out
    assert "step-00000006 is damaged (model.safetensors" in output and "at step 3" in output


def test_checkpoints_appear_whole_and_only_the_newest_are_kept(tmp_path, monkeypatch, capsys):
    pretrain(tmp_path / "run", save_steps=1, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.BitImageProcessorPil, "save_pretrained", fail)
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "full")
    assert stop.value.code == 1 and "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "full/checkpoints").glob("step-*"))


def test_resume_refuses_another_recipe_and_a_new_run_refuses_an_old_directory(tmp_path, capsys):
    pretrain(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for changes, message in (
        ({"resume": "true", "learning_rate": 0.5}, "learning_rate was 0.001, is 0.5"),
        ({"resume": "true", "target_image_mean": 0.5}, f"(--recipe {tmp_path / 'run/recipe.yaml'} has them)"),
        ({}, "already holds a run"),
    ):
        with pytest.raises(SystemExit) as stop:
            pretrain(tmp_path / "run", **changes)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    reset_accelerate()
    pretraining_command.main(["--recipe", str(tmp_path / "run/recipe.yaml"), "--resume", "true"])
    assert "is finished: all 6 steps are done" in capsys.readouterr().out


def test_resume_refuses_other_data(tmp_path, photographs, capsys):
    pretrain(tmp_path / "run", data=photographs, num_channels=3)
    (photographs / "test_0.jpg").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")  # a finished run opens no data
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", data=photographs, num_channels=3, resume="true")
    assert stop.value.code == 2 and "had 24 images" in capsys.readouterr().err


def test_resume_without_a_checkpoint_starts_the_run(tmp_path):
    """One command serves the first start and every requeue."""
    assert_equal_weights(pretrain(tmp_path / "a", resume="true"), pretrain(tmp_path / "b"))


# The same run, whatever the machine


def test_accumulation_equals_the_large_batch(tmp_path):
    """With fixed token counts every image has the same masks however the batch is cut, and the loss has no term that
    crosses images. SGD-sized differences only: AdamW magnifies rounding where gradients are tiny."""
    changes = {"num_context_tokens": 4, "max_steps": 4, "adam_epsilon": 1e-3}
    large = pretrain(tmp_path / "large", **changes)
    small = pretrain(tmp_path / "small", per_device_batch_size=2, **changes)
    for name in large:
        torch.testing.assert_close(small[name], large[name], atol=2e-6, rtol=0)
    for ours, others in zip(rows(tmp_path / "small"), rows(tmp_path / "large"), strict=True):
        assert ours["loss"] == pytest.approx(others["loss"], abs=1e-5)
        assert (ours["step"], ours["momentum"]) == (others["step"], others["momentum"])


def test_a_resumed_run_may_cut_its_batch_otherwise(tmp_path):
    """The first half ends after 6 forward passes, the second has 4 of them in each step."""
    changes = {"num_context_tokens": 4, "adam_epsilon": 1e-3, "keep_checkpoints": 5}
    whole = pretrain(tmp_path / "run", per_device_batch_size=4, **changes)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    again = pretrain(tmp_path / "run", per_device_batch_size=2, resume="true", **changes)
    for name in whole:
        torch.testing.assert_close(again[name], whole[name], atol=1e-7, rtol=0)


def test_workers_are_started_once_for_training_and_once_for_all_evaluations(tmp_path, monkeypatch):
    """Where processes are not forked, starting one takes seconds."""
    started, original = [], BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", lambda process: (started.append(process), original(process)))
    pretrain(tmp_path / "run", num_workers=1, validation_split="test", eval_steps=2, max_probe_images=20)
    assert [row["step"] for row in rows(tmp_path / "run") if "knn_accuracy" in row] == [2, 4, 6]
    assert len(started) == 2


def test_number_of_workers_changes_nothing(tmp_path):
    assert_equal_weights(pretrain(tmp_path / "none"), pretrain(tmp_path / "two", num_workers=2))


def test_two_processes_equal_one_at_the_same_global_batch(tmp_path):
    """Data-parallel training of half the batch each."""
    changes = {"num_context_tokens": 4, "adam_epsilon": 1e-3}
    single = pretrain(tmp_path / "single", **changes)
    argv = ["run_pretraining.py", *pretraining_argv(tmp_path / "double", per_device_batch_size=4, **changes)]
    result = forked.fork_ranks(2, argv)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "4 per pass x 2 processes x 1 accumulation step" in result.stdout
    double = saved_weights(tmp_path / "double")
    for name in single:
        torch.testing.assert_close(double[name], single[name], atol=2e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_layers_compute_the_same_under_the_same_names(tmp_path):
    plain, compiled = pretrain(tmp_path / "plain"), pretrain(tmp_path / "compiled", compile_layers="true")
    assert set(plain) == set(compiled)
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], atol=1e-6, rtol=0)


def test_a_missing_compiler_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no_such_compiler")
    with pytest.raises(SystemExit) as end:
        pretrain(tmp_path / "run", compile_layers="true")
    assert end.value.code == 2 and "'no_such_compiler' does not work" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_optimizer_of_8_bits_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    changes = {"optimizer": "adamw_8bit", "hidden_size": 64, "intermediate_size": 128, "keep_checkpoints": 5}
    whole = pretrain(tmp_path / "run", **changes)
    state = torch.load(tmp_path / "run/checkpoints/step-00000006/optimizer.bin", weights_only=True)["state"]
    assert any("__bnb_optimizer_quant_state__" in entry for entry in state.values())
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    assert_equal_weights(pretrain(tmp_path / "run", resume="true", **changes), whole)


def test_bfloat16_keeps_float32_weights_that_move(tmp_path):
    weights = pretrain(tmp_path / "run", mixed_precision="bf16", max_grad_norm=1.0)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    changed = [name for name in weights if name.startswith("ijepa.layers")]
    assert any(not torch.equal(weights[name], weights[name.replace("ijepa", "context_encoder")]) for name in changed)


# What a run leaves behind


@pytest.mark.usefixtures("drawn_curves")
def test_the_output_directory_is_a_model(tmp_path):
    weights = pretrain(tmp_path / "run", validation_split="test", eval_steps=3, max_probe_images=150)
    directory = tmp_path / "run"
    encoder = transformers.AutoModel.from_pretrained(directory)
    assert torch.equal(encoder.layernorm.weight, weights["ijepa.layernorm.weight"])
    assert_equal_weights(IJepaForPretraining.from_pretrained(directory).state_dict(), weights)
    checkpoint = IJepaForPretraining.from_pretrained(directory / "checkpoints/step-00000006")
    assert_equal_weights(checkpoint.state_dict(), weights)
    processor = json.loads((directory / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.459] and processor["crop_size"] == {"height": 16, "width": 16}
    with Image.open(directory / "curves.png") as picture:
        assert min(picture.size) > 500
    card = (directory / "README.md").read_text()
    assert "library_name: transformers" in card and "I-JEPA target encoder" in card and "batch_size: 8" in card
    assert not list(directory.glob(".tmp-*"))
    repeated = parse_pretraining_arguments(["--recipe", str(directory / "recipe.yaml")])
    assert repeated == parse_pretraining_arguments(
        pretraining_argv(directory, validation_split="test", eval_steps=3, max_probe_images=150)
    )


def test_metrics_say_what_was_promised(tmp_path):
    pretrain(tmp_path / "run", validation_split="test", eval_steps=4, max_probe_images=150)
    metrics = rows(tmp_path / "run")
    assert [row["step"] for row in metrics] == [2, 3, 4, 6]
    promised = {"loss", "learning_rate", "weight_decay", "momentum", "grad_norm", "target_std", "effective_rank"}
    promised |= {"context_tokens", "target_tokens", "images_per_second", "epoch", "bad_images"}
    for row in metrics:
        assert promised <= set(row) and all(np.isfinite(row[key]) for key in promised)
    assert ["knn_accuracy" in row for row in metrics] == ["random_knn_accuracy" in row for row in metrics]
    assert ["knn_accuracy" in row for row in metrics] == [False, False, True, True]
    assert metrics[0]["momentum"] == pytest.approx(0.996 + 0.004 / 6)


def test_a_collapse_is_said_aloud(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretraining_build, "CollapseMonitor", lambda: CollapseMonitor(warmup_updates=0))
    pretrain(tmp_path / "run", image_mean=[0.0], image_std=[1e6])  # every image looks the same
    assert "collapsing" in capsys.readouterr().out
    assert rows(tmp_path / "run")[-1]["collapsing"] is True


def test_trackers_get_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    pretrain(tmp_path / "run", trackers="tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_push_to_hub_uploads_the_model_and_no_checkpoints(tmp_path, monkeypatch):
    calls = {}
    repository = type("Repository", (), {"repo_id": "lab/tiny"})
    monkeypatch.setattr(
        pretraining_saving, "create_repo", lambda name, **options: calls.update(name=name, **options) or repository
    )
    monkeypatch.setattr(pretraining_saving, "upload_folder", lambda **options: calls.update(options))
    pretrain(tmp_path / "run", push_to_hub="true", hub_model_id="lab/tiny")
    assert (calls["name"], calls["private"], calls["repo_id"]) == ("lab/tiny", True, "lab/tiny")
    assert calls["folder_path"] == tmp_path / "run" and "checkpoints/*" in calls["ignore_patterns"]


# Users' own data and weights


@pytest.fixture
def photographs(tmp_path):
    """A flat folder of colour JPEGs of several sizes, without labels; names that look like splits."""
    folder, generator = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    for number in range(24):
        size = (int(generator.integers(20, 60)), int(generator.integers(20, 60)), 3)
        pixels = generator.integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{('test', 'train', 'photo')[number % 3]}_{number}.jpg")
    return folder


def test_a_flat_folder_of_jpegs_trains_without_labels_and_bad_files_are_counted(tmp_path, photographs, capsys):
    (photographs / "broken.jpg").write_bytes(b"this is no photograph")
    pretrain(tmp_path / "run", data=photographs, num_channels=3, max_bad_images=1)
    assert "25 images" in capsys.readouterr().out
    (record,) = [json.loads(line) for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert record["name"].endswith("broken.jpg") and rows(tmp_path / "run")[-1]["bad_images"] == 1


def test_too_many_bad_files_stop_the_run(tmp_path, photographs, capsys):
    for number in range(3):
        (photographs / f"broken_{number}.jpg").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", data=photographs, num_channels=3, max_bad_images=1)
    assert stop.value.code == 1 and "cannot be read, more than the limit of 1" in capsys.readouterr().err


def test_init_from_takes_weights_only_and_schedules_start_afresh(tmp_path):
    first = pretrain(tmp_path / "first")
    standing_still = {"learning_rate": 0.0, "start_learning_rate": 0.0, "momentum": 1.0, "warmup_steps": 1}
    changes = {**dict.fromkeys(ARCHITECTURE), **standing_still, "init_from": tmp_path / "first", "max_steps": 1}
    pretrain(tmp_path / "second", **changes)
    assert_equal_weights(saved_weights(tmp_path / "second"), first)
    assert [row["step"] for row in rows(tmp_path / "second")] == [1]


def test_init_from_brings_the_normalisation_that_its_weights_know(tmp_path, capsys):
    pretrain(tmp_path / "first", image_mean=0.25, image_std=0.125, max_steps=1, warmup_steps=1)
    changes = {**dict.fromkeys(ARCHITECTURE), "init_from": tmp_path / "first", "warmup_steps": 1, "save_steps": 1}

    def statistics(name, **more):
        pretrain(tmp_path / name, **changes, **more)
        processor = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        recipe = yaml.safe_load((tmp_path / name / "recipe.yaml").read_text())
        assert (processor["image_mean"], processor["image_std"]) == (recipe["image_mean"], recipe["image_std"])
        return processor["image_mean"], processor["image_std"]

    assert statistics("second", max_steps=2) == ([0.25], [0.125])
    (tmp_path / "first" / "preprocessor_config.json").write_text("")
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "step-00000002")
    assert statistics("second", max_steps=2, resume="true") == ([0.25], [0.125])  # from the checkpoint
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "step-00000002")
    recipe = ["--recipe", str(tmp_path / "second/recipe.yaml"), "--resume", "true"]
    reset_accelerate()
    pretraining_command.main(recipe)  # it has the found values as if they had been given
    with pytest.raises(SystemExit):
        pretraining_command.main([*recipe, "--image_mean", "0.5"])
    assert "image_mean was [0.25], is [0.5]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrain(tmp_path / "third", **changes)
    assert "Give image_mean and image_std" in capsys.readouterr().err and not (tmp_path / "third").exists()
    assert statistics("third", max_steps=1, image_mean=0.5, image_std=0.25) == ([0.5], [0.25])


def test_the_licence_of_the_weights_a_run_starts_from_carries_over(tmp_path):
    """A card names a Hub model as its base, but no path: the Hub would refuse the upload."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    for name, expected in ((str(tmp_path / "base"), (None, "cc-by-nc-4.0")), ("lab/huge", ("lab/huge", None))):
        write_model_card(tmp_path, "small", summary={}, metrics={}, recipe={}, base_model=name)
        header = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
        assert (header.get("base_model"), header.get("license")) == expected


def test_optimizer_and_probe_settings_reach_what_they_set(tmp_path):
    changes = {"adam_beta1": 0.8, "adam_beta2": 0.95, "knn_neighbors": 3, "validation_split": "test"}
    run = build_run(parse_pretraining_arguments(pretraining_argv(tmp_path / "run", **changes)))
    assert run.optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    assert run.probe.knn_name == "3-NN"


def test_weights_from_elsewhere_are_trained_in_training_mode(tmp_path, monkeypatch):
    """`from_pretrained` gives a model in evaluation mode, where stochastic depth would silently be off."""
    pretrain(tmp_path / "first")
    modes, original = [], loop.optimizer_step

    def optimizer_step(run, *args, **kwargs):
        modes.append((run.networks.context_encoder.training, run.networks.ijepa.training))
        return original(run, *args, **kwargs)

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    pretrain(
        tmp_path / "second", **{**dict.fromkeys(ARCHITECTURE), "init_from": tmp_path / "first", "drop_path_rate": 0.2}
    )
    assert set(modes) == {(True, False)}


def test_unlabelled_images_are_no_neighbours(tmp_path, monkeypatch):
    """-1 is a missing label: such images are left out of the k-NN, not counted as a class."""

    def partly_labelled(arguments, split, labels, original=pretraining_evaluate.open_split):
        dataset = original(arguments, split, labels).select(range(60))
        labels = [label if index % 2 else -1 for index, label in enumerate(dataset["label"])]
        feature = dataset.features["label"]
        return dataset.remove_columns("label").add_column("label", labels).cast_column("label", feature)

    monkeypatch.setattr(pretraining_evaluate, "open_split", partly_labelled)
    arguments = parse_pretraining_arguments(pretraining_argv(tmp_path / "run", validation_split="test"))
    run = build_run(arguments)
    _, train_labels, _, test_labels = run.probe.features_of(RawPixels())
    assert len(train_labels) == len(test_labels) == 30 and min(train_labels) >= 0
    row = run.probe.row("raw pixels", RawPixels())
    assert "20-NN" in row and ("5-shot" in row) == (train_labels.unique(return_counts=True)[1].min() >= 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"data": "/path/to/images"}, "--data is missing"),
        ({"batch_size": 12}, "batch_size 12 is not a multiple of per_device_batch_size 8"),
        ({"batch_size": 4096}, "1,297 images cannot fill .* 4096; .*--batch_size 32 --per_device_batch_size 32."),
        ({"warmup_steps": 7}, "warmup_steps 7"),
        ({"target_scale": [0.9, 0.9]}, "target_scale"),
        ({"validation_split": "holiday"}, "holiday"),
        ({"attn_implementation": "flex_attention"}, "attn_implementation flex_attention cannot train on a CPU"),
        ({"epochs": 3}, "epochs 3.0 and max_steps 6"),
        ({"hidden_size": 18}, "hidden_size.*18"),
        ({"max_steps": "many"}, "max_steps.*many"),
        ({"mixed_precision": "int4"}, "int4"),
        ({"push_to_hub": "true"}, "hub_model_id"),
        ({"init_from": "x"}, "cannot be set beside it"),
        ({**dict.fromkeys(ARCHITECTURE), "init_from": "no/such/model"}, "no/such/model"),
        ({"learning_speed": 3}, "learning_speed"),
    ],
)
def test_mistakes_are_one_sentence_with_the_value_and_leave_nothing_behind(tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", **changes)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "run").exists()


def test_a_run_among_its_images_is_refused_because_its_curves_would_become_one(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit) as stopped:
        pretrain(tmp_path / "photos" / "run", data=tmp_path / "photos")
    assert stopped.value.code == 2 and "run' lies among the images in '" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "photos" / "run").exists()


# Recipes


def test_recipes_are_read_with_flags_over_them_and_unknown_keys_are_errors(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "output_dir": "here", "learning_rate": "3e-4", "allow_overlap": True}))
    arguments = parse_pretraining_arguments(["--recipe", str(recipe), "--seed", "7"])
    assert (arguments.learning_rate, arguments.seed, arguments.allow_overlap) == (3e-4, 7, True)
    recipe.write_text(yaml.safe_dump({**TINY, "output_dir": "here", "momentun": 0.9}))
    with pytest.raises(SystemExit):
        parse_pretraining_arguments(["--recipe", str(recipe)])
    assert "unknown keys: momentun" in capsys.readouterr().err


OTHERS = ("probe", "finetune")  # recipes of other commands, whose tests read them
RECIPES = [
    path
    for path in sorted((REPOSITORY / "ijepa_transformers" / "recipes").glob("*.yaml"))
    if path.stem.split("_")[0] not in OTHERS
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_complete(recipe):
    arguments = parse_pretraining_arguments(["--recipe", str(recipe), "--output_dir", "somewhere", "--data", "digits"])
    grid_size = configuration_ijepa.IJepaConfig(**arguments.model_fields()).grid_size
    masking.build_masking(grid_size, **with_masks_for(arguments, grid_size)[0].mask_fields())


@pytest.mark.parametrize("recipe", ["cifar10", "imagenette", "stl10"])
@pytest.mark.parametrize(
    ("columns", "splits", "judged"),
    [
        (("img", "label"), ("train", "test"), "test"),
        (("photo", "class"), ("train", "val", "test"), "validation"),
    ],
)
def test_recipes_of_the_hub_need_only_a_path(tmp_path, capsys, recipe, columns, splits, judged):
    pixels = [Image.new("L", (20, 20), 20 * number) for number in range(10)]
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.Value("int64")})
    table = datasets.Dataset.from_dict({columns[0]: pixels, columns[1]: [0, 1] * 5}, features=features)
    for split in splits:
        table.to_parquet(tmp_path / f"data/{split}.parquet")
    pretrain(tmp_path / "run", recipe=recipe, data=tmp_path / "data", max_steps=1, warmup_steps=0)
    printed = capsys.readouterr().out
    assert f"split train; k-NN on split {judged})" in printed and f"Accuracy on the {judged!r} split" in printed


SMALL = ("quickstart", "small_images", "medium_images", "cifar10", "stl10", "imagenette")  # the last four were not run


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_small_data_gets_what_was_measured_on_small_data_and_published_recipes_what_was_published(recipe):
    arguments = parse_pretraining_arguments(["--recipe", str(recipe), "--output_dir", "somewhere", "--data", "digits"])
    config = configuration_ijepa.IJepaConfig(**arguments.model_fields())
    settings = config.patch_embedding_init, config.target_normalization
    if recipe.stem in SMALL:
        assert settings == ("fan_in", "batch") and arguments.mask_mode in ("auto", "unbiased")
        assert config.initializer_range == pytest.approx(config.hidden_size**-0.5, rel=0.05)
    elif recipe.stem.startswith("vit_"):
        assert settings == ("published", "layer") and config.initializer_range == 0.02
        assert (arguments.momentum, arguments.momentum_half_life) == (0.996, None)


def test_the_recipe_for_own_images_starts_from_weights_as_its_header_says(tmp_path):
    text = (REPOSITORY / "ijepa_transformers" / "recipes" / "custom_images_single_gpu.yaml").read_text()
    removed = ("size", "image_size", "patch_size", "initializer_range")
    assert "remove size, image_size, patch_size and initializer_range from a copy" in text
    recipe = {key: value for key, value in yaml.safe_load(text).items() if key not in removed}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    argv = ["--recipe", str(tmp_path / "recipe.yaml"), "--init_from", "weights", "--target_normalization", "layer"]
    assert parse_pretraining_arguments(argv).init_from == "weights"


def test_help_is_grouped():
    result = forked.run(["run_pretraining.py", "--help"], check=True)
    for group in ("data:", "model:", "masks:", "optimization:", "output:"):
        assert f"\n{group}" in result.stdout
