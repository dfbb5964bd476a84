"""plan: which layouts a run could have, before one is queued."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.errors import ConfigError

if TYPE_CHECKING:
    from launcher.contract.cost_model.predict import Candidate
    from launcher.contract.spec import RunSpec
    from launcher.planning.choice import Choice
    from launcher.planning.choice import Plan as Planned
    from launcher.planning.run_plan import RunCost
    from launcher.planning.search import SearchResult

_MOST_GPUS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The memory of one pipeline stage's GPUs, in GiB."""

    stage: int
    """Number of the stage, from 0."""
    weights: float
    """Parameters."""
    gradients: float
    """Gradients."""
    optimizer: float
    """States of the optimizer."""
    activations: float
    """Activations that wait for their backward pass."""
    logits: float
    """Logits and what the loss needs."""
    overhead: float
    """CUDA, communicators and what the allocator cannot use."""
    total: float
    """All of it."""
    layers: tuple[int, ...]
    """Layers of each model chunk of the stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One layout that fits."""

    overrides: Mapping[str, int | str | bool]
    """Config key to the value that makes this layout: what to hand to `submit`."""
    data_parallel: int
    """Replicas that share a batch."""
    tokens_per_second: float
    """Predicted, of all GPUs."""
    mfu: float
    """Predicted share of the GPUs' peak that the model's own products take."""
    step_seconds: float
    """Predicted seconds of one optimizer step."""
    step_parts: Mapping[str, float]
    """What a step spends its seconds on."""
    stages: tuple[Stage, ...]
    """Memory of each pipeline stage."""
    cost: RunCost | None
    """Of the whole run, where its length is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What `topology: auto` takes of the layouts that fit: of about equally fast ones the simplest."""

    layout: Layout
    """The layout."""
    slower: float
    """By what part it is slower, by prediction, than the fastest that keeps what the config sets."""
    why: str
    """Why it is this one."""
    kept: tuple[str, ...]
    """Keys that the config sets and that were kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenRule:
    """Sizes that were left out, and the rule that they break."""

    sizes: str
    """The parallel sizes."""
    rule: str
    """The rule, with its arithmetic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSize:
    """The layouts for one number of GPUs."""

    gpus: int
    """Number of GPUs."""
    gpu: str
    """Their kind."""
    tokens_per_step: float
    """Tokens of one optimizer step, of the whole batch."""
    layouts: tuple[Layout, ...]
    """The fastest ones that fit, fastest first."""
    auto: Taken | None
    """What `topology: auto` takes; null where nothing fits that keeps what the config sets."""
    config: Layout | None
    """The layout that the config's own sizes make; null where it says `topology: auto`, or where they break a rule."""
    fitting: int
    """How many layouts fit."""
    too_large: int
    """How many keep the rules and do not fit."""
    rules_broken: tuple[BrokenRule, ...]
    """What breaks a rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What was found for each number of GPUs."""

    searches: tuple[Planned, ...]
    top: int
    """Layouts to list of each number of GPUs."""

    @property
    def fits(self) -> bool:
        """Whether any layout fits."""
        return any(search.result.fitting for search in self.searches)

    def answer(self) -> tuple[PlannedSize, ...]:
        """Return what programs are told, with figures in GiB, seconds and tokens/s."""
        return tuple(_planned(search, self.top) for search in self.searches)


def plan(
    config: Path | str,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    gpus: str | None = None,
    top: int | None = None,
) -> Plan:
    """Search the layouts of a config's model on its cluster's GPUs.

    `gpus` is a number, or a range A..B for A, 2A, 4A ... B; by default it is the config's own. `top` is how many
    layouts to list of each number, by default 5, or 1 of several. Raise ConfigError where nothing can be planned.
    """
    from launcher.contract.config.load import load_config
    from launcher.planning.choice import kept_keys, own_layout, plan_layouts
    from launcher.planning.run_plan import gpu_of, unknown_gpu
    from launcher.planning.search import with_gpus
    from launcher.submission.early_model import check_model
    from launcher.submission.submission import model_shape_of

    loaded = load_config(Path(config), overrides, cluster)
    spec, kept = loaded.spec, kept_keys(loaded)
    shape, gpu = model_shape_of(spec), gpu_of(spec)
    if gpu is None:
        raise ConfigError(unknown_gpu(spec))
    check_model(spec)
    variants = [with_gpus(spec, size) for size in (_sizes(gpus) if gpus else [spec.resources.world_size])]
    searches = tuple(plan_layouts(variant, shape, gpu, kept) for variant in variants)
    if not loaded.auto_topology:
        searches = tuple(replace(search, own=own_layout(search.spec, shape, gpu)) for search in searches)
    return Plan(searches=searches, top=top or (5 if len(searches) == 1 else 1))


def _planned(search: Planned, top: int) -> PlannedSize:
    from launcher.contract.cost_model.predict import Candidate

    spec, result = search.spec, search.result
    return PlannedSize(
        gpus=spec.resources.world_size,
        gpu=result.gpu.name,
        tokens_per_step=result.workload.tokens,
        layouts=tuple(_layout(spec, result, candidate) for candidate in result.fitting[:top]),
        auto=None if isinstance(search.choice, str) else _taken(spec, result, search.choice),
        config=_layout(spec, result, search.own) if isinstance(search.own, Candidate) else None,
        fitting=len(result.fitting),
        too_large=len(result.too_large),
        rules_broken=tuple(BrokenRule(sizes=sizes, rule=rule) for sizes, rule in result.broken),
    )


def _taken(spec: RunSpec, result: SearchResult, choice: Choice) -> Taken:
    layout = _layout(spec, result, choice.taken)
    return Taken(layout=layout, slower=choice.slower, why=choice.why, kept=choice.kept)


def _layout(spec: RunSpec, result: SearchResult, candidate: Candidate) -> Layout:
    from launcher.contract.cost_model.memory import pipeline_memory
    from launcher.planning.run_plan import run_cost

    stages = pipeline_memory(result.workload, candidate.layout, result.implementation)
    return Layout(
        overrides=candidate.overrides,
        data_parallel=candidate.layout.topology.data_parallel,
        tokens_per_second=candidate.tokens_per_second,
        mfu=candidate.mfu,
        step_seconds=candidate.time.total,
        step_parts=dict(candidate.time.parts()),
        stages=tuple(
            Stage(
                stage=stage.stage,
                weights=stage.weights,
                gradients=stage.gradients,
                optimizer=stage.optimizer,
                activations=stage.activations,
                logits=stage.logits,
                overhead=stage.overhead,
                total=stage.total,
                layers=tuple(len(chunk) for chunk in candidate.layout.topology.layers_of(stage.stage)),
            )
            for stage in stages
        ),
        cost=run_cost(spec, candidate),
    )


def _sizes(words: str) -> list[int]:
    """Return the numbers in `16` or in `8..1024`, which doubles."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", words)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= _MOST_GPUS:
        raise ConfigError(f"--gpus {words}: give a number, or a range such as 8..1024, up to {_MOST_GPUS:,}")
    sizes = []
    while first <= last:
        sizes.append(first)
        first *= 2
    return sizes
