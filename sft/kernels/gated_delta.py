"""The gated delta rule (arXiv:2412.06464): attention with a state of fixed size in place of keys and values.

Each head keeps a matrix S. A token with key k, value v, decay g <= 0 and learning rate beta replaces what S has under
its key: S <- exp(g) S, then S <- S + k (beta (v - S^T k))^T. Its output is S^T q / sqrt(dim). Queries and keys are
normed to length 1 first. The state begins at zero with each document.

Computed here in chunks: within one, the changes of all tokens are the solution of a triangular system, so that only one
step for each chunk remains sequential. All chunks of all documents are prepared together, and documents go through
their steps side by side. Everything is in fp32, the state included.

Rejected: to let documents follow one another in one row of chunks whose state is reset in between. It takes as many
steps as the row has chunks, and a chunk with the end of one document and the begin of the next needs masks of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.contract.versions import parse_version

Kernel = Literal["torch", "fla"]
"""The rule below, or the Triton kernels of the package flash-linear-attention."""

CHUNK = 64
"""Tokens of a chunk. Longer ones cost more in the triangular systems, shorter ones take more steps."""
_WRONG_ON_HOPPER = "3.4.0", "3.7.1"
"""From which version of Triton on, and up to which, the backward pass of flash-linear-attention is wrong there."""
_EPSILON = 1e-6
"""Added to squared lengths of queries and keys, as transformers does."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Where documents lie that follow one another without a gap, and how they are cut into chunks."""

    places: Tensor
    """Position of each token in its document, [t]."""
    size: int
    """Tokens of a chunk."""
    rows: Tensor
    """Row of each token among those of all chunks, [t]."""
    steps: tuple[int, ...]
    """How many documents have a first chunk, a second one, and so on. Chunks lie in this order, and within a step by
    document, the longest first, so that each step's documents are the first ones of the step before."""
    offsets: tuple[Tensor, Tensor]
    """int64: where the documents begin, and the end of the last, [documents + 1]; on the device and on the host."""
    order: Tensor
    """Rank of each document by length, the longest first, [documents]."""


@functools.lru_cache(maxsize=4)  # every layer asks for the same
def documents_of(lengths: tuple[int, ...], device: torch.device) -> Documents:
    """Return where documents of these lengths lie."""
    size = max(1, min(CHUNK, max(lengths)))
    sizes = torch.tensor(lengths, device="cpu")
    chunks = -(-sizes // size)
    rank = torch.empty_like(sizes)
    rank[sizes.argsort(descending=True, stable=True)] = torch.arange(len(lengths), device="cpu")
    steps = [int((chunks > step).sum()) for step in range(int(chunks.max()))]
    first = torch.tensor([0, *steps], device="cpu").cumsum(0)
    document = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), sizes)
    places = torch.arange(len(document), device="cpu") - (sizes.cumsum(0) - sizes)[document]
    rows = (first[places // size] + rank[document]) * size + places % size
    offsets = F.pad(sizes.cumsum(0), (1, 0))
    placed = (offsets.to(device), offsets)
    return Documents(places.to(device), size, rows.to(device), tuple(steps), placed, rank.to(device))


def fla_problem() -> str | None:
    """Return why the kernels of flash-linear-attention cannot be used on this machine, or None."""
    if not torch.cuda.is_available():
        return "they need a GPU"
    if importlib.util.find_spec("fla") is None:
        return "the package flash-linear-attention is not installed"
    return _wrong_triton() or _broken_fla()


def _wrong_triton() -> str | None:
    """Return why the installed Triton compiles wrong kernels here, or None."""
    # The package itself says so only in its first backward pass (issue 640 of its repository), and takes tilelang's
    # kernels for those of Triton where they are installed.
    if torch.cuda.get_device_capability()[0] != 9 or importlib.util.find_spec("tilelang") is not None:
        return None
    found = importlib.metadata.version("triton")
    first, mended = _WRONG_ON_HOPPER
    if not parse_version(first) <= parse_version(found) < parse_version(mended):
        return None
    return f"Triton {found} compiles its backward pass wrongly for Hopper GPUs; install {mended} or newer, or tilelang"


@functools.cache
def _broken_fla() -> str | None:
    try:
        importlib.import_module("sft.kernels.gated_delta_fla")
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # it compiles kernels as it is imported
        return f"the package flash-linear-attention cannot be imported ({type(error).__name__}: {error})"
    return None


def gated_convolution(x: Tensor, weight: Tensor, documents: Documents, *, kernel: Kernel = "torch") -> Tensor:
    """Return silu of the causal depthwise convolution of `x` [t, channels] with `weight` [channels, taps].

    Before a document there are zeros. The sum is in fp32, the output in the type of `x`.
    """
    if kernel == "fla":
        from sft.kernels import gated_delta_fla  # an optional package that takes seconds to import

        return gated_delta_fla.convolution(x, weight, documents.offsets)
    exact = torch.promote_types(x.dtype, torch.float32)
    wide, taps = x.to(exact), weight.to(exact)
    total = wide * taps[:, -1]
    for back in range(1, weight.size(1)):
        earlier = F.pad(wide, (0, 0, back, 0))[: len(x)]
        seen = (documents.places >= back).unsqueeze(1)
        total = total + torch.where(seen, earlier, 0.0) * taps[:, -1 - back]
    return F.silu(total).to(x.dtype)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    documents: Documents,
    state: Tensor | None = None,
    *,
    kernel: Kernel = "torch",
) -> tuple[Tensor, Tensor]:
    """Return the output [t, heads, value dim] in the type of `value`, and each document's last state.

    query and key [t, key heads, key dim], value [t, heads, value dim]; each key head serves as many heads, which follow
    one another. decay and beta [t, heads]. `state` is what the documents begin with, [documents, heads, key dim,
    value dim] in fp32, as the one returned; None is zero.
    """
    if kernel == "fla":
        from sft.kernels import gated_delta_fla  # an optional package that takes seconds to import

        return gated_delta_fla.rule(query, key, value, decay, beta, documents.offsets, state)
    exact = torch.promote_types(value.dtype, torch.float32)
    repeats = value.size(1) // key.size(1)
    query, key = (_normed(heads.to(exact)).repeat_interleave(repeats, dim=1) for heads in (query, key))
    query = query * key.size(-1) ** -0.5
    parts = (query, key, value.to(exact), decay.to(exact), beta.to(exact))
    token_chunks = _prepared(*(_in_chunks(part, documents) for part in parts))
    shape = (len(documents.order), value.size(1), key.size(-1), value.size(-1))
    begin = value.new_zeros(shape, dtype=exact) if state is None else state[documents.order.argsort()]
    outputs, ends = _through_chunks(token_chunks, documents.steps, begin)
    output = outputs.transpose(1, 2).flatten(0, 1).index_select(0, documents.rows)
    return output.to(value.dtype), ends[documents.order]


@dataclass(frozen=True, slots=True)
class _TokenChunks:
    """What the steps need of each chunk. [chunks, heads, tokens, dim] unless said otherwise."""

    query: Tensor
    """Decayed from the chunk's begin."""
    key: Tensor
    """Decayed to the chunk's end."""
    inside: Tensor
    """Scores of the tokens of the chunk, [..., tokens, tokens]."""
    change: Tensor
    """What the tokens add to an empty state under their keys ..."""
    read: Tensor
    """... less the products of these with the state."""
    decay: Tensor
    """Of the whole chunk, [chunks, heads, 1, 1]."""

    def by_step(self, steps: tuple[int, ...]) -> Iterator[_TokenChunks]:
        """Yield the chunks of each step."""
        parts = (self.query, self.key, self.inside, self.change, self.read, self.decay)
        # Split at once: the backward pass of a slice fills a tensor of all chunks, and does so in every step.
        yield from map(_TokenChunks, *(part.split(list(steps)) for part in parts))


def _prepared(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> _TokenChunks:
    """Return what depends on each chunk alone, from [chunks, heads, tokens, dim] and [chunks, heads, tokens]."""
    total = _running_sum(decay)
    tokens = total.size(-1)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=total.device).triu(1)
    # Masked before the exponential: what comes later would overflow.
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    from_begin = total.exp().unsqueeze(-1)
    written = key * beta.unsqueeze(-1)
    wanted = torch.cat([value * beta.unsqueeze(-1), written * from_begin], dim=-1)
    system = (written @ key.mT) * between
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    change, read = solved.split([value.size(-1), key.size(-1)], dim=-1)
    return _TokenChunks(
        query=query * from_begin,
        key=key * (total[..., -1:] - total).exp().unsqueeze(-1),
        inside=(query @ key.mT) * between,
        change=change,
        read=read,
        decay=total[..., -1:, None].exp(),
    )


def _through_chunks(token_chunks: _TokenChunks, steps: tuple[int, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of all chunks and the last states, from the states that the documents begin with."""
    outputs, ended = [], []
    for chunks in token_chunks.by_step(steps):
        count = len(chunks.query)
        if count < len(state):
            state, rest = state[:count], state[count:]
            ended.append(rest)
        change = chunks.change - chunks.read @ state
        outputs.append(chunks.query @ state + chunks.inside @ change)
        state = state * chunks.decay + chunks.key.mT @ change
    return torch.cat(outputs), torch.cat([state, *reversed(ended)])


def _in_chunks(x: Tensor, documents: Documents) -> Tensor:
    """Return [t, heads, ...] as [chunks, heads, tokens, ...], with zeros, which change nothing, behind documents."""
    rows = sum(documents.steps) * documents.size
    padded = x.new_zeros(rows, *x.shape[1:]).index_copy(0, documents.rows, x)
    return padded.view(-1, documents.size, *x.shape[1:]).transpose(1, 2)


def _running_sum(x: Tensor) -> Tensor:
    """Return the running sums over the last axis: `cumsum`, which torch refuses in deterministic runs on a GPU."""
    step = 1
    while step < x.size(-1):
        x = x + F.pad(x[..., :-step], (step, 0))
        step *= 2
    return x


def _normed(heads: Tensor) -> Tensor:
    length = heads.square().sum(-1, keepdim=True) + _EPSILON
    return heads * length.rsqrt()
