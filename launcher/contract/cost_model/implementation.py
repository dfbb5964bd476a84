"""Constants of the cost model that depend on the training code, not on model, layout or GPU.

`saved_*` counts tensors that are kept for the backward pass. `passes_*` counts tensors that elementwise kernels read or
write in forward and backward together. Both are multiples of the named size, in the activations' type.
docs/explanation/planning.md says which measurement fixed which constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.contract.cuda_graphs import GraphChoice

ATTENTION_EFFICIENCY = {64: 0.28, 128: 0.41}
"""Share of the bf16 peak that causal attention reaches, forward and backward together, by head size. 64 comes from a
profile, 128 from the ratio of the kernels' published rates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """How a training program turns a layer into kernels."""

    name: str
    saved_mlp: float
    """Of the feed-forward size. Fused SwiGLU keeps gate, up and product: 3; without fusion silu(gate) too: 4."""
    logit_bytes: float
    """Bytes for each logit of a micro-batch that the loss keeps. Losses that work in chunks keep none."""
    logit_chunk: float = 0.0
    """Bytes of logits that a loss in chunks holds at a time, of half of the positions at most."""
    passes_hidden: float
    """Norms, residual additions, RoPE and layout copies."""
    passes_ffn: float
    """The activation function."""
    passes_logits: float
    """The loss."""
    optimizer_bytes: float
    """Bytes of memory traffic of an update, for each parameter of this rank's share."""
    gradient_bytes: float
    """Bytes of memory traffic of adding a micro-batch's gradient to the buffer, for each parameter."""
    step_overhead: float
    """Seconds of a step in which no kernel runs: logging, the loop."""
    layer_launches: float = 0.0
    """Seconds in which the host launches the kernels of a layer, forward and backward: a micro-batch takes no less."""
    adapted_layer_launches: float = 0.0
    """The same of a layer with adapters, but not of experts."""
    adapted_expert_launches: float = 0.0
    """The same of a layer whose experts have adapters."""
    graphs: GraphChoice = "never"
    """Whether layers are launched as CUDA graphs where they can be: then no launches count."""
    hidden_collectives_cost: float = 0.0
    """Share of their own time within a node by which collectives that run behind computation delay it: their kernels
    take a part of the GPU."""
    exchange_overhead: float = 0.0
    """Seconds in which a pipeline stage waits for its neighbours in each pass of a model chunk, forward and backward
    together, beside the bubble and the transfer."""
    tensor_parallel_exposed: float = 1.0
    """Share of the tensor parallel collectives that no computation hides."""
    gathers_behind_forward: bool = False
    """Whether the distributed optimizer's all-gather of weights runs behind the next forward pass."""
    adds_adapters_in_products: bool = False
    """Whether frozen products add LoRA's adapters themselves, where one rank has them whole."""
    loss_of_targets: bool = False
    """Whether output layer and loss are computed for targets alone."""
    spares_mlp_output: bool = False
    """Whether SwiGLU's output is not kept where one rank has the whole MLP or products are in fp8."""
    fp8_efficiency: float = 0.61
    """Share of the fp8 peak that products in fp8 reach, the quantization of their factors included. From a step of
    3B."""
    fp8_weight_gradients: bool = False
    """Whether gradients of weights are products in fp8, too."""
    passes_expert_rows: float = 0.0
    """Of the hidden size, for each expert of a token: sorting rows by expert, gathering them, and summing them up."""
    attention_efficiencies: Mapping[int, float] = field(default_factory=lambda: ATTENTION_EFFICIENCY)
    """Like ATTENTION_EFFICIENCY. With an attention_knee it is the limit for long sequences."""
    attention_knee: float = 0.0
    """Number of attended tokens at which attention reaches half of that limit."""

    def attention_efficiency(self, head_dim: int, attended: float) -> float:
        """Return the share of the bf16 peak that attention reaches where a token attends to `attended` positions.

        Of the known head sizes, the largest up to `head_dim` counts, or else the smallest.
        """
        known = [size for size in self.attention_efficiencies if size <= head_dim]
        size = max(known) if known else min(self.attention_efficiencies)
        return self.attention_efficiencies[size] * attended / (attended + self.attention_knee)


PLAIN = Implementation(
    name="plain",
    saved_mlp=4,
    logit_bytes=6,
    passes_hidden=38,
    passes_ffn=12,
    passes_logits=16,
    optimizer_bytes=80,
    gradient_bytes=10,
    step_overhead=0.023,
)
"""Megatron-core's local modules as they are: logits in bf16 and fp32, SwiGLU and RoPE in single operations."""

FUSED = Implementation(
    name="fused",
    saved_mlp=3,
    logit_bytes=0,
    logit_chunk=2**31,
    passes_hidden=26,
    passes_ffn=8,
    passes_logits=6,
    optimizer_bytes=80,
    gradient_bytes=10,
    step_overhead=0.023,
)
"""Fused RMSNorm, RoPE, SwiGLU and linear cross-entropy in chunks on the same modules."""

TRANSFORMER_ENGINE = Implementation(
    name="transformer-engine",
    saved_mlp=3,
    logit_bytes=6,
    passes_hidden=26,
    passes_ffn=8,
    passes_logits=10,
    optimizer_bytes=28,
    gradient_bytes=8,
    step_overhead=0.023,
    tensor_parallel_exposed=0.5,
    gathers_behind_forward=True,
    fp8_efficiency=0.53,
    fp8_weight_gradients=True,
)
"""Transformer Engine under NeMo and Megatron-Bridge; for comparison with their published rows only."""

CURRENT = dataclasses.replace(
    FUSED,
    name="sft",
    adds_adapters_in_products=True,
    loss_of_targets=True,
    spares_mlp_output=True,
    gathers_behind_forward=True,
    optimizer_bytes=34,
    gradient_bytes=8,
    step_overhead=0.004,
    layer_launches=0.0035,
    adapted_layer_launches=0.0058,
    adapted_expert_launches=0.0108,
    hidden_collectives_cost=0.6,
    exchange_overhead=0.003,
    tensor_parallel_exposed=0.95,
    attention_efficiencies={64: 0.49, 128: 0.56},
    attention_knee=2070.0,
    passes_expert_rows=8,
)
"""What `sft` runs with flash-attn-4: SwiGLU's output computed again where the MLP is one operation, weights gathered
behind forward, the update in one pass. Attention from profiles of rows of 1,437 (mean) to 131,072 tokens; launches from
steps of 0.5B with 4,096 tokens, full and LoRA, and from LoRA of Qwen3-30B-A3B: they depend on the host's processor."""

CURRENT_WITH_FLASH2 = dataclasses.replace(CURRENT, name="sft-flash2", attention_efficiencies={64: 0.29, 128: 0.36})
"""The same with the attention in torch that takes offsets, from profiles of rows of 1,437 (mean) tokens."""

CURRENT_WITH_TORCH_ATTENTION = dataclasses.replace(
    CURRENT, name="sft-torch-attention", attention_efficiencies=ATTENTION_EFFICIENCY, attention_knee=0.0
)
"""The same for rows of one length, which torch gives to cuDNN."""

CURRENT_WITH_PLAIN_LAYERS = dataclasses.replace(
    CURRENT_WITH_TORCH_ATTENTION,
    name="sft-plain-layers",
    saved_mlp=PLAIN.saved_mlp,
    passes_hidden=PLAIN.passes_hidden,
    passes_ffn=PLAIN.passes_ffn,
    adds_adapters_in_products=False,
    spares_mlp_output=False,
)
"""Fused loss and update around the layers of `plain`: models whose layers no fused kernel computes. Not measured."""

LORA_PASSES = 8
"""Reads and writes of an adapted linear's inputs and outputs that the adapter adds, forward and backward: its products
read the input again and write a second output, which is then added. Counted, not measured."""
LORA_PASSES_IN_PRODUCTS = 4
"""The same where the frozen product adds the adapter: the output is read and written once more by it, and so is the
gradient of the input. Counted; a run of 8B is predicted to 3 % with it (docs/explanation/planning.md)."""

ADAPTED_PLACE_SECONDS = 55e-6
"""Seconds of a layer and micro-batch, forward and backward, that the small products of adapters on the same inputs take
however few tokens there are. From a step of 0.5B with 4,096 tokens, whose layers are CUDA graphs."""

LATENT_PASSES = 16
"""Reads and writes of a head of latent attention, forward and backward: queries, keys, values and contexts are each put
together from parts, or cut, once. Counted, not measured."""

LINEAR_ATTENTION_EFFICIENCY = 0.03
"""Part of the bf16 peak that flash-linear-attention's gated delta rule reaches, as `launcher.contract.flops` counts it.
With the passes below from a step of Qwen3.5 4B, whose kernels of linear attention take 140 of 525 ms."""
LINEAR_ATTENTION_PASSES = 40
"""Reads and writes of queries, keys, values, gates and outputs in convolution, rule and gated norm, and in the copies
between them."""

MATMUL_EXPOSED_TRAFFIC = 0.6
"""Part of a product's reads and writes that its arithmetic does not hide: small products are slower than the peak
product. From a profile (docs/explanation/planning.md)."""

EXPERT_PRODUCTS_RATE = 0.85
EXPERT_ROWS_FOR_HALF_RATE = 300
"""Rate of experts' grouped products over that of large dense ones where an expert meets very many rows, and the rows
with which half of it is reached. From profiles of Mixtral (4,096 rows: 722 TFLOP/s forward and for inputs, 455 for
weights) and of Qwen3-30B-A3B's width (1,024 rows: 595 and 319)."""

PAIR_RATE = 0.6
"""Rate of collectives of two ranks within a node over that of more. From tp2 beside tp4, of 3B and 8B."""
CUDA_CONTEXT_GIB = 1.0
"""CUDA context, libraries' workspaces and what the allocator cannot use; assumed."""
COMMUNICATOR_GIB = 0.4
"""NCCL's buffers of each kind of process group; assumed."""
