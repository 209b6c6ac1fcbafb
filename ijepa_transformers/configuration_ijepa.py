# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of I-JEPA (arXiv 2301.08243): encoder, predictor and loss, and the table of published sizes.

Every field of the `IJepaConfig` in `transformers` exists here too, with the same name and meaning, so that each class
reads the `config.json` of the other. Fields that only pretraining needs are unknown to the stock class, which keeps
and ignores them.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


# Encoder and predictor sizes of the paper (table 1 of section 4; tiny and small follow ViT-Ti and ViT-S). Patch and
# image size are not part of a size: IJepaConfig(**IJEPA_SIZES["huge"], patch_size=14).
IJEPA_SIZES = {
    "tiny": {
        "hidden_size": 192,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "predictor_num_hidden_layers": 6,
    },
    "small": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "predictor_num_hidden_layers": 6,
    },
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "predictor_num_hidden_layers": 6,
    },
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "predictor_num_hidden_layers": 12,
    },
    "huge": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "predictor_num_hidden_layers": 12,
    },
    "giant": {
        "hidden_size": 1408,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
        "predictor_num_hidden_layers": 16,
    },
}


# Fields of earlier versions -> the value that stands for today's behaviour.
REMOVED_FIELDS = {"predictor_attention": "full", "normalize_targets": True}


def _height_and_width(name: str, value: Any) -> tuple[int, int]:
    """`value` as a (height, width) pair of positive integers; ValueError if it is anything else."""
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name} must be a positive integer or a (height, width) pair of them, got {value!r}.")
    return pair[0], pair[1]


@strict
class IJepaConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of an I-JEPA encoder and of the networks it is pretrained with.

    The defaults are those of a base encoder, not of a published model such as
    [facebook/ijepa_vith14_1k](https://huggingface.co/facebook/ijepa_vith14_1k).

    Args:
        hidden_size (`int`, defaults to 768): width of the encoder; a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12): layers of the encoder.
        num_attention_heads (`int`, defaults to 12): attention heads of each encoder layer.
        intermediate_size (`int`, defaults to 3072): width of the encoder's feed-forward layers.
        hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward layers (exact GELU).
        hidden_dropout_prob (`float`, defaults to 0.0): dropout on embeddings and layer outputs.
        attention_probs_dropout_prob (`float`, defaults to 0.0): dropout on attention probabilities.
        initializer_range (`float`, defaults to 0.02): standard deviation of initial weights. The published value suits
            a width of about 1280. Take about 1/sqrt(hidden_size) for narrow encoders: with 0.02 and a width of 96 the
            layers add next to nothing to their input at first, and what is learned comes later.
        layer_norm_eps (`float`, defaults to 1e-6): epsilon of every layer norm inside the networks.
        image_size (`int` or `(height, width)`, defaults to 224): image size in pixels.
        patch_size (`int` or `(height, width)`, defaults to 16): patch size in pixels.
        num_channels (`int`, defaults to 3): channels of the input images.
        qkv_bias (`bool`, defaults to `True`): whether queries, keys and values have a bias.
        pooler_output_size (`int`, *optional*): read by the stock class only; here `pooler_output` is the mean of the
            patch tokens and has `hidden_size` features.
        pooler_act (`str`, defaults to `"tanh"`): read by the stock class only.
        drop_path_rate (`float`, defaults to 0.0): stochastic depth rate of the last encoder layer. It rises linearly
            from 0 in the first layer. The target encoder and the predictor never drop a path.
        patch_embedding_init (`str`, defaults to `"published"`): `"published"` draws the patch embedding's weights
            with standard deviation `initializer_range`. `"fan_in"` draws them with 1/sqrt(channels x patch height x
            patch width), so that the content of small patches is not hidden by the position embeddings, whose values
            are about 0.7.
        predictor_hidden_size (`int`, defaults to 384): width of the predictor; a multiple of 4.
        predictor_num_hidden_layers (`int`, defaults to 6): layers of the predictor.
        predictor_num_attention_heads (`int`, *optional*): heads of the predictor; the encoder's number by default.
        predictor_intermediate_size (`int`, *optional*): feed-forward width of the predictor; 4 x its width by default.
        loss_type (`str`, defaults to `"smooth_l1"`): `"smooth_l1"` (beta 1, Meta's released code) or `"mse"` (the
            squared L2 distance of the paper's section 3), both averaged over every element.
        target_normalization (`str`, defaults to `"layer"`): what is done to the target encoder's outputs before the
            loss. `"layer"`, as released: a layer norm over the features of each patch, without affine parameters.
            `"batch"`, this project's own, for small data: each feature gets mean 0 and standard deviation 1 over all
            patches of all images of a forward pass, so that weak features count as much as strong ones. It was tried
            with 16 to 64 images. `"none"`: nothing is done.
        target_image_mean (`float`, defaults to 1.0): share of each image's mean feature that stays in the targets.
            1, as published, leaves all of it, and 0 nothing. The mean over the patches of an image is what its patches
            have in common, such as colour and brightness. It is easy to predict. With less of it, the loss is more
            about how patches differ. It is taken away before `target_normalization`.
        out_features, out_indices (`list`, *optional*): stages an `IJepaBackbone` returns: `"stem"`, `"stage1"`, ...

    Raises:
        ValueError: if sizes do not fit each other; the message shows the offending values.

    Example:

    ```python
    >>> from ijepa_transformers import IJEPA_SIZES, IJepaConfig

    >>> config = IJepaConfig(**IJEPA_SIZES["huge"], patch_size=14)
    >>> config.grid_size
    (16, 16)
    ```
    """

    model_type = "ijepa"
    transformers_weights = None  # `IJepaForPretraining.from_pretrained` names the index of its files with it

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    drop_path_rate: float | int = 0.0
    patch_embedding_init: str = "published"
    predictor_hidden_size: int = 384
    predictor_num_hidden_layers: int = 6
    predictor_num_attention_heads: int | None = None
    predictor_intermediate_size: int | None = None
    loss_type: str = "smooth_l1"
    target_normalization: str = "layer"
    target_image_mean: float | int = 1.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, usual in REMOVED_FIELDS.items():
            value = kwargs.pop(name, usual)
            if value != usual:
                raise ValueError(f"{name} {value!r} is no longer supported; it can only be {usual!r}.")
        if self.pooler_output_size is None:
            self.pooler_output_size = self.hidden_size
        if self.predictor_num_attention_heads is None:
            self.predictor_num_attention_heads = self.num_attention_heads
        if self.predictor_intermediate_size is None:
            self.predictor_intermediate_size = 4 * self.predictor_hidden_size
        self._check_transformers()
        self._check_grid()
        self._check_choices()
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def image_height_and_width(self) -> tuple[int, int]:
        """Image size in pixels as (height, width)."""
        return _height_and_width("image_size", self.image_size)

    @property
    def patch_height_and_width(self) -> tuple[int, int]:
        """Patch size in pixels as (height, width)."""
        return _height_and_width("patch_size", self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per image as (rows, columns). The model ignores pixels after the last whole patch."""
        image, patch = self.image_height_and_width, self.patch_height_and_width
        return image[0] // patch[0], image[1] // patch[1]

    @property
    def num_patches(self) -> int:
        """Patches per image: rows x columns of the grid."""
        return self.grid_size[0] * self.grid_size[1]

    def _check_transformers(self) -> None:
        for prefix in ("", "predictor_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width <= 0 or width % 4:
                raise ValueError(
                    f"{prefix}hidden_size must be a positive multiple of 4 for the 2-D sin-cos position embeddings,"
                    f" got {width}."
                )
            if heads <= 0 or width % heads:
                raise ValueError(
                    f"{prefix}hidden_size must be divisible by {prefix}num_attention_heads, got {width} and {heads}."
                )
        for name in ("num_hidden_layers", "intermediate_size", "num_channels", "predictor_intermediate_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.predictor_num_hidden_layers < 0:
            raise ValueError(
                f"predictor_num_hidden_layers must not be negative, got {self.predictor_num_hidden_layers}."
            )

    def _check_grid(self) -> None:
        image, patch = self.image_height_and_width, self.patch_height_and_width
        if image[0] < patch[0] or image[1] < patch[1]:
            raise ValueError(
                f"image_size {self.image_size} is smaller than one patch of patch_size {self.patch_size}."
            )

    def _check_choices(self) -> None:
        choices = {
            "loss_type": ("smooth_l1", "mse"),
            "patch_embedding_init": ("published", "fan_in"),
            "target_normalization": ("layer", "batch", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {self.drop_path_rate}.")
        if not 0 <= self.target_image_mean <= 1:
            raise ValueError(f"target_image_mean must lie in [0, 1], got {self.target_image_mean}.")
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range must be above 0, got {self.initializer_range}.")


__all__ = ["IJEPA_SIZES", "IJepaConfig"]
