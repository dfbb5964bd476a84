"""Convert each setting of a TRLConfig: to one of our keys, to a note that it has no effect, or to an error.

trlx's NeMo trainer reads seq_length, seed, gen_kwargs and the truncation side, and silently ignores the rest in favour
of the NeMo config. Here the NeMo config wins where both have a setting, and a warning names each contradiction. What it
does not set, the TRLConfig does. Without a NeMo config the TRLConfig decides alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.leaves import Leaf
from sft.compat.trlx.configs import SFTConfig, TRLConfig
from sft.compat.trlx.megatron_cfg import MegatronConfig
from sft.runtime.rank_env import RankEnv

Settings = dict[str, tuple[object, str]]
"""For each of our keys the value, and the TRLConfig key that it comes from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """The settings of both configs together."""

    values: Mapping[str, Leaf]
    """By our keys, in the form that launcher.contract.config.load takes."""
    notes: tuple[str, ...]
    """Contradictions and settings without effect, for a warning."""


def settle(config: TRLConfig, megatron: MegatronConfig | None, env: RankEnv) -> Settled:
    """Return the settings of both configs, or raise ConfigError with every setting that is not supported."""
    problems: list[str] = []
    ours = _training(config) | _optimizer(config, problems) | _schedule(config, problems)
    ours |= _generation(config, problems) | _lora(config, problems)
    problems += _refused(config)
    if problems:
        raise ConfigError(problems)
    notes = _without_effect(config)
    values = {key: Leaf(value, "file", where) for key, (value, where) in ours.items()}
    if megatron is None:
        values |= {key: Leaf(value, "file", where) for key, (value, where) in _alone(config, env).items()}
        return Settled(values=values, notes=tuple(notes))
    if megatron.speaks_of("exp_manager."):
        values = {key: leaf for key, leaf in values.items() if key not in ("logging.wandb", "logging.tensorboard")}
    _overlay(values, megatron, notes)
    if values.pop("train.epochs", None) is not None:
        notes.append("trainer.max_epochs is replaced by train.total_steps: this order of the data has no epochs")
    return Settled(values=values, notes=tuple(notes))


def _overlay(values: dict[str, Leaf], megatron: MegatronConfig, notes: list[str]) -> None:
    """Let the NeMo config's settings replace those in `values`, except defaults of keys that it does not have."""
    # The schedule is replaced as a whole: parts of two schedules would be a third one.
    schedule = [key for key in values if key in _SCHEDULE]
    if megatron.speaks_of("model.optim.sched."):
        for key in schedule:
            before = values.pop(key)
            theirs = {name: value for name, value, _ in megatron.conversion.settings()}
            if key in theirs and theirs[key] != before.value:
                notes.append(f"{before.where} is replaced by model.optim.sched: {key} is {theirs[key]}")
    for key, value, outcome in megatron.conversion.settings():
        implied = outcome.key not in megatron.entries or megatron.value(outcome.key) is None
        ours = values.get(key)
        if ours is not None and implied:
            continue
        if ours is not None and ours.value != value:
            notes.append(f"{ours.where} {ours.value} is replaced by {outcome.key} {value}")
        values[key] = Leaf(value, "file", f"{outcome.where}: {outcome.key}")


_SCHEDULE = ("train.optimizer.schedule", "train.optimizer.min_lr", "train.optimizer.decay_steps")


def _training(config: TRLConfig) -> Settings:
    """Return the settings of steps, batch, data order and loggers."""
    train = config.train
    settings: Settings = {
        "train.max_steps": (train.total_steps, "train.total_steps"),
        "train.global_batch_size": (train.batch_size, "train.batch_size"),
        "data.cyclic_seed": (train.seed, "train.seed"),
        "checkpoint.every": (train.checkpoint_interval, "train.checkpoint_interval"),
        "data.chat_template": ("none", "samples"),
        "data.format": ("tokens", "samples"),
    }
    if train.minibatch_size is not None:
        settings["train.micro_batch_size"] = (train.minibatch_size, "train.minibatch_size")
    if train.tracker == "wandb":
        settings["logging.wandb"] = (train.project_name, "train.tracker wandb")
    if train.tracker == "tensorboard":
        settings["logging.tensorboard"] = (True, "train.tracker tensorboard")
    return settings


def _alone(config: TRLConfig, env: RankEnv) -> Settings:
    """Return what else a NeMo config would set: data parallelism over all ranks, with train.batch_size on each."""
    import torch

    train = config.train
    ranks = "resources.gpus_per_node" if torch.cuda.is_available() else "resources.tasks_per_node"
    return {
        "train.global_batch_size": (train.batch_size * env.world_size, "train.batch_size x ranks"),
        "train.micro_batch_size": (train.minibatch_size or train.batch_size, "train.minibatch_size"),
        "data.seq_length": (train.seq_length, "train.seq_length"),
        "train.seed": (train.seed, "train.seed"),
        "train.optimizer.clip_grad": (0.0, "trlx, which does not clip"),
        "resources.nodes": (env.world_size // env.local_world_size, "the ranks that were started"),
        ranks: (env.local_world_size, "the ranks that were started"),
        **({} if torch.cuda.is_available() else {"train.precision": ("fp32", "no GPU")}),
    }


def _optimizer(config: TRLConfig, problems: list[str]) -> Settings:
    name, kwargs = config.optimizer.name.lower(), dict(config.optimizer.kwargs)
    if name != "adamw" and not (name == "adam" and not kwargs.get("weight_decay")):
        problems.append(f"optimizer.name: {config.optimizer.name!r} is not supported; adamw is")
    settings: Settings = {}
    section = "train.optimizer."
    if "betas" in kwargs:
        beta1, beta2 = kwargs.pop("betas")
        settings[f"{section}beta1"] = (_number(beta1), "optimizer.kwargs.betas")
        settings[f"{section}beta2"] = (_number(beta2), "optimizer.kwargs.betas")
    for key in ("lr", "eps", "weight_decay"):
        if key in kwargs:
            settings[f"{section}{key}"] = (_number(kwargs.pop(key)), f"optimizer.kwargs.{key}")
    problems += _unknown("optimizer.kwargs", kwargs, ("lr", "betas", "eps", "weight_decay"))
    return settings


def _schedule(config: TRLConfig, problems: list[str]) -> Settings:
    """Return the settings of torch's CosineAnnealingLR up to T_max.

    After T_max the rate stays at eta_min, where torch's would rise again.
    """
    if config.scheduler.name.lower() != "cosine_annealing":
        problems.append(f"scheduler.name: {config.scheduler.name!r} is not supported; cosine_annealing is")
        return {}
    kwargs = dict(config.scheduler.kwargs)
    floor, steps = _number(kwargs.pop("eta_min", 0.0)), _number(kwargs.pop("T_max", config.train.total_steps))
    problems += _unknown("scheduler.kwargs", kwargs, ("T_max", "eta_min"))
    shape = "constant" if floor == _number(config.optimizer.kwargs.get("lr", 1e-3)) else "cosine"
    where = "scheduler.kwargs"
    settings: Settings = {"train.optimizer.schedule": (shape, where)}
    if shape == "cosine":
        settings["train.optimizer.min_lr"] = (floor, f"{where}.eta_min")
        settings["train.optimizer.decay_steps"] = (int(steps), f"{where}.T_max")
    return settings


_GENERATION = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "use_greedy", "do_sample")


def _generation(config: TRLConfig, problems: list[str]) -> Settings:
    """Return the settings of gen_kwargs, with the defaults of trlx's NeMo trainer for those that are absent."""
    if not isinstance(config.method, SFTConfig):
        problems.append(f"method: {type(config.method).__name__} is not SFTConfig, and nothing else is trained here")
        return {}
    kwargs = dict(config.method.gen_kwargs)
    problems += _unknown("method.gen_kwargs", set(kwargs) - {"greedy", "eos_token_id", "pad_token_id"}, _GENERATION)
    greedy = kwargs.get("use_greedy", kwargs.get("greedy", False)) or kwargs.get("do_sample") is False
    values: dict[str, object] = {
        "max_new_tokens": kwargs.get("max_new_tokens", 64),
        "temperature": 0.0 if greedy else kwargs.get("temperature", 1.0),
        "top_k": kwargs.get("top_k") or None,
        "top_p": kwargs.get("top_p", 0.9),
        "repetition_penalty": kwargs.get("repetition_penalty", 1.2),
    }
    lists = [name for name, value in values.items() if isinstance(value, (list, tuple))]
    problems += [
        f"method.gen_kwargs.{name}: {values[name]}: give one value, not a sweep over several" for name in lists
    ]
    if greedy:  # nothing is drawn, so that these would be refused
        del values["top_k"], values["top_p"]
    settings: Settings = {f"evaluation.{name}": (value, f"method.gen_kwargs.{name}") for name, value in values.items()}
    return settings if greedy else {**settings, "evaluation.seed": (config.train.seed, "train.seed")}


def _lora(config: TRLConfig, problems: list[str]) -> Settings:
    given = config.model.peft_config
    if given is None:
        return {}
    values = given.to_dict() if hasattr(given, "to_dict") else dict(given)
    kind = str(getattr(values.get("peft_type"), "value", values.get("peft_type"))).upper()
    if kind != "LORA":
        problems.append(f"model.peft_config: peft_type {kind} is not supported; LORA is")
        return {}
    used = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    neutral = {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision"}
    # PEFT's own object has all of its settings: those that somebody set differ from its defaults.
    default = type(given)().to_dict() if hasattr(given, "to_dict") else {"bias": "none"}
    changed = {name for name, value in values.items() if name not in default or value != default[name]}
    problems += _unknown("model.peft_config", sorted(changed - neutral), used)
    rank, targets, where = values.get("r", 8), values.get("target_modules") or [], "model.peft_config"
    return {
        "model.lora.rank": (rank, f"{where}.r"),
        "model.lora.alpha": (_number(values.get("lora_alpha", 8)), f"{where}.lora_alpha"),
        "model.lora.dropout": (_number(values.get("lora_dropout", 0.0)), f"{where}.lora_dropout"),
        "model.lora.targets": ([targets] if isinstance(targets, str) else sorted(targets), f"{where}.target_modules"),
        "model.lora.rslora": (bool(values.get("use_rslora")), f"{where}.use_rslora"),
        "model.lora.dora": (bool(values.get("use_dora")), f"{where}.use_dora"),
    }


def _refused(config: TRLConfig) -> list[str]:
    """Return a problem for each setting without which something else would be trained than was asked for."""
    model, tokenizer, train = config.model, config.tokenizer, config.train
    wrong = {
        f"model.model_arch_type: {model.model_arch_type!r}; causal models only": model.model_arch_type != "causal",
        f"model.num_layers_unfrozen: {model.num_layers_unfrozen}; layers cannot be frozen one by one, -1 trains all, "
        "model.peft_config trains adapters": model.num_layers_unfrozen != -1,
        "model.model_extra_configs: not passed on; put them into the model's config.json": model.model_extra_configs,
        "tokenizer.tokenizer_extra_configs: not passed on; put them into tokenizer_config.json": (
            tokenizer.tokenizer_extra_configs
        ),
        f"tokenizer.truncation_side: {tokenizer.truncation_side!r} is neither left nor right": (
            tokenizer.truncation_side not in ("left", "right")
        ),
        f"train.pipeline: {train.pipeline!r} is not supported; PromptPipeline is": (
            train.pipeline.lower() != "promptpipeline"
        ),
        f"train.tracker: {train.tracker!r} is not wandb, tensorboard or None": (
            train.tracker not in ("wandb", "tensorboard", None)
        ),
        "train.rollout_logging_dir: there are no rollouts without a reward; leave it None": train.rollout_logging_dir,
    }
    return [text for text, is_wrong in wrong.items() if is_wrong]


def _without_effect(config: TRLConfig) -> list[str]:
    train = config.train
    given = {
        "train.logging_dir: curves are kept in the run directory": train.logging_dir is not None,
        "train.save_optimizer False: checkpoints hold the optimizer, so that runs can resume": not train.save_optimizer,
    }
    return [f"no effect: {text}" for text, is_given in given.items() if is_given]


def run_place(config: TRLConfig, megatron: MegatronConfig | None) -> Path:
    """Return the run directory: that of exp_manager if it names one, else checkpoint_dir with run_name below it."""
    if megatron is not None:
        if explicit := megatron.value("exp_manager.explicit_log_dir"):
            return Path(explicit).absolute()
        if directory := megatron.value("exp_manager.exp_dir"):
            return Path(directory, megatron.value("exp_manager.name") or megatron.value("name", "default")).absolute()
    root = Path(config.train.checkpoint_dir).expanduser().absolute()
    return root / config.train.run_name if config.train.run_name else root


def _unknown(section: str, keys: Iterable[str], known: tuple[str, ...]) -> list[str]:
    return [
        f"{section}.{key}: not supported{did_you_mean(key, known)}; known: {', '.join(known)}"
        for key in keys
        if key not in known
    ]


def _number(value: Any) -> float:
    """Return the number that a config holds."""
    return float(value)  # YAML reads 1e-5, without a dot, as a text
