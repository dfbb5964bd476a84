"""Generate answers with the model under its tensor and pipeline parallel topology, with a cache of keys and values.

Prompts of different lengths are answered in one batch without padding. The first pass reads as many tokens as the
shortest prompt has; each later pass reads one token of every row, the next one of its prompt or the last one of its
answer. Causal attention needs no mask for that, and each row gets the answer that it would get alone.

Attention uses Megatron-core's cache (StaticInferenceContext). Pipeline stages pass activations by plain sends: with one
micro-batch at a time there is nothing to overlap, and Megatron-core's schedules do not support virtual stages in
inference.

Replicas that share experts run their passes together, since each pass exchanges tokens. One that has no passes left
runs idle ones until the others have none left either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.contract.spec import EvaluationSpec
from sft.engine.module import SFTGPT
from sft.generation.sampling import next_tokens, penalized, stream
from sft.megatron.core import StaticInferenceContext, parallel_state
from sft.megatron.patches.inference import inference_mode


@torch.no_grad()
def generate(
    module: SFTGPT,
    prompts: Sequence[Sequence[int]],
    spec: EvaluationSpec,
    *,
    stops: Collection[int],
    numbers: Sequence[int],
) -> list[list[int]]:
    """Return the answers to the prompts of this model replica: token ids, without the stop token.

    All ranks of the replica call this with the same prompts, and each gets all answers. `numbers` are the prompts'
    numbers among those of all replicas, which seed their random streams.
    """
    answers: list[list[int]] = []

    def passes() -> Iterator[bool]:
        """Run one forward pass after another, and yield after each whether more follow."""
        for first in range(0, len(prompts), spec.batch_size):
            part = slice(first, first + spec.batch_size)
            streams = [stream(spec.seed, number) for number in numbers[part]]
            batch = _Batch(module, prompts[part], spec, frozenset(stops), streams)
            while not batch.is_done():
                batch.advance()
                yield not batch.is_done() or part.stop < len(prompts)
            answers.extend(batch.answers)

    module.gather_weights()
    with inference_mode(module.model_chunks, module.config):
        _run_together(passes(), bool(prompts), module)
    return answers


def _run_together(passes: Iterator[bool], more: bool, module: SFTGPT) -> None:
    """Run all passes, and idle ones while other ranks that share this rank's experts run theirs."""
    group = parallel_state.get_expert_model_parallel_group()
    while _is_true_on_any(more, group, module.device):
        if more:
            more = next(passes)
        else:
            context = StaticInferenceContext(1, 1)
            context.sequence_len_offset = 0
            _forward(module, torch.zeros(1, 1, dtype=torch.int64), 0, context)
    next(passes, None)  # answers of the last batch are collected behind its last pass


def _is_true_on_any(flag: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    if group.size() == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value)


class _Batch:
    """A batch of prompts and the state of their answers."""

    def __init__(
        self,
        module: SFTGPT,
        prompts: Sequence[Sequence[int]],
        spec: EvaluationSpec,
        stops: Collection[int],
        streams: Sequence[torch.Generator],
    ) -> None:
        self._module = module
        self._spec = spec
        self._stops = stops
        self._streams = streams
        self._lengths = [len(prompt) for prompt in prompts]
        size = max(self._lengths) + spec.max_new_tokens
        self._tokens = torch.zeros(len(prompts), size, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self._tokens[row, : len(prompt)] = torch.tensor(prompt)
        self.answers: list[list[int]] = [[] for _ in prompts]
        self._done = [False] * len(prompts)
        self._context = StaticInferenceContext(len(prompts), size)
        self._next = (0, min(self._lengths))
        """First and last position of the next pass, the last excluded."""

    def is_done(self) -> bool:
        """Whether all answers are complete."""
        return all(self._done)

    def advance(self) -> None:
        """Run one forward pass, and take the tokens that it gives."""
        begin, end = self._next
        self._context.sequence_len_offset = begin
        logits = _forward(self._module, self._tokens[:, begin:end], begin, self._context)
        self._take(end, self._choose(logits, end))
        self._next = (end, end + 1)

    def _choose(self, logits: Tensor | None, place: int) -> Tensor:
        """Return the token for `place` of each row whose answer has begun, 0 for the others.

        The last pipeline stage chooses and sends the tokens to the others.
        """
        answering = [not done and length <= place for done, length in zip(self._done, self._lengths, strict=True)]
        device = self._module.device
        chosen = torch.zeros(len(answering), dtype=torch.int64, device=device)
        if logits is not None:
            streams = [own if ours else None for own, ours in zip(self._streams, answering, strict=True)]
            if self._spec.repetition_penalty != 1.0:
                logits = penalized(logits, self._tokens[:, :place].to(device), self._spec.repetition_penalty)
            chosen.copy_(next_tokens(logits, self._spec, streams))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(chosen, last, group=parallel_state.get_pipeline_model_parallel_group())
        return chosen.cpu()

    def _take(self, place: int, chosen: Tensor) -> None:
        for row, token in enumerate(chosen.tolist()):
            if self._done[row] or place < self._lengths[row]:
                continue
            if token in self._stops:
                self._done[row] = True
                continue
            self.answers[row].append(token)
            self._tokens[row, place : place + 1] = token
            self._done[row] = len(self.answers[row]) == self._spec.max_new_tokens


def _forward(module: SFTGPT, tokens: Tensor, begin: int, context: StaticInferenceContext) -> Tensor | None:
    """Return the logits after the last of `tokens` [b, s], as [b, vocabulary], and None before the last stage.

    `begin` is the position of the first token.
    """
    rows, length = tokens.shape
    tokens = tokens.to(module.device)
    positions = torch.arange(begin, begin + length, device=module.device).expand(rows, -1)
    group = parallel_state.get_pipeline_model_parallel_group()
    output: Tensor
    for model_chunk in (model_chunk.module for model_chunk in module.model_chunks):
        if not model_chunk.pre_process:
            shape = (length, rows, module.config.hidden_size)
            received = torch.empty(shape, dtype=module.config.params_dtype, device=module.device)
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
            model_chunk.set_input_tensor(received)
        output = model_chunk(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        if model_chunk.post_process:
            return output[:, -1, : module.architecture.shape.vocab_size].float()
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
    return None
