# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Opening an encoder to be judged or used: this package's, a stock one, or any vision model of Transformers.

Shape legend: B images, N tokens, D features (D of a layer may differ in convolutional networks), H rows, W columns.
"""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.nn.functional import adaptive_avg_pool2d
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .modeling_ijepa import IJepaForPretraining


CONCATENATED_LAYERS = 4  # of the published transfer protocol
# To the features; the precision is asked for apart from the configuration.
IRRELEVANT_SETTINGS = (
    *("name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("id2label", "label2id", "problem_type"),
)


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder: one of `SPEC`, `SPEC@context`, `SPEC@target`, `random:SPEC`, `random:SPEC#1`, `raw_pixels:SPEC`.

    `kind` is "model", "random" (the architecture of `source` with fresh weights of `seed`) or "raw_pixels"; `source` a
    directory or Hub name; `encoder` "target" or "context".
    """

    kind: str
    source: str
    encoder: str = "target"
    seed: int = 0

    @classmethod
    def parse(cls, text: str, default_encoder: str = "target") -> "EncoderSpec":
        """The spec that `text` writes.

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
    """No encoder: the pixels themselves, shrunk to 32 x 32 where they are larger, or ImageNet's would fill the
    memory."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C x up to 32 x up to 32)."""
        return adaptive_avg_pool2d(pixel_values, [min(side, 32) for side in pixel_values.shape[2:]]).flatten(1)


def open_encoder(spec: EncoderSpec, dtype: torch.dtype) -> torch.nn.Module:
    """The encoder of a spec, in evaluation mode.

    Raises:
        ValueError: as `load_encoder`.
    """
    if spec.kind == "raw_pixels":
        return RawPixels()
    # A random encoder is compared with the trained one, so it is pooled like it: opening that one tells how.
    model = load_encoder(spec.source, spec.encoder, dtype)
    return random_encoder(model, spec.seed) if spec.kind == "random" else model


def random_encoder(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """An untrained encoder of the same architecture, in evaluation mode: a pure function of the seed, and of the
    constants of `model` that its class does not fill."""
    fresh = untrained(type(model), model.config, seed, model.dtype)
    if getattr(model, "pooler", None) is None and getattr(fresh, "pooler", None) is not None:
        fresh.pooler = None
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
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model with fresh weights of a seed, in evaluation mode. Global random generators stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class._from_config(config, dtype=dtype).eval()


def load_config(source: str, **changes) -> PreTrainedConfig:
    """The configuration of a directory or Hub repository.

    Raises:
        ValueError: if it cannot be opened.
    """
    try:
        return AutoConfig.from_pretrained(source, **changes)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {source!r} cannot be opened: {one_line(error)}") from error


def is_pretraining_model(config: PreTrainedConfig) -> bool:
    """Whether a directory with this configuration holds both encoders and the predictor."""
    return "IJepaForPretraining" in (config.architectures or ())


def load_pretraining_model(source: str, **settings) -> IJepaForPretraining:
    """Both encoders and the predictor, in evaluation mode and float32.

    Low precision is not offered: the moving average does not move in it.
    """
    return IJepaForPretraining.from_pretrained(source, dtype=torch.float32, **settings).eval()


def load_classifier(source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder of a directory with its classification head. The head is fresh if it was for other classes.

    Raises:
        ValueError: if it cannot be opened, or lacks weights of the encoder.
    """
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
        fresh = set(loading["missing_keys"]) | {key for key, *_ in loading["mismatched_keys"]}
        lost = sorted(key for key in fresh if key.startswith(f"{model.base_model_prefix}."))
        if lost:
            raise ValueError(f"it lacks {len(lost)} weights of the encoder, for example {lost[:1]}.")
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {source!r} cannot be opened: {one_line(error)}") from error
    return model


def load_encoder(source: str, encoder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The encoder of a directory or Hub repository, in evaluation mode.

    A pooler that the checkpoint does not have (ViT saved with a classifier) is taken out, instead of started from
    random weights as Transformers does. A masked autoencoder sees the whole image.

    Raises:
        ValueError: if it cannot be opened, lacks weights, or has no context encoder and that is asked for.
    """
    try:
        if encoder == "context":
            return _load_context_encoder(source, dtype)
        model, report = AutoModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
        missing = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
        if missing:
            raise ValueError(f"it lacks {len(missing)} weights of {type(model).__name__}, as {min(missing)!r}")
        if report["missing_keys"]:
            model.pooler = None
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0
        return model.eval()
    except (ImportError, OSError, ValueError) as error:  # ImportError: what it needs, as timm, is not installed
        raise ValueError(f"The model {source!r} cannot be opened: {one_line(error)}") from error


def _load_context_encoder(source: str, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source)
    if not is_pretraining_model(config):
        raise ValueError(f"it was saved from {config.architectures} and holds no context encoder")
    return IJepaForPretraining.from_pretrained(source, dtype=dtype).context_encoder.eval()


def load_processor(source: str):
    """The image processor of a directory or Hub repository.

    Raises:
        ValueError: if there is none; guessing the normalisation would give wrong features without a word.
    """
    try:
        return AutoImageProcessor.from_pretrained(source)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"The image processor of {source!r} cannot be opened: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def architecture(model: torch.nn.Module) -> list:
    """Class and settings of an encoder, all but its weights, as JSON has them: models that are equal in both compute
    the same. Settings that say where a model lies, who saved it, or how a classifier calls its classes, are left out.
    """
    config = getattr(model, "config", None)
    return [type(model).__name__, config and _settings(json.loads(config.to_json_string(use_diff=False)))]


def _settings(value):
    """Without IRRELEVANT_SETTINGS and private ones, however deep they lie."""
    if not isinstance(value, dict):
        return value
    names = (name for name in value if name not in IRRELEVANT_SETTINGS and not name.startswith("_"))
    return {name: _settings(value[name]) for name in names}


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of names and values, so that features of other weights are never mixed in."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- features
@torch.no_grad()
def encoder_features(
    model: torch.nn.Module, pixel_values: torch.Tensor, kinds: Collection[str]
) -> dict[str, torch.Tensor]:
    """Features of images (B, C, height, width), float32, on the model's device.

    Args:
        kinds: any of
            - "last": (B, D), the model's own `pooler_output` (here the mean over patch tokens), or the mean over the
              last layer's tokens where it has none.
            - "last4": (B, 4 D), the means over the tokens of the last 4 layers, or of all layers where there are
              fewer, concatenated (the transfer protocol of the paper's appendix A).
            - "layers": "layer_0" (B, D) for the embedding, "layer_1", ...: the mean over each layer's tokens.
            - "tokens": (B, N, D), the last layer's tokens.
            Tokens go through the encoder's final layer norm, where it has one. Tokens are all of them: in a foreign
            model with a class token that is one of them.

    Returns:
        The features by name, and the number and width of the tokens, int64 (B, 2), as "token_shape"; of `RawPixels`
        "last" only.

    Raises:
        ValueError: if the model takes no images alone or gives no features.
    """
    if isinstance(model, RawPixels):
        return {"last": model(pixel_values).float()} if "last" in kinds else {}
    needs_layers = "last4" in kinds or "layers" in kinds
    try:
        outputs = model(pixel_values.to(model.device, model.dtype), output_hidden_states=needs_layers)
    except (AttributeError, TypeError, ValueError) as error:  # what a missing text or audio leads to
        raise ValueError(f"{type(model).__name__} cannot be evaluated on images: {one_line(error)}") from error
    if getattr(outputs, "last_hidden_state", None) is None:
        raise ValueError(f"{type(model).__name__} has no output 'last_hidden_state', so it gives no features.")
    return _select(model, outputs, kinds)


def feature_widths(
    model: torch.nn.Module, pixel_values: torch.Tensor, kinds: Collection[str]
) -> tuple[dict[str, int], tuple[int, int]]:
    """Tries an encoder out: the width of its features by name, and the number and width of its tokens (0 and 0 where
    it has none), by a pass over a few images.

    Raises:
        ValueError: if it gives no features of these images.
    """
    try:
        features = encoder_features(model, pixel_values, kinds)
    except RuntimeError as error:  # such as pixels of a shape that the layers cannot take
        raise ValueError(f"{type(model).__name__} cannot be evaluated on images: {one_line(error)}") from error
    token_shape = features.pop("token_shape", torch.zeros(1, 2, dtype=torch.int64))[0].tolist()
    return {name: value.shape[-1] for name, value in features.items()}, tuple(token_shape)


def _select(model: PreTrainedModel, outputs, kinds: Collection[str]) -> dict[str, torch.Tensor]:
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
            features["last4"] = torch.cat(layers[1:][-CONCATENATED_LAYERS:], dim=1)  # the embedding is no layer
        if "layers" in kinds:
            features.update({f"layer_{index}": layer for index, layer in enumerate(layers)})
    return features


def _layer_means(model: PreTrainedModel, outputs) -> list[torch.Tensor]:
    """(B, D) of the embedding and of each layer, the mean of its tokens after the final layer norm."""
    norm = getattr(model, "layernorm", None)
    means = []
    for hidden_state in outputs.hidden_states[:-1]:
        if isinstance(norm, torch.nn.LayerNorm) and norm.normalized_shape == hidden_state.shape[-1:]:
            hidden_state = norm(hidden_state)
        means.append(_tokens(hidden_state).mean(dim=1))
    # Whether the last of `hidden_states` is before or after the norm differs from class to class; this is after it.
    return [*means, _tokens(outputs.last_hidden_state).mean(dim=1)]


def _tokens(hidden_state: torch.Tensor) -> torch.Tensor:
    """(B, N, D), or the (B, D, H, W) of a convolutional network, as float32 tokens (B, N, D)."""
    return (hidden_state.flatten(2).transpose(1, 2) if hidden_state.dim() == 4 else hidden_state).float()
