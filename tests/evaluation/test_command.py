"""`ijepa probe`: its numbers equal those of the libraries on the model's own features. Processes, batch size and cache
do not change them, and the report has only what was measured."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from ijepa_transformers import IJepaForPretraining, encoders
from ijepa_transformers.data.decoding import BadImageError
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.encoders import load_processor, random_encoder
from ijepa_transformers.evaluation import arguments as evaluation_arguments
from ijepa_transformers.evaluation import command as evaluation_command
from ijepa_transformers.evaluation import features as evaluation_features
from ijepa_transformers.evaluation import sweep
from ijepa_transformers.evaluation.heads import HeadSettings
from ijepa_transformers.verdict import SPREAD_OF_DRAWS, Score
from tests import forked
from tests.printed import proposed
from tests.runs import blind_to_brightness, reset_accelerate


SCRIPT = Path(__file__).parents[2] / "run_probing.py"
NUM_TRAIN, NUM_VALIDATION = 61, 41

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save_model(model, directory, num_channels=3):
    model.save_pretrained(directory)
    build_image_processor(32, num_channels).save_pretrained(directory)


def write_images(folder, split, count, generator):
    """Images of three classes that differ in brightness. Images of one class differ more, so no probe is perfect."""
    for number in range(count):
        level = number % 3
        path = folder / split / "abc"[level] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = generator.normal(100 + 25 * level, 30, 3)
        pixels = generator.normal(colour, 40, (40 + number % 5, 36, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def place(trained, tmp_path):
    """A folder with a pretraining model and labelled images; the numbers of images are primes."""
    save_model(trained, tmp_path / "model")
    generator = np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        write_images(tmp_path / "images", split, count, generator)
    return tmp_path


def words(place, **changes):
    values = {
        "models": [f"ours={place / 'model'}"],
        "data": place / "images",
        "output_dir": place / "out",
        "probes": ["knn"],
        "k": [3],
        "shots": [2],
        "num_draws": 2,
        "per_device_batch_size": 8,
        "num_workers": 0,
        "epochs": 2,
        "batch_size": 16,
        "learning_rates": [0.01],
        "weight_decays": [0.0],
        **changes,
    }
    result = []
    for key, value in values.items():
        entries = [] if value is True else value if isinstance(value, list) else [value]
        result += [f"--{key}", *map(str, entries)]
    return result


def read(output_dir):
    return json.loads((Path(output_dir) / "results.json").read_text())


def probe(place, **changes):
    reset_accelerate()
    evaluation_command.main(words(place, **changes))
    return read(changes.get("output_dir", place / "out"))


def entry(results, name="ours", number=0):
    return next(row for row in results["rows"] if row["name"] == name)["entries"][number]


def summary(results, name="ours"):
    return next(row for row in results["rows"] if row["name"] == name)["summary"]


def features_by_hand(model, folder, split):
    """Pooled features image by image, and labels, through the image processor of the model's directory."""
    processor = load_processor(folder / "model")
    features, labels = [], []
    for path in sorted((folder / "images" / split).rglob("*.png")):
        with torch.no_grad():
            features.append(model(**processor(Image.open(path), return_tensors="pt")).pooler_output[0])
        labels.append("abc".index(path.parent.name))
    return torch.stack(features).numpy(), np.array(labels)


@pytest.fixture
def count_forwards(monkeypatch):
    calls = []
    original = encoders.encoder_features

    def encoder_features(model, pixel_values, kinds):
        calls.append(len(pixel_values))
        return original(model, pixel_values, kinds)

    monkeypatch.setattr(evaluation_features, "encoder_features", encoder_features)
    return calls


# Right numbers


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_accuracies_equal_those_of_sklearn_on_the_models_features(place, trained, encoder):
    network = trained.ijepa if encoder == "target" else trained.context_encoder
    (train, labels), (test, test_labels) = (features_by_hand(network, place, s) for s in ("train", "validation"))
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    knn = KNeighborsClassifier(3, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    logistic = LogisticRegression(max_iter=1000).fit(train, labels)
    results = probe(place, probes=["knn", "logistic"], encoder=encoder, no_baselines=True)
    assert 0.4 < summary(results)["logistic"] < 0.95  # equal numbers of a perfect probe would prove little
    assert summary(results)["3-NN"] == pytest.approx(knn.fit(train, labels).score(test, test_labels))
    assert summary(results)["logistic"] == pytest.approx(logistic.score(test, test_labels))
    hits = logistic.predict(test) == test_labels
    macro = np.mean([hits[test_labels == label].mean() for label in range(3)])
    assert entry(results)["probes"]["logistic"]["macro_accuracy"] == pytest.approx(macro)
    assert entry(results)["spec"].endswith(f"@{encoder}")


def test_target_and_context_by_spec_and_by_flag_are_the_same(place):
    model = place / "model"
    both = probe(place, models=[f"t={model}", f"c={model}@context"], probes=["logistic"], no_baselines=True)
    models = [f"t={model}@target", f"c={model}"]
    flag = probe(place, models=models, probes=["logistic"], encoder="context", no_baselines=True)
    for name in ("t", "c"):
        assert entry(both, name) == entry(flag, name)
    assert entry(both, "t")["weights_sha256"] != entry(both, "c")["weights_sha256"]


def test_the_baselines_are_in_the_table_unless_they_are_given_or_turned_off(place, trained):
    results = probe(place)
    assert [row["name"] for row in results["rows"]] == ["raw pixels", "random encoder", "ours"]
    (train, labels), (test, test_labels) = (
        features_by_hand(random_encoder(trained.ijepa, seed=0), place, s) for s in ("train", "validation")
    )
    scaler = StandardScaler().fit(train)
    oracle = KNeighborsClassifier(3, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = oracle.fit(scaler.transform(train), labels).score(scaler.transform(test), test_labels)
    assert summary(results, "random encoder")["3-NN"] == pytest.approx(expected)
    model = place / "model"
    given = probe(place, models=[f"mine=random:{model}#1", f"ours={model}", f"raw_pixels:{model}"])
    assert [row["name"] for row in given["rows"]] == ["mine", "ours", f"raw_pixels:{model}"]
    assert entry(given, "mine")["weights_sha256"] != entry(results, "random encoder")["weights_sha256"]
    bare = probe(place, no_baselines=True)
    assert [row["name"] for row in bare["rows"]] == ["ours"]


def test_equal_names_are_one_row_with_mean_and_standard_deviation(place, trained):
    torch.manual_seed(1)
    save_model(IJepaForPretraining(trained.config), place / "other")
    models = [f"ours={place / 'model'}", f"ours={place / 'other'}"]
    together = probe(place, models=models, probes=["knn", "few_shot"], no_baselines=True)
    values = []
    for model in ("model", "other"):
        alone = probe(place, models=[f"ours={place / model}"], probes=["knn", "few_shot"], no_baselines=True)
        values.append(alone["rows"][0]["entries"][0])
    assert together["rows"][0]["entries"] == values
    for column in ("3-NN", "2-shot"):
        both = [value["probes"][column]["accuracy"] for value in values]
        assert summary(together)[column]["accuracies"] == both
        assert summary(together)[column]["mean"] == pytest.approx(np.mean(both))
        assert summary(together)[column]["std"] == pytest.approx(np.std(both))
    assert "±" in (place / "out" / "results.md").read_text()


def test_one_entrys_few_shot_is_the_mean_over_its_draws(place):
    results = probe(place, probes=["few_shot"], label_fractions=[0.5], num_draws=3, no_baselines=True)
    assert list(summary(results)) == ["2-shot", "50 % labels"]
    for column, value in summary(results).items():
        draws = entry(results)["probes"][column]["draws"]
        assert len(draws) == 3 and value["accuracies"] == draws and value["mean"] == pytest.approx(np.mean(draws))


def test_the_batch_size_changes_nothing(place):
    one, many = (
        probe(place, per_device_batch_size=size, probes=["logistic"], cache_dir=place / str(size), no_baselines=True)
        for size in (1, 100)
    )
    assert [row["summary"] for row in one["rows"]] == [row["summary"] for row in many["rows"]]


def test_settings_for_which_the_training_split_is_too_small_are_left_out_with_a_note(place):
    results = probe(place, probes=["knn", "few_shot"], k=[3, 61, 62], shots=[2, 30])
    assert list(summary(results)) == ["3-NN", "61-NN", "2-shot"]
    notes = "\n".join(results["notes"])
    assert "62-NN is left out: there are 61 training images" in notes
    assert "30-shot is left out: the smallest class has 20" in notes
    assert "62-NN is left out" in (place / "out" / "results.md").read_text()


def test_a_sample_has_max_images_and_depends_on_the_seed_only(place):
    first, again = (probe(place, max_images=30, no_baselines=True, output_dir=place / name) for name in ("a", "b"))
    assert first["data"] == {"train": 30, "validation": 30} and first["rows"] == again["rows"]
    other = probe(place, max_images=30, seed=1, no_baselines=True, output_dir=place / "c")
    assert other["rows"] != first["rows"]


def test_other_models_are_evaluated_beside_ours(place):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    save_model(transformers.ResNetModel(transformers.ResNetConfig(**sizes)), place / "resnet")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)
    save_model(transformers.ViTForImageClassification(config), place / "vit")
    models = [f"{name}={place / name}" for name in ("model", "resnet", "vit")]
    results = probe(
        place, models=models, probes=["knn", "linear", "attentive", "collapse"], head_norms=["none"], epochs=1
    )
    for name in ("model", "resnet", "vit"):
        assert set(summary(results, name)) == {"3-NN", "linear", "attentive"} and entry(results, name)["collapse"]
    assert set(summary(results, "raw pixels")) == {"3-NN", "linear"}


def test_the_same_weights_in_another_architecture_are_computed_anew(place, trained, count_forwards):
    """No weight depends on the number of attention heads."""
    before = entry(probe(place, probes=["collapse"], no_baselines=True))
    config = json.loads((place / "model" / "config.json").read_text())
    for name, value in {"num_attention_heads": 1, "layer_norm_eps": 1e-2, "hidden_act": "relu"}.items():
        count_forwards.clear()
        (place / "model" / "config.json").write_text(json.dumps({**config, name: value}))
        after = entry(probe(place, probes=["collapse"], no_baselines=True))
        assert after["weights_sha256"] == before["weights_sha256"] and sum(count_forwards) == NUM_VALIDATION
        assert after["collapse"] != before["collapse"]
    count_forwards.clear()  # the version that wrote the file does not matter
    (place / "model" / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    assert entry(probe(place, probes=["collapse"], no_baselines=True)) == before and not count_forwards


def write_dataset(place, **columns_by_split):
    """A folder of `save_to_disk` with the images of both splits and other (class names, labels)."""
    splits = {}
    for split, (names, labels) in columns_by_split.items():
        images = [str(path) for path in sorted((place / "images" / split).rglob("*.png"))][: len(labels)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        splits[split] = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    datasets.DatasetDict(splits).save_to_disk(place / "saved")
    return place / "saved"


def test_images_without_a_label_are_left_out(place):
    labels = [None, -1] + [0, 1] * 10
    saved = write_dataset(place, train=(["a", "b"], labels), validation=(["a", "b"], labels))
    results = probe(place, data=saved, no_baselines=True)
    assert results["data"] == {"train": 20, "validation": 20} and results["notes"] == []


def test_classes_without_training_images_are_noted(place):
    names = ["a", "b", "c", "d"]
    saved = write_dataset(place, train=(names, [0, 1] * 10), validation=(names, [0, 1, 2, 3, 3] * 4))
    results = probe(place, data=saved, no_baselines=True)
    (note,) = results["notes"]
    assert note.startswith("12 of the 20 validation images belong to 2 classes without a training image")
    assert summary(results)["3-NN"] <= 0.4


def test_half_precision(place):
    exact, half = (
        probe(place, dtype=dtype, probes=["collapse"], no_baselines=True, output_dir=place / dtype)
        for dtype in ("fp32", "bf16")
    )
    for ours, theirs in zip(entry(exact)["collapse"], entry(half)["collapse"], strict=True):
        assert ours["relative_std"] != theirs["relative_std"]
        assert ours["relative_std"] == pytest.approx(theirs["relative_std"], rel=0.05)


# Heads


def test_the_choice_of_the_best_head_does_not_depend_on_the_validation_split(place, monkeypatch):
    """The choice stays the same with other validation labels."""
    changes = {"probes": ["linear"], "learning_rates": [1e-5, 1e-2, 1e2], "no_baselines": True, "epochs": 3}
    honest = entry(probe(place, **changes))["probes"]["linear"]
    for path in sorted((place / "images" / "validation" / "a").iterdir()):
        shutil.move(path, place / "images" / "validation" / "b" / f"was_a_{path.name}")
    shuffled = entry(probe(place, **changes))["probes"]["linear"]
    assert shuffled["chosen"] == honest["chosen"] and shuffled["accuracy"] != honest["accuracy"]
    assert [head["accuracy_of_choice"] for head in shuffled["heads"]] == [
        head["accuracy_of_choice"] for head in honest["heads"]
    ]
    best = max(honest["heads"], key=lambda head: head["accuracy_of_choice"])
    assert best["accuracy"] == pytest.approx(honest["accuracy"]) and len(honest["heads"]) == 12
    chosen = HeadSettings(**{key: value for key, value in best.items() if "accuracy" not in key})
    assert str(chosen) == honest["chosen"]


def test_without_holdout_the_best_of_the_validation_split_is_reported_and_called_optimistic(place):
    results = probe(place, probes=["linear"], learning_rates=[1e-5, 1e-2, 1e-1], holdout=0, no_baselines=True)
    ((column, value),) = entry(results)["probes"].items()
    assert column == "linear (optimistic: chosen on the validation split)"
    assert value["accuracy"] == pytest.approx(max(head["accuracy"] for head in value["heads"]))
    assert "optimistic" in (place / "out" / "results.md").read_text()


def test_heads_on_cached_features_equal_heads_on_features_computed_in_every_epoch(place, monkeypatch):
    changes = {"probes": ["linear", "attentive"], "holdout": 0.2, "no_baselines": True}
    kept = entry(probe(place, output_dir=place / "kept", **changes))
    monkeypatch.setattr(evaluation_features, "_MAX_TOKEN_BYTES", 0)
    streamed = entry(probe(place, output_dir=place / "streamed", **changes))
    for column in ("linear", "attentive"):
        for ours, theirs in zip(kept["probes"][column]["heads"], streamed["probes"][column]["heads"], strict=True):
            assert ours == pytest.approx(theirs)


def test_crops_differ_between_epochs_and_are_the_same_in_every_run(place):
    run = evaluation_command.build_run(evaluation_arguments.parse_probing_arguments(words(place)))
    images = evaluation_features.open_entry(run, run.entries[-1]).images(run.train.dataset)
    crops = evaluation_features.CroppedImages(images, seed=0)
    assert torch.equal(crops[1, 5], evaluation_features.CroppedImages(images, seed=0)[1, 5])
    assert not torch.equal(crops[1, 5], crops[2, 5])
    assert not torch.equal(crops[1, 5], evaluation_features.CroppedImages(images, seed=1)[1, 5])
    assert crops[1, 5].shape == images[5].shape and crops[1, 5].dtype == torch.float32


def test_flips_show_the_evaluation_view_or_its_mirror_image(place):
    run = evaluation_command.build_run(evaluation_arguments.parse_probing_arguments(words(place)))
    images = evaluation_features.open_entry(run, run.entries[-1]).images(run.train.dataset)
    flips, mirrored = evaluation_features.FlippedImages(images, seed=0), []
    for key in [(epoch, index) for epoch in range(4) for index in range(12)]:
        assert torch.equal(flips[key], evaluation_features.FlippedImages(images, seed=0)[key])
        mirrored.append(torch.equal(flips[key], images[key[1]].flip(-1)))
        assert mirrored[-1] != torch.equal(flips[key], images[key[1]])
    assert 12 <= sum(mirrored) <= 36 and mirrored[:12] != mirrored[12:24]


def test_with_flips_the_encoder_runs_in_every_epoch(place, count_forwards):
    changes = {"probes": ["linear"], "holdout": 0.2, "no_baselines": True, "batch_size": 10}
    probe(place, augment="flip", epochs=3, **changes)
    assert sum(count_forwards) == NUM_VALIDATION + 12 + 3 * ((NUM_TRAIN - 12) // 10 * 10)


def test_a_crop_is_normalised_as_the_whole_image_is(place):
    """All crops of an image of one colour are equal."""
    path = place / "images" / "train" / "a" / "000.png"
    Image.new("RGB", (50, 40), (10, 100, 200)).save(path)
    run = evaluation_command.build_run(evaluation_arguments.parse_probing_arguments(words(place)))
    images = evaluation_features.open_entry(run, run.entries[-1]).images(run.train.dataset)
    torch.testing.assert_close(evaluation_features.CroppedImages(images, seed=0)[0, 0], images[0])


def test_with_crops_the_encoder_runs_in_every_epoch_on_the_training_part_alone(place, count_forwards, monkeypatch):
    keys, original = [], evaluation_features.CroppedImages.__getitem__
    monkeypatch.setattr(
        evaluation_features.CroppedImages, "__getitem__", lambda self, key: keys.append(key) or original(self, key)
    )
    changes = {"probes": ["linear"], "holdout": 0.2, "no_baselines": True, "batch_size": 10}
    results = probe(place, augment="crop_flip", epochs=3, **changes)
    fit, held = NUM_TRAIN - 12, 12
    assert sum(count_forwards) == NUM_VALIDATION + held + 3 * (fit // 10 * 10)
    assert len(set(keys)) == len(keys) and {epoch for epoch, _ in keys} == {0, 1, 2}
    plain = probe(place, output_dir=place / "plain", epochs=3, **changes)
    cropped_heads, plain_heads = (entry(result)["probes"]["linear"]["heads"] for result in (results, plain))
    assert [head["accuracy_of_choice"] for head in cropped_heads] != [
        head["accuracy_of_choice"] for head in plain_heads
    ]


def test_heads_that_have_diverged_are_noted(place):
    rates = {"learning_rates": [2e38, 3e38], "optimizers": ["sgd"], "weight_decays": [0.0], "batch_size": 5}
    results = probe(place, probes=["linear"], no_baselines=True, epochs=4, **rates)
    (note,) = (note for note in results["notes"] if "has diverged" in note)
    assert note.startswith("The best linear head of ") and note.endswith("count as wrong: try lower learning_rates.")
    assert not any("widen the sweep" in note for note in results["notes"])


def test_a_best_learning_rate_at_the_border_of_the_sweep_is_noted(place):
    results = probe(place, probes=["linear"], learning_rates=[1e-9, 1e-2], no_baselines=True, epochs=5)
    assert (
        "The best linear head has the largest learning rate of the sweep for ours: widen the sweep."
        in results["notes"]
    )
    heads = [HeadSettings("last", False, "sgd", rate, 0.0) for rate in (1.0, 2.0, 3.0)]
    assert [sweep._border_of(heads, head) for head in heads] == ["smallest", None, "largest"]
    assert sweep._border_of(heads[:1], heads[0]) is None


def test_lars_heads(place):
    pytest.importorskip("timm")
    results = probe(place, probes=["linear"], optimizers=["lars", "sgd"], schedule="step", no_baselines=True)
    assert {head["optimizer"] for head in entry(results)["probes"]["linear"]["heads"]} == {"lars", "sgd"}


# Cache


def test_a_second_run_computes_no_features_and_has_the_same_results(place, count_forwards):
    changes = {"probes": ["knn", "logistic", "linear", "attentive", "collapse"], "holdout": 0.2}
    first = probe(place, **changes)
    assert count_forwards
    count_forwards.clear()
    assert probe(place, **changes)["rows"] == first["rows"] and not count_forwards


def forwards_of_every_probe(place, count_forwards, *runs, **changes):
    """How many images went through the encoder in each of the runs, and the results."""
    counts, results = [], []
    for probes in runs:
        count_forwards.clear()
        results.append(entry(probe(place, probes=list(probes), no_baselines=True, **changes)))
        counts.append(sum(count_forwards))
    return counts, results


def test_all_probes_share_one_pass_over_each_split(place, count_forwards):
    counts, _ = forwards_of_every_probe(place, count_forwards, evaluation_arguments.PROBES)
    assert counts == [NUM_TRAIN + NUM_VALIDATION]


def test_a_run_with_other_probes_computes_only_kinds_that_are_missing(place, count_forwards, monkeypatch):
    monkeypatch.setattr(evaluation_features, "_MAX_COLLAPSE_IMAGES", 7)
    runs = ["knn"], ["knn", "few_shot", "logistic"], ["collapse", "knn"], ["linear", "knn"], ["linear"], ["attentive"]
    counts, _ = forwards_of_every_probe(place, count_forwards, *runs)
    everything = NUM_TRAIN + NUM_VALIDATION
    assert counts == [everything, 0, 7, everything, 0, everything]
    counts, (alone,) = forwards_of_every_probe(place, count_forwards, evaluation_arguments.PROBES, holdout=0.2)
    assert counts == [0] and len(list((place / "out" / "cache").glob("*.safetensors"))) == 3 + 3 + 1
    (_, (fresh,)) = forwards_of_every_probe(
        *(place, count_forwards, evaluation_arguments.PROBES), holdout=0.2, output_dir=place / "fresh"
    )
    assert numbers(fresh) == pytest.approx(numbers(alone), abs=1e-5)


def test_with_crops_only_features_that_are_read_are_cached(place, count_forwards):
    changes = {"augment": "crop_flip", "epochs": 1, "holdout": 0.2, "batch_size": 49}
    counts, _ = forwards_of_every_probe(place, count_forwards, ["linear"], ["linear", "knn"], **changes)
    assert counts == [NUM_VALIDATION + 12 + 49, NUM_TRAIN + 49]


@pytest.mark.parametrize("change", ["weights", "image", "label", "dtype", "processor", "sample"])
def test_other_data_or_weights_are_computed_anew(place, trained, count_forwards, change):
    probe(place, no_baselines=True)
    count_forwards.clear()
    changes = {}
    if change == "weights":
        trained.ijepa.layernorm.bias.data += 1e-3
        trained.save_pretrained(place / "model")
    elif change == "image":
        path = place / "images" / "train" / "a" / "000.png"
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    elif change == "label":
        shutil.move(place / "images" / "train" / "a" / "000.png", place / "images" / "train" / "b")
    elif change == "dtype":
        changes = {"dtype": "bf16"}
    elif change == "processor":
        build_image_processor(32, image_mean=[0.5] * 3).save_pretrained(place / "model")
    elif change == "sample":
        changes = {"max_images": 50}
    probe(place, no_baselines=True, **changes)
    assert sum(count_forwards) >= NUM_VALIDATION


def test_an_image_of_equal_size_and_time_is_noticed_and_one_that_was_only_touched_is_not(place, count_forwards):
    changes, path = {"no_baselines": True}, place / "images/train/a/000.png"
    first = probe(place, **changes)
    os.utime(path)
    count_forwards.clear()
    assert probe(place, **changes)["rows"] == first["rows"] and not count_forwards
    status = path.stat()
    Image.new("RGB", (40, 40), "red").save(path)
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    notes = probe(place, **changes)["notes"]
    assert sum(count_forwards) == NUM_TRAIN and any("'train' split have changed" in note for note in notes)


@pytest.mark.parametrize("damage", ["cut", "emptied", "of another key", "another value", "a tensor less"])
def test_a_damaged_cache_file_is_computed_again_with_a_note(place, count_forwards, damage):
    first = probe(place, no_baselines=True)
    files = sorted((place / "out" / "cache").glob("*.safetensors"))
    size = files[0].stat().st_size
    if damage == "of another key":
        shutil.copy(files[1], files[0])
    elif damage == "another value":
        content = bytearray(files[0].read_bytes())
        content[-1] ^= 1
        files[0].write_bytes(content)
    elif damage == "a tensor less":
        with safe_open(files[0], framework="pt") as file:
            metadata = file.metadata()
        save_file({}, files[0], metadata=metadata)
    else:
        os.truncate(files[0], size // 2 if damage == "cut" else 0)
    count_forwards.clear()
    again = probe(place, no_baselines=True)
    assert again["rows"] == first["rows"] and count_forwards
    assert files[0].stat().st_size == size and any(str(files[0]) in note for note in again["notes"])
    count_forwards.clear()
    assert probe(place, no_baselines=True)["notes"] == [] and not count_forwards


def test_a_folder_in_the_place_of_a_cache_file_is_named(place, capsys):
    probe(place, no_baselines=True)
    file = min((place / "out" / "cache").glob("*.safetensors"))
    file.unlink()
    file.mkdir()
    with pytest.raises(SystemExit):
        probe(place, no_baselines=True)
    assert f"{file} is a folder, and a cache file belongs there: remove it, or choose" in capsys.readouterr().err


def test_a_killed_run_leaves_no_half_written_cache_file(place, monkeypatch):
    def killed(features, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_features, "save_file", killed)
        with pytest.raises(SystemExit):
            probe(place, no_baselines=True)
    assert not list((place / "out" / "cache").glob("[!.]*.safetensors"))
    assert probe(place, no_baselines=True)["notes"] == []


def test_the_cache_can_lie_elsewhere(place):
    probe(place, cache_dir=place / "elsewhere", no_baselines=True)
    assert list((place / "elsewhere").iterdir()) and not (place / "out" / "cache").exists()


def test_a_cache_among_other_files_is_refused(place, capsys):
    (place / "mine").mkdir()
    (place / "mine" / "model.safetensors").write_text("mine")
    for changes, message in (
        ({"cache_dir": place / "mine"}, "mine' holds other files, such as 'model.safetensors'"),
        ({"cache_dir": place / "mine/model.safetensors"}, "model.safetensors is no directory"),
    ):
        with pytest.raises(SystemExit) as stopped:
            probe(place, no_baselines=True, **changes)
        error = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and error.startswith("ijepa probe: error: cache_dir") and message in error


# Several processes


def numbers(value):
    """All numbers of nested results, in order."""
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers(entry)]
    if isinstance(value, list):
        return [number for entry in value for number in numbers(entry)]
    return [value] if isinstance(value, (int, float)) else []


def test_two_processes_measure_what_one_measures(place):
    changes = {
        "probes": ["knn", "few_shot", "logistic", "linear", "attentive", "collapse"],
        "augment": "crop_flip",
        "max_images": 41,  # neither a multiple of 2 nor of a round
        "per_device_batch_size": 5,
        "batch_size": 15,
    }
    reset_accelerate()
    one = probe(place, output_dir=place / "one", **changes)
    done = forked.fork_ranks(2, [SCRIPT, *words(place, output_dir=place / "two", **changes)])
    assert done.returncode == 0, done.stderr[-3000:]
    two = read(place / "two")
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert [row["name"] for row in one["rows"]] == [row["name"] for row in two["rows"]]
    assert numbers(two["rows"]) == pytest.approx(numbers(one["rows"]), rel=1e-3, abs=1e-4)
    assert len(list((place / "two" / "cache").iterdir())) == len(list((place / "one" / "cache").iterdir()))


@pytest.mark.parametrize(
    "count, round_size, world_size", [(41, 10, 2), (41, 16, 4), (3, 8, 4), (40, 10, 2), (5, 4, 1)]
)
def test_rounds_have_each_position_once_and_in_order(count, round_size, world_size):
    """As `gather` joins them: one process after the other, cut to the size of the round."""
    by_rank = [list(evaluation_features._rounds(count, round_size, rank, world_size)) for rank in range(world_size)]
    gathered = []
    for parts in zip(*by_rank, strict=True):
        (size,) = {size for size, _ in parts}
        assert len({len(places) for _, places in parts}) == 1
        assert max(place for _, places in parts for place in places) < count
        gathered += [place for _, places in parts for place in places][:size]
    assert gathered == list(range(count))


# Report and model card


def test_the_report_has_everything(place):
    results = probe(place, probes=["knn", "collapse"])
    text = (place / "out" / "results.md").read_text()
    assert results["command"] in text and results["date"] in text and "| ours " in text
    assert "Has it collapsed?" in text and "**ours** is " in text and "| embedding |" in text
    assert set(results) >= {"arguments", "versions", "notes", "data"} and "torch" in results["versions"]
    assert results["arguments"]["k"] == [3] and len(entry(results)["collapse"]) == 4


def test_a_collapsed_encoder_is_reported_beside_a_healthy_random_one(place, trained, capsys):
    """The output of the last layer is nearly the same for all images."""
    trained.ijepa.layers[-1].mlp.fc2.bias.data += 1e3
    trained.ijepa.layers[-1].mlp.fc2.bias.data[::2] -= 2e3
    trained.save_pretrained(place / "model")
    results = probe(place, probes=["collapse"])
    assert [layer["state"] == "collapsed" for layer in entry(results)["collapse"]] == [False, False, False, True]
    output = capsys.readouterr().out
    assert "**ours** is collapsed: " in output and "(random encoder: " in output
    assert "This begins at layer 3 of 3;" in output and "**random encoder** is collapsed" not in output


def test_an_encoder_that_has_not_collapsed_but_is_worse_than_random_gets_no_praise(place, trained, capsys):
    """The classes differ in brightness, which the encoder does not see."""
    blind_to_brightness(trained).save_pretrained(place / "model")
    results = probe(place, probes=["knn", "few_shot", "collapse"], update_model_card=True)
    (row,) = (row for row in results["rows"] if row["name"] == "ours")
    assert row["entries"][0]["collapse"][-1]["state"] == row["verdict"]["state"] == "not collapsed"
    assert row["verdict"]["learned"] is False and row["verdict"]["standings"]["random encoder"] == "below"
    sentence = "- ours is worse than a random encoder. Do not use its features."
    for text in (capsys.readouterr().out, (place / "out" / "results.md").read_text()):
        assert f"### Verdict\n\n{sentence}" in text
        told = text.partition("What next:")[0].lower()  # below stands `ijepa finetune`
        assert not any(word in told for word in ("healthy", " good", " fine"))
    assert "target encoder is worse than a random encoder" in (place / "model" / "README.md").read_text()
    assert [row["verdict"] for row in results["rows"] if row["name"] != "ours"] == [None, None]


def test_the_verdict_says_what_it_lacks(place, capsys):
    probe(place, no_baselines=True)
    out = capsys.readouterr().out
    assert "ours is not judged, because the table has no random encoder" in out
    assert out.index("### Verdict") < out.index("### Numbers") < out.index("| encoder")
    found = dict(proposed(out))
    assert (
        "finetune --recipe finetune_small" in out
        and found["finetune"].data.train_split == "train"
        and found["extract"].split == "validation"
    )
    verdict = probe(place, probes=["collapse"])["rows"][-1]["verdict"]
    assert verdict["learned"] is None and "nobody can say whether" in verdict["sentences"][0]
    assert verdict["sentences"][2].startswith("With random weights: ")


def test_a_row_of_several_encoders_has_the_margin_of_their_spread(place, trained):
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_model(IJepaForPretraining(trained.config), place / f"seed{seed}")
    results = probe(place, models=[f"ours={place / name}" for name in ("seed1", "seed2")])
    (row,) = (row for row in results["rows"] if row["name"] == "ours")
    (comparison,) = (each for each in row["verdict"]["comparisons"] if each["baseline"] == "random encoder")
    assert comparison["accuracy"] == row["summary"]["3-NN"]["mean"] and comparison["standing"] == "level"
    random = next(row["summary"]["3-NN"] for row in results["rows"] if row["name"] == "random encoder")
    both = Score(random), Score(comparison["accuracy"], row["summary"]["3-NN"]["std"], 2)
    errors = [score.standard_error(NUM_VALIDATION) for score in both]
    assert comparison["margin"] == pytest.approx(2 * math.hypot(*errors, SPREAD_OF_DRAWS))


def test_several_random_encoders_have_their_own_spread(place):
    models = [f"ours={place / 'model'}", *(f"random encoder=random:{place / 'model'}#{seed}" for seed in range(3))]
    results = probe(place, models=models)
    row, random = (next(row for row in results["rows"] if row["name"] == name) for name in ("ours", "random encoder"))
    (comparison,) = (each for each in row["verdict"]["comparisons"] if each["baseline"] == "random encoder")
    mean, std = (random["summary"]["3-NN"][key] for key in ("mean", "std"))
    both = Score(mean, std, 3), Score(comparison["accuracy"])
    errors = [score.standard_error(NUM_VALIDATION) for score in both]
    assert comparison["margin"] == pytest.approx(2 * math.hypot(*errors, std))


def test_an_encoder_is_compared_only_with_a_random_one_of_the_same_architecture(place, trained, capsys):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    save_model(transformers.ResNetModel(transformers.ResNetConfig(**sizes)), place / "resnet")
    torch.manual_seed(1)
    save_model(IJepaForPretraining(trained.config), place / "seed1")
    models = [f"{name}={place / name}" for name in ("model", "seed1", "resnet")]
    probe(place, models=models, probes=["collapse"], update_model_card=True)
    readings = {line.split("**")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("- **")}
    beside = {name for name, line in readings.items() if "(random encoder: " in line}
    assert set(readings) == {"random encoder", "model", "seed1", "resnet"} and beside == {"model", "seed1"}
    for name, is_beside in (("model", True), ("seed1", True), ("resnet", False)):
        text = (place / name / "README.md").read_text()
        assert ("| random encoder " in text) == is_beside and "| target encoder " in text


def test_a_hostile_folder_and_name_are_text_in_the_card_and_the_results(place):
    name = "x\n# Heading\n<script>|"
    (place / "images").rename(place / name)
    probe(place, data=place / name, models=[f"<b>|={place / 'model'}"], update_model_card=True)
    for file in (place / "model" / "README.md", place / "out" / "results.md"):
        text = file.read_text().split("\n---\n")[-1]  # without the metadata
        assert not {"# Heading", "<script>|"} & set(text.splitlines()) and r"\\n\<script\>\|" in text
        assert text.count("<script>") == text.count("<b>") == 0 and "### Verdict" in text
    card = ModelCard.load(place / "model" / "README.md").data
    assert {result.dataset_name for result in card.eval_results} == {"x # Heading <script>|"}


def test_a_model_card_without_accuracies_has_no_model_index(place):
    probe(place, probes=["collapse"], update_model_card=True)
    text = (place / "model" / "README.md").read_text()
    assert "Has it collapsed?" in text and "model-index" not in text


def save_diverged(trained, directory):
    trained.ijepa.layernorm.bias.data[0] = torch.nan
    save_model(trained, directory)


@pytest.mark.parametrize("changes", [{}, {"augment": "crop_flip"}, {"probes": ["attentive"]}])
def test_a_diverged_encoder_has_a_note_and_a_report_but_no_accuracies(place, trained, monkeypatch, changes):
    save_diverged(trained, place / "diverged")
    if changes.get("probes") == ["attentive"]:
        monkeypatch.setattr(evaluation_features, "_MAX_TOKEN_BYTES", 0)
    probes = [*changes.get("probes", ["knn", "few_shot", "logistic", "linear"]), "collapse"]
    models = [f"bad={place / 'diverged'}", f"ours={place / 'model'}"]
    results = probe(place, **{**changes, "probes": probes, "models": models, "no_baselines": True})
    assert entry(results, "bad")["probes"] == {} and entry(results, "ours")["probes"]
    (note,) = (note for note in results["notes"] if "diverged" in note)
    assert note.startswith("bad (") and "has no accuracies: NaN or infinity in" in note
    assert entry(results, "bad")["collapse"][-1]["state"] == "collapsed"
    text = (place / "out" / "results.md").read_text()
    assert "**bad** is collapsed: the features hold NaN or infinity, so training has diverged" in text


def test_a_probe_of_diverged_encoders_alone_fails_in_one_sentence(place, trained, capsys):
    save_diverged(trained, place / "diverged")
    with pytest.raises(SystemExit) as stopped:
        probe(place, models=[place / "diverged"])
    assert stopped.value.code == 1
    assert "No encoder could be measured: the features of " in capsys.readouterr().err.splitlines()[-1]
    assert (place / "out" / "results.md").exists()


def test_rows_that_are_measured_stay_when_a_later_encoder_fails(place, monkeypatch):
    original = evaluation_command._evaluate_entry

    def evaluate_entry(run, entry):
        if entry.name == "ours":
            raise KeyboardInterrupt
        return original(run, entry)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_command, "_evaluate_entry", evaluate_entry)
        with pytest.raises(SystemExit):
            probe(place)
    results = read(place / "out")
    assert [row["name"] for row in results["rows"]] == ["raw pixels", "random encoder"]
    assert results["unmeasured"] == ["ours"]
    assert "**Unfinished**, not measured yet: ours." in (place / "out" / "results.md").read_text()
    assert probe(place)["unmeasured"] == [] and "Unfinished" not in (place / "out" / "results.md").read_text()


def test_the_model_cards_of_local_directories_are_updated_once(place, trained):
    (place / "model" / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    models = [f"ours={place / 'model'}", f"context={place / 'model'}@context"]
    for _ in range(2):
        results = probe(place, models=models, probes=["knn", "collapse"], update_model_card=True)
    text = (place / "model" / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n") and "# By hand\n" in text
    assert text.count("## Evaluation") == 1 and text.count("model-index") == 1
    for name in ("raw pixels", "random encoder", "target encoder", "context encoder"):
        assert f"| {name} " in text
    card = ModelCard.load(place / "model" / "README.md").data
    values = {entry.metric_name: entry.metric_value for entry in card.eval_results}
    for name, own in (("target", "ours"), ("context", "context")):
        assert values[f"3-NN, {name} encoder (frozen features)"] == round(summary(results, own)["3-NN"], 4)
    assert len(values) == 2 and card.eval_results[0].dataset_name == "images"
    assert str(place / "images") not in card.to_yaml()  # no path of this machine in what the Hub reads


def test_the_card_of_each_seed_has_its_own_values_and_all_baselines(place, trained):
    torch.manual_seed(1)
    save_model(IJepaForPretraining(trained.config), place / "other")
    model = place / "model"
    models = [f"ours={model}", f"ours={place / 'other'}", f"random=random:{model}", f"random=random:{model}#1"]
    results = probe(place, models=models, update_model_card=True)
    for number, name in enumerate(("model", "other")):
        (value,) = ModelCard.load(place / name / "README.md").data.eval_results
        assert value.metric_value == round(entry(results, "ours", number)["probes"]["3-NN"]["accuracy"], 4)
        line = next(row for row in (place / name / "README.md").read_text().splitlines() if "| random " in row)
        assert "±" in line


def test_without_the_flag_no_model_card_is_written(place):
    probe(place)
    assert not (place / "model" / "README.md").exists()


# Wrong input


def assert_refused(place, capsys, sentence, **changes):
    """Status 2, one sentence, and no new file."""
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        probe(place, **changes)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"models": []}, "expected at least one argument"),
        ({"data": ""}, "data is missing"),
        ({"data": "/no/such"}, "'/no/such' is neither a file nor a folder"),
        ({"validation_split": "test"}, "has no split 'test'"),
        (
            {"probes": ["knn", "svm"]},
            "probes must be one of knn, few_shot, logistic, linear, attentive, collapse, got 'svm'",
        ),
        ({"optimizers": ["adam"]}, "optimizers must be one of adamw, sgd, lars, got 'adam'"),
        ({"schedule": "linear"}, "schedule must be one of cosine, step, got 'linear'"),
        ({"augment": "mixup"}, "augment must be one of none, crop_flip, flip, got 'mixup'"),
        ({"holdout": 1.0}, "holdout must be at least 0 and below 1, got 1.0"),
        ({"k": [5, 0]}, "k must be at least 1, got [5, 0]"),
        ({"learning_rates": [0.0]}, "learning_rates must be above 0, got [0.0]"),
        ({"learning_rates": ["inf"]}, "learning_rates must be above 0 and finite, got [inf]"),
        ({"weight_decays": ["inf"]}, "weight_decays must be at least 0 and finite, got [inf]"),
        ({"label_fractions": [1.5]}, "label_fractions must be above 0 and at most 1, got [1.5]"),
        ({"max_images": 1}, "max_images must be at least 2, got 1"),
        ({"num_workers": 5000}, "num_workers must be at least 0 and at most 1024, got 5000"),
        ({"models": ["no-such-model"]}, "The image processor of 'no-such-model' cannot be opened"),
        ({"models": ["=x"]}, "'=x' has no name before '='"),
        ({"models": ["a=random:"]}, "'random:' names no model"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_nothing_is_written(place, capsys, changes, sentence):
    assert_refused(place, capsys, sentence, **changes)


def test_a_batch_of_one_image_is_too_few_for_batch_norm(place, capsys):
    with pytest.raises(SystemExit):
        probe(place, probes=["linear"], batch_size=1)
    assert "BatchNorm needs at least 2 training images in a batch, got 1: take more images" in capsys.readouterr().err


def test_splits_without_labels_are_an_error(place, capsys):
    for folder in (place / "images" / "validation").iterdir():
        for path in folder.iterdir():
            shutil.move(path, place / "images" / "validation")
        folder.rmdir()
    assert_refused(place, capsys, "The 'validation' split of")


def test_a_single_class_is_an_error(place, capsys):
    for name in "bc":
        shutil.rmtree(place / "images" / "train" / name)
    assert_refused(place, capsys, "has a single class")


def test_a_split_is_not_judged_by_its_own_labels(place, capsys):
    sentence = "'train' is the split whose labels the probes learn from, so every accuracy would be too high"
    assert_refused(place, capsys, sentence, validation_split="train")


def test_splits_without_a_common_class_are_an_error(place, capsys):
    for name in "abc":
        (place / "images" / "validation" / name).rename(place / "images" / "validation" / f"other-{name}")
    assert_refused(place, capsys, "No image of the 'validation' split has a class of the 'train' split.")


def test_splits_with_other_class_names_are_an_error(place, capsys):
    labels = [0, 1] * 10
    saved = write_dataset(place, train=(["cat", "dog"], labels), validation=(["dog", "cat"], labels))
    sentence = "The splits 'train' and 'validation' number their classes differently; use one data set."
    assert_refused(place, capsys, sentence, data=saved)


def test_an_encoder_that_does_not_take_its_own_images_is_an_error_before_anything_is_written(place, trained, capsys):
    save_model(trained, place / "larger")
    build_image_processor(40).save_pretrained(place / "larger")
    models = [f"ours={place / 'model'}", f"larger={place / 'larger'}"]
    assert_refused(place, capsys, f"The model {str(place / 'larger')!r} cannot be used: IJepaModel", models=models)


def test_a_model_that_takes_more_than_images_is_an_error_before_anything_is_written(place, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    save_model(transformers.CLIPModel(config), place / "clip")
    assert_refused(place, capsys, "CLIPModel cannot be evaluated on images", models=[place / "clip"])


def test_an_image_processor_with_another_interface_is_an_error_before_anything_is_written(place, capsys, monkeypatch):
    class Foreign:
        """Like TimmWrapperImageProcessor, which takes only images."""

        def __call__(self, images, return_tensors=None):
            return {}

    monkeypatch.setattr(evaluation_features, "load_processor", lambda source: Foreign())
    assert_refused(place, capsys, "a Foreign, cannot be used, because it does not work like the image processors of")


def test_a_timm_model_is_an_error_before_anything_is_written(place, capsys):
    timm, _ = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    model = timm.create_model("resnet10t", num_classes=2)
    (place / "timm").mkdir()
    save_file(model.state_dict(), place / "timm" / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": "resnet10t", "num_classes": 2, "pretrained_cfg": {"input_size": [3, 176, 176]}}
    (place / "timm" / "config.json").write_text(json.dumps(config))
    assert_refused(place, capsys, "a TimmWrapperImageProcessor, cannot be used", models=[place / "timm"])


def test_a_missing_context_encoder_is_an_error(place, trained, capsys):
    save_model(trained.ijepa, place / "encoder")
    assert_refused(place, capsys, "holds no context encoder", models=[f"{place / 'encoder'}@context"])


def test_lars_without_timm_is_an_error_before_any_work(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    assert_refused(place, capsys, 'pip install "ijepa-transformers[vision]"', probes=["linear"], optimizers=["lars"])
    probe(place, optimizers=["lars"])  # no head is trained, so none is needed


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"probes": ["linear"], "augment": "crop_flip", "holdout": 0}])
def test_a_bad_image_stops_the_run_with_its_name(place, capsys, num_workers, changes):
    """Leaving it out would silently change an accuracy."""
    (place / "images" / "train" / "b" / "001.png").write_bytes(b"this is not an image")
    with pytest.raises(SystemExit) as stopped:
        probe(place, num_workers=num_workers, **changes)
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert stopped.value.code == 1 and not (place / "out" / "results.json").exists()
    assert error == (f"ijepa probe: error: {place / 'images/train/b/001.png'}: this is not an image that PIL knows")


@pytest.mark.parametrize(
    "text, name, source",
    [("runs/a", "runs/a", "runs/a"), ("mine=runs/a", "mine", "runs/a"), ("runs/lr=0.1", "runs/lr=0.1", "runs/lr=0.1")],
)
def test_the_name_of_an_entry(text, name, source):
    parsed = evaluation_command._parse_entry(text, "target")
    assert (parsed.name, parsed.spec.source) == (name, source)


def test_a_directory_with_an_equals_sign_is_a_spec(tmp_path, monkeypatch):
    (tmp_path / "lr=0.1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert evaluation_command._parse_entry("lr=0.1", "target").spec.source == "lr=0.1"
    assert evaluation_command._parse_entry("a=lr=0.1", "target") == evaluation_features.Entry(
        "a", encoders.EncoderSpec("model", "lr=0.1")
    )


@pytest.mark.parametrize(
    "recipe", sorted(SCRIPT.parent.glob("ijepa_transformers/recipes/probe_*.yaml")), ids=lambda path: path.stem
)
def test_recipes_are_valid(recipe, tmp_path):
    arguments = evaluation_arguments.parse_probing_arguments(
        ["--recipe", str(recipe), "--data", "digits", "--models", "a", "--output_dir", str(tmp_path)]
    )
    assert arguments.has_heads and BadImageError.__mro__[1] is ValueError
