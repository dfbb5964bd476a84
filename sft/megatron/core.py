"""The way to Megatron-core: everything that this project takes from it, with the patches installed.

Other modules import Megatron-core from here, and only the patches themselves import it directly. So the order is always
right: on a machine without CUDA the sources are rewritten before the first import, and the patches are in before the
first model or optimizer is built.
"""

from __future__ import annotations

import importlib.metadata
import warnings

from sft.megatron.patches import cpu

# Where .venv lies in a git tree, `megatron.core.__version__` ends in the commit of that tree.
__version__ = importlib.metadata.version("megatron-core")

cpu.install()

with warnings.catch_warnings():
    # Transformer Engine and Apex are optional here; Megatron-core warns on import that they are absent.
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import (
        MegatronOptimizer,
        OptimizerConfig,
        ParamKey,
        ParamWithNamePredicate,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
        get_transformer_layer_offset,
    )
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

    from sft.megatron.patches.catalogue import PATCHES
    from sft.megatron.patches.patch import install

install(PATCHES, __version__)

__all__ = [
    "MLP",
    "AsyncRequest",
    "AttnMaskType",
    "CheckpointingException",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "GPTModel",
    "IdentityOp",
    "MLPSubmodules",
    "MegatronModule",
    "MegatronOptimizer",
    "ModuleSpec",
    "OptimizerConfig",
    "OptimizerParamScheduler",
    "PackedSeqParams",
    "ParamGroupOverride",
    "ParamKey",
    "ParamWithNamePredicate",
    "ProcessGroupCollection",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "ShardedObject",
    "ShardedTensor",
    "ShardedTensorFactory",
    "StaticInferenceContext",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "__version__",
    "dist_checkpointing",
    "filesystem_async",
    "finalize_model_grads",
    "get_forward_backward_func",
    "get_bias_dropout_add",
    "get_megatron_optimizer",
    "get_num_layers_to_build",
    "get_standard_config_overrides",
    "get_transformer_layer_offset",
    "make_sharded_tensors_for_checkpoint",
    "parallel_state",
    "sharded_state_dict_default",
    "tensor_parallel",
]
