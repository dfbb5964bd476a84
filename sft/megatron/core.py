"""The one place that imports Megatron-core, and the list of all that this project takes from it.

Import order matters: on a machine without CUDA the sources must be rewritten before the first import, and the mends
must be in before the first optimizer is built. With one importer, neither can be forgotten.
"""

from __future__ import annotations

import warnings

from sft.megatron.patches import cpu, fixes

cpu.install()

with warnings.catch_warnings():
    # Transformer Engine and Apex are optional here; Megatron-core warns on import that they are absent.
    warnings.simplefilter("ignore")
    import megatron.core.optimizer.clip_grads as _clip_grads
    import megatron.core.tensor_parallel.layers as _linears
    import megatron.core.tensor_parallel.random as _random
    from megatron.core import __version__, dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing import serialization as _serialization
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy as _TorchCommonSaveStrategy
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config as rotary_magnitude,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

cpu.redirect_rng(_random)
fixes.apply(DistributedOptimizer, filesystem_async, _clip_grads, _TorchCommonSaveStrategy, _serialization)
fixes.provide_weight_gradient(_linears)
fixes.checkpoint_without_fp8(_random.CheckpointWithoutOutput)

__all__ = [
    "MLP",
    "AsyncRequest",
    "CheckpointingException",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "GPTModel",
    "IdentityOp",
    "MegatronModule",
    "MegatronOptimizer",
    "ModuleSpec",
    "OptimizerConfig",
    "OptimizerParamScheduler",
    "PackedSeqParams",
    "ProcessGroupCollection",
    "SelfAttention",
    "ShardedObject",
    "ShardedTensor",
    "StaticInferenceContext",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "__version__",
    "dist_checkpointing",
    "filesystem_async",
    "finalize_model_grads",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_megatron_optimizer",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "make_sharded_tensors_for_checkpoint",
    "parallel_state",
    "rotary_magnitude",
    "tensor_parallel",
]
