"""Configs to start from: trlx's default for SFT, and those that its NeMo trainers come with.

The NeMo ones are OmegaConf configs, because programs assign to their keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from omegaconf import DictConfig, OmegaConf

from launcher.contract.errors import ConfigError
from sft.compat.trlx.configs import (
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    SFTConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)


def default_sft_config() -> TRLConfig:
    """Return trlx's values, but with NeMoSFTTrainer, because its trainer on accelerate does not exist here."""
    return TRLConfig(
        method=SFTConfig(
            name="sftconfig", gen_kwargs={"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}
        ),
        model=ModelConfig(model_path="gpt2", num_layers_unfrozen=-1),
        tokenizer=TokenizerConfig(tokenizer_path="gpt2", truncation_side="right"),
        optimizer=OptimizerConfig(
            name="adamw", kwargs={"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-6}
        ),
        scheduler=SchedulerConfig(name="cosine_annealing", kwargs={"T_max": 1e12, "eta_min": 1e-4}),
        train=TrainConfig(
            seq_length=1024,
            epochs=100,
            total_steps=1000,
            batch_size=8,
            checkpoint_interval=10000,
            eval_interval=100,
            pipeline="PromptPipeline",
            trainer="NeMoSFTTrainer",
        ),
    )


def default_nemo_1_3b_config() -> DictConfig:
    """Return the config of a GPT of 1.3 billion parameters on one node of 8 GPUs, tp 1."""
    model = _gpt(24, 2048, 16, seq_length=2048) | {"ffn_hidden_size": 3072, "hidden_dropout": 0.0}
    model |= {"attention_dropout": 0.0, "global_batch_size": 256, "micro_batch_size": 32}
    return _config("megatron_gpt_1.3b", model, _optimizer(6e-5, 5e-5, 1e-6))


def default_nemo_2b_config() -> DictConfig:
    """Raise ConfigError: no Hugging Face model has this architecture."""
    raise ConfigError(
        "default_nemo_2b_config: its model has layernorm1p and rotary_percentage 0.5, which no architecture here has; "
        "use another checkpoint, e.g. that of default_nemo_1_3b_config()"
    )


def default_nemo_20b_config() -> DictConfig:
    """Return the config of fine-tuning a GPT of 20 billion parameters on 4 nodes of 8 GPUs, tp 4."""
    model = _gpt(44, 6144, 48, seq_length=1024) | {"tensor_model_parallel_size": 4, "hidden_dropout": 0.1}
    model |= {"global_batch_size": 256, "micro_batch_size": 4, "activations_checkpoint_granularity": "selective"}
    config = _config("megatron_gpt_20b", model, _optimizer(5e-5, 5e-6, 1e-6, warmup_steps=20, constant_steps=0))
    return _with(config, {"trainer": {"num_nodes": 4}, "model": {"data": {"add_bos": True, "add_eos": True}}})


def default_nemo_65b_config() -> DictConfig:
    """Return the config of a GPT of 65 billion parameters on 16 nodes of 8 GPUs, tp 8 and pp 4, without evaluation."""
    model = _gpt(80, 8192, 128, seq_length=2048) | {"hidden_dropout": 0.1, "tensor_model_parallel_size": 8}
    model |= {"pipeline_model_parallel_size": 4, "global_batch_size": 128, "micro_batch_size": 8}
    model |= {"activations_checkpoint_granularity": "selective"}
    config = _config("megatron_gpt", model, _optimizer(1.1e-4, 1.1e-5, 0.1, warmup_steps=115, constant_steps=12500))
    trainer = {"num_nodes": 16, "max_steps": 1000, "val_check_interval": 10, "limit_val_batches": 0.0}
    return _with(config, {"trainer": trainer, "exp_manager": {"resume_if_exists": True}})


def default_nemo_llama2_7b_config() -> DictConfig:
    """Return the config of a Llama 2 of 7 billion parameters on 4 nodes of 8 GPUs, tp 4."""
    model = _gpt(32, 4096, 32, seq_length=2048) | {
        "ffn_hidden_size": 11008,
        "padded_vocab_size": 32000,
        "make_vocab_size_divisible_by": 1,
        "layernorm_epsilon": 1e-6,
        "normalization": "rmsnorm",
        "bias": False,
        "activation": "swiglu",
        "position_embedding_type": "rope",
        "rotary_percentage": 1,
        "share_embeddings_and_output_weights": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": 4,
        "global_batch_size": 32,
        "micro_batch_size": 1,
        "activations_checkpoint_granularity": "selective",
        "tokenizer": {"library": "huggingface", "type": None},
    }
    config = _config("megatron_llama2", model, _optimizer(1e-6, 1e-6, 0.0, constant_steps=0))
    return _with(config, {"trainer": {"num_nodes": 4}})


NAMED: dict[str, Callable[[], DictConfig]] = {
    "megatron_1.3b.yaml": default_nemo_1_3b_config,
    "megatron_2b.yaml": default_nemo_2b_config,
    "megatron_20b.yaml": default_nemo_20b_config,
    "sft_megatron_20b.yaml": default_nemo_20b_config,
    "megatron_65b.yaml": default_nemo_65b_config,
    "megatron_llama_cfg.yaml": default_nemo_llama2_7b_config,
}
"""The file names of trlx's NeMo configs, which `megatron_cfg` may give instead of a path."""


def _gpt(layers: int, hidden: int, heads: int, *, seq_length: int) -> dict[str, object]:
    return {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "encoder_seq_length": seq_length,
        "max_position_embeddings": 2048,
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": 4 * hidden,
        "num_attention_heads": heads,
        "layernorm_epsilon": 1e-5,
        "make_vocab_size_divisible_by": 128,
        "tokenizer": {"library": "megatron", "type": "GPT2BPETokenizer"},
        "sequence_parallel": True,
        "resume_from_checkpoint": None,
        "seed": 1234,
        "data": {"add_bos": False, "add_eos": True},
    }


def _optimizer(
    lr: float, min_lr: float, weight_decay: float, *, warmup_steps: int = 0, constant_steps: int = 100_000_000
) -> dict[str, object]:
    schedule = {"name": "CosineAnnealing", "warmup_steps": warmup_steps, "constant_steps": constant_steps}
    return {
        "name": "distributed_fused_adam",
        "lr": lr,
        "weight_decay": weight_decay,
        "betas": [0.9, 0.95],
        "sched": {**schedule, "min_lr": min_lr},
    }


def _config(name: str, model: dict[str, object], optimizer: dict[str, object]) -> DictConfig:
    return OmegaConf.create(
        {
            "name": name,
            "restore_from_path": None,
            "trainer": {
                "devices": 8,
                "num_nodes": 1,
                "accelerator": "gpu",
                "precision": "bf16",
                "max_epochs": -1,
                "max_steps": 200,
                "log_every_n_steps": 1,
                "val_check_interval": 20,
                "limit_val_batches": 2,
                "gradient_clip_val": 1.0,
            },
            "exp_manager": {
                "explicit_log_dir": None,
                "exp_dir": None,
                "name": name,
                "create_tensorboard_logger": False,
                "create_wandb_logger": False,
                "wandb_logger_kwargs": {"project": "trlxnemo", "name": name},
                "resume_if_exists": False,
                "checkpoint_callback_params": {"every_n_train_steps": None},
            },
            "model": {**model, "optim": optimizer},
        }
    )


def _with(config: DictConfig, changes: dict[str, object]) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(config, changes))
