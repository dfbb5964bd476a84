"""transformers' TrainingArguments, which TRL and LLaMA-Factory extend."""

from __future__ import annotations

from launcher.contract.trainers import rules
from launcher.contract.trainers.word import Word, at, becomes, missing, needless, number_at

_LOADER = "the data loader needs no settings; data.workers sets the processes that tokenize"
_DDP = "gradients are reduced by Megatron-core; the layout is in topology"
_FSDP = "optimizer states are sharded (train.optimizer.distributed), and topology spreads the model"
_HUB = "nothing is uploaded; export/ holds the model when training is done"
_LOGS = "RUN/logs and metrics.jsonl have everything"
_KERNELS = "kernels are chosen by train.kernels and train.attention"
_MEASURES = "speed and memory are measured in any case"

_BATCH = "train.micro_batch_size, and train.global_batch_size = it x gradient accumulation x data parallel ranks"

_LENGTH: dict[str, Word] = {
    "num_train_epochs": becomes("train.epochs", rules.epochs),
    "max_steps": becomes("train.max_steps", rules.max_steps),
    "gradient_accumulation_steps": needless(
        "it follows from train.global_batch_size: that / (train.micro_batch_size x data parallel ranks)"
    ),
    "per_device_eval_batch_size": needless("evaluation uses train.micro_batch_size; its loss does not depend on it"),
    "per_gpu_train_batch_size": missing(f"here it is {_BATCH}"),
    "eval_accumulation_steps": needless("evaluation keeps no logits"),
    "auto_find_batch_size": missing("set train.micro_batch_size; `launcher plan` finds what fits"),
    "dataloader_drop_last": missing("the last batch of an epoch is short, and no example is left out"),
    "average_tokens_across_devices": missing("the loss is the mean over all tokens of the global batch", True),
    "train_sampling_strategy": missing("data.shuffle and data.group_by_length choose the order", "random"),
    "group_by_length": at("data.group_by_length"),
    "length_column_name": needless("lengths are counted when data are tokenized"),
    "seed": at("train.seed"),
    "data_seed": missing("one seed for data, weights and dropout: train.seed"),
    "full_determinism": at("train.deterministic"),
}

_OPTIMIZER: dict[str, Word] = {
    "learning_rate": number_at("train.optimizer.lr"),
    "weight_decay": number_at("train.optimizer.weight_decay"),
    "adam_beta1": becomes("train.optimizer.beta1", rules.betas(1)),
    "adam_beta2": becomes("train.optimizer.beta2", rules.betas(2)),
    "adam_epsilon": number_at("train.optimizer.eps"),
    "max_grad_norm": becomes("train.optimizer.clip_grad", rules.max_grad_norm),
    "lr_scheduler_type": becomes("train.optimizer.schedule", rules.schedule),
    "lr_scheduler_kwargs": needless("here they are min_lr, wsd_steps, power and cycles of train.optimizer"),
    "warmup_steps": becomes("train.optimizer.warmup_steps", rules.warmup_steps),
    "warmup_ratio": becomes("train.optimizer.warmup_ratio", rules.warmup_ratio),
    "optim": becomes("train.optimizer, which is AdamW", rules.optimizer),
    "optim_args": missing("AdamW's settings are keys of train.optimizer"),
    "optim_target_modules": missing("all weights have one optimizer; train.optimizer.lr_by_name sets rates by name"),
    "label_smoothing_factor": number_at("train.label_smoothing"),
    "neftune_noise_alpha": number_at("train.neftune_alpha"),
}

_EVALUATION: dict[str, Word] = {
    "eval_steps": becomes("train.eval_every", rules.steps_between("train.eval_every", "eval_strategy", "evaluations")),
    "eval_strategy": becomes("train.eval_every", rules.strategy("train.eval_every", "eval_steps")),
    "evaluation_strategy": becomes("train.eval_every", rules.strategy("train.eval_every", "eval_steps")),
    "eval_on_start": needless("held-out data are always evaluated before the first step"),
    "eval_delay": missing("evaluations begin before the first step"),
    "do_train": missing("`launcher submit` trains", True),
    "do_eval": needless("data.validation is evaluated where it is named"),
    "do_predict": missing("evaluation.prompts are answered during training"),
    "prediction_loss_only": needless("held-out loss is computed; evaluation.metric judges answers"),
    "metric_for_best_model": needless("here it is checkpoint.best_metric"),
    "greater_is_better": missing("here it is checkpoint.best_mode"),
    "load_best_model_at_end": becomes("checkpoint.keep_best and checkpoint.export_step", rules.best_model),
    "eval_do_concat_batches": needless("evaluation keeps no logits"),
    "batch_eval_metrics": needless("evaluation.metric judges answers"),
    "eval_use_gather_object": needless("evaluation keeps no logits"),
    "include_for_metrics": needless("evaluation.metric gets prompts and answers"),
    "label_names": needless("labels follow from data.loss_on"),
}

_RECORDS: dict[str, Word] = {
    "output_dir": becomes("run_root and name", rules.output_directory),
    "overwrite_output_dir": needless("a run never overwrites another; give it another name"),
    "run_name": needless("here it is name, the last part of output_dir"),
    "logging_steps": number_at("logging.every"),
    "report_to": becomes("logging.wandb, logging.tensorboard and logging.mlflow", rules.reporters),
    "project": needless("here it is logging.wandb"),
    "save_steps": becomes("checkpoint.every", rules.steps_between("checkpoint.every", "save_strategy", "checkpoints")),
    "save_strategy": becomes("checkpoint.every", rules.strategy("checkpoint.every", "save_steps")),
    "save_total_limit": at("checkpoint.keep_last"),
    "resume_from_checkpoint": missing("a run resumes by itself; checkpoint.resume_from takes another run's checkpoint"),
    "ignore_data_skip": missing("a resumed run goes on with the examples that follow"),
    "save_only_model": missing("a checkpoint has all that a resumed run needs; export/ has the model alone"),
    "enable_jit_checkpoint": needless("a run that is asked to stop saves first (resources.signal_seconds)"),
    **dict.fromkeys(
        (
            "logging_dir",
            "logging_first_step",
            "logging_strategy",
            "logging_nan_inf_filter",
            "log_level",
            "log_level_replica",
            "log_on_each_node",
            "disable_tqdm",
            "save_on_each_node",
            "save_safetensors",
            "restore_callback_states_from_checkpoint",
            "debug",
            "plot_loss",
        ),
        needless(_LOGS),
    ),
    **dict.fromkeys(
        ("include_num_input_tokens_seen", "include_tokens_per_second", "skip_memory_metrics"), needless(_MEASURES)
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
            "hub_token",
            "trackio_bucket_id",
            "trackio_space_id",
            "trackio_static_space_id",
        ),
        missing(_HUB, "every_save"),
    ),
}

_MACHINE: dict[str, Word] = {
    "bf16": becomes("train.precision", rules.flag({"train.precision": "bf16"}, {"train.precision": "fp32"})),
    "fp16": missing("fp16 does not exist here; train.precision is bf16, fp32 or fp8"),
    "tf32": needless("bf16 products need no TF32, and fp32 is exact"),
    "bf16_full_eval": needless("evaluation has the precision of training"),
    "fp16_full_eval": missing("evaluation has the precision of training"),
    "gradient_checkpointing": becomes(
        "train.recompute: full", rules.flag({"train.recompute": "full"}, {"train.recompute": "none"})
    ),
    "gradient_checkpointing_kwargs": needless("train.recompute says what is computed again"),
    "activation_checkpointing": becomes(
        "train.recompute: full", rules.flag({"train.recompute": "full"}, {"train.recompute": "none"})
    ),
    "activation_checkpointing_kwargs": needless("train.recompute says what is computed again"),
    "use_cpu": becomes("resources.gpus_per_node: 0", rules.flag({"resources.gpus_per_node": 0})),
    "use_cache": needless("training keeps no cache of keys and values"),
    "parallelism_config": missing("the layout is in topology"),
    "torch_empty_cache_steps": needless("memory is not freed between steps"),
    "remove_unused_columns": needless("only the columns of data.columns are read"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), needless(_FSDP)),
    **dict.fromkeys(
        (
            "ddp_backend",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_find_unused_parameters",
            "ddp_static_graph",
            "ddp_timeout",
            "local_rank",
            "accelerator_config",
        ),
        needless(_DDP),
    ),
    **dict.fromkeys(
        (
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        needless(_LOADER),
    ),
    **dict.fromkeys(
        (
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "use_liger_kernel",
            "liger_kernel_config",
            "jit_mode_eval",
        ),
        needless(_KERNELS),
    ),
}

WORDS: dict[str, Word] = {**_LENGTH, **_OPTIMIZER, **_EVALUATION, **_RECORDS, **_MACHINE}
"""Key of TrainingArguments -> what it means here; the batch is in each trainer's own words."""


def batch_word(packed: tuple[str, ...], lengths: tuple[str, ...], default: int) -> Word:
    """Return the word for the examples in one forward pass of one GPU (see `rules.batch`)."""
    return becomes(_BATCH, rules.batch(packed, lengths, default))
