"""The table of rules: what each key of a NeMo config means here.

A value that would change the training and has no counterpart is refused, and so is a key without a rule: a setting that
is silently ignored trains something else than the file says.
"""

from __future__ import annotations

from launcher.contract.nemo import model_rules as model
from launcher.contract.nemo import optimizer_rules as optim
from launcher.contract.nemo import trainer_rules as trainer
from launcher.contract.nemo.rule import Rule, drop, files_to, only, same_as, to

_ends = only(
    None, True, why="texts and completions always end with the end token; data.format tokens takes ids as they are"
)
_bos = drop("the tokenizer decides: whatever it puts before a text (a BOS token, or nothing) is there")
_tokenizer = drop("the tokenizer is that of model.path, or model.tokenizer")
_computed_otherwise = drop("concerns how the same numbers are computed, which is decided here")
_initial_weights = drop("weights come from model.path")

_TRAINER: dict[str, Rule] = {
    "name": trainer.name,
    "restore_from_path": to("model.path"),
    "trainer.devices": trainer.devices,
    "trainer.num_nodes": to("resources.nodes"),
    "trainer.accelerator": drop("trainer.devices counts GPUs or CPU ranks by it"),
    "trainer.precision": trainer.precision,
    "trainer.max_steps": trainer.max_steps,
    "trainer.max_epochs": trainer.max_epochs,
    "trainer.log_every_n_steps": to("logging.every"),
    "trainer.val_check_interval": trainer.val_check_interval,
    "trainer.limit_val_batches": drop("evaluation reads every held-out example, or is off where none are named"),
    "trainer.gradient_clip_val": optim.clip_grad,
    "trainer.accumulate_grad_batches": only(None, 1, why="it follows from global_batch_size"),
    "exp_manager.explicit_log_dir": trainer.log_directory,
    "exp_manager.exp_dir": to("run_root"),
    "exp_manager.name": trainer.experiment_name,
    "exp_manager.create_wandb_logger": trainer.wandb,
    "exp_manager.create_tensorboard_logger": to("logging.tensorboard"),
    "exp_manager.checkpoint_callback_params.save_top_k": trainer.save_top_k,
    "exp_manager.checkpoint_callback_params.every_n_train_steps": to("checkpoint.every"),
    "exp_manager.checkpoint_callback_params.model_parallel_size": trainer.model_parallel_size,
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": drop(
        "a Hugging Face model is exported at the end (checkpoint.export)"
    ),
}

_MODEL: dict[str, Rule] = {
    "model.restore_from_path": to("model.path"),
    "model.resume_from_checkpoint": only(None, why="use checkpoint.resume_from"),
    "model.seed": to("train.seed"),
    "model.micro_batch_size": to("train.micro_batch_size"),
    "model.global_batch_size": to("train.global_batch_size"),
    "model.rampup_batch_size": only(None, why="the global batch is the same in every step"),
    "model.tensor_model_parallel_size": to("topology.tensor_parallel"),
    "model.pipeline_model_parallel_size": to("topology.pipeline_parallel"),
    "model.virtual_pipeline_model_parallel_size": to("topology.virtual_pipeline"),
    "model.context_parallel_size": to("topology.context_parallel"),
    "model.expert_model_parallel_size": only(None, 1, why="there are no experts"),
    "model.sequence_parallel": model.sequence_parallel,
    "model.encoder_seq_length": model.sequence_length,
    "model.hidden_dropout": to("model.hidden_dropout"),
    "model.attention_dropout": to("model.attention_dropout"),
    "model.ffn_dropout": only(None, 0, 0.0, why="there is no dropout inside the MLP"),
    "model.activations_checkpoint_granularity": model.recompute,
    "model.activations_checkpoint_num_layers": model.recomputed_layers,
    "model.answer_only_loss": model.answer_only,
    "model.fsdp": only(None, False, why="the distributed optimizer shards states"),
    "model.do_layer_norm_weight_decay": only(None, False, why="norms and biases have no weight decay"),
    "model.fp32_residual_connection": only(None, False, why="residuals have the model's precision"),
    "model.tokenizer.library": _tokenizer,
    "model.tokenizer.type": _tokenizer,
    "model.peft.peft_scheme": model.peft,
}

_DATA: dict[str, Rule] = {
    "model.data.seq_length": same_as("model.encoder_seq_length"),
    "model.data.reset_position_ids": only(None, False, why="positions start at 0 in each example anyway"),
    "model.data.reset_attention_mask": only(None, False, why="examples never attend to each other anyway"),
    "model.data.add_bos": _bos,
    "model.data.add_eos": _ends,
    "model.data.train_ds.add_bos": _bos,
    "model.data.train_ds.add_eos": _ends,
    "model.data.train_ds.file_names": files_to("data.train"),
    "model.data.train_ds.global_batch_size": same_as("model.global_batch_size"),
    "model.data.train_ds.micro_batch_size": same_as("model.micro_batch_size"),
    "model.data.train_ds.max_seq_length": to("data.seq_length"),
    "model.data.train_ds.shuffle": to("data.shuffle"),
    "model.data.train_ds.prompt_template": model.prompt_template,
    "model.data.train_ds.concat_sampling_probabilities": model.probabilities,
    "model.data.train_ds.truncation_method": model.truncation,
    "model.data.train_ds.add_sep": only(None, False, why="write a separator into the data or a chat template"),
    "model.data.validation_ds.file_names": files_to("data.validation"),
}

_OPTIM: dict[str, Rule] = {
    "model.optim.name": optim.optimizer,
    "model.optim.lr": to("train.optimizer.lr"),
    "model.optim.weight_decay": to("train.optimizer.weight_decay"),
    "model.optim.eps": to("train.optimizer.eps"),
    "model.optim.betas": optim.betas,
    "model.optim.sched.name": optim.schedule,
}

_WITHOUT_EFFECT: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "model.hysteresis",
            "model.megatron_amp_O2",
            "model.grad_allreduce_chunk_size_mb",
            "model.grad_div_ar_fusion",
            "model.gradient_accumulation_fusion",
            "model.gradient_as_bucket_view",
            "model.persist_layer_norm",
            "model.bias_activation_fusion",
            "model.bias_dropout_add_fusion",
            "model.masked_softmax_fusion",
            "model.apply_query_key_layer_scaling",
            "model.sync_batch_comm",
            "model.fp16_lm_cross_entropy",
            "model.use_cpu_initialization",
            "model.onnx_safe",
            "model.apex_transformer_log_level",
            "model.precision",
            "model.pre_process",
            "model.post_process",
            "model.mcore_gpt",
            "model.megatron_legacy",
            "model.num_micro_batches_with_partial_activation_checkpoints",
            "model.normalize_attention_scores",
            "model.transformer_engine",
            "model.use_flash_attention",
            "model.save_nemo_on_validation_end",
        ),
        _computed_otherwise,
    ),
    **dict.fromkeys(("model.vocab_file", "model.merges_file", "model.merge_file", "model.tokenizer_model"), _tokenizer),
    **dict.fromkeys(("model.init_method_std", "model.use_scaled_init_method"), _initial_weights),
}

_ANOTHER_TRAINING: dict[str, Rule] = {
    "trainer.limit_train_batches": trainer.limit_train_batches,
    "trainer.overfit_batches": only(None, 0, why="every example is trained; name a smaller file in data.train"),
    "trainer.fast_dev_run": only(None, False, why="set train.max_steps"),
    "trainer.gradient_clip_algorithm": only(None, "norm", why="gradients are clipped by their norm"),
    "exp_manager.ema.enable": only(None, False, why="weights are not averaged over steps"),
    "exp_manager.create_early_stopping_callback": only(None, False, why="here it is train.early_stopping"),
    "exp_manager.resume_from_checkpoint": only(None, why="here it is checkpoint.resume_from"),
    "model.peft.restore_from_path": only(None, why="adapters start anew; merge the first into the model"),
    "model.peft.lora_tuning.weight_tying": only(None, False, why="each layer has adapters of its own"),
    "model.optim.amsgrad": only(None, False, why="the optimizer is AdamW"),
    "model.data.chat": only(None, False, why="conversations are data.format messages or sharegpt"),
    "model.data.train_ds.packed_sequence": only(None, False, why="here it is data.packing, of plain rows"),
    "model.data.train_ds.hf_dataset": only(None, False, why="name its files, or ORG/NAME of the hub, in data.train"),
    "model.data.train_ds.min_seq_length": only(None, 0, 1, why="no example is left out because it is short"),
    "model.data.train_ds.max_num_samples": only(None, why="every example is trained; set train.max_steps"),
}
"""Keys of sections whose other keys have no effect on what is trained."""

RULES: dict[str, Rule] = {**_TRAINER, **_MODEL, **_DATA, **_OPTIM, **_ANOTHER_TRAINING, **_WITHOUT_EFFECT}
"""NeMo's key -> its rule."""

SECTIONS: dict[str, Rule] = {
    "trainer.": drop("configures Lightning's trainer, which is set up here"),
    "exp_manager.wandb_logger_kwargs.": drop("read with create_wandb_logger; the run has its own name"),
    "exp_manager.resume": drop("`launcher resubmit` resumes from the newest complete checkpoint"),
    "exp_manager.": drop("the launcher keeps run directories: logs, checkpoints, events"),
    "model.tokenizer.": _tokenizer,
    "model.activations_checkpoint_": drop("read with the granularity and, for method `block`, the number of layers"),
    "model.peft.": drop("belongs to another peft_scheme, or is read with it"),
    "model.nsys_profile.": drop("profiling is not part of a run"),
    "model.optim.sched.": drop("read with model.optim.sched.name"),
    "model.optim.": _computed_otherwise,
    "model.fsdp_": drop("fsdp is off"),
    "model.native_amp_": drop("fp16 loss scaling, which bf16 does not need"),
    "model.data.train_ds.": drop("read with the other keys of train_ds, or concerns the data loader"),
    "model.data.validation_ds.": drop("held-out data are read as the training data are"),
    "model.data.test_ds.": drop("there is no test loop; name the file in data.validation_sets to evaluate it"),
    "model.data.": drop("concerns pretraining data; name your SFT data in data.train"),
}
"""Beginning of a key that has no rule of its own -> its rule. The longest match counts."""


def rule_of(key: str) -> Rule | None:
    """Return the rule of a key, or else of its section, if there is one."""
    if key in RULES:
        return RULES[key]
    sections = [section for section in SECTIONS if key.startswith(section)]
    return SECTIONS[max(sections, key=len)] if sections else None
