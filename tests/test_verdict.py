"""Laws of the verdict: worse than random is named so, level is level, and without labels there is no praise."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from ijepa_transformers.evaluation.collapse import spread_of
from ijepa_transformers.verdict import (
    ABOVE,
    BELOW,
    COLLAPSED,
    LEVEL,
    MIXED,
    NOT_COLLAPSED,
    PIXELS,
    RANDOM,
    Score,
    Spread,
    compare,
    judge,
    judge_without_labels,
    read_verdict,
    with_spread,
)


PRAISE = ("good", "healthy", "fine", "better", "well", "learned something")
NUM_IMAGES = 400
ALIVE = Spread(0.5, 20.0, 64)


def scores(knn, few_shot):
    return {"20-NN": Score(knn), "5-shot": Score(few_shot, 0.02, 5)}


def verdict(knn=0.5, few_shot=0.5, random=(0.5, 0.5), pixels=(0.5, 0.5), state=NOT_COLLAPSED):
    baselines = {RANDOM: scores(*random), PIXELS: scores(*pixels)}
    return judge("The encoder", scores(knn, few_shot), baselines, NUM_IMAGES, state)


def has_praise(text):
    text = text.lower().replace("docs/learning.md", "")
    return [word for word in PRAISE if word in text]


def test_worse_than_random_is_named_so_whatever_the_pixels_are():
    for pixels in ((0.2, 0.2), (0.5, 0.5), (0.9, 0.9)):
        found = verdict(0.4, 0.5, pixels=pixels)
        assert found.learned is False and found.standings[RANDOM] == BELOW
        assert str(found).startswith("The encoder is worse than a random encoder. Do not use its features.")
        assert not has_praise(str(found))
        assert "20-NN 0.400 is below the random encoder (0.500)" in str(found)


def test_an_encoder_below_random_on_any_measure_has_never_learned():
    """For every combination of differences to both baselines, far from and near the margins."""
    values = (0.2, 0.42, 0.44, 0.5, 0.56, 0.58, 0.8)
    for knn, few_shot, pixels in itertools.product(values, repeat=3):
        found = verdict(knn, few_shot, pixels=(pixels, pixels))
        standings = {each.standing for each in found.comparisons if each.baseline == RANDOM}
        if BELOW in standings:
            assert found.learned is False and found.standings[RANDOM] in (BELOW, MIXED)
        assert found.learned == (ABOVE in standings and BELOW not in standings)
        first = found.sentences[0]
        assert ("worse than a random encoder" in first) == (found.standings[RANDOM] == BELOW)


def test_above_random_is_named_so_with_the_place_of_the_pixels():
    below, level, above = (verdict(0.7, 0.7, pixels=(pixels, pixels)) for pixels in (0.9, 0.7, 0.5))
    assert "worse than raw pixels" in below.sentences[0] and "level with raw pixels" in level.sentences[0]
    assert above.sentences[0] == "The encoder is better than a random encoder and better than raw pixels."
    assert all(each.learned for each in (below, level, above))
    only_random = judge("The encoder", scores(0.7, 0.7), {RANDOM: scores(0.5, 0.5)}, NUM_IMAGES)
    assert only_random.learned and only_random.standings == {RANDOM: ABOVE}


def test_level_is_level_and_no_learning():
    found = verdict(0.52, 0.48)
    assert found.standings == {RANDOM: LEVEL, PIXELS: LEVEL} and found.learned is False
    assert "level with a random encoder. The labels show no learning." in str(found) and not has_praise(str(found))


def test_what_level_means_is_said_where_something_is_level():
    for found, is_said in ((verdict(0.52, 0.48), True), (verdict(0.9, 0.9, pixels=(0.1, 0.1)), False)):
        assert ("Level means" in str(found)) == is_said and "400 test images." in found.sentences[-1]


def test_few_images_are_said_to_show_only_large_differences():
    score = {"20-NN": Score(0.8)}
    for number, is_said in ((5, True), (100, True), (200, False)):
        assert ("so only large differences show" in str(judge("It", score, {RANDOM: score}, number))) == is_said


def test_many_measures_are_counted_so_a_verdict_has_at_most_four_sentences():
    measures = {f"{k}-NN": accuracy for k, accuracy in enumerate((0.7, 0.7, 0.7, 0.7, 0.5, 0.5))}
    own = {name: Score(accuracy) for name, accuracy in measures.items()}
    pixels = {**dict.fromkeys(measures, Score(0.5)), "0-NN": Score(0.9)}
    baselines = {RANDOM: dict.fromkeys(measures, Score(0.5)), PIXELS: pixels}
    found = judge("The encoder", own, baselines, NUM_IMAGES, images="images of the split 'train'")
    assert found.sentences[1:] == (
        "Beside the random encoder 4 above, 2 level (of 6 measures); beside raw pixels 3 above, 2 level, 1 below"
        " (of 6 measures).",
        "Level means a difference of at most 2 of its standard errors, here 0.071, on 400 images of the"
        " split 'train'.",
    )
    assert str(found).count(". ") + 1 <= 4 and len(found.comparisons) == 12


def test_one_measure_of_many_does_not_make_an_encoder_better_but_worse():
    others = {f"{k}-NN": Score(0.5) for k in range(1, 6)}
    for changed, standing in ((0.7, LEVEL), (0.3, BELOW)):
        found = judge("It", {**others, "1-NN": Score(changed)}, {RANDOM: others}, NUM_IMAGES)
        assert found.standings == {RANDOM: standing} and found.learned is False
        assert ("level with a random encoder on most measures" in found.sentences[0]) == (standing == LEVEL)
        assert "show no learning" not in str(found)


def test_the_margin_is_two_standard_errors_of_the_difference_from_test_images_and_draws():
    """The sampling error of 10,000 images at one half is .005."""
    error = math.hypot(0.005, 0.005)
    assert compare("", Score(0.5), "", Score(0.5), 10_000).margin == pytest.approx(2 * error, abs=1e-4)
    error = math.hypot(error, 0.1 / math.sqrt(4))
    assert compare("", Score(0.5, 0.1, 4), "", Score(0.5), 10_000).margin == pytest.approx(2 * error, abs=1e-4)
    for accuracy, standing in ((0.514, LEVEL), (0.515, ABOVE), (0.485, BELOW)):
        assert compare("", Score(accuracy), "", Score(0.5), 10_000).standing == standing
    assert compare("", Score(1.0), "", Score(2 / 3), 3).standing == LEVEL  # 3 right images of 3 prove nothing


def test_another_draw_of_random_weights_is_hardly_ever_better_than_random():
    """20-NN, 5-shot and its deviation of nine random encoders on digits, each judged beside each other one."""
    measured = (
        *((0.718, 0.646, 0.019), (0.678, 0.591, 0.048), (0.748, 0.674, 0.016), (0.760, 0.667, 0.028)),
        *((0.682, 0.613, 0.020), (0.706, 0.617, 0.017), (0.690, 0.627, 0.022), (0.744, 0.693, 0.018)),
        (0.720, 0.629, 0.039),
    )
    found = [{"20-NN": Score(knn), "5-shot": Score(few, std, 5)} for knn, few, std in measured]
    pairs = list(itertools.permutations(found, 2))
    better = [
        sum(judge("It", a, {RANDOM: change(b)}, 500).learned for a, b in pairs) for change in (dict, with_spread)
    ]
    assert better == [10, 1] and len(pairs) == 72


def test_the_margin_holds_for_two_encoders_that_are_equal():
    """Of 400 pairs of encoders that are right with the same probability, hardly any counts as above."""
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(400, 2, NUM_IMAGES, generator=generator) < 0.4
    accuracies = right.double().mean(dim=2).tolist()
    found = [compare("", Score(a), "", Score(b), NUM_IMAGES).standing for a, b in accuracies]
    assert found.count(ABOVE) / 400 < 0.05 and found.count(LEVEL) / 400 > 0.92


def test_a_collapsed_encoder_has_learned_nothing_even_above_random():
    found = verdict(0.7, 0.7, state=COLLAPSED)
    assert found.learned is False and "has collapsed" in found.sentences[0]


def test_nothing_is_judged_without_a_random_encoder():
    with pytest.raises(ValueError, match="share no measure"):
        judge("It", scores(0.5, 0.5), {PIXELS: scores(0.5, 0.5)}, NUM_IMAGES)


@pytest.mark.parametrize("rank", [1.5, 3.0, 20.0, 60.0])
@pytest.mark.parametrize("reference", [None, ALIVE])
def test_without_labels_there_is_no_praise_and_the_numbers_stand_beside_each_other(rank, reference):
    found = judge_without_labels("The encoder", Spread(0.5, rank, 64), reference, "With random weights")
    assert found.learned is None and not has_praise(str(found))
    assert "nobody can say whether its features are useful" in str(found) and f"over {rank:.1f} of 64" in str(found)
    assert ("With random weights: 50.0% and 20.0 of 64 directions." in str(found)) == (reference is not None)
    assert ("is clearly higher. Runs that learn" in str(found)) == (reference is not None and rank >= 30)
    assert ("It has collapsed" in str(found)) == (rank == 1.5)


def test_without_labels_divergence_equal_images_and_missing_features_are_said():
    nan = spread_of(torch.full((4, 3), math.nan))
    assert "diverged" in str(judge_without_labels("It", nan, None, ""))
    still = judge_without_labels("It", Spread(0.0, 1.0, 64), Spread(1e-8, 1.0, 64), "With random weights")
    assert "The images do not differ" in str(still) and still.state is None
    assert "no step moved the weights" in str(judge_without_labels("It", None, ALIVE, ""))


def test_the_file_holds_what_was_printed(tmp_path):
    found = dataclasses.replace(verdict(0.4, 0.4), advice=("Half the learning rate.",))
    assert read_verdict(tmp_path) is None
    (tmp_path / "verdict.json").write_text(json.dumps(found.as_json()))
    assert read_verdict(tmp_path) == found and found.comparisons
    assert found.as_text().splitlines() == [*found.sentences, "What to change:", "- Half the learning rate."]
    for damaged in ("{", "[]", '{"sentences": []}', '{"sentences": [], "advice": []}'):
        (tmp_path / "verdict.json").write_text(damaged)
        with pytest.raises(ValueError, match="no verdict of a run"):
            read_verdict(tmp_path)
