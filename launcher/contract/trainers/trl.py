"""TRL's `trl sft --config`: SFTConfig, ModelConfig and ScriptArguments in one YAML file."""

from __future__ import annotations

from launcher.contract.hub_cache import is_id
from launcher.contract.nemo.entries import Entries, value_of
from launcher.contract.nemo.rule import Refused, Translation
from launcher.contract.trainers import rules
from launcher.contract.trainers.adapters import LoraWords
from launcher.contract.trainers.hf_trainer import WORDS as HF_TRAINER
from launcher.contract.trainers.hf_trainer import batch_word
from launcher.contract.trainers.word import Absent, Word, at, becomes, beside, missing, needless

_LORA = LoraWords(
    rank="lora_r",
    alpha="lora_alpha",
    targets="lora_target_modules",
    default_rank=16,
    alpha_over_rank=None,
    default_alpha=32.0,
    default_dropout=0.05,
    default_targets=("q_proj", "v_proj"),
)
_QUANTIZED = "the frozen weights stay in bf16, or their products are in fp8 (train.precision)"


def _peft(value: object, entries: Entries) -> Translation:
    return _LORA.settings(entries) if value else Translation(note="all weights are trained")


def _dataset(value: object, entries: Entries) -> Translation:
    """Translate the data set, with its other split where evaluations are made: TRL loads that in no other case."""
    found = rules.hub_or_files("data.train", "dataset_train_split")(value, entries)
    when = value_of(entries, "eval_strategy", value_of(entries, "evaluation_strategy", "no"))
    if when in ("no", False) or not is_id(str(value)):
        return found
    held_out = f"{value}:{value_of(entries, 'dataset_test_split', 'test')}"
    return Translation({**found.settings, "data.validation": [held_out]}, found.note)


def _loss_on(value: object, entries: Entries) -> Translation:
    if value:
        return Translation({"data.loss_on": "assistant"})
    if value_of(entries, "completion_only_loss"):
        return Translation(note="completion_only_loss counts")
    return Translation({"data.loss_on": "all"})


def _completion_only(value: object, entries: Entries) -> Translation:
    if value is None:
        return Translation(note="completions alone, where rows have them; set data.loss_on: assistant for such rows")
    return Translation({"data.loss_on": "assistant" if value else "all"})


def _truncation(value: object, entries: Entries) -> Translation:
    sides = {"keep_start": "truncate_right", "keep_end": "truncate_left"}
    if value not in sides:
        raise Refused(f"{value!r} is not keep_start or keep_end")
    return Translation({"data.length_policy": sides[str(value)]})


def _max_length(value: object, entries: Entries) -> Translation:
    if value is None:
        raise Refused("no limit does not exist here; give the length of the longest example")
    return Translation({"data.seq_length": value})


def _packing(value: object, entries: Entries) -> Translation:
    strategy = value_of(entries, "packing_strategy", "bfd")
    if value and strategy not in ("bfd", "bfd_split"):
        raise Refused(f"packing_strategy {strategy!r}: examples never see each other here; bfd is like that")
    return Translation({"data.packing": bool(value)})


def _loss_type(value: object, entries: Entries) -> Translation:
    if value in (None, "nll", "chunked_nll"):
        return Translation(note="the cross-entropy")
    raise Refused(f"{value!r} is not supported; nll is")


def _bf16(value: object, entries: Entries) -> Translation:
    if value is None and not value_of(entries, "fp16"):
        return Translation({"train.precision": "bf16"}, "null is true, unless fp16 is")
    return rules.flag({"train.precision": "bf16"}, {"train.precision": "fp32"})(value, entries)


_MODEL: dict[str, Word] = {
    "model_name_or_path": at("model.path"),
    "model_revision": at("model.revision"),
    "dtype": missing("weights are in train.precision, with fp32 master weights", "bfloat16", "float32", "auto"),
    "torch_dtype": missing("weights are in train.precision, with fp32 master weights", "bfloat16", "float32", "auto"),
    "attn_implementation": needless("attention is chosen by train.attention"),
    "model_init_kwargs": missing("the model is what its config.json says"),
    "trust_remote_code": missing("no code of a model is ever run"),
    "use_peft": becomes("model.lora.rank", _peft),
    "lora_r": beside("model.lora.rank", "use_peft"),
    "lora_alpha": beside("model.lora.alpha", "use_peft"),
    "lora_dropout": beside("model.lora.dropout", "use_peft"),
    "lora_target_modules": beside("model.lora.targets", "use_peft"),
    "lora_target_parameters": missing(
        "model.lora.targets names tensors of all experts, too: experts.gate_up_proj, experts.down_proj"
    ),
    "lora_modules_to_save": missing("only adapters are trained with model.lora.rank"),
    "lora_task_type": missing("models are causal language models", "CAUSAL_LM"),
    "use_rslora": at("model.lora.rslora"),
    "use_dora": at("model.lora.dora"),
    "load_in_4bit": missing(_QUANTIZED),
    "load_in_8bit": missing(_QUANTIZED),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"), needless("read with load_in_4bit")
    ),
    "router_aux_loss_coef": missing(
        "here it is train.router_aux_loss, of another form: about (experts per token / layers) of it is as strong"
    ),
}

_DATA: dict[str, Word] = {
    "dataset_name": becomes("data.train", _dataset),
    "dataset_config": at("data.hub.config"),
    "dataset_train_split": beside("data.hub.split", "dataset_name"),
    "dataset_test_split": beside("data.validation, e.g. ORG/NAME:test", "dataset_name, where there are evaluations"),
    "dataset_streaming": missing("data are tokenized once, into a cache on disk"),
    "streaming": missing("data are tokenized once, into a cache on disk"),
    "datasets": missing("name several sources in data.sources, each with files and a weight"),
    "test_split_size": missing("here it is data.validation: held-out files of their own"),
    "dataset_text_field": needless("here it is data.columns, e.g. {text: content}"),
    "dataset_num_proc": at("data.workers"),
    "dataset_kwargs": missing("nothing is passed on"),
    "shuffle_dataset": needless("data.shuffle shuffles in each epoch, as transformers' sampler does"),
    "max_length": becomes("data.seq_length", _max_length),
    "max_seq_length": becomes("data.seq_length", _max_length),
    "truncation_mode": becomes("data.length_policy", _truncation),
    "packing": becomes("data.packing", _packing),
    "packing_strategy": beside("data.packing", "packing"),
    "eval_packing": needless("held-out rows are packed as training's are; their loss does not depend on it"),
    "padding_free": needless("data.packing has no padding to speak of"),
    "pad_to_multiple_of": missing("here it is data.pad_to_multiple", "auto", 8),
    "completion_only_loss": becomes("data.loss_on: assistant", _completion_only),
    "assistant_only_loss": becomes("data.loss_on: assistant", _loss_on),
    "chat_template_path": at("data.chat_template"),
    "eos_token": missing("the end token is the tokenizer's, or the one that the chat template writes"),
    "pad_token": needless("padding is known by length, never by a token"),
    "ignore_bias_buffers": needless("it concerns DDP"),
    "loss_type": becomes("train.objective", _loss_type),
    "activation_offloading": becomes("train.recompute: offload", rules.flag({"train.recompute": "offload"})),
}

WORDS: dict[str, Word] = {
    **HF_TRAINER,
    "per_device_train_batch_size": batch_word(("packing",), ("max_length", "max_seq_length"), 1024),
    **_MODEL,
    **_DATA,
    "bf16": becomes("train.precision", _bf16),
}

ABSENT = (
    Absent(("learning_rate",), {"train.optimizer.lr": 2e-5}, "2e-5"),
    Absent(("lr_scheduler_type",), {"train.optimizer.schedule": "linear"}, "linear"),
    Absent(("adam_beta2",), {"train.optimizer.beta2": 0.999}, "0.999"),
    Absent(("seed",), {"train.seed": 42}, "42"),
    Absent(("logging_steps", "logging_strategy"), {"logging.every": 10}, "10"),
    Absent(("save_steps", "save_strategy"), {"checkpoint.every": 500}, "500"),
    Absent(("save_total_limit",), {}, "all checkpoints; checkpoint.keep_last keeps 2 here, for going on after a fault"),
    Absent(
        ("gradient_checkpointing",),
        {},
        "true, for memory: what is trained is the same. Here train.recompute is none, which is faster; "
        "`launcher plan` tells what fits",
    ),
    Absent(
        ("router_aux_loss_coef",), {}, "that of the model's config, if it has experts; train.router_aux_loss is 0 here"
    ),
    Absent(
        ("assistant_only_loss", "completion_only_loss"),
        {},
        "all tokens of messages, and of prompt and completion the completion; data.loss_on is the same for both here: "
        "assistant, or all",
    ),
    Absent(
        ("chat_template_path",),
        {},
        "the tokenizer's own for messages, and none for prompt and completion that are texts, which data.chat_template "
        "none joins in the same way",
    ),
)
"""Where its defaults differ from ours."""

DEFAULTS: dict[str, object] = {"per_device_train_batch_size": 8, "num_train_epochs": 3}
"""Keys that count as written where they are absent: other keys are read with them."""
