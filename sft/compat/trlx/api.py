"""`train()`, the function that programs written for trlx call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

from transformers import PreTrainedTokenizerBase

from launcher.contract.errors import ConfigError
from sft.compat.trlx.configs import TRLConfig
from sft.compat.trlx.defaults import default_sft_config
from sft.compat.trlx.registry import get_trainer
from sft.compat.trlx.samples import PromptPipeline, Sample


def train(
    model_path: Optional[str] = None,
    reward_fn: Optional[Callable[..., object]] = None,
    dataset: Optional[Iterable[object]] = None,
    samples: Optional[Sequence[Sample]] = None,
    rewards: Optional[Sequence[float]] = None,
    prompts: Optional[Sequence[object]] = None,
    eval_prompts: Optional[Sequence[str | Mapping[str, object]]] = None,
    metric_fn: Optional[Callable[..., Any]] = None,
    config: Optional[TRLConfig] = None,
    stop_sequences: Optional[Sequence[str]] = None,
) -> Any:
    """Fine-tune on `samples` and return the trainer, whose `paths` is the run directory.

    Every `eval_interval` steps the model answers `eval_prompts`, answers are cut at `stop_sequences`, and
    metric_fn(samples=, prompts=, outputs=) computes numbers from them. Without eval_prompts nothing is evaluated.
    Raise ConfigError for arguments of reinforcement learning and for settings that are not supported.
    """
    _refuse_rewards(reward_fn=reward_fn, dataset=dataset, rewards=rewards, prompts=prompts)
    if not samples:
        raise ConfigError("samples: missing; give texts, or prompts and outputs in turn")
    if config is None:
        warnings.warn("no config is given: using default_sft_config()", stacklevel=2)
        config = default_sft_config()
    if model_path:
        config.model.model_path = model_path
    trainer = get_trainer(config.train.trainer)(
        config=config, metric_fn=metric_fn, stop_sequences=stop_sequences, **config.train.trainer_kwargs
    )
    trainer.make_experience(samples, config.train.seq_length)
    trainer.add_eval_pipeline(_eval_pipeline(eval_prompts, metric_fn, config, trainer.tokenizer))
    trainer.learn()
    return trainer


def _eval_pipeline(
    given: Sequence[str | Mapping[str, object]] | None,
    metric_fn: Callable[..., object] | None,
    config: TRLConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> PromptPipeline:
    """Return the prompts, cut so that an answer fits after each."""
    if metric_fn is not None and not given:
        raise ConfigError("metric_fn: needs eval_prompts to measure answers to; give some, or leave metric_fn out")
    room = config.train.seq_length - getattr(config.method, "gen_kwargs", {}).get("max_new_tokens", 64)
    if given and room < 1:
        raise ConfigError(
            f"method.gen_kwargs.max_new_tokens: leaves {room} of train.seq_length {config.train.seq_length} tokens for "
            "a prompt; make it smaller"
        )
    return PromptPipeline(given or [], room, tokenizer)


def _refuse_rewards(**given: object) -> None:
    problems = [
        f"{name}: belongs to reinforcement learning (PPO, ILQL, RFT), which this project does not do; leave it out to "
        "fine-tune on samples, or train with trl or OpenRLHF"
        for name, value in given.items()
        if value is not None
    ]
    if problems:
        raise ConfigError(problems)
