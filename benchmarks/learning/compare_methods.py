# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""I-JEPA beside other ways to an encoder of the same size, at equal steps and at equal time.

    python benchmarks/learning/compare_methods.py --recipe quickstart --output_dir DIRECTORY
        [--seeds 0 1 2] [--methods METHOD ...] [--steps N] [--jobs 2] [--threads 1] [--data OTHER ...]

The recipe is ours; words that are not listed by `--help` are flags of `run_pretraining.py`, laid over it. It gives all
methods their images and crops, image and patch size, width and depth, batch, number of steps and warm-up (`--steps`
makes the run longer or shorter, the warm-up with it) and learning rate:

    raw pixels, random encoder      of images shrunk to at most 32 x 32; with the weights that ours starts from
    published I-JEPA                `run_pretraining.py` with the settings of the table PUBLISHED
    ours                            `run_pretraining.py` with the recipe
    MAE                             `ViTMAEForPreTraining` of Transformers, its decoder of the predictor's sizes, both
                                    position tables filled (Transformers 5.x leaves them at zero)
    supervised                      `IJepaForImageClassification` from scratch on the labels of the training images

Nothing is tuned for the other methods: MAE and the supervised classifier take the recipe's learning rate, with the
weight decay and betas usual for them, the published method its own settings. Another rate for one of them is another
call: `--methods "MAE, equal steps" --learning_rate 2e-3`, into a directory of its own.

The other methods take as many steps as ours ("equal steps") and as many as they can in the time of ours ("equal
time"). How long a step takes is measured first, on random pixels and in turns: in processor time of one thread, on a
GPU in wall time. Loading images is left out of it: where that takes time as well, the method with the cheaper step
gets more steps than wall time would give it.

Encoders are judged by the mean of their patch tokens after the last norm: k-NN, logistic regression on 5 images of
each class (20 draws) and on all, on at most `--max_probe_images` labelled images of each split, those that the
probe of `run_pretraining.py` takes. Of I-JEPA both encoders are judged.

Every run is a process of its own. It becomes a line of `results.jsonl` in the output directory, and is not repeated if
it is there; a run that fails is a line too. The table is written to `table.md`; the last line printed is one JSON
object.
"""

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, Subset
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.learning.experiment_grid import error_of, rows_of_all, spread, with_threads
from benchmarks.speed.timing import environment, median_seconds, stepper
from ijepa_transformers import IJepaConfig, IJepaForImageClassification, IJepaForPretraining, IJepaModel
from ijepa_transformers.data.datasets import EvaluationImages, PretrainingImages
from ijepa_transformers.data.order import PretrainingBatchSampler
from ijepa_transformers.data.sources import labels_of, load_image_dataset
from ijepa_transformers.data.transforms import default_image_statistics, normalize_pixel_values
from ijepa_transformers.evaluation.collapse import effective_rank
from ijepa_transformers.evaluation.probes import (
    class_indices,
    extract_features,
    few_shot_accuracy,
    knn_accuracy,
    logistic_regression_accuracy,
    standardize,
)
from ijepa_transformers.execution import choose_attention, configure, set_matmul_precision
from ijepa_transformers.masking import build_masking
from ijepa_transformers.modeling_ijepa import sincos_position_embeddings
from ijepa_transformers.optimization import Schedules, build_optimizer, parameter_places
from ijepa_transformers.pretraining.arguments import OutputArguments, PretrainingArguments, parse_pretraining_arguments


REPOSITORY = Path(__file__).resolve().parents[2]

# The released settings (paper and code), laid over the recipe for "published I-JEPA". Architecture, images, crops,
# batch, steps, warm-up and learning rate stay the recipe's: the published rate belongs to batches of 2048 images, and
# the published sizes to other encoders. None is the command's own default.
PUBLISHED = {
    "patch_embedding_init": "published",  # std 0.02, whatever a patch holds
    "linear_init": "published",  # the same deviation
    "mask_mode": "meta",  # the released sampler with its quirks
    "visible_share": 0.3,  # this and the next do nothing in this mode, so they must have their defaults
    "visible_aspect_ratio": [0.66, 1.5],
    "num_targets": 4,
    "target_scale": [0.15, 0.2],
    "target_aspect_ratio": [0.75, 1.5],
    "num_contexts": 1,
    "context_scale": [0.85, 1.0],
    "min_patches": 10,  # or as many as the sampler can give on a small grid: see `published`
    "allow_overlap": False,  # targets are taken out of the context
    "num_context_tokens": None,  # lists are cut to the shortest of the batch
    "num_target_tokens": None,
    "drop_path_rate": 0.0,
    "loss_type": "smooth_l1",  # of the code; the paper writes the squared distance
    "target_normalization": "layer",
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,  # rises along a cosine
    "momentum": 0.996,
    "momentum_half_life": None,  # the other way to say it
    "final_momentum": 1.0,  # rises linearly over all steps
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": None,  # nothing is clipped
}
# Of these the other methods read some too; the rest does not concern them, so it may change without a new run.
SHARED = {"patch_embedding_init", "linear_init", "drop_path_rate", "adam_beta1", "adam_beta2", "adam_epsilon"}
UNSEEN = {field.name for field in dataclasses.fields(OutputArguments)} | {"seed", "num_workers"}

# As published for MAE (arXiv 2111.06377, table 8), and usual for Vision Transformers that learn from labels.
MASK_RATIO, MAE_BETAS, WEIGHT_DECAY = 0.75, (0.9, 0.95), 0.05

PUBLISHED_IJEPA = "published I-JEPA"
METHODS = (
    *("raw pixels", "random encoder", "ours"),
    *(f"{kind}, equal {budget}" for kind in (PUBLISHED_IJEPA, "MAE", "supervised") for budget in ("steps", "time")),
)
STEP_TIME = "seconds per step"  # is measured like a method
NEIGHBORS, SHOTS, DRAWS = 20, 5, 20
PIXELS_SIDE = 32  # of raw pixels, as in the pretraining command's table
RANK_IMAGES = 2000  # of which the effective rank is taken, or it would be most of the work
COLUMNS = {f"{NEIGHBORS}-NN": "knn", f"{SHOTS}-shot": "shot5", "linear": "linear", "effective rank": "effective_rank"}

Embedding = Callable[[torch.Tensor], torch.Tensor]  # normalised pixels (B, C, H, W) to features (B, D)


# ------------------------------------------------------------------------------------------------------------- recipe


def check(arguments: PretrainingArguments) -> None:
    """Raises ValueError for a recipe whose training the other methods could not repeat."""
    if arguments.streaming or arguments.init_from:
        raise ValueError("a comparison needs images of random access and random weights: no streaming, no init_from.")
    if arguments.mixed_precision == "fp16":
        raise ValueError("mixed_precision fp16 is not compared: take bf16 or no.")
    if arguments.batch_size % arguments.images_per_pass:
        raise ValueError(
            f"batch_size {arguments.batch_size} is not a multiple of per_device_batch_size"
            f" {arguments.per_device_batch_size}."
        )
    if not arguments.validation_split:
        raise ValueError("the recipe names no validation_split, so nothing could be judged.")


def total_steps(arguments: PretrainingArguments) -> int:
    return arguments.total_steps(0 if arguments.max_steps else steps_per_epoch(arguments))


def steps_per_epoch(arguments: PretrainingArguments) -> int:
    return len(open_split(arguments, arguments.data, arguments.train_split)) // arguments.batch_size


def with_steps(arguments: PretrainingArguments, steps: int) -> PretrainingArguments:
    """The recipe made longer or shorter; the warm-up remains the same share of the run."""
    in_epochs = arguments.max_steps is None or arguments.warmup_epochs is not None
    per_epoch = steps_per_epoch(arguments) if in_epochs else 0
    share = arguments.total_warmup_steps(per_epoch) / arguments.total_steps(per_epoch)
    lengths = {"max_steps": steps, "warmup_steps": round(share * steps)}
    return dataclasses.replace(arguments, epochs=None, warmup_epochs=None, **lengths)


def published(arguments: PretrainingArguments) -> PretrainingArguments:
    """The recipe with the published method. On grids below 9 x 9 its sampler looks in vain, for ever, for targets of
    more than 10 patches; there the largest number is taken that it can give."""
    changed = dataclasses.replace(arguments, **PUBLISHED)
    grid, fields = IJepaConfig(**changed.model_fields()).grid_size, changed.mask_fields()
    counts = range(PUBLISHED["min_patches"], 0, -1)
    possible = (count for count in counts if can_mask(grid, {**fields, "min_patches": count}))
    return dataclasses.replace(changed, min_patches=next(possible, PUBLISHED["min_patches"]))


def can_mask(grid: tuple[int, int], fields: dict) -> bool:
    try:
        build_masking(grid, **fields)
    except ValueError:
        return False
    return True


def precision_of(arguments: PretrainingArguments) -> str:
    return arguments.mixed_precision or "no"


def config_of(arguments: PretrainingArguments, **more) -> IJepaConfig:
    return IJepaConfig(**arguments.model_fields(), **more)


def statistics_of(arguments: PretrainingArguments) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel."""
    mean, std = default_image_statistics(config_of(arguments).num_channels)
    return arguments.image_mean or mean, arguments.image_std or std


# --------------------------------------------------------------------------------------------------------------- data


def open_split(arguments: PretrainingArguments, source: str, split: str):
    is_data = source == arguments.data  # else the settings are those of other data
    return load_image_dataset(
        source,
        split=split,
        config_name=arguments.data_config if is_data else None,
        image_column=arguments.image_column if is_data else None,
        label_column=arguments.label_column if is_data else None,
    )


def training_loader(arguments: PretrainingArguments, dataset, steps: int) -> DataLoader:
    """The crops of `run_pretraining.py` in its order."""
    config = config_of(arguments)
    images = PretrainingImages(
        dataset,
        config.image_height_and_width,
        num_channels=config.num_channels,
        crop_scale=tuple(arguments.crop_scale),
        crop_ratio=tuple(arguments.crop_ratio),
        horizontal_flip=arguments.horizontal_flip,
        interpolation=arguments.interpolation,
        fast_large_photos=arguments.fast_large_photos,
        seed=arguments.seed,
    )
    sampler = PretrainingBatchSampler(
        len(dataset),
        arguments.per_device_batch_size,
        total_steps=steps,
        seed=arguments.seed,
        accumulation_steps=arguments.batch_size // arguments.per_device_batch_size,
    )
    return DataLoader(images, batch_sampler=sampler, **loader_settings(arguments))


def loader_settings(arguments: PretrainingArguments) -> dict:
    return {
        "num_workers": arguments.num_workers,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # or starting the workers draws from the generator that training uses
    }


def training_batches(loader: DataLoader, arguments, labels: torch.Tensor | None, device: str) -> Iterator[tuple]:
    """Normalised pixels (B, C, H, W) and, if there are `labels` of all images, those of the images in the batch."""
    statistics = statistics_of(arguments)
    for batch in loader:
        pixel_values = normalize_pixel_values(batch["pixel_values"].to(device, non_blocking=True), *statistics)
        seen = None if labels is None else (batch["index"] + batch["num_bad"]) % len(labels)  # past bad images
        yield pixel_values, None if seen is None else labels[seen].to(device)


def probe_loaders(arguments: PretrainingArguments, max_images: int) -> list[DataLoader]:
    """Evaluation views of labelled images of both splits, those of the pretraining command's probe."""
    config, source = config_of(arguments), arguments.validation_data or arguments.data
    loaders = []
    for split in (arguments.train_split, arguments.validation_split):
        dataset = open_split(arguments, source, split)
        images = EvaluationImages(
            dataset, config.image_height_and_width, config.num_channels, arguments.eval_resize_ratio
        )
        chosen = Subset(images, labelled_images(dataset, split, max_images))
        size, settings = arguments.per_device_batch_size, loader_settings(arguments)
        loaders.append(DataLoader(chosen, batch_size=size, **settings))
    return loaders


def labelled_images(dataset, split: str, max_images: int) -> list[int]:
    """Sorted indices of at most that many labelled images, drawn at random but always the same."""
    if "label" not in dataset.column_names:
        raise ValueError(f"a comparison needs labels, but the {split!r} split has none.")
    labelled = (torch.as_tensor(labels_of(dataset)) >= 0).nonzero().flatten()  # -1 means unlabelled
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))
    return labelled[order[:max_images]].sort().values.tolist()


def training_labels(dataset) -> tuple[object, torch.Tensor]:
    """The images that have a label, and their classes as 0, 1, ... in the order of the labels."""
    chosen = labelled_images(dataset, "training", len(dataset))
    labels = torch.as_tensor(labels_of(dataset))[chosen]
    return dataset.select(chosen), class_indices(labels, labels)


# --------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Probe:
    """What every encoder is judged by."""

    loaders: list[DataLoader]
    statistics: tuple[list[float], list[float]]
    device: str

    def features(self, embed: Embedding, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
        def of_pixels(pixel_values):
            return embed(normalize_pixel_values(pixel_values, *self.statistics))

        return extract_features(of_pixels, loader, self.device)


def evaluate(embed: Embedding, probe: Probe) -> dict[str, float | None]:
    """Accuracies and effective rank of what `embed` makes of the probe's images."""
    (train, train_labels), (test, test_labels) = (probe.features(embed, loader) for loader in probe.loaders)
    rank = effective_rank(test[:: math.ceil(len(test) / RANK_IMAGES)])  # spread over the split, which may be sorted
    train, test = standardize(train, test)
    labelled = train, train_labels, test, test_labels
    has_shots = train_labels.unique(return_counts=True)[1].min() >= SHOTS
    return {
        "knn": knn_accuracy(*labelled, k=min(NEIGHBORS, len(train))),
        "shot5": few_shot_accuracy(*labelled, shots=SHOTS, num_draws=DRAWS).mean if has_shots else None,
        "linear": logistic_regression_accuracy(*labelled),
        "effective_rank": rank,
    }


def pixel_features(pixel_values: torch.Tensor) -> torch.Tensor:
    return adaptive_avg_pool2d(pixel_values, [min(side, PIXELS_SIDE) for side in pixel_values.shape[2:]]).flatten(1)


def embedding_of(encoder: IJepaModel, device: str) -> Embedding:
    encoder = encoder.to(device).eval()
    configure(encoder, device, "no")
    return lambda pixel_values: encoder(pixel_values).pooler_output


def mae_encoder(trained: ViTMAEForPreTraining) -> ViTMAEModel:
    """The trained encoder with nothing masked."""
    settings = {**trained.config.to_dict(), "mask_ratio": 0.0}
    encoder = ViTMAEModel._from_config(ViTMAEConfig.from_dict(settings))
    encoder.load_state_dict(trained.vit.state_dict())
    return encoder.eval()


def mae_features(encoder: ViTMAEModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Mean of the patch tokens after the last norm, without the class token."""
    num_patches = encoder.embeddings.patch_embeddings.num_patches
    in_order = torch.arange(num_patches, device=pixel_values.device).float().expand(len(pixel_values), -1)
    return encoder(pixel_values, noise=in_order).last_hidden_state[:, 1:].mean(dim=1)


# ---------------------------------------------------------------------------------------------- MAE and the supervised


@dataclass(frozen=True)
class Learner:
    """A model that is trained here: `loss_of` takes normalised pixels (B, C, H, W) and labels (B,) or None."""

    model: torch.nn.Module
    loss_of: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    betas: tuple[float, float]


def mae(arguments: PretrainingArguments, device: str) -> Learner:
    """MAE with our encoder's sizes, and a decoder of our predictor's."""
    config = config_of(arguments)
    (height, width), patch = config.image_height_and_width, config.patch_height_and_width
    if height != width or patch[0] != patch[1] or height % patch[0]:
        raise ValueError(
            f"MAE of Transformers takes square images of whole square patches, got image_size {config.image_size} and"
            f" patch_size {config.patch_size}."
        )
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    shared_too = ("num_channels", "layer_norm_eps", "initializer_range", "hidden_act")
    theirs = ViTMAEConfig(
        **{name: getattr(config, name) for name in (*shared, *shared_too)},
        **{f"decoder_{name}": getattr(config, f"predictor_{name}") for name in shared},
        image_size=height,
        patch_size=patch[0],
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
    )
    model = built(ViTMAEForPreTraining, theirs, arguments, device)
    initialize_mae(model)
    return Learner(model, lambda pixel_values, labels: model(pixel_values).loss, MAE_BETAS)


@torch.no_grad()
def initialize_mae(model: ViTMAEForPreTraining) -> None:
    """Sets the initial values that the MAE paper names (arXiv 2111.06377, appendix A.1).

    In Transformers 5.x a new `ViTMAEForPreTraining` has zeros in both frozen position tables, so its encoder and its
    decoder do not know where a patch is. Here both tables get sine-cosine positions and the class token's place stays
    zero. The weights of linear layers and of the patch embedding are Xavier uniform, a patch seen as one flat vector;
    both tokens are normal with the configuration's deviation.
    """
    embeddings, decoder = model.vit.embeddings, model.decoder
    side = math.isqrt(embeddings.patch_embeddings.num_patches)
    for positions in (embeddings.position_embeddings, decoder.decoder_pos_embed):
        positions[:, :1] = 0
        positions[:, 1:] = sincos_position_embeddings(positions.shape[-1], (side, side))
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    for token in (embeddings.cls_token, decoder.mask_token):
        torch.nn.init.normal_(token, std=model.config.initializer_range)


def supervised(arguments: PretrainingArguments, device: str, num_classes: int) -> Learner:
    if num_classes < 2:
        raise ValueError(f"learning from labels needs at least 2 classes, got {num_classes}.")
    config = config_of(arguments, num_labels=num_classes)
    model = built(IJepaForImageClassification, config, arguments, device)
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return Learner(model, lambda pixel_values, labels: cross_entropy(model(pixel_values).logits, labels), betas)


def built(model_class: type, config, arguments: PretrainingArguments, device: str) -> torch.nn.Module:
    """A model to be trained, with the attention of ours.

    It is asked for from the start, because MAE's decoder keeps the one that it is born with. With the fused one, and
    matrix products by oneDNN, a step on digits took three times as long on a CPU.
    """
    precision = precision_of(arguments)
    set_matmul_precision(device, precision)
    attention = choose_attention(device, precision)
    return model_class._from_config(config, attn_implementation=attention).to(device).train()


def optimizer_of(learner: Learner, arguments: PretrainingArguments, device: str) -> torch.optim.Optimizer:
    """AdamW as for I-JEPA: no weight decay on biases and norms."""
    places, parameters = parameter_places(learner.model, layer_decay=1.0), dict(learner.model.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name, place in places.items() if place[1] == decayed],
            "decayed": decayed,
            "weight_decay": 0.0,  # set by the schedules
        }
        for decayed in (True, False)
    ]
    return build_optimizer(
        groups,
        name="adamw",
        learning_rate=arguments.learning_rate,
        betas=learner.betas,
        epsilon=arguments.adam_epsilon,
        device_type=device,
    )


def schedules_of(arguments: PretrainingArguments) -> Schedules:
    """Of a recipe whose length is in steps."""
    return Schedules(
        total_steps=arguments.max_steps,
        warmup_steps=arguments.warmup_steps,
        start_learning_rate=arguments.start_learning_rate,
        peak_learning_rate=arguments.learning_rate,
        final_learning_rate=arguments.final_learning_rate,
        start_weight_decay=WEIGHT_DECAY,
        final_weight_decay=WEIGHT_DECAY,
    )


def take_step(learner: Learner, optimizer, batches: Iterator[tuple], arguments, device: str) -> torch.Tensor:
    """One update from as many forward passes as the batch needs; returns the mean loss, still on the device."""
    passes, total = arguments.batch_size // arguments.per_device_batch_size, 0.0
    for pixel_values, labels in itertools.islice(batches, passes):
        with torch.autocast(device, torch.bfloat16, enabled=precision_of(arguments) == "bf16"):
            loss = learner.loss_of(pixel_values, labels) / passes
        loss.backward()
        total = total + loss.detach()
    if arguments.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(learner.model.parameters(), arguments.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def train(learner: Learner, arguments: PretrainingArguments, dataset, labels, device: str) -> dict[str, float]:
    """Trains for the steps of the recipe; returns the mean loss of the last ones, and wall seconds."""
    schedules, optimizer = schedules_of(arguments), optimizer_of(learner, arguments, device)
    losses = deque(maxlen=arguments.logging_steps)
    began = time.perf_counter()
    loader = training_loader(arguments, dataset, schedules.total_steps)
    batches = training_batches(loader, arguments, labels, device)
    for number in range(schedules.total_steps):
        schedules.apply(optimizer, number)
        losses.append(take_step(learner, optimizer, batches, arguments, device))
    return {"loss": torch.stack(list(losses)).mean().item(), "seconds": time.perf_counter() - began}


def run_mae(arguments: PretrainingArguments, probe: Probe) -> dict:
    dataset = open_split(arguments, arguments.data, arguments.train_split)
    learner = mae(arguments, probe.device)
    row = train(learner, arguments, dataset, None, probe.device)
    encoder = mae_encoder(learner.model).to(probe.device)
    configure(encoder, probe.device, "no")
    return {**row, **evaluate(lambda pixel_values: mae_features(encoder, pixel_values), probe)}


def run_supervised(arguments: PretrainingArguments, probe: Probe) -> dict:
    dataset, labels = training_labels(open_split(arguments, arguments.data, arguments.train_split))
    learner = supervised(arguments, probe.device, int(labels.max()) + 1)
    row = train(learner, arguments, dataset, labels, probe.device)
    embed, names = embedding_of(learner.model.ijepa, probe.device), torch.as_tensor(labels_of(dataset))
    accuracy = own_accuracy(lambda pixel_values: learner.model.classifier(embed(pixel_values)), names, probe)
    return {**row, **evaluate(embed, probe), "own_accuracy": accuracy}


def own_accuracy(logits_of: Embedding, train_labels: torch.Tensor, probe: Probe) -> float:
    """Of the classifier itself, on the test images."""
    logits, labels = probe.features(logits_of, probe.loaders[1])
    return (logits.argmax(dim=1) == class_indices(train_labels, labels)).double().mean().item()


# ------------------------------------------------------------------------------------------------------------- I-JEPA


def run_ijepa(arguments: PretrainingArguments, probe: Probe) -> dict:
    """What `run_pretraining.py` makes of the recipe, without evaluations in between; both encoders are judged."""
    with tempfile.TemporaryDirectory() as directory:
        recipe, output_dir = Path(directory) / "recipe.yaml", Path(directory) / "run"
        changes = {"validation_split": None, "eval_steps": None, "save_steps": arguments.max_steps, "trackers": []}
        plain = {"output_dir": str(output_dir), "push_to_hub": False, "hub_model_id": None, "resume": False}
        plain["mixed_precision"] = precision_of(arguments)  # whatever Accelerate is set to: as for the others
        dataclasses.replace(arguments, **changes, **plain).save(recipe)
        pretrain(recipe)
        metrics = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
        networks = IJepaForPretraining.from_pretrained(output_dir)
    context = evaluate(embedding_of(networks.context_encoder, probe.device), probe)
    return {
        "loss": metrics[-1]["loss"],
        "seconds": training_seconds(metrics, arguments.batch_size),
        "collapsed": metrics[-1]["collapsing"],
        **evaluate(embedding_of(networks.ijepa, probe.device), probe),
        **{f"context_{name}": value for name, value in context.items()},
    }


def pretrain(recipe: Path) -> None:
    """Runs `run_pretraining.py` as users do; raises RuntimeError with its last words if it fails."""
    command = [sys.executable, str(REPOSITORY / "run_pretraining.py"), "--recipe", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(error_of(done)[0])


def training_seconds(metrics: list[dict], batch_size: int) -> float:
    """Wall seconds of the steps, without start and export."""
    steps = [0, *(row["step"] for row in metrics)]
    pairs = zip(itertools.pairwise(steps), metrics, strict=True)
    return sum((after - before) * batch_size / row["images_per_second"] for (before, after), row in pairs)


# ------------------------------------------------------------------------------------------------------------ one run


def run(method: str, arguments: PretrainingArguments, max_probe_images: int, device: str) -> dict:
    """What came of a method, in the process that is its own."""
    set_matmul_precision(device, precision_of(arguments))
    if method == STEP_TIME:
        return {"seconds_per_step": seconds_per_step(arguments, device)}
    probe = Probe(probe_loaders(arguments, max_probe_images), statistics_of(arguments), device)
    torch.manual_seed(arguments.seed)
    if method == "raw pixels":
        return evaluate(pixel_features, probe)
    if method == "random encoder":
        born = IJepaForPretraining._from_config(config_of(arguments)).ijepa
        return evaluate(embedding_of(born, device), probe)
    if method.startswith("MAE"):
        return run_mae(arguments, probe)
    if method.startswith("supervised"):
        return run_supervised(arguments, probe)
    if not method.startswith(PUBLISHED_IJEPA):
        return run_ijepa(arguments, probe)
    changed = published(arguments)
    return {**run_ijepa(changed, probe), "min_patches": changed.min_patches}


def seconds_per_step(
    arguments: PretrainingArguments, device: str, num_turns: int = 9, steps_per_turn: int = 4
) -> dict[str, float]:
    """Of all that train. The supervised classifier has 10 classes here: its head takes next to no time."""
    kinds = {"ours": arguments, PUBLISHED_IJEPA: published(arguments)}
    steps = {kind: stepper(changed, device, precision_of(changed)) for kind, changed in kinds.items()}
    for kind, learner in {"MAE": mae(arguments, device), "supervised": supervised(arguments, device, 10)}.items():
        steps[kind] = learning_step(learner, arguments, device)
    return median_seconds(steps, num_turns, steps_per_turn, device)


def learning_step(learner: Learner, arguments: PretrainingArguments, device: str) -> Callable[[int], object]:
    """A function that takes an optimizer step on random pixels."""
    config, size = config_of(arguments), arguments.per_device_batch_size
    pixel_values = torch.randn(size, config.num_channels, *config.image_height_and_width, device=device)
    batches = itertools.repeat((pixel_values, torch.zeros(size, dtype=torch.long, device=device)))
    optimizer = optimizer_of(learner, arguments, device)
    return lambda number: take_step(learner, optimizer, batches, arguments, device)


def equal_time_steps(steps: int, seconds: dict[str, float], kind: str) -> int:
    """How many steps of `kind` take as long as `steps` of ours."""
    return max(1, round(steps * seconds["ours"] / seconds[kind]))


# ----------------------------------------------------------------------------------------------------------- all runs


@dataclass(frozen=True)
class Run:
    """One method with one seed; `settings` are those of the recipe that can change what comes of it."""

    method: str
    seed: int
    steps: int
    max_probe_images: int
    settings: dict

    @classmethod
    def of(cls, method: str, seed: int, steps: int, max_probe_images: int, arguments: PretrainingArguments) -> "Run":
        is_published = method.startswith(PUBLISHED_IJEPA)
        is_ijepa = is_published or method in ("ours", STEP_TIME)
        unread = UNSEEN if is_ijepa else UNSEEN | (PUBLISHED.keys() - SHARED)
        effective = (published(arguments) if is_published else arguments).effective()
        settings = {key: value for key, value in effective.items() if key not in unread}
        if method.startswith("MAE"):  # rows without it, of runs before 28 November 2026, had no positions
            settings["mae_positions"] = "sin-cos"
        if method == STEP_TIME:  # of this machine only
            settings["machine"] = machine()
        return cls(method, seed, steps, max_probe_images, settings)

    def is_that_of(self, row: dict) -> bool:
        return all(row.get(key) == value for key, value in dataclasses.asdict(self).items())

    def words(self, recipe_words: list[str]) -> list[str]:
        """Arguments of the process that makes this run."""
        own = {"run": self.method, "seed": self.seed, "steps": self.steps, "max_probe_images": self.max_probe_images}
        return [*recipe_words, *(f"--{key}={value}" for key, value in own.items())]


def machine() -> str:
    """What steps are timed on."""
    found = environment("cuda" if torch.cuda.is_available() else "cpu")
    return f"{found['device']}, {found['cpu']}"


def measure(one: Run, recipe_words: list[str], threads: int) -> dict:
    """A line of results.jsonl."""
    words, began = one.words(recipe_words), time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=with_threads(threads), check=False)
    row = {
        **dataclasses.asdict(one),
        "command": shlex.join(["benchmarks/learning/compare_methods.py", *words]),
        "threads": threads,
        "wall_seconds": round(time.perf_counter() - began, 1),
    }
    return {**row, **({"error": error_of(done)} if done.returncode else json.loads(done.stdout.splitlines()[-1]))}


def describe(row: dict) -> str:
    names = ("seconds_per_step", *COLUMNS.values(), *(f"context_{name}" for name in COLUMNS.values()), "own_accuracy")
    shown = row.get("error") or {name: row[name] for name in names if name in row}
    return f"{row['method']}, seed {row['seed']}, {row['steps']} steps, {row['wall_seconds']:.0f} s: {shown}"


@dataclass(frozen=True)
class Comparison:
    arguments: PretrainingArguments
    recipe_words: list[str]
    output_dir: Path
    max_probe_images: int
    jobs: int
    threads: int
    device: str

    def rows(self, methods: list[str], seeds: list[int], steps: int) -> list[dict]:
        """Of all runs, seed by seed, so that a comparison that is stopped early has every method."""
        seconds = self.step_times() if any(method.endswith("equal time") for method in methods) else {}
        runs = [
            self.run_of(method, seed, steps_of(method, steps, seconds))
            for seed in seeds
            for method in methods
            if method != "raw pixels" or seed == seeds[0]  # which are the same for every seed
        ]
        return self.measured(runs, self.jobs, self.threads)

    def step_times(self) -> dict[str, float]:
        """Raises RuntimeError if they could not be measured: no run of equal time would be possible."""
        (row,) = self.measured([self.run_of(STEP_TIME, 0, 1)], jobs=1, threads=1)
        if "error" in row:
            raise RuntimeError(f"the time of a step could not be measured: {row['error'][0]}")
        return row["seconds_per_step"]

    def run_of(self, method: str, seed: int, steps: int) -> Run:
        return Run.of(method, seed, steps, self.max_probe_images, self.arguments)

    def measured(self, runs: list[Run], jobs: int, threads: int) -> list[dict]:
        def measured_alone(one: Run) -> dict:
            return measure(one, self.recipe_words, threads)

        return rows_of_all(runs, self.output_dir, jobs, measured_alone, describe, self.device)


def steps_of(method: str, steps: int, seconds: dict[str, float]) -> int:
    if method in ("raw pixels", "random encoder"):
        return 0
    kind, _, rule = method.partition(", ")
    return equal_time_steps(steps, seconds, kind) if rule == "equal time" else steps


# ---------------------------------------------------------------------------------------------------------- the table


def table(rows: list[dict]) -> str:
    """A line per encoder, mean and standard deviation over the seeds."""
    header = ("features", "steps", "minutes", *COLUMNS, "notes")
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"]]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        has_context = any("context_knn" in row for row in of_method)
        lines.append(line(f"{method}, target encoder" if has_context else method, of_method))
        if has_context:
            lines.append(line(f"{method}, context encoder", of_method, "context_"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def line(name: str, rows: list[dict], prefix: str = "") -> list[str]:
    def cell(key: str, digits: int = 3, scale: float = 1.0) -> str:
        return spread([row[key] / scale for row in rows if row.get(key) is not None], digits)

    steps = ", ".join(sorted({f"{row['steps']:,}" for row in rows if row["steps"]}))
    digits = {"effective_rank": 1}
    values = [cell(f"{prefix}{key}", digits.get(key, 3)) for key in COLUMNS.values()]
    return [name, steps, cell("seconds", 1, 60), *values, notes(rows, cell("own_accuracy"))]


def notes(rows: list[dict], own_accuracy: str) -> str:
    failed = sum("error" in row for row in rows)
    collapsed = sum(row.get("collapsed", False) for row in rows)
    found = [f"its own classifier {own_accuracy}"] if own_accuracy else []
    found += [f"collapsed in {collapsed} of {len(rows) - failed}"] if collapsed else []
    found += [f"{failed} failed"] if failed else []
    allowed = PUBLISHED["min_patches"]
    fewest = min((row.get("min_patches", allowed) for row in rows), default=allowed)
    found += [f"min_patches {fewest}, not {allowed}"] if fewest < allowed else []
    return ", ".join(found)


def parse(words: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own arguments, and those of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--output_dir", type=Path, help="of results.jsonl and table.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, help="of ours; the recipe's by default")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--max_probe_images", type=int, default=5000, help="of each split, at most")
    parser.add_argument("--run", choices=(*METHODS, STEP_TIME), help=argparse.SUPPRESS)  # for the processes of runs
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    own, more = parser.parse_known_args(words)
    if not own.run and own.output_dir is None:
        parser.error("--output_dir is missing: it names the directory of results.jsonl and table.md.")
    for name in ("jobs", "threads", "max_probe_images", *(() if own.run or own.steps is None else ("steps",))):
        if getattr(own, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(own, name)}.")
    return own, ["--recipe", own.recipe, *more]


def main(words: list[str] | None = None) -> None:
    own, recipe_words = parse(words)
    arguments = parse_pretraining_arguments([*recipe_words, "--output_dir=unused"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if own.run:
        arguments = dataclasses.replace(arguments, seed=own.seed)
        arguments = with_steps(arguments, own.steps) if own.steps else arguments
        print(json.dumps(run(own.run, arguments, own.max_probe_images, device)))
        return
    try:
        check(arguments)
        steps = own.steps or total_steps(arguments)
    except ValueError as error:
        sys.exit(f"compare_methods.py: error: {error}")
    settings = own.output_dir, own.max_probe_images, own.jobs, own.threads
    rows = Comparison(arguments, recipe_words, *settings, device).rows(own.methods, own.seeds, steps)
    text = table(rows)
    (own.output_dir / "table.md").write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{text}\n")
    print(json.dumps({"benchmark": "compare_methods", **environment(device), "recipe": own.recipe, "results": rows}))


if __name__ == "__main__":
    main()
