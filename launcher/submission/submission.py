"""What a command knows before it submits: the checked config, its topology and the directory of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.config.load import LoadedConfig, load_config
from launcher.contract.cost_model.predict import Candidate
from launcher.contract.errors import TopologyError
from launcher.contract.gguf_shape import read_gguf_shape
from launcher.contract.hardware import GpuKind
from launcher.contract.leaves import Source
from launcher.contract.model_shape import ModelShape, read_model_shape
from launcher.contract.nemo.checkpoint import is_checkpoint, read_shape
from launcher.contract.nemo.described import check_described
from launcher.contract.package_files import package_file
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import RunSpec, read_resolved
from launcher.contract.topology import Topology, build_topology
from launcher.planning.choice import kept_keys, plan_layouts
from launcher.planning.run_plan import check_fit, estimate, gpu_of, unknown_gpu
from launcher.planning.variants import with_layout
from launcher.submission.early_refusal import check_early


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A run that could be submitted."""

    config: LoadedConfig
    topology: Topology
    paths: RunPaths
    prediction: Candidate | None
    """Memory and speed of the topology; None without GPUs, or where their kind is not known."""
    candidate: str = ""
    """Its name in a race with other clusters or partitions (launcher.contract.race); empty where there is none."""

    @property
    def spec(self) -> RunSpec:
        """The resolved config."""
        return self.config.spec


def make_submission(
    path: Path,
    overrides: Sequence[str] = (),
    cluster: str | None = None,
    *,
    resolved: bool = False,
    given: Collection[str] | None = None,
) -> Submission:
    """Load and check everything that can be checked without a scheduler."""
    config = load_config(path, overrides, cluster, resolved=resolved, given=given)
    shape, gpu = model_shape_of(config.spec), gpu_of(config.spec)
    if config.described is not None:
        check_described(config.described, shape, str(config.path), config.spec.model.path)
    if config.auto_topology:
        config = with_best_topology(config, shape, gpu)
    spec = config.spec
    topology = build_topology(spec, shape)
    check_early(spec, config.fetches)
    prediction = None
    if gpu is not None:
        prediction = estimate(spec, topology, shape, gpu)
        if spec.topology.check_memory:
            check_fit(spec, prediction, shape, gpu)
    return Submission(
        config=config, topology=topology, paths=RunPaths(Path(spec.run_root) / spec.name), prediction=prediction
    )


def with_best_topology(config: LoadedConfig, shape: ModelShape, gpu: GpuKind | None) -> LoadedConfig:
    """Return the config with the topology that `auto` takes, which keeps what the user has set.

    The sources of what it has taken say `plan`.
    """
    if gpu is None:
        raise TopologyError(f"topology: auto: {unknown_gpu(config.spec)}; or give the sizes themselves")
    kept = kept_keys(config)
    choice = plan_layouts(config.spec, shape, gpu, kept).choice
    if isinstance(choice, str):
        raise TopologyError(f"topology: auto: {choice}")
    taken = choice.taken
    chosen: dict[str, Source] = {key: "plan" for key in taken.overrides if key not in kept}
    return dataclasses.replace(
        config, spec=with_layout(config.spec, taken), sources={**config.sources, **chosen}, auto_topology=False
    )


def model_shape_of(spec: RunSpec) -> ModelShape:
    """Return the model's sizes. Raise ModelError where they cannot be read."""
    packaged = package_file(spec.model.path) if spec.model.path.startswith("package:") else None
    path = packaged or Path(spec.model.path)
    if not path.exists() and spec.after_directory is not None and spec.comes_later(spec.model.path):
        # The run that will write the model starts from one of the same sizes.
        return model_shape_of(read_resolved(RunPaths(spec.after_directory).config))
    if path.suffix == ".gguf":
        return read_gguf_shape(path)
    if is_checkpoint(path):
        return read_shape(path)
    return read_model_shape(path)
