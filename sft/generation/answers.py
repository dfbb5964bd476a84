"""Answer the prompts of a run at every evaluation, and call the metric function on the answers.

The model replicas divide the prompts between them. Rank 0 gathers all answers, calls the metric function once, and
sends its result to all ranks, so that decisions built on it are the same on each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from launcher.contract.errors import UserCodeError
from launcher.contract.rundir import append_line
from launcher.contract.spec import RunSpec
from sft.data.encoding.tokenizer import load_tokenizer
from sft.engine.module import SFTGPT
from sft.generation.evaluation_prompts import Metric, averages, metric_function, read_prompts, stop_tokens, trimmed
from sft.generation.generate import generate
from sft.megatron.core import parallel_state
from sft.megatron.parallel.groups import ControlGroup
from sft.metrics.run_log import RunLog

_SHOWN = 2
"""Number of answers that are printed at each evaluation."""


class PromptAnswers:
    """Answers the prompts of a run."""

    def __init__(
        self,
        spec: RunSpec,
        tokenizer_dir: Path,
        model_dir: Path,
        log: RunLog,
        *,
        trained_stops: Collection[int],
        metric: Metric | None = None,
    ) -> None:
        """Read the prompts. `metric` takes the place of the function that evaluation.metric names.

        `trained_stops` are the tokens that end answers in the training data.
        """
        self._spec = spec.evaluation
        self._tokenizer = load_tokenizer(tokenizer_dir)
        self._prompts = read_prompts(Path(spec.evaluation.prompts or ""), self._tokenizer, spec)
        self._stops = stop_tokens(spec, self._tokenizer, model_dir) | set(trained_stops)
        named = metric_function(spec.evaluation.metric) if metric is None and spec.evaluation.metric else None
        self._metric = metric or named
        self._name = str(spec.evaluation.metric) if metric is None else getattr(metric, "__qualname__", repr(metric))
        self._log = log

    def __call__(self, module: SFTGPT, control: ControlGroup, step: int) -> dict[str, float]:
        """Answer all prompts, and return the metric function's results on every rank."""
        mine = range(
            parallel_state.get_data_parallel_rank(), len(self._prompts), parallel_state.get_data_parallel_world_size()
        )
        ids = generate(module, [self._prompts[n].ids for n in mine], self._spec, stops=self._stops, numbers=mine)
        parts = control.gather(dict(zip(mine, ids, strict=True)))
        answers = {number: answer for part in parts for number, answer in part.items()}
        texts = (self._tokenizer.decode(answers[n], skip_special_tokens=True) for n in range(len(self._prompts)))
        outputs = [trimmed(str(text), self._spec.stop_sequences) for text in texts]
        self._write(step, outputs)
        return self._measure(control, outputs)

    def _write(self, step: int, outputs: Sequence[str]) -> None:
        if self._log.is_writer:
            for prompt, output in zip(self._prompts, outputs, strict=True):
                append_line(self._log.paths.generations, {"step": step, "prompt": prompt.text, "output": output})
        for prompt, output in list(zip(self._prompts, outputs, strict=True))[:_SHOWN]:
            self._log.say(f"step {step}: {prompt.text[-80:]!r} -> {output[:200]!r}")

    def _measure(self, control: ControlGroup, outputs: Sequence[str]) -> dict[str, float]:
        """Call the metric function on rank 0 and return its means. If it raises, all ranks raise UserCodeError."""
        if self._metric is None:
            return {}
        error, means = None, dict[str, float]()
        if self._log.is_writer:
            prompts = [prompt.text for prompt in self._prompts]
            samples = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
            try:
                result = self._metric(samples=samples, prompts=prompts, outputs=list(outputs))
                means = averages(self._name, result, len(prompts))
            except Exception as problem:  # user code: whatever it raises, the other ranks must not wait
                error = f"{type(problem).__name__}: {problem}"
        first = control.first_error(error)
        if first is not None:
            raise UserCodeError(f"evaluation.metric: {self._name} failed: {first}")
        return control.from_leader(means)
