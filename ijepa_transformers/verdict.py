# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Decides what measured numbers say about an encoder. Pretraining, `ijepa probe` and the report all ask here.

With labels an encoder stands above, level with or below a random encoder and raw pixels. Without labels nobody can say
whether its features are useful. Then the rank and the spread of the features are all there is.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


FILE_NAME = "verdict.json"  # in the directory of a pretraining run
RANDOM, PIXELS = "random encoder", "raw pixels"  # names of the baselines
ABOVE, LEVEL, BELOW, MIXED = "above", "level", "below", "mixed"

# Two accuracies are level if they differ by at most this many standard errors of their difference. Of encoders that
# are equally good, 1 in 40 then counts as above, and fewer if they tend to be right on the same images.
STANDARD_ERRORS = 2.0
# Standard deviation of the accuracies of random encoders over their draws. On digits nine of them had .03 by 20-NN and
# by 5-shot (30 November 2026), so without it one in seven counted as better than another, on 500 test images. On
# larger images it is smaller (benchmarks/results/study_cpu_2026-11-29.md).
SPREAD_OF_DRAWS = 0.03
LARGE_MARGIN = 0.1  # a hundred test images have more; learning often is a smaller difference
MOST_MEASURES = 2  # that get a sentence each; more are counted

COLLAPSED, NARROW, NOT_COLLAPSED = "collapsed", "narrow", "not collapsed"
# An encoder has collapsed if it is below one of these. `CollapseMonitor` lists what was measured for collapsed and for
# other encoders.
STD_FLOOR, RANK_FLOOR = 0.02, 0.02
# It is narrow if it is below one of these. Runs on digits that learned were above both; half-collapsed runs had rank
# shares of .05 to .07.
NARROW_STD_FLOOR, NARROW_RANK_FLOOR = 0.1, 0.075
# It is also narrow if the share of orphans is larger than this. 1000 Gaussian images have a share of at most .001 if
# they vary in 2 to 1000 directions. If they vary in one direction, all similarities are 1 or -1, and rounding decides:
# .33 and .73 on two machines.
ORPHANS_CEILING = 0.5
# Images whose random features differ by at most this share of their size are equal: the rest is rounding of float32.
ROUNDING = 1e-6
# The rank counts as risen from this factor on. A random encoder has rank 6.4 of 64 on digits
# (benchmarks/results/evaluation_cpu_2026-11-22.md). Of the runs in docs/learning.md, the one that learned ended at
# 18.5, the one that was too short at 6.2 and the half-collapsed one at 9.0.
RISEN = 1.5


# Rank and spread
@dataclass(frozen=True)
class Spread:
    """How far the features of images differ, and in how many directions (`evaluation/collapse.py`)."""

    relative_std: float  # 0 to 1
    effective_rank: float  # 1 to highest_rank
    highest_rank: int

    def __str__(self) -> str:
        return (
            f"images differ by {self.relative_std:.1%} of the features' size, over {self.effective_rank:.1f} of"
            f" {self.highest_rank} directions"
        )


def state_of(spread: Spread, orphan_share: float = 0.0) -> str:
    """Returns "collapsed", "narrow" or "not collapsed". The last one is no praise: a random encoder has it too."""
    std, rank_share = spread.relative_std, rank_share_of(spread)
    if not math.isfinite(std) or std < STD_FLOOR or rank_share < RANK_FLOOR:
        return COLLAPSED
    if std < NARROW_STD_FLOOR or rank_share < NARROW_RANK_FLOOR or orphan_share > ORPHANS_CEILING:
        return NARROW
    return NOT_COLLAPSED


def are_equal(random: Spread | None) -> bool:
    """Whether the images themselves do not differ, by the features of an encoder with random weights."""
    return random is not None and random.relative_std <= ROUNDING


def rank_share_of(spread: Spread) -> float:
    """The effective rank as a share of its range, 0 to 1."""
    return (spread.effective_rank - 1) / max(spread.highest_rank - 1, 1)


# Accuracies
@dataclass(frozen=True)
class Score:
    """An accuracy. `std` is the standard deviation over `num_draws` draws of the labelled images, or over encoders.

    `spread` is the standard deviation over encoders of this kind, where another of them could stand here as well: over
    random encoders, if this one does not have the weights that the judged encoder began with.
    """

    accuracy: float
    std: float = 0.0
    num_draws: int = 1
    spread: float = 0.0

    def standard_error(self, num_images: int) -> float:
        """From the sampling of the test images and from the draws.

        The accuracy is moved a little towards one half (Laplace). Otherwise 3 right images of 3 would have no error.
        """
        share = (self.accuracy * num_images + 1) / (num_images + 2)
        return math.sqrt(share * (1 - share) / num_images + self.std**2 / self.num_draws)


def with_spread(scores: Mapping[str, Score], spread: float = SPREAD_OF_DRAWS) -> dict[str, Score]:
    """The accuracies of a random encoder that was drawn for itself, by measure."""
    return {measure: dataclasses.replace(score, spread=spread) for measure, score in scores.items()}


@dataclass(frozen=True)
class Comparison:
    """An encoder beside a baseline, on one measure. Differences up to `margin` are level."""

    measure: str
    baseline: str
    accuracy: float
    baseline_accuracy: float
    margin: float

    @property
    def standing(self) -> str:
        """Where the encoder stands."""
        difference = self.accuracy - self.baseline_accuracy
        if abs(difference) <= self.margin:
            return LEVEL
        return ABOVE if difference > 0 else BELOW

    @property
    def in_words(self) -> str:
        """Such as "below raw pixels"."""
        return f"{_IN_A_SENTENCE.get(self.standing, self.standing)} {_IN_A_SENTENCE[self.baseline]}"


def compare(measure: str, score: Score, baseline: str, other: Score, num_images: int) -> Comparison:
    """Compares two accuracies. The margin is `STANDARD_ERRORS` of their difference, as of independent ones."""
    errors = score.standard_error(num_images), other.standard_error(num_images), other.spread
    margin = STANDARD_ERRORS * math.hypot(*errors)
    return Comparison(measure, baseline, score.accuracy, other.accuracy, margin)


def standing_over(comparisons: Sequence[Comparison]) -> str:
    """Where an encoder stands over all measures.

    "above" needs half of the measures, and none below. One measure is enough for "below". So an encoder that is worse
    on any measure is never called above.
    """
    standings = [comparison.standing for comparison in comparisons]
    if BELOW in standings:
        return MIXED if ABOVE in standings else BELOW
    return ABOVE if 2 * standings.count(ABOVE) >= len(standings) else LEVEL


_IN_A_SENTENCE = {RANDOM: "the random encoder", PIXELS: "raw pixels", LEVEL: "level with"}


# The verdict
@dataclass(frozen=True)
class Verdict:
    """What the numbers say, in sentences, with what they were made from.

    Attributes:
        learned: whether the labels show that something was learned; None without labels.
        standings: baseline -> "above", "level", "below" or "mixed".
        state: "collapsed", "narrow" or "not collapsed"; None if it was not measured.
        num_test_images: labelled images that the accuracies are measured on.
        short_run: that the run had too few steps to learn much, in sentences; None if it had enough.
    """

    sentences: tuple[str, ...]
    learned: bool | None = None
    standings: dict[str, str] = dataclasses.field(default_factory=dict)
    state: str | None = None
    comparisons: tuple[Comparison, ...] = ()
    num_test_images: int | None = None
    advice: tuple[str, ...] = ()
    short_run: str | None = None

    @property
    def doubt(self) -> str | None:
        """Why the features tell little; None if nothing here speaks against them."""
        if self.learned is False:
            return self.sentences[0]
        if self.state == COLLAPSED:
            return HAS_COLLAPSED.format("The target encoder")
        return None if self.learned else self.short_run

    def __str__(self) -> str:
        return " ".join(self.sentences)

    def as_text(self) -> str:
        """For a terminal: a line for each sentence."""
        return text_of(self.sentences, self.advice)

    def as_markdown(self) -> str:
        """The sentences, and below them what to change."""
        return "\n\n".join([str(self), *(["What to change:", _as_list(self.advice)] if self.advice else [])])

    def as_json(self) -> dict[str, Any]:
        """The content of verdict.json."""
        comparisons = [{**dataclasses.asdict(each), "standing": each.standing} for each in self.comparisons]
        lists = {"sentences": list(self.sentences), "advice": list(self.advice), "comparisons": comparisons}
        return {**dataclasses.asdict(self), **lists}


def text_of(sentences: Sequence[str], advice: Sequence[str]) -> str:
    """The sentences and the advice of a verdict, for a terminal: a line for each."""
    return "\n".join([*sentences, *(["What to change:", _as_list(advice)] if advice else [])])


def _as_list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


HAS_COLLAPSED = "{} has collapsed: its features hardly depend on the image."
_BESIDE_RANDOM = {
    BELOW: "{} is worse than a random encoder. Do not use its features.",
    MIXED: "{} is better than a random encoder on one measure and worse on another. That shows no clear learning.",
    LEVEL: "{} is level with a random encoder. The labels show no learning.",
}
_BESIDE_PIXELS = {
    BELOW: "{} is better than a random encoder and worse than raw pixels. It has learned something, but the pixels"
    " themselves tell more about the classes.",
    MIXED: "{} is better than a random encoder. It is better than raw pixels on one measure and worse on another.",
    LEVEL: "{} is better than a random encoder and level with raw pixels.",
    ABOVE: "{} is better than a random encoder and better than raw pixels.",
}


def judge(
    name: str,
    scores: Mapping[str, Score],
    baselines: Mapping[str, Mapping[str, Score]],
    num_images: int,
    state: str | None = None,
    images: str = "test images",
    images_are_equal: bool = False,
) -> Verdict:
    """The verdict on an encoder whose accuracies on labelled images are known. At most four sentences on a living one.

    Args:
        name: of the encoder, to begin a sentence with.
        scores: measure -> accuracy.
        baselines: name -> accuracies. Only `RANDOM` and `PIXELS` decide; the former must be there.
        num_images: labelled test images.
        state: of `state_of`, if it was measured.
        images: what these images are called.
        images_are_equal: `are_equal` of a random encoder and of this one.

    Raises:
        ValueError: if the encoder and the random encoder share no measure.
    """
    comparisons = [
        compare(measure, score, baseline, baselines[baseline][measure], num_images)
        for measure, score in scores.items()
        for baseline in (RANDOM, PIXELS)
        if measure in baselines.get(baseline, {})
    ]
    by_baseline = {key: [each for each in comparisons if each.baseline == key] for key in (RANDOM, PIXELS)}
    if not by_baseline[RANDOM]:
        raise ValueError(f"{name} and the random encoder share no measure, so nothing can be judged.")
    standings = {key: standing_over(found) for key, found in by_baseline.items() if found}
    is_collapsed = state == COLLAPSED
    sentences = [
        *([IMAGES_ARE_EQUAL] if images_are_equal else []),
        *([HAS_COLLAPSED.format(name)] if is_collapsed else []),
        _headline(name, standings, by_baseline[RANDOM]),
        *_measure_sentences(comparisons),
        _rule([each for each in comparisons if each.standing == LEVEL], f"{num_images:,} {images}"),
    ]
    learned = standings[RANDOM] == ABOVE and not is_collapsed
    return Verdict(tuple(sentences), learned, standings, state, tuple(comparisons), num_images)


def _headline(name: str, standings: Mapping[str, str], beside_random: Sequence[Comparison]) -> str:
    if standings[RANDOM] == LEVEL and any(each.standing == ABOVE for each in beside_random):
        return f"{name} is level with a random encoder on most measures. That shows no clear learning."
    if standings[RANDOM] != ABOVE:
        return _BESIDE_RANDOM[standings[RANDOM]].format(name)
    if PIXELS not in standings:
        return f"{name} is better than a random encoder."
    return _BESIDE_PIXELS[standings[PIXELS]].format(name)


def _measure_sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence for each measure. If there are many, one for all, because the table has the numbers."""
    measures = list(dict.fromkeys(each.measure for each in comparisons))
    if len(measures) > MOST_MEASURES:
        return [_count_sentence(comparisons)]
    sentences = []
    for measure in measures:
        found = [each for each in comparisons if each.measure == measure]
        beside = [f"{each.in_words} ({each.baseline_accuracy:.3f})" for each in found]
        sentences.append(f"{measure} {found[0].accuracy:.3f} is {' and '.join(beside)}.")
    return sentences


def _count_sentence(comparisons: Sequence[Comparison]) -> str:
    """How many measures are above, level with and below each baseline."""
    parts = []
    for baseline in dict.fromkeys(each.baseline for each in comparisons):
        standings = [each.standing for each in comparisons if each.baseline == baseline]
        counts = [f"{standings.count(each)} {each}" for each in (ABOVE, LEVEL, BELOW) if each in standings]
        parts.append(f"beside {_IN_A_SENTENCE[baseline]} {', '.join(counts)} (of {len(standings)} measures)")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _rule(level: Sequence[Comparison], images: str) -> str:
    """The number of test images, and what level means if something is level."""
    if not level:
        return f"All this is on {images}."
    least, most = (function(each.margin for each in level) for function in (min, max))
    margins = f"{least:.3f}" if f"{least:.3f}" == f"{most:.3f}" else f"{least:.3f} to {most:.3f}"
    errors = f"{STANDARD_ERRORS:g} of its standard errors, here {margins}"
    few = ", so only large differences show" if most > LARGE_MARGIN else ""
    return f"Level means a difference of at most {errors}, on {images}{few}."


def judge_without_labels(name: str, spread: Spread | None, reference: Spread | None, reference_name: str) -> Verdict:
    """What rank and spread say. They cannot say whether the features are useful, and neither does the verdict.

    Args:
        name: of the encoder, to begin a sentence with.
        spread: None if there are no features, because no step moved the weights.
        reference: of an encoder with random weights, or of the same run at its start; None if not measured.
        reference_name: what the reference is, to begin a sentence with.
    """
    unknown = f"{name} was not judged by labels, so nobody can say whether its features are useful."
    if spread is None:
        return Verdict((unknown, "There are no features to measure, because no step moved the weights."))
    if not math.isfinite(spread.relative_std):
        return Verdict((unknown, "Its features hold NaN or infinity, so training has diverged."), state=COLLAPSED)
    if are_equal(reference):
        return Verdict((unknown, IMAGES_ARE_EQUAL))
    state = state_of(spread)
    sentences = [unknown, f"What the numbers say: {spread}."]
    if reference is not None:
        directions = f"{reference.effective_rank:.1f} of {reference.highest_rank} directions"
        sentences.append(f"{reference_name}: {reference.relative_std:.1%} and {directions}.")
        if state != COLLAPSED:
            has_risen = spread.effective_rank >= RISEN * reference.effective_rank
            sentences.append(_RANK_SENTENCES[has_risen])
    sentences.append(_STATE_SENTENCES[state])
    return Verdict((*sentences, _LABELS_WOULD_TELL), state=state)


WITH_RANDOM_WEIGHTS = "With random weights"  # name of a reference
IMAGES_ARE_EQUAL = (
    "The images do not differ, so their features are equal with any weights. That shows neither learning nor a"
    " collapse."
)
_STATE_SENTENCES = {
    COLLAPSED: HAS_COLLAPSED.format("It"),
    NARROW: "The features are narrow: images differ in few ways.",
    NOT_COLLAPSED: "It has not collapsed. An encoder with random weights has not either.",
}
_RANK_SENTENCES = {
    True: "So the rank (the number of directions) is clearly higher. Runs that learn show this, but it proves"
    " nothing.",
    False: "So the rank (the number of directions) is not clearly higher. The runs in docs/learning.md whose rank did"
    " not rise had learned little or nothing.",
}
_LABELS_WOULD_TELL = "A few hundred labelled images would tell."


def read_verdict(directory: Path) -> Verdict | None:
    """The verdict that a pretraining run left in its directory; None if there is none.

    Raises:
        ValueError: if the file is not one that a run writes.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        sentences, advice = (tuple(str(line) for line in content[key]) for key in ("sentences", "advice"))
        if not sentences:
            raise ValueError("it has no sentences")
        return Verdict(
            sentences,
            content.get("learned"),
            dict(content.get("standings") or {}),
            content.get("state"),
            tuple(map(_comparison_of, content.get("comparisons") or ())),
            content.get("num_test_images"),
            advice,
            content.get("short_run"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no verdict of a run: {error}") from error


def _comparison_of(values: Mapping[str, Any]) -> Comparison:
    """A comparison in verdict.json, which also has the standing."""
    return Comparison(**{entry.name: values[entry.name] for entry in dataclasses.fields(Comparison)})
