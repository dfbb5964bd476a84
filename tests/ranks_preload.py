"""Import, once and before any rank exists, what ranks import: the fork server of tests.ranks loads this module.

A rank of a small run then costs a fork instead of ten seconds of imports. Two kinds of imports matter: those at the top
of sft's modules, and those that libraries put off until their first use, which each rank would repeat.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Asking the driver whether there is a GPU would initialise CUDA, and a forked rank could then not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import omegaconf  # noqa: F401
import pytest  # noqa: F401
import torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook
import torch.utils.serialization.config  # noqa: F401
import transformers

import sft.runtime.lightning

import sft.megatron.core  # isort: skip  (before anything else of Megatron-core: it prepares it for a CPU)
import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401

import sft.training.trainer  # noqa: F401
import tests.parity.runs  # noqa: F401
from sft.models.registry import SUPPORTED, family

for _model_type in SUPPORTED:
    family(_model_type)

# transformers imports a model's module, and with it accelerate and others, at the first use of one of its names.
for _name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "PreTrainedTokenizerFast"):
    getattr(transformers, _name)

# Megatron-core collects garbage while it saves the optimizer, which takes 0.3 s over everything imported here and
# writes to the pages that a rank shares with the fork server. Frozen objects are left alone.
gc.collect()
gc.freeze()
