# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The methods of a comparison: one backbone, several ways to train it.

A learner has a model, a loss of a batch, the encoders that are judged, and perhaps something to do after each step.
Shapes: B images of `image_size` pixels, N patches, D `hidden_size`.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from ijepa_transformers import IJepaConfig, IJepaForImageClassification, IJepaForPretraining, IJepaModel
from ijepa_transformers.arguments import require
from ijepa_transformers.execution import choose_attention
from ijepa_transformers.masking import build_masking
from ijepa_transformers.modeling_ijepa import sincos_position_embeddings
from ijepa_transformers.optimization import momentum_of_half_life


Embedding = Callable[[torch.Tensor], torch.Tensor]  # normalised pixels (B, channels, H, W) to features (B, D)
METHODS = ("ijepa", "mae", "supervised", "sigreg")
MAE_MASK_RATIO, MAE_BETAS = 0.75, (0.9, 0.95)  # as published (arXiv 2111.06377, table 8)
MAE_MASKS = 2**31  # added to the seed of MAE's masks, so that they are drawn from other numbers than crops


@dataclass(frozen=True)
class Settings:
    """One run. Lengths of schedules are shares of the run, so that they hold for a budget in seconds too.

    Args:
        data: a source as in `ijepa pretrain`.
        method: one of METHODS.
        stored_size: side of the images in memory, pixels; crops are cut from them.
        held_out_block: see `load_parts`.
        batch_size: images of a step.
        warmup: share of the run in which the rate rises.
        final_rate: the last rate as a share of `rate`. The rate falls along half a cosine.
        half_life: share of the run in which the target encoder forgets half of its past.
        patch_embedding_init: as in `IJepaConfig`; or "torch": PyTorch's default for convolutions.
        momentum: of the target encoder in each step, instead of `half_life`.
        final_momentum: reached linearly at the end of the run; None keeps the first value.
        masks: "random", "inverse_block", "unbiased" or "meta", and what `build_masking` takes.
        sigreg_weight: of SIGReg's term; of method "sigreg", and of "ijepa" if it is above 0.
        views: crops of each image, of method "sigreg".

    Raises:
        ValueError: if a number is none. A text such as "1e-3", which YAML does not read as a number, becomes one.
    """

    data: str
    method: str = "ijepa"
    num_channels: int = 3
    image_size: int = 64
    stored_size: int = 80
    held_out_block: int = 1
    patch_size: int = 8
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    predictor_hidden_size: int = 48
    predictor_num_hidden_layers: int = 2
    predictor_num_attention_heads: int = 4
    patch_embedding_init: str = "fan_in"
    initializer_range: float = 0.02
    target_normalization: str = "batch"
    target_image_mean: float = 1.0
    loss_type: str = "smooth_l1"
    batch_size: int = 64
    rate: float = 1e-3
    final_rate: float = 0.01
    warmup: float = 0.1
    weight_decay: float = 0.05
    final_weight_decay: float = 0.05
    half_life: float = 0.01
    momentum: float | None = None
    final_momentum: float | None = 1.0
    masks: dict = field(default_factory=lambda: {"mode": "random", "visible_share": 0.3})
    mask_ratio: float = MAE_MASK_RATIO
    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    sigreg_weight: float = 0.0
    views: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.type in (int, float, float | None):
                object.__setattr__(self, entry.name, _number(entry.name, entry.type, getattr(self, entry.name)))

    @property
    def grid_size(self) -> tuple[int, int]:
        return (self.image_size // self.patch_size,) * 2

    def config(self, **more) -> IJepaConfig:
        """Of the I-JEPA model, and of the backbone of the others."""
        return IJepaConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=4 * self.hidden_size,
            predictor_hidden_size=self.predictor_hidden_size,
            predictor_num_hidden_layers=self.predictor_num_hidden_layers,
            predictor_num_attention_heads=self.predictor_num_attention_heads,
            patch_embedding_init="published" if self.patch_embedding_init == "torch" else self.patch_embedding_init,
            initializer_range=self.initializer_range,
            target_normalization=self.target_normalization,
            target_image_mean=self.target_image_mean,
            loss_type=self.loss_type,
            **more,
        )


def _number(name: str, kind: Any, value: Any) -> Any:
    """The value, or the number that it is the text of."""
    if value is None and kind == float | None:
        return None
    given = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value) if kind is int else float(value)
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    what = "a whole number" if kind is int else "a number"
    require(is_number and math.isfinite(value), f"{name} must be {what}, got {given!r}.")
    return value


@dataclass(frozen=True)
class Learner:
    """What is trained.

    Args:
        model: holds everything that is trained.
        loss_of: normalised pixels (B * views, channels, H, W), classes (B,) and the number of the step -> a scalar.
        encoders: name -> a function that gives an `Embedding`; called when the training is judged.
        betas: of AdamW.
        views: crops of each image.
        after_step: given the share of the run that is done, and the number of steps that the run will have.
    """

    model: nn.Module
    loss_of: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    encoders: dict[str, Callable[[], Embedding]]
    betas: tuple[float, float] = (0.9, 0.999)
    views: int = 1
    after_step: Callable[[float, float], object] = lambda done, steps: None


def build_learner(settings: Settings, num_classes: int, device: str, precision: str = "no") -> Learner:
    """Raises ValueError if the method is unknown."""
    builders = {"ijepa": ijepa, "mae": mae, "supervised": supervised, "sigreg": sigreg}
    if settings.method not in builders:
        raise ValueError(f"method {settings.method!r} is unknown: choose one of {METHODS}")
    return builders[settings.method](settings, num_classes, device, precision)


def built(model_class: type, config, device: str, precision: str) -> PreTrainedModel:
    """A model with the attention that is fastest here; all methods get the same."""
    model = model_class._from_config(config, attn_implementation=choose_attention(device, precision))
    return model.to(device).train()


def embedding_of(encoder: IJepaModel) -> Embedding:
    """The mean of the patch tokens after the last norm."""
    encoder.eval()
    return lambda pixel_values: encoder(pixel_values).pooler_output


# ------------------------------------------------------------------------------------------------------------- I-JEPA


def ijepa(settings: Settings, num_classes: int, device: str, precision: str) -> Learner:
    model = built(IJepaForPretraining, settings.config(), device, precision)
    if settings.patch_embedding_init == "torch":
        projections = [e.embeddings.patch_embeddings.projection for e in (model.context_encoder, model.ijepa)]
        projections[0].reset_parameters()
        projections[1].load_state_dict(projections[0].state_dict())
    masking = build_masking(settings.grid_size, **settings.masks)

    def loss_of(pixel_values: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        masks = masking.sample(len(pixel_values), settings.seed, step)
        output = model(pixel_values, *(indices.to(device, non_blocking=True) for indices in masks))
        if not settings.sigreg_weight:
            return output.loss
        pooled = output.context_hidden_states.mean(dim=(1, 2))
        return output.loss + settings.sigreg_weight * sigreg_loss(pooled, step)

    def after_step(done: float, steps: float) -> None:
        first = settings.momentum
        if first is None:
            first = momentum_of_half_life(max(settings.half_life * steps, 1))
        last = first if settings.final_momentum is None else settings.final_momentum
        model.update_target_encoder(min(first + (last - first) * done, 1.0))

    encoders = {
        "target": lambda: embedding_of(model.ijepa),
        "context": lambda: embedding_of(model.context_encoder),
    }
    return Learner(model, loss_of, encoders, after_step=after_step)


# ---------------------------------------------------------------------------------------------------------------- MAE


def mae(settings: Settings, num_classes: int, device: str, precision: str) -> Learner:
    """MAE with our encoder's sizes; the decoder has the sizes of the settings' predictor."""
    config = ViTMAEConfig(
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=4 * settings.hidden_size,
        decoder_hidden_size=settings.predictor_hidden_size,
        decoder_num_hidden_layers=settings.predictor_num_hidden_layers,
        decoder_num_attention_heads=settings.predictor_num_attention_heads,
        decoder_intermediate_size=4 * settings.predictor_hidden_size,
        num_channels=settings.num_channels,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        mask_ratio=settings.mask_ratio,
        norm_pix_loss=True,
        layer_norm_eps=settings.config().layer_norm_eps,
    )
    model = built(ViTMAEForPreTraining, config, device, precision)
    initialize_mae(model)
    encoders = {"encoder": lambda: mae_embedding(model, device)}

    def loss_of(pixel_values: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(settings.seed * 2**32 + MAE_MASKS + step)
        shape = len(pixel_values), math.prod(settings.grid_size)
        return model(pixel_values, noise=torch.rand(shape, device=device, generator=generator)).loss

    return Learner(model, loss_of, encoders, MAE_BETAS)


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
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    for token in (embeddings.cls_token, decoder.mask_token):
        nn.init.normal_(token, std=model.config.initializer_range)


def mae_embedding(trained: ViTMAEForPreTraining, device: str) -> Embedding:
    """The mean of the patch tokens after the last norm, nothing masked, without the class token."""
    config = ViTMAEConfig.from_dict({**trained.config.to_dict(), "mask_ratio": 0.0})
    encoder = ViTMAEModel._from_config(config, attn_implementation=trained.config._attn_implementation)
    encoder.load_state_dict(trained.vit.state_dict())
    encoder = encoder.to(device).eval()
    num_patches = encoder.embeddings.patch_embeddings.num_patches

    def embed(pixel_values: torch.Tensor) -> torch.Tensor:
        in_order = torch.arange(num_patches, device=pixel_values.device).float().expand(len(pixel_values), -1)
        return encoder(pixel_values, noise=in_order).last_hidden_state[:, 1:].mean(dim=1)

    return embed


# ------------------------------------------------------------------------------------------ supervised, and with crops


def supervised(settings: Settings, num_classes: int, device: str, precision: str) -> Learner:
    """The backbone and a linear classifier on the mean of the patch tokens, trained on all labels."""
    model = built(IJepaForImageClassification, settings.config(num_labels=num_classes), device, precision)

    def loss_of(pixel_values: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        return cross_entropy(model(pixel_values).logits, labels)

    return Learner(model, loss_of, {"encoder": lambda: embedding_of(model.ijepa)})


class CropModel(nn.Module):
    """The backbone and a projector of three layers, as LeJEPA has (arXiv 2511.08544)."""

    def __init__(self, config: IJepaConfig, width: int = 512, output_size: int = 64):
        super().__init__()
        self.encoder = IJepaModel(config)
        self.projector = nn.Sequential(
            *(nn.Linear(config.hidden_size, width), nn.BatchNorm1d(width), nn.GELU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.GELU()),
            nn.Linear(width, output_size),
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projector(self.encoder(pixel_values).pooler_output)


def sigreg(settings: Settings, num_classes: int, device: str, precision: str) -> Learner:
    """LeJEPA with crops only: the views of an image should agree, and all embeddings be an isotropic Gaussian."""
    model = CropModel(settings.config()).to(device).train()
    model.encoder.set_attn_implementation(choose_attention(device, precision))

    def loss_of(pixel_values: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        views = model(pixel_values).unflatten(0, (settings.views, -1)).float()  # (views, B, D)
        agreement = (views - views.mean(dim=0)).square().mean()
        spread = torch.stack([sigreg_loss(view, step) for view in views]).mean()
        return (1 - settings.sigreg_weight) * agreement + settings.sigreg_weight * spread

    encoders = {"encoder": lambda: embedding_of(model.encoder)}
    return Learner(model, loss_of, encoders, views=settings.views)


def sigreg_loss(embeddings: torch.Tensor, seed: int, directions: int = 256, knots: int = 17) -> torch.Tensor:
    """Epps and Pulley's distance of embeddings (B, D) from a standard Gaussian, over random directions.

    On each direction it is B times the integral of |f(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) over t, where f is the
    empirical characteristic function (LeJEPA, arXiv 2511.08544, section 4).
    """
    generator = torch.Generator(embeddings.device).manual_seed(seed)
    axes = torch.randn(embeddings.shape[1], directions, device=embeddings.device, generator=generator)
    projected = embeddings.float() @ (axes / axes.norm(dim=0))  # (B, directions)
    points = torch.linspace(0, 3, knots, device=embeddings.device)
    gaussian = (-points.square() / 2).exp()
    angles = projected.unsqueeze(-1) * points  # (B, directions, knots)
    distance = (angles.cos().mean(dim=0) - gaussian).square() + angles.sin().mean(dim=0).square()
    return 2 * len(embeddings) * torch.trapezoid(distance * gaussian, points).mean()  # even in t
