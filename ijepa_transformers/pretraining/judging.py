# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The verdict at the end of a run, and what to change."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.notices import counted
from ..optimization import half_life_of_momentum
from ..verdict import (
    ABOVE,
    BELOW,
    COLLAPSED,
    PIXELS,
    RANDOM,
    WITH_RANDOM_WEIGHTS,
    Score,
    Spread,
    Verdict,
    are_equal,
    judge,
    judge_without_labels,
    state_of,
    with_spread,
)
from .evaluate import CONTEXT, NUM_DRAWS, SHOTS, TARGET
from .sanity import MOST_EPOCHS, proposal, usual_steps


if TYPE_CHECKING:
    from .build import Run


# Below this number of steps, more steps come first. In the quickstart of 23 November 2026 20-NN was .61 after 500
# steps, .75 after 1,000, .87 after 2,000 and .90 after 3,000. Of few images the usual run is shorter.
FEW_STEPS = 2000
# Below this rank, a run whose k-NN does not rise has few features (docs/pretrain.md, "If it does not learn").
LOW_RANK = 10
# From this number of values in a patch on (16 x 16 in colour), the position embeddings are hardly larger than the
# embedding of a patch with published initial weights (docs/pretrain.md).
LARGE_PATCH = 768
# docs/pretrain.md calls the context encoder clearly better from .03 on. From 74 to 89 passes over the digits, 20-NN
# rose by .02 to .04.
CLEAR_LEAD, CLEAR_RISE = 0.03, 0.02
LOWEST_RATE, HIGHEST_RATE = 5e-4, 2e-3  # learning rates of the recipes, with batches of 16 to 2,048 images
SAME = 1e-3  # rank and spread that differ by less, as a share, are those of the initial weights
LATE = 0.75  # the last quarter of a run shows whether it was still learning


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the advice depends on, beside the verdict."""

    total_steps: int
    few_steps: int  # below this number, more steps come first
    most_steps: int  # more would be too many epochs
    usual_run: str  # for the images, in a sentence
    learning_rate: float
    half_life_share: float  # of the run, within which the target encoder forgets half
    rank: float  # of the target features at the end; NaN if there are none
    patch_values: int  # numbers in a patch
    patch_embedding_init: str
    target_image_mean: float = 1.0  # share of each image's mean that stays in the targets
    context_leads: bool = False  # the context encoder is clearly better than the target encoder
    still_rising: bool = False  # k-NN clearly rose in the last quarter
    has_moved: bool = True  # the target encoder's features are no longer those of its initial weights


def verdict_of(run: "Run") -> Verdict:
    """The verdict of the whole run, on the main process. `run.rows` are the final table, if there is a probe."""
    spread, random = run.spread, run.random_spread
    if run.rows is None or run.probe is None:
        reference = WITH_RANDOM_WEIGHTS if run.arguments.init_from else "With its initial weights"
        verdict = judge_without_labels("The target encoder", spread, random, reference)
        if are_equal(random):
            return verdict
        return _with_advice(run, verdict, _facts(run, spread))
    num_images = run.probe.num_test_images
    scores = {str(row["features"]): scores_of(row) for row in run.rows}
    equal = are_equal(random) and are_equal(spread)
    state = None if spread is None or are_equal(random) else state_of(spread)
    random_scores = with_spread(scores[RANDOM]) if run.arguments.init_from else scores[RANDOM]
    baselines = {RANDOM: random_scores, PIXELS: scores[PIXELS]}
    verdict = judge("The target encoder", scores[TARGET], baselines, num_images, state, images_are_equal=equal)
    if equal:
        return verdict
    context = judge("The context encoder", scores[CONTEXT], baselines, num_images)
    facts = dataclasses.replace(
        _facts(run, spread),
        context_leads=leads(scores[CONTEXT], scores[TARGET]),
        still_rising=is_rising(run.metrics),
        has_moved=scores[TARGET] != scores[RANDOM] or has_moved(spread, random),
    )
    sentences = [*verdict.sentences]
    if f"{SHOTS}-shot" not in scores[TARGET]:
        sentences.append(f"{SHOTS}-shot is left out: a class has fewer than {SHOTS} of the labelled training images.")
    if context.standings != verdict.standings:
        sentences.append(context.sentences[0])
    return _with_advice(run, dataclasses.replace(verdict, sentences=tuple(sentences)), facts)


def _with_advice(run: "Run", verdict: Verdict, facts: Facts) -> Verdict:
    """The verdict with what to change. A short run from trained weights may still be good."""
    short_run = few_steps_told(facts) if is_short(facts) and not run.arguments.init_from else None
    advice = (*filter(None, [run.unused_labels]), *advise(verdict, facts))
    return dataclasses.replace(verdict, advice=advice, short_run=short_run)


def scores_of(row: Mapping[str, str | float]) -> dict[str, Score]:
    """The accuracies in a row of the final table, by column."""
    values = {column: float(value) for column, value in row.items() if column != "features"}
    return {
        column: Score(value, values[f"{column} std"], NUM_DRAWS) if f"{column} std" in values else Score(value)
        for column, value in values.items()
        if not column.endswith(" std")
    }


def leads(scores: Mapping[str, Score], others: Mapping[str, Score]) -> bool:
    """Whether the first encoder is clearly better than the second one, in the mean over the measures."""
    differences = [scores[name].accuracy - others[name].accuracy for name in scores]
    return sum(differences) / len(differences) >= CLEAR_LEAD


def has_moved(spread: Spread | None, initial: Spread | None) -> bool:
    """Whether rank and spread differ from those of the initial weights."""
    if spread is None or initial is None:
        return True
    pairs = (spread.effective_rank, initial.effective_rank), (spread.relative_std, initial.relative_std)
    return any(abs(now - before) > SAME * before for now, before in pairs)


def is_rising(metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the k-NN accuracy clearly rose in the last quarter of the run."""
    evaluated = [row for row in metrics if "knn_accuracy" in row]
    early = [row for row in evaluated if row["step"] <= LATE * metrics[-1]["step"]]
    if not early:
        return False
    return evaluated[-1]["knn_accuracy"] - early[-1]["knn_accuracy"] >= CLEAR_RISE


def _facts(run: "Run", spread: Spread | None) -> Facts:
    config, plan = run.config, run.plan
    return Facts(
        total_steps=plan.total_steps,
        few_steps=min(FEW_STEPS, usual_steps(plan) or FEW_STEPS),
        most_steps=int(MOST_EPOCHS * plan.num_images / plan.batch_size),
        usual_run=proposal(plan),
        learning_rate=run.arguments.learning_rate,
        half_life_share=half_life_of_momentum(run.schedules.start_momentum) / run.schedules.total_steps,
        rank=math.nan if spread is None else spread.effective_rank,
        patch_values=math.prod(config.patch_height_and_width) * config.num_channels,
        patch_embedding_init=config.patch_embedding_init,
        target_image_mean=config.target_image_mean,
    )


def advise(verdict: Verdict, facts: Facts) -> list[str]:
    """What to change, the most promising first. Empty for a run of usual length that is better than pixels and no
    longer rises.

    The cures are those of docs/pretrain.md, "If it does not learn", and docs/learning.md.
    """
    if verdict.state == COLLAPSED:
        return [f"{_lower_rate(facts)}.", *_larger_patch_embedding(facts)]
    short = is_short(facts)  # then steps come first
    advice = [f"{few_steps_told(facts)} {facts.usual_run}"] if short else []
    if not facts.has_moved and not short:
        return [
            f"The features are still those of the initial weights. {_RATES}, this run has {facts.learning_rate:g}. A"
            " momentum near 1 also keeps the target encoder as it is."
        ]
    if verdict.learned is False:
        advice += _larger_patch_embedding(facts) if short else _for_no_learning(verdict.standings[RANDOM], facts)
    if facts.context_leads and not short:
        share = min(1.0, facts.half_life_share) / 2
        advice.append(
            "The context encoder is clearly better, so the target encoder follows too slowly:"
            f" --momentum_half_life {share:.2g} (half of now)."
        )
    if verdict.learned and facts.still_rising and not short:
        advice.append(f"k-NN was still rising at the end. {_twice_the_steps(facts)}")
    if verdict.learned and verdict.standings.get(PIXELS) != ABOVE:
        advice.append(
            "Raw pixels are not worse on these images. Use both features together, fine-tune the encoder"
            " (docs/finetune.md), or train on more images."
        )
    return advice


def _for_no_learning(standing: str, facts: Facts) -> list[str]:
    """For a run of usual length that has not collapsed and is not above the random encoder."""
    advice = _larger_patch_embedding(facts)
    if standing == BELOW:
        advice.append(f"The run may have half collapsed. {_lower_rate(facts)}.")
    if facts.rank < LOW_RANK and facts.half_life_share < 0.5:
        advice.append(
            f"The rank is low ({facts.rank:.1f}), so the target encoder may follow too fast:"
            f" --momentum_half_life {2 * facts.half_life_share:.2g} (twice as much as now)."
        )
    if facts.target_image_mean < 1:
        advice.append(
            f"The targets have {facts.target_image_mean:.0%} of each image's mean. If all images show the same kind of"
            " thing, keep all of it: --target_image_mean 1."
        )
    advice.append(_twice_the_steps(facts))
    advice.append("Then patches twice as large or half as large. Small images do best with about 8 x 8 patches.")
    return advice


_RATES = f"The recipes have a --learning_rate of {LOWEST_RATE:g} to {HIGHEST_RATE:g}"


def _lower_rate(facts: Facts) -> str:
    half = facts.learning_rate / 2
    return f"Half the learning rate: --learning_rate {half:g}" if half <= HIGHEST_RATE else _RATES


def is_short(facts: Facts) -> bool:
    """Whether the run had so few steps that nothing else explains what it did not learn."""
    return facts.total_steps < facts.few_steps


def few_steps_told(facts: Facts) -> str:
    """That the run was short, in sentences."""
    steps = counted(facts.total_steps, "step")
    return f"The run had {steps}. Runs with fewer than about {FEW_STEPS:,} learn little."


def _twice_the_steps(facts: Facts) -> str:
    if 2 * facts.total_steps > facts.most_steps:
        return f"Collect more images: twice the steps would be more than {MOST_EPOCHS:,} epochs."
    return f"Twice the steps: --max_steps {2 * facts.total_steps}."


def _larger_patch_embedding(facts: Facts) -> list[str]:
    if facts.patch_embedding_init == "fan_in" or facts.patch_values >= LARGE_PATCH:
        return []
    return ["The patches are small, so the features may depend on the place only: --patch_embedding_init fan_in."]
