"""Prompts that are answered at every evaluation, and the metric function over the answers.

A prompt is written exactly as training writes one: the same chat template with its generation prompt, and no text of
a user becomes a control token. Replicas share the prompts between them; rank 0 then has all answers, calls the metric
function once, and sends its result to all.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase

from launcher.errors import ConfigError, DataError, ModelError
from launcher.rundir import append_line
from launcher.spec import RunSpec
from sft.data.chat import ChatRenderer
from sft.data.escape import ControlTokens
from sft.data.messages import Message, read_messages
from sft.data.tokenizer import chat_template, leading_ids, load_tokenizer
from sft.generate import generate
from sft.megatron.distributed import ControlGroup
from sft.megatron.mcore import parallel_state
from sft.module import SFTGPT
from sft.run_log import RunLog

_SHOWN = 2
"""Answers that are printed at each evaluation."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text, control tokens spelled out, and as ids."""

    text: str
    ids: tuple[int, ...]


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, spec: RunSpec) -> list[Prompt]:
    """The prompts of a jsonl file; DataError names the line."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"evaluation.prompts: {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompt = _prompt(line, f"evaluation.prompts: {path}:{number}", tokenizer, spec)
            found.append(prompt)
    if not found:
        raise DataError(f"evaluation.prompts: {path} holds no prompt")
    return found


def _prompt(line: str, where: str, tokenizer: PreTrainedTokenizerBase, spec: RunSpec) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not (isinstance(row.get("prompt"), str) or "messages" in row):
        raise DataError(f"{where}: a row has prompt (a text) or messages")
    template = chat_template(tokenizer, spec.data)
    if template is None:
        if "messages" in row:
            raise DataError(f"{where}: messages need a chat template, and data.chat_template is none")
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        leading = leading_ids(tokenizer)
        prompt = Prompt(row["prompt"], tuple(ids if ids[: len(leading)] == leading else leading + ids))
    else:
        has_turns = "messages" in row
        turns = read_messages(row["messages"], f"{where}: messages", {}) if has_turns else _question(row["prompt"])
        prompt = _rendered(turns, tokenizer, template, spec)
    if not prompt.ids:
        raise DataError(f"{where}: the prompt is empty")
    return prompt


def _question(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _rendered(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, spec: RunSpec) -> Prompt:
    controls = ControlTokens(tokenizer)
    renderer = ChatRenderer(tokenizer, template, controls, spec.data)
    text = renderer.apply([controls.hide_in(turn.for_template()) for turn in turns], None, True)
    return Prompt(controls.reveal(text), tuple(int(token) for token in controls.tokenize(text).ids))


def stop_tokens(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, model_dir: Path) -> set[int]:
    """What ends an answer: end tokens of tokenizer and model, and those of evaluation.stop_tokens."""
    stops = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    if (model_dir / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(model_dir).eos_token_id
        stops |= set(ends) if isinstance(ends, list) else {ends} if isinstance(ends, int) else set()
    vocabulary = tokenizer.get_vocab()
    for text in spec.evaluation.stop_tokens:
        if text not in vocabulary:
            raise ModelError(f"evaluation.stop_tokens: {text!r} is not a token of the tokenizer")
        stops.add(vocabulary[text])
    return stops


def metric_function(name: str) -> Callable[..., Mapping[str, Any]]:
    """The function behind package.module:function."""
    package, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(package), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"evaluation.metric: {name} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"evaluation.metric: {name} is not a function")
    return cast("Callable[..., Mapping[str, Any]]", found)


def averages(name: str, result: Any, prompts: int) -> dict[str, float]:
    """metric/<key> -> mean, of what a metric function returned."""
    if not isinstance(result, Mapping):
        raise ConfigError(f"evaluation.metric: {name} returned {type(result).__name__}, not a dict of numbers")
    means = {}
    for key, value in result.items():
        try:
            values = [float(value)] if not hasattr(value, "__len__") else [float(item) for item in value]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"evaluation.metric: {name} returned {value!r} for {key!r}") from error
        if len(values) not in (1, prompts):
            raise ConfigError(f"evaluation.metric: {name} returned {len(values)} {key!r} for {prompts} prompts")
        means[f"metric/{key}"] = sum(values) / len(values)
    return means


class PromptAnswers:
    """Answers the prompts of a run."""

    def __init__(self, spec: RunSpec, tokenizer_dir: Path, model_dir: Path, log: RunLog) -> None:
        self._spec = spec.evaluation
        self._tokenizer = load_tokenizer(tokenizer_dir)
        self._prompts = read_prompts(Path(spec.evaluation.prompts or ""), self._tokenizer, spec)
        self._stops = stop_tokens(spec, self._tokenizer, model_dir)
        self._metric = metric_function(spec.evaluation.metric) if spec.evaluation.metric else None
        self._log = log

    def __call__(self, module: SFTGPT, control: ControlGroup, step: int) -> dict[str, float]:
        """Answer all prompts; what the metric function makes of the answers, on every rank."""
        mine = range(
            parallel_state.get_data_parallel_rank(), len(self._prompts), parallel_state.get_data_parallel_world_size()
        )
        ids = generate(module, [self._prompts[n].ids for n in mine], self._spec, stops=self._stops, numbers=mine)
        parts = control.gather(dict(zip(mine, ids, strict=True)))
        answers = {number: answer for part in parts for number, answer in part.items()}
        texts = (self._tokenizer.decode(answers[n], skip_special_tokens=True) for n in range(len(self._prompts)))
        outputs = [str(text) for text in texts]
        self._write(step, outputs)
        return self._measure(control, outputs)

    def _write(self, step: int, outputs: Sequence[str]) -> None:
        if self._log.is_writer:
            for prompt, output in zip(self._prompts, outputs, strict=True):
                append_line(self._log.paths.generations, {"step": step, "prompt": prompt.text, "output": output})
        for prompt, output in list(zip(self._prompts, outputs, strict=True))[:_SHOWN]:
            self._log.say(f"step {step}: {prompt.text[-80:]!r} -> {output[:200]!r}")

    def _measure(self, control: ControlGroup, outputs: Sequence[str]) -> dict[str, float]:
        """The metric function runs on rank 0 alone; what it raises ends all ranks."""
        if self._metric is None:
            return {}
        error, means = None, dict[str, float]()
        if self._log.is_writer:
            prompts = [prompt.text for prompt in self._prompts]
            samples = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
            try:
                result = self._metric(samples=samples, prompts=prompts, outputs=list(outputs))
                means = averages(str(self._spec.metric), result, len(prompts))
            except Exception as problem:  # somebody else's function: whatever it is, the ranks must not wait for us
                error = f"{type(problem).__name__}: {problem}"
        first = control.first_error(error)
        if first is not None:
            raise ConfigError(f"evaluation.metric: {self._spec.metric} failed: {first}")
        return control.from_leader(means)
