# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Ways to take one pretraining step: ours, a plain eager reference from stock Transformers layers, lightly's.

Each contender takes the same images and masks and does a whole optimizer step: forward of context encoder, predictor
and target encoder, loss, backward, AdamW, moving average. All start from the same weights: ours and the reference even
share the parameters, so that one set of them, and one set of AdamW's moments, fits the device beside the activations.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.models.ijepa import configuration_ijepa as stock_configuration
from transformers.models.ijepa import modeling_ijepa as stock

from ijepa_transformers import IJepaConfig, IJepaForPretraining
from ijepa_transformers.execution import choose_attention, set_matmul_precision
from ijepa_transformers.modeling_ijepa import IJepaLayer
from ijepa_transformers.optimization import Schedules, build_optimizer, parameter_groups


# A run long enough for the benchmark to stay in its warm-up, whose small steps keep the loss finite on any images.
SCHEDULES = Schedules(total_steps=1_000_000, warmup_steps=100_000)


STABLE_PRETRAINING_LEFT_OUT = (
    "stable-pretraining 0.1.8 (methods.IJEPA) takes no masks and does other work: it draws its own blocks inside"
    " forward, and its predictor runs once over the context and the union of all target blocks, instead of once per"
    " target block, so that the blocks' queries attend to each other and about half of the predictor's tokens are"
    " processed; the encoder's positions are learned, the predictor's norms have epsilon 1e-5 and its number of heads"
    " is not the encoder's. Our masks and our loss cannot be given to it: a ratio would compare other mathematics."
)


class Batch(NamedTuple):
    """Images on the device; masks on the host, as a loader hands them over."""

    pixel_values: torch.Tensor
    context_indices: torch.Tensor  # (B, 1, N_ctx)
    target_indices: torch.Tensor  # (B, M, N_tgt)

    def first(self, count: int) -> "Batch":
        return Batch(*(tensor[:count] for tensor in self))


def untimed(name: str) -> AbstractContextManager:
    """Stands for a timer of the part `name` of a step where nobody measures parts."""
    return nullcontext()


class Contender:
    """One way to take the step. `networks` holds the trained parameters and the target encoder."""

    name: str
    description: str
    deviations: tuple[str, ...] = ()  # from the recipe that all others follow

    def __init__(self, device: torch.device, precision: str, attention: str, matmul_precision: str):
        self.device, self.precision = device, precision
        self.attention, self.matmul_precision = attention, matmul_precision
        self.networks: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.number = 0  # of the next step

    @contextmanager
    def settings(self) -> Iterator[None]:
        """torch's precision of float32 matrix products is global: each contender has its own while it works."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul_precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def loss(self, batch: Batch, part: Callable = untimed) -> torch.Tensor:
        """The forward pass, in this contender's precision."""
        context_indices, target_indices = (
            indices.to(self.device, non_blocking=True) for indices in (batch.context_indices, batch.target_indices)
        )
        with self.autocast():
            return self.forward(batch.pixel_values, context_indices, target_indices, part)

    def step(self, batch: Batch, part: Callable = untimed) -> None:
        """One whole optimizer step."""
        with part("forward"):
            loss = self.loss(batch, part)
        with part("backward"):
            self.backward(loss)
        self.update(loss.detach(), part)
        self.number += 1

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def forward(self, pixel_values, context_indices, target_indices, part: Callable) -> torch.Tensor:
        raise NotImplementedError

    def update(self, loss: torch.Tensor, part: Callable) -> None:
        raise NotImplementedError

    def gradients(self) -> dict[str, torch.Tensor]:
        """Name -> gradient of the trained parameters, under our names."""
        return {name: p.grad for name, p in self.networks.named_parameters() if p.grad is not None}

    def resident_tensors(self) -> list[torch.Tensor]:
        """What stays on the device between steps."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.networks.parameters(), *self.networks.buffers(), *filter(torch.is_tensor, moments)]


def build_networks(config: IJepaConfig, device: torch.device, attention: str) -> IJepaForPretraining:
    config = copy.deepcopy(config)  # it keeps which attention is used, and every contender has its own
    with torch.device(device):
        return IJepaForPretraining._from_config(config, attn_implementation=attention).train()


def share_weights(networks: nn.Module, source: nn.Module) -> None:
    """Makes the parameters and buffers of `source` those of `networks` too; both have the same names."""
    networks.load_state_dict(source.state_dict(keep_vars=True), assign=True)


@contextmanager
def timed_modules(modules: dict[str, nn.Module], part: Callable) -> Iterator[None]:
    """The forward pass of each module is a part of its own."""
    with ExitStack() as stack:
        running = {}
        for name, module in modules.items():

            def enter(*_, name=name):
                running[name] = part(name)
                running[name].__enter__()

            def leave(*_, name=name):
                running.pop(name).__exit__(None, None, None)

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


class Ours(Contender):
    """The package's public pieces put together as run_pretraining.py does."""

    def __init__(
        self,
        config: IJepaConfig,
        device: torch.device,
        precision: str,
        *,
        name: str = "ours",
        description: str = "this package, as run_pretraining.py runs it",
        weights_of: "Ours | None" = None,
        matmul_precision: str | None = None,
        compiled: bool = False,
    ):
        matmul_precision, attention = automatic_execution(device, precision, matmul_precision)
        super().__init__(device, precision, attention, matmul_precision)
        self.name, self.description = name, description
        self.networks = build_networks(config, device, self.attention)
        if weights_of is not None:
            share_weights(self.networks, weights_of.networks)
            self.optimizer = weights_of.optimizer
        else:
            self.optimizer = build_optimizer(
                parameter_groups(self.networks),
                name="adamw",
                learning_rate=SCHEDULES.peak_learning_rate,
                betas=(0.9, 0.999),
                epsilon=1e-8,
                device_type=device.type,
            )
        if compiled:
            for layer in (module for module in self.networks.modules() if isinstance(module, IJepaLayer)):
                layer.compile(dynamic=True)

    def forward(self, pixel_values, context_indices, target_indices, part):
        networks = self.networks
        parts = {
            "context forward": networks.context_encoder,
            "predictor forward": networks.predictor,
            "target forward": networks.ijepa,
        }
        with nullcontext() if part is untimed else timed_modules(parts, part):
            return networks(pixel_values, context_indices, target_indices).loss

    def update(self, loss, part):
        """As in ijepa_transformers/pretraining/loop.py, without clipping, which is off by default."""
        SCHEDULES.apply(self.optimizer, self.number)
        with part("gradient norm"):
            gradients = [p.grad for p in self.networks.parameters() if p.grad is not None]
            is_finite = math.isfinite(float(torch.nn.utils.get_total_norm(gradients)))
        with part("optimizer"):
            if is_finite:
                self.optimizer.step()
            self.optimizer.zero_grad()
        with part("moving average"):
            if is_finite:
                self.networks.update_target_encoder(SCHEDULES.momentum(self.number))


def automatic_execution(device: torch.device, precision: str, matmul_precision: str | None = None) -> tuple[str, str]:
    """The precision of float32 products that the package chooses here, unless given, and the attention that it takes
    then; the global setting stays as it was."""
    before = torch.get_float32_matmul_precision()
    try:
        if matmul_precision is None:
            set_matmul_precision(device.type, precision)
        else:
            torch.set_float32_matmul_precision(matmul_precision)
        return torch.get_float32_matmul_precision(), choose_attention(device.type, precision)
    finally:
        torch.set_float32_matmul_precision(before)


class StockPredictor(nn.Module):
    """The predictor from stock layers. Parameter names are ours, so that the weights can be."""

    def __init__(self, config: IJepaConfig):
        super().__init__()
        width = config.predictor_hidden_size
        layer_config = stock_config(
            config,
            hidden_size=width,
            num_attention_heads=config.predictor_num_attention_heads,
            intermediate_size=config.predictor_intermediate_size,
        )
        self.input_projection = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("position_embeddings", torch.zeros(1, config.num_patches, width))
        self.layers = nn.ModuleList(stock.IJepaLayer(layer_config) for _ in range(config.predictor_num_hidden_layers))
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output_projection = nn.Linear(width, config.hidden_size)

    def forward(self, context_hidden_states, context_indices, target_indices) -> torch.Tensor:
        """(B, N_ctx, D), (B, N_ctx), (B, M, N_tgt) -> (M * B, N_tgt, D), block after block."""
        num_images, num_targets, num_target_tokens = target_indices.shape
        positions = self.position_embeddings.expand(num_images, -1, -1)
        context = self.input_projection(context_hidden_states) + select(positions, context_indices)
        context = context.repeat(num_targets, 1, 1)  # (M * B, N_ctx, P): through every layer once per block
        target_positions = torch.cat([select(positions, block) for block in target_indices.unbind(1)])
        queries = self.mask_token.expand(num_targets * num_images, num_target_tokens, -1) + target_positions
        hidden_states = torch.cat([context, queries], dim=1)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        hidden_states = self.layernorm(hidden_states)
        return self.output_projection(hidden_states[:, -num_target_tokens:])


class StockNetworks(nn.Module):
    """Target encoder, context encoder and predictor from stock Transformers, under our names."""

    def __init__(self, config: IJepaConfig):
        super().__init__()
        self.ijepa, self.context_encoder = (stock.IJepaModel(stock_config(config)) for _ in range(2))
        self.predictor = StockPredictor(config)
        self.ijepa.requires_grad_(False)
        for encoder in (self.ijepa, self.context_encoder):
            encoder.embeddings.position_embeddings.requires_grad_(False)  # fixed in the recipe, trained in stock


def stock_config(config: IJepaConfig, **changes) -> stock_configuration.IJepaConfig:
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    fields += ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "image_size", "patch_size")
    fields += ("num_channels", "qkv_bias")
    values = {field: getattr(config, field) for field in fields}
    return stock_configuration.IJepaConfig(**{**values, **changes}, attn_implementation="eager")


def select(hidden_states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, N, D), (B, K) -> (B, K, D)."""
    return torch.gather(hidden_states, 1, indices.unsqueeze(-1).repeat(1, 1, hidden_states.shape[-1]))


def encode(encoder: stock.IJepaModel, pixel_values, indices=None) -> torch.Tensor:
    """The stock encoder on all patches, or on those of `indices` after the whole grid was embedded."""
    hidden_states = encoder.embeddings(pixel_values)
    if indices is not None:
        hidden_states = select(hidden_states, indices)
    for layer in encoder.layers:
        hidden_states = layer(hidden_states)
    return encoder.layernorm(hidden_states)


class Reference(Contender):
    """The published step, written plainly: eager attention, the context repeated for each target block, whole-grid
    embedding and target encoder, foreach AdamW, the moving average parameter by parameter, the loss read each step,
    and on CUDA in bf16 a gradient scaler, as published."""

    name = "reference"
    description = "plain eager reference from stock Transformers layers"

    def __init__(self, config: IJepaConfig, device: torch.device, precision: str, ours: Ours, matmul_precision: str):
        super().__init__(device, precision, "eager", matmul_precision)
        with torch.device(device):
            self.networks = StockNetworks(config).train()
        self.networks.ijepa.eval()
        share_weights(self.networks, ours.networks)
        groups = [
            {"params": group["params"], "decayed": group["decayed"]} for group in parameter_groups(self.networks)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=SCHEDULES.peak_learning_rate, foreach=True)
        share_moments(self.optimizer, ours.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "bf16" and device.type == "cuda")

    def forward(self, pixel_values, context_indices, target_indices, part):
        context_indices = context_indices[:, 0]
        with part("target forward"), torch.no_grad():
            targets = encode(self.networks.ijepa, pixel_values)
            targets = nn.functional.layer_norm(targets, targets.shape[-1:])
            targets = torch.cat([select(targets, block) for block in target_indices.unbind(1)])  # (M * B, N_tgt, D)
        with part("context forward"):
            context = encode(self.networks.context_encoder, pixel_values, context_indices)
        with part("predictor forward"):
            predictions = self.networks.predictor(context, context_indices, target_indices)
        return nn.functional.smooth_l1_loss(predictions, targets)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def update(self, loss, part):
        SCHEDULES.apply(self.optimizer, self.number)
        with part("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        momentum = SCHEDULES.momentum(self.number)
        with part("moving average"), torch.no_grad():
            pairs = zip(self.networks.ijepa.parameters(), self.networks.context_encoder.parameters(), strict=True)
            for target, context in pairs:
                target.mul_(momentum).add_(context, alpha=1.0 - momentum)
        self.last_loss = loss.item()


def share_moments(optimizer: torch.optim.AdamW, source: torch.optim.AdamW) -> None:
    """AdamW's moments of `source` become those of `optimizer` too, as far as `source` has stepped; the two must train
    the same parameters. The count of steps stays apart: on CUDA, fused AdamW keeps it on the device, foreach not."""
    for parameter, state in source.state.items():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device="cpu"),
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
        }


class Lightly(Contender):
    """lightly's I-JEPA: its timm encoder and predictor, its target selection, its moving average.

    lightly must be importable. The documented training example is no part of the package; this follows it in what
    decides the time: smooth L1, AdamW over one group at a constant rate, `update_momentum` after each step.
    """

    name = "lightly"
    description = "lightly's MaskedVisionTransformerTIMM and IJEPAPredictorTIMM"
    deviations = (
        "timm blocks with fused q, k, v and scaled_dot_product_attention, our weights copied in: lightly's own initial"
        " weights (those of its masked autoencoder) are not the published ones",
        "a timm VisionTransformer without class token was built for it; the stock timm ViTs have one",
        "masks of our sampler; its IJEPAMaskCollator defaults to 2 targets of scale 0.2 to 0.8 and aspect 0.3 to 3",
        "AdamW at the constant rate 1.5e-4 with weight decay on biases and norms too, one group, no schedules",
        "no norm of the gradient is taken",
    )

    def __init__(self, config: IJepaConfig, device: torch.device, precision: str, ours: Ours, matmul_precision: str):
        super().__init__(device, precision, "timm's fused attention (sdpa)", matmul_precision)
        from lightly.models import utils  # a peer, only there when it was asked for

        self.utils = utils
        self.networks = lightly_networks(config).to(device).train()
        loaded = self.networks.load_state_dict(lightly_weights(ours.networks.state_dict()), strict=False)
        unused = {"encoder.mask_token", "target_encoder.mask_token"}
        if loaded.unexpected_keys or set(loaded.missing_keys) != unused:
            raise ValueError(f"lightly's networks have other weights than expected: {loaded}.")
        self.networks["target_encoder"].requires_grad_(False)
        self.criterion = nn.SmoothL1Loss()
        trained = [*self.networks["encoder"].parameters(), *self.networks["predictor"].parameters()]
        self.optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=1.5e-4)

    def forward(self, pixel_values, context_indices, target_indices, part):
        encoder, target_encoder, predictor = (self.networks[key] for key in ("encoder", "target_encoder", "predictor"))
        context_indices, blocks = context_indices[:, 0], list(target_indices.unbind(1))
        with part("target forward"), torch.no_grad():
            targets = target_encoder.encode(pixel_values)
            targets = nn.functional.layer_norm(targets, targets.shape[-1:])
            targets = self.utils.apply_masks(targets, blocks)
        with part("context forward"):
            context = encoder.encode(pixel_values, idx_keep=context_indices)
        with part("predictor forward"):
            predictions = predictor(context, context_indices, blocks)
        return self.criterion(predictions, targets)

    def update(self, loss, part):
        with part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with part("moving average"):
            self.utils.update_momentum(
                self.networks["encoder"], self.networks["target_encoder"], m=SCHEDULES.momentum(self.number)
            )


def lightly_networks(config: IJepaConfig) -> nn.ModuleDict:
    from lightly.models.modules import IJEPAPredictorTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    norm = partial(nn.LayerNorm, eps=config.layer_norm_eps)

    def encoder():
        vit = VisionTransformer(
            img_size=config.image_height_and_width,
            patch_size=config.patch_height_and_width,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            class_token=False,
            global_pool="",
            num_classes=0,
            norm_layer=norm,
        )
        return MaskedVisionTransformerTIMM(vit)

    predictor = IJEPAPredictorTIMM(
        num_patches=config.num_patches,
        depth=config.predictor_num_hidden_layers,
        mlp_dim=config.hidden_size,
        predictor_embed_dim=config.predictor_hidden_size,
        num_heads=config.predictor_num_attention_heads,
        mlp_ratio=config.predictor_intermediate_size / config.predictor_hidden_size,
        norm_layer=norm,
    )
    return nn.ModuleDict({"encoder": encoder(), "target_encoder": encoder(), "predictor": predictor})


# Ours -> lightly's and timm's; the projections of q, k and v are joined apart.
LIGHTLY_NAMES = (
    ("context_encoder.", "encoder.vit."),
    ("ijepa.", "target_encoder.vit."),
    ("predictor.layers.", "predictor.decoder.blocks."),
    ("predictor.layernorm.", "predictor.decoder.norm."),
    ("predictor.mask_token", "predictor.decoder.mask_token"),
    ("predictor.position_embeddings", "predictor.decoder.pos_embed"),
    ("predictor.input_projection", "predictor.predictor_embed"),
    ("predictor.output_projection", "predictor.predictor_proj"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layers.", "blocks."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm.", "norm."),
    ("attention.o_proj", "attn.proj"),
    ("attention.q_proj", "attn.qkv"),
)


def lightly_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under lightly's names."""
    renamed = {}
    for name, value in weights.items():
        if ".k_proj" in name or ".v_proj" in name:
            continue
        if ".q_proj" in name:
            value = torch.cat([value, *(weights[name.replace(".q_proj", key)] for key in (".k_proj", ".v_proj"))])
        for ours, theirs in LIGHTLY_NAMES:
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed
