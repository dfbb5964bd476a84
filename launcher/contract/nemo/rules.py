"""What becomes of each key of a NeMo config: one rule a key, as data.

A rule answers with a `Fate`: our keys and their values, or why the key has no effect here. What would change the
training and has no counterpart is refused, and so is a key that nobody wrote a rule for: a setting that is passed over
in silence trains something else than the file says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from launcher.contract.nemo.document import Entry

Entries = Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one key."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Our keys and their values."""
    note: str = ""
    """Why it has no effect here, or what is different."""


class Refused(ValueError):
    """This value cannot be taken over; the text says why and what to do."""


Rule = Callable[[Any, Entries], Fate]


def value_of(entries: Entries, key: str, default: Any = None) -> Any:
    """The value of a key that may be absent or null."""
    entry = entries.get(key)
    return default if entry is None or entry.value is None else entry.value


def to(key: str) -> Rule:
    """The same value under our key; null leaves our default."""
    return lambda value, entries: Fate({} if value is None else {key: value})


def drop(why: str) -> Rule:
    """No effect, whatever the value."""
    return lambda value, entries: Fate(note=why)


def only(*allowed: Any, why: str) -> Rule:
    """These values change nothing here; others are refused because of `why`."""

    def rule(value: Any, entries: Entries) -> Fate:
        if value not in allowed:
            raise Refused(f"{value!r} is not supported: {why}")
        return Fate(note="has no effect at this value")

    return rule


def _devices(value: Any, entries: Entries) -> Fate:
    accelerator = value_of(entries, "trainer.accelerator", "gpu")
    if not isinstance(value, int) or value < 1:
        raise Refused(f"{value!r} is not a number of devices; say how many each node has")
    if accelerator not in ("gpu", "cuda", "cpu"):
        raise Refused(f"trainer.accelerator {accelerator!r} is not gpu or cpu")
    return Fate({"resources.tasks_per_node" if accelerator == "cpu" else "resources.gpus_per_node": value})


def _precision(value: Any, entries: Entries) -> Fate:
    text = str(value)
    if text.startswith("bf16"):
        return Fate({"train.precision": "bf16"}, "with fp32 master weights and fp32 gradient sums")
    if text in ("32", "32-true", "fp32"):
        return Fate({"train.precision": "fp32"})
    raise Refused(f"{value!r} is not supported; use bf16 or 32")


def _max_steps(value: Any, entries: Entries) -> Fate:
    return Fate({"train.max_steps": value}) if isinstance(value, int) and value > 0 else Fate(note="no bound")


def _max_epochs(value: Any, entries: Entries) -> Fate:
    if not isinstance(value, int) or value < 1:
        return Fate(note="no bound")
    if (value_of(entries, "trainer.max_steps") or 0) > 0:
        return Fate(note="trainer.max_steps decides; there is one bound here, not the earlier of two")
    return Fate({"train.epochs": value})


def _val_check_interval(value: Any, entries: Entries) -> Fate:
    if value_of(entries, "trainer.limit_val_batches", 1) == 0:
        return Fate(note="evaluation is off (trainer.limit_val_batches)")
    if not value_of(entries, "model.data.validation_ds.file_names"):
        return Fate(note="no held-out data is named; give data.validation and train.eval_every")
    if not isinstance(value, int):
        raise Refused(f"{value} is a part of an epoch; give steps")
    return Fate({"train.eval_every": value})


def _log_directory(value: Any, entries: Entries) -> Fate:
    if value is None:
        return Fate(note="not set")
    path = PurePath(value)
    return Fate({"run_root": str(path.parent), "name": path.name}, "run directories are run_root/name")


def _experiment_name(value: Any, entries: Entries) -> Fate:
    if value_of(entries, "exp_manager.explicit_log_dir"):
        return Fate(note="exp_manager.explicit_log_dir names the run")
    return Fate({"name": value} if value else {})


def _name(value: Any, entries: Entries) -> Fate:
    if value_of(entries, "exp_manager.name") or value_of(entries, "exp_manager.explicit_log_dir"):
        return Fate(note="exp_manager names the run")
    return Fate({"name": value} if value else {})


def _best(value: Any, entries: Entries) -> Fate:
    monitor = value_of(entries, "exp_manager.checkpoint_callback_params.monitor")
    if monitor not in ("val_loss", "validation_loss"):
        return Fate(note=f"{monitor} is not compared; the newest checkpoints are kept (checkpoint.keep_last)")
    if not value_of(entries, "model.data.validation_ds.file_names"):
        return Fate(note="no held-out data is named, so that no checkpoint is the best")
    return Fate({"checkpoint.keep_best": max(int(value), 0)})


def _model_parallel_size(value: Any, entries: Entries) -> Fate:
    tensor = value_of(entries, "model.tensor_model_parallel_size", 1)
    pipeline = value_of(entries, "model.pipeline_model_parallel_size", 1)
    if value not in (None, tensor, tensor * pipeline):
        raise Refused(f"{value} is not tensor {tensor} x pipeline {pipeline} = {tensor * pipeline}")
    return Fate(note="derived from the topology")


def _sequence_parallel(value: Any, entries: Entries) -> Fate:
    if value and value_of(entries, "model.tensor_model_parallel_size", 1) == 1:
        return Fate(note="nothing to spread at tensor parallel 1")
    return Fate({"topology.sequence_parallel": bool(value)})


def _recompute(value: Any, entries: Entries) -> Fate:
    if value not in (None, "selective", "full"):
        raise Refused(f"{value!r} is not selective, full or null")
    return Fate({"train.recompute": value or "none"})


def _sequence_length(value: Any, entries: Entries) -> Fate:
    if value_of(entries, "model.data.train_ds.max_seq_length"):
        return Fate(note="model.data.train_ds.max_seq_length decides")
    return Fate({} if value is None else {"data.seq_length": value})


def _same_as(other: str) -> Rule:
    def rule(value: Any, entries: Entries) -> Fate:
        if value not in (None, value_of(entries, other, value)):
            raise Refused(f"{value} is not {other} {value_of(entries, other)}; there is one such setting here")
        return Fate(note=f"the same as {other}")

    return rule


def _optimizer(value: Any, entries: Entries) -> Fate:
    if value in ("distributed_fused_adam", "mcore_distributed_optim"):
        return Fate({"train.optimizer.distributed": True})
    if value in ("fused_adam", "adamw", "megatron_fused_adam"):
        return Fate({"train.optimizer.distributed": False})
    if value == "adam" and not value_of(entries, "model.optim.weight_decay", 0):
        return Fate({"train.optimizer.distributed": False}, "AdamW without weight decay is Adam")
    raise Refused(f"{value!r} is not supported; AdamW is (fused_adam, distributed_fused_adam)")


def _betas(value: Any, entries: Entries) -> Fate:
    if value is None:
        return Fate(note="not set")
    first, second = value
    return Fate({"train.optimizer.beta1": first, "train.optimizer.beta2": second})


def _schedule(value: Any, entries: Entries) -> Fate:
    """CosineAnnealing: warm-up from lr / (warmup + 1), or from 0 with constant_steps; a cosine to min_lr; then those.

    Formulas: NeMo 2.7.3, nemo/core/optim/lr_scheduler.py, WarmupAnnealHoldPolicy and CosineAnnealing.
    """
    if value != "CosineAnnealing":
        raise Refused(f"{value!r} is not supported; CosineAnnealing is, and no sched for a constant learning rate")
    section = "model.optim.sched."
    rate = float(value_of(entries, "model.optim.lr", 0.0))
    floor = float(value_of(entries, f"{section}min_lr", 0.0))
    warmup = int(value_of(entries, f"{section}warmup_steps", 0))
    hold = int(value_of(entries, f"{section}constant_steps", 0))
    steps = value_of(entries, f"{section}max_steps") or value_of(entries, "trainer.max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise Refused("needs trainer.max_steps or a max_steps of its own")
    for name in ("warmup_ratio", "constant_ratio"):
        if value_of(entries, f"{section}{name}") is not None:
            raise Refused(f"{name} is not supported; give {name.replace('ratio', 'steps')}")
    if floor > rate:
        raise Refused(f"min_lr {floor} is above lr {rate}")
    end = steps - hold
    settings: dict[str, Any] = {"train.optimizer.warmup_steps": warmup, "train.optimizer.min_lr": floor}
    if warmup and not hold:
        settings["train.optimizer.initial_lr"] = rate / (warmup + 1)
    if end > warmup:
        return Fate(settings | {"train.optimizer.schedule": "cosine", "train.optimizer.decay_steps": end})
    if warmup == 0:
        only_floor = {"train.optimizer.lr": floor, "train.optimizer.schedule": "constant"}
        return Fate(
            settings | only_floor, f"constant_steps {hold} leave no step of {steps} to decay: all run at min_lr"
        )
    note = f"constant_steps {hold} leave no step of {steps} to decay: min_lr follows the warm-up at once"
    return Fate(settings | {"train.optimizer.schedule": "linear", "train.optimizer.decay_steps": warmup + 1}, note)


def _peft(value: Any, entries: Entries) -> Fate:
    if value in (None, "none"):
        return Fate(note="all weights are trained")
    if value != "lora":
        raise Refused(f"{value!r} is not supported; lora is, and none")
    section = "model.peft.lora_tuning."
    rank = int(value_of(entries, f"{section}adapter_dim", 32))
    wanted = value_of(entries, f"{section}target_modules", ["attention_qkv"])
    unknown = [name for name in wanted if name not in _LORA_TARGETS]
    if unknown:
        raise Refused(f"target_modules {unknown}: not one of {', '.join(_LORA_TARGETS)}")
    if value_of(entries, f"{section}layer_selection") is not None:
        raise Refused("layer_selection is not supported: adapters are in all layers")
    settings = {
        "model.lora.rank": rank,
        "model.lora.alpha": float(value_of(entries, f"{section}alpha", rank)),
        "model.lora.dropout": float(value_of(entries, f"{section}adapter_dropout", 0.0)),
        "model.lora.targets": [target for name in wanted for target in _LORA_TARGETS[name]],
    }
    return Fate(settings, "q, k and v have an adapter each here, NeMo's share the first matrix")


_LORA_TARGETS = {
    "attention_qkv": ["q_proj", "k_proj", "v_proj"],
    "attention_dense": ["o_proj"],
    "mlp_fc1": ["gate_proj", "up_proj"],
    "mlp_fc2": ["down_proj"],
}


def _wandb(value: Any, entries: Entries) -> Fate:
    if not value:
        return Fate(note="off")
    project = value_of(entries, "exp_manager.wandb_logger_kwargs.project") or value_of(entries, "exp_manager.name")
    if not project:
        raise Refused("needs exp_manager.wandb_logger_kwargs.project")
    return Fate({"logging.wandb": str(project)}, "kept offline unless WANDB_MODE=online")


def _files(key: str) -> Rule:
    def rule(value: Any, entries: Entries) -> Fate:
        return Fate({key: list(value) if isinstance(value, list) else [value]} if value else {})

    return rule


def _columns(value: Any, entries: Entries) -> Fate:
    """The prompt template's two fields; text around them is not data and would be lost."""
    label = value_of(entries, "model.data.train_ds.label_key", "output")
    context = value_of(entries, "model.data.train_ds.context_key", "input")
    if value is not None and value.replace(" ", "") != f"{{{context}}}{{{label}}}":
        raise Refused(
            f"{value!r} has text of its own; write it as a chat template and name it by data.chat_template, "
            f"with data.columns={{prompt: ..., completion: {label}}}"
        )
    columns = {"prompt": context, "completion": label}
    settings = {"data.format": "prompt_completion", "data.columns": columns, "data.chat_template": "none"}
    return Fate(settings, "prompt and completion are joined as they are; a blank between them belongs in the data")


def _answer_only(value: Any, entries: Entries) -> Fate:
    return Fate({"data.loss_on": "assistant" if value else "all"})


_DERIVED = "derived from the rest"
_SPEED = "how it is computed is decided here"
_BOS = "the tokenizer decides: what it puts in front of a text (its BOS, or nothing) is put there"
_ends = only(
    None, True, why="texts and completions are closed with the end token; data.format tokens takes ids as they are"
)
_AMP = "fp16 loss scaling, which bf16 does without"
_PRETRAINING = "of pretraining data; name your SFT data by data.train"

RULES: dict[str, Rule] = {
    "name": _name,
    "restore_from_path": to("model.path"),
    "trainer.devices": _devices,
    "trainer.num_nodes": to("resources.nodes"),
    "trainer.accelerator": drop("trainer.devices goes to GPUs or CPU ranks by it"),
    "trainer.precision": _precision,
    "trainer.max_steps": _max_steps,
    "trainer.max_epochs": _max_epochs,
    "trainer.log_every_n_steps": to("logging.every"),
    "trainer.val_check_interval": _val_check_interval,
    "trainer.limit_val_batches": drop("evaluation sees every held-out example, or is off where none are named"),
    "trainer.gradient_clip_val": lambda value, entries: Fate({"train.optimizer.clip_grad": value or 0.0}),
    "trainer.accumulate_grad_batches": only(None, 1, why="it follows from global_batch_size"),
    "exp_manager.explicit_log_dir": _log_directory,
    "exp_manager.exp_dir": to("run_root"),
    "exp_manager.name": _experiment_name,
    "exp_manager.create_wandb_logger": _wandb,
    "exp_manager.create_tensorboard_logger": to("logging.tensorboard"),
    "exp_manager.checkpoint_callback_params.save_top_k": _best,
    "exp_manager.checkpoint_callback_params.every_n_train_steps": to("checkpoint.every"),
    "exp_manager.checkpoint_callback_params.model_parallel_size": _model_parallel_size,
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": drop(
        "a Hugging Face model is exported at the end (checkpoint.export)"
    ),
    "model.restore_from_path": to("model.path"),
    "model.seed": to("train.seed"),
    "model.micro_batch_size": to("train.micro_batch_size"),
    "model.global_batch_size": to("train.global_batch_size"),
    "model.rampup_batch_size": only(None, why="the global batch is the same in every step"),
    "model.tensor_model_parallel_size": to("topology.tensor_parallel"),
    "model.pipeline_model_parallel_size": to("topology.pipeline_parallel"),
    "model.virtual_pipeline_model_parallel_size": to("topology.virtual_pipeline"),
    "model.context_parallel_size": to("topology.context_parallel"),
    "model.expert_model_parallel_size": only(None, 1, why="there are no experts"),
    "model.sequence_parallel": _sequence_parallel,
    "model.encoder_seq_length": _sequence_length,
    "model.hidden_dropout": to("model.hidden_dropout"),
    "model.attention_dropout": to("model.attention_dropout"),
    "model.ffn_dropout": only(None, 0, 0.0, why="there is no dropout inside the MLP"),
    "model.activations_checkpoint_granularity": _recompute,
    "model.answer_only_loss": _answer_only,
    "model.fsdp": only(None, False, why="states are spread by the distributed optimizer"),
    "model.do_layer_norm_weight_decay": only(None, False, why="norms and biases have no weight decay"),
    "model.fp32_residual_connection": only(None, False, why="residuals have the type of the model"),
    "model.tokenizer.library": drop("the tokenizer is that of model.path, or model.tokenizer"),
    "model.tokenizer.type": drop("the tokenizer is that of model.path, or model.tokenizer"),
    "model.peft.peft_scheme": _peft,
    "model.data.seq_length": _same_as("model.encoder_seq_length"),
    "model.data.reset_position_ids": only(None, False, why="positions begin anew with each example anyway"),
    "model.data.reset_attention_mask": only(None, False, why="examples never see each other anyway"),
    "model.data.add_bos": drop(_BOS),
    "model.data.add_eos": _ends,
    "model.data.train_ds.add_bos": drop(_BOS),
    "model.data.train_ds.add_eos": _ends,
    "model.data.train_ds.file_names": _files("data.train"),
    "model.data.train_ds.global_batch_size": _same_as("model.global_batch_size"),
    "model.data.train_ds.micro_batch_size": _same_as("model.micro_batch_size"),
    "model.data.train_ds.max_seq_length": to("data.seq_length"),
    "model.data.train_ds.shuffle": to("data.shuffle"),
    "model.data.train_ds.prompt_template": _columns,
    "model.data.train_ds.concat_sampling_probabilities": only(
        None, why="give several data.sources with weights instead"
    ),
    "model.data.train_ds.truncation_method": lambda value, entries: Fate({"data.length_policy": f"truncate_{value}"}),
    "model.data.train_ds.add_sep": only(None, False, why="write a separator into the data or a chat template"),
    "model.data.validation_ds.file_names": _files("data.validation"),
    "model.optim.name": _optimizer,
    "model.optim.lr": to("train.optimizer.lr"),
    "model.optim.weight_decay": to("train.optimizer.weight_decay"),
    "model.optim.eps": to("train.optimizer.eps"),
    "model.optim.betas": _betas,
    "model.optim.sched.name": _schedule,
}
"""NeMo's key -> what becomes of it."""

SECTIONS: dict[str, Rule] = {
    "trainer.": drop("of Lightning's trainer, which is set up here"),
    "exp_manager.wandb_logger_kwargs.": drop("read with create_wandb_logger; the run has its own name"),
    "exp_manager.resume": drop("`launcher resubmit` goes on from the newest complete checkpoint"),
    "exp_manager.": drop("run directories are kept by the launcher: logs, checkpoints, events"),
    "model.tokenizer.": drop("the tokenizer is that of model.path, or model.tokenizer"),
    "model.activations_checkpoint_": drop("`full` recomputes every layer, `selective` the attention"),
    "model.peft.": drop("of another peft_scheme, or read with it"),
    "model.nsys_profile.": drop("profiling is not part of a run"),
    "model.optim.sched.": drop("read with model.optim.sched.name"),
    "model.optim.": drop(_SPEED),
    "model.fsdp_": drop("fsdp is off"),
    "model.native_amp_": drop(_AMP),
    "model.data.train_ds.": drop("read with the other keys of train_ds, or of the data loader"),
    "model.data.validation_ds.": drop("held-out data are read as the training data are"),
    "model.data.test_ds.": drop("there is no test loop; name it under data.validation_sets to evaluate it"),
    "model.data.": drop(_PRETRAINING),
}
"""Begin of a key without a rule of its own -> what becomes of it; the longest match wins."""

for _key in (
    "hysteresis",
    "megatron_amp_O2",
    "grad_allreduce_chunk_size_mb",
    "grad_div_ar_fusion",
    "gradient_accumulation_fusion",
    "gradient_as_bucket_view",
    "persist_layer_norm",
    "bias_activation_fusion",
    "bias_dropout_add_fusion",
    "masked_softmax_fusion",
    "apply_query_key_layer_scaling",
    "sync_batch_comm",
    "fp16_lm_cross_entropy",
    "use_cpu_initialization",
    "onnx_safe",
    "apex_transformer_log_level",
    "precision",
    "pre_process",
    "post_process",
    "mcore_gpt",
    "megatron_legacy",
    "num_micro_batches_with_partial_activation_checkpoints",
    "normalize_attention_scores",
    "transformer_engine",
    "use_flash_attention",
    "save_nemo_on_validation_end",
):
    RULES[f"model.{_key}"] = drop(_SPEED)
RULES["model.resume_from_checkpoint"] = only(None, why="use checkpoint.resume_from")
for _key in ("vocab_file", "merges_file", "merge_file", "tokenizer_model"):
    RULES[f"model.{_key}"] = drop("the tokenizer is that of model.path, or model.tokenizer")
for _key in ("init_method_std", "use_scaled_init_method"):
    RULES[f"model.{_key}"] = drop("weights come from model.path")


def rule_of(key: str) -> Rule | None:
    """The rule of a key, of its own or of its section."""
    if key in RULES:
        return RULES[key]
    sections = [section for section in SECTIONS if key.startswith(section)]
    return SECTIONS[max(sections, key=len)] if sections else None
