"""A tokenizer whose ids are character codes, and configs as users of trlx have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS = 1, 2


def character_tokenizer(truncation_side: str = "right") -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are ASCII codes, with bos 1, eos 2, and no padding token."""
    vocabulary = {"\x00": 0, "<s>": BOS, "</s>": EOS, **{chr(code): code for code in range(3, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="\x00"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", truncation_side=truncation_side
    )


def trl_config(model: Path | str, **train: Any) -> dict[str, Any]:
    """Return a TRLConfig as a dict, for a short run."""
    return {
        "method": {"name": "SFTConfig", "gen_kwargs": {"max_new_tokens": 6, "use_greedy": True}},
        "model": {"model_path": str(model)},
        "tokenizer": {"tokenizer_path": str(model)},
        "optimizer": {"name": "adamw", "kwargs": {"lr": "3e-3", "betas": [0.9, 0.95]}},
        "scheduler": {"name": "cosine_annealing", "kwargs": {"T_max": 4, "eta_min": 3e-4}},
        "train": {
            "total_steps": 4,
            "seq_length": 64,
            "epochs": 1,
            "batch_size": 4,
            "checkpoint_interval": 100,
            "eval_interval": 2,
            "pipeline": "PromptPipeline",
            "trainer": "NeMoSFTTrainer",
            "tracker": None,
            **train,
        },
    }


def megatron_config(ranks: int = 1, **model: Any) -> dict[str, Any]:
    """Return a NeMo config for CPU ranks without the sizes of a model."""
    return {
        "trainer": {
            "devices": ranks,
            "num_nodes": 1,
            "accelerator": "cpu",
            "precision": 32,
            "max_steps": 4,
            "val_check_interval": 2,
            "gradient_clip_val": 1.0,
        },
        "model": {
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "encoder_seq_length": 64,
            **model,
            "optim": {
                "name": "distributed_fused_adam",
                "lr": 3e-3,
                "betas": [0.9, 0.95],
                "sched": {"name": "CosineAnnealing", "warmup_steps": 0, "constant_steps": 0, "min_lr": 3e-4},
            },
        },
    }
