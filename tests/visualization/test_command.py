"""Promises of the visualization script: one whole page for any I-JEPA directory, and nothing for wrong arguments."""

import dataclasses
import json
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from ijepa_transformers import IJepaConfig, IJepaForImageClassification, IJepaForPretraining, IJepaModel, encoders
from ijepa_transformers import arguments as ijepa_transformers_arguments
from ijepa_transformers.data import datasets as data_datasets
from ijepa_transformers.data import sources
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.verdict import (
    ABOVE,
    BELOW,
    LEVEL,
    MIXED,
    PIXELS,
    RANDOM,
    Score,
    Verdict,
    judge,
    judge_without_labels,
)
from ijepa_transformers.visualization import beliefs, cells, guesses, sections
from ijepa_transformers.visualization import command as visualization_command
from ijepa_transformers.visualization import curves as visualization_curves
from ijepa_transformers.visualization import study as visualization_study
from ijepa_transformers.visualization.judging import (
    accuracy_cards,
    headline,
    measured_on,
    shown_verdict,
    tone_of,
    training_seconds,
)
from ijepa_transformers.visualization.page import Picture, Section, refuse_other_pictures, write_pictures
from ijepa_transformers.visualization.predictions import score_predictions
from tests.printed import proposed
from tests.runs import blind_to_brightness


TITLES = [
    "What it believes about hidden parts",
    "Which images it finds similar",
    "What the parts of an image mean to it",
    "Click a patch: what is similar?",
    "Where it looks",
    "What it is asked: guess the hidden parts",
    "How the training went",
    "Model, data and command",
]
PICTURES = {
    *("curves", "masks_unbiased", "masks_meta", "predictions", "prediction_scores", "pca", "similarity", "attention"),
    *("map", "map_untrained", "masks_random", "masks_inverse_block"),
}
MASKS = "mask_mode: unbiased\ntarget_scale: [0.2, 0.3]\nmin_patches: 2\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save(model, directory, image_size=32, channels=3):
    model.save_pretrained(directory)
    build_image_processor(image_size, channels).save_pretrained(directory)


@pytest.fixture
def place(trained, tmp_path):
    """A run, and photographs in two classes whose names are hostile; one file is no image."""
    save(trained, tmp_path / "run")
    rows = [{"step": step, "loss": 1 / step, "effective_rank": 3.0} for step in (1, 2, 3)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half')
    (tmp_path / "run" / "recipe.yaml").write_text(MASKS)
    generator = np.random.default_rng(0)
    for number in range(9):
        path = tmp_path / "images" / ("$cat$" if number < 5 else "<script>") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 50 + number, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "$cat$" / "broken.png").write_bytes(b"no image")
    return tmp_path


def argv(place, **changes) -> list[str]:
    values = {"model": place / "run", "data": place / "images", "output": place / "page" / "report.html"}
    values = {**values, "num_images": 3, "bank_size": 6, "map_images": 20, **changes}
    parts = [[f"--{key}", *(value if isinstance(value, list) else [value])] for key, value in values.items()]
    return [str(word) for part in parts for word in part]


def visualize(place, **changes) -> str:
    visualization_command.main(argv(place, **changes))
    return (place / "page" / "report.html").read_text()


def titles(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page.split('id="part-1"')[1])


def files(place) -> set[str]:
    return {path.stem for path in (place / "pictures").iterdir()}


def test_a_pretraining_directory_gets_every_section(place, capsys):
    page = visualize(place, pictures_dir=place / "pictures")
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["model", "data", "computation", "output"]
    assert (
        f"\nVerdict\n\n{verdict(page)[1]}\nMeasured on the images of this page.\n" in out
        and next(iter(dict(proposed(out)))) == "visualize"
    )
    assert titles(page) == TITLES
    assert page.count("<img") > len(PICTURES) and files(place) == PICTURES
    assert "left out" not in page and "9 images, 1 could not be read" in page and "&lt;script&gt;" in page
    assert "the target encoder: 3 layers of width 32" in page and "2 layers of width 16" in page
    assert "ijepa visualize --model" in page
    assert not re.search(r"https?:", page) and page.count("<script") == 2
    assert [path.name for path in (place / "page").iterdir()] == ["report.html"]


@pytest.mark.parametrize("channels", [2, 13])
def test_bands_are_shown_as_their_mean_in_grey(tmp_path, channels):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    predictor = {"predictor_hidden_size": 8, "predictor_num_hidden_layers": 1}
    config = IJepaConfig(image_size=32, patch_size=8, num_channels=channels, **size, **predictor)
    IJepaForPretraining(config).save_pretrained(tmp_path / "run")
    statistics = {"image_mean": [0.5] * channels, "image_std": [0.25] * channels}
    build_image_processor(32, channels, **statistics).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(MASKS)
    (tmp_path / "images").mkdir()
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, channels), dtype=np.uint8)
        np.save(tmp_path / "images" / f"{number}.npy", pixels)
    page = visualize(tmp_path, num_images=2, bank_size=4, map_images=5, pictures_dir=tmp_path / "pictures")
    assert f"{channels} channels (pictures show their mean in grey)" in page and "left out" not in page
    assert {"masks_unbiased", "predictions", "pca", "similarity", "attention", "map"} <= files(tmp_path)


def write_bright_and_dark(folder):
    """60 images of two classes, which differ in brightness."""
    generator = np.random.default_rng(0)
    for number in range(60):
        path = folder / ("dark" if number % 2 else "bright") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.normal(60 if number % 2 else 190, 40, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def verdict(page: str) -> tuple[str, str, list[str]]:
    """Tone, headline and sentences of the verdict."""
    box = page.split('<div class="verdict ')[1].split("</div>")[0]
    headline, *sentences = re.findall("<p[^>]*>(.*?)</p>", box)
    return box.split('"')[0], headline, sentences


def test_the_page_begins_with_the_verdict_and_a_model_that_is_worse_than_random_gets_no_praise(place, trained):
    data = write_bright_and_dark(place / "bright_and_dark")
    save(blind_to_brightness(trained), place / "run")
    page = visualize(place, data=data, map_images=60)
    tone, headline, sentences = verdict(page)
    assert "20-NN" in sentences[0] and "on 30 images of the split &#39;train&#39;" in sentences[-1]
    assert "on 30 images of the split &#39;train&#39;</h2>" in page and "test images" not in page
    assert (tone, headline) == ("bad", "The target encoder is worse than a random encoder. Do not use its features.")
    words = re.sub('(src|href)="[^"]*"|<style>.*</style>|<script.*</script>', "", page, flags=re.DOTALL)
    words = words.replace("Good would be:", "").replace("docs/learning.md", "").lower()
    assert not any(word in words for word in ("good", "healthy", " fine"))


def judged(knn, few_shot):
    """A verdict on two measures, beside a random encoder with .5 and raw pixels with .6."""
    baselines = {RANDOM: 0.5, PIXELS: 0.6}
    others = {name: {"20-NN": Score(value), "5-shot": Score(value)} for name, value in baselines.items()}
    return judge("It", {"20-NN": Score(knn), "5-shot": Score(few_shot)}, others, 10_000)


@pytest.mark.parametrize(
    ("knn", "few_shot", "standing", "tones"),
    [
        (0.9, 0.9, ABOVE, ["good", "good", "good"]),
        (0.9, 0.4, MIXED, ["unsure", "unsure", "bad"]),
        (0.9, 0.5, ABOVE, ["good", "good", "unsure"]),
        (0.5, 0.5, LEVEL, ["unsure", "unsure", "unsure"]),
        (0.4, 0.4, BELOW, ["bad", "bad", "bad"]),
    ],
)
def test_no_card_looks_better_than_the_verdict(knn, few_shot, standing, tones):
    found = judged(knn, few_shot)
    assert found.standings[RANDOM] == standing
    assert [tone_of(found), *(card.tone for card in accuracy_cards(found))] == tones
    assert [card.value for card in accuracy_cards(found)] == [f"{knn:.1%}", f"{few_shot:.1%}"]
    collapsed = dataclasses.replace(found, state="collapsed")
    assert {tone_of(collapsed), *(card.tone for card in accuracy_cards(collapsed))} == {"bad"}


def test_the_page_begins_with_the_verdict_that_knows_most_about_what_it_shows():
    by_labels, on_the_page = judged(0.9, 0.9), judged(0.4, 0.4)
    without = judge_without_labels("It", None, None, "")

    def choose(of_run: Verdict | None, on_these_images: Verdict, encoder: str = "target") -> Verdict:
        return shown_verdict(
            SimpleNamespace(verdict_of_run=of_run, arguments=SimpleNamespace(encoder=encoder)), on_these_images
        )

    assert choose(by_labels, on_the_page) is by_labels and choose(None, on_the_page) is on_the_page
    assert choose(without, on_the_page) is on_the_page and choose(without, without) is without
    assert choose(by_labels, on_the_page, "context") is on_the_page
    assert headline(on_the_page, on_the_page).sentences == list(on_the_page.sentences[1:])


def test_the_time_of_a_run_is_computed_from_the_speeds_in_its_log():
    rows = [{"step": 10, "images_per_second": 20.0}, {"step": 30, "images_per_second": 40.0}]
    assert training_seconds(rows, 8) == 10 * 8 / 20 + 20 * 8 / 40
    assert training_seconds(rows, None) is None and training_seconds([*rows, {"step": 40}], 8) is None


def test_without_labels_the_page_shows_rank_and_spread_and_says_that_they_prove_nothing(place):
    data = place / "flat"
    data.mkdir()
    for file in (place / "images").rglob("?.png"):
        file.rename(data / file.name)
    tone, headline, sentences = verdict(visualize(place, data=data))
    assert tone == "unsure" and "nobody can say whether its features are useful" in headline
    assert any("With random weights:" in sentence for sentence in sentences)


def test_equal_images_are_said_to_be_equal_and_not_that_the_encoder_collapsed(place):
    (place / "black").mkdir()
    for number in range(12):
        Image.new("RGB", (32, 32)).save(place / "black" / f"{number}.png")
    tone, _, sentences = verdict(visualize(place, data=place / "black"))
    assert tone == "unsure" and sentences[0].startswith("The images do not differ")
    assert not any("It has collapsed" in sentence for sentence in sentences)


def test_two_equal_verdicts_are_said_once():
    one, equal, other = Verdict(("Level.",)), Verdict(("Level.",)), Verdict(("Better.",))
    assert measured_on(one, equal) == "Measured by the run on its own images. Those of this page say the same."
    assert measured_on(one, other).endswith("Those of this page say: Better.")
    assert measured_on(one, one) == "Measured on the images of this page."


def test_the_verdict_of_the_run_comes_first_and_a_damaged_one_is_refused(place, capsys):
    path = place / "run" / "verdict.json"
    of_run = judge("The <b>encoder</b>", {"7-NN": Score(0.5)}, {RANDOM: {"7-NN": Score(0.5)}}, 100)
    path.write_text(json.dumps(dataclasses.replace(of_run, advice=("More steps.",)).as_json()))
    page = visualize(place)
    tone, headline, sentences = verdict(page)
    assert tone == "unsure" and headline.startswith("The &lt;b&gt;encoder&lt;/b&gt; is level with a random encoder.")
    assert "More steps." in sentences and sentences[-1].startswith("The images of this page are others")
    said = "\nMeasured by the run on its own images. Those of this page say: The target encoder"
    assert said in capsys.readouterr().out
    assert "<h2>7-NN accuracy on 100 test images</h2>" in page and "Level with the random encoder</p>" in page
    path.write_text("[]")
    with pytest.raises(SystemExit) as stop:
        visualize(place)
    assert stop.value.code == 2 and "verdict.json' is no verdict of a run" in capsys.readouterr().err


def test_one_encoder_gets_what_needs_no_predictor_and_the_page_says_why(place, tiny_config):
    save(IJepaModel(tiny_config), place / "encoder")
    page = visualize(place, model=place / "encoder", pictures_dir=place / "pictures")
    assert titles(page) == TITLES
    assert files(place) == {name for name in PICTURES if not name.startswith(("curves", "masks", "prediction"))}
    reason = "left out, because the directory holds one encoder (saved from IJepaModel)"
    assert page.count(reason) == 2 and "no metrics.jsonl" in page


@pytest.mark.parametrize("size", [(20, 36), (34, 33)])
def test_other_shapes_channels_and_a_classifier_work(place, tiny_config, size):
    # 34 x 33 pixels: the model does not see the last rows and columns, and the pictures do not show them
    config = IJepaConfig(**{**tiny_config.to_dict(), "image_size": size, "patch_size": (4, 6), "num_channels": 1})
    save(IJepaForPretraining(config), place / "grey", size, channels=1)
    page = visualize(place, model=place / "grey", pictures_dir=place / "pictures")
    assert files(place) == PICTURES - {"curves"} and f"{size[0]} x {size[1]} pixels, 1 channel" in page
    save(IJepaForImageClassification(config), place / "classifier", size, channels=1)
    assert "saved from IJepaForImageClassification" in visualize(place, model=place / "classifier")


def test_the_same_command_draws_the_same_pictures_and_the_seed_chooses_others(place, monkeypatch):
    monkeypatch.setattr(visualization_command, "SECTIONS", sections.SECTIONS[:-1])  # curves draw no images
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        visualize(place, pictures_dir=place / name, seed=seed, map_images=6)  # of 9: not the same six
    for name in PICTURES - {"curves"}:
        first, again, other = (Image.open(place / part / f"{name}.png") for part in ("first", "again", "other"))
        assert first.tobytes() == again.tobytes()
        assert name == "prediction_scores" or first.tobytes() != other.tobytes()


def study_of(place, **changes) -> visualization_study.Study:
    return visualization_study.build_study(
        ijepa_transformers_arguments.parse_arguments(
            argv(place, **changes),
            [visualization_study.VisualizationArguments],
            visualization_study.VisualizationArguments,
            "test",
            "",
        )
    )


def test_the_encoder_that_is_asked_for_is_shown_and_the_bank_stays_the_target_s(place, trained):
    study = study_of(place, encoder="context")
    pixels = study.pool.pixel_values(slice(None))
    with torch.no_grad():
        context = trained.context_encoder(pixels).last_hidden_state
        target = trained.ijepa(pixels).last_hidden_state
    torch.testing.assert_close(study.features.patches, context[:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(study.features.pooled, context.mean(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(study.target_features.patches, target[:6], rtol=1e-4, atol=1e-5)
    bank = torch.nn.functional.layer_norm(target, target.shape[-1:])[:6]
    guessed = guesses.guess(study, study.networks.pretraining)
    torch.testing.assert_close(guessed.bank, bank, rtol=1e-4, atol=1e-4)
    images, places = torch.arange(3)[:, None, None], guessed.blocks
    torch.testing.assert_close(guessed.truths, bank[images, places], rtol=1e-4, atol=1e-4)
    assert "the context encoder: 3 layers" in visualize(place, encoder="context")


def test_guesses_belong_to_their_image_block_and_place(place):
    study = study_of(place)
    every = guesses.guess(study, study.networks.pretraining)
    one = every.block(2, 1)
    assert torch.equal(one.predictions[0, 0], every.predictions[2, 1])
    assert torch.equal(one.blocks[0, 0], every.blocks[2, 1]) and one.query_images.unique().tolist() == [2]
    expected = score_predictions(
        every.predictions[2, 1],
        every.truths[2, 1],
        torch.full_like(every.blocks[2, 1], 2),
        every.blocks[2, 1],
        every.bank,
        torch.arange(6),
    )
    assert one.scores() == expected
    assert torch.equal(every.query_images, torch.arange(3).repeat_interleave(every.blocks[0].numel()))
    exact = dataclasses.replace(every, predictions=every.truths)
    torch.testing.assert_close(exact.nearest(exact.predictions), exact.nearest(exact.truths), rtol=0, atol=0)
    every.bank[5, 3] = 2 * one.truths[0, 0, 1]  # what is pasted are the pixels of the patch that was found
    pixels = cells.cut_patches(study.pool.images, (8, 8))  # (K, N, channels, 8, 8)
    torch.testing.assert_close(one.nearest(one.truths)[1], pixels[5, 3], rtol=0, atol=0)
    assert not any(torch.equal(piece, patch) for piece in one.nearest(one.truths) for patch in pixels[2])


def test_what_is_shown_is_what_the_model_sees_under_its_own_label(place):
    study = study_of(place)
    dataset = sources.load_image_dataset(str(place / "images"))
    processed = data_datasets.ProcessedImages(dataset, encoders.load_processor(place / "run"), 3)
    seen = {row: image for row in range(10) if not isinstance(image := processed[row], str)}
    for image, label in zip(study.pool.pixel_values(slice(None)), study.pool.labels, strict=True):
        distances = {row: (image - other).abs().max() for row, other in seen.items()}
        row = min(distances, key=distances.get)
        assert distances[row] < 1e-5 and dataset[row]["label"] == label
    assert len(study.pool.images) == 9 and study.pool.num_bad == 1
    assert study.pool.class_names == dataset.features["label"].names


@pytest.mark.parametrize("labels", [[0, None, -1, 1, 0, 1], [None] * 6])
def test_images_without_a_label_are_on_the_map(place, labels):
    images = [str(path) for path in sorted((place / "images").rglob("?.png"))[:6]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(place / "saved")
    page = visualize(place, data=place / "saved")
    assert ("The data have no labels" in page) == (set(labels) == {None})


def test_further_runs_are_drawn_together_with_the_model_s_own(place, monkeypatch):
    (place / "second").mkdir()
    (place / "second" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    drawn, draw = [], visualization_curves.plot_training_curves
    spy = lambda runs, *args, **kwargs: (drawn.append(runs), draw(runs, *args, **kwargs))  # noqa: E731
    monkeypatch.setattr(sections, "plot_training_curves", spy)
    page = visualize(place, runs=[f"<b>$x$={place / 'second'}"])
    assert {name: len(rows) for name, rows in drawn[0].items()} == {"run": 3, "<b>$x$": 1}
    assert "Training curves of run, &lt;b&gt;$x$" in page


def test_masks_are_those_of_the_recipe_and_the_other_mode_is_made_to_fit(place):
    masks = visualization_study.read_masks(str(place / "run"))
    assert masks.target_scale == [0.2, 0.3] and masks.min_patches == 2 and masks.num_targets == 4
    fixed = dataclasses.replace(masks, num_target_tokens=2)
    own = visualization_study.fitting_masking((4, 4), fixed, "unbiased")
    assert own.num_target_tokens == 2 and own.min_patches == 2
    other = visualization_study.fitting_masking((4, 4), dataclasses.replace(fixed, min_patches=10), "meta")
    assert other.mode == "meta" and other.num_target_tokens is None and 1 <= other.min_patches < 10
    random = visualization_study.fitting_masking((4, 4), fixed, "random")
    assert (random.mode, random.num_context_tokens, random.num_target_tokens) == ("random", 5, 11)
    with pytest.raises(ValueError, match="2x2"):
        visualization_study.fitting_masking((1, 8), masks, "meta")


@pytest.mark.parametrize("content", ["a: [", "[1]", "min_patches: few", "min_patches: -1", "mask_mode: 5", "\udcff"])
def test_a_damaged_recipe_is_one_sentence_with_its_name(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "recipe.yaml"))):
        visualization_study.read_masks(str(tmp_path))


@pytest.mark.parametrize("mode", ["random", "inverse_block"])
def test_a_run_whose_contexts_have_targets_of_their_own_gets_every_section(place, monkeypatch, mode):
    (place / "run" / "recipe.yaml").write_text(f"mask_mode: {mode}\nnum_contexts: 2\nvisible_share: 0.25\n")
    guessed, guess = [], sections.guess
    monkeypatch.setattr(sections, "guess", lambda *args: (guessed.append(guess(*args)), guessed[-1])[1])
    page = visualize(place, pictures_dir=place / "pictures")
    assert titles(page) == TITLES and files(place) == PICTURES - {"masks_meta"}
    assert page.count("cannot be drawn here") == 1  # meta does not fit the grid of 4 x 4
    assert page.index(f"{mode}&#39;, as in this run") < page.index("which this run did not use")
    both = torch.cat([guessed[0].contexts, guessed[0].blocks[:, 0]], dim=1)  # of the first context
    assert torch.equal(both.sort(dim=1).values, torch.arange(16).expand(3, -1))


def write_training_images(place):
    """A data set with splits: 30 images to train on and 6 to show."""
    generator = np.random.default_rng(0)
    for number in range(36):
        path = place / "split" / ("train" if number < 30 else "test") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return {"data": place / "split", "split": "test", "decoder_steps": 2, "batch_size": 4}


def test_a_decoder_is_trained_kept_beside_the_model_and_used_again(place, capsys):
    words = write_training_images(place)
    page = visualize(place, decoder="true", pictures_dir=place / "pictures", **words)
    path = place / "run" / beliefs.FILE_NAME
    before = path.read_bytes()
    assert files(place) == {*PICTURES, "beliefs"} and "PSNR (dB)" in page and "<summary><h3>Put together" in page
    assert "shows the average of all that would fit" in page and "over the hidden blocks of 6 images" in page
    assert "training two decoders" in capsys.readouterr().out
    page = visualize(place, decoder="true", **words)
    assert "training" not in capsys.readouterr().out and f"The decoder is the one in {path}" in page
    assert path.read_bytes() == before
    visualize(place, decoder="true", **{**words, "decoder_steps": 3})
    assert "belongs to another number of steps. A decoder is trained again." in capsys.readouterr().out
    path.write_bytes(b"damaged")
    assert "The one in" in visualize(place, decoder="true", **words)
    assert path.read_bytes() == before  # the same again


def test_a_decoder_of_other_weights_is_trained_again(place, trained, capsys):
    words = write_training_images(place)
    visualize(place, decoder="true", **words)
    with torch.no_grad():
        trained.ijepa.layernorm.bias.add_(0.1)
    save(trained, place / "run")
    capsys.readouterr()
    visualize(place, decoder="true", **words)
    assert "it belongs to another model. A decoder is trained again." in capsys.readouterr().out


def test_pictures_and_figures_in_pixels_are_of_images_that_the_decoder_was_not_trained_on(place, monkeypatch):
    words = write_training_images(place)
    trained_on, read = [], beliefs.read_pool
    monkeypatch.setattr(beliefs, "read_pool", lambda *args: (trained_on.append(read(*args)), trained_on[-1])[1])
    study = study_of(place, decoder="true", **{**words, "split": "train", "bank_size": 30})
    found = beliefs.decode_beliefs(study, study.networks.pretraining)
    shown = {study.pool.rows[image] for image in found.guesses.images.tolist()}
    assert shown and len(shown) + len(trained_on[0].rows) == 30 and not shown & set(trained_on[0].rows)
    assert found.guesses.images.tolist()[:2] == [0, 1]  # the shown images come first
    truth = found.truth[0].view(4, 4, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(3, 32, 32)
    torch.testing.assert_close((255 * truth).round().to(torch.uint8), study.pool.images[0])
    hidden = torch.zeros(16, dtype=torch.bool)
    hidden[found.guesses.blocks[0].flatten()] = True
    for decoded in found.decoded.values():
        torch.testing.assert_close(decoded[0][~hidden], found.truth[0][~hidden])
        assert not torch.equal(decoded[0][hidden], found.truth[0][hidden])


def test_a_decoder_without_images_to_train_on_is_one_sentence(place, capsys):
    with pytest.raises(SystemExit) as end:
        visualize(place, decoder="true", data=write_training_images(place)["data"] / "test", split="test")
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (place / "page").exists() and not (place / "run" / beliefs.FILE_NAME).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model is missing"),
        ({"num_images": 1}, "num_images must be at least 2, got 1"),
        ({"bank_size": 1}, "bank_size must be at least 2, got 1"),
        ({"map_images": 2}, "map_images must be at least 3, got 2"),
        ({"decoder_steps": 0}, "decoder_steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"runs": ["name"]}, "runs must be NAME=DIR, got 'name'"),
        ({"runs": ["run=x"]}, "every run needs a name of its own, got run, run"),
        ({"runs": ["other=nowhere"]}, "'nowhere' holds no metrics.jsonl"),
        ({"model": "nowhere/at/all"}, "'nowhere/at/all' cannot be opened"),
        ({"data": "nowhere/at/all"}, "'nowhere/at/all' is neither a file nor a folder"),
        ({"split": "test"}, "has no split 'test'"),
        ({"encoder": "other"}, "encoder must be one of target, context, got 'other'"),
    ],
)
def test_wrong_arguments_end_with_status_2_and_nothing_is_written(place, capsys, changes, message):
    with pytest.raises(SystemExit) as end:
        visualize(place, pictures_dir=place / "pictures", **changes)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (place / "page").exists() and not (place / "pictures").exists()


def test_models_and_files_that_do_not_fit_are_one_sentence(place, tiny_config, capsys):
    ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(place / "vit")
    save(IJepaModel(tiny_config), place / "encoder", image_size=40)
    diverged = IJepaForImageClassification(tiny_config)
    diverged.ijepa.layernorm.bias.data[0] = torch.nan
    save(diverged, place / "diverged")
    broken = place / "broken"
    broken.mkdir()
    (broken / "metrics.jsonl").write_text("no json\n")
    before = (place / "run" / "recipe.yaml").read_bytes()
    for changes, message in (
        ({"model": place / "vit"}, "is a 'vit' model, no I-JEPA"),
        ({"model": place / "diverged"}, "cannot be used: its weight layernorm.bias holds NaN or infinity"),
        ({"model": place / "encoder", "encoder": "context"}, "holds no context encoder"),
        ({"model": place / "encoder", "decoder": "true"}, "--decoder shows the guesses of a predictor, but"),
        ({"model": place / "encoder"}, "gives (40, 40) pixels, but the model takes (32, 32)"),
        ({"runs": [f"x={broken}"]}, "cannot be read"),
        ({"output": place / "images"}, "is a directory"),
        ({"output": "   "}, "output must not be empty"),
        ({"output": place / "run" / "recipe.yaml"}, "recipe.yaml' is there already and is no .html file"),
        ({"pictures_dir": place / "run" / "recipe.yaml"}, "recipe.yaml is no directory"),
        ({"pictures_dir": place / "run"}, "run' holds other files, such as"),
    ):
        with pytest.raises(SystemExit) as end:
            visualize(place, **changes)
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (place / "page").exists() and (place / "run" / "recipe.yaml").read_bytes() == before


def test_pictures_replace_pictures_of_a_page_and_no_other_ones(tmp_path):
    section = Section("Map", [Picture("A map", "", files={"map": Image.new("RGB", (2, 2))})])
    for _ in range(2):
        refuse_other_pictures(tmp_path)
        write_pictures(tmp_path, [section])
        (tmp_path / "notes.txt").write_text("mine")
    Image.new("RGB", (2, 2)).save(tmp_path / "pca.png")
    with pytest.raises(ValueError, match=r"pictures_dir .* holds other files, such as 'pca.png': choose an empty or"):
        refuse_other_pictures(tmp_path)
    (tmp_path / "pca.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"such as 'pca.png'"):
        refuse_other_pictures(tmp_path)
