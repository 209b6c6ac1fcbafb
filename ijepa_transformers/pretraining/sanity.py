# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Checks before the first step whether the length of a run suits the number of its images. It only warns."""

from dataclasses import dataclass

import yaml

from ..data.notices import counted
from ..recipe_files import find_recipe
from .arguments import PretrainingArguments


# The longest recipe (stl10) sees each image 1,000 times. On digits 89 times are better than 74 (docs/pretrain.md);
# nothing was measured beyond that.
MOST_EPOCHS = 1000
# After 500 steps the features of the quickstart were hardly better than random ones: 20-NN .520 and .506
# (docs/learning.md).
TOO_FEW_STEPS = 500
# Below this size of a set it is usual to see every image at least once. The recipe medium_images goes up to it.
SMALL_SET = 100_000
# The smallest set tried here has 1,297 images (docs/pretrain.md).
FEW_IMAGES = 1000
MOST_WARMUP = 0.5  # of the run; the recipes have .07 to .13

# Recipe, most images, most pixels of a side, channels, as its header and docs/pretrain.md say. The first that fits
# is proposed.
RECIPES = (
    ("quickstart", 2_500, 32, 1),  # grey, as digits are
    ("small_images", 10_000, None, None),
    ("small_images", None, 64, None),
    ("medium_images", SMALL_SET, None, None),
    ("custom_images_single_gpu", None, None, None),
)


@dataclass(frozen=True)
class Plan:
    """What a run is going to do."""

    num_images: int
    batch_size: int
    total_steps: int
    warmup_steps: int
    image_side: int  # pixels, the longer one
    num_channels: int = 3
    is_judged: bool = False  # by labels

    @property
    def epochs(self) -> float:
        return self.total_steps * self.batch_size / self.num_images


def warnings_for(plan: Plan) -> list[str]:
    """What is unusual about the length of a run, in one or two sentences each, with what to do; mostly empty."""
    found = [*_length_warnings(plan), *_warmup_warnings(plan)]
    if plan.num_images < FEW_IMAGES:
        advice = "" if plan.is_judged else ", so compare with raw pixels and a random encoder (--validation_split)"
        found.append(f"{plan.num_images:,} images are few. Sets below {FEW_IMAGES:,} were never tried{advice}.")
    return found


def usual_steps(plan: Plan) -> int | None:
    """Steps of the run that is proposed; None if there are too few images to propose one."""
    length = proposed_length(_recipe(plan), plan.num_images)
    return length and length[0]


def _length_warnings(plan: Plan) -> list[str]:
    images = counted(plan.num_images, "image")
    steps = f"{counted(plan.total_steps, 'step')} of batch {plan.batch_size:,}"
    if plan.epochs > MOST_EPOCHS:
        return [f"{images} and {steps} = {_number(plan.epochs)} epochs, which is very many. {proposal(plan)}"]
    if plan.total_steps <= TOO_FEW_STEPS:
        return [f"{images} and {steps}: runs of up to {TOO_FEW_STEPS} steps learned little. {proposal(plan)}"]
    if plan.epochs < 1 and plan.num_images <= SMALL_SET:
        return [f"{images} and {steps} = {plan.epochs:.2f} epochs: some images are never seen. {proposal(plan)}"]
    return []


def _warmup_warnings(plan: Plan) -> list[str]:
    if plan.warmup_steps <= MOST_WARMUP * plan.total_steps:
        return []
    return [
        f"The warm-up has {plan.warmup_steps:,} of {counted(plan.total_steps, 'step')}, so the full learning rate"
        f" comes late. A tenth is usual: --warmup_steps {max(1, plan.total_steps // 10)}."
    ]


def _number(epochs: float) -> str:
    return f"{epochs:,.0f}"


def proposal(plan: Plan) -> str:
    """A recipe and a length for the images of a run, as flags."""
    name = _recipe(plan)
    length = proposed_length(name, plan.num_images)
    if length is None:
        return "Collect more images."
    steps, batch_size = length
    epochs = f"{_number(steps * batch_size / plan.num_images)} epochs of its batch {batch_size}"
    return f"A usual run for these images: --recipe {name} --max_steps {steps} ({epochs})."


def _recipe(plan: Plan) -> str:
    return proposed_recipe(plan.num_images, plan.image_side, plan.num_channels)


def proposed_recipe(num_images: int, image_side: int, num_channels: int) -> str:
    """The recipe of the package for own images of this number and size."""
    return next(
        name
        for name, most_images, most_pixels, channels in RECIPES
        if (most_images is None or num_images <= most_images)
        and (most_pixels is None or image_side <= most_pixels)
        and channels in (None, num_channels)
    )


def proposed_length(recipe: str, num_images: int) -> tuple[int, int] | None:
    """Steps and batch of a run with this recipe: its own length, unless that is too many epochs for so few images.

    None if the images do not fill one of its batches.
    """
    with open(find_recipe(recipe)) as file:
        values = yaml.safe_load(file)
    batch_size = values["batch_size"]
    if num_images < batch_size:
        return None
    return min(values["max_steps"], MOST_EPOCHS * num_images // batch_size), batch_size


def plan_of(arguments: PretrainingArguments, num_images: int, image_size: tuple[int, int], num_channels: int) -> Plan:
    """The plan of a run whose number of images is known."""
    steps_per_epoch = num_images // arguments.batch_size
    return Plan(
        num_images=num_images,
        batch_size=arguments.batch_size,
        total_steps=arguments.total_steps(steps_per_epoch),
        warmup_steps=arguments.total_warmup_steps(steps_per_epoch),
        image_side=max(image_size),
        num_channels=num_channels,
        is_judged=bool(arguments.validation_split),
    )
