# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa probe`: measures how good the features of frozen encoders are. docs/evaluate.md explains all protocols.

By default the table has two more rows: raw pixels, and an encoder of the same architecture with random weights.

Shapes: N images of a split, D features.
"""

import dataclasses
import datetime
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers.utils.logging import disable_progress_bar

from ..api import Result, process_as_before
from ..arguments import require
from ..data.bit_depth import DepthSample, look_at_dataset, settle
from ..data.labels import describe_classes, label_array, require_equal_classes
from ..data.notices import counted
from ..data.sources import available_split, open_split, opened_once
from ..data.splits import require_other_split
from ..display import Timer, as_typed, command, data_flags, show, show_end, show_facts
from ..distributed import check_launch, end_process_group, on_main_process
from ..encoders import EncoderSpec, load_config, load_processor
from ..failures import FAILED, REFUSED, DivergedError, failures_told
from ..files import check_output_directory, refuse_other_files
from ..locks import OutputLock
from .arguments import PLAIN_PROBES, PROGRAM, ProbingArguments, parse_probing_arguments, probing_arguments
from .collapse import layer_spread
from .earlier import RESULTS, drop_if_repeated, keep_earlier
from .features import (
    CACHE_FILES,
    Entry,
    OpenedEncoder,
    Run,
    Split,
    SplitFeatures,
    frozen_features,
    note_contents,
    open_entry,
    open_spec,
    sample_indices,
    try_encoder,
)
from .heads import require_optimizers
from .probes import (
    class_indices,
    few_shot_accuracy,
    knn_scores_by_k,
    logistic_regression_scores,
    several_labels_scores,
    standardize,
)
from .several_labels import knn_shares, logistic_scores
from .sweep import measure, sweep
from .tables import Rows, report, summaries, update_model_cards, write_results


_RAW_PIXELS, _RANDOM_ENCODER = "raw pixels", "random encoder"
SMALL = "finetune_small"  # the recipe of a first try


def _check_outputs(arguments: ProbingArguments) -> None:
    """Raises ValueError if a directory that is written to cannot be written to."""
    check_output_directory(Path(arguments.output_dir))
    if arguments.cache_dir is not None:
        check_output_directory(Path(arguments.cache_dir), "cache_dir")


@opened_once()
def build_run(arguments: ProbingArguments, lock: OutputLock | None = None) -> Run:
    """Opens the data and every encoder, and locks the output directory.

    Raises:
        ValueError: if something cannot be opened, or if the arguments cannot work.
    """
    if arguments.has_heads:
        require_optimizers(arguments.optimizers)
    _check_outputs(arguments)
    # The other processes wait while the main process fits probes alone, which takes hours on a large data set.
    waits = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    accelerator = Accelerator(kwargs_handlers=[waits])
    check_launch(accelerator.num_processes)
    lock = lock or OutputLock(Path(arguments.output_dir))
    on_main_process(accelerator, lock.take_if_there)
    on_main_process(accelerator, lambda: refuse_other_files(Path(arguments.output_dir), [RESULTS, "cache"]))
    if arguments.cache_dir is not None:
        cache_dir = Path(arguments.cache_dir)
        on_main_process(accelerator, lambda: refuse_other_files(cache_dir, CACHE_FILES, "cache_dir"))
    entries = _all_entries(arguments)
    specs = dict.fromkeys(entry.spec for entry in entries)
    for source in [spec.source for spec in specs if arguments.update_model_card and Path(spec.source).is_dir()]:
        check_output_directory(Path(source), "update_model_card: the model directory")
    trials = {spec: try_encoder(arguments, open_spec(arguments, spec, accelerator.device)) for spec in specs}
    with accelerator.main_process_first():  # one process fills the cache of datasets
        train = _open_labelled(arguments, arguments.train_split)
        validation_split = available_split(arguments, arguments.validation_split)
        require_other_split(arguments.train_split, validation_split)
        validation = _open_labelled(arguments, validation_split)
    _check_classes(train, validation)
    require(
        not (train.has_several and arguments.has_heads),
        "The probes linear and attentive take one label per image, and here an image has a list of classes: leave them"
        " out (--probes knn logistic), or fine-tune with --tune head.",
    )
    run = Run(arguments, accelerator, entries, train, validation, trials, _look(arguments, train, list(specs)))
    on_main_process(accelerator, lock.claim)
    if accelerator.is_main_process:
        _show_head(run)
    note_contents(run)
    _note_left_out(run)
    _note_unknown_classes(run)
    return run


def _look(arguments: ProbingArguments, train: Split, specs: Sequence[EncoderSpec]) -> DepthSample:
    """Looks at a sample of the 16-bit images. Raises ValueError if they do not suit a model."""
    sources = dict.fromkeys(spec.source for spec in specs)
    channels = [getattr(load_config(source), "num_channels", 3) for source in sources]
    sample = look_at_dataset(train.dataset, channels[0], arguments.data)
    for source in sources:
        settle(load_processor(source), sample, arguments.sixteen_bit_max, lambda sentence: None)
    return sample


def _all_entries(arguments: ProbingArguments) -> list[Entry]:
    """The entries of `--models`, after the baselines that are not among them."""
    entries = [_parse_entry(text, arguments.encoder) for text in arguments.models]
    first = next((entry.spec for entry in entries if entry.spec.kind == "model"), entries[0].spec)
    kinds = {entry.spec.kind for entry in entries}
    baselines = []
    if "raw_pixels" not in kinds:
        baselines.append(Entry(_RAW_PIXELS, EncoderSpec("raw_pixels", first.source)))
    if "random" not in kinds:
        baselines.append(Entry(_RANDOM_ENCODER, dataclasses.replace(first, kind="random")))
    return entries if arguments.no_baselines else baselines + entries


def _parse_entry(text: str, default_encoder: str) -> Entry:
    """Reads `NAME=SPEC` or `SPEC`. A name has no slash, so a directory such as runs/lr=0.1 is a SPEC."""
    name, equals, spec = text.partition("=")
    if not equals or "/" in name or Path(text).is_dir():
        return Entry(text, EncoderSpec.parse(text, default_encoder))
    require(name, f"{text!r} has no name before '='.")
    return Entry(name, EncoderSpec.parse(spec, default_encoder))


def _open_labelled(arguments: ProbingArguments, name: str) -> Split:
    """The labelled images of a split, or a sample of them.

    Raises:
        ValueError: if there are fewer than two.
    """
    dataset = open_split(arguments, name, labels="required")
    labels = torch.from_numpy(label_array(dataset))  # (N,), or (N, classes) where images have several
    indices = (labels.reshape(len(labels), -1)[:, 0] >= 0).nonzero().flatten()  # -1 or NaN means unlabelled
    if len(indices) < 2:
        raise ValueError(
            f"The {name!r} split of {arguments.data!r} has {len(indices)} labelled images; at least 2 are needed."
        )
    indices = sample_indices(indices, arguments.max_images or len(indices), arguments.seed)
    return Split(name, dataset, indices, labels[indices])


def _check_classes(train: Split, validation: Split) -> None:
    """Raises ValueError if the training split has one class, or if the splits number their classes differently or have
    none in common."""
    require(len(train.labels.unique()) > 1, f"The {train.name!r} split has a single class; a probe needs at least 2.")
    require_equal_classes(train.dataset, validation.dataset, train.name, validation.name)
    require(
        train.has_several or (class_indices(train.labels, validation.labels) >= 0).any(),
        f"No image of the {validation.name!r} split has a class of the {train.name!r} split.",
    )


def _note_left_out(run: Run) -> None:
    """Notes the settings for which the training split is too small."""
    count, arguments = len(run.train.labels), run.arguments
    for k in (k for k in arguments.k if "knn" in arguments.probes and k > count):
        run.add_note(f"{k}-NN is left out: there are {count:,} training images.")
    if run.train.has_several:
        if "few_shot" in arguments.probes:
            run.add_note("few_shot is left out: it draws images by their class, and here an image has several.")
        return
    smallest = _smallest_class(run)
    for shots in (shots for shots in arguments.shots if "few_shot" in arguments.probes and shots > smallest):
        run.add_note(f"{shots}-shot is left out: the smallest class has {smallest:,} training images.")


def _smallest_class(run: Run) -> int:
    """Training images of the smallest class."""
    return int(run.train.labels.unique(return_counts=True)[1].min())


def _note_unknown_classes(run: Run) -> None:
    """Notes how many validation images no probe can get right. A sample of many classes may have such images."""
    labels = run.validation.labels
    if run.train.has_several:
        return
    unknown = labels[class_indices(run.train.labels, labels) < 0]
    if len(unknown):
        run.add_note(
            f"{len(unknown):,} of the {len(labels):,} validation images belong to {len(unknown.unique()):,} classes"
            " without a training image: they count as wrong in every row."
        )


# Probes
def _evaluate_entry(run: Run, entry: Entry) -> dict[str, Any]:
    """All measures of one encoder, on the main process. The other processes only help to compute features."""
    opened = open_entry(run, entry)
    result: dict[str, Any] = {
        "spec": str(entry.spec),
        "encoder": type(opened.model).__name__,
        "weights_sha256": opened.digest,
        "all_but_weights_sha256": hashlib.sha256(opened.all_but_weights.encode()).hexdigest(),
    }
    train, validation = (frozen_features(run, opened, split) for split in (run.train, run.validation))
    try:
        result["probes"] = _accuracies_of(run, opened, train, validation)
    except DivergedError as error:
        run.add_note(f"{entry.name} ({entry.spec}) has no accuracies: {error}. The encoder has diverged.")
        result |= {"probes": {}, "diverged": str(error)}
    if "layers" in validation.values and run.accelerator.is_main_process:
        layers = validation.values["layers"]
        names = sorted(layers, key=lambda name: int(name.removeprefix("layer_")))
        result["collapse"] = [dataclasses.asdict(layer_spread(layers[name])) for name in names]
    return result


def _accuracies_of(
    run: Run, opened: OpenedEncoder, train: SplitFeatures, validation: SplitFeatures
) -> dict[str, dict[str, Any]]:
    """The results of all probes except the collapse report, by column of the table, on the main process.

    Raises:
        DivergedError: on all processes, if features are not finite.
    """
    for features in (train, validation):
        features.require_finite()
    accuracies: dict[str, dict[str, Any]] = {}
    if PLAIN_PROBES & set(run.arguments.probes) and run.accelerator.is_main_process:
        accuracies = _plain_probes(run, train.values["last"]["last"], validation.values["last"]["last"])
    if run.arguments.has_heads:
        accuracies |= sweep(run, opened, train, validation)
    return accuracies


def _plain_probes(run: Run, train: torch.Tensor, validation: torch.Tensor) -> dict[str, dict[str, Any]]:
    """The results of the probes without a training loop on features (N, D), by column of the table."""
    arguments = run.arguments
    results: dict[str, dict[str, Any]] = {}
    if run.train.has_several:
        return _several_labels_probes(run, train, validation)
    train_labels, validation_labels = run.train.labels, run.validation.labels
    ks = [k for k in arguments.k if "knn" in arguments.probes and k <= len(train)]
    for k, scores in (_knn_votes(run, train, validation, ks) if ks else {}).items():
        results[f"{k}-NN"] = measure(run, scores)
    if "few_shot" in arguments.probes:
        for name, shots in _few_shot_columns(run):
            result = few_shot_accuracy(
                *(train, train_labels, validation, validation_labels, shots, arguments.num_draws, arguments.seed)
            )
            results[name] = {"accuracy": result.mean, "std": result.std, "draws": list(result.accuracies)}
    if "logistic" in arguments.probes:
        results["logistic"] = measure(run, logistic_regression_scores(train, train_labels, validation))
    return results


def _several_labels_probes(run: Run, train: torch.Tensor, validation: torch.Tensor) -> dict[str, dict[str, Any]]:
    """As `_plain_probes`, where an image has several classes."""
    arguments, labels, truth = run.arguments, run.train.labels, run.validation.labels.numpy()
    train, validation = standardize(train, validation)
    ks = [k for k in arguments.k if "knn" in arguments.probes and k <= len(train)]
    scores = {f"{k}-NN, mAP": knn_shares(train, labels, validation, k) for k in ks}
    if "logistic" in arguments.probes:
        scores["logistic, mAP"] = logistic_scores(train, labels, validation)
    return {name: several_labels_scores(values.numpy(), truth) for name, values in scores.items()}


def _knn_votes(run: Run, train: torch.Tensor, validation: torch.Tensor, ks: Sequence[int]) -> dict[int, torch.Tensor]:
    """Votes (N, classes) by k. Computed on the accelerator, or on the CPU if the accelerator has too little memory."""
    scaled = standardize(train, validation)
    try:
        device = run.accelerator.device
        return knn_scores_by_k(scaled[0].to(device), run.train.labels, scaled[1].to(device), ks)
    except torch.OutOfMemoryError:
        return knn_scores_by_k(scaled[0], run.train.labels, scaled[1], ks)


def _few_shot_columns(run: Run) -> list[tuple[str, int | float]]:
    """Names of the few-shot columns, with images per class (int) or a share of each class (float)."""
    shots = [(f"{shots}-shot", shots) for shots in run.arguments.shots if shots <= _smallest_class(run)]
    return [*shots, *((f"{100 * share:g} % labels", share) for share in run.arguments.label_fractions)]


# The run
def _show_head(run: Run) -> None:
    facts = {"encoders": ", ".join(entry.name for entry in run.entries), "data": run.arguments.data}
    for title, split in (("training", run.train), ("validation", run.validation)):
        images = counted(len(split.indices), "image")
        facts[title] = f"split {split.name!r}, {images}, {describe_classes(split.dataset)}"
    show_facts({**facts, "computation": run.accelerator.device.type, "output": run.output_dir})


def _next_commands(run: Run) -> list[str]:
    """Commands for the first trained encoder that was judged."""
    source = next((entry.spec.source for entry in run.entries if entry.spec.kind == "model"), None)
    if source is None:
        return []
    output_dir, split, data = run.output_dir, run.validation.name, data_flags(run.arguments)
    splits = {"train_split": run.train.name, "validation_split": split}
    return [
        command("finetune", recipe=SMALL, model=source, **data, **splits, output_dir=f"{output_dir}_classifier"),
        command("extract", model=source, **data, split=split, output_dir=f"{output_dir}_features"),
    ]


def evaluate(run: Run, origin: str) -> tuple[Rows, str]:
    """Measures all entries, and writes and prints the tables.

    Tables are written after each entry, so its results stay if a later entry fails. Those of an earlier run stay too,
    under another name.

    Args:
        origin: the command that the files name.

    Returns:
        the rows and the tables. Only the main process has tables; the others have an empty string.

    Raises:
        DivergedError: after the tables are written, if no encoder that was named has finite features.
    """
    rows: Rows = {}
    kept = None
    timer = Timer(len(run.entries))
    for number, entry in enumerate(run.entries, start=1):
        if run.accelerator.is_main_process:
            show(f"encoder {number} of {len(run.entries)}{timer}: {entry.name} ({entry.spec})")
        rows.setdefault(entry.name, []).append(_evaluate_entry(run, entry))
        timer.count()
        if run.accelerator.is_main_process:
            kept = keep_earlier(run.output_dir) if number == 1 else kept
            write_results(run, rows, origin, [entry.name for entry in run.entries[number:]])
    if not run.accelerator.is_main_process:
        return rows, ""
    if run.arguments.update_model_card:
        update_model_cards(run, rows, origin)
    show(f"\n{report(run, rows, with_layers=False)}")
    kept = drop_if_repeated(run.output_dir, kept)
    places = {"results": f"{run.output_dir / 'results.md'} and results.json"}
    show_end({**places, "earlier": kept.with_suffix(".md")} if kept else places, _next_commands(run))
    _require_a_result(rows)
    return rows, report(run, rows)


def _require_a_result(rows: Rows) -> None:
    """Raises DivergedError if all encoders that were named have diverged. With others, the table has a note."""
    results = [result for entries in rows.values() for result in entries]
    named = [result for result in results if EncoderSpec.parse(result["spec"]).kind == "model"]
    if named and all("diverged" in result for result in named):
        first = named[0]
        raise DivergedError(
            f"No encoder could be measured: the features of {first['spec']} hold {first['diverged']}. The training of"
            " the encoder has diverged, or its weights are damaged."
        )


def execute(arguments: ProbingArguments, argv: Sequence[str]) -> None:
    """Runs the command with its parsed arguments; `argv` is what they were parsed from. Exits as a command does."""
    disable_progress_bar()  # Transformers shows one while it loads weights
    with OutputLock(Path(arguments.output_dir)) as lock:
        with failures_told(PROGRAM, REFUSED):
            run = build_run(arguments, lock)
        with failures_told(PROGRAM, FAILED):
            evaluate(run, as_typed(PROGRAM, argv))
        run.accelerator.wait_for_everyone()
    end_process_group(run.accelerator)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    execute(parse_probing_arguments(argv), argv)


def probe(**keywords: Any) -> Result:
    """Judges frozen encoders by their features: `ijepa probe` as a function.

    Args:
        keywords: the flags of `ijepa probe --help` by name, `recipe` among them.

    Returns:
        output_dir, the results by row and column as in results.json, and the tables.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: with one sentence, where the command would end with an error.
    """
    arguments = probing_arguments(**keywords)
    with process_as_before(), OutputLock(Path(arguments.output_dir)) as lock:
        disable_progress_bar()
        run = build_run(arguments, lock)
        given = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        rows, tables = evaluate(run, f"probe({given})")
        run.accelerator.wait_for_everyone()
        end_process_group(run.accelerator)
    return Result(run.output_dir, summaries(rows), tables or None)
