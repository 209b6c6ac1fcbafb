# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The comparison of methods gives all of them the same images, steps and judges, and says what came of each."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from benchmarks.learning import compare_methods
from benchmarks.learning.compare_methods import METHODS, PUBLISHED, PUBLISHED_IJEPA, STEP_TIME
from ijepa_transformers import IJepaModel
from ijepa_transformers.arguments import MaskArguments
from ijepa_transformers.data.sources import load_image_dataset
from ijepa_transformers.execution import choose_attention
from ijepa_transformers.masking import build_masking
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining import evaluate as pretraining_evaluate
from ijepa_transformers.pretraining.arguments import ModelArguments, OptimizationArguments, parse_pretraining_arguments
from ijepa_transformers.pretraining.batches import IndexedData
from tests.runs import TINY


RECIPE = {
    **TINY,
    "validation_split": "test",
    "image_size": 24,
    "learning_rate": 1e-3,
    "patch_embedding_init": "fan_in",
}
# What "published I-JEPA" has in common with ours: sizes, how to compute, and length and rate of the run.
OF_THE_RECIPE = {
    *("size", "init_from", "image_size", "patch_size", "num_channels", "attn_implementation", "compile_layers"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "gradient_checkpointing"),
    *("predictor_hidden_size", "predictor_num_hidden_layers", "predictor_num_attention_heads"),
    *("predictor_intermediate_size", "optimizer", "batch_size", "per_device_batch_size", "epochs", "max_steps"),
    *("warmup_epochs", "warmup_steps", "start_learning_rate", "learning_rate", "final_learning_rate"),
    *("mixed_precision", "max_skipped_steps", "seed"),
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Pretraining, otherwise a process of its own, happens in this one, without the seconds that imports take."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    states = (AcceleratorState, GradientState, PartialState)

    def pretrain(recipe):
        for state in states:
            state._reset_state()
        pretraining_command.main(["--recipe", str(recipe)])

    monkeypatch.setattr(compare_methods, "pretrain", pretrain)
    yield
    for state in states:
        state._reset_state()


def parse(**changes):
    values = {key: value for key, value in {**RECIPE, **changes}.items() if value is not None}
    words = itertools.chain.from_iterable(
        [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
        for key, value in values.items()
    )
    return parse_pretraining_arguments([*words, "--output_dir=unused"])


@pytest.fixture
def arguments():
    return parse()


@pytest.fixture
def digits():
    return load_image_dataset("digits")


# ---- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in METHODS if not method.endswith("equal time")])
def test_every_method_is_trained_and_judged(arguments, method):
    row = compare_methods.run(method, arguments, max_probe_images=120, device="cpu")
    figures = dict.fromkeys(("knn", "shot5", "linear", "effective_rank"), 1)
    if method == "ours" or method.startswith(PUBLISHED_IJEPA):
        figures |= {f"context_{name}": 1 for name in figures} | {"collapsed": 1}
    if method.startswith(PUBLISHED_IJEPA):
        figures |= {"min_patches": 1}
    if method.startswith("supervised"):
        figures |= {"own_accuracy": 1}
    if method not in ("raw pixels", "random encoder"):
        figures |= {"loss": 1, "seconds": 1}
    assert row.keys() == figures.keys()
    assert all(math.isfinite(value) for value in row.values())
    assert 0.1 < row["linear"] <= 1 and row["effective_rank"] > 1


def test_ours_are_the_two_encoders_of_the_pretraining_command(arguments, tmp_path, monkeypatch):
    """Judged as the command leaves them, after as many steps as asked for."""
    judged, opened = [], []
    monkeypatch.setattr(compare_methods, "embedding_of", lambda encoder, device: judged.append(encoder))
    monkeypatch.setattr(compare_methods, "evaluate", lambda embed, probe: {"knn": 1.0})
    original = compare_methods.IJepaForPretraining.from_pretrained

    def from_pretrained(directory):
        state = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
        recipe = yaml.safe_load((directory / "recipe.yaml").read_text())
        opened.append((state["step"], recipe["warmup_steps"], recipe["seed"], original(directory)))
        return opened[-1][-1]

    monkeypatch.setattr(compare_methods.IJepaForPretraining, "from_pretrained", from_pretrained)
    changed = compare_methods.with_steps(dataclasses.replace(arguments, seed=3, momentum=1.0), 3)
    row = compare_methods.run("ours", changed, max_probe_images=20, device="cpu")
    step, warmup, seed, networks = opened[0]
    assert (step, warmup, seed) == (3, 1, 3) and row["context_knn"] == row["knn"] == 1.0
    assert judged == [networks.context_encoder, networks.ijepa]
    # With a momentum of 1 the target encoder stays as it was born: the random encoder of the table.
    compare_methods.run("random encoder", changed, max_probe_images=20, device="cpu")
    born, target, context = (list(judged[place].parameters()) for place in (2, 1, 0))
    assert all(map(torch.equal, born, target)) and not any(map(torch.equal, born[:1], context[:1]))


def test_pixels_are_judged_at_no_more_than_32_by_32():
    assert compare_methods.pixel_features(torch.zeros(2, 3, 40, 24)).shape == (2, 3 * 32 * 24)


def test_methods_work_on_colour_with_crops(tmp_path):
    """Two classes, dark and light, that every method can tell apart."""
    for split, name, level in itertools.product(("train", "test"), ("dark", "light"), range(8)):
        path = tmp_path / split / name / f"{level}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = level * 8 + (180 if name == "light" else 10)
        Image.new("RGB", (30, 26), (shade, shade // 2, shade)).save(path)
    colour = parse(
        data=str(tmp_path), num_channels=3, crop_scale=[0.5, 1.0], max_steps=30, warmup_steps=0, learning_rate=3e-3
    )
    learned = compare_methods.run("supervised, equal steps", colour, max_probe_images=100, device="cpu")
    assert learned["own_accuracy"] == learned["knn"] == 1.0 and learned["loss"] < 0.5, "the labels are of the images"
    assert compare_methods.run("MAE, equal steps", colour, 100, "cpu")["linear"] == 1.0


# ---- the same images ------------------------------------------------------------------------------------------------


def test_labels_of_a_batch_are_those_of_its_images(arguments, digits):
    dataset, labels = compare_methods.training_labels(digits)
    loader = compare_methods.training_loader(arguments, dataset, steps=3)
    batches = list(compare_methods.training_batches(loader, arguments, labels, "cpu"))
    assert len(batches) == 3
    for (pixel_values, seen), batch in zip(batches, loader, strict=True):
        assert seen.tolist() == [digits[index]["label"] for index in batch["index"].tolist()]
        expected = compare_methods.normalize_pixel_values(
            batch["pixel_values"], *compare_methods.statistics_of(arguments)
        )
        assert torch.equal(pixel_values, expected)


def test_an_unreadable_image_brings_no_label_of_its_own(arguments):
    batch = {"pixel_values": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}
    batch |= {"index": torch.tensor([1, 3]), "num_bad": torch.tensor([0, 2])}
    ((_, seen),) = compare_methods.training_batches([batch], arguments, torch.tensor([5, 6, 7, 8]), "cpu")
    assert seen.tolist() == [6, 6], "image 3 and 0 could not be read, image 1 took their place"


def test_images_without_a_label_are_left_out_of_supervised_training_only(digits):
    labels = [None, 4, None, 9, 4]
    features = datasets.Features({"image": digits.features["image"], "label": datasets.Value("int64")})
    some = datasets.Dataset.from_dict({"image": digits[:5]["image"], "label": labels}, features=features)
    kept, classes = compare_methods.training_labels(some)
    assert classes.tolist() == [0, 1, 0] and [row["label"] for row in kept] == [4, 9, 4]
    with pytest.raises(ValueError, match="needs labels"):
        compare_methods.training_labels(digits.remove_columns("label"))


def test_crops_and_their_order_are_those_of_the_pretraining_command(digits):
    arguments = parse(crop_scale=[0.3, 1.0], horizontal_flip="true", per_device_batch_size=4)
    accelerator = SimpleNamespace(
        process_index=0,
        num_processes=1,
        gradient_accumulation_steps=2,
        device=torch.device("cpu"),
        is_main_process=False,
    )
    config = compare_methods.config_of(arguments)
    theirs = IndexedData(digits, arguments, config, accelerator, None).loader(
        build_masking(config.grid_size, **arguments.mask_fields()), total_steps=2, first_step=0
    )
    ours = compare_methods.training_loader(arguments, digits, steps=2)
    for batch, other in zip(ours, theirs, strict=True):
        assert torch.equal(batch["index"], other["index"]) and len(batch["index"]) == 4
        assert torch.equal(batch["pixel_values"], other["pixel_values"])


def test_encoders_are_judged_on_the_images_of_the_pretraining_commands_probe(arguments):
    limited = dataclasses.replace(arguments, max_probe_images=50)
    probe = pretraining_evaluate.Probe(limited, compare_methods.config_of(arguments), None, None, None)
    for ours, theirs in zip(compare_methods.probe_loaders(arguments, 50), probe.loaders, strict=True):
        assert ours.dataset.indices == theirs.dataset.indices and len(ours.dataset) == 50
        assert torch.equal(ours.dataset[7]["pixel_values"], theirs.dataset[7]["pixel_values"])


# ---- MAE ------------------------------------------------------------------------------------------------------------


def test_mae_has_the_encoder_of_ours_and_the_predictors_decoder(arguments):
    model = compare_methods.mae(arguments, "cpu").model
    ours = IJepaModel(compare_methods.config_of(arguments))
    count = sum(weight.numel() for weight in model.vit.parameters() if weight.requires_grad)
    assert count == sum(weight.numel() for weight in ours.parameters() if weight.requires_grad) + 16, "a class token"
    assert len(model.decoder.decoder_layers) == arguments.predictor_num_hidden_layers
    assert model.decoder.mask_token.shape[-1] == arguments.predictor_hidden_size
    assert model.config.norm_pix_loss and model.config.mask_ratio == 0.75


def test_mae_knows_where_its_patches_are(arguments):
    """Transformers 5.x leaves both position tables at zero: then all masked places get one and the same prediction."""
    model = compare_methods.mae(arguments, "cpu").model.eval()
    for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert not positions.requires_grad and not positions[:, 0].any()
        assert len(positions[0, 1:].unique(dim=0)) == 36, "every place has a vector of its own"
    noise = torch.arange(36.0).repeat(2, 1)  # keeps the first quarter of the patches
    with torch.no_grad():
        output = model(torch.randn(2, 1, 24, 24), noise=noise)
    assert output.mask[0, 9:].all() and not output.mask[0, :9].any()
    predictions = output.logits[0, 9:]
    nearest = torch.cdist(predictions, predictions).fill_diagonal_(math.inf).min()
    assert nearest > 1e-3, "two masked places get different predictions"


def test_the_order_of_the_pixels_patches_matters_to_mae(arguments):
    """Moving the visible patches to other places changes what the encoder makes of them."""
    encoder = compare_methods.mae_encoder(compare_methods.mae(arguments, "cpu").model)
    pixel_values = torch.randn(3, 1, 24, 24)
    with torch.no_grad():
        there = compare_methods.mae_features(encoder, pixel_values)
        elsewhere = compare_methods.mae_features(encoder, pixel_values.roll(8, dims=-1))
    assert (there - elsewhere).abs().max() > 1e-3


def test_initial_values_of_mae_are_those_of_its_paper(arguments):
    model = compare_methods.mae(arguments, "cpu").model
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            bound = math.sqrt(6 / sum(module.weight.flatten(1).shape))
            assert 0.9 * bound < module.weight.abs().max() <= bound and not module.bias.any(), name
    for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
        assert 0.005 < token.std() < 0.05


def test_both_halves_of_mae_compute_with_the_attention_of_ours(arguments):
    model = compare_methods.mae(arguments, "cpu").model
    layers = [*model.vit.layers, *model.decoder.decoder_layers]
    found = {layer.attention.config._attn_implementation for layer in layers}
    assert found == {choose_attention("cpu", "no")}


def test_features_of_mae_are_those_of_the_trained_weights_whatever_the_noise(arguments, digits):
    learner = compare_methods.mae(arguments, "cpu")
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    compare_methods.train(learner, arguments, digits, None, "cpu")
    encoder = compare_methods.mae_encoder(learner.model)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, learner.model.vit.state_dict()[name]), name
    moved = {name for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])}
    still = before.keys() - moved
    assert all("position_embeddings" in name or "decoder_pos_embed" in name for name in still), still
    pixel_values = torch.randn(3, 1, 24, 24)
    with torch.no_grad():
        features = compare_methods.mae_features(encoder, pixel_values)
        assert torch.equal(compare_methods.mae_features(encoder, pixel_values), features)
        shuffled = encoder(pixel_values, noise=torch.rand(3, 36))
        assert shuffled.mask.sum() == 0, "nothing is masked"
        torch.testing.assert_close(shuffled.last_hidden_state[:, 1:].mean(dim=1), features, atol=1e-5, rtol=1e-4)
    assert learner.model.config.mask_ratio == 0.75


def test_a_loss_of_several_passes_is_that_of_the_whole_batch(arguments):
    model = torch.nn.Linear(2, 1)
    learner = compare_methods.Learner(model, lambda values, labels: model(values).square().mean(), (0.9, 0.95))
    values, losses, gradients = torch.randn(8, 2), [], []
    for passes in (1, 2):
        split = dataclasses.replace(arguments, per_device_batch_size=8 // passes)
        optimizer = SimpleNamespace(
            step=lambda: gradients.append(model.weight.grad.clone()), zero_grad=model.zero_grad
        )
        batches = iter([(part, None) for part in values.chunk(passes)])
        losses.append(compare_methods.take_step(learner, optimizer, batches, split, "cpu"))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_biases_and_norms_take_no_weight_decay(arguments):
    learner = compare_methods.mae(arguments, "cpu")
    decayed, undecayed = compare_methods.optimizer_of(learner, arguments, "cpu").param_groups
    assert all(weight.dim() > 1 for weight in decayed["params"])
    assert all(weight.dim() == 1 for weight in undecayed["params"]) and undecayed["params"]
    trained = [weight for weight in learner.model.parameters() if weight.requires_grad]
    assert len(decayed["params"]) + len(undecayed["params"]) == len(trained)


def test_images_that_mae_cannot_cut_into_patches_are_refused():
    with pytest.raises(ValueError, match="square"):
        compare_methods.mae(parse(image_size=[24, 16]), "cpu")


# ---- settings -------------------------------------------------------------------------------------------------------


def test_every_setting_is_the_published_one_or_deliberately_the_recipes():
    """A new setting of the method needs a line in PUBLISHED, or "published I-JEPA" would quietly have ours."""
    groups = (ModelArguments, MaskArguments, OptimizationArguments)
    settings = {field.name for group in groups for field in dataclasses.fields(group)}
    assert settings - OF_THE_RECIPE == PUBLISHED.keys() and not OF_THE_RECIPE & PUBLISHED.keys()


def test_the_published_settings_keep_sizes_steps_and_rate(arguments):
    changed = compare_methods.published(dataclasses.replace(arguments, momentum=0.9, num_context_tokens=12))
    differing = {
        field.name
        for field in dataclasses.fields(arguments)
        if getattr(changed, field.name) != getattr(arguments, field.name)
    }
    assert differing <= PUBLISHED.keys()
    assert (changed.momentum, changed.mask_mode, changed.num_context_tokens) == (0.996, "meta", None)
    assert changed.min_patches == 3, "the largest that the published sampler can give on 6 x 6 patches"
    assert compare_methods.published(dataclasses.replace(arguments, image_size=[56])).min_patches == 10
    defaults = {field.name: PUBLISHED[field.name] for field in dataclasses.fields(MaskArguments)}
    own = {"mask_mode": "random", "visible_share": 0.2, "num_contexts": 2}
    assert compare_methods.published(dataclasses.replace(arguments, **{**defaults, **own})) == changed


def test_the_warm_up_remains_the_same_share_of_a_shorter_run(arguments):
    changed = compare_methods.with_steps(arguments, 60)
    assert (changed.max_steps, changed.warmup_steps) == (60, 20)
    same = compare_methods.with_steps(arguments, arguments.max_steps)
    assert same == arguments
    in_epochs = parse(max_steps=None, warmup_steps=None, epochs=2.0, warmup_epochs=0.5)
    assert compare_methods.total_steps(in_epochs) == 2 * (1297 // 8)
    changed = compare_methods.with_steps(in_epochs, 100)
    assert (changed.max_steps, changed.warmup_steps, changed.epochs, changed.warmup_epochs) == (100, 25, None, None)


def test_equal_time_is_equal_time():
    seconds = {"ours": 0.3, PUBLISHED_IJEPA: 0.25, "MAE": 0.2, "supervised": 0.6}
    assert compare_methods.steps_of("published I-JEPA, equal time", 100, seconds) == 120
    assert compare_methods.steps_of("MAE, equal time", 100, seconds) == 150
    assert compare_methods.steps_of("supervised, equal time", 101, seconds) == 50
    assert compare_methods.steps_of("supervised, equal time", 1, seconds) == 1
    assert compare_methods.steps_of("MAE, equal steps", 100, {}) == compare_methods.steps_of("ours", 100, {}) == 100
    assert compare_methods.steps_of("random encoder", 100, {}) == 0


def test_steps_of_all_that_train_are_timed(arguments):
    seconds = compare_methods.seconds_per_step(arguments, "cpu", num_turns=1, steps_per_turn=1)
    assert seconds.keys() == {"ours", PUBLISHED_IJEPA, "MAE", "supervised"} and min(seconds.values()) > 0


def test_seconds_of_training_leave_out_what_is_between_the_steps():
    metrics = [{"step": 10, "images_per_second": 100.0}, {"step": 15, "images_per_second": 25.0}]
    assert compare_methods.training_seconds(metrics, batch_size=50) == 10 * 50 / 100 + 5 * 50 / 25


# ---- all runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return path


@pytest.fixture
def measured(monkeypatch):
    """Runs are not made but noted; MAE fails for seed 1."""
    made = []

    def measure(one, recipe_words, threads):
        made.append((one.method, one.seed, one.steps))
        row = {**dataclasses.asdict(one), "wall_seconds": 1.0}
        if one.method == STEP_TIME:
            return {**row, "seconds_per_step": {"ours": 0.4, PUBLISHED_IJEPA: 0.5, "MAE": 0.2, "supervised": 0.1}}
        if one.method.startswith("MAE") and one.seed == 1:
            return {**row, "error": ["no such thing"]}
        figures = {"knn": 0.8 + 0.1 * one.seed, "shot5": None, "linear": 0.9, "effective_rank": 12.34, "seconds": 30.0}
        if one.method.startswith(PUBLISHED_IJEPA):
            figures["min_patches"] = 8
        if one.method == "ours":
            figures |= {"context_knn": 0.5, "collapsed": one.seed == 1}
        return {**row, **figures}

    monkeypatch.setattr(compare_methods, "measure", measure)
    return made


def compare(recipe, *more):
    output_dir = recipe.parent / "out"
    compare_methods.main([f"--recipe={recipe}", f"--output_dir={output_dir}", "--seeds", "0", "1", *more])
    return (output_dir / "table.md").read_text(encoding="utf-8")


def split(line):
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_the_table_has_mean_and_spread_and_names_failures(recipe, measured, capsys):
    methods = ["raw pixels", "ours", "published I-JEPA, equal time", "MAE, equal steps", "MAE, equal time"]
    lines = {cells[0]: cells for cells in map(split, compare(recipe, "--methods", *methods).splitlines())}
    assert lines["ours, target encoder"][1:] == [
        "6", "0.5 ± 0.0", "0.850 ± 0.071", "", "0.900 ± 0.000", "12.3 ± 0.0", "collapsed in 1 of 2",
    ]  # fmt: skip
    assert lines["ours, context encoder"][3] == "0.500 ± 0.000"
    assert lines["MAE, equal time"][1] == "12" and lines["MAE, equal steps"][-1] == "1 failed"
    assert lines["published I-JEPA, equal time"][-1] == "min_patches 8, not 10"
    assert lines["raw pixels"][1] == "" and lines["raw pixels"][3] == "0.800", "it has no seed"
    output = capsys.readouterr().out
    assert "no such thing" in output
    report = json.loads(output.splitlines()[-1])
    assert (
        report["benchmark"] == "compare_methods"
        and report["cpu"]
        and {"torch", "transformers"} <= set(report["versions"])
    )
    assert len(report["results"]) == 9 and sum("error" in row for row in report["results"]) == 2


def test_a_finished_run_is_not_repeated(recipe, measured):
    methods = ("--methods", "raw pixels", "published I-JEPA, equal steps", "ours", "supervised, equal time")
    compare(recipe, *methods)
    assert measured[0] == (STEP_TIME, 0, 1) and measured.count(("supervised, equal time", 0, 24)) == 1
    del measured[:]
    compare(recipe, *methods)
    assert measured == []
    compare(recipe, *methods, "--momentum", "0.9")
    assert measured == [(STEP_TIME, 0, 1), ("ours", 0, 6), ("ours", 1, 6)], "all others have nothing to do with it"
    del measured[:]
    compare(recipe, "--methods", "MAE, equal steps")
    compare(recipe, "--methods", "MAE, equal steps")
    assert measured == [("MAE, equal steps", seed, 6) for seed in (0, 1, 1)], "that of seed 1 had failed"
    del measured[:]
    results = recipe.parent / "out" / "results.jsonl"
    results.write_text(results.read_text(encoding="utf-8").replace('"mae_positions"', '"other"'), encoding="utf-8")
    compare(recipe, "--methods", "MAE, equal steps")
    assert measured[0] == ("MAE, equal steps", 0, 6), "a row of the time when MAE had no positions is not taken"
    del measured[:]
    compare(recipe, "--methods", "MAE, equal steps", "--steps", "9", "--hidden_size", "32")
    assert measured == [("MAE, equal steps", seed, 9) for seed in (0, 1)]


def test_a_run_is_told_all_it_needs(recipe):
    words = ["--recipe", str(recipe), "--hidden_size=32"]
    one = compare_methods.Run("MAE, equal time", 2, 7, 50, {})
    own, recipe_words = compare_methods.parse(one.words(words))
    assert (own.run, own.seed, own.steps, own.max_probe_images) == ("MAE, equal time", 2, 7, 50)
    assert parse_pretraining_arguments([*recipe_words, "--output_dir=unused"]).hidden_size == 32


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--methods", "DINO"], "DINO"),
        (["--momentun", "0.9"], "momentun"),
        (["--init_from", "somewhere"], "init_from"),
        (["--mixed_precision", "fp16"], "fp16"),
        (["--batch_size", "9"], "9 is not a multiple"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(recipe, measured, more, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare(recipe, *more)
    assert words in capsys.readouterr().err + str(stopped.value) and not measured
    assert not (recipe.parent / "out").exists()


@pytest.mark.slow
def test_processes_of_their_own_become_rows_and_failures_too(recipe, monkeypatch):
    monkeypatch.undo()
    command = [sys.executable, "benchmarks/learning/compare_methods.py", f"--recipe={recipe}", "--seeds=0", "--jobs=2"]
    command += [f"--output_dir={recipe.parent / 'out'}", "--max_probe_images=60", "--image_size=16"]
    command += ["--methods", "ours", "published I-JEPA, equal steps"]
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, published = json.loads(done.stdout.splitlines()[-1])["results"]
    assert ours["method"] == "ours" and ours["steps"] == 6 and ours["context_linear"] > 0.1
    assert "needs more patches" in published["error"][0], "the published sampler has no masks of 4 x 4 patches"
