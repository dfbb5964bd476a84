"""Read what evaluations need: prompts as token ids, the tokens that end an answer, the metric function.

A prompt is encoded as in training: with the same chat template and its generation prompt, and without turning text of a
user into control tokens. `python -m sft prepare` reads all of this as well, before any rank starts, so that a misspelt
function does not end the run at its first evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from launcher.contract.errors import ConfigError, DataError, ModelError
from launcher.contract.named_templates import NONE
from launcher.contract.spec import DataSpec, RunSpec
from sft.data.encoding.prompt import Prompt, PromptWriter
from sft.data.encoding.tokenizer import chat_template, load_tokenizer
from sft.data.reading.prompt_rows import PromptRow, read_prompt_rows
from sft.hf.stop_tokens import end_tokens
from sft.runtime.own_code import import_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Metric = Callable[..., Mapping[str, object]]
"""The function that evaluation.metric names; called with samples=, prompts= and outputs=."""


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, spec: RunSpec) -> list[Prompt]:
    """Return the prompts of a jsonl file, or raise DataError with the line that is wrong."""
    writer = PromptWriter(tokenizer, chat_template(tokenizer, spec.data), spec.data)
    prompts = [_prompt(row, where, writer, spec.data) for where, row in read_prompt_rows(path, spec.data)]
    if not prompts:
        raise DataError(f"evaluation.prompts: {path} holds no prompt")
    return prompts


def _prompt(row: PromptRow, where: str, writer: PromptWriter, data: DataSpec) -> Prompt:
    if row.ids is not None:
        return Prompt(row.question, row.ids)
    try:
        if data.chat_template == NONE:
            prompt = writer.question(row.turns[0].content or "")
        else:
            prompt = writer.conversation(row.turns, row.tools)
    except DataError as error:
        raise DataError([f"{where}: {problem}" for problem in error.problems]) from error
    if not prompt.ids:
        raise DataError(f"{where}: the prompt is empty")
    return prompt


def stop_tokens(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, model_dir: Path) -> set[int]:
    """Return the tokens that end an answer: the end tokens of tokenizer and model, and evaluation.stop_tokens."""
    stops = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    stops |= set(end_tokens(model_dir))
    vocabulary = tokenizer.get_vocab()
    for text in spec.evaluation.stop_tokens:
        if text not in vocabulary:
            raise ModelError(f"evaluation.stop_tokens: {text!r} is not a token of the tokenizer")
        stops.add(vocabulary[text])
    return stops


def trimmed(answer: str, stop_sequences: Sequence[str]) -> str:
    """Return the answer up to the first stop sequence, without white space before that."""
    ends = [place for text in stop_sequences if (place := answer.find(text)) >= 0]
    return answer[: min(ends)].rstrip() if ends else answer


def metric_function(name: str) -> Metric:
    """Import the function package.module:function. ConfigError where that fails."""
    package, _, function = name.partition(":")
    try:
        found = getattr(import_named(package), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"evaluation.metric: {name} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"evaluation.metric: {name} is not a function")
    return cast(Metric, found)


def averages(name: str, result: object, prompts: int) -> dict[str, float]:
    """Return the mean of each value that the metric function `name` returned, as metric/<key>.

    A value is a number, or a sequence of one number for each prompt; ConfigError for others.
    """
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


def check_prompts(spec: RunSpec, tokenizer_dir: Path, model_dir: Path, vocab_size: int) -> None:
    """Raise now what an evaluation would raise later. Do nothing where there are no prompts."""
    if spec.evaluation.prompts is None:
        return
    tokenizer = load_tokenizer(tokenizer_dir)
    prompts = read_prompts(Path(spec.evaluation.prompts), tokenizer, spec)
    stop_tokens(spec, tokenizer, model_dir)
    if spec.evaluation.metric:
        metric_function(spec.evaluation.metric)
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= vocab_size:  # rows of zeros may follow the model's own, and answers would be to them
        raise DataError(
            f"evaluation.prompts: token id {largest} is not in the model's vocabulary of {vocab_size} (vocab_size in "
            "its config.json); set model.tokenizer to the model's own, or make the ids in the rows with it"
        )
    longest = max(len(prompt.ids) for prompt in prompts)
    print(f"prompts: {len(prompts):,} to answer at each evaluation, the longest of {longest:,} tokens")
