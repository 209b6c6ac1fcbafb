# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A study gives all methods the same images and budgets, chooses without the test images, and goes on when stopped."""

import dataclasses
import io
import json
import math
import queue

import pytest
import torch
import yaml

from benchmarks.learning import figure, imagenette_gpu, study
from benchmarks.learning.images import Crops, LabelledImages, held_out_images, load_parts, normalize, shrink
from benchmarks.learning.learners import Settings, build_learner, mae_embedding, sigreg_loss
from benchmarks.learning.training import Batches, Clock, Training, rate_at
from ijepa_transformers import IJepaModel
from ijepa_transformers.execution import choose_attention


TINY = {
    "data": "digits",
    "num_channels": 1,
    "image_size": 24,
    "stored_size": 24,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "predictor_hidden_size": 8,
    "predictor_num_hidden_layers": 2,
    "predictor_num_attention_heads": 2,
    "batch_size": 8,
}


def images(count=40, classes=4):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 24, 24), dtype=torch.uint8, generator=generator)
    return LabelledImages(pixels, torch.arange(count) % classes)


def training(steps=4, **changes):
    settings = Settings(**{**TINY, **changes})
    torch.manual_seed(settings.seed)
    return Training(build_learner(settings, 4, "cpu"), settings, images(), Clock(steps=steps))


# Images


@pytest.mark.parametrize("block", [1, 20])
def test_a_tenth_of_the_training_images_is_held_out(block):
    held_out = held_out_images(1000, block)
    assert held_out.sum() == 100
    assert torch.equal(held_out, held_out_images(1000, block)), "the same in every run"
    if block > 1:  # whole blocks of neighbours
        assert set(held_out.view(-1, block).sum(dim=1).tolist()) == {0, block}


def test_settings_are_chosen_without_the_test_images(tmp_path, monkeypatch):
    opened = []
    real = load_parts.__globals__["load_split"]
    monkeypatch.setitem(
        load_parts.__globals__,
        "load_split",
        lambda source, split, *more: opened.append(split) or real(source, split, *more),
    )
    train, judged = load_parts("digits", "selection", 8, 1, tmp_path)
    assert opened == ["train"] and (len(train), len(judged)) == (1168, 129)
    train, judged = load_parts("digits", "final", 8, 1, tmp_path)
    assert opened[1:] == ["train", "test"] and (len(train), len(judged)) == (1297, 500)


def test_without_crops_a_batch_is_the_evaluation_view():
    pixels, generator = images().pixels, torch.Generator().manual_seed(0)
    assert torch.equal(Crops(12)(pixels, generator), normalize(shrink(pixels, 12)))


def test_crops_are_parts_of_their_image():
    """A ramp from left to right and one from top to bottom: crops keep the order, and stay within the values."""
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8)
    pixels = torch.stack([ramp.expand(24, 24), ramp.view(-1, 1).expand(24, 24)]).unsqueeze(1).repeat(20, 1, 1, 1)
    black, white = (normalize(torch.full((1, 1, 1, 1), value)).item() for value in (0.0, 230.0))
    crops = Crops(16, (0.2, 0.8))(pixels, torch.Generator().manual_seed(0))
    assert crops.shape == (40, 1, 16, 16)
    assert crops.min() >= black - 1e-4 and crops.max() <= white + 1e-4
    assert (crops[::2].diff(dim=3) >= -1e-4).all() and (crops[1::2].diff(dim=2) >= -1e-4).all()
    spans = (crops[::2].amax(dim=(1, 2, 3)) - crops[::2].amin(dim=(1, 2, 3))) / (white - black)
    assert spans.min() > 0.35 and spans.max() < 0.98, "widths of crops of a fifth to four fifths of the area"
    flipped = Crops(16, (0.2, 0.8), flip=True)(pixels, torch.Generator().manual_seed(0))
    backwards = (flipped[::2, 0, 0].diff(dim=1) <= 1e-4).all(dim=1)
    assert 0 < backwards.sum() < len(backwards)


# Training


def test_every_epoch_shows_each_image_once_in_another_order():
    batches = Batches(num_images=40, size=8, seed=3, device="cpu")
    epochs = [torch.cat([batches.indices(5 * epoch + step) for step in range(5)]) for epoch in range(2)]
    assert all(epoch.sort().values.tolist() == list(range(40)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(Batches(40, 8, 3, "cpu").indices(7), batches.indices(7)), "depends on (seed, step) only"


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "supervised"}, {"method": "mae"}, {"method": "sigreg", "sigreg_weight": 0.05}],
    ids=["ijepa", "supervised", "mae", "sigreg"],
)
def test_a_training_that_goes_on_ends_like_one_that_never_stopped(changes):
    whole = training(crop_scale=(0.3, 1.0), flip=True, **changes)
    whole.run()
    first, second = (training(crop_scale=(0.3, 1.0), flip=True, **changes) for _ in range(2))
    first.take_step(), first.take_step()
    second.load(saved_and_read(first.state()))
    second.run()
    for name, value in whole.learner.model.state_dict().items():
        assert torch.equal(value, second.learner.model.state_dict()[name]), name


def saved_and_read(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def test_a_budget_in_seconds_is_processor_time_and_leaves_out_what_watches():
    run = training(steps=None)
    run.clock.steps, run.clock.seconds = None, 0.5

    def watch(_):
        sum(range(200_000))

    row = run.run(watch)
    assert 0.5 <= row["seconds_used"] < 0.9 and row["steps_taken"] > 2
    assert run.clock.expected_steps == pytest.approx(row["steps_taken"], rel=0.5)


def test_the_rate_rises_then_falls():
    settings = Settings(**TINY, rate=1.0, warmup=0.1, final_rate=0.01)
    assert rate_at(0.05, settings) == pytest.approx(0.5)
    assert rate_at(0.1, settings) == pytest.approx(1.0)
    assert rate_at(1.0, settings) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"masks": {"mode": "random", "visible_share": 0.3, "num_contexts": 2}},
        {"masks": {"mode": "meta", "min_patches": 2}, "momentum": 0.9},
        {"sigreg_weight": 0.1},
        {"method": "mae"},
        {"method": "supervised"},
        {"method": "sigreg", "sigreg_weight": 0.05, "crop_scale": [0.3, 1.0]},
    ],
    ids=["ijepa", "published masks", "with sigreg", "mae", "supervised", "sigreg"],
)
def test_every_method_moves_all_that_it_trains(changes):
    run = training(steps=3, **changes)
    before = {name: value.clone() for name, value in run.learner.model.named_parameters() if value.requires_grad}
    row = run.run()
    assert row["steps_taken"] == 3 and math.isfinite(row["loss"])
    still = [
        name for name, value in run.learner.model.named_parameters() if name in before and value.equal(before[name])
    ]
    assert not still
    for encoder in run.learner.encoders.values():
        features = encoder()(torch.randn(5, 1, 24, 24))
        assert features.shape == (5, 16) and features.std(dim=0).min() > 0


# MAE, as its paper has it


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return build_learner(Settings(**TINY, method="mae"), 4, "cpu").model


def test_mae_has_the_encoder_of_ours_and_the_predictors_decoder(mae):
    ours = IJepaModel(Settings(**TINY).config())
    count = sum(weight.numel() for weight in mae.vit.parameters() if weight.requires_grad)
    assert count == sum(weight.numel() for weight in ours.parameters() if weight.requires_grad) + 16, "a class token"
    assert len(mae.decoder.decoder_layers) == 2 and mae.decoder.mask_token.shape[-1] == 8
    assert mae.config.norm_pix_loss and mae.config.mask_ratio == 0.75
    layers = [*mae.vit.layers, *mae.decoder.decoder_layers]
    assert {layer.attention.config._attn_implementation for layer in layers} == {choose_attention("cpu", "no")}


def test_mae_knows_where_its_patches_are(mae):
    """Transformers 5.x leaves both position tables at zero: then all masked places get one and the same prediction."""
    mae.eval()
    for positions in (mae.vit.embeddings.position_embeddings, mae.decoder.decoder_pos_embed):
        assert not positions.requires_grad and not positions[:, 0].any()
        assert len(positions[0, 1:].unique(dim=0)) == 36, "every place has a vector of its own"
    noise = torch.arange(36.0).repeat(2, 1)  # keeps the first quarter of the patches
    with torch.no_grad():
        output = mae(torch.randn(2, 1, 24, 24), noise=noise)
    assert output.mask[0, 9:].all() and not output.mask[0, :9].any()
    predictions = output.logits[0, 9:]
    nearest = torch.cdist(predictions, predictions).fill_diagonal_(math.inf).min()
    assert nearest > 1e-3, "two masked places get different predictions"


def test_the_order_of_the_pixels_patches_matters_to_mae(mae):
    embed, pixel_values = mae_embedding(mae, "cpu"), torch.randn(3, 1, 24, 24)
    with torch.no_grad():
        assert (embed(pixel_values) - embed(pixel_values.roll(8, dims=-1))).abs().max() > 1e-3
        assert torch.equal(embed(pixel_values), embed(pixel_values)), "nothing is masked"


def test_initial_values_of_mae_are_those_of_its_paper(mae):
    for name, module in mae.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            bound = math.sqrt(6 / sum(module.weight.flatten(1).shape))
            assert 0.9 * bound < module.weight.abs().max() <= bound and not module.bias.any(), name
    for token in (mae.vit.embeddings.cls_token, mae.decoder.mask_token):
        assert 0.005 < token.std() < 0.05


def test_sigreg_is_small_for_a_gaussian_and_large_for_anything_else():
    gaussian = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    least = sigreg_loss(gaussian, 0)
    for other in (
        torch.zeros_like(gaussian),
        3 * gaussian,
        gaussian + 2,
        gaussian.sign(),
        gaussian[:, :1].expand(-1, 8),
    ):
        assert sigreg_loss(other, 0) > 5 * least


# The runner


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_STUDY_CACHE", str(tmp_path / "cache"))
    content = {
        "steps": 2,
        "seeds": [0, 1],
        "settings": TINY,
        "runs": {
            "raw pixels": {"method": "pixels"},
            "ours": {},
            "longer": {"steps": 3},
            "broken": {"method": "magic"},
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setattr(study, "measure", lambda wanted, threads: measured_here(wanted, threads))
    return [str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")]


def measured_here(wanted, threads):
    row = {**wanted, "threads": threads, "wall_seconds": 0.0}
    try:
        return {**row, **study.run(wanted)}
    except ValueError as error:
        return {**row, "error": [str(error)]}


def test_a_study_writes_rows_and_a_table_and_does_not_repeat_them(small_study, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"2 of 7 runs failed; the first is broken, seed 0: .*error .*magic"):
        study.main(small_study)
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    found = [(row["name"], row["settings"]["seed"], row.get("steps_taken")) for row in rows]
    assert sorted(found, key=str) == sorted(
        [
            ("raw pixels", 0, None),
            *((n, s, k) for s in (0, 1) for n, k in (("ours", 2), ("longer", 3), ("broken", None))),
        ],
        key=str,
    )
    assert all("magic" in row["error"][0] for row in rows if row["name"] == "broken")
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        *("raw pixels", "ours, target", "ours, context", "longer, target", "longer, context")
    ]
    capsys.readouterr()
    study.main([*small_study, "--only", "raw pixels", "ours", "longer"])
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == len(rows)
    study.main([*small_study, "--only", "ours", "--part", "final"])
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == len(rows) + 2, (
        "another part is another run"
    )


def test_an_unknown_line_is_refused(small_study):
    with pytest.raises(SystemExit, match="no lines"):
        study.main([*small_study, "--only", "nothing"])


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("runs: [", "is no YAML file"),
        ("- 1", "must hold `key: value` lines"),
        ("steps: 2\nrun: {ours: {}}", r"unknown key 'run'. Did you mean runs\?"),
        (
            "steps: 2\nruns: {ours: {rat: 1}}\nsettings: {data: digits}",
            r"'ours' .* unknown key 'rat'. Did you mean rate\?",
        ),
        ("steps: 2\nruns: {ours: {}}\nsettings: {date: digits}", "unknown key 'date'"),
        ("steps: 2\nruns: {ours: 5}\nsettings: {data: digits}", "must be a mapping, got 5"),
        ("steps: 2\nruns: {}", "must have runs"),
        ("steps: 2\nruns: {ours: {}}", "has no data"),
        ("runs: {ours: {}}\nsettings: {data: digits}", "needs seconds or steps"),
        ("steps: two\nruns: {ours: {}}\nsettings: {data: digits}", "steps of .* must be a number above 0, got 'two'"),
        ("steps: 2\nruns: {ours: {}, ours: {rate: 1}}\nsettings: {data: digits}", "the key 'ours' is there 2 times"),
        (
            "steps: 2\nruns: {ours: {rate: fast}}\nsettings: {data: digits}",
            "'ours' .* rate must be a number, got 'fast'",
        ),
        ("steps: 2\nruns: {ours: {views: 1.5}}\nsettings: {data: digits}", "views must be a whole number, got 1.5"),
        ("steps: 2\nseeds: 3\nruns: {ours: {}}\nsettings: {data: digits}", "must be a list of whole numbers, got 3"),
    ],
)
def test_a_mistyped_study_is_one_sentence(tmp_path, content, sentence):
    (tmp_path / "study.yaml").write_text(content)
    with pytest.raises(SystemExit, match=sentence):
        study.main([str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_numbers_that_yaml_takes_for_text_are_numbers():
    assert Settings(data="digits", rate="2e-3", batch_size="32", momentum="1e-1") == Settings(
        data="digits", rate=2e-3, batch_size=32, momentum=0.1
    )
    assert imagenette_gpu.settings_of(
        imagenette_gpu.parse(["--data", "digits", "--output_dir", "out", "--set", "rate=1e-3", "batch_size=128"])
    ).rate == pytest.approx(1e-3)
    for wrong in ("fast", "nan", True, None, [1]):
        with pytest.raises(ValueError, match="rate must be a number"):
            Settings(data="digits", rate=wrong)


def test_a_missing_study_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="No such file"):
        study.main([str(tmp_path / "no.yaml"), "--output_dir", str(tmp_path / "out")])


def test_a_run_ends_soon_after_its_study_and_not_before(monkeypatch):
    ended, parents = queue.Queue(), iter([7, 7, 1])
    monkeypatch.setattr(study.os, "getppid", lambda: next(parents))  # a process whose parent has ended gets another
    monkeypatch.setattr(study.os, "_exit", ended.put)
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    study.end_with(7)
    assert ended.get(timeout=10) == 1 and next(parents, None) is None


def test_half_a_row_of_a_killed_study_is_dropped(small_study, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.jsonl").write_text('{"name": "ou')
    study.main([*small_study, "--only", "raw pixels"])
    (row,) = (json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines())
    assert row["name"] == "raw pixels"


def test_a_row_without_a_later_setting_counts_with_its_default():
    wanted = study.wanted_run({"steps": 2, "settings": {"data": "digits"}}, "ours", {}, "final", 0)
    row = {**wanted, "settings": {k: v for k, v in wanted["settings"].items() if k != "target_image_mean"}}
    other = study.wanted_run({"steps": 2, "settings": {"data": "digits"}}, "o", {"target_image_mean": 0}, "final", 0)
    assert study.is_row_of(wanted, row) and not study.is_row_of(other, row)
    unknown = {**row, "settings": {**row["settings"], "of_a_working_copy": 3}}
    assert not study.is_row_of(wanted, unknown)


@pytest.mark.slow
def test_a_run_is_a_process_of_its_own():
    wanted = study.wanted_run({"steps": 2, "settings": TINY}, "ours", {}, "selection", 0)
    row = study.measure(wanted, threads=1)
    assert row["steps_taken"] == 2 and 0 < row["target knn"] <= 1 and study.is_row_of(wanted, row)


# The GPU script, on a CPU


SMALL = [*(f"{key}={value}" for key, value in TINY.items() if key not in ("data", "image_size", "stored_size"))]


@pytest.mark.parametrize("method", imagenette_gpu.METHODS)
def test_the_gpu_script_trains_judges_and_goes_on(method, tmp_path, capsys):
    words = ["--data", "digits", "--method", method, "--image_size", "24", "--max_steps", "4", "--selection"]
    words += ["--output_dir", str(tmp_path / "out"), "--set", *SMALL]
    words += ["crop_scale=[1.0,1.0]", "flip=false"] + (["num_hidden_layers=1"] if method == "mae" else [])
    imagenette_gpu.main([*words, "--minutes", "1e-9"])
    assert "call it again" in capsys.readouterr().out and not (tmp_path / "out/rows.jsonl").exists()
    imagenette_gpu.main(words)
    assert "goes on after step" in capsys.readouterr().out
    (row,) = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    encoder = "encoder" if method == "mae" else "target"
    assert row["step"] == 4 and 0 < row[f"{encoder} knn"] <= 1 and 0 < row[f"{encoder} linear"] <= 1
    imagenette_gpu.main(words)
    assert "has all its steps" in capsys.readouterr().out
    for others in ([*words, "rate=0.5"], [word for word in words if word != "--selection"]):
        with pytest.raises(SystemExit, match="other settings, other images"):
            imagenette_gpu.main(others)


def test_the_gpu_scripts_linear_probe_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.nn.functional.one_hot(labels, 8).float() * 4 + torch.randn(90, 8, generator=generator)
    assert imagenette_gpu.linear_accuracy(features[:60], labels[:60], features[60:], labels[60:]) > 0.9


def test_an_unknown_setting_is_refused():
    with pytest.raises(SystemExit, match="magic"):
        imagenette_gpu.main(["--data", "digits", "--output_dir", "unused_dir_of_a_test", "--set", "magic=1"])


def test_the_defaults_of_a_study_are_settings():
    known = {field.name for field in dataclasses.fields(Settings)}
    for changes in (imagenette_gpu.VIT_SMALL, *imagenette_gpu.METHODS.values()):
        assert changes.keys() <= known


# The figure


def test_the_figure_has_every_seed_once_and_no_rows_of_other_settings(small_study, tmp_path):
    content = study.read_study(tmp_path / "study.yaml")
    name = next(name for name, changes in content["runs"].items() if (changes or {}).get("method") is None)
    runs = [study.wanted_run(content, name, content["runs"][name] or {}, "final", seed) for seed in (2, 1, 2)]
    rows = [{**wanted, "name": "ours", "target knn": 0.1 * wanted["settings"]["seed"]} for wanted in runs]
    assert figure.accuracies(rows, "ours", "knn") == pytest.approx([0.1, 0.2])
    other = {**rows[0], "settings": {**rows[0]["settings"], "rate": 5.0}}
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(map(json.dumps, [*rows, other])))
    assert [row["settings"]["seed"] for row in study.finished_rows(runs[:2], results)] == [2, 1]
    figure.main([f"digits={small_study[0]},{results}", "--output", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 1000
    (tmp_path / "none.jsonl").write_text(json.dumps(other))
    for wrong in ("nowhere", f"{small_study[0]},nowhere", f"nowhere,{results}", f"{small_study[0]},none.jsonl"):
        with pytest.raises(SystemExit):
            figure.main(
                [f"digits={wrong.replace('none', str(tmp_path / 'none'))}", "--output", str(tmp_path / "b.png")]
            )
    assert not (tmp_path / "b.png").exists()
