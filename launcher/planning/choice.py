"""Choose one of the layouts that fit: of those that are fast within the model's error, the simplest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.contract.config.load import LoadedConfig, value_at
from launcher.contract.cost_model.predict import Candidate
from launcher.contract.errors import TopologyError
from launcher.contract.hardware import GpuKind
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec
from launcher.contract.topology import build_topology
from launcher.planning.run_plan import estimate, nothing_fits
from launcher.planning.search import SearchResult, recompute_order, search_layouts

MODEL_ERROR = 0.03
"""Layouts whose predicted speeds differ by at most this part of the fastest one's are taken for equally fast.

Predictions for one model on one kind of GPU are off by much the same part under every layout, and so compare layouts
better than they predict each. Over all pairs of measured rows that differ in their layout alone, the predicted ratio of
speeds is off by 2.8 % (root mean square; docs/explanation/planning.md). A test holds this figure to those rows."""

_KEPT_WITH_SIZES = ("train.micro_batch_size", "train.recompute", "train.recompute_layers")
_KEPT_WITH_AUTO = (
    "topology.sequence_parallel",
    "topology.expert_parallel",
    "topology.expert_tensor_parallel",
    *_KEPT_WITH_SIZES,
)
"""Keys that a config may set beside `topology: auto`, and which the choice then keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What `topology: auto` takes."""

    taken: Candidate
    fastest: Candidate
    """By prediction, of the layouts that keep what the config sets."""
    kept: tuple[str, ...]
    """The keys of the config that were kept."""
    why: str
    """Why it is this one, in a few words."""

    @property
    def slower(self) -> float:
        """By what part it is slower than the fastest, by prediction."""
        return 1 - self.taken.tokens_per_second / self.fastest.tokens_per_second


def kept_keys(config: LoadedConfig) -> tuple[str, ...]:
    """Return the keys that the user has set and that a choice keeps.

    Where the config has sizes in place of `auto`, those of the topology are what the choice would replace.
    """
    keys = _KEPT_WITH_AUTO if config.auto_topology else _KEPT_WITH_SIZES
    return tuple(key for key in keys if config.sources[key] != "default")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The layouts for one number of GPUs, and which of them `topology: auto` takes."""

    spec: RunSpec
    result: SearchResult
    """All layouts, also those that do not keep what the config sets."""
    choice: Choice | str
    """Or why `auto` takes none."""
    own: Candidate | str | None = None
    """The layout that the config's own sizes make, or the rules that they break; None where it says `auto`."""


def own_layout(spec: RunSpec, shape: ModelShape, gpu: GpuKind) -> Candidate | str:
    """Return what is predicted of the config's own sizes, or which rules they break."""
    try:
        return estimate(spec, build_topology(spec, shape), shape, gpu)
    except TopologyError as error:
        return "; ".join(error.problems)


def plan_layouts(spec: RunSpec, shape: ModelShape, gpu: GpuKind, kept: Sequence[str]) -> Plan:
    """Return the layouts of a run, and the one that `topology: auto` takes if it keeps these keys of the config."""
    result = search_layouts(spec, shape, gpu)
    found = search_layouts(spec, shape, gpu, kept) if kept else result
    choice = simplest(found.fitting, kept) if found.fitting else _none_fits(spec, found, result, kept)
    return Plan(spec=spec, result=result, choice=choice)


def _none_fits(spec: RunSpec, found: SearchResult, free: SearchResult, kept: Sequence[str]) -> str:
    """Return why no layout fits that keeps what the config sets, and what to leave out."""
    given = " and ".join(f"{key} {value_at(spec, key)}" for key in kept)
    if not free.fitting:
        return nothing_fits(spec, free)
    layout = simplest(free.fitting, ()).taken.layout.describe()
    return (
        f"no layout that fits has {given} ({nothing_fits(spec, found)}); {layout} fits: leave {' and '.join(kept)} out"
    )


def simplest(fitting: Sequence[Candidate], kept: Sequence[str]) -> Choice:
    """Return the simplest of the layouts that are about as fast as the first one, which is the fastest."""
    fastest = fitting[0]
    least = (1 - MODEL_ERROR) * fastest.tokens_per_second
    taken = min((one for one in fitting if one.tokens_per_second >= least), key=_complexity)
    return Choice(taken=taken, fastest=fastest, kept=tuple(kept), why=_why(taken, fastest, kept))


def _complexity(candidate: Candidate) -> tuple[float, ...]:
    """Return a key that sorts simple layouts first.

    Fewer kinds of parallelism beside data parallelism come first, then fewer ranks that hold the model together, fewer
    stages and model chunks, nothing computed again, and last more memory left and more speed.
    """
    return (*(value for value, _, _ in _aspects(candidate)), -candidate.tokens_per_second)


def _aspects(candidate: Candidate) -> list[tuple[float, str, str]]:
    """Return what makes a layout simple, most important first: a number, and words for a layout with less of it.

    The last text is the number as people read it.
    """
    topology, recompute = candidate.layout.topology, candidate.layout.recompute
    tensor, stages, chunks = topology.tensor_parallel, topology.pipeline_parallel, topology.virtual_pipeline
    experts, cut = topology.expert_parallel, topology.expert_tensor_parallel
    kinds = sum(size > 1 for size in (tensor, stages, experts))
    return [
        (kinds, "fewer kinds of model parallelism", str(kinds)),
        (tensor * stages, "fewer ranks that hold the model together", str(tensor * stages)),
        (stages, "fewer pipeline stages", str(stages)),
        (chunks, "fewer model chunks on a stage", str(chunks)),
        (experts, "less expert parallelism", str(experts)),
        (cut != tensor, "experts that are shared as all else is", f"{cut} ranks an expert"),
        (recompute_order(recompute), "less that is computed again", recompute),
        (round(candidate.memory.total, 1), "less memory needed", f"{candidate.memory.total:.1f} GiB"),
    ]


def _why(taken: Candidate, fastest: Candidate, kept: Sequence[str]) -> str:
    """Return why this layout was taken and not the fastest, by the first aspect in which they differ."""
    of = f" of those with the config's {' and '.join(kept)}" if kept else ""
    if taken is fastest:
        return f"the fastest{of} by prediction, and none within {MODEL_ERROR:.0%} of it is simpler"
    loss = 1 - taken.tokens_per_second / fastest.tokens_per_second
    less = f"{loss:.1%} slower by prediction than {fastest.layout.describe()}{f', the fastest{of}' if of else ''}"
    for (mine, words, shown), (theirs, _, other) in zip(_aspects(taken), _aspects(fastest), strict=True):
        if mine != theirs:
            return f"{less}, which within {MODEL_ERROR:.0%} says nothing, and simpler: {words} ({shown}, not {other})"
    return f"{less}, and as simple"
