"""resources: what is asked of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from launcher.contract.spec.rules import MEMORY, SBATCH_OPTION, TIME_LIMIT, AtLeast


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesSpec:
    """What the run asks the scheduler for. Unset values come from the `resources` section of the cluster file."""

    nodes: Annotated[int, AtLeast(1)] = 1
    """Number of nodes."""
    spare_nodes: Annotated[int, AtLeast(0)] = 0
    """Further nodes that the job holds idle, to replace bad ones where restart.how is in_place. They cost as much as
    the others."""
    gpus_per_node: Annotated[int, AtLeast(0)] = 0
    """GPUs on each node; with 0 the ranks train on CPUs over gloo."""
    tasks_per_node: Annotated[int | None, AtLeast(1)] = None
    """Ranks on each node; default one per GPU, and 1 without GPUs."""
    cpus_per_task: Annotated[int | None, AtLeast(1)] = None
    """CPU cores for each rank."""
    memory_per_node: Annotated[str | None, MEMORY] = None
    """Host memory of a node in Slurm's notation, e.g. 200G; 0 asks for all of it."""
    time: Annotated[str | None, TIME_LIMIT] = None
    """Time limit in Slurm's notation: minutes, HH:MM:SS or D-HH:MM:SS."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Account the job is charged to."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    reservation: str | None = None
    """Reservation to run in."""
    nodelist: str | None = None
    """Run on these nodes, in Slurm's host list notation."""
    exclude: str | None = None
    """Nodes to avoid, in Slurm's host list notation."""
    exclusive: bool = False
    """Take whole nodes."""
    signal_seconds: Annotated[int, AtLeast(0)] = 120
    """Seconds before the time limit, which must be longer, at which ranks are told to save and stop."""
    gpu_hour_limit: Annotated[float | None, AtLeast(0)] = None
    """`submit` asks before it submits a run that may take more GPU hours than this, or nobody knows how many, unless
    --yes is given. Unset: it never asks."""
    extra_sbatch: Annotated[list[str], SBATCH_OPTION] = field(default_factory=list)
    """Further sbatch options, one per list item, e.g. --mail-type=END."""

    @property
    def ranks_per_node(self) -> int:
        """Processes started on each node."""
        return self.tasks_per_node if self.tasks_per_node is not None else max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.nodes * self.ranks_per_node

    @property
    def allocated_nodes(self) -> int:
        """Nodes that the job holds, spare ones included."""
        return self.nodes + self.spare_nodes
