"""LLaMA-Factory's YAML: its own words beside transformers' TrainingArguments."""

from __future__ import annotations

from launcher.contract.nemo.entries import Entries, value_of
from launcher.contract.nemo.rule import Refused, Translation
from launcher.contract.trainers import rules
from launcher.contract.trainers.adapters import LoraWords
from launcher.contract.trainers.hf_trainer import WORDS as HF_TRAINER
from launcher.contract.trainers.hf_trainer import batch_word
from launcher.contract.trainers.word import Absent, Word, at, becomes, beside, missing, needless, number_at

_LORA = LoraWords(
    rank="lora_rank",
    alpha="lora_alpha",
    targets="lora_target",
    default_rank=8,
    alpha_over_rank=2.0,
    default_alpha=0.0,
    default_dropout=0.0,
    default_targets=(),
)
_QUANTIZED = "the frozen weights stay in bf16, or their products are in fp8 (train.precision)"
_KERNELS = needless("kernels are chosen by train.kernels and train.attention")
_OTHER_METHODS = "all weights or LoRA adapters are trained"


def _finetuning(value: object, entries: Entries) -> Translation:
    if value == "full":
        return Translation(note="all weights are trained")
    if value == "lora":
        return _LORA.settings(entries)
    raise Refused(f"{value!r} is not supported; {_OTHER_METHODS} (full, lora)")


def _stage(value: object, entries: Entries) -> Translation:
    if value != "sft":
        raise Refused(f"{value!r} is not supported; supervised fine-tuning alone is done here (sft)")
    return Translation(note="supervised fine-tuning")


def _dataset(value: object, entries: Entries) -> Translation:
    names = [str(name) for name in value] if isinstance(value, list) else str(value).split(",")
    return Translation(
        {"data.train": [name.strip() for name in names]},
        "names of dataset_info.json: put each one's file or hub id in its place, and its columns in data.columns",
    )


def _eval_dataset(value: object, entries: Entries) -> Translation:
    if value is None:
        return Translation(note="not set")
    found = _dataset(value, entries)
    return Translation({"data.validation": found.settings["data.train"]}, found.note)


def _template(value: object, entries: Entries) -> Translation:
    if value in (None, "default"):
        return Translation(note="the tokenizer's own chat template is used")
    return Translation(
        {"data.chat_template": "tokenizer"},
        f"the tokenizer's own, which is {value} in a model that was made with it; look at it with `sft audit`",
    )


def _loss_on(value: object, entries: Entries) -> Translation:
    if value:
        return Translation({"data.loss_on": "all"})
    return Translation({} if value_of(entries, "mask_history") else {"data.loss_on": "assistant"})


def _history(value: object, entries: Entries) -> Translation:
    return Translation({"data.loss_on": "last_assistant"} if value else {})


def _packing(value: object, entries: Entries) -> Translation:
    if value_of(entries, "neat_packing"):
        return Translation(note="neat_packing counts")
    return Translation({"data.packing": bool(value)}, "examples never see each other here" if value else "")


_MODEL: dict[str, Word] = {
    "model_name_or_path": at("model.path"),
    "model_revision": at("model.revision"),
    "adapter_name_or_path": missing("adapters start anew; merge the first into the model"),
    "trust_remote_code": needless("no code of a model is ever run"),
    "stage": becomes("always supervised fine-tuning", _stage),
    "finetuning_type": becomes("model.lora.rank, unset for full", _finetuning),
    "lora_rank": beside("model.lora.rank", "finetuning_type"),
    "lora_alpha": beside("model.lora.alpha", "finetuning_type"),
    "lora_dropout": beside("model.lora.dropout", "finetuning_type"),
    "lora_target": beside("model.lora.targets", "finetuning_type"),
    "loraplus_lr_ratio": number_at("train.optimizer.loraplus_ratio"),
    "loraplus_lr_embedding": needless("embeddings have no adapters"),
    "use_rslora": at("model.lora.rslora"),
    "use_dora": at("model.lora.dora"),
    "additional_target": missing("only adapters are trained with model.lora.rank"),
    "quantization_bit": missing(_QUANTIZED),
    **dict.fromkeys(
        ("quantization_method", "quantization_type", "double_quantization"), needless("read with quantization_bit")
    ),
    **dict.fromkeys(
        (
            "pissa_init",
            "pissa_convert",
            "use_galore",
            "use_apollo",
            "use_badam",
            "use_adam_mini",
            "use_muon",
            "use_llama_pro",
            "freeze_trainable_layers",
            "freeze_trainable_modules",
            "use_dft_loss",
        ),
        missing(_OTHER_METHODS),
    ),
    "pure_bf16": missing("master weights are in fp32"),
    "train_from_scratch": becomes("model.init: random", rules.flag({"model.init": "random"})),
    "resize_vocab": missing("the vocabulary keeps its size"),
    "add_tokens": missing("no tokens are added; use a tokenizer that has them (model.tokenizer)"),
    "add_special_tokens": missing("no tokens are added; use a tokenizer that has them (model.tokenizer)"),
    "rope_scaling": missing("the model's config.json says how RoPE is scaled"),
    "shift_attn": missing("attention is exact"),
    "moe_aux_loss_coef": missing(
        "here it is train.router_aux_loss, of another form: about (experts per token / layers) of it is as strong"
    ),
    "flash_attn": _KERNELS,
    "use_unsloth": _KERNELS,
    "enable_liger_kernel": _KERNELS,
    "use_unsloth_gc": needless("here it is train.recompute: offload"),
    "disable_gradient_checkpointing": needless("here it is train.recompute: none, the default"),
    "use_reentrant_gc": needless("train.recompute says what is computed again"),
    "upcast_layernorm": needless("norms are computed in fp32"),
    "upcast_lmhead_output": needless("the loss is computed in fp32"),
    "use_fast_tokenizer": needless("the tokenizer's files say what it is"),
    "cache_dir": needless("models of the hub are in the hub's own cache"),
    "hf_hub_token": missing("export HF_TOKEN in your shell; no config holds it"),
    "low_cpu_mem_usage": needless("each rank reads its slices of the weights"),
}

_DATA: dict[str, Word] = {
    "dataset": becomes("data.train", _dataset),
    "eval_dataset": becomes("data.validation", _eval_dataset),
    "dataset_dir": needless("paths in data.train start in the working directory"),
    "template": becomes("data.chat_template", _template),
    "cutoff_len": at("data.seq_length"),
    "train_on_prompt": becomes("data.loss_on: all", _loss_on),
    "mask_history": becomes("data.loss_on: last_assistant", _history),
    "packing": becomes("data.packing", _packing),
    "neat_packing": at("data.packing"),
    "val_size": becomes("data.validation_split", rules.held_out_share),
    "max_samples": missing("every row counts; data.sources with a weight below 1 takes a part of each epoch"),
    "mix_strategy": missing("data sets are joined; data.sources has weights", "concat"),
    "interleave_probs": missing("data.sources has weights"),
    "streaming": missing("data are tokenized once, into a cache on disk"),
    "preprocessing_num_workers": at("data.workers"),
    "preprocessing_batch_size": needless("it changes nothing"),
    "overwrite_cache": needless("the cache is known by its contents, and never stale"),
    "tokenized_path": needless("here it is data.cache_dir"),
    "ignore_pad_token_for_loss": missing("padding is never trained", True),
    "eval_on_each_dataset": needless("here it is data.validation_sets"),
    "tool_format": missing("tools are written by the chat template"),
    "default_system": missing("write it into the rows or the chat template"),
    "enable_thinking": missing("here it is data.chat_template_kwargs: {enable_thinking: ...}", True),
    **dict.fromkeys(
        ("media_dir", "image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels", "video_maxlen"),
        needless("text alone is trained"),
    ),
    "disable_shuffling": becomes("data.shuffle: false", rules.flag({"data.shuffle": False})),
    "buffer_size": needless("read with streaming"),
}

_RECORDS: dict[str, Word] = {
    "use_swanlab": missing("logging has wandb, tensorboard and mlflow"),
    "predict_with_generate": needless("here it is evaluation.prompts"),
    "compute_accuracy": needless("here it is evaluation.metric"),
    "export_dir": needless("export/ holds the model when training is done"),
    "ray_run_name": needless("jobs are Slurm's"),
    "ray_num_workers": needless("resources says how many ranks there are"),
    "freeze_vision_tower": needless("text alone is trained"),
    "freeze_multi_modal_projector": needless("text alone is trained"),
}

WORDS: dict[str, Word] = {
    **HF_TRAINER,
    "per_device_train_batch_size": batch_word(("packing", "neat_packing"), ("cutoff_len",), 2048),
    **_MODEL,
    **_DATA,
    **_RECORDS,
}

ABSENT = (
    Absent(("learning_rate",), {"train.optimizer.lr": 5e-5}, "5e-5"),
    Absent(("lr_scheduler_type",), {"train.optimizer.schedule": "linear"}, "linear"),
    Absent(("adam_beta2",), {"train.optimizer.beta2": 0.999}, "0.999"),
    Absent(("seed",), {"train.seed": 42}, "42"),
)
"""Where its defaults differ from ours."""

DEFAULTS: dict[str, object] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
    "cutoff_len": 2048,
    "finetuning_type": "lora",
    "train_on_prompt": False,
}
"""Keys that count as written where they are absent: other keys are read with them."""
