# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A table whose images have several classes each: pretrained on, probed and fine-tuned."""

import io
import json
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from transformers.modeling_outputs import ImageClassifierOutput

from ijepa_transformers.evaluation import command as evaluation_command
from ijepa_transformers.evaluation.probes import several_labels_scores
from ijepa_transformers.finetuning.trainer import several_labels_loss
from tests.runs import fine_tune, pretrain, reset_accelerate


CLASSES = ["left", "right", "top"]  # which part of the picture is bright


def picture(classes, seed):
    pixels = np.random.default_rng(seed).integers(0, 60, (16, 16, 3), dtype=np.uint8)
    for name, part in (("left", np.s_[:, :8]), ("right", np.s_[:, 8:]), ("top", np.s_[:8])):
        pixels[part] += 60 * (name in classes)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    for split, count, first in (("train", 24, 0), ("validation", 12, 100)):
        labels = [[name for bit, name in enumerate(CLASSES) if number >> bit & 1] for number in range(count)]
        images = [picture(classes, first + number) for number, classes in enumerate(labels)]
        datasets.Dataset.from_dict({"image": images, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def pretrained(table, tmp_path_factory):
    reset_accelerate()
    directory = tmp_path_factory.mktemp("pretrained") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        pretrain(directory, data=table, num_channels=3, max_steps=2, warmup_steps=1)
    reset_accelerate()
    return directory


TRAINING = {"images_per_class": None, "validation_split": "auto", "max_steps": 6, "learning_rate": 0.01}


def test_a_classifier_learns_several_labels_per_image(pretrained, table, tmp_path, fresh_accelerate, capsys):
    fine_tune(pretrained, tmp_path / "out", data=table, **TRAINING)
    told = capsys.readouterr().out
    assert "3 classes, several per image: left (12), right (12), top (12)" in told
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert results["eval_random_mean_average_precision"] == pytest.approx((6 + 6 + 4) / 3 / 12)
    assert re.search(r"mean average precision [\d.]+ \(random scores: 0\.4444\), micro-F1", told)
    assert 0 < results["eval_mean_average_precision"] <= 1 and 0 <= results["eval_micro_f1"] <= 1
    assert "several per image" in (tmp_path / "out/README.md").read_text()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == "multi_label_classification" and model.config.id2label[2] == "top"
    scores = pipeline("image-classification", str(tmp_path / "out"))(Image.new("RGB", (16, 16)))
    assert {entry["label"] for entry in scores} == set(CLASSES)


def test_shares_of_a_class_are_refused_where_images_have_lists(pretrained, table, tmp_path, fresh_accelerate, capsys):
    changes = TRAINING | {"data": table, "label_fraction": 0.5}
    with pytest.raises(SystemExit) as stopped:
        fine_tune(pretrained, tmp_path / "out", **changes)
    assert stopped.value.code == 2 and "name the images with train_list" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_is_probed_by_mean_average_precision(pretrained, table, tmp_path, fresh_accelerate):
    probing = {"data": table, "models": str(pretrained), "output_dir": tmp_path / "probes", "num_workers": 0, "k": 5}
    evaluation_command.main([word for name, value in probing.items() for word in (f"--{name}", str(value))])
    results = json.loads((tmp_path / "probes/results.json").read_text())
    (row,) = (row for row in results["rows"] if row["name"] == str(pretrained))
    assert set(row["summary"]) == {"5-NN, mAP", "logistic, mAP"}
    assert all(0 < value <= 1 for value in row["summary"].values()) and row["verdict"] is None
    assert any("few_shot is left out" in note for note in results["notes"])
    assert "several per image" in (tmp_path / "probes/results.md").read_text()


def test_probes_with_heads_are_refused_by_name(pretrained, table, tmp_path, fresh_accelerate, capsys):
    probing = {"data": table, "models": str(pretrained), "output_dir": tmp_path / "probes", "probes": "linear"}
    with pytest.raises(SystemExit):
        evaluation_command.main([word for name, value in probing.items() for word in (f"--{name}", str(value))])
    assert "linear and attentive take one label per image" in capsys.readouterr().err
    assert not (tmp_path / "probes").exists()


def test_the_loss_is_that_of_transformers():
    logits, labels = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    ours = several_labels_loss(ImageClassifierOutput(logits=logits), labels)
    torch.testing.assert_close(ours, torch.nn.BCEWithLogitsLoss()(logits, labels))
    parts = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    halves = [several_labels_loss(ImageClassifierOutput(logits=part), truth, 15) for part, truth in parts]
    torch.testing.assert_close(sum(halves), ours)


def test_measures_of_several_labels():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    perfect = several_labels_scores(labels * 2 - 1, labels)
    assert perfect == {"mean_average_precision": 1.0, "micro_f1": 1.0}  # the class that never occurs is left out
    worse = several_labels_scores(np.array([[np.nan, 1, 1], [1, -1, 1], [1, -1, 1]]), labels)
    assert worse["mean_average_precision"] < 1 and worse["micro_f1"] == pytest.approx(2 / 10)
