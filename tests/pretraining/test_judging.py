"""Laws of what a run says about itself: the verdict at its end, and the check of its length."""

import dataclasses
import json
import re
import signal

import datasets
import numpy as np
import pytest
from PIL import Image

from ijepa_transformers import pretrain
from ijepa_transformers.preemption import Preempted
from ijepa_transformers.pretraining import evaluate, sanity
from ijepa_transformers.pretraining.arguments import ModelArguments, parse_pretraining_arguments
from ijepa_transformers.pretraining.judging import Facts, advise, has_moved, is_rising, leads
from ijepa_transformers.pretraining.sanity import Plan, plan_of, warnings_for
from ijepa_transformers.recipe_files import list_recipes
from ijepa_transformers.verdict import COLLAPSED, NOT_COLLAPSED, PIXELS, RANDOM, Score, Spread, Verdict
from tests.runs import TINY, rows, send_in_step, status
from tests.runs import pretrain as pretrain_by_flags


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
# A rate that is far too high: features that are spread out, and know less than those of a random encoder.
WORSE = {"learning_rate": 0.1, "start_learning_rate": 0.1, "momentum": 0.5, "max_steps": 30}


# The verdict


def test_a_run_that_is_worse_than_random_says_so_everywhere(tmp_path, capsys):
    result = pretrain(**{**TINY, **WORSE}, validation_split="test", max_probe_images=300, output_dir=tmp_path / "run")
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert result.verdict == verdict and verdict["learned"] is False and verdict["num_test_images"] == 300
    assert verdict["standings"] == {RANDOM: "below", PIXELS: "below"} and verdict["state"] != COLLAPSED
    sentence = "The target encoder is worse than a random encoder. Do not use its features."
    card = (tmp_path / "run" / "README.md").read_text()
    output = capsys.readouterr().out
    assert sentence in verdict["sentences"] and f"## Verdict\n\n{sentence}" in card and sentence in output
    assert all(f"- {line}" in card and f"- {line}" in output for line in verdict["advice"])
    assert "The run had 30 steps." in verdict["advice"][0]
    for text in (card.partition("## Training")[2], output):
        assert not any(word in text.lower() for word in ("healthy", " good", "well "))


def test_a_run_above_random_is_named_so(tmp_path, monkeypatch):
    """The random encoder of this test sees no pixels."""
    original = evaluate.random_encoder

    def blind(run):
        encoder = original(run)
        encoder.embeddings.patch_embeddings.projection.weight.data.zero_()
        return encoder

    monkeypatch.setattr(evaluate, "random_encoder", blind)
    result = pretrain(**TINY, validation_split="test", max_probe_images=300, output_dir=tmp_path / "run")
    assert result.verdict["learned"] is True
    assert result.verdict["standings"] == {RANDOM: "above", PIXELS: "below"}
    assert "better than a random encoder and worse than raw pixels" in result.verdict["sentences"][0]
    assert "Raw pixels are not worse" in " ".join(result.verdict["advice"])


UNTRAINED = {"learning_rate": 0, "start_learning_rate": 0, "final_learning_rate": 0, "warmup_steps": 0}


def test_an_untrained_run_is_level_with_the_random_encoder_also_after_a_resume(tmp_path, monkeypatch):
    """The random encoder is the one that the run began with, not another draw."""
    settings = {**TINY, **UNTRAINED, "validation_split": "test", "max_probe_images": 100, "resume": True}
    send_in_step(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Preempted):
        pretrain(**settings, output_dir=tmp_path / "run")
    monkeypatch.undo()
    verdict = pretrain(**settings, output_dir=tmp_path / "run").verdict
    beside_random = [each for each in verdict["comparisons"] if each["baseline"] == RANDOM]
    assert len(beside_random) == 2 and verdict["standings"][RANDOM] == "level" and verdict["learned"] is False
    assert all(each["accuracy"] == each["baseline_accuracy"] for each in beside_random)
    last = rows(tmp_path / "run")[-1]
    assert last["knn_accuracy"] == last["random_knn_accuracy"]


def numbers_of(directory) -> list[str]:
    """Spread and rank of the target encoder, and of its initial weights."""
    sentences = json.loads((directory / "verdict.json").read_text())["sentences"]
    assert "nobody can say whether its features are useful" in sentences[0]
    return [" ".join(re.findall(r"[\d.]+", sentence)) for sentence in sentences[1:3]]


def test_without_labels_rank_and_spread_stand_beside_those_of_the_initial_weights(tmp_path):
    """On the same images: without training they are equal."""
    for name, changes in (("untrained", UNTRAINED), ("trained", {"learning_rate": 0.1, "momentum": 0.5})):
        result = pretrain(**{**TINY, **changes}, output_dir=tmp_path / name)
        assert result.verdict["learned"] is None and result.verdict["comparisons"] == [] and result.table is None
    (now, initial), (trained, initial_again) = (numbers_of(tmp_path / name) for name in ("untrained", "trained"))
    assert now == initial == initial_again != trained
    assert "nobody can say whether its features are useful" in (tmp_path / "trained" / "README.md").read_text()


def test_equal_images_are_said_to_be_equal_though_the_weights_moved(tmp_path):
    (tmp_path / "black").mkdir()
    for number in range(12):
        Image.new("L", (16, 16)).save(tmp_path / "black" / f"{number}.png")
    changes = {"data": str(tmp_path / "black"), "learning_rate": 0.1}
    verdict = pretrain(**{**TINY, **changes}, output_dir=tmp_path / "run").verdict
    assert verdict["sentences"][1].startswith("The images do not differ") and len(verdict["sentences"]) == 2
    assert verdict["state"] is None and verdict["advice"] == []


def labelled_folder(directory, **classes):
    """A folder for each split, with ten images of each of these classes: noise if the directory is called so, or all
    equal."""
    generator = np.random.default_rng(0)
    for split, names in classes.items():
        for name, number in [(name, number) for name in names for number in range(10)]:
            path = directory / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels if "noise" in directory.name else 0 * pixels + 128).save(path)
    return str(directory)


def test_equal_images_with_labels_are_said_to_be_equal(tmp_path):
    data = labelled_folder(tmp_path / "equal", train=["a", "b"], test=["a", "b"])
    verdict = pretrain(**{**TINY, "data": data}, validation_split="test", output_dir=tmp_path / "run").verdict
    assert verdict["sentences"][0].startswith("The images do not differ") and verdict["learned"] is False
    assert verdict["advice"] == [] and verdict["state"] is None and "level with" in verdict["sentences"][1]


def test_a_measure_that_needs_more_labels_is_said_to_be_left_out(tmp_path):
    verdict = pretrain(**TINY, validation_split="test", max_probe_images=30, output_dir=tmp_path / "run").verdict
    assert {each["measure"] for each in verdict["comparisons"]} == {"20-NN"}
    assert "5-shot is left out: a class has fewer than 5" in " ".join(verdict["sentences"])


@pytest.mark.parametrize(
    "classes, split, sentence",
    [
        ({"train": ["a", "b"], "test": ["c", "d"]}, "test", "no labelled image of the 'test' split has a class of"),
        ({"train": ["a", "b"], "test": ["a"]}, "train", "'train' is the split whose labels the probes learn from"),
        ({"train": ["a", "b"], "test": ["a"]}, "training", "'training' is the split whose labels"),
    ],
)
def test_labels_that_cannot_judge_a_run_are_refused_before_it(tmp_path, classes, split, sentence):
    data = labelled_folder(tmp_path / "noise", **classes)
    with pytest.raises(ValueError, match=sentence):
        pretrain(**{**TINY, "data": data}, validation_split=split, output_dir=tmp_path / "run")


def test_splits_that_number_their_classes_differently_cannot_judge_a_run(tmp_path):
    splits = {}
    for split, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [Image.new("L", (16, 16))] * 10, "label": [0, 1] * 5}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="'train' and 'test' number their classes differently"):
        pretrain(**{**TINY, "data": str(tmp_path / "data")}, validation_split="test", output_dir=tmp_path / "run")


@pytest.mark.parametrize("validation_split", [None, "test"])
def test_weights_that_diverge_end_in_one_sentence_and_leave_no_model(tmp_path, capsys, validation_split):
    """Their gradient may be finite to the end."""
    changes = {
        "learning_rate": 1e30,
        "start_learning_rate": 1e30,
        "momentum": 0,
        "final_momentum": 0,
        "save_steps": 99,
    }
    with pytest.raises(SystemExit) as stopped:
        pretrain_by_flags(tmp_path / "run", **changes, validation_split=validation_split, max_probe_images=50)
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 1 and "NaN or infinity, so training has diverged" in error and "Traceback" not in error
    )
    assert status(tmp_path / "run") == "failed" and not (tmp_path / "run" / "model.safetensors").exists()


FACTS = Facts(
    total_steps=3000,
    few_steps=2000,
    most_steps=10**6,
    usual_run="A usual run for these images: --recipe quickstart --max_steps 4000.",
    learning_rate=1e-3,
    half_life_share=0.02,
    rank=20.0,
    patch_values=48,
    patch_embedding_init="fan_in",
)


def advice(learned, standing="level", state=NOT_COLLAPSED, pixels="level", **changes):
    standings = {} if learned is None else {RANDOM: standing, PIXELS: pixels}
    facts = Facts(**{**vars(FACTS), **changes})
    return " ".join(advise(Verdict((), learned, standings, state), facts))


def test_the_advice_follows_from_what_was_seen():
    assert advice(True, "above", pixels="above") == ""
    for learned in (True, False, None):
        assert "The run had 60 steps." in advice(learned, "above", pixels="above", total_steps=60)
        assert "The run had 1 step." in advice(learned, total_steps=1)
        assert "The run had" not in advice(learned, total_steps=1562, few_steps=1562)
    assert "Collect more images" in advice(False, total_steps=4000, most_steps=7999)
    assert advice(None) == ""
    assert "--max_steps 6000" in advice(False) and "patches twice as large" in advice(False)
    assert "--learning_rate 0.0005" in advice(False, "below") and "--learning_rate" not in advice(False, "level")
    assert "--learning_rate 0.0005" in advice(True, "above", state=COLLAPSED)
    for standing, state in (("below", NOT_COLLAPSED), ("below", COLLAPSED)):  # half of 1 would be far too high
        assert "recipes have a --learning_rate of 0.0005 to 0.002" in advice(False, standing, state, learning_rate=1)
    unmoved = advice(False, has_moved=False, learning_rate=1e-9)
    assert unmoved.startswith("The features are still those of the initial weights") and "has 1e-09" in unmoved
    assert "max_steps" not in unmoved and "The run had" in advice(False, has_moved=False, total_steps=60)
    assert "--momentum_half_life 0.04 (twice" in advice(False, rank=5.0) and "momentum" not in advice(False)
    assert "have 50% of each image's mean" in advice(False, target_image_mean=0.5)
    assert "image's mean" not in advice(False) + advice(True, "above", target_image_mean=0.5)
    assert "--momentum_half_life 0.01 (half" in advice(True, "above", context_leads=True)
    assert "momentum" not in advice(False, context_leads=True, total_steps=500)
    assert "--patch_embedding_init fan_in" in advice(False, patch_embedding_init="published")
    assert "fan_in" not in advice(False, patch_embedding_init="published", patch_values=768)
    assert "Raw pixels are not worse" in advice(True, "above", pixels="below")
    assert "--max_steps 6000" in advice(True, "above", pixels="above", still_rising=True)
    assert "rising" not in advice(True, "above", pixels="above", still_rising=True, total_steps=60)


def test_features_have_moved_if_rank_or_spread_differ_by_more_than_rounding():
    initial = Spread(0.3, 10.0, 64)
    assert not has_moved(Spread(0.30001, 10.001, 64), initial)
    assert has_moved(Spread(0.3, 10.1, 64), initial) and has_moved(Spread(0.29, 10.0, 64), initial)
    assert has_moved(None, None)


def test_a_run_is_rising_if_its_last_quarter_clearly_gains():
    def metrics(*accuracies):
        return [{"step": 10 * (place + 1), "knn_accuracy": value} for place, value in enumerate(accuracies)]

    assert is_rising(metrics(0.2, 0.3, 0.4, 0.43)) and not is_rising(metrics(0.2, 0.6, 0.6, 0.61))
    assert not is_rising(metrics(0.6)) and not is_rising([])


def test_the_context_encoder_leads_if_it_is_clearly_better_in_the_mean():
    target = {"20-NN": Score(0.5), "5-shot": Score(0.4, 0.02, 5)}
    for knn, few_shot, expected in ((0.54, 0.43, True), (0.54, 0.41, False), (0.4, 0.45, False)):
        assert leads({"20-NN": Score(knn), "5-shot": Score(few_shot)}, target) == expected


# The length of a run


def plan(num_images, batch_size, total_steps, warmup_steps=0, image_side=224):
    return Plan(num_images, batch_size, total_steps, warmup_steps, image_side)


def test_far_too_many_epochs_are_said_with_a_recipe_and_a_length():
    first, few = warnings_for(plan(302, 256, 50_000, 5_000))
    assert first.startswith("302 images and 50,000 steps of batch 256 = 42,384 epochs")
    assert "--recipe small_images --max_steps 4000" in first and "302 images are few" in few


@pytest.mark.parametrize(
    "unusual, words",
    [
        (plan(5000, 32, 60), "runs of up to 500 steps learned little"),
        (plan(50_000, 32, 600), "0.38 epochs: some images are never seen"),
        (plan(5000, 32, 4000, 2001), "warm-up has 2,001 of 4,000 steps"),
        (plan(500, 32, 4000), "500 images are few"),
    ],
)
def test_other_unusual_lengths_are_said(unusual, words):
    (warning,) = warnings_for(unusual)
    assert words in warning


def test_a_run_on_few_images_is_told_to_compare_only_if_it_does_not():
    unjudged = plan(500, 32, 4000)
    for is_judged in (False, True):
        (warning,) = warnings_for(dataclasses.replace(unjudged, is_judged=is_judged))
        assert ("--validation_split" in warning) != is_judged


@pytest.mark.parametrize(
    "num_images, side, recipe",
    [
        *((302, 224, "small_images"), (5_000, 96, "small_images"), (200_000, 32, "small_images")),
        *((20_000, 128, "medium_images"), (100_000, 224, "medium_images")),
        (1_000_000, 224, "custom_images_single_gpu"),
    ],
)
def test_the_proposed_recipe_suits_number_and_size_and_is_there(num_images, side, recipe):
    assert sanity.proposed_recipe(num_images, side, 3) == recipe and recipe in list_recipes()
    assert sanity.proposed_recipe(1_297, 28, 1) == "quickstart"


@pytest.mark.parametrize("num_images", [32, 100, 302, 1_000, 9_999, 50_000, 300_000, 5_000_000])
def test_a_proposed_run_is_not_warned_of_again(num_images):
    recipe = sanity.proposed_recipe(num_images, 224, 3)
    steps, batch_size = sanity.proposed_length(recipe, num_images)
    proposed = warnings_for(plan(num_images, batch_size, steps))
    assert [each for each in proposed if "are few" not in each] == []
    arguments = parse_pretraining_arguments(
        ["--recipe", recipe, "--max_steps", str(steps), "--data", "digits", "--output_dir", "out"]
    )
    assert (arguments.max_steps, arguments.batch_size) == (steps, batch_size)
    assert arguments.total_warmup_steps(1) <= steps / 2


IN1K, IN22K = 1_281_167, 14_197_122
SIZES = {
    "quickstart": [1_297],
    "small_images": [1_000, 1_297, 5_280, 10_000],
    "medium_images": [10_000, 100_000],
    "custom_images_single_gpu": [100_001, IN1K],
    "cifar10": [50_000],
    "fashion_mnist": [60_000],
    "imagenette": [9_469],
    "stl10": [5_000],
    **{name: [IN22K if "in22k" in name else IN1K] for name in list_recipes() if name.startswith("vit_")},
}


def test_every_recipe_of_pretraining_is_checked():
    others = {name for name in list_recipes() if name.startswith(("finetune", "probe"))}
    assert set(list_recipes()) - others == set(SIZES)


@pytest.mark.parametrize("recipe, num_images", [(name, size) for name, sizes in SIZES.items() for size in sizes])
def test_no_recipe_is_warned_of_on_the_data_it_names(recipe, num_images):
    arguments = parse_pretraining_arguments(["--recipe", recipe])
    size = arguments.model_fields()["image_size"]
    assert warnings_for(plan_of(arguments, num_images, (size, size), 3)) == []


def test_the_end_of_a_short_run_proposes_the_same_as_its_start(tmp_path, capsys):
    (tmp_path / "noise").mkdir()
    generator = np.random.default_rng(0)
    for number in range(50):
        pixels = generator.integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{number}.png")
    verdict = pretrain(**{**TINY, "data": str(tmp_path / "noise")}, output_dir=tmp_path / "run").verdict
    (proposed,) = set(re.findall(r"A usual run for these images: .*", capsys.readouterr().out))
    assert "--recipe quickstart --max_steps 3125 (1,000 epochs of its batch 16)" in proposed
    assert proposed in verdict["advice"][0]
    assert verdict["short_run"] == "The run had 6 steps. Runs with fewer than about 2,000 learn little."


def test_a_short_run_from_trained_weights_is_not_called_short_in_its_verdict(tmp_path):
    """`ijepa search` warns of short runs. These weights may be good all the same."""
    of_weights = dict.fromkeys(entry.name for entry in dataclasses.fields(ModelArguments))
    continued = {**of_weights, "init_from": tmp_path / "first", "max_steps": 1, "warmup_steps": 1}
    for name, changes in (("first", {}), ("second", continued)):
        pretrain_by_flags(tmp_path / name, **changes)
        verdict = json.loads((tmp_path / name / "verdict.json").read_text())
        assert verdict["advice"] and (verdict["short_run"] is None) == (name == "second")


def test_a_run_prints_its_warnings_before_the_first_step_and_goes_on(tmp_path, capsys):
    pretrain_by_flags(tmp_path / "run")
    output = capsys.readouterr().out
    assert output.index("WARNING: 1,297 images and 6 steps of batch 8") < output.index("step 2 of 6")
    pretrain_by_flags(tmp_path / "run", resume="true")
    assert "WARNING" not in capsys.readouterr().out
