"""axolotl's YAML: its own words, and some of transformers'."""

from __future__ import annotations

from launcher.contract.nemo.entries import Entries, number_of, value_of
from launcher.contract.nemo.rule import Refused, Translation
from launcher.contract.trainers import rules
from launcher.contract.trainers.adapters import LoraWords
from launcher.contract.trainers.axolotl_data import datasets, held_out
from launcher.contract.trainers.hf_trainer import WORDS as HF_TRAINER
from launcher.contract.trainers.hf_trainer import batch_word
from launcher.contract.trainers.word import (
    Absent,
    Word,
    as_number,
    at,
    becomes,
    beside,
    gpus_of,
    missing,
    needless,
    number_at,
)

_LORA = LoraWords(
    rank="lora_r",
    alpha="lora_alpha",
    targets="lora_target_modules",
    default_rank=8,
    alpha_over_rank=None,
    default_alpha=8.0,
    default_dropout=0.0,
    default_targets=(),
)
_KERNELS = needless("kernels are chosen by train.kernels and train.attention")
_QUANTIZED = "the frozen weights stay in bf16, or their products are in fp8 (train.precision)"
_PREFERENCES = "supervised fine-tuning alone is done here"


def _adapter(value: object, entries: Entries) -> Translation:
    if value in (None, ""):
        return Translation(note="all weights are trained")
    if value != "lora":
        raise Refused(f"{value!r} is not supported; lora is. {_QUANTIZED}")
    return _LORA.settings(entries)


def _batch_size(value: object, entries: Entries) -> Translation:
    if value is None:
        return Translation(note="read from micro_batch_size and gradient_accumulation_steps")
    return Translation({"train.global_batch_size": int(as_number(value)) * gpus_of(entries)}, "x GPUs (--gpus)")


def _min_lr(value: object, entries: Entries) -> Translation:
    if value is None:
        return Translation(note="not set")
    if value_of(entries, "lr_scheduler", "cosine") != "cosine":
        return Translation(note="counts for the cosine schedule alone")
    return Translation(
        {"train.optimizer.min_lr": rules.share_of(number_of(entries, "learning_rate", 0.0), as_number(value))}
    )


def _template(value: object, entries: Entries) -> Translation:
    name = str(value or "tokenizer_default")
    if name.startswith("tokenizer_default"):
        return Translation({"data.chat_template": "tokenizer"})
    if name == "jinja":
        return Translation(note="here it is a file: write chat_template_jinja into one and name it")
    return Translation({"data.chat_template": name}, "validate says whether there is a template of that name here")


def _excess(value: object, entries: Entries) -> Translation:
    policies = {None: "drop", "drop": "drop", "truncate": "truncate_right", "raise": "error"}
    if value not in policies:
        raise Refused(f"{value!r} is not drop, truncate or raise")
    return Translation({"data.length_policy": policies[str(value)]})


def _inputs(value: object, entries: Entries) -> Translation:
    return Translation({"data.loss_on": "all" if value else "assistant"})


def _recompute(value: object, entries: Entries) -> Translation:
    names = {"offload": "offload", "unsloth": "offload", True: "full", "true": "full", False: "none", None: "none"}
    if value not in names:
        raise Refused(f"{value!r} is not true, false or offload")
    return Translation({"train.recompute": names[value]})


_MODEL: dict[str, Word] = {
    "base_model": at("model.path"),
    "revision_of_model": at("model.revision"),
    "tokenizer_config": at("model.tokenizer"),
    "base_model_config": missing("the model's own config.json is read"),
    **dict.fromkeys(
        ("model_type", "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy", "tokenizer_save_jinja_files"),
        needless("config.json and the tokenizer's files say what they are"),
    ),
    **dict.fromkeys(
        ("is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model", "is_falcon_derived_model"),
        needless("config.json says what the model is"),
    ),
    "trust_remote_code": missing("no code of a model is ever run"),
    "special_tokens": needless("the tokenizer's own special tokens count; padding is known by length"),
    "tokens": missing("no tokens are added; use a tokenizer that has them (model.tokenizer)"),
    "added_tokens_overrides": missing("no tokens are added; use a tokenizer that has them (model.tokenizer)"),
    "resize_token_embeddings_to_32x": missing("the vocabulary keeps its size"),
    "load_in_4bit": missing(_QUANTIZED),
    "load_in_8bit": missing(_QUANTIZED),
    "adapter": becomes("model.lora.rank", _adapter),
    "lora_model_dir": missing("adapters start anew; merge the first into the model"),
    "lora_r": beside("model.lora.rank", "adapter"),
    "lora_alpha": beside("model.lora.alpha", "adapter"),
    "lora_dropout": beside("model.lora.dropout", "adapter"),
    "lora_target_modules": beside("model.lora.targets", "adapter"),
    "lora_target_linear": beside("model.lora.targets: all-linear", "adapter"),
    "lora_target_parameters": missing(
        "model.lora.targets names tensors of all experts, too: experts.gate_up_proj, experts.down_proj"
    ),
    "lora_on_cpu": needless("adapters are merged on a CPU in any case (checkpoint.export_merged)"),
    "lora_modules_to_save": missing("only adapters are trained with model.lora.rank"),
    "lora_fan_in_fan_out": missing("the model's files say how their matrices lie"),
    "peft_use_dora": at("model.lora.dora"),
    "peft_use_rslora": at("model.lora.rslora"),
    "lora_layers_to_transform": missing("adapters are in all layers"),
    "peft_layers_to_transform": missing("adapters are in all layers"),
    "peft_init_lora_weights": missing("A starts random and B at zero", True),
    "peft": missing("nothing of it exists here"),
    "loraplus_lr_ratio": number_at("train.optimizer.loraplus_ratio"),
    "loraplus_lr_embedding": needless("embeddings have no adapters"),
    "relora": missing("adapters are trained in one go"),
    "unfrozen_parameters": missing(
        "all weights are trained, or adapters; train.optimizer.lr_by_name with 0 freezes some"
    ),
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
}

_DATA: dict[str, Word] = {
    "datasets": becomes("data.train, or data.sources with weights", datasets),
    "test_datasets": becomes("data.validation", held_out),
    "val_set_size": becomes("data.validation_split", rules.held_out_share),
    "pretraining_dataset": missing(_PREFERENCES),
    "dataset_prepared_path": needless("here it is data.cache_dir"),
    "dataset_keep_in_memory": needless("data are read from a cache on disk"),
    "min_sample_len": missing("every row counts"),
    "dataset_processes": at("data.workers"),
    "dataset_num_proc": at("data.workers"),
    "shuffle_merged_datasets": at("data.shuffle"),
    "dataset_exact_deduplication": missing("every row counts"),
    "chat_template": becomes("data.chat_template", _template),
    "chat_template_jinja": missing("here it is data.chat_template: a file"),
    "default_system_message": missing("write it into the rows or the chat template"),
    "eot_tokens": needless("tokens that end a turn are found in the chat template"),
    "train_on_inputs": becomes("data.loss_on", _inputs),
    "sequence_len": at("data.seq_length"),
    "excess_length_strategy": becomes("data.length_policy", _excess),
    "sample_packing": at("data.packing"),
    "eval_sample_packing": needless("held-out rows are packed as training's are; their loss does not depend on it"),
    "pad_to_sequence_len": needless("rows are padded to their longest; data.pad_to_multiple"),
    **dict.fromkeys(
        (
            "sample_packing_group_size",
            "sample_packing_bin_size",
            "sample_packing_sequentially",
            "sample_packing_eff_est",
            "total_num_tokens",
            "total_supervised_tokens",
            "multipack_real_batches",
        ),
        needless("all examples of a step are packed together"),
    ),
    "curriculum_sampling": missing("data.shuffle: false keeps the order of the files"),
    "batch_flattening": needless("data.packing has no padding to speak of"),
}

_TRAINING: dict[str, Word] = {
    "micro_batch_size": batch_word(("sample_packing",), ("sequence_len",), 512),
    "batch_size": becomes("train.global_batch_size", _batch_size),
    "eval_batch_size": needless("evaluation uses train.micro_batch_size; its loss does not depend on it"),
    "num_epochs": becomes("train.epochs", rules.epochs),
    "optimizer": becomes("train.optimizer, which is AdamW", rules.optimizer),
    "lr_scheduler": becomes("train.optimizer.schedule", rules.schedule),
    "cosine_min_lr_ratio": becomes("train.optimizer.min_lr, itself and not its share", _min_lr),
    "cosine_constant_lr_ratio": missing("here it is train.optimizer.decay_steps: after it min_lr stays"),
    "lr_quadratic_warmup": missing("the warm-up is linear"),
    "lr_div_factor": missing("the one-cycle schedule does not exist here"),
    "lr_groups": missing("here it is train.optimizer.lr_by_name"),
    "embedding_lr": missing('here it is train.optimizer.lr_by_name: {"*embed_tokens*": ..., "lm_head*": ...}'),
    "embedding_lr_scale": missing('here it is train.optimizer.lr_by_name: {"*embed_tokens*": ..., "lm_head*": ...}'),
    "noisy_embedding_alpha": number_at("train.neftune_alpha"),
    "gradient_checkpointing": becomes("train.recompute: full", _recompute),
    "evals_per_epoch": needless(
        "here it is train.eval_every, in steps; an epoch has examples / train.global_batch_size"
    ),
    "saves_per_epoch": needless(
        "here it is checkpoint.every, in steps; an epoch has examples / train.global_batch_size"
    ),
    "early_stopping_patience": at("train.early_stopping.patience"),
    "eval_table_size": missing("here it is evaluation.prompts"),
    "eval_max_new_tokens": needless("read with eval_table_size; here it is evaluation.max_new_tokens"),
    "eval_causal_lm_metrics": needless("read with do_causal_lm_eval; here it is evaluation.metric"),
    "do_causal_lm_eval": missing("here it is evaluation.prompts with evaluation.metric"),
    "do_bench_eval": missing("here it is evaluation.prompts with evaluation.metric"),
    "bf16": becomes("train.precision", rules.flag({"train.precision": "bf16"})),
    "bfloat16": becomes("train.precision", rules.flag({"train.precision": "bf16"})),
    "float16": missing("fp16 does not exist here; train.precision is bf16, fp32 or fp8"),
    "float32": becomes("train.precision", rules.flag({"train.precision": "fp32"})),
    "fp8": becomes("train.precision", rules.flag({"train.precision": "fp8"})),
    "sequence_parallel_degree": at("topology.context_parallel"),
    "context_parallel_size": at("topology.context_parallel"),
    "tensor_parallel_size": at("topology.tensor_parallel"),
    "rl": missing(_PREFERENCES),
    "reward_model": missing(_PREFERENCES),
    "use_tensorboard": at("logging.tensorboard"),
    "wandb_project": at("logging.wandb"),
    "mlflow_tracking_uri": at("logging.mlflow"),
    **dict.fromkeys(
        (
            "wandb_name",
            "wandb_run_id",
            "wandb_entity",
            "wandb_log_model",
            "wandb_watch",
            "wandb_mode",
            "mlflow_experiment_name",
        ),
        needless("a run is logged by its own name"),
    ),
    **dict.fromkeys(
        (
            "flash_attention",
            "sdp_attention",
            "xformers_attention",
            "flex_attention",
            "eager_attention",
            "flash_attn_cross_entropy",
            "flash_attn_rms_norm",
            "flash_attn_fuse_qkv",
            "flash_attn_fuse_mlp",
            "unsloth_cross_entropy_loss",
            "unsloth_lora_mlp",
            "unsloth_lora_qkv",
            "unsloth_lora_o",
            "unsloth_rms_norm",
            "unsloth_rope",
            "liger_rope",
            "liger_rms_norm",
            "liger_glu_activation",
            "liger_layer_norm",
            "liger_fused_linear_cross_entropy",
            "plugins",
            "cut_cross_entropy",
            "attn_implementation",
        ),
        _KERNELS,
    ),
    "s2_attention": missing("attention is exact"),
    "loss_watchdog_threshold": needless("here it is train.on_bad_step and train.spike_factor"),
    "loss_watchdog_patience": needless("here it is train.on_bad_step"),
    **dict.fromkeys(
        (
            "gc_steps",
            "gpu_memory_limit",
            "strict",
            "device",
            "device_map",
            "world_size",
            "ddp",
            "low_cpu_mem_usage",
            "fsdp_version",
        ),
        needless("resources and topology say where ranks run"),
    ),
    **dict.fromkeys(
        ("auto_resume_from_checkpoints", "hf_use_auth_token", "profiler_steps"), needless("a run needs no such switch")
    ),
    "push_dataset_to_hub": missing("nothing is uploaded"),
}

WORDS: dict[str, Word] = {**HF_TRAINER, **_MODEL, **_DATA, **_TRAINING}

ABSENT = (
    Absent(("adam_beta2",), {"train.optimizer.beta2": 0.999}, "0.999"),
    Absent(("seed",), {"train.seed": 42}, "42"),
    Absent(("excess_length_strategy",), {"data.length_policy": "drop"}, "drop"),
    Absent(("warmup_steps", "warmup_ratio"), {"train.optimizer.warmup_ratio": 0.03}, "3 % of the steps, at most 100"),
)
"""Where its defaults differ from ours."""

DEFAULTS: dict[str, object] = {
    "micro_batch_size": 1,
    "num_epochs": 1,
    "sequence_len": 512,
    "lr_scheduler": "cosine",
    "train_on_inputs": False,
    "val_set_size": 0,
}
"""Keys that count as written where they are absent: other keys are read with them."""
