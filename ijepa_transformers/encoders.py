# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Opens encoders and gives their features: this package's, stock ones, or any vision model of Transformers.

Shape legend: B images, N tokens, D features (layers of convolutional networks may differ in D), H rows, W columns.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.nn.functional import adaptive_avg_pool2d
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .arguments import require
from .data.notices import tell
from .hub import HubUnreachable, hub_or_cache
from .modeling_ijepa import IJepaForPretraining
from .saved_weights import refuse_integer_weights, refuse_surplus_layers, require_finite


_CONCATENATED_LAYERS = 4  # in the published transfer protocol
# Settings that do not change the features. The precision is not one of the configuration: it is chosen when loading.
_IRRELEVANT_SETTINGS = (
    *("name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("id2label", "label2id", "problem_type"),
)
_UNKNOWN_MODEL = "huggingface.co/models"  # in what Transformers says of a name that the Hub does not know
_FILES_OF_A_RUN = ("recipe.yaml", "run_status.json", "metrics.jsonl")  # before and after it has saved a model
_LONGEST_REASON = 1000  # characters; Transformers may list every class that it has


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder to open, written as one of `SOURCE`, `SOURCE@context`, `SOURCE@target`, `random:SOURCE`,
    `random:SOURCE#1` and `raw_pixels:SOURCE`.

    Args:
        kind: "model", "random" (the architecture of `source` with untrained weights of `seed`) or "raw_pixels".
        source: a directory or a name on the Hub.
        encoder: "target" or "context".
        seed: of random weights.
    """

    kind: str
    source: str
    encoder: str = "target"
    seed: int = 0

    @classmethod
    def parse(cls, text: str, default_encoder: str = "target") -> "EncoderSpec":
        """Reads a spec.

        Raises:
            ValueError: if it names no source.
        """
        kind, encoder, seed, source = "model", default_encoder, 0, text
        for prefix in ("random", "raw_pixels"):
            if text.startswith(f"{prefix}:"):
                kind, source = prefix, text.removeprefix(f"{prefix}:")
        if kind == "random" and (match := re.search(r"#(\d+)$", source)):
            seed, source = int(match[1]), source[: match.start()]
        if match := re.search(r"@(target|context)$", source):
            encoder, source = match[1], source[: match.start()]
        if not source:
            raise ValueError(f"{text!r} names no model: write a directory or a Hub name.")
        return cls(kind, source, "target" if kind == "raw_pixels" else encoder, seed)

    def __str__(self) -> str:
        if self.kind == "raw_pixels":
            return f"raw_pixels:{self.source}"
        return f"random:{self.source}#{self.seed}" if self.kind == "random" else f"{self.source}@{self.encoder}"


class RawPixels(torch.nn.Module):
    """A stand-in for an encoder that gives the pixels themselves. Images are shrunk to at most 32 x 32 pixels, because
    whole ones of ImageNet would fill the memory."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C x min(H, 32) x min(W, 32))."""
        height, width = pixel_values.shape[2:]
        return adaptive_avg_pool2d(pixel_values, (min(height, 32), min(width, 32))).flatten(1)


def open_encoder(spec: EncoderSpec, dtype: torch.dtype) -> torch.nn.Module:
    """The encoder of a spec, in evaluation mode.

    Raises:
        ValueError: as `load_encoder`.
    """
    if spec.kind == "raw_pixels":
        return RawPixels()
    # A random encoder is compared with the trained one, so its features must be pooled in the same way.
    model = load_encoder(spec.source, spec.encoder, dtype)
    return random_encoder(model, spec.seed) if spec.kind == "random" else model


def random_encoder(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """An untrained encoder of the same architecture, in evaluation mode: a pure function of the seed, and of the
    constants of `model` that its class does not fill."""
    fresh = untrained(type(model), model.config, seed, model.dtype)
    if getattr(model, "pooler", None) is None and getattr(fresh, "pooler", None) is not None:
        fresh.pooler = None  # type: ignore[assignment]  # PyTorch's stubs do not know that a module may be None
    _fill_constants(fresh, model)
    return fresh


@torch.no_grad()
def _fill_constants(fresh: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copies parameters of `model` to `fresh` that are not trained and that are zero in `fresh`.

    In Transformers 5.x `ViTMAEModel(config)` leaves its constant position table at zero, so a random encoder would
    not know where a patch lies.
    """
    trained = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        if not parameter.requires_grad and not parameter.any():
            parameter.copy_(trained[name])


def untrained(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> PreTrainedModel:
    """A model with untrained weights of a seed, in evaluation mode. Global random generators do not change.

    `settings` are those of `_from_config`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class._from_config(config, dtype=dtype, **settings).eval()


@contextmanager
def opening(what: str) -> Iterator[None]:
    """Turns whatever Transformers and safetensors raise for missing, foreign and damaged files into a ValueError.

    Broken files give anything from KeyError to ZeroDivisionError. Too little memory stays what it is.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except HubUnreachable as error:
        raise ValueError(f"{what} cannot be opened: {error}") from None  # nothing is behind it
    except Exception as error:
        is_told = isinstance(error, (ImportError, OSError, ValueError))  # these have sentences
        reason = one_line(error) if is_told else f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, SafetensorError):
            reason = f"its weights are damaged, cut short, or only a pointer of Git LFS ({one_line(error)})"
        reason = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."
        raise ValueError(f"{what} cannot be opened: {reason}") from error


@contextmanager
def opening_model(source: str) -> Iterator[None]:
    """As `opening` and `hub_or_cache`, and says in one sentence that there is no such model."""
    with opening(f"The model {source!r}"), _missing_in_short(source, "config.json"):
        yield


@contextmanager
def _missing_in_short(source: str, *files: str) -> Iterator[None]:
    """`hub_or_cache` with short sentences. Transformers' own are long, and also for a directory about the Hub.

    Args:
        files: of which a directory must hold one. The sentence names the first.

    Raises:
        ValueError: if a path is not there, a directory has none of the files or one that holds no object of JSON, or
            the Hub knows no such name.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        if not any(os.path.exists(os.path.join(source, name)) for name in files):
            is_run = any(os.path.exists(os.path.join(source, name)) for name in _FILES_OF_A_RUN)
            raise ValueError(f"this {'run has saved no model yet' if is_run else f'directory has no {files[0]}'}.")
        _require_objects(Path(source), files)
    elif not os.path.exists(source) and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"there is no directory {source!r}.")
    try:
        with hub_or_cache(source):
            yield
    except json.JSONDecodeError as error:  # which names no file
        raise ValueError(f"{_damaged_json(source) or 'a file of JSON'} is damaged: {one_line(error)}.") from error
    except OSError as error:
        if _UNKNOWN_MODEL not in str(error):
            raise
        if os.path.isdir(source):
            raise ValueError(f"this directory has no {files[0]}.") from error
        raise ValueError(
            f"there is no directory {source!r}, and no model of this name on the Hub that you may read."
        ) from error


def _require_objects(directory: Path, files: Sequence[str]) -> None:
    """Raises ValueError if a file holds a list, for example. `_damaged_json` names files that are no JSON at all."""
    for name in files:
        try:
            value = json.loads((directory / name).read_bytes())
        except (OSError, ValueError):
            continue
        kind = type(value).__name__
        require(isinstance(value, dict), f"{name} must hold settings by name ({{...}}), and it holds a {kind}.")


def _damaged_json(directory: str) -> str | None:
    """The name of the first file of JSON in a directory that cannot be parsed."""
    for path in sorted(Path(directory).glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return path.name
    return None


def load_config(source: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a directory or Hub repository, with `changes` to its fields.

    Raises:
        ValueError: if it cannot be opened.
    """
    with opening_model(source):
        return AutoConfig.from_pretrained(source, **changes)


def is_pretraining_model(config: PreTrainedConfig) -> bool:
    """Whether a directory with this configuration holds both encoders and the predictor."""
    return "IJepaForPretraining" in (config.architectures or ())


def load_pretraining_model(source: str, **settings: Any) -> IJepaForPretraining:
    """Both encoders and the predictor, in evaluation mode and float32.

    Low precision is not offered, because a moving average does not move in it. `settings` are those of
    `from_pretrained`.

    Raises:
        ValueError: if it cannot be opened, lacks weights of an encoder, or holds NaN or infinity.
    """
    with opening_model(source):
        model, report = IJepaForPretraining.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **settings
        )
        refuse_surplus_layers(model, report)
        refuse_integer_weights(model, report, source)
    require_finite(model, source)
    return model.eval()


@dataclass(frozen=True)
class FreshKeys:
    """The names of weights that are new, because the saved model has none or has another shape."""

    missing: frozenset[str]
    resized: frozenset[str]


def open_classifier(source: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, FreshKeys]:
    """The encoder of a directory with its classification head. A saved head of another size is replaced by a new one.

    Raises:
        ValueError: if it cannot be opened, or lacks weights of the encoder.
    """
    with opening_model(source):
        model, loading = AutoModelForImageClassification.from_pretrained(
            source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
        keys = FreshKeys(frozenset(loading["missing_keys"]), frozenset(key for key, *_ in loading["mismatched_keys"]))
        lost = sorted(key for key in keys.missing | keys.resized if key.startswith(f"{model.base_model_prefix}."))
        if lost:
            raise ValueError(f"it lacks {len(lost)} weights of the encoder, for example {lost[0]!r}.")
        refuse_surplus_layers(model, loading)
        refuse_integer_weights(model, loading, source, stem="model")
    return model, keys


def load_classifier(source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """`open_classifier` without the names of new weights."""
    return open_classifier(source, config)[0]


def load_encoder(source: str, encoder: str = "target", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The encoder of a directory or Hub repository, in evaluation mode.

    A pooler that the checkpoint lacks (such as a ViT saved with a classifier) is removed; Transformers would give it
    random weights. A masked autoencoder sees the whole image.

    Args:
        source: a directory or a name on the Hub.
        encoder: "target" or "context" of a pretraining directory. If there is one encoder only, "target" opens it.
        dtype: of the weights.

    Raises:
        ValueError: if it cannot be opened, lacks weights, or lacks the context encoder that is asked for.
    """
    with opening_model(source):
        if encoder == "context":
            return _load_context_encoder(source, dtype)
        model, report = AutoModel.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        missing = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
        for name, found, expected in report["mismatched_keys"]:
            raise ValueError(
                f"its weight {name!r} has the shape {tuple(found)}, and config.json asks {tuple(expected)}"
            )
        if missing:
            raise ValueError(
                f"it lacks {len(missing)} weights of {type(model).__name__}, for example {min(missing)!r}"
            )
        refuse_surplus_layers(model, report)
        refuse_integer_weights(model, report, source, stem="model")
        if report["missing_keys"]:
            model.pooler = None
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0
        return model.eval()


def _load_context_encoder(source: str, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source)
    if not is_pretraining_model(config):
        raise ValueError(f"it was saved from {config.architectures} and holds no context encoder")
    model, report = IJepaForPretraining.from_pretrained(source, dtype=dtype, output_loading_info=True)
    refuse_surplus_layers(model, report)
    refuse_integer_weights(model, report, source)
    return model.context_encoder.eval()


def load_processor(source: str) -> BaseImageProcessor:
    """The image processor of a directory or Hub repository.

    Raises:
        ValueError: if there is none, because a guessed normalisation would silently give wrong features, or if its
            mean or standard deviation cannot be right.
    """
    processor = open_processor(source)
    if getattr(processor, "do_normalize", True):
        _tell_of_vit_processor(processor, source)
    return processor


def open_processor(source: str) -> BaseImageProcessor:
    """As `load_processor`, but an image processor of ViT is not told of."""
    files = ("preprocessor_config.json", "processor_config.json", "config.json")  # the last may name a class
    with opening(f"The image processor of {source!r}"), _missing_in_short(source, *files):
        processor = AutoImageProcessor.from_pretrained(source)
    if getattr(processor, "do_normalize", True):
        _check_statistics(processor, source)
    return processor


def _tell_of_vit_processor(processor: BaseImageProcessor, source: str) -> None:
    """Copies of I-JEPA on the Hub have ViT's image processor, which is not that of the published training."""
    is_vit = type(processor).__name__.startswith("ViTImageProcessor")
    halves = set(getattr(processor, "image_mean", None) or ()) == {0.5}
    if is_vit and halves and load_config(source).model_type == "ijepa":
        tell(
            f"The image processor of {source!r} is ViT's: it normalises with 0.5 and squashes images. I-JEPA was"
            " trained with ImageNet's mean and deviation. `ijepa convert --from_directory` writes a copy with the"
            " right one."
        )


def _check_statistics(processor: BaseImageProcessor, source: str) -> None:
    """Checks mean and standard deviation. One number for all channels, which Transformers allows, becomes a list."""
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name, None)
        if values is None:
            continue
        if isinstance(values, int | float):
            values = [values] * getattr(load_config(source), "num_channels", 3)
            setattr(processor, name, values)
        above = 0 if name == "image_std" else -math.inf
        are_right = isinstance(values, Sequence) and all(
            isinstance(value, int | float) and above < value < math.inf for value in values
        )
        kind = "numbers above 0" if name == "image_std" else "numbers"
        require(are_right, f"{name} of the image processor of {source!r} must be {kind}, got {values!r}.")


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


def architecture(model: torch.nn.Module) -> list[Any]:
    """Class and settings of an encoder, as in JSON. Models with equal architecture and weights give equal features.

    Settings that do not change the features are left out: where a model is stored, who saved it, names of classes.
    """
    config = getattr(model, "config", None)
    return [type(model).__name__, config and _settings(json.loads(config.to_json_string(use_diff=False)))]


def _settings(value: Any) -> Any:
    """A value of JSON without irrelevant and private settings, at any depth."""
    if not isinstance(value, dict):
        return value
    names = (name for name in value if name not in _IRRELEVANT_SETTINGS and not name.startswith("_"))
    return {name: _settings(value[name]) for name in names}


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of the names and values of all weights. It tells whether stored features are of these weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def encoder_features(
    model: torch.nn.Module, pixel_values: torch.Tensor, kinds: Collection[str]
) -> dict[str, torch.Tensor]:
    """Features of images (B, C, height, width), float32, on the model's device.

    Args:
        model: of `open_encoder`.
        kinds: any of
            - "last": (B, D), the `pooler_output` of the model (for I-JEPA the mean over patch tokens), or the mean
              over the last layer's tokens if it has none.
            - "last4": (B, 4 D), the means over the tokens of each of the last 4 layers (of all layers if there are
              fewer), concatenated (the transfer protocol of the paper's appendix A).
            - "layers": "layer_0" (B, D) for the embedding, "layer_1", ...: the mean over each layer's tokens.
            - "tokens": (B, N, D), the last layer's tokens.
            Tokens go through the encoder's final layer norm if it has one. All tokens count, also the class token of
            other models.

    Returns:
        The features by name, and as "token_shape" the number and width of the tokens, int64 (B, 2). `RawPixels` gives
        "last" only.

    Raises:
        ValueError: if the model needs more than images, or gives no features.
    """
    if isinstance(model, RawPixels):
        return {"last": model(pixel_values).float()} if "last" in kinds else {}
    model = cast(PreTrainedModel, model)
    needs_layers = "last4" in kinds or "layers" in kinds
    try:
        outputs = model(pixel_values.to(model.device, model.dtype), output_hidden_states=needs_layers)
    except (AttributeError, TypeError, ValueError) as error:  # models that need a text or audio raise these
        raise ValueError(f"{type(model).__name__} cannot be evaluated on images: {one_line(error)}") from error
    if getattr(outputs, "last_hidden_state", None) is None:
        raise ValueError(f"{type(model).__name__} has no output 'last_hidden_state', so it gives no features.")
    return _select(model, outputs, kinds)


def feature_widths(
    model: torch.nn.Module, pixel_values: torch.Tensor, kinds: Collection[str]
) -> tuple[dict[str, int], tuple[int, int]]:
    """The width of the features by name, and the number and width of the tokens (0 and 0 if there are none).

    Found by a pass over `pixel_values`, which may be a single image.

    Raises:
        ValueError: if the encoder gives no features for these images.
    """
    try:
        features = encoder_features(model, pixel_values, kinds)
    except RuntimeError as error:  # for example, pixels of a shape that the layers do not accept
        raise ValueError(f"{type(model).__name__} cannot be evaluated on images: {one_line(error)}") from error
    num_tokens, width = features.pop("token_shape", torch.zeros(1, 2, dtype=torch.int64))[0].tolist()
    return {name: value.shape[-1] for name, value in features.items()}, (num_tokens, width)


def _select(model: PreTrainedModel, outputs: Any, kinds: Collection[str]) -> dict[str, torch.Tensor]:
    tokens = _tokens(outputs.last_hidden_state)
    features = {"token_shape": torch.tensor(tokens.shape[1:], device=tokens.device).expand(len(tokens), 2)}
    if "last" in kinds:
        pooled = getattr(outputs, "pooler_output", None)
        # Convolutional networks pool to (B, D, 1, 1).
        features["last"] = tokens.mean(dim=1) if pooled is None else pooled.flatten(1).float()
    if "tokens" in kinds:
        features["tokens"] = tokens
    if "last4" in kinds or "layers" in kinds:
        layers = _layer_means(model, outputs)
        if "last4" in kinds:
            features["last4"] = torch.cat(layers[1:][-_CONCATENATED_LAYERS:], dim=1)  # the embedding is not a layer
        if "layers" in kinds:
            features.update({f"layer_{index}": layer for index, layer in enumerate(layers)})
    return features


def _layer_means(model: PreTrainedModel, outputs: Any) -> list[torch.Tensor]:
    """(B, D) of the embedding and of each layer, the mean of its tokens after the final layer norm."""
    norm = getattr(model, "layernorm", None)
    means = []
    for hidden_state in outputs.hidden_states[:-1]:
        if isinstance(norm, torch.nn.LayerNorm) and norm.normalized_shape == hidden_state.shape[-1:]:
            hidden_state = norm(hidden_state)
        means.append(_tokens(hidden_state).mean(dim=1))
    # The last of `hidden_states` is before the norm in some classes and after it in others; this one is after it.
    return [*means, _tokens(outputs.last_hidden_state).mean(dim=1)]


def _tokens(hidden_state: torch.Tensor) -> torch.Tensor:
    """(B, N, D), or (B, D, H, W) of a convolutional network, as float32 tokens (B, N, D)."""
    return (hidden_state.flatten(2).transpose(1, 2) if hidden_state.dim() == 4 else hidden_state).float()
