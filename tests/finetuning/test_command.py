"""`ijepa finetune`: it trains the right weights on the right labels. Interruption, workers and processes change
nothing, and stock Transformers opens the classifier that it saves."""

import ast
import json
import logging
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from safetensors.torch import load_file

from ijepa_transformers import IJepaForImageClassification, IJepaForPretraining
from ijepa_transformers.data import datasets
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.finetuning import arguments as finetuning_arguments
from ijepa_transformers.finetuning import command as finetuning_command
from ijepa_transformers.finetuning import trainer as finetuning_trainer
from ijepa_transformers.finetuning import training_arguments
from ijepa_transformers.finetuning.messages import classify_commands
from ijepa_transformers.finetuning.trainer import classification_loss
from tests import forked
from tests.printed import parsed, proposed
from tests.runs import fine_tune, fine_tuning_argv, reset_accelerate, save_pretrained_model


REPOSITORY = Path(__file__).parents[2]
DIGITS_ENCODER = Path(__file__).parents[1] / "fixtures" / "digits_encoder"

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def directory(gray_pretrained):
    return gray_pretrained


@pytest.fixture(scope="module")
def colour_directory(tmp_path_factory):
    return save_pretrained_model(tmp_path_factory.mktemp("colour") / "model", num_channels=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of two classes with names, 6 to train on and 7 to evaluate on."""
    path, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 7)):
        for number in range(count):
            name, brightness = (("owl", 60), ("yak", 190))[number % 2]
            pixels = np.clip(generator.normal(brightness, 20, (20, 24)), 0, 255).astype(np.uint8)
            file = path / split / name / f"{name}_{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return path


def build(directory, output_dir, **changes):
    """The trainer of a tiny run, before training."""
    arguments = finetuning_arguments.parse_fine_tuning_arguments(fine_tuning_argv(directory, output_dir, **changes))
    return finetuning_command.build_trainer(arguments)


def test_no_workers_switch_persistent_workers_off(directory, tmp_path):
    """A recipe asks for persistent workers, and a flag may ask for none."""
    trainer = build(directory, tmp_path, dataloader_num_workers=0, dataloader_persistent_workers=True)
    assert next(iter(trainer.get_train_dataloader()))["pixel_values"].shape[1] == 1


def assert_equal(weights, others):
    assert set(weights) == set(others)
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


# What a run starts from


def test_training_starts_from_the_chosen_encoder(directory, tmp_path):
    pretrained = IJepaForPretraining.from_pretrained(directory)
    for name, encoder in (("target", pretrained.ijepa), ("context", pretrained.context_encoder)):
        model = build(directory, tmp_path / name, encoder=name).model
        assert type(model) is IJepaForImageClassification
        assert_equal(model.ijepa.state_dict(), encoder.state_dict())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_from_scratch_keeps_the_architecture_and_depends_on_the_seed_only(directory, tmp_path):
    models = [
        build(directory, tmp_path / str(i), from_scratch=True, seed=seed).model for i, seed in enumerate((1, 1, 2))
    ]
    weights = [model.state_dict() for model in models]
    assert_equal(weights[0], weights[1])
    pretrained = load_file(directory / "model.safetensors")
    for name in ("ijepa.layers.0.mlp.fc1.weight", "ijepa.embeddings.patch_embeddings.projection.weight"):
        assert not torch.equal(weights[0][name], weights[2][name]) and not torch.equal(
            weights[0][name], pretrained[name]
        )
    assert models[0].config.hidden_size == 16 and models[0].config.num_labels == 10


def test_weights_are_trained_in_float32_also_if_they_are_saved_in_bfloat16(directory, tmp_path):
    IJepaForPretraining.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    shutil.copy(directory / "preprocessor_config.json", tmp_path / "half")
    for name, changes in (("loaded", {}), ("fresh", {"from_scratch": True}), ("context", {"encoder": "context"})):
        model = build(tmp_path / "half", tmp_path / name, **changes).model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_fine_tuned_directory_keeps_its_head_for_the_same_number_of_classes_only(directory, folder, tmp_path):
    ten = fine_tune(directory, tmp_path / "ten", max_steps=1)
    again = build(tmp_path / "ten", tmp_path / "again").model
    assert torch.equal(again.classifier.weight, ten["classifier.weight"])
    two = build(tmp_path / "ten", tmp_path / "two", data=folder).model
    assert two.classifier.weight.shape[0] == 2
    assert_equal(two.ijepa.state_dict(), again.ijepa.state_dict())


def test_any_image_classifier_can_be_fine_tuned_and_resumed(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    build_image_processor(16, resize_ratio=1.0).save_pretrained(tmp_path / "vit")
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = fine_tune(tmp_path / "vit", tmp_path / "whole", **options)
    resume_copy(tmp_path / "whole", tmp_path / "half", step=2)
    assert_equal(fine_tune(tmp_path / "vit", tmp_path / "half", resume_from_checkpoint="last", **options), whole)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_pretrained_encoder_beats_fresh_weights_at_equal_steps(tmp_path, seed):
    """The quickstart's encoder, 5 labels per class, the learning rate that is best for both (docs/finetune.md)."""
    few_labels = {"images_per_class": 5, "seed": seed, "subset_seed": seed, "validation_split": "test"}
    steps = {"max_steps": 40, "per_device_train_batch_size": 50, "learning_rate": 3e-3}
    whole_scans = {"crop_scale": [1, 1], "crop_ratio": [1, 1], "horizontal_flip": False}
    scores = {}
    for from_scratch in (False, True):
        output_dir = tmp_path / str(from_scratch)
        fine_tune(DIGITS_ENCODER, output_dir, from_scratch=from_scratch, **few_labels, **steps, **whole_scans)
        scores[from_scratch] = json.loads((output_dir / "eval_results.json").read_text())["eval_accuracy"]
    assert scores[False] > scores[True] + 0.15, scores  # .646 against .290 for seed 0


# What is trained


@pytest.mark.parametrize("drop_path_rate", [None, 0.9])
def test_training_the_head_leaves_the_encoder_as_it_was(directory, tmp_path, drop_path_rate):
    pretrained = load_file(directory / "model.safetensors")
    options = {"tune": "head", "drop_path_rate": drop_path_rate, "weight_decay": 0.5}
    trained = fine_tune(directory, tmp_path, **options)
    for name, value in trained.items():
        assert name.startswith("classifier.") or torch.equal(value, pretrained[name])
    assert trained["classifier.bias"].abs().sum() > 0


def test_a_frozen_encoder_stays_in_evaluation_mode(directory, tmp_path):
    model = build(directory, tmp_path, tune="head", drop_path_rate=0.9).model.train()
    pixel_values = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, model.eval()(pixel_values).logits)


def test_trainer_uses_the_learning_rates_of_layer_decay_and_scales_them_together(directory, tmp_path):
    trainer = build(directory, tmp_path, layer_decay=0.5, learning_rate=0.1, max_steps=2, lr_scheduler_type="linear")
    trainer.train()
    assert sorted({group["initial_lr"] for group in trainer.optimizer.param_groups}) == [0.0125, 0.025, 0.05, 0.1]
    trainer.create_scheduler(4)
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.1  # what the log shows


def test_the_drop_path_rate_reaches_the_model(directory, tmp_path):
    model = build(directory, tmp_path, drop_path_rate=0.5).model
    assert model.config.drop_path_rate == 0.5 and model.ijepa.layers[-1].drop_path.rate == 0.5


# Loss


def test_the_loss_of_soft_labels_equals_the_cross_entropy_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, requires_grad=True)
    shares = torch.rand(6, 4, generator=generator).softmax(dim=1)
    smoothed = 0.9 * shares + 0.1 / 4
    by_hand = -(smoothed * logits.log_softmax(dim=1)).sum(dim=1).mean()
    outputs = SimpleNamespace(logits=logits)
    torch.testing.assert_close(classification_loss(outputs, shares, label_smoothing=0.1), by_hand)
    # Trainer counts the numbers in the labels of all processes and accumulated batches: here, twice as many images.
    halved = classification_loss(outputs, shares, num_items_in_batch=torch.tensor(48), label_smoothing=0.1)
    torch.testing.assert_close(halved, by_hand / 2)


def test_hard_labels_are_smoothed_in_training_and_plain_in_evaluation():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0])
    outputs = SimpleNamespace(logits=logits)
    shares = 0.7 * torch.nn.functional.one_hot(labels, 3) + 0.1
    by_hand = -(shares * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(classification_loss(outputs, labels, label_smoothing=0.3), by_hand)
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(logits, labels)
        torch.testing.assert_close(classification_loss(outputs, labels, label_smoothing=0.3), plain)


def test_the_number_of_labels_goes_to_the_loss_and_not_to_the_model(directory, tmp_path):
    trainer, received = build(directory, tmp_path, max_steps=1), []
    trainer.model.register_forward_pre_hook(lambda model, args, kwargs: received.append(set(kwargs)), with_kwargs=True)
    trainer.train()
    assert received == [{"pixel_values"}]


def test_accumulated_batches_equal_one_large_batch(directory, tmp_path):
    """30 images are batches of 12, 12 and 6. In a mean of means the last 6 would have a larger weight."""
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}
    whole = fine_tune(directory, tmp_path / "whole", per_device_train_batch_size=30, **options)
    parts = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 3}
    cut = fine_tune(directory, tmp_path / "parts", **parts, **options)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], atol=1e-6, rtol=1e-5)


# What is saved


def test_a_fine_tuned_directory_works_in_stock_transformers_with_its_class_names(
    colour_directory, folder, tmp_path, capsys
):
    output_dir = tmp_path / "photos"
    fine_tune(
        colour_directory, output_dir, data=folder, validation_split="validation", images_per_class=None, max_steps=30
    )
    model = IJepaForImageClassification.from_pretrained(output_dir).eval()
    assert model.config.id2label == {0: "owl", 1: "yak"} and model.config.label2id == {"owl": 0, "yak": 1}
    pixel_values = torch.randn(2, 3, 16, 16)
    torch.save(pixel_values, tmp_path / "pixels.pt")
    image = Image.open(folder / "validation" / "yak" / "yak_1.png")
    image.save(tmp_path / "yak.png")
    program = f"""
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
model = AutoModelForImageClassification.from_pretrained({str(output_dir)!r})
processor = AutoImageProcessor.from_pretrained({str(output_dir)!r})
pixel_values = torch.load({str(tmp_path / "pixels.pt")!r})
with torch.no_grad():
    torch.save(model(pixel_values).logits, {str(tmp_path / "logits.pt")!r})
classifier = pipeline("image-classification", model=model, image_processor=processor)
best = classifier(Image.open({str(tmp_path / "yak.png")!r}))[0]
assert best["label"] == "yak" and best["score"] > 0.5, best
assert "ijepa_transformers" not in sys.modules and type(model).__module__.startswith("transformers.")
"""
    forked.run(["-c", program], cwd=tmp_path, kind="stock", check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(pixel_values).logits)
    results = json.loads((output_dir / "eval_results.json").read_text())
    assert results["eval_images"] == 7 and results["eval_accuracy"] == results["eval_macro_accuracy"] == 1
    assert "eval_top_5_accuracy" not in results
    assert results["eval_most_frequent_class_accuracy"] == 4 / 7
    told = capsys.readouterr().out
    assert "split: accuracy 1 (always guessing the most frequent class: 0.5714), mean over classes 1" in told
    assert re.search(r"^computation  \w+$", told, re.MULTILINE)  # attention and matrix products are for --verbose
    card = (output_dir / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "owl, yak" in card and "accuracy: 1" in card
    assert str(colour_directory) in card and "base_model" not in card.split("---")[1]


def test_the_saved_recipe_repeats_the_run_and_holds_no_secret(directory, tmp_path):
    first = fine_tune(directory, tmp_path / "first", validation_split="test", hub_token="secret", mixup_alpha=None)
    recipe = yaml.safe_load((tmp_path / "first" / "recipe.yaml").read_text())
    assert recipe["images_per_class"] == 3 and "label_smoothing" not in recipe
    assert not any("secret" in file.read_text() for file in tmp_path.glob("first/*.[ym][ad]*"))
    reset_accelerate()
    recipe_words = ["--recipe", str(tmp_path / "first" / "recipe.yaml"), "--output_dir", str(tmp_path / "second")]
    finetuning_command.main(recipe_words)
    assert_equal(load_file(tmp_path / "second" / "model.safetensors"), first)
    results = json.loads((tmp_path / "second" / "all_results.json").read_text())
    assert results["eval_images"] == 500 and results["eval_top_5_accuracy"] > results["eval_accuracy"]


def test_the_best_checkpoint_is_loaded_at_the_end(directory, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    # The learning rate is so high that the loss rises after the first step.
    options = {**options, **best, "validation_split": "test", "learning_rate": 3.0, "lr_scheduler_type": "constant"}
    fine_tune(directory, tmp_path, **options)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"][:-1] if "eval_loss" in entry}
    step = min(losses, key=losses.get)
    assert step < 4 and state["best_model_checkpoint"].endswith(f"checkpoint-{step}")
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(losses[step], rel=1e-6)


@pytest.mark.parametrize("image_size", [[32], [24, 40]])
def test_a_higher_resolution_changes_model_and_image_processor(directory, tmp_path, image_size):
    fine_tune(directory, tmp_path, image_size=image_size, max_steps=1)
    height, width = image_size[0], image_size[-1]
    model = IJepaForImageClassification.from_pretrained(tmp_path).eval()
    assert model.config.grid_size == (height // 4, width // 4)
    processor = transformers.BitImageProcessorPil.from_pretrained(tmp_path)
    scan = np.zeros((8, 8, 1), dtype=np.uint8)
    pixel_values = processor(scan, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert pixel_values.shape[-2:] == (height, width)
    stock = transformers.models.ijepa.modeling_ijepa.IJepaForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(stock(pixel_values).logits, model(pixel_values).logits)


def test_the_start_has_no_warning_of_an_untrained_head(directory, tmp_path, capfd, caplog):
    fine_tune(directory, tmp_path, max_steps=1)
    written = capfd.readouterr()
    everything = written.err + written.out + caplog.text
    assert "no trained classifier" not in everything and "LOAD REPORT" not in everything
    assert "\nhead         new (the head is the last layer, which tells the classes)\n" in written.out
    assert "nothing is evaluated" in written.out and "30 images to train on" in written.out
    found = dict(proposed(written.out))
    assert found["visualize"].model == str(tmp_path) and found["visualize"].split == "train"
    assert "extract" not in found and f"\nhow to use   {tmp_path / 'README.md'}\n" in written.out
    assert logging.getLogger("ijepa_transformers").level == logging.NOTSET


def test_an_image_file_of_the_data_is_proposed_to_be_classified():
    image = {"path": "file:///my%20photos/owl.jpg", "bytes": None}
    ((name, code),) = map(parsed, classify_commands("my classifier", image, 3))
    assert name == "python" and {"my classifier", "/my photos/owl.jpg"} < {
        each.value for each in ast.walk(code) if isinstance(each, ast.Constant)
    }
    assert classify_commands("it", image, 1) == classify_commands("it", {**image, "bytes": b"png"}, 3) == []


# Interruption, workers, processes


def resume_copy(source, destination, step):
    """An output directory as it is after an interruption behind `step`."""
    shutil.copytree(source / f"checkpoint-{step}", destination / f"checkpoint-{step}")


RANDOM = {"drop_path_rate": 0.5, "crop_scale": [0.3, 1.0], "horizontal_flip": True, "label_smoothing": 0.1}


@pytest.mark.parametrize("step", [2, 4])  # in the middle of an epoch of 4 steps, and between two epochs
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(directory, tmp_path, step):
    options = {**RANDOM, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    if step == 2:
        options |= {"validation_split": "test", "eval_strategy": "steps", "eval_steps": 2}
    whole = fine_tune(directory, tmp_path / "whole", **options)
    resume_copy(tmp_path / "whole", tmp_path / "half", step)
    resumed = fine_tune(directory, tmp_path / "half", resume_from_checkpoint="last", **options)
    assert_equal(resumed, whole)


def test_each_epoch_has_each_image_once_with_new_crops(directory, tmp_path, monkeypatch):
    keys, read = [], datasets.FineTuningImages.__getitem__
    monkeypatch.setattr(
        datasets.FineTuningImages, "__getitem__", lambda self, key: keys.append(key) or read(self, key)
    )
    fine_tune(directory, tmp_path, max_steps=8)  # 30 images are 4 steps
    assert [epoch for epoch, _ in keys] == [0] * 30 + [1] * 30
    orders = [[index for epoch, index in keys if epoch == asked] for asked in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30)) and orders[0] != orders[1]


def test_workers_change_nothing_in_an_interrupted_run(directory, tmp_path):
    options = {**RANDOM, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    whole = fine_tune(directory, tmp_path / "whole", **options)
    resume_copy(tmp_path / "whole", tmp_path / "half", step=2)
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    resumed = fine_tune(directory, tmp_path / "half", resume_from_checkpoint="last", **workers, **options)
    assert_equal(resumed, whole)


def test_a_resumed_run_with_torchvision_augmentation_equals_an_uninterrupted_one(directory, tmp_path):
    pytest.importorskip("torchvision")
    options = {**RANDOM, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    options |= {"randaugment_magnitude": 9, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    whole = fine_tune(directory, tmp_path / "whole", **options)
    resume_copy(tmp_path / "whole", tmp_path / "half", step=2)
    workers = {"dataloader_num_workers": 2}
    resumed = fine_tune(directory, tmp_path / "half", resume_from_checkpoint="last", **workers, **options)
    assert_equal(resumed, whole)
    for name in ("randaugment_magnitude", "mixup_alpha", "cutmix_alpha"):
        without = fine_tune(directory, tmp_path / name, **{**options, name: None})
        assert not torch.equal(without["classifier.weight"], whole["classifier.weight"])


def test_images_are_mixed_in_training_but_not_in_evaluation(directory, tmp_path):
    pytest.importorskip("torchvision")
    trainer = build(directory, tmp_path, mixup_alpha=0.8, cutmix_alpha=1.0, validation_split="test")
    training, evaluation = next(iter(trainer.get_train_dataloader())), next(iter(trainer.get_eval_dataloader()))
    assert training["labels"].shape == (8, 10) and training["labels"].dtype == torch.float32
    torch.testing.assert_close(training["labels"].sum(dim=1), torch.ones(8))
    assert evaluation["labels"].dtype == torch.int64 and evaluation["labels"].ndim == 1
    expected = trainer.eval_dataset[0]["pixel_values"]
    assert torch.equal(evaluation["pixel_values"][0].cpu(), expected)


def launch(*arguments, through, **variables):
    """The command in two forked processes, run by another script."""
    return forked.fork_ranks(2, [through, REPOSITORY / "run_image_classification.py", *arguments], variables)


# If a process group still exists when the interpreter exits, the process sometimes aborts after all its work.
GROUP_HAS_ENDED = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not torch.distributed.is_initialized()
"""


def test_two_processes_train_as_one_and_evaluate_every_image_once(directory, folder, tmp_path):
    options = {"data": folder, "validation_split": "validation", "images_per_class": None, "optim": "sgd"}
    options |= {"learning_rate": 0.05, "per_device_eval_batch_size": 2, "crop_scale": [0.5, 1.0], "max_steps": 3}
    script = tmp_path / "group_has_ended.py"
    script.write_text(GROUP_HAS_ENDED)
    done = launch(
        *fine_tuning_argv(directory, tmp_path / "two", per_device_train_batch_size=3, **options), through=script
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = fine_tune(directory, tmp_path / "one", per_device_train_batch_size=6, **options)
    two = load_file(tmp_path / "two" / "model.safetensors")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5)
    results = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    assert [result["eval_images"] for result in results] == [7, 7]
    assert results[0]["eval_accuracy"] == results[1]["eval_accuracy"]


# Accelerate allows FSDP on accelerators only; torch has it on the CPU too.
FSDP_ON_CPU = """
import runpy, sys, torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel

def with_options(function, **options):
    return lambda *args, **given: function(*args, **{**given, **options})

initialize = AcceleratorState.__init__

def initialize_with_fsdp(self, *args, fsdp_plugin=None, **options):
    is_first = not AcceleratorState._shared_state
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if is_first and fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin

AcceleratorState.__init__ = initialize_with_fsdp
# For FSDP cpu:0 and cpu are different devices, and it frees tensors that it offloads from the CPU to the CPU.
FullyShardedDataParallel.__init__ = with_options(FullyShardedDataParallel.__init__, device_id=torch.device("cpu"))
FullStateDictConfig.__init__ = with_options(FullStateDictConfig.__init__, offload_to_cpu=False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not torch.distributed.is_initialized()
"""


def launch_fsdp(tmp_path, version, *arguments, **variables):
    """As `accelerate launch --use_fsdp` does, with its defaults."""
    script = tmp_path / "fsdp_on_cpu.py"
    script.write_text(FSDP_ON_CPU)
    settings = {"AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    settings |= {"TRANSFORMER_CLS_TO_WRAP": "IJepaLayer", "VERSION": str(version)}
    if version == 1:
        settings["USE_ORIG_PARAMS"] = "true"
    environment = {f"FSDP_{name}": value for name, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
    return launch(*arguments, through=script, **(environment | variables))


@pytest.mark.parametrize("version", [1, 2])
def test_sharded_weights_have_the_learning_rates_of_whole_ones_also_after_an_interruption(
    directory, tmp_path, version
):
    """Without weight decay, or with one learning rate for all, the weights would be different."""
    options = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.5, "layer_decay": 0.5, "max_steps": 3}
    one = fine_tune(directory, tmp_path / "one", per_device_train_batch_size=8, **options)
    options |= {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    done = launch_fsdp(tmp_path, version, *fine_tuning_argv(directory, tmp_path / "two", **options))
    assert done.returncode == 0, done.stderr[-3000:]
    resume_copy(tmp_path / "two", tmp_path / "half", step=2)
    options["resume_from_checkpoint"] = "last"
    done = launch_fsdp(tmp_path, version, *fine_tuning_argv(directory, tmp_path / "half", **options))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("two", "half"):
        sharded = load_file(tmp_path / name / "model.safetensors")
        assert set(sharded) == set(one)
        for key in one:
            torch.testing.assert_close(sharded[key], one[key], atol=1e-6, rtol=1e-5)


def test_fsdp_that_joins_weights_into_one_is_refused(directory, tmp_path):
    done = launch_fsdp(tmp_path, 1, *fine_tuning_argv(directory, tmp_path / "output"), FSDP_USE_ORIG_PARAMS="false")
    assert done.returncode != 0 and "error: FSDP version 1 needs use_orig_params" in done.stderr
    assert not (tmp_path / "output").exists()


def test_recipe_and_card_are_complete_or_missing(directory, tmp_path, monkeypatch):
    trainer = build(directory, tmp_path)
    write = Path.write_text

    def write_half(path, text, **options):
        write(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    for step, name in (
        (finetuning_command.start, "recipe.yaml"),
        (partial(finetuning_trainer.write_readme, directory=tmp_path), "README.md"),
    ):
        with pytest.raises(KeyboardInterrupt):
            step(trainer)
        assert not (tmp_path / name).exists()


# Wrong arguments


def test_one_process_with_several_gpus_is_refused(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_arguments.FineTuningArguments, "n_gpu", 2)
    with pytest.raises(SystemExit) as stopped:
        finetuning_command.main(fine_tuning_argv(directory, tmp_path / "output"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "2 GPUs: start it with ijepa launch --num_processes 2 finetune" in error
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model is missing"),
        ({"data": None}, "data is missing"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"colour": 3}, "--colour"),
        ({"model": "no/where/here"}, "model 'no/where/here' cannot be opened"),
        ({"validation_split": "valid"}, "no split 'validation'"),
        ({"eval_strategy": "epoch"}, "eval_strategy epoch needs a validation_split"),
        ({"images_per_class": 1000}, "fewer than images_per_class 1000"),
        ({"label_fraction": 0.1}, "images_per_class and label_fraction"),
        ({"crop_scale": [0.5]}, r"crop_scale must be two numbers, got \[0.5\]"),
        ({"crop_scale": [0.0, 1.0]}, "crop_scale must be a range inside"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate must lie in \[0, 1\), got 1.5"),
        ({"layer_decay": 1.5}, r"layer_decay must lie in \(0, 1\], got 1.5"),
        ({"label_smoothing": 1}, "label_smoothing must lie"),
        (
            {"metric_for_best_model": "f1", "eval_strategy": "epoch", "validation_split": "test"},
            "must be one of loss, accuracy, macro_accuracy, top_5_accuracy, got 'f1'",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing 0.1 instead"),
        ({"remove_unused_columns": True}, "remove_unused_columns must stay False, because nothing that"),
        ({"prediction_loss_only": True}, "prediction_loss_only must stay False, because results need the scores"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must stay False, because it would change the images"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must stay random, because"),
        ({"image_size": [2]}, "image_size 2 is smaller than one patch"),
        ({"image_size": [1, 2, 3]}, r"image_size must be one number.*\[1, 2, 3\]"),
        ({"mixup_alpha": -1}, "mixup_alpha must be positive, got -1"),
        ({"randaugment_magnitude": 31}, "randaugment_magnitude must be 0 to 30, got 31"),
        ({"resume_from_checkpoint": "first"}, "There is no checkpoint 'first' to continue from"),
        ({"train_list": "nowhere.txt", "images_per_class": None}, "'nowhere.txt' cannot be read"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_write_nothing(directory, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as stopped:
        finetuning_command.main(fine_tuning_argv(directory, tmp_path / "output", **{"model": directory} | changes))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("option", ["randaugment_magnitude", "mixup_alpha", "cutmix_alpha"])
def test_missing_torchvision_is_an_error_before_any_work(directory, tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(finetuning_arguments.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(finetuning_command, "open_split", None)
    with pytest.raises(SystemExit) as stopped:
        finetuning_command.main(fine_tuning_argv(directory, tmp_path / "output", **{option: 1}))
    assert stopped.value.code == 2
    assert f'{option} needs torchvision: pip install "ijepa-transformers[vision]"' in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def damaged(folder, tmp_path, edit):
    """A copy of the photos, changed."""
    copy = tmp_path / "photos"
    shutil.copytree(folder, copy)
    edit(copy)
    return copy


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda copy: shutil.rmtree(copy / "train" / "yak"), "No training image has the validation classes 'yak'"),
        (
            lambda copy: (copy / "train" / "owl.png").write_bytes((copy / "train/owl/owl_0.png").read_bytes()),
            "no labels",
        ),
    ],
)
def test_wrong_labels_are_one_sentence(directory, folder, tmp_path, capsys, edit, message):
    data = damaged(folder, tmp_path, edit)
    changes = {"data": data, "validation_split": "validation", "images_per_class": None}
    with pytest.raises(SystemExit) as stopped:
        finetuning_command.main(fine_tuning_argv(directory, tmp_path / "output", **changes))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_an_unreadable_training_image_stops_the_run_with_its_name(directory, folder, tmp_path, capsys):
    data = damaged(folder, tmp_path, lambda copy: (copy / "train" / "owl" / "owl_0.png").write_bytes(b"no image"))
    with pytest.raises(SystemExit) as stopped:
        finetuning_command.main(fine_tuning_argv(directory, tmp_path / "output", data=data, images_per_class=None))
    assert stopped.value.code == 1
    assert "owl_0.png: this is not an image" in capsys.readouterr().err.splitlines()[-1]


def test_a_finished_or_different_run_is_not_overwritten(directory, tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 2}
    fine_tune(directory, tmp_path / "output", **options)
    before = load_file(tmp_path / "output" / "model.safetensors")
    for changes, message in (
        ({}, "holds a run: --resume_from_checkpoint last continues it"),
        ({"resume_from_checkpoint": "last", "images_per_class": 4}, "images_per_class was 3, is 4"),
        ({"resume_from_checkpoint": "last", "tune": "head"}, "tune was 'all', is 'head'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            fine_tune(directory, tmp_path / "output", **{**options, **changes})
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert_equal(load_file(tmp_path / "output" / "model.safetensors"), before)


def test_layer_decay_and_image_size_are_for_ijepa(tmp_path, capsys):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    build_image_processor(16, resize_ratio=1.0).save_pretrained(tmp_path / "vit")
    for changes, message in (
        ({"layer_decay": 0.5}, "layer_decay below 1 is for I-JEPA classifiers: ViTForImageClassification"),
        ({"image_size": 32}, "image_size is for I-JEPA, not for ViTForImageClassification"),
        ({"drop_path_rate": 0.1}, "vit models have no drop_path_rate"),
        ({"encoder": "context"}, "holds no context encoder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            finetuning_command.main(fine_tuning_argv(tmp_path / "vit", tmp_path / "output", **changes))
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(("name", "num_images", "processes"), [("1percent", 12_811, 8), ("full", 1_281_167, 16)])
def test_the_headers_of_the_imagenet_recipes_have_the_steps_that_trainer_computes(name, num_images, processes):
    text = (REPOSITORY / "ijepa_transformers" / "recipes" / f"finetune_in1k_{name}.yaml").read_text()
    values = yaml.safe_load(text)
    batches = torch.utils.data.BatchSampler(range(num_images), values["per_device_train_batch_size"], drop_last=False)
    shards = [BatchSamplerShard(batches, processes, index) for index in (0, processes - 1)]
    steps = {sum(1 for _ in shard) for shard in shards}
    assert len(steps) == 1 and steps == {len(shards[0])}
    total = steps.pop() * values["num_train_epochs"]
    assert f"{num_images:,} images" in text and f"{total:,} steps" in text


def test_recipes_have_known_keys_and_unknown_keys_are_refused(directory, tmp_path, capsys):
    for recipe in sorted(REPOSITORY.glob("ijepa_transformers/recipes/finetune_*.yaml")):
        values = yaml.safe_load(recipe.read_text())
        known = training_arguments.default_values()
        assert set(values) <= set(known)
        # The published runs do not clip gradients; Trainer does by default.
        assert "in1k" not in recipe.name or values["max_grad_norm"] == 0
    (tmp_path / "recipe.yaml").write_text("learning_rate: 0.1\nlearning_speed: 3\n")
    with pytest.raises(SystemExit) as stopped:
        finetuning_command.main(
            ["--recipe", str(tmp_path / "recipe.yaml"), *fine_tuning_argv(directory, tmp_path / "output")]
        )
    assert stopped.value.code == 2 and "unknown keys: learning_speed" in capsys.readouterr().err
