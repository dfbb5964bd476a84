"""The GPT model of a pipeline stage: Megatron-core's, with exact losses, multipliers and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from launcher.contract.divisors import rounded_up
from launcher.contract.errors import CheckpointError, ConfigError
from launcher.contract.spec import RunSpec
from launcher.contract.topology import Topology
from sft.hf.checks import check_model_settings
from sft.kernels.linear_cross_entropy import VocabPart, linear_cross_entropy
from sft.kernels.loss_form import LossForm
from sft.megatron.core import (
    GPTModel,
    TransformerConfig,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    parallel_state,
    tensor_parallel,
)
from sft.megatron.decoder_graphs import DecoderGraphs, RowForm
from sft.megatron.kernel_choice import Kernels
from sft.megatron.layers.biases import drop_absent_biases
from sft.megatron.layers.fp8 import set_fp8_options
from sft.megatron.layers.lora import attach_adapters
from sft.megatron.layers.noisy_embedding import NoisyEmbedding, TokenSeeds
from sft.megatron.layers.packed_rows import PackedSequences
from sft.megatron.layers.router import tell_documents
from sft.megatron.layers.spec import LayerOptions, decoder_spec
from sft.megatron.layers.weights_in_use import await_weights
from sft.megatron.parallel.context import SharedRows
from sft.megatron.parallel.documents import Rows
from sft.megatron.patches.embedding import multiply_embedding, use_direct_lookup
from sft.megatron.patches.offloaded_inputs import offload_inputs
from sft.megatron.patches.rotary_angles import use_whole_table
from sft.models.architecture import Architecture

_BASE = "base_weights"


@dataclass(frozen=True, slots=True)
class Targets:
    """The supervised positions of a micro-batch: the loss is the sum of weights times cross-entropies over them."""

    places: Tensor
    """Indices into the hidden states, in their order: sequence position first, then row."""
    labels: Tensor
    weights: Tensor


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Return the vocabulary rounded up so that each tensor parallel rank has equally many rows."""
    return rounded_up(vocab_size, tensor_parallel)


class SFTGPTModel(GPTModel):  # type: ignore[misc]
    """GPTModel whose loss does not see the rows that only pad the vocabulary.

    Megatron-core leaves padded rows in the softmax, where each adds exp(logit) to the partition function.
    """

    def __init__(self, *args: object, architecture: Architecture, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._true_vocab_size = architecture.shape.vocab_size
        self._logits_scaling = architecture.logits_scaling
        self._stacked = architecture.weights.stacked
        self._softcap = architecture.logits_softcap
        if self.post_process and self._softcap is not None:
            self.output_layer.register_forward_hook(partial(_cap_logits, self._softcap))
        self.label_smoothing = 0.0
        """In training, the share of each target's probability that goes to the whole vocabulary."""
        self.graphs: DecoderGraphs | None = None
        """The layers as CUDA graphs, in a run that uses them."""
        self.noise: NoisyEmbedding | None = None
        """Of the first stage in a run with noise on embeddings."""
        self.adapted = False
        """Only adapters are trained, and only they are in checkpoints."""
        self.base_weights = ""
        """Identifies the frozen weights of an adapted model."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *args: object,
        targets: Targets | None = None,
        packed_seq_params: Rows | None = None,
        noise_of: TokenSeeds | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Return what Megatron-core's forward pass returns or, with `targets`, what `loss_at` returns.

        Data parallelism wraps `forward` alone, so that this is the way to `loss_at`.
        """
        with nullcontext() if self.noise is None else self.noise.of(noise_of):
            if targets is not None:
                return self.loss_at(targets, input_ids, position_ids, packed_seq_params)
            output: Tensor = super().forward(
                input_ids, position_ids, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
            )
            return output

    def loss_at(
        self,
        targets: Targets,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Rows | None = None,
    ) -> Tensor:
        """Return the weighted sum of the losses at `targets`, computed without the logits of other positions.

        Stages before the last one return their hidden states.
        """
        if self.graphs is not None and torch.is_grad_enabled() and isinstance(rows, PackedSequences):
            hidden_states = self._decoded_by_graphs(self.graphs, input_ids, position_ids, rows)
        else:
            hidden_states = self._decoded(input_ids, position_ids, rows)
        return self._summed_loss(hidden_states, targets) if self.post_process else hidden_states

    def _decoded(self, input_ids: Tensor, position_ids: Tensor, rows: Rows | None) -> Tensor:
        """Return the decoder's output, [s, b, h]."""
        embedded, angles, *_ = self._preprocess(input_ids=input_ids, position_ids=position_ids, packed_seq_params=rows)
        hidden_states: Tensor = self.decoder(
            hidden_states=embedded, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=rows
        )
        return hidden_states

    def _decoded_by_graphs(
        self, graphs: DecoderGraphs, input_ids: Tensor, position_ids: Tensor, rows: PackedSequences
    ) -> Tensor:
        """Return the same, of a stage that has all layers."""
        form = RowForm.of(rows.seq_lengths)
        embedded, angles, *_ = self._preprocess(
            input_ids=input_ids, position_ids=position_ids, packed_seq_params=form.widened(rows)
        )
        hidden_states: Tensor = self.decoder.final_layernorm(graphs(embedded, angles, rows, form))
        return hidden_states

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the decoder's inputs, with the angles of this rank's tokens where ranks share rows."""
        embedded, angles, *others = super()._preprocess(*args, **kwargs)
        rows: Rows | None = kwargs.get("packed_seq_params")
        if angles is not None and isinstance(rows, SharedRows):
            angles = angles[rows.positions]
        return embedded, angles, *others

    def _postprocess(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return Megatron-core's logits or losses, with the logits scaled."""
        if self.post_process:
            hidden_states = self._before_output_layer(hidden_states)
        output: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
        return output

    def _before_output_layer(self, hidden_states: Tensor) -> Tensor:
        """Return hidden states whose logits are scaled: the product is linear, and these are far fewer numbers."""
        return hidden_states if self._logits_scaling == 1.0 else hidden_states / self._logits_scaling

    def _summed_loss(self, hidden_states: Tensor, targets: Targets) -> Tensor:
        layer = self.output_layer
        await_weights(layer)  # its weight is used here without calling it
        hidden_states = self._before_output_layer(hidden_states)
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
        smoothing = self.label_smoothing if self.training else 0.0
        form = LossForm(self._softcap, smoothing, self._true_vocab_size)
        return linear_cross_entropy(chosen, weight, targets.labels, targets.weights, part, form)

    def _own_vocabulary(self, rows: int) -> tuple[int, int]:
        """Return the first token and the number of true tokens among this rank's `rows` of the vocabulary."""
        first = rows * parallel_state.get_tensor_model_parallel_rank()
        return first, min(max(self._true_vocab_size - first, 0), rows)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the loss of each target, [b, s], from labels [b, s] and this rank's logits [s, b, vocab / tp]."""
        local_rows = logits.size(-1)
        _, true_rows = self._own_vocabulary(local_rows)
        if true_rows < local_rows:
            logits.narrow(-1, true_rows, local_rows - true_rows).fill_(torch.finfo(logits.dtype).min)
        smoothed = self.training and self.label_smoothing > 0
        # Before the loss, which overwrites the logits.
        lead = self._lead(labels, logits) if smoothed else None
        loss: Tensor = super().compute_language_model_loss(labels, logits)
        return loss if lead is None else loss + self.label_smoothing * lead

    def _lead(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return how far each label's logit is above the mean of the vocabulary's, fp32 [b, s].

        With label smoothing e the loss is (1 - e) * nll + e * mean(-log p), which is nll + e * this: the logarithm of
        the softmax's denominator is in both. Megatron-core's own smoothing takes each rank's part of the vocabulary for
        the whole.
        """
        first, width = self._own_vocabulary(logits.size(-1))
        own, places = logits[..., :width].float(), labels.t() - first
        here = (places >= 0) & (places < width)
        rows = torch.arange(places.numel(), device=places.device)
        # By indices: `gather` keeps the logits for its backward.
        picked = logits.flatten(0, 1)[rows, torch.where(here, places, 0).flatten()].view(places.shape).float()
        part = torch.where(here, picked, 0.0) - own.sum(-1) / self._true_vocab_size
        whole: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(part, group=self.pg_collection.tp)
        return whole.t()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[()] = (), metadata: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        """Return Megatron-core's state, for an adapted model only what is trained of it.

        Layers that differ have keys of their own; equal ones are stacked.
        """
        own = {**(metadata or {}), "non_homogeneous_layers": not self._stacked}
        state: dict[str, object] = super().sharded_state_dict(prefix, sharded_offsets, own)
        if not self.adapted:
            return state
        trained = {f"{prefix}{name}" for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {key: value for key, value in state.items() if key in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> object:
        """Load as torch does. An adapted model must find its adapters, of its own frozen weights, and nothing else."""
        if not (self.adapted and strict):
            return super().load_state_dict(state_dict, strict, assign)
        adapters = dict(state_dict)
        # Earlier checkpoints name them here, by chunk; later ones in trainer.json, as another layout has other chunks.
        if adapters.pop(_BASE, self.base_weights) != self.base_weights:
            raise ConfigError(
                "the checkpoint's adapters were trained on other weights than those in model.path; put model.path back"
            )
        wanted = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if wanted != adapters.keys():
            raise CheckpointError(f"adapters that do not match: {', '.join(sorted(wanted ^ adapters.keys()))}")
        return super().load_state_dict(adapters, False, assign)


def _cap_logits(
    cap: float, module: torch.nn.Module, inputs: object, output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    logits, bias = output
    return cap * torch.tanh(logits / cap), bias


def build_chunks(
    spec: RunSpec, architecture: Architecture, topology: Topology, config: TransformerConfig, kernels: Kernels
) -> list[SFTGPTModel]:
    """Return the model chunks of this pipeline stage, one for each virtual stage, with uninitialised weights."""
    check_model_settings(spec, architecture)
    stages = range(topology.virtual_pipeline) if topology.virtual_pipeline > 1 else [None]
    return [_build_chunk(spec, architecture, config, kernels, stage) for stage in stages]


def _build_chunk(
    spec: RunSpec, architecture: Architecture, config: TransformerConfig, kernels: Kernels, vp_stage: int | None
) -> SFTGPTModel:
    shape, rope, lora = architecture.shape, architecture.rope, spec.model.lora
    in_fp8 = spec.train.fp8 if spec.train.precision == "fp8" else None
    options = LayerOptions(kernels=kernels, adapted=lora.rank is not None, fp8=in_fp8)
    chunk = SFTGPTModel(
        config,
        decoder_spec(architecture, options, _layer_numbers(config, vp_stage)),
        architecture=architecture,
        vocab_size=padded_vocab_size(shape.vocab_size, config.tensor_model_parallel_size),
        # Learned positions are a table of that many rows.
        max_sequence_length=spec.data.seq_length if rope is not None else shape.max_position_embeddings,
        position_embedding_type="rope" if rope is not None else "learned_absolute",
        share_embeddings_and_output_weights=shape.tied_embeddings,
        vp_stage=vp_stage,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )
    drop_absent_biases(chunk, architecture)
    if rope is not None:
        use_whole_table(chunk, architecture.rotations)
    elif chunk.pre_process:
        # Megatron-core makes this table in fp32, and its sum with bf16 embeddings would be fp32.
        chunk.embedding.position_embeddings.to(config.params_dtype)
    if chunk.pre_process and architecture.embedding_multiplier != 1.0:
        multiply_embedding(
            chunk, architecture.embedding_multiplier, rounded=architecture.embedding_multiplier_is_rounded
        )
    if in_fp8 is not None:
        set_fp8_options(chunk, in_fp8)
    chunk.label_smoothing = spec.train.label_smoothing
    if kernels.fused:
        use_direct_lookup(chunk)
    tell_documents(chunk)
    if chunk.pre_process and spec.train.neftune_alpha is not None:
        chunk.noise = NoisyEmbedding(chunk.embedding.word_embeddings, spec.train.neftune_alpha, architecture)
    if spec.train.recompute == "offload":
        offload_inputs(chunk)
    if lora.rank is not None:
        attach_adapters(chunk, lora, architecture, config)
        chunk.adapted = True
    return chunk


def _layer_numbers(config: TransformerConfig, vp_stage: int | None) -> range:
    """Return the layers of this stage, counted from 1 in the whole model."""
    first = get_transformer_layer_offset(config, vp_stage) + 1
    return range(first, first + get_num_layers_to_build(config, vp_stage))
