"""trlx's NeMo SFT trainer on this project's core: `from sft.compat import trlx` in place of `import trlx`.

docs/how-to/nemo-and-trlx.md says what is the same, what is different and why. Nothing here trains: settings become a
RunSpec, samples become a file of token ids, and `sft.training.trainer` does the rest.
"""

from sft.compat.trlx.api import train
from sft.compat.trlx.configs import (
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    SFTConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)
from sft.compat.trlx.defaults import (
    default_nemo_1_3b_config,
    default_nemo_20b_config,
    default_nemo_65b_config,
    default_nemo_llama2_7b_config,
    default_sft_config,
)
from sft.compat.trlx.registry import get_trainer, register_trainer
from sft.compat.trlx.samples import PromptPipeline, ShuffledCyclicSequence
from sft.compat.trlx.trainer import BaseRLTrainer, NeMoSFTTrainer, megatron_trainer

__all__ = [
    "BaseRLTrainer",
    "MethodConfig",
    "ModelConfig",
    "NeMoSFTTrainer",
    "OptimizerConfig",
    "PromptPipeline",
    "SFTConfig",
    "SchedulerConfig",
    "ShuffledCyclicSequence",
    "TRLConfig",
    "TokenizerConfig",
    "TrainConfig",
    "default_nemo_1_3b_config",
    "default_nemo_20b_config",
    "default_nemo_65b_config",
    "default_nemo_llama2_7b_config",
    "default_sft_config",
    "get_trainer",
    "megatron_trainer",
    "register_trainer",
    "train",
]
