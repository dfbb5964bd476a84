"""What the fork server of tests.ranks imports once, before any rank exists."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Asking the driver whether there is a GPU would initialise CUDA, and a forked rank could then not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import pytorch_lightning  # noqa: F401
import transformers  # noqa: F401

import sft.megatron.core  # noqa: F401
