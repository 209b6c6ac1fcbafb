# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What one process of a pretraining needs of its GPU's memory, computed before the run. Knows sizes, no model.

Bytes everywhere, GiB only where a table is printed. Activations are added up tensor by tensor: what autograd saves in
each layer of `modeling_ijepa.py`, with CUDA's flash or memory-efficient attention ("sdpa"), exact GELU and no dropout.
The total is for the second of several accumulated forward passes, when gradients and activations exist together; a run
without accumulation stays below it.

Letters: B images, N patches, D width, F feed-forward width, H heads, K tokens of one sequence, P predictor width,
C contexts, M target blocks.
"""

import math
from collections import Counter
from dataclasses import dataclass, fields

import torch

from ..configuration_ijepa import IJepaConfig
from ..distributed import computing_precision, launched_mode
from ..masking import MultiBlockMasking
from .arguments import PretrainingArguments


GIB = 2**30
FLOAT32 = 4
INDEX = 8  # int64
NORM = 2 * FLOAT32  # mean and reciprocal deviation of a token, saved by a layer norm
MODES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
PRECISIONS = {"no": 4, "bf16": 2, "fp16": 2}  # Accelerate's name -> bytes of a number that a matrix product makes
OPTIMIZERS = ("adamw", "adamw_8bit")
# bitsandbytes: smaller tensors keep 32-bit states; the others one byte per state and one scale per block.
MIN_8BIT_SIZE = 4096
BLOCK_8BIT = 256
# DeepSpeed's default `reduce_bucket_size`, in numbers.
DEEPSPEED_BUCKET = 500_000_000
# Not computed: CUDA's context, workspaces of the matrix libraries, NCCL's buffers, gaps in the caching allocator.
FIXED_MARGIN = GIB
MARGIN_SHARE = 0.05


@dataclass(frozen=True)
class TokenCounts:
    """Patches in each of `num_contexts` contexts and in each of `num_targets` target blocks of an image."""

    context: int
    target: int
    num_contexts: int = 1
    num_targets: int = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one process by parts, in bytes; `total` is their sum.

    Args:
        parameters: float32 weights and position tables of target encoder, context encoder and predictor.
        gradients: of context encoder and predictor, float32.
        optimizer: states of AdamW, and DeepSpeed's second copy of the weights it trains.
        activations: what the forward pass saves for the backward pass.
        autocast: low-precision copies of weights, which autocast keeps until the forward pass ends, or longer.
        working: what is alive only at the fullest moment, beside the outputs of this pass: in a layer of the target
            encoder, or in the backward pass of a layer.
        batch: images and indices.
        communication: buckets of gradients, weights gathered for the layer at work.
        margin: a flat GiB and 5 % of the rest, for what cannot be computed. A guess.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    autocast: int
    working: int
    batch: int
    communication: int
    margin: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, entry.name) for entry in fields(self))

    @property
    def allocated(self) -> int:
        """The total without the margin: what `torch.cuda.max_memory_allocated` should be near."""
        return self.total - self.margin


# Tokens
def worst_case_tokens(masking) -> TokenCounts:
    """The most patches that a batch of this `MultiBlockMasking` can hold, whatever the seed, the step and the batch.

    A bound: with one image per pass it is reached, with many it is far away, because the shortest context of a batch
    sets the length of all (`sampled_tokens`).
    """
    targets, contexts = masking.extreme_block_sides()
    target = math.prod(targets.largest)
    context = max(_most_visible(masking, size, targets.lower, target) for size in contexts.upper)
    return TokenCounts(
        masking.num_context_tokens or context,
        masking.num_target_tokens or target,
        masking.num_contexts,
        masking.num_targets,
    )


def _most_visible(masking, context, small_targets, largest_target: int) -> int:
    """Most patches of a context block that its targets leave: they are stacked, and as far outside as they can be."""
    area = context[0] * context[1]
    if masking.allow_overlap:
        return area
    is_meta = masking.mode == "meta"
    grid = [side - is_meta for side in masking.grid_size]  # quirk: "meta" keeps off the last row and column
    overlaps = (
        math.prod(max(0, side + own - whole) for side, own, whole in zip(target, context, grid, strict=True))
        for target in small_targets
    )
    # Quirk: "meta" forgives the last target only to a context that this target leaves too little of.
    forgiven = min(area, masking.required_patches - 1 + largest_target) if is_meta else 0
    return max(area - min(overlaps), forgiven)


def sampled_tokens(masking, batch_size: int, num_batches: int = 200, seed: int = 0) -> TokenCounts:
    """The most patches seen in `num_batches` sampled batches of `batch_size` images: what a run meets, no bound."""
    shapes = [masking.sample(batch_size, seed, step) for step in range(num_batches)]
    context, target = (max(pair[kind].shape[2] for pair in shapes) for kind in (0, 1))
    return TokenCounts(context, target, masking.num_contexts, masking.num_targets)


# Parameters
def _layer_tensors(width: int, intermediate: int, qkv_bias: bool) -> Counter:
    """Size -> count of the parameter tensors of one layer."""
    tensors = Counter({width * width: 4, width * intermediate: 2})
    tensors.update([width] * (4 + 3 * qkv_bias) + [width, intermediate, width])  # norms; attention; o_proj and MLP
    return tensors


def _times(tensors: Counter, count: int) -> Counter:
    return Counter({size: number * count for size, number in tensors.items()})


def _numbers(tensors: Counter) -> int:
    return sum(size * count for size, count in tensors.items())


def _layers_of(config) -> list[tuple[Counter, int]]:
    """Tensors of one layer, and how many such layers are trained: encoder, predictor."""
    sizes = (
        (config.hidden_size, config.intermediate_size, config.num_hidden_layers),
        (config.predictor_hidden_size, config.predictor_intermediate_size, config.predictor_num_hidden_layers),
    )
    return [(_layer_tensors(width, inner, config.qkv_bias), depth) for width, inner, depth in sizes]


def _patch_numbers(config) -> int:
    """Numbers in the pixels of one patch."""
    return config.num_channels * math.prod(config.patch_height_and_width)


def _outer_tensors(config) -> tuple[Counter, Counter]:
    """Tensors outside of layers, of one encoder and of the predictor: projections, norms, mask token."""
    width, narrow = config.hidden_size, config.predictor_hidden_size
    return Counter([_patch_numbers(config) * width, *[width] * 3]), Counter(
        [width * narrow] * 2 + [narrow] * 4 + [width]
    )


def trained_tensors(config) -> Counter:
    """Size -> count of the parameter tensors of context encoder and predictor."""
    (layer, depth), (narrow_layer, narrow_depth) = _layers_of(config)
    return sum(_outer_tensors(config), _times(layer, depth) + _times(narrow_layer, narrow_depth))


def parameter_counts(config) -> dict[str, int]:
    """Numbers in one encoder, in the predictor, and in the position tables of all three networks."""
    (layer, depth), (narrow_layer, narrow_depth) = _layers_of(config)
    encoder, predictor = (_numbers(tensors) for tensors in _outer_tensors(config))
    return {
        "encoder": encoder + depth * _numbers(layer),
        "predictor": predictor + narrow_depth * _numbers(narrow_layer),
        "position_tables": config.num_patches * (2 * config.hidden_size + config.predictor_hidden_size),
    }


def optimizer_bytes(tensors: Counter, optimizer: str) -> int:
    """Two states of every parameter: float32, or ("adamw_8bit") one byte each, with a float32 scale per block."""
    if optimizer == "adamw":
        return 2 * FLOAT32 * _numbers(tensors)
    return sum(count * _state_bytes_8bit(size) for size, count in tensors.items())


def _state_bytes_8bit(size: int) -> int:
    if size < MIN_8BIT_SIZE:
        return 2 * FLOAT32 * size
    return 2 * (size + FLOAT32 * -(-size // BLOCK_8BIT))


# Activations
@dataclass(frozen=True)
class _Layers:
    """Layers of one width on `sequences` sequences of `length` tokens; `compute` bytes in matrix products.

    The tokens attend to one another and to `memory` more, of which `sharing` sequences in succession have the same.
    """

    width: int
    intermediate: int
    heads: int
    depth: int
    sequences: int
    length: int
    compute: int
    eager: bool
    memory: int = 0
    sharing: int = 1

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def memory_tokens(self) -> int:
        return self.sequences // self.sharing * self.memory

    @property
    def keys(self) -> int:
        """How many keys, and as many values, the attention is given: each sequence has its own copy of the memory."""
        return self.sequences * (self.length + self.memory)

    @property
    def pairs(self) -> int:
        """How many pairs there are of a query and a key that it may attend to."""
        return self.length * self.keys

    @property
    def low(self) -> bool:
        return self.compute < FLOAT32

    @property
    def residual(self) -> int:
        """Bytes of the residual stream, which stays float32 under autocast."""
        return FLOAT32 * self.width * self.tokens

    @property
    def memory_residual(self) -> int:
        """Bytes of the memory before its norm."""
        return FLOAT32 * self.width * self.memory_tokens

    @property
    def scores(self) -> int:
        """How many attention scores one layer has."""
        return self.heads * self.pairs

    @property
    def saved(self) -> int:
        """Bytes that one layer saves for its backward pass, without the memory, which another layer may save too."""
        return self.saved_attention + self.saved_mlp

    @property
    def saved_attention(self) -> int:
        # Autocast casts the input of each product anew: queries, keys and values save three casts of one tensor.
        inputs = 3 * self.tokens + 2 * self.memory_tokens if self.low else self.tokens + self.memory_tokens
        mixing = self.compute * self.width * (inputs + 2 * self.tokens + 2 * self.keys)  # query and mix, key and value
        if self.eager:  # probabilities in float32 and, under autocast, in low precision for the next product
            probabilities = self.scores * (FLOAT32 + self.compute * self.low)
        else:  # logsumexp
            probabilities = FLOAT32 * self.heads * self.tokens
        return self.tokens * self._norm + self.memory_tokens * NORM + mixing + probabilities

    @property
    def saved_mlp(self) -> int:
        inside = self.compute * (self.width + 2 * self.intermediate)  # its input; before and after the activation
        return self.tokens * (self._norm + inside)

    @property
    def _norm(self) -> int:
        return NORM + FLOAT32 * self.width

    @property
    def forward_peak(self) -> int:
        """Bytes alive at most within one layer that saves nothing, its input included."""
        kept = self.compute * self.scores * self.eager  # the layer returns its probabilities
        mlp = 3 * self.residual + self.tokens * self.compute * (self.width + 2 * self.intermediate) + kept
        attention = 2 * self.residual + self.tokens * self.compute * self.width * (3 if self.eager else 4)
        attention += self.scores * self.eager * (2 * FLOAT32 + self.compute * self.low)
        return max(mlp, attention)

    @property
    def recomputed_peak(self) -> int:
        """Bytes alive at most within the backward pass of one recomputed layer, beyond its saved input."""
        gradient = self.residual + self.tokens * self.compute * self.width * self.low
        weight = FLOAT32 * self.width * self.intermediate  # its gradient, before it is added
        mlp = self.saved + self.tokens * self.compute * self.intermediate
        scores = self.saved_attention + self.scores * self.eager * (2 * FLOAT32 - self.compute * self.low)
        inputs = self.saved_attention + 2 * self.compute * self.width * (self.tokens + self.keys)  # gradients of them
        return gradient + weight + max(mlp, scores, inputs) - self.residual


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass of one process, as sizes."""

    config: object
    tokens: TokenCounts
    batch_size: int
    precision: str
    gradient_checkpointing: bool
    attention: str

    @property
    def compute(self) -> int:
        return PRECISIONS[self.precision]

    @property
    def low(self) -> bool:
        return self.compute < FLOAT32

    @property
    def num_contexts(self) -> int:
        return self.batch_size * self.tokens.num_contexts

    def _encoder(self, *sequences) -> _Layers:
        config = self.config
        sizes = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers
        return _Layers(*sizes, *sequences)

    @property
    def context(self) -> _Layers:
        attention = self.compute, self.attention == "eager"
        return self._encoder(self.num_contexts, self.tokens.context, *attention)

    @property
    def target(self) -> _Layers:
        return self._encoder(self.batch_size, self.config.num_patches, self.compute, self.attention == "eager")

    def _predictor(self, depth, sequences, length, memory=0, sharing=1) -> _Layers:
        config = self.config
        sizes = (
            config.predictor_hidden_size,
            config.predictor_intermediate_size,
            config.predictor_num_attention_heads,
        )
        attention = self.compute, self.attention == "eager"
        return _Layers(*sizes, depth, sequences, length, *attention, memory, sharing)

    @property
    def predictor(self) -> tuple[_Layers, _Layers]:
        """Layers in which context tokens go on, all but the last one, and layers on mask tokens alone."""
        tokens, depth = self.tokens, self.config.predictor_num_hidden_layers
        num_blocks = self.num_contexts * tokens.num_targets
        joint = self._predictor(max(depth - 1, 0), num_blocks, tokens.context + tokens.target)
        return joint, self._predictor(min(depth, 1), num_blocks, tokens.target, tokens.context)

    @property
    def trained_layers(self) -> list[_Layers]:
        return [layers for layers in (self.context, *self.predictor) if layers.depth]

    @property
    def predictions(self) -> int:
        """How many numbers are predicted."""
        return self.predictor[1].tokens * self.config.hidden_size

    @property
    def pixels(self) -> int:
        height, width = self.config.image_height_and_width
        return self.batch_size * self.config.num_channels * height * width

    @property
    def embedding_bytes(self) -> int:
        """Before the first layer: the pixels of the kept patches, as the patch embedding multiplies them."""
        return self.compute * self.context.tokens * _patch_numbers(self.config)

    @property
    def head_bytes(self) -> int:
        """After the last layers: final norms, the predictor's projections and the loss."""
        encoder = self.context.tokens * (self.config.hidden_size * (FLOAT32 + self.compute) + NORM)
        return encoder + self.predictor_head_bytes + FLOAT32 * self.predictions + self.target_bytes

    @property
    def target_bytes(self) -> int:
        """Of the target encoder's features at the targets, the same for every context."""
        return FLOAT32 * self.predictions // self.tokens.num_contexts

    @property
    def predictor_head_bytes(self) -> int:
        blocks = self.predictor[1]
        return blocks.residual + blocks.tokens * (blocks.width * self.compute + NORM)

    @property
    def last_memory(self) -> int:
        """Bytes of the context that the predictor's last layer is given; it is in no residual stream that goes on."""
        return self.predictor[1].memory_residual * bool(self.predictor[1].depth)

    @property
    def saved(self) -> int:
        if self.gradient_checkpointing:
            inside = sum(layers.depth * layers.residual for layers in self.trained_layers)
        else:
            inside = sum(layers.depth * layers.saved for layers in self.trained_layers)
        return self.embedding_bytes + inside + self.last_memory + self.head_bytes

    @property
    def outputs(self) -> int:
        """Bytes of the tensors that the model returns, beyond those it saves."""
        return (self.context.residual + self.compute * self.predictions) * self.low

    def working(self) -> int:
        """Bytes at the fuller of two moments: a layer of the target encoder, or a layer's backward pass."""
        not_yet = self.target_bytes + FLOAT32 * self.predictions * self.low  # what the loss saves
        target = self.target.forward_peak - not_yet
        backward = (FLOAT32 + self.compute * self.low) * self.predictions
        if self.gradient_checkpointing:
            # The copies of autocast are gone too, but `autocast` counts them.
            backward = max(backward, self.recomputed_peak) - self.autocast
        backward += self.target.residual  # an output
        return self.outputs + max(target, backward)

    @property
    def recomputed_peak(self) -> int:
        """Bytes alive at most while a layer is recomputed, beyond all that the forward pass saves."""
        others, blocks = self.predictor
        inputs = self.last_memory + sum(layers.depth * layers.residual for layers in self.predictor)
        # Before the first of its kind is recomputed, these inputs of layers are gone, and what comes after the layers.
        gone = (0, blocks.residual + self.last_memory, inputs + self.context.residual)
        kinds = zip((blocks, others, self.context), gone, strict=True)
        most = max(layers.recomputed_peak - size for layers, size in kinds if layers.depth)
        return most - self.predictor_head_bytes - FLOAT32 * self.predictions * self.low

    @property
    def autocast(self) -> int:
        """Bytes of the copies of trained weights that a forward pass under autocast makes and keeps."""
        return self.compute * _numbers(trained_tensors(self.config)) * self.low

    @property
    def inputs(self) -> int:
        """Bytes of the images, as they come and normalised to float32, and of the indices."""
        tokens = self.tokens
        indices = tokens.num_contexts * tokens.context + tokens.num_targets * tokens.target
        return (1 + FLOAT32) * self.pixels + INDEX * self.batch_size * indices


def _checked_pass(config, tokens, batch_size, precision, gradient_checkpointing, attention) -> _Pass:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if batch_size < 1:
        raise ValueError(f"per_device_batch_size must be at least 1, got {batch_size}.")
    return _Pass(config, tokens, batch_size, precision, gradient_checkpointing, attention)


def saved_activation_bytes(
    config,
    tokens: TokenCounts,
    per_device_batch_size: int,
    precision: str = "bf16",
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
) -> int:
    """Bytes that one forward pass saves for its backward pass: no parameters or copies of them, not the batch itself.

    Arguments and errors as in `estimate_memory`.
    """
    return _checked_pass(config, tokens, per_device_batch_size, precision, gradient_checkpointing, attention).saved


# The whole
def estimate_memory(
    config,
    tokens: TokenCounts,
    per_device_batch_size: int,
    precision: str = "bf16",
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    mode: str = "single",
    num_processes: int = 1,
) -> MemoryEstimate:
    """Peak memory of one process of `run_pretraining.py`, by parts, in bytes.

    Args:
        config: an `IJepaConfig`.
        tokens: patches per context and target block, of `worst_case_tokens` or `sampled_tokens`.
        per_device_batch_size: images per process and forward pass.
        precision: of `mixed_precision`: "no" (float32), "bf16" or "fp16"; weights are float32 in any case.
        optimizer: "adamw" or "adamw_8bit".
        gradient_checkpointing: whether every layer is recomputed in the backward pass.
        attention: "eager"; every other implementation is taken for one that never holds all scores.
        mode: "single", "ddp", "fsdp2", "zero1", "zero2" or "zero3". Under ZeRO-3 DeepSpeed is taken to let go of
            gathered weights at once (its own `stage3_max_live_parameters` keeps up to 4 GB of them).
        num_processes: over which sharded parts are divided.

    Raises:
        ValueError: for an unknown name, sizes below 1, or bitsandbytes under FSDP2, which does not work.
    """
    _check_launch(optimizer, mode, num_processes)
    one_pass = _checked_pass(config, tokens, per_device_batch_size, precision, gradient_checkpointing, attention)
    shared = _shared_parts(one_pass, optimizer, mode, num_processes)
    own = {
        "activations": one_pass.saved,
        "autocast": one_pass.autocast,
        "working": one_pass.working(),
        "batch": one_pass.inputs,
    }
    computed = sum(shared.values()) + sum(own.values())
    return MemoryEstimate(**shared, **own, margin=FIXED_MARGIN + round(MARGIN_SHARE * computed))


def _check_launch(optimizer: str, mode: str, num_processes: int):
    for name, value, allowed in (("optimizer", optimizer, OPTIMIZERS), ("mode", mode, MODES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    if num_processes < 1 or (mode == "single" and num_processes > 1):
        raise ValueError(f"{num_processes} processes do not make mode {mode!r}.")
    if mode == "fsdp2" and optimizer == "adamw_8bit":
        raise ValueError("optimizer adamw_8bit does not work under FSDP2: bitsandbytes cannot read sharded weights.")


def _shared_parts(one_pass: _Pass, optimizer: str, mode: str, num_processes: int) -> dict:
    """The parts that a launch mode may divide among processes."""
    config = one_pass.config
    counts, tensors = parameter_counts(config), trained_tensors(config)
    trained = _numbers(tensors)
    states = optimizer_bytes(tensors, optimizer)
    if mode.startswith("zero"):
        states += FLOAT32 * trained  # DeepSpeed trains a copy of the weights
    divided = {"fsdp2": "pgs", "zero1": "s", "zero2": "gs", "zero3": "pgs"}.get(mode, "")

    def part(letter, size):
        return -(-size // num_processes) if letter in divided else size

    gradients = part("g", FLOAT32 * trained)
    return {
        "parameters": part("p", FLOAT32 * (counts["encoder"] + trained)) + FLOAT32 * counts["position_tables"],
        "gradients": gradients,
        "optimizer": part("s", states),
        "communication": _communication(one_pass, mode, trained),
    }


def _communication(one_pass: _Pass, mode: str, trained: int) -> int:
    """Bytes of gradient buckets, or of the weights and gradients that are whole for a moment."""
    if mode == "single":
        return 0
    if mode == "ddp":
        return FLOAT32 * trained  # as much as the gradients: they are copied into buckets
    bucket = FLOAT32 * min(DEEPSPEED_BUCKET, trained) if mode.startswith("zero") else 0
    if mode in ("zero1", "zero2"):
        return bucket
    layer = max(_numbers(tensors) for tensors, depth in _layers_of(one_pass.config) if depth)
    encoder, predictor = (_numbers(tensors) for tensors in _outer_tensors(one_pass.config))
    # The layer at work and the next one, the gradients of one and their bucket, and what belongs to no layer.
    return FLOAT32 * (4 * layer + 2 * encoder + predictor) + bucket


def largest_batch_size(device_bytes: int, config, tokens: TokenCounts, limit: int = 4096, **settings) -> int:
    """The largest `per_device_batch_size` up to `limit` whose total fits; 0 if one image does not.

    `settings` and errors are those of `estimate_memory`.
    """
    fits, too_large = 0, limit + 1
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if estimate_memory(config, tokens, middle, **settings).total <= device_bytes:
            fits = middle
        else:
            too_large = middle
    return fits


LABELS = {
    "parameters": "weights, float32",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "saved activations",
    "autocast": "low-precision weights",
    "working": "layer at work, outputs",
    "batch": "batch",
    "communication": "communication",
    "margin": "margin (a guess)",
}
ADVICE = (
    "Lower per_device_batch_size (accumulation makes up), set gradient_checkpointing, take optimizer adamw_8bit,"
    " or shard over several GPUs with FSDP2."
)
NOTHING_FITS = "With all else as it is, not even one image fits."


def format_memory_estimate(
    estimate: MemoryEstimate, device_bytes: int | None = None, largest: int | None = None
) -> str:
    """The parts and their total in GiB, one a line, and whether they fit into a device's memory.

    Args:
        device_bytes: memory of the device; None leaves the comparison out.
        largest: of `largest_batch_size`, named where the total does not fit.
    """
    lines = [f"{label:22} {getattr(estimate, name) / GIB:8.2f} GiB" for name, label in LABELS.items()]
    lines.append(f"{'peak of one process':22} {estimate.total / GIB:8.2f} GiB")
    if device_bytes is not None:
        lines.append(f"{'memory of the device':22} {device_bytes / GIB:8.2f} GiB")
    if device_bytes is not None and estimate.total > device_bytes:
        lines.append(f"This does not fit. {ADVICE}")
        if largest is not None:
            lines.append(f"With all else as it is, per_device_batch_size {largest} fits." if largest else NOTHING_FITS)
    return "\n".join(lines)


def memory_estimate(arguments: PretrainingArguments) -> str:
    """What one process of this launch will need, for the largest batch that the masks can make."""
    fields = arguments.model_fields()
    config = (
        IJepaConfig.from_pretrained(arguments.init_from, **fields) if arguments.init_from else IJepaConfig(**fields)
    )
    mode, num_processes = launched_mode()
    masking = MultiBlockMasking(config.grid_size, **arguments.mask_fields())
    tokens = worst_case_tokens(masking)
    settings = {
        "precision": computing_precision(arguments.mixed_precision),
        "optimizer": arguments.optimizer,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "attention": arguments.attn_implementation or "sdpa",
        "mode": mode,
        "num_processes": num_processes,
    }
    estimate = estimate_memory(config, tokens, arguments.per_device_batch_size, **settings)
    on_gpu = torch.cuda.is_available()
    device_bytes = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    fits = largest_batch_size(device_bytes, config, tokens, **settings) if on_gpu else None
    likely = sampled_tokens(masking, arguments.per_device_batch_size)
    met = estimate_memory(config, likely, arguments.per_device_batch_size, **settings)
    return (
        f"{mode}, {num_processes} processes, per_device_batch_size {arguments.per_device_batch_size}, at most"
        f" {tokens.context} context patches and {tokens.num_targets} x {tokens.target} target patches per image\n\n"
        f"{format_memory_estimate(estimate, device_bytes, fits)}\n\n200 sampled batches had at most {likely.context}"
        f" and {tokens.num_targets} x {likely.target} patches: {met.total / 2**30:.2f} GiB. Others may have more."
    )
