# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""I-JEPA (arXiv 2301.08243) in PyTorch: encoder, predictor, pretraining head, classifier and backbone.

Shape legend:
    B images, N patches of the full grid, K patches kept, D encoder width, P predictor width, H attention heads,
    C context masks per image, M target blocks per image (or per context), N_ctx patches per context,
    N_tgt patches per target block.

Patches are numbered row by row: patch = row * columns + column. Parameter names equal those of
`transformers.IJepaModel`, so that a saved directory opens in the stock classes too.
"""

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo, save_torch_state_dict
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, cached_file, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_ijepa import IJepaConfig


logger = logging.get_logger(__name__)
# Names under which the first converted directories on the Hub store what is now `layers.N.attention.q_proj` and so on.
EARLY_HUB_NAMES = {
    r"encoder\.layer\.": "layers.",
    r"attention\.attention\.query": "attention.q_proj",
    r"attention\.attention\.key": "attention.k_proj",
    r"attention\.attention\.value": "attention.v_proj",
    r"attention\.output\.dense": "attention.o_proj",
    r"intermediate\.dense": "mlp.fc1",
    r"(?<!attention\.)output\.dense": "mlp.fc2",
}
# Arguments of the stock encoder's `forward` that this one has no place for -> why.
STOCK_ARGUMENTS = {
    "bool_masked_pos": "there is no mask token; pass the patches to encode as patch_indices",
    "attention_mask": "every patch attends to all patches; pass the patches to encode as patch_indices",
    "head_mask": "no attention head can be switched off",
}
# Added to the standard deviation of each feature. It is about 1 after the last norm; far smaller ones are rounding.
TARGET_EPSILON = 1e-4
SMALL_STD = 0.02  # of a new classifier
PARAMETERS_PER_LAYER = 16  # weights and biases of attention, feed-forward and their norms
# A pretraining directory keeps the target encoder alone in `model.safetensors`, where every class looks for it. The
# other two networks are in a second file. The index says which file has which weight of all three.
OTHER_NETWORKS = "pretraining.safetensors"
PRETRAINING_INDEX = f"{OTHER_NETWORKS}.index.json"
ENCODER_CLASSES = {"IJepaModel", "IJepaBackbone", "IJepaForImageClassification"}
TRAINER_CHECKPOINT = r"checkpoint-\d+"  # Transformers' Trainer opens `model.safetensors` itself, so it must be whole
DOWNLOAD_SETTINGS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
# Written to `config.json` when a directory carries this code (`register_for_auto_class`, then `save_pretrained`).
# Transformers itself would write only the saved class, without the configuration.
AUTO_MAP = {
    "AutoConfig": "configuration_ijepa.IJepaConfig",
    "AutoModel": "modeling_ijepa.IJepaModel",
    "AutoModelForPreTraining": "modeling_ijepa.IJepaForPretraining",
    "AutoModelForImageClassification": "modeling_ijepa.IJepaForImageClassification",
    "AutoBackbone": "modeling_ijepa.IJepaBackbone",
}


def own_config(config: PreTrainedConfig) -> IJepaConfig:
    """The configuration as an `IJepaConfig` of this package. The stock class of the same name is translated.

    Raises:
        ValueError: if it is the configuration of another kind of model.
    """
    if isinstance(config, IJepaConfig):
        return config
    if getattr(config, "model_type", None) != IJepaConfig.model_type:
        raise ValueError(
            f"I-JEPA models need an IJepaConfig, got a {type(config).__name__} of model type"
            f" {getattr(config, 'model_type', None)!r}."
        )
    settings = {**config.to_dict(), "attn_implementation": config._attn_implementation}
    own = IJepaConfig.from_dict(settings)
    own.name_or_path = config.name_or_path
    return own


def weight_files(directory: Path, variant: str | None = None, stem: str = "model|pretraining") -> list[Path]:
    """The safetensors files of weights in a directory, whole or in shards, of one variant such as "fp16"."""
    dotted = re.escape(f".{variant}") if variant else ""
    names = re.compile(rf"({stem}){dotted}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    return sorted(path for path in directory.glob("*.safetensors") if names.fullmatch(path.name))


def pretraining_index(variant: str | None = None) -> str:
    """The name of the index of all three networks."""
    return PRETRAINING_INDEX.replace(".", f".{variant}.", 1) if variant else PRETRAINING_INDEX


def write_pretraining_index(directory: Path, variant: str | None = None) -> None:
    """Writes which file has which weight, when all files of a pretraining directory are there."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for path in weight_files(directory, variant):
        with safe_open(path, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
        total_size += path.stat().st_size
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / pretraining_index(variant)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def with_suffix(file_name: str, variant: str | None) -> str:
    """The pattern of the names of shards."""
    stem = file_name.removesuffix(".safetensors") + (f".{variant}" if variant else "")
    return f"{stem}{{suffix}}.safetensors"


def remove_weights(directory: Path, variant: str | None = None, stem: str = "model|pretraining") -> None:
    """Removes the weights of an earlier save. Those of another kind of model would be mixed with the new ones."""
    stale = weight_files(directory, variant, stem)
    for path in (*stale, directory / pretraining_index(variant)):
        path.unlink(missing_ok=True)


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if it is a part of a larger one, as FSDP2 may give it; safetensors refuses parts."""
    is_part = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone() if is_part else tensor


def sincos_position_embeddings(width: int, grid_size: tuple[int, int]) -> torch.Tensor:
    """Fixed 2-D sine-cosine position embeddings, float32 of shape (1, N, width).

    The first half of the features codes the column, the second half the row. Each half holds sines, then cosines, of
    the coordinate times width/4 frequencies. The frequencies fall geometrically from 1 to nearly 1/10000. The table is
    computed in float64.
    """
    rows, columns = torch.meshgrid(
        torch.arange(grid_size[0], dtype=torch.float64), torch.arange(grid_size[1], dtype=torch.float64), indexing="ij"
    )
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    column_angles, row_angles = (axis.reshape(-1, 1) * frequencies for axis in (columns, rows))  # (N, width / 4)
    features = [column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos()]
    return torch.cat(features, dim=1).float().unsqueeze(0)


def resize_position_embeddings(
    position_embeddings: torch.Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int]
) -> torch.Tensor:
    """Bicubic interpolation of a (1, N, width) table from one grid of patches to another, in float32."""
    # In a program exported for any resolution the new size is symbolic. Comparing it would fix the program to the size
    # of the example, so the table is always interpolated there. Interpolating to the same size changes nothing.
    is_symbolic = any(isinstance(side, torch.SymInt) for side in new_grid_size)
    if not is_symbolic and tuple(grid_size) == tuple(new_grid_size):
        return position_embeddings
    table = position_embeddings.float().reshape(1, *grid_size, -1).permute(0, 3, 1, 2)
    table = nn.functional.interpolate(table, size=new_grid_size, mode="bicubic", align_corners=False)
    return table.flatten(2).transpose(1, 2).to(position_embeddings.dtype)


def gather_patches(hidden_states: torch.Tensor, patch_indices: torch.Tensor) -> torch.Tensor:
    """The tokens of chosen patches: (B, N, D) and (B, K) give (B, K, D)."""
    return hidden_states.gather(1, patch_indices.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


class IJepaPatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel size. It takes and gives what any `nn.Conv2d` does.

    A column of patches, one patch wide, is computed as a matrix product, which gives the same and is faster.
    """

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, channels, height, width) -> (B, D, rows, columns)."""
        pixel_values = pixel_values.to(self.weight.dtype)
        width = pixel_values.shape[-1]
        if isinstance(width, torch.SymInt) or width != self.kernel_size[1]:
            return super().forward(pixel_values)
        patches = pixel_values.unflatten(2, (-1, self.kernel_size[0])).transpose(1, 2).flatten(2)
        projected = nn.functional.linear(patches, self.weight.flatten(1), self.bias)  # (B, K, D)
        return projected.transpose(1, 2).unsqueeze(-1)


class IJepaPatchEmbeddings(nn.Module):
    """Cuts images (B, channels, height, width) into patches and projects each to (B, N, D)."""

    def __init__(self, config: IJepaConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_height_and_width
        self.projection = IJepaPatchProjection(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )

    def forward(self, pixel_values: torch.Tensor, patch_indices: torch.Tensor | None = None) -> torch.Tensor:
        """All patches, (B, N, D), or those of `patch_indices` (B, K), (B, K, D); the others are not computed.

        Raises:
            ValueError: if the images have another number of channels than the model.
        """
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values have {pixel_values.shape[1]} channels, but the model was built for {self.num_channels}."
            )
        if patch_indices is not None:
            pixel_values = self._kept_patches(pixel_values, patch_indices)
        # Both cases call the convolution: ZeRO-3 and FSDP gather its weights then, and adapters (LoRA) replace it.
        # Contiguous in the order of tokens, because otherwise the residual stream keeps the convolution's layout.
        return self.projection(pixel_values).flatten(2).transpose(1, 2).contiguous()

    def _kept_patches(self, pixel_values: torch.Tensor, patch_indices: torch.Tensor) -> torch.Tensor:
        """The chosen patches as a column of patches: (B, channels, K * patch height, patch width)."""
        patch_height, patch_width = self.patch_size
        rows, columns = pixel_values.shape[2] // patch_height, pixel_values.shape[3] // patch_width
        pixel_values = pixel_values[:, :, : rows * patch_height, : columns * patch_width]
        patches = pixel_values.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
        shape = patches.shape[3:]  # channels, patch height, patch width
        kept = gather_patches(patches.flatten(3).flatten(1, 2), patch_indices)  # outside the grid is an error
        return kept.unflatten(2, shape).transpose(1, 2).flatten(2, 3)


def stream_dtype(weight: torch.Tensor) -> torch.dtype:
    """The precision of the tokens between the layers: that of the weights, because loading in half precision does not
    cast the position tables. Under autocast it is float32, also where FSDP2 gathers a weight in bfloat16."""
    return torch.float32 if _is_under_autocast(weight) else weight.dtype


def _is_under_autocast(tensor: torch.Tensor) -> bool:
    device_type = tensor.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def cast_once(tokens: torch.Tensor) -> torch.Tensor:
    """Without gradients and under autocast, the tokens as autocast would cast them for each product that takes them.

    With gradients they stay as they are: the sum of the gradients would be rounded otherwise.
    """
    if torch.is_grad_enabled() or not _is_under_autocast(tokens):
        return tokens
    return tokens.to(torch.get_autocast_dtype(tokens.device.type))


class IJepaEmbeddings(nn.Module):
    """Patch embeddings plus fixed position embeddings; there is no class token."""

    position_embeddings: torch.Tensor

    def __init__(self, config: IJepaConfig):
        super().__init__()
        self.image_size = config.image_height_and_width
        self.grid_size = config.grid_size
        self.patch_embeddings = IJepaPatchEmbeddings(config)
        # A buffer, not a parameter: it is saved under the stock name, but no optimizer changes it.
        self.register_buffer("position_embeddings", sincos_position_embeddings(config.hidden_size, self.grid_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def patch_grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches in images of (B, channels, height, width)."""
        patch_height, patch_width = self.patch_embeddings.patch_size
        return pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_indices: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """The tokens of all patches, (B, N, D), or those of `patch_indices` (B, K), (B, K, D).

        Raises:
            ValueError: if the images have another size than `image_size` and `interpolate_pos_encoding` is False, or
                if `patch_indices` are not indices.
        """
        if patch_indices is not None and patch_indices.dtype != torch.int64:
            raise ValueError(f"patch_indices must be indices of patches in int64, got {patch_indices.dtype}.")
        if not interpolate_pos_encoding and tuple(pixel_values.shape[-2:]) != self.image_size:
            raise ValueError(
                f"Images of {tuple(pixel_values.shape[-2:])} pixels do not match the model's image_size"
                f" {self.image_size}; pass interpolate_pos_encoding=True to use another resolution."
            )
        positions = resize_position_embeddings(self.position_embeddings, self.grid_size, self.patch_grid(pixel_values))
        # The dtype is read from `parameters()`: reading the attribute `weight` would gather a sharded weight.
        positions = positions.to(stream_dtype(next(self.parameters())))
        if patch_indices is not None:
            positions = positions[0][patch_indices]  # (B, K, D)
        return self.dropout(self.patch_embeddings(pixel_values, patch_indices) + positions)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over (B, H, K, D/H); returns the mix as (B, K, H, D/H) and the probabilities (B, H, K, K).

    `attention_mask` belongs to the interface of Transformers. Here it is always None: all tokens are attended to.
    """
    scores = (query * scaling) @ key.transpose(-1, -2)
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class IJepaAttention(nn.Module):
    """Multi-head attention: each token attends to all tokens and, if there is a memory, to its tokens too."""

    def __init__(self, config: IJepaConfig, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (B, K, D).
            memory: (B, K', D), tokens that are attended to but give no output.

        Returns:
            The mixed tokens (B, K, D), and the attention probabilities (B, H, K, K' + K) if the attention function
            gives them (eager attention does).
        """
        hidden_states = cast_once(hidden_states)
        memory = None if memory is None else cast_once(memory)
        query = self._split_heads(self.q_proj(hidden_states))  # (B, H, K, D / H)
        key, value = (
            self._split_heads(self._project(projection, hidden_states, memory))  # (B, H, K' + K, D / H)
            for projection in (self.k_proj, self.v_proj)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        mixed, probabilities = attention(
            self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed.flatten(2)), probabilities

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _project(
        self, projection: nn.Linear, hidden_states: torch.Tensor, memory: torch.Tensor | None
    ) -> torch.Tensor:
        """Keys or values of the memory, if there is one, and of the other tokens."""
        projected = projection(hidden_states)
        return projected if memory is None else torch.cat([projection(memory), projected], dim=1)


class IJepaMLP(nn.Module):
    """The feed-forward half of a layer."""

    def __init__(self, config: IJepaConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class IJepaDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a whole residual branch per image while training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        keep = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return hidden_states * keep / (1 - self.rate)


class IJepaLayer(GradientCheckpointingLayer):
    """One pre-norm transformer layer. The encoder and the predictor use the same class."""

    def __init__(
        self,
        config: IJepaConfig,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = IJepaAttention(config, hidden_size, num_attention_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = IJepaMLP(config, hidden_size, intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = IJepaDropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, K, D) gives (B, K, D); for `memory` see `IJepaAttention`."""
        normed_memory = None if memory is None else self.layernorm_before(memory)
        mixed, _ = self.attention(self.layernorm_before(hidden_states), normed_memory, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(mixed))
        del normed_memory, mixed  # freed memory is used again while it is in the cache: up to 5 % faster
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.dropout(transformed))


class IJepaPredictor(nn.Module):
    """The narrow transformer that predicts target features from context features and positions (paper, section 3)."""

    position_embeddings: torch.Tensor

    def __init__(self, config: IJepaConfig):
        super().__init__()
        width, heads = config.predictor_hidden_size, config.predictor_num_attention_heads
        intermediate_size = config.predictor_intermediate_size
        assert heads is not None and intermediate_size is not None  # IJepaConfig fills them in
        self.config = config
        self.grid_size = config.grid_size
        self.input_projection = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("position_embeddings", sincos_position_embeddings(width, self.grid_size))
        self.layers = nn.ModuleList(
            IJepaLayer(config, width, heads, intermediate_size) for _ in range(config.predictor_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output_projection = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        context_hidden_states: torch.Tensor,
        context_indices: torch.Tensor,
        target_indices: torch.Tensor,
        grid_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Args:
            context_hidden_states: (B, C, N_ctx, D), the context encoder's output.
            context_indices: (B, C, N_ctx) patch indices the context tokens came from.
            target_indices: (B, M, N_tgt) patch indices to predict from every context, or (B, C, M, N_tgt), where each
                context has its own.
            grid_size: rows and columns of patches in the images; the configured grid by default.

        Returns:
            (B, C, M, N_tgt, D): for each context and each target block, the predicted features.
        """
        positions = resize_position_embeddings(self.position_embeddings, self.grid_size, grid_size or self.grid_size)
        positions = positions.to(stream_dtype(self.mask_token))
        context = self.input_projection(context_hidden_states) + positions[0][context_indices]  # (B, C, N_ctx, P)
        targets = (self.mask_token + positions[0][target_indices]).to(context.dtype)  # (B, (C,) M, N_tgt, P)
        pairs = (*context.shape[:2], target_indices.shape[-2])  # (B, C, M)
        if target_indices.ndim == 3:  # every context meets every target block
            targets = targets.unsqueeze(1).expand(*pairs, -1, -1)
        targets = targets.flatten(0, 2)  # (B * C * M, N_tgt, P)
        if self.layers:
            targets = self._predict_jointly(context, targets, **kwargs)
        return self.output_projection(self.layernorm(targets)).unflatten(0, pairs)

    @torch.compiler.disable(recursive=False)
    def _predict_jointly(self, context: torch.Tensor, targets: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Each target block goes through the layers with its own copy of the context (the published predictor).

        `torch.compile` compiles the layers, but not this function: Inductor cannot order the strides of tensors whose
        length is the sum of two changing lengths.
        """
        num_blocks = targets.shape[0] // (context.shape[0] * context.shape[1])
        context = context.unsqueeze(2).expand(-1, -1, num_blocks, -1, -1).flatten(0, 2)  # (B * C * M, N_ctx, P)
        *layers, last_layer = self.layers
        hidden_states = torch.cat([context, targets], dim=1)  # (B * C * M, N_ctx + N_tgt, P)
        for layer in layers:
            hidden_states = layer(hidden_states, **kwargs)
        context, targets = hidden_states.split([context.shape[1], targets.shape[1]], dim=1)
        return last_layer(targets, context, **kwargs)  # its output for the context is not needed


class IJepaPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving shared by every I-JEPA class."""

    config_class = IJepaConfig
    config: IJepaConfig
    base_model_prefix = "ijepa"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    _input_embed_layer = "patch_embeddings"  # for `get_input_embeddings` and `set_input_embeddings`
    supports_gradient_checkpointing = True
    _no_split_modules = ["IJepaLayer"]  # noqa: RUF012 (a Transformers convention)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": IJepaLayer, "attentions": IJepaAttention}  # noqa: RUF012
    # No warning about the other networks of a pretraining directory, which this class does not use.
    _keys_to_ignore_on_load_unexpected = [r"^context_encoder\.", r"^predictor\.", r"^classifier\."]  # noqa: RUF012
    _unreported_keys: frozenset[str] = frozenset()  # missing weights that `_finish_loading` reports in its own words

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(own_config(config), *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights with standard deviation `initializer_range`, zero biases, layer norms of weight 1.

        This is what Meta's released code does. It also rescales weights by depth, but draws them again afterwards, so
        the rescaling has no effect. `patch_embedding_init` can ask for another deviation of the patch embedding.
        """
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            std = self.config.initializer_range
            if isinstance(module, nn.Conv2d) and self.config.patch_embedding_init == "fan_in":
                std = math.prod(module.weight.shape[1:]) ** -0.5
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (IJepaEmbeddings, IJepaPredictor)):
            self._init_positions(module)

    def _init_positions(self, module: IJepaEmbeddings | IJepaPredictor) -> None:
        width = module.position_embeddings.shape[-1]
        init.copy_(module.position_embeddings, sincos_position_embeddings(width, module.grid_size))
        if isinstance(module, IJepaPredictor):
            init.normal_(module.mask_token, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike | None,
        *args: Any,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a directory or Hub repository as Transformers does, but refuses to leave part of an encoder random.

        Reads what this package saves, what `transformers.IJepaModel` saves, and the first converted directories on
        the Hub with their early weight names. Arguments are those of `PreTrainedModel.from_pretrained`.

        Returns:
            The model; with `output_loading_info=True` the model and a dictionary.

        Raises:
            ValueError: if the checkpoint lacks weights of an encoder. Only the classifier of
                `IJepaForImageClassification` and the whole predictor of `IJepaForPretraining` may start from random
                weights.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        if isinstance(kwargs.get("config"), PreTrainedConfig):
            kwargs["config"] = own_config(kwargs["config"])
        cls._choose_weights(pretrained_model_name_or_path, kwargs)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            key_mapping={**EARLY_HUB_NAMES, **(key_mapping or {})},
            output_loading_info=True,
            **kwargs,
        )
        model, loading_info = loaded
        vars(model.config).pop("transformers_weights", None)
        loading_info["missing_keys"] = set(loading_info["missing_keys"]) | model._unreported_keys
        mismatched = {key for key, *_ in loading_info["mismatched_keys"]}  # only with ignore_mismatched_sizes
        model._finish_loading(pretrained_model_name_or_path, loading_info["missing_keys"] | mismatched)
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _choose_weights(cls, name: str | PathLike | None, settings: dict[str, Any]) -> None:
        """Adds to the settings of `from_pretrained` which weights are read, if not those in `model.safetensors`."""

    def _finish_loading(self, name: str | PathLike | None, missing_keys: set[str]) -> None:
        lacking = sorted(key for key in missing_keys - self._unreported_keys if not key.startswith("classifier."))
        if lacking:
            raise ValueError(
                f"{name} lacks {len(lacking)} of the weights {type(self).__name__} needs, or has them in another"
                f" shape, for example {lacking[0]!r}; loading it would leave part of the encoder random."
            )

    @torch.no_grad()
    def resize_image(self, image_size: int | tuple[int, int]) -> None:
        """Changes the model in place to take images of another size, for example to fine-tune at a higher resolution.

        All position tables are interpolated once. The outputs are those of `interpolate_pos_encoding=True`, which
        interpolates in every forward pass. Start from the pretraining size: each interpolation loses a little.

        Args:
            image_size: pixels, one number or (height, width).

        Raises:
            ValueError: if the size is not valid or is smaller than a patch. The model is not changed then.
        """
        grid_size = type(self.config)(image_size=image_size, patch_size=self.config.patch_size).grid_size
        self.config.image_size = image_size
        for module in self.modules():
            if isinstance(module, (IJepaEmbeddings, IJepaPredictor)):
                module.position_embeddings = resize_position_embeddings(
                    module.position_embeddings, module.grid_size, grid_size
                )
                module.grid_size = grid_size
            if isinstance(module, IJepaEmbeddings):
                module.image_size = self.config.image_height_and_width

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        *args: Any,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves as Transformers does. Weights that were loaded under early Hub names are saved under today's names.

        After `register_for_auto_class` the directory carries this code. It then opens with `trust_remote_code=True` in
        every Auto class of `AUTO_MAP`, whichever class was saved.
        """
        self._set_auto_map()
        if is_main_process:
            remove_weights(Path(save_directory), kwargs.get("variant"), stem="pretraining")
        kwargs["save_original_format"] = save_original_format
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _set_auto_map(self) -> None:
        if self.is_remote_code():
            self.config.auto_map = {**AUTO_MAP}
        elif any("--" not in name for name in (getattr(self.config, "auto_map", None) or {}).values()):
            del self.config.auto_map  # from a directory that carries the code; the new one does not


class IJepaModel(IJepaPreTrainedModel):
    """The I-JEPA encoder: a Vision Transformer without class token.

    The stock class can add a pooler or a mask token. Neither belongs to I-JEPA, so here they can only be False.

    Raises:
        ValueError: if a pooler or a mask token is asked for, or the configuration is not one of an I-JEPA model.
    """

    def __init__(self, config: PreTrainedConfig, add_pooling_layer: bool = False, **stock: Any):
        super().__init__(config)
        # No parameter of its own, because the common tests of Transformers set it to True where a model has it.
        use_mask_token = stock.pop("use_mask_token", False)
        if stock:
            raise TypeError(f"{type(self).__name__}() has no argument {next(iter(stock))!r}.")
        for name, value in (("add_pooling_layer", add_pooling_layer), ("use_mask_token", use_mask_token)):
            if value:
                raise ValueError(f"{name} must be False: I-JEPA has neither a trained pooler nor a mask token.")
        config = self.config
        depth = config.num_hidden_layers
        self.embeddings = IJepaEmbeddings(config)
        self.layers = nn.ModuleList(
            IJepaLayer(
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                drop_path_rate=config.drop_path_rate * index / max(depth - 1, 1),
            )
            for index in range(depth)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_indices: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (B, channels, height, width) normalised images.
            patch_indices: (B, K) indices of the patches to encode. The others are dropped before the first layer: they
                cost nothing and no token attends to them. All patches by default.
            interpolate_pos_encoding: resize the position embeddings to the images' own grid, square or not.
            output_hidden_states, output_attentions, return_dict: as in Transformers.

        Returns:
            `last_hidden_state` (B, N or K, D), and `pooler_output` (B, D), the mean over the encoded patches (the
            image feature of the paper's appendix A). The layers + 1 `hidden_states` are taken before the final norm.

        Raises:
            ValueError: if the number of channels or the image size does not match the model, or for a mask of the
                stock encoder (`bool_masked_pos`, `attention_mask`).
        """
        for name, reason in STOCK_ARGUMENTS.items():
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} is not supported: {reason}.")
        hidden_states = self.embeddings(pixel_values, patch_indices, bool(interpolate_pos_encoding))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states.mean(dim=1))


@dataclass
class IJepaForPretrainingOutput(ModelOutput):
    """
    Output of `IJepaForPretraining`.

    Args:
        loss: scalar, the mean distance between predictions and targets.
        predictions: (B, C, M, N_tgt, D), the features predicted from each context for each target block.
        targets: (B, C, M, N_tgt, D), the target encoder's normalised features of the same patches (equal for every
            context that shares its target blocks with the others); no gradient.
        context_hidden_states: (B, C, N_ctx, D), the context encoder's output.
        target_hidden_states: (B, N, D), the target encoder's output for the whole image, not normalised; no gradient.
        hidden_states: layers + 1 tensors (B * C, N_ctx, D) of the context encoder, with `output_hidden_states=True`.
        attentions: one (B * C, H, N_ctx, N_ctx) for each layer of the context encoder, with `output_attentions=True`.
    """

    loss: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    context_hidden_states: torch.Tensor | None = None
    target_hidden_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class IJepaForPretraining(IJepaPreTrainedModel):
    """I-JEPA's three networks in one module: target encoder (`ijepa`), context encoder and predictor.

    The target encoder is the moving average of the context encoder. It takes no gradient and stays in evaluation mode.
    The paper evaluates this encoder. In a new model both encoders are equal.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]  # noqa: RUF012
    _can_compile_fullgraph = False  # see `IJepaPredictor._predict_jointly`

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        config = self.config
        self.ijepa = IJepaModel(config)
        self.context_encoder = IJepaModel(config)
        self.predictor = IJepaPredictor(config)
        self.post_init()
        self._copy_encoder(source=self.context_encoder, destination=self.ijepa)
        self._freeze_target_encoder()
        self._target_moves, self._training_passes = False, 0  # of `_warn_of_a_still_target`

    @torch.no_grad()
    def _copy_encoder(self, source: IJepaModel, destination: IJepaModel) -> None:
        for own, original in zip(destination.state_dict().values(), source.state_dict().values(), strict=True):
            own.copy_(original)

    def _freeze_target_encoder(self) -> None:
        self.ijepa.requires_grad_(False)
        self.ijepa.eval()

    def train(self, mode: bool = True) -> "IJepaForPretraining":
        """As in torch, but the target encoder stays in evaluation mode."""
        super().train(mode)
        self.ijepa.eval()  # targets are computed without dropout and stochastic depth
        return self

    @classmethod
    def _choose_weights(cls, name: str | PathLike | None, settings: dict[str, Any]) -> None:
        """All files of a directory with an index, unless an encoder was saved over it."""
        if name is None or settings.get("state_dict") is not None:
            return
        hub = {key: settings[key] for key in DOWNLOAD_SETTINGS if key in settings}
        index = pretraining_index(settings.get("variant"))
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if cached_file(name, index, **quiet, **hub) is None:
            return
        architectures = set(cls.config_class.get_config_dict(name, **hub)[0].get("architectures") or ())
        if architectures and architectures <= ENCODER_CLASSES:
            return
        if isinstance(settings.get("config"), PreTrainedConfig):
            settings["config"] = copy.deepcopy(settings["config"])
            settings["config"].transformers_weights = index
        else:
            settings["transformers_weights"] = index  # Transformers puts it into the configuration that it loads

    def compile(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Compiles every layer in place, for any number of tokens. Arguments are those of `torch.compile`.

        The lengths of masks change from step to step, and PyTorch cannot compile the whole model for that. Each layer
        is compiled by itself, because its rate of stochastic depth differs. The names of the weights stay.
        """
        layers = [module for module in self.modules() if isinstance(module, IJepaLayer)]
        limit = torch._dynamo.config.recompile_limit  # above it PyTorch stops compiling
        torch._dynamo.config.recompile_limit = max(limit, 4 * len(layers))
        for layer in layers:
            layer.compile(*args, **{"dynamic": True, **kwargs})

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Transformers' report does not list the weights that an encoder-only checkpoint cannot have."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        beyond_one_encoder = {key for key in self.state_dict() if not key.startswith("ijepa.")}
        missing_keys = set(loading_info.missing_keys)
        if beyond_one_encoder <= missing_keys:
            self._unreported_keys = frozenset(beyond_one_encoder)
            loading_info.missing_keys = missing_keys - beyond_one_encoder

    def _finish_loading(self, name: str | PathLike | None, missing_keys: set[str]) -> None:
        super()._finish_loading(name, missing_keys)
        if self._unreported_keys:
            if type(self).__name__ in (self.config.architectures or ()):
                raise ValueError(
                    f"{name} is a pretraining model, but lacks {PRETRAINING_INDEX}, so its context encoder and"
                    " predictor cannot be loaded."
                )
            self._copy_encoder(source=self.ijepa, destination=self.context_encoder)
            logger.warning(
                f"{name} holds one encoder only: the target and the context encoder both start from it, and the"
                " predictor starts from fresh weights."
            )
        self._freeze_target_encoder()  # loading has made all parameters trainable

    def save_pretrained(  # type: ignore[override]  # kwargs hold the rest
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves as Transformers does, in two files: `model.safetensors` has the target encoder alone, so that stock
        classes read it without a word about the other networks. `pretraining.safetensors` has these.

        A directory named `checkpoint-N` gets one file with all, because the Trainer of Transformers reads that itself.
        """
        directory = Path(save_directory)
        is_checkpoint = re.fullmatch(TRAINER_CHECKPOINT, directory.name) or kwargs.get("distributed_checkpoint")
        if is_checkpoint or getattr(self, "_hf_peft_config_loaded", False) or directory.is_file():
            super().save_pretrained(directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        before = self._get_files_timestamps(directory) if directory.is_dir() else {}
        hub: dict[str, Any] = {
            key: kwargs.pop(key) for key in ("repo_id", "private", "commit_message", "create_pr") if key in kwargs
        }
        variant = kwargs.get("variant")
        if is_main_process:
            remove_weights(directory, variant)
        weights = self.state_dict() if state_dict is None else state_dict
        encoder = {key: value for key, value in weights.items() if key.startswith("ijepa.")}
        others = {key: _with_own_storage(value) for key, value in weights.items() if key not in encoder}
        super().save_pretrained(directory, is_main_process, encoder, **kwargs)  # empties `encoder`
        if is_main_process:
            save_torch_state_dict(
                others,
                directory,
                filename_pattern=with_suffix(OTHER_NETWORKS, variant),
                max_shard_size=kwargs.get("max_shard_size", "50GB"),
                metadata={"format": "pt"},
            )
            write_pretraining_index(directory, variant)
            if push_to_hub:
                self._upload(directory, before, kwargs.get("token"), hub)

    def _upload(self, directory: Path, before: dict[str, float], token: Any, hub: dict[str, Any]) -> None:
        """Uploads the files of a directory that have changed."""
        private, name = hub.pop("private", None), hub.pop("repo_id", directory.name)
        repository = create_repo(name, private=private, token=token, exist_ok=True)
        self._upload_modified_files(str(directory), repository.repo_id, before, token=token, **hub)

    @torch.no_grad()
    def update_target_encoder(self, momentum: float, gathering: Callable | None = None) -> None:
        """Updates the moving average: target <- momentum x target + (1 - momentum) x context.

        Args:
            momentum: in [0, 1].
            gathering: a context manager for weights that are split over processes and cannot be averaged in pieces
                (DeepSpeed's ZeRO-3). Inside `with gathering(parameters):` these parameters are whole, and changes to
                them are kept.

        Raises:
            ValueError: if momentum is outside [0, 1], if only one of the encoders has adapters, or if the weights are
                in half precision. There the small changes of a moving average are lost to rounding (keep float32
                weights and use autocast).
        """
        self._target_moves = True
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}.")
        targets: list[torch.Tensor] = [*self.ijepa.parameters()]
        contexts: list[torch.Tensor] = [*self.context_encoder.parameters()]
        if [target.shape for target in targets] != [context.shape for context in contexts]:
            raise ValueError(
                "The two encoders have different parameters, so no moving average can be taken. Adapters must be in"
                " both encoders, or be merged."
            )
        if targets[0].dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"The moving average needs float32 weights, but the target encoder has {targets[0].dtype}."
            )
        if gathering is None:
            torch._foreach_lerp_(targets, contexts, 1.0 - momentum)
        else:
            for start in range(0, len(targets), PARAMETERS_PER_LAYER):  # about one layer at a time
                chunk = slice(start, start + PARAMETERS_PER_LAYER)
                with gathering([*targets[chunk], *contexts[chunk]]):
                    torch._foreach_lerp_(targets[chunk], contexts[chunk], 1.0 - momentum)
        # In a call of their own, because sharded parameters and whole buffers cannot be in one list.
        torch._foreach_lerp_([*self.ijepa.buffers()], [*self.context_encoder.buffers()], 1.0 - momentum)

    def _warn_of_a_still_target(self) -> None:
        """Warns if the context encoder is trained and `update_target_encoder` was never called.

        Looks at the weights in the training passes 3, 6, 12, 24 and so on, because that waits for the device.
        """
        if self._target_moves or torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return
        if any(isinstance(weight, FakeTensor) for weight in self.context_encoder.parameters()):  # without values
            return
        self._training_passes += 1
        if self._training_passes == 1:
            self._first_weight = self._last_trained_weight()
        third, rest = divmod(self._training_passes, 3)
        if rest == 0 and third & (third - 1) == 0 and not torch.equal(self._first_weight, self._last_trained_weight()):
            self._target_moves = True  # said once
            logger.warning(
                "The context encoder is trained, but the target encoder has not moved: call"
                " update_target_encoder(momentum) after every optimizer step. In the Trainer of Transformers,"
                " ijepa_transformers.TargetEncoderCallback does it."
            )

    def _last_trained_weight(self) -> torch.Tensor:
        """A copy; empty if nothing of the context encoder is trained."""
        trained = [weight for weight in self.context_encoder.parameters() if weight.requires_grad]
        if not trained:
            return torch.empty(0)
        weight = trained[-1].detach()
        return (weight.to_local() if hasattr(weight, "to_local") else weight).clone()  # FSDP2: this process's part

    def encode_context(
        self, pixel_values: torch.Tensor, context_indices: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The context encoder's output for each context.

        (B, channels, height, width) and (B, C, N_ctx) give a `last_hidden_state` of (B * C, N_ctx, D).
        """
        images = pixel_values.unsqueeze(1).expand(-1, context_indices.shape[1], -1, -1, -1)
        kwargs["return_dict"] = True  # whatever the configuration says
        return self.context_encoder(images.flatten(0, 1), context_indices.flatten(0, 1), **kwargs)

    @torch.no_grad()
    def encode_targets(
        self, pixel_values: torch.Tensor, target_indices: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target encoder's features.

        (B, channels, height, width) and (B, M, N_tgt) give the normalised features of the target blocks
        (B, M, N_tgt, D) and the plain features of all patches (B, N, D). Indices (B, C, M, N_tgt) give features
        (B, C, M, N_tgt, D); every image is encoded once.
        """
        kwargs.update(return_dict=True, output_hidden_states=False, output_attentions=False)
        hidden_states = self.ijepa(pixel_values, **kwargs).last_hidden_state
        targets = self.normalize_targets(hidden_states)
        return gather_patches(targets, target_indices.flatten(1)).view(*target_indices.shape, -1), hidden_states

    def normalize_targets(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Makes the predictor's targets from the target encoder's output: (B, N, D) gives (B, N, D) in float32.

        N must be all patches of an image, because its mean is taken over them.
        """
        features, kind = hidden_states.float(), self.config.target_normalization
        if self.config.target_image_mean != 1:
            features = features - (1 - self.config.target_image_mean) * features.mean(dim=1, keepdim=True)
        if kind == "layer":
            return nn.functional.layer_norm(features, features.shape[-1:])
        if kind == "batch":
            centred = features - features.mean(dim=(0, 1))
            return centred / (centred.square().mean(dim=(0, 1)).sqrt() + TARGET_EPSILON)
        return features

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        context_indices: torch.Tensor,
        target_indices: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> IJepaForPretrainingOutput:
        """
        Args:
            pixel_values: (B, channels, height, width) normalised images.
            context_indices: (B, C, N_ctx) indices of the patches the context encoder may see.
            target_indices: (B, M, N_tgt) indices of the patches to predict, one row per target block. Every block is
                predicted from every context. Or (B, C, M, N_tgt): each context has its own target blocks.
            interpolate_pos_encoding: resize all position embeddings to the images' own grid.
            return_loss: whether the loss is computed. By this argument the Trainer of Transformers knows that it can
                be, so that it gives an `eval_loss` without labels.
            output_hidden_states, output_attentions, return_dict: as in Transformers, of the context encoder.

        Returns:
            `IJepaForPretrainingOutput` with `loss`, `predictions` and `targets`.

        Raises:
            ValueError: if indices have another number of dimensions, or are for another number of images or contexts.
        """
        self._check_indices(pixel_values.shape[0], context_indices, target_indices)
        self._warn_of_a_still_target()
        kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        grid_size = self.ijepa.embeddings.patch_grid(pixel_values)
        encoded = self.encode_context(pixel_values, context_indices, **kwargs)
        context_hidden_states = encoded[0].unflatten(0, context_indices.shape[:2])  # (B, C, N_ctx, D)
        predictions = self.predictor(context_hidden_states, context_indices, target_indices, grid_size)
        targets, target_hidden_states = self.encode_targets(pixel_values, target_indices, **kwargs)
        targets = (targets if targets.ndim == 5 else targets.unsqueeze(1)).expand_as(predictions)
        return IJepaForPretrainingOutput(
            loss=self.prediction_loss(predictions, targets) if return_loss else None,
            predictions=predictions,
            targets=targets,
            context_hidden_states=context_hidden_states,
            target_hidden_states=target_hidden_states,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _check_indices(self, num_images: int, context_indices: torch.Tensor, target_indices: torch.Tensor) -> None:
        if context_indices.ndim != 3 or context_indices.shape[0] != num_images:
            raise ValueError(
                f"context_indices must have shape ({num_images}, masks, patches), got {tuple(context_indices.shape)}."
            )
        own = (num_images, context_indices.shape[1])  # images and contexts, if each context has its own targets
        is_shared = target_indices.ndim == 3 and target_indices.shape[0] == num_images
        if not is_shared and (target_indices.ndim != 4 or tuple(target_indices.shape[:2]) != own):
            raise ValueError(
                f"target_indices must have shape ({num_images}, masks, patches) or ({num_images}, {own[1]} contexts,"
                f" masks, patches), got {tuple(target_indices.shape)}."
            )

    def prediction_loss(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean distance over images, contexts, blocks, patches and features, in float32."""
        distance = nn.functional.smooth_l1_loss if self.config.loss_type == "smooth_l1" else nn.functional.mse_loss
        return distance(predictions.float(), targets.float())


class IJepaForImageClassification(IJepaPreTrainedModel):
    """The encoder with a linear classifier on the mean of the patch tokens.

    It is for fine-tuning, or for a linear probe when the encoder is frozen.
    """

    _keys_to_ignore_on_load_unexpected = [r"^context_encoder\.", r"^predictor\."]  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels or 0
        self.ijepa = IJepaModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in the encoder, but the classifier starts with small weights, so that its first guesses are even."""
        super()._init_weights(module)
        if module is self.classifier and isinstance(module, nn.Linear) and self.config.initializer_range > SMALL_STD:
            init.normal_(module.weight, std=SMALL_STD)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Transformers' report does not list a missing classifier; `_finish_loading` warns about it instead."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        missing_keys = set(loading_info.missing_keys)
        self._unreported_keys = frozenset(key for key in missing_keys if key.startswith("classifier."))
        loading_info.missing_keys = missing_keys - self._unreported_keys

    def _finish_loading(self, name: str | PathLike | None, missing_keys: set[str]) -> None:
        super()._finish_loading(name, missing_keys)
        if self._unreported_keys:
            logger.warning(
                f"{name} has no trained classifier: the class names it predicts mean nothing until it is fine-tuned,"
                " for example with run_image_classification.py."
            )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: (B, channels, height, width) normalised images.
            labels: (B,) class indices; (B, num_labels) floats for multi-label problems; (B,) floats for regression
                (`config.problem_type`, or guessed from `num_labels` and the labels' type as in all of Transformers).
            interpolate_pos_encoding: resize the position embeddings to the images' own grid.

        Returns:
            `ImageClassifierOutput` with `logits` (B, num_labels) and, when labels are given, `loss`.
        """
        kwargs.update(interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True)
        outputs = self.ijepa(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class IJepaBackbone(BackboneMixin, IJepaModel):
    """The encoder as a source of feature maps for dense tasks (`AutoBackbone`)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_features = [self.config.hidden_size] * (self.config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        """
        Args:
            pixel_values: (B, channels, height, width) normalised images of any size.

        Returns:
            `BackboneOutput` with one of `feature_maps` (B, D, rows, columns) per stage in `out_features`. "stem" is
            the embedding, "stageN" the output of layer N. The encoder's final layer norm is applied to each.
        """
        kwargs["interpolate_pos_encoding"] = True
        outputs = IJepaModel.forward(self, pixel_values, **kwargs)
        grid_size = self.embeddings.patch_grid(pixel_values)
        feature_maps = tuple(
            self.layernorm(hidden_states).transpose(1, 2).unflatten(2, grid_size)
            for stage, hidden_states in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "IJepaBackbone",
    "IJepaForImageClassification",
    "IJepaForPretraining",
    "IJepaForPretrainingOutput",
    "IJepaModel",
    "IJepaPreTrainedModel",
    "IJepaPredictor",
]
