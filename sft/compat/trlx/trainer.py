"""NeMoSFTTrainer, trlx's interface around a run of this project."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, cast

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from launcher.contract.config.conversion import typed_spec
from launcher.contract.errors import ConfigError, DataError, ModelError
from launcher.contract.leaves import Leaf, Leaves
from launcher.contract.model_shape import ModelShape, read_model_shape
from launcher.contract.nemo.checkpoint import is_checkpoint, read_shape
from launcher.contract.nemo.described import check_described
from launcher.contract.rundir import RunPaths
from launcher.contract.topology import build_topology
from sft.compat.trlx.configs import SFTConfig, TRLConfig
from sft.compat.trlx.megatron_cfg import MegatronConfig, read_megatron_config
from sft.compat.trlx.registry import register_trainer
from sft.compat.trlx.run import Material, make_spec, refuse_other_run, resume_point, run
from sft.compat.trlx.samples import Sample, SampleEncoder, Tokens
from sft.compat.trlx.settings import run_place, settle
from sft.data.encoding.tokenizer import load_tokenizer
from sft.generation.evaluation_prompts import Metric
from sft.runtime import lightning as pl
from sft.runtime.rank_env import RankEnv
from sft.training.trainer import megatron_trainer as our_trainer

MegatronCfg = str | Path | Mapping[str, object] | DictConfig


class BaseRLTrainer:
    """Base class of trainers, also of those that programs register."""

    def __init__(
        self,
        config: TRLConfig,
        reward_fn: object = None,
        metric_fn: Optional[Callable[..., Any]] = None,
        logit_mask: object = None,
        stop_sequences: Optional[Sequence[str]] = None,
        train_mode: bool = False,
    ) -> None:
        self.config = config
        self.reward_fn = reward_fn
        self.metric_fn = metric_fn
        self.logit_mask = logit_mask
        self.stop_sequences = stop_sequences
        self.train_mode = train_mode
        self.store: Sequence[object] = ()
        self.eval_pipeline: Sequence[Mapping[str, Any]] = ()

    def add_eval_pipeline(self, eval_pipeline: Sequence[Mapping[str, Any]]) -> None:
        """Set the prompts that evaluations answer. Without prompts nothing is evaluated."""
        self.eval_pipeline = eval_pipeline

    def make_experience(self, samples: Sequence[Sample], seq_length: int) -> None:
        """Set the samples to train on."""
        raise NotImplementedError

    def learn(self) -> None:
        """Train."""
        raise NotImplementedError


@register_trainer
class NeMoSFTTrainer(BaseRLTrainer):
    """Fine-tunes on samples. `overrides` are keys of this project's own config, which win over all others."""

    def __init__(
        self,
        config: TRLConfig,
        metric_fn: Optional[Callable[..., Any]] = None,
        megatron_cfg: Optional[MegatronCfg] = None,
        pretrained_model: Optional[str] = None,
        overrides: Optional[Mapping[str, object]] = None,
        **kwargs: Any,
    ) -> None:
        for name in ("reward_fn", "logit_mask"):
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{name}: belongs to reinforcement learning, which this project does not do; leave it out"
                )
        unknown = set(kwargs) - set(inspect.signature(BaseRLTrainer.__init__).parameters)
        if unknown:
            raise ConfigError([f"train.trainer_kwargs.{name}: not an argument of NeMoSFTTrainer" for name in unknown])
        super().__init__(config, metric_fn=metric_fn, **kwargs)
        if not isinstance(config.method, SFTConfig):
            raise ConfigError(f"method: {type(config.method).__name__} is not SFTConfig")
        self._env = RankEnv.from_environ()
        self._overrides = dict(overrides or {})
        self.pretrained_model = pretrained_model
        self.tokenizer = _tokenizer(config, pretrained_model)
        self.megatron_cfg: MegatronConfig | None = None
        if megatron_cfg is not None:
            self.megatron_cfg = read_megatron_config(megatron_cfg, len(self.tokenizer))
        self._settled = settle(config, self.megatron_cfg, self._env)
        if self._settled.notes:
            self._say("\n".join(["settings that contradict each other or have no effect:", *self._settled.notes]))
        self.batch_size = cast(int, self._settled.values["train.global_batch_size"].value)
        self.max_length = cast(int, self._settled.values["data.seq_length"].value)
        self.paths = RunPaths(run_place(config, self.megatron_cfg))
        """The run directory: metrics, checkpoints, and the exported model."""

    def make_experience(self, samples: Sequence[Sample], seq_length: int) -> None:
        """Tokenize all samples, and warn about those with nothing to train on, which are left out."""
        if not samples:
            raise DataError("samples: none given")
        encode = SampleEncoder(
            tokenizer=self.tokenizer,
            seq_length=seq_length,
            max_length=self.max_length,
            add_bos=bool(self._data("add_bos", False)),
            add_eos=bool(self._data("add_eos", True)),
        )
        tokens = [encode(sample, f"samples[{number}]") for number, sample in enumerate(samples)]
        empty = [number for number, sample in enumerate(tokens) if not sample.has_targets]
        if empty and self._env.rank == 0:
            warnings.warn(
                f"samples {empty[:10]} have no token to train on and are left out ({len(empty)} of {len(tokens)})",
                stacklevel=2,
            )
        self.store: Sequence[Tokens] = [sample for sample in tokens if sample.has_targets]

    def learn(self) -> None:
        """Train, evaluate, checkpoint and export into the run directory.

        Raise SystemExit with the exit code if the run is stopped before its end.
        """
        if not self.store:
            raise DataError("samples: nothing to train on; call make_experience with samples first")
        values = {**self._settled.values, **self._model(), **self._evaluation(), **self._resume()}
        prompts = self._prompts()
        if not prompts:  # the settings of answers, which trlx has defaults for, have nothing to be used for
            values = {key: leaf for key, leaf in values.items() if not key.startswith("evaluation.")}
        values |= {key: Leaf(value, "override", f"overrides[{key!r}]") for key, value in self._overrides.items()}
        model = None if "model.path" in values else self._spelled_out()
        material = Material(samples=self.store, prompts=prompts, model=model)
        spec = make_spec(values, material, self.paths, self._env)
        if spec.logging.wandb is not None:
            _name_for_wandb(self.config)
        run(spec, self.paths, self._metric(), self._env)

    # What learn() puts together ----------------------------------------------------------------------------------

    def _data(self, name: str, default: bool) -> Any:
        return self.megatron_cfg.value(f"model.data.{name}", default) if self.megatron_cfg else default

    def _model(self) -> dict[str, Leaf]:
        """Return the settings of tokenizer and model, the latter from the first argument or config that names one."""
        tokenizer = Leaf(str(_tokenizer_dir(self.config, self.pretrained_model)), "file", "tokenizer")
        path = _weights(self.config, self.megatron_cfg, self.pretrained_model)
        if path is None:
            return {"model.tokenizer": tokenizer}
        if self.megatron_cfg is not None and self.megatron_cfg.conversion.model is not None:
            shape = _shape_of(path)
            if shape is not None:
                described = self.megatron_cfg.conversion.model
                check_described(described, shape, "megatron_cfg", str(path), ignored=("vocab_size",))
        return {"model.tokenizer": tokenizer, "model.path": Leaf(str(path), "file", "pretrained_model")}

    def _spelled_out(self) -> Mapping[str, object]:
        """Return the config.json of the model that megatron_cfg describes, or raise ModelError if it describes none."""
        described = self.megatron_cfg.conversion.model if self.megatron_cfg is not None else None
        if described is None:
            raise ModelError(
                f"no model: model.model_path {self.config.model.model_path!r} does not exist here, and neither "
                "pretrained_model nor a megatron_cfg with the sizes of a model is given"
            )
        self._say(f"training starts from random weights: {self.config.model.model_path!r} does not exist here")
        return described

    def _prompts(self) -> list[dict[str, Any]]:
        """Return the prompts, with BOS if the config says so and without EOS. Return none if evaluation is off."""
        if self.megatron_cfg is not None and self.megatron_cfg.value("trainer.limit_val_batches", 1) == 0:
            return []
        bos = [int(self.tokenizer.bos_token_id)] if self._data("add_bos", False) else []
        return [{"prompt": row["prompt"], "input_ids": [*bos, *row["input_ids"]]} for row in self.eval_pipeline]

    def _evaluation(self) -> dict[str, Leaf]:
        stops = [text for text in self.stop_sequences or () if text]
        settings = {"evaluation.stop_sequences": Leaf(stops, "file", "stop_sequences")}
        if not self._prompts():
            return settings
        every, where = self.config.train.eval_interval, "train.eval_interval"
        if self.megatron_cfg is not None and self.megatron_cfg.value("trainer.val_check_interval") is not None:
            every, where = self.megatron_cfg.value("trainer.val_check_interval"), "trainer.val_check_interval"
        if not isinstance(every, int):
            raise ConfigError(f"{where}: {every} is a part of an epoch; give steps")
        return settings | {"train.eval_every": Leaf(every, "file", where)}

    def _resume(self) -> dict[str, Leaf]:
        given = self.config.train.resume_from_checkpoint or (
            self.megatron_cfg.value("model.resume_from_checkpoint") if self.megatron_cfg else None
        )
        own = self.megatron_cfg is not None and bool(self.megatron_cfg.value("exp_manager.resume_if_exists", False))
        if given is None or not Path(given).exists():
            if given is not None:
                self._say(f"train.resume_from_checkpoint: {given} does not exist; training starts from the model")
            refuse_other_run(self.paths, resumes=own)
            return {}
        point = resume_point(given, self.paths)
        refuse_other_run(self.paths, resumes=own or point is None)
        return {} if point is None else {"checkpoint.resume_from": Leaf(point, "file", "train.resume_from_checkpoint")}

    def _metric(self) -> Metric | None:
        """Return metric_fn wrapped so that it gets the arguments it takes, other keys of the prompts among them."""
        function = self.metric_fn
        if function is None:
            return None
        beside = {name for row in self.eval_pipeline for name in row} - {"prompt", "input_ids", "attention_mask"}
        columns = {name: [row.get(name) for row in self.eval_pipeline] for name in sorted(beside)}
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters}

        def metric(samples: list[str], **others: object) -> Mapping[str, object]:
            wanted = {name: value for name, value in (others | columns).items() if takes_all or name in names}
            if "samples" in names:
                return function(samples=samples, **wanted)  # type: ignore[no-any-return]
            return function(samples, **wanted)  # type: ignore[no-any-return]

        metric.__qualname__ = getattr(function, "__qualname__", repr(function))
        return metric

    def _say(self, text: str) -> None:
        if self._env.rank == 0:
            warnings.warn(text, stacklevel=3)


def megatron_trainer(cfg: MegatronCfg) -> pl.Trainer:
    """Return a Lightning trainer for SFTGPT with the ranks, precision, strategy, steps and seed of a NeMo config.

    NeMoSFTTrainer makes its own, which also evaluates and saves. This one is for programs with their own loop.
    """
    megatron = read_megatron_config(cfg, vocab_size=1)
    leaves = Leaves(
        values={key: Leaf(value, "file", item.where) for key, value, item in megatron.conversion.settings()}
    )
    spec = typed_spec(leaves)
    if leaves.problems or spec.train.max_steps is None:
        raise ConfigError(leaves.problems or "trainer.max_steps: missing")
    pl.seed_everything(spec.train.seed, verbose=False)
    env = RankEnv.from_environ()
    return our_trainer(spec, build_topology(spec, None), env, max_steps=spec.train.max_steps, data_key={})


def _name_for_wandb(config: TRLConfig) -> None:
    """Set the variables with which W&B reads entity_name, group_name and tags, unless they are set already."""
    train = config.train
    given = {"ENTITY": train.entity_name, "RUN_GROUP": train.group_name, "TAGS": ",".join(train.tags or ())}
    for name, text in given.items():
        if text:
            os.environ.setdefault(f"WANDB_{name}", text)


def _weights(config: TRLConfig, megatron: MegatronConfig | None, pretrained: str | None) -> Path | None:
    """Return where the weights are: pretrained_model, restore_from_path, or model_path if it exists, or None."""
    restore = megatron and (megatron.value("restore_from_path") or megatron.value("model.restore_from_path"))
    named = pretrained or restore
    if named:
        return Path(named).absolute()
    path = Path(config.model.model_path)
    return path.absolute() if path.exists() else None


def _shape_of(path: Path) -> ModelShape | None:
    return read_shape(path) if is_checkpoint(path) else read_model_shape(path)


def _tokenizer_dir(config: TRLConfig, pretrained: str | None) -> Path:
    """Return tokenizer_path if it exists, else the model's own directory, or raise ModelError."""
    places = [config.tokenizer.tokenizer_path, pretrained, config.model.model_path]
    for place in places:
        if place and Path(place).is_dir() and not is_checkpoint(Path(place)):
            return Path(place).absolute()
    raise ModelError(
        f"tokenizer.tokenizer_path: {config.tokenizer.tokenizer_path!r} is not a directory here, nor is the model's; "
        "ranks have no network: download the tokenizer and name its directory"
    )


def _tokenizer(config: TRLConfig, pretrained: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the truncation side and padding token that trlx gives it."""
    tokenizer = load_tokenizer(_tokenizer_dir(config, pretrained))
    tokenizer.truncation_side = config.tokenizer.truncation_side
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
