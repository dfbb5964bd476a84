"""From an `Architecture` and a `Topology` to the Megatron-core model chunks of this rank.

Settings under which Megatron-core gives wrong results without an error are chosen here, never by the user:
the interleaved schedule sends without batching (a two-stage pipeline would otherwise swap activations and
gradients), gloo keeps stage outputs alive until they are sent, and the fused cross-entropy that casts gradients to
bf16 stays off.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.contract.errors import CheckpointError, ModelError
from launcher.contract.spec import RunSpec
from launcher.contract.topology import Topology
from sft.hf.adapter import MARK
from sft.hf.checks import check_model_settings
from sft.kernels import attention
from sft.kernels.linear_cross_entropy import VocabPart, linear_cross_entropy
from sft.megatron.core import GPTModel, TransformerBlockSubmodules, TransformerConfig, parallel_state, tensor_parallel
from sft.megatron.layers.attention import decoder_spec
from sft.megatron.layers.fp8 import use_fp8_linears
from sft.megatron.layers.fused import await_weights, use_fused_layers
from sft.megatron.layers.lora import attach_adapters, use_lora_linears
from sft.megatron.layers.norms import LayerNorm, ZeroCenteredRMSNorm
from sft.megatron.parallel.context import SharedRows
from sft.megatron.patches.embedding import use_direct_lookup
from sft.megatron.patches.rotary_angles import keep_angles_whole
from sft.models.architecture import Activation, Architecture

_BASE = "base_weights"


@dataclass(frozen=True, slots=True)
class Targets:
    """The supervised positions of a micro-batch: the loss is the sum of weights times cross-entropies over them."""

    places: Tensor
    """Indices into the hidden states, in their order: sequence position first, then row."""
    labels: Tensor
    weights: Tensor


def fused_kernels(spec: RunSpec, *, on_gpu: bool) -> bool:
    """Whether train.kernels means the fused ones here."""
    if spec.train.kernels != "auto":
        return spec.train.kernels == "fused"
    return on_gpu and importlib.util.find_spec("triton") is not None


def attention_kernel(spec: RunSpec, architecture: Architecture) -> attention.Kernel:
    """The kernel that train.attention means here, for packed rows of fused layers on a GPU."""
    chosen, head_dim = spec.train.attention, architecture.shape.head_dim
    if chosen == "flash4" and not attention.has_flash4():
        raise ModelError("train.attention flash4 needs the package flash-attn-4 in the ranks' Python; set it to auto")
    if chosen == "flash4" and not attention.flash4_takes(head_dim):
        raise ModelError(
            f"train.attention flash4 takes heads of 32, 64, 96 or 128; this model's are {head_dim}, whose gradients it "
            "gets wrong on Hopper; set it to auto"
        )
    return attention.fastest_kernel(head_dim) if chosen == "auto" else chosen


def describe_kernels(spec: RunSpec, architecture: Architecture, *, on_gpu: bool) -> str:
    """Which kernels the ranks compute with, in one line."""
    if not fused_kernels(spec, on_gpu=on_gpu) or not _has_fused_layers(spec, architecture):
        return f"kernels: plain, products in {spec.train.precision}"
    by_offsets = spec.data.packing or spec.topology.context_parallel > 1
    kernel = attention_kernel(spec, architecture) if on_gpu and by_offsets else "torch's"
    return f"kernels: fused, attention {kernel}, products in {spec.train.precision}"


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Vocabulary rounded up so that each tensor parallel rank has equally many rows."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


class SFTGPTModel(GPTModel):  # type: ignore[misc]
    """GPTModel whose loss does not see the rows that only pad the vocabulary.

    Megatron-core leaves padded rows in the softmax, where each adds exp(logit) to the partition function.
    """

    def __init__(self, *args: Any, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._true_vocab_size = true_vocab_size
        self.adapted = False
        """Only adapters are trained, and only they are in checkpoints."""
        self.base_weights = ""
        """Identifies the frozen weights of an adapted model."""

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Megatron-core's; of rows shared by context parallel ranks the angles of this rank's tokens, by position."""
        hidden_states, angles, *others = super()._preprocess(*args, **kwargs)
        rows = kwargs.get("packed_seq_params")
        if angles is not None and isinstance(rows, SharedRows):
            angles = angles[rows.positions]
        return hidden_states, angles, *others

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Megatron-core's; where `loss_mask` says which targets count, their weighted sum without the logits."""
        targets = kwargs.get("loss_mask")
        if not self.post_process or targets is None:
            output: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
            return output
        layer = self.output_layer
        await_weights(layer)
        if layer.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=layer.tp_group)
        else:
            hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=layer.tp_group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else layer.weight
        first, width = self._own_vocabulary(weight.size(0))
        group = layer.tp_group if layer.tp_group.size() > 1 else None
        part = VocabPart(first, width, group, tied=tied and self.pre_process)
        chosen = hidden_states.flatten(0, 1).index_select(0, targets.places)
        return linear_cross_entropy(chosen, weight, targets.labels, targets.weights, part)

    def _own_vocabulary(self, rows: int) -> tuple[int, int]:
        """First token and number of true tokens among this rank's `rows` of the vocabulary."""
        first = rows * parallel_state.get_tensor_model_parallel_rank()
        return first, min(max(self._true_vocab_size - first, 0), rows)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of each target, [b, s], from labels [b, s] and this rank's logits [s, b, vocab / tp]."""
        local_rows = logits.size(-1)
        _, true_rows = self._own_vocabulary(local_rows)
        if true_rows < local_rows:
            logits.narrow(-1, true_rows, local_rows - true_rows).fill_(torch.finfo(logits.dtype).min)
        loss: Tensor = super().compute_language_model_loss(labels, logits)
        return loss

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron-core's; of an adapted model its adapters alone, and what they were trained on."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        if not self.adapted:
            return state
        return {key: value for key, value in state.items() if MARK in key} | {_BASE: self.base_weights}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Torch's; an adapted model must find its adapters, of its own frozen weights, and nothing else."""
        if not (self.adapted and strict):
            return super().load_state_dict(state_dict, strict, assign)
        adapters = dict(state_dict)
        if adapters.pop(_BASE, None) != self.base_weights:
            raise CheckpointError(
                "the checkpoint's adapters were trained on other weights than those in model.path; put model.path back"
            )
        wanted = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if wanted != adapters.keys():
            raise CheckpointError(f"adapters that do not match: {', '.join(sorted(wanted ^ adapters.keys()))}")
        return super().load_state_dict(adapters, False, assign)


def transformer_config(
    spec: RunSpec, architecture: Architecture, topology: Topology, *, on_gpu: bool
) -> TransformerConfig:
    """Megatron-core's configuration of this model under this layout."""
    shape, layer = architecture.shape, architecture.layers[0]
    dtype = torch.float32 if spec.train.precision == "fp32" else torch.bfloat16
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="LayerNorm" if architecture.norm == "layer" else "RMSNorm",
        layernorm_epsilon=architecture.layernorm_epsilon,
        gated_linear_unit=layer.mlp.gated,
        activation_func=_ACTIVATIONS[layer.mlp.activation],
        layernorm_zero_centered_gamma=architecture.norm == "zero_centered_rms",
        add_bias_linear=layer.mlp.bias,
        add_qkv_bias=layer.attention.qkv_bias,
        qk_layernorm=layer.attention.qk_norm,
        attention_dropout=spec.model.attention_dropout,
        hidden_dropout=spec.model.hidden_dropout,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Every weight is filled by name afterwards. Initialisation itself has to run all the same: it is what marks
        # parameters as split over tensor parallel ranks.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        calculate_per_token_loss=True,
        cross_entropy_loss_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=fused_kernels(spec, on_gpu=on_gpu),
        deterministic_mode=False,
        **_parallel_settings(topology, on_gpu),
        **_recompute_settings(spec.train.recompute),
    )


def _leave_as_is(weight: Tensor) -> Tensor:
    return weight


def _parallel_settings(topology: Topology, on_gpu: bool) -> dict[str, Any]:
    interleaved = topology.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": topology.tensor_parallel,
        "pipeline_model_parallel_size": topology.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": topology.virtual_pipeline if interleaved else None,
        "context_parallel_size": topology.context_parallel,
        "sequence_parallel": topology.sequence_parallel,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": on_gpu or not interleaved,
    }


def _recompute_settings(recompute: str) -> dict[str, Any]:
    if recompute in ("full", "offload"):
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "norms":
        return {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    return {"recompute_granularity": "selective"} if recompute == "selective" else {}


def build_chunks(
    spec: RunSpec, architecture: Architecture, topology: Topology, config: TransformerConfig
) -> list[SFTGPTModel]:
    """The model chunks of this pipeline stage, one a virtual stage, with uninitialised weights."""
    check_model_settings(spec, architecture)
    stages = range(topology.virtual_pipeline) if topology.virtual_pipeline > 1 else [None]
    return [_build_chunk(spec, architecture, topology, config, stage) for stage in stages]


def _build_chunk(
    spec: RunSpec, architecture: Architecture, topology: Topology, config: TransformerConfig, vp_stage: int | None
) -> SFTGPTModel:
    shape, rope = architecture.shape, architecture.rope
    chunk = SFTGPTModel(
        config,
        _decoder(spec, architecture, config, vp_stage),
        vocab_size=padded_vocab_size(shape.vocab_size, topology.tensor_parallel),
        true_vocab_size=shape.vocab_size,
        # Learned positions are a table of that many rows.
        max_sequence_length=spec.data.seq_length if rope is not None else shape.max_position_embeddings,
        position_embedding_type="rope" if rope is not None else "learned_absolute",
        share_embeddings_and_output_weights=shape.tied_embeddings,
        vp_stage=vp_stage,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )
    if rope is not None:
        keep_angles_whole(chunk)
        # Megatron-core's own scaling has Llama 3's numbers built in.
        rotary = chunk.rotary_pos_emb
        rotary.inv_freq = rope.inverse_frequencies(shape.head_dim).to(rotary.inv_freq.device)
        if rope.attention_factor > 1:
            # Megatron-core's attention multiplies by 0.1 ln(this) + 1, the paper's formula; here whatever config says.
            config.yarn_rotary_scaling_factor = math.exp(10 * (rope.attention_factor - 1))
    if chunk.pre_process and architecture.embedding_multiplier != 1:
        chunk.embedding.register_forward_hook(partial(_scale_embedding, architecture.embedding_multiplier))
    if config.gradient_accumulation_fusion:
        use_direct_lookup(chunk)
    if spec.train.recompute == "offload":
        chunk.decoder.forward = partial(_with_inputs_on_host, chunk.decoder.forward)
    if spec.model.lora.rank is not None:
        attach_adapters(chunk, spec.model.lora, architecture, config)
        chunk.adapted = True
    return chunk


def _decoder(
    spec: RunSpec, architecture: Architecture, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Our decoder spec, with the norm of this family and linears that take adapters where there are some."""
    block = decoder_spec(config, vp_stage)
    if spec.model.lora.rank is not None:
        use_lora_linears(block)
    if spec.train.precision == "fp8":
        use_fp8_linears(block)
    if config.gradient_accumulation_fusion and _has_fused_layers(spec, architecture):
        use_fused_layers(block, attention_kernel(spec, architecture))
    norm = {"layer": LayerNorm, "zero_centered_rms": ZeroCenteredRMSNorm, "rms": None}[architecture.norm]
    if norm is not None:
        block.layer_norm = norm
        for layer in block.layer_specs:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    return block


def _has_fused_layers(spec: RunSpec, architecture: Architecture) -> bool:
    """Whether the layers are of the kind that is fused; others still have the fused loss and weight gradients."""
    llama = architecture.norm == "rms" and all(layer.mlp.activation == "silu" for layer in architecture.layers)
    return llama and spec.model.hidden_dropout == 0


def _with_inputs_on_host(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The decoder's forward pass; what its recomputed layers keep for backward, their inputs, goes to the host."""
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return forward(*args, **kwargs)


def _scale_embedding(scale: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The factor is rounded to the embedding's type first, as transformers does."""
    return output * torch.tensor(scale, dtype=output.dtype, device="cpu")
