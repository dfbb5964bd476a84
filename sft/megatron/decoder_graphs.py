"""The layers of a small model as CUDA graphs, so that the host does not launch their kernels one by one.

A layer has some fifty launches, forward and backward, for which a host takes 1 to 4 ms. Where a GPU computes the layer
in less it waits. A graph is recorded once, and launched by one call.

A graph repeats the same kernels on the same memory, so that everything in it has a fixed size. Packed rows are filled
up to one of a few forms (`RowForm`): tokens behind the last document have states of 0 and get gradients of 0, and so
add nothing to any weight's gradient. Numbers of documents and their offsets are read on the device.

The first row of a form is computed without a graph, which compiles kernels and lets libraries choose theirs; the second
is recorded. All graphs share one pool of memory: a row is forward and backward before the next one begins, so that what
one graph keeps in between is free for the others. That is why a pipeline's stage, which has several micro-batches at a
time, has no graphs.

Megatron-core has graphs of its own, layer by layer, for rows of one length without packing; torch's
`make_graphed_callables` returns the gradient of every weight, where ours are added to Megatron-core's buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle

from launcher.contract.divisors import rounded_up
from sft.kernels.autograd import Context
from sft.kernels.gradient_buffer import GradientBuffer, always_added, announce, buffer_of, has_gradient
from sft.megatron.core import DistributedDataParallel
from sft.megatron.layers.packed_rows import PackedSequences
from sft.megatron.layers.weights_in_use import await_weights

_MOST_FORMS = 32
"""Rows of further forms are computed without graphs: each graph has some MiB of the driver's memory."""
_ROOM = 1.5
"""Memory of a row over what the layers keep for its backward pass, which itself needs some."""
_GIB = 2**30
_SEGMENTS = 4
"""Parts of the layers with graphs of their own where gradients are reduced behind the backward pass: those of a part
are ready when its graph has been launched."""

StandIns = Sequence[dict[str, Tensor]]
"""For each layer by the weights' names; empty for the weights themselves."""


@dataclass(frozen=True, slots=True)
class RowForm:
    """What a graph fixes of a packed row."""

    tokens: int
    documents: int
    longest: int
    """No document has more tokens."""
    equal: bool = False
    """Whether all documents have exactly `longest` tokens, for which attention has a faster kernel."""

    @classmethod
    def of(cls, lengths: Sequence[int]) -> RowForm:
        """Return the form that a row of sequences of these lengths is filled up to."""
        tokens, longest = sum(lengths), max(lengths)
        filled = rounded_up(tokens, max(64, _power_of_two(tokens) // 16))
        # A sequence has any length: rows of one sequence each would have as many forms.
        if min(lengths) == longest and (len(lengths) > 1 or filled == tokens):
            return cls(tokens, len(lengths), longest, equal=True)
        # What fills the row up is one more sequence.
        documents, longest = max(len(lengths) + 1, 16), max(longest, filled - tokens, 1024)
        return cls(filled, _power_of_two(documents), _power_of_two(longest))

    def sequences(self, offsets: Tensor, positions: Tensor) -> PackedSequences:
        """Return what layers must know of a row of this form, whose lengths on the host are made up."""
        lengths = (self.longest,) * self.documents if self.equal else (self.longest, 0)
        return PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
            seq_lengths=lengths,
            positions=positions,
        )

    def widened(self, rows: PackedSequences) -> PackedSequences:
        """Return `rows` with the longest sequence of the form, for which tables of angles are made."""
        assert rows.positions is not None
        return self.sequences(rows.cu_seqlens_q, rows.positions)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


class Inputs:
    """The memory that a graph reads: states, offsets and positions of a row."""

    def __init__(self, form: RowForm, hidden: Tensor) -> None:
        self.form = form
        self.hidden = hidden.new_zeros(form.tokens, *hidden.shape[1:])
        self.offsets = torch.full((form.documents + 1,), form.tokens, dtype=torch.int32, device=hidden.device)
        self.positions = torch.zeros(form.tokens, dtype=torch.int64, device=hidden.device)

    def fill(self, hidden: Tensor, rows: PackedSequences) -> None:
        """Copy a row, and what fills it up, into the memory."""
        assert rows.positions is not None
        for memory, values, rest in (
            (self.hidden, hidden, 0),
            (self.offsets, rows.cu_seqlens_q, self.form.tokens),
            (self.positions, rows.positions, 0),
        ):
            _fill(memory, values, rest)

    @property
    def sequences(self) -> PackedSequences:
        """What layers must know of the row."""
        return self.form.sequences(self.offsets, self.positions)


def _fill(memory: Tensor, values: Tensor, rest: int) -> None:
    """Copy `values` into the first rows of `memory`, and `rest` into the others."""
    count = len(values)
    memory[:count].copy_(values)
    if count < len(memory):
        memory[count:].fill_(rest)


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers one after the other, and what to tell when their gradients have been added."""

    layers: Sequence[Module]
    weights: Sequence[Parameter]
    """Those that are trained."""
    hooks: Sequence[Callable[[], None]]
    """Megatron-core's hook on each weight, where gradients are reduced behind the backward pass; else none."""

    def run(self, hidden: Tensor, angles: Tensor | None, rows: PackedSequences, stand_ins: StandIns = ()) -> Tensor:
        """Return the states behind the last layer, [s, b, h], computed with `stand_ins` in place of weights."""
        for index, layer in enumerate(self.layers):
            own = {"attention_mask": None, "rotary_pos_emb": angles, "packed_seq_params": rows}
            given = stand_ins[index] if stand_ins else {}
            hidden, _ = functional_call(layer, given, kwargs={"hidden_states": hidden, **own})
        return hidden

    def have_gradients(self, added: Added) -> None:
        """Say of each weight that its gradient of this row is in the buffer, and whether a kernel has added it."""
        for weight, by_kernel in zip(self.weights, added.by_kernels, strict=True):
            if by_kernel:
                _buffer(weight).mark()
        # As without a graph: another rank may have none for its row, and buckets are reduced in the order they fill.
        for number in added.order if self.hooks else ():
            announce(self.weights[number], self.hooks[number])


@dataclass(frozen=True, slots=True)
class Added:
    """How a backward pass has added the gradients of a segment's weights."""

    by_kernels: Sequence[bool]
    """For each weight, whether a kernel adds its gradient; autograd brings those of norms and biases."""
    order: Sequence[int]
    """The weights' numbers, in the order in which autograd has their gradients."""


def stand_ins_of(layers: Iterable[Module]) -> StandIns:
    """Return parameters with the memory and the buffers of what is trained, for use while a graph is recorded.

    Megatron-core keeps the node in which autograd accumulates a weight's gradient, which belongs to the stream that it
    was made in; no recording can wait for another stream.
    """
    return [{name: _stand_in(weight) for name, weight in trained_of(layer)} for layer in layers]


def trained_of(layer: Module) -> Iterator[tuple[str, Parameter]]:
    """Yield the weights of a layer that are trained, with their names."""
    return ((name, weight) for name, weight in layer.named_parameters() if weight.requires_grad)


def _stand_in(weight: Parameter) -> Parameter:
    own = Parameter(weight.detach())
    own.__dict__.update(weight.__dict__, grad_added_to_main_grad=False)
    return own


def _buffer(weight: Tensor) -> GradientBuffer:
    buffer = buffer_of(weight)
    assert buffer is not None
    return buffer


class Passes:
    """Forward and backward pass over segments, part by part, by what a graph repeats."""

    def __init__(self, segments: Sequence[Segment], inputs: Inputs, angles: Tensor | None) -> None:
        self._segments, self._inputs, self._angles = segments, inputs, angles
        self._stand_ins = [stand_ins_of(segment.layers) for segment in segments]
        self._begins: list[Tensor] = []
        self._ends: list[Tensor] = []
        self.added: dict[int, Added] = {}
        """By part."""

    def forward(self, part: int) -> Tensor:
        """Return the states behind a part, whose predecessor has been computed."""
        before = self._ends[-1] if part else self._inputs.hidden
        self._begins.append(before.detach().requires_grad_())
        rows, stand_ins = self._inputs.sequences, self._stand_ins[part]
        self._ends.append(self._segments[part].run(self._begins[part], self._angles, rows, stand_ins))
        return self._ends[part].detach()

    def backward(self, part: int, grad: Tensor) -> Tensor:
        """Add the gradients of a part's weights to their buffers, and return that of its input, from its output's."""
        weights = [weight for layer in self._stand_ins[part] for weight in layer.values()]
        order: list[int] = []
        notes = [_noted(weight, order, number) for number, weight in enumerate(weights)]
        with always_added():
            own, *of_weights = torch.autograd.grad(
                self._ends[part], [self._begins[part], *weights], grad, allow_unused=True
            )
        for note in notes:
            note.remove()
        self.added[part] = Added([has_gradient(weight) for weight in weights], order)
        for weight, gradient in zip(weights, of_weights, strict=True):
            if gradient is not None and not has_gradient(weight):
                _buffer(weight).values.add_(gradient)
        return own


def _noted(weight: Tensor, order: list[int], number: int) -> RemovableHandle:
    """Append a weight's number to `order` when autograd has its gradient.

    The hook knows nothing else: in a cycle of references what a graph keeps would not be freed for the next one.
    """

    def note(_: Tensor) -> None:
        order.append(number)

    handle: RemovableHandle = weight.register_hook(note)  # type: ignore[no-untyped-call]
    return handle


class Recorded:
    """The graphs of one form: forward and backward of each segment."""

    def __init__(self, form: RowForm, hidden: Tensor, angles: Tensor | None, decoder: DecoderGraphs) -> None:
        self.inputs = Inputs(form, hidden)
        self._segments = decoder.segments
        self._angles = None if angles is None else angles.clone()
        self.output, self.output_grad, self.input_grad = self._record(decoder)

    def _record(self, decoder: DecoderGraphs) -> tuple[Tensor, Tensor, Tensor]:
        """Record all graphs, without computing anything, and return output, its gradient, and that of the input."""
        passes = Passes(self._segments, self.inputs, self._angles)
        parts = range(len(self._segments))
        self._forward, self._backward = ([torch.cuda.CUDAGraph() for _ in parts] for _ in range(2))
        for part in parts:
            with _recording(self._forward[part], decoder.pool):
                output = passes.forward(part)
        output_grad = grad = torch.zeros_like(output)
        for part in reversed(parts):
            with _recording(self._backward[part], decoder.pool):
                grad = passes.backward(part, grad)
        self._added = passes.added
        return output, output_grad, grad

    def forward(self) -> None:
        """Compute the output of what is in the inputs' memory."""
        for graph in self._forward:
            graph.replay()

    def backward(self) -> None:
        """Compute the gradient of the input from that of the output, and add those of weights to their buffers."""
        for part in reversed(range(len(self._segments))):
            self._backward[part].replay()
            self._segments[part].have_gradients(self._added[part])


def _recording(graph: torch.cuda.CUDAGraph, pool: Any) -> torch.cuda.graph:
    # Other threads, NCCL's watchdog among them, may ask the device things that a recording thread may not.
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


class DecoderGraphs:
    """The layers of a decoder, by graphs where there are some for a row."""

    def __init__(self, layers: Sequence[Module], ddp: DistributedDataParallel, *, required: bool = False) -> None:
        """Take the layers that `ddp` is around. `required` says to fail rather than to go on without graphs."""
        self._required = required
        reduces_behind = ddp.ddp_config.overlap_grad_reduce
        count = min(_SEGMENTS if reduces_behind else 1, len(layers))
        ends = [len(layers) * part // count for part in range(count + 1)]
        self.segments = [_segment(layers[first:last], ddp, reduces_behind) for first, last in pairwise(ends)]
        self._modules = [module for layer in layers for module in layer.modules()]
        self._used: dict[Module, None] = {}
        """The modules, in the order in which a row without a graph waits for their weights. Each wait starts to gather
        the next ones, and ranks with and without a graph must gather in the same order."""
        self._waits_for_weights = ddp.ddp_config.overlap_param_gather
        self._kept: dict[RowForm, int] = {}
        """Bytes that the layers keep for the backward pass, of each form that has been computed."""
        self.recorded: dict[RowForm, Recorded] = {}
        self._failed = False
        self._told = False

    @cached_property
    def pool(self) -> Any:
        """The memory of all graphs."""
        return torch.cuda.graph_pool_handle()

    def __call__(self, hidden: Tensor, angles: Tensor | None, rows: PackedSequences, form: RowForm) -> Tensor:
        """Return the states behind the layers, [t, 1, h], of states of that shape.

        `angles` are those of positions up to the form's longest sequence. What is returned lies in a graph's memory,
        which the next row overwrites.
        """
        if form not in self.recorded and not self._record(hidden, angles, form):
            return self._without_graph(hidden, angles, rows, form)
        if self._waits_for_weights:
            for module in self._used:
                await_weights(module)
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()  # that of frozen embeddings: without one, backward would not come
        output: Tensor = _Replay.apply(hidden, rows, self.recorded[form])  # type: ignore[no-untyped-call]
        return output

    def _record(self, hidden: Tensor, angles: Tensor | None, form: RowForm) -> bool:
        """Record the graphs of a form that has been computed, if there is room, and return whether that went well."""
        if form not in self._kept or not self._has_room(form, hidden.device):
            return False
        try:
            self.recorded[form] = Recorded(form, hidden, angles, self)
        except RuntimeError as error:  # what torch raises of anything that cannot be recorded, and of too little memory
            if self._required:
                raise
            self._failed = True
            print(f"layers are launched without CUDA graphs, which cannot be recorded here: {error}", flush=True)
        return not self._failed

    def _without_graph(self, hidden: Tensor, angles: Tensor | None, rows: PackedSequences, form: RowForm) -> Tensor:
        """Compute what a graph of the form will."""
        before = torch.cuda.memory_allocated()
        inputs = Inputs(form, hidden)
        inputs.fill(hidden.detach(), rows)
        count = len(hidden)
        states = F.pad(hidden, (0, 0, 0, 0, 0, form.tokens - count))
        with nullcontext(self._used) if self._used else _noting_uses(self._modules) as self._used:
            for segment in self.segments:
                states = segment.run(states, angles, inputs.sequences)
        self._kept[form] = torch.cuda.memory_allocated() - before
        return states[:count]

    def _has_room(self, form: RowForm, device: torch.device) -> bool:
        """Return whether there is memory to record one more graph, and say so once if there is not."""
        if self._failed or len(self.recorded) == _MOST_FORMS:
            return False
        # Graphs share one pool, as large as the largest needs it, and rows of forms without a graph cannot use it.
        of_graphs, of_rows = max(self._kept[each] for each in (*self.recorded, form)), max(self._kept.values())
        needed, free = _ROOM * (of_graphs + of_rows) + _GIB, free_memory(device)
        if needed > free and not self._told:
            self._told = True
            sizes = f"need {needed / _GIB:.1f} GiB of memory, and {free / _GIB:.1f} are free"
            graphs = f"CUDA graphs of up to {form.tokens:,} tokens, and rows without one beside them,"
            print(f"{graphs} {sizes}: layers of so many tokens are launched without one", flush=True)
        return needed <= free


@contextmanager
def _noting_uses(modules: Iterable[Module]) -> Iterator[dict[Module, None]]:
    """Note modules as they, or their weights alone, are used."""
    used: dict[Module, None] = {}

    def note(module: Module, _: object) -> None:
        used[module] = None

    notes = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield used
    finally:
        for each in notes:
            each.remove()


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that nothing uses, with those that torch's allocator and the graphs' pool reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _segment(layers: Sequence[Module], ddp: DistributedDataParallel, reduces_behind: bool) -> Segment:
    weights = [weight for layer in layers for _, weight in trained_of(layer)]
    # The hooks as Megatron-core makes them: what they call to start a bucket's reduction differs between versions.
    hooks = [ddp._make_backward_post_hook(weight) for weight in weights] if reduces_behind else []
    return Segment(layers, weights, hooks)


class _ReplayContext(Context):
    recorded: Recorded
    count: int


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ReplayContext, hidden: Tensor, rows: PackedSequences, recorded: Recorded) -> Tensor:
        recorded.inputs.fill(hidden, rows)
        recorded.forward()
        ctx.recorded, ctx.count = recorded, len(hidden)
        return recorded.output[: len(hidden)]

    @staticmethod
    def backward(ctx: _ReplayContext, grad: Tensor) -> tuple[Tensor, None, None]:
        recorded = ctx.recorded
        _fill(recorded.output_grad, grad, 0)
        recorded.backward()
        return recorded.input_grad[: ctx.count], None, None
