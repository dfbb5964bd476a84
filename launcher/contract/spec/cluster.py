"""cluster: one machine or site."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from launcher.contract.schedulers import SchedulerName
from launcher.contract.spec.paths import ContainerImage, Directory, PathRule
from launcher.contract.spec.rules import (
    BIND_MOUNT,
    ENVIRONMENT_NAME,
    FROM_ROOT,
    HOST,
    SHELL_VARIABLE,
    SRUN_OPTION,
    Above,
    AtLeast,
    Names,
)


@dataclass(frozen=True, slots=True)
class RuntimePath(PathRule):
    """A venv's directory; a conda environment's directory, which has a slash in it, or its name."""

    description: ClassVar[str] = "a venv's directory, or a conda environment"

    def is_path(self, text: str, section: object) -> bool:
        return "/" in text or _is_venv(section)

    def problem(self, path: str, section: object) -> str | None:
        missing = _is_venv(section) and not (Path(path) / "bin" / "activate").is_file()
        return f"{path} is not a venv: it has no bin/activate" if missing else None


def _is_venv(section: object) -> bool:
    return isinstance(section, RuntimeSpec) and section.kind == "venv"


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSpec:
    """The environment in which a rank's Python starts."""

    kind: Literal["none", "venv", "conda", "pyxis", "apptainer"] = "none"
    """none: `python` as it is; venv / conda: activated on each node; pyxis / apptainer: a container."""
    python: str | None = None
    """Python program; default the launcher's own for kind none, `python` for the others."""
    path: Annotated[str | None, RuntimePath()] = None
    """The venv's directory, or the conda environment's name or directory."""
    image: Annotated[str | None, ContainerImage()] = None
    """Container image: a file or a registry reference."""
    mounts: Annotated[list[str], BIND_MOUNT] = field(default_factory=list)
    """Bind mounts SOURCE:TARGET[:OPTIONS] for containers; the run directory is always mounted."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load first, whatever the kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSpec:
    """One machine or site: how jobs are written and started there. Each file in cluster_configs/ holds one."""

    name: str = "local"
    """Name, the same as its file's."""
    scheduler: SchedulerName = "local"
    """slurm: sbatch; local: processes on this machine."""
    template: str | None = None
    """Batch script template; default slurm.sh.j2 or local.sh.j2."""
    gpu_directive: Literal["gpus_per_node", "gres", "gpus_per_task", "none"] = "gpus_per_node"
    """How this site's Slurm is asked for GPUs; none where nodes are always given out whole."""
    gpu_type: str | None = None
    """GPU type for the directive, e.g. h100 gives --gres=gpu:h100:8."""
    gpu: str | None = None
    """Kind of GPU for planning: h100, a100-80gb or another of launcher/contract/gpu_kinds.yaml; default the one that
    gpu_type names. A run that cannot fit into its memory is refused; for an unknown kind nothing is predicted or
    refused."""
    inter_node_bandwidth: Annotated[float | None, Above(0)] = None
    """GB/s between nodes in one direction, per GPU, for planning; default that of the GPU's reference node."""
    gpu_hour_price: Annotated[float | None, AtLeast(0)] = None
    """Price of a GPU hour in the site's own unit; plans then show the cost."""
    rendezvous: Literal["hostname", "node_addr"] = "hostname"
    """How ranks address the first node: its host name, or the address Slurm itself uses for it."""
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)
    """The environment a rank starts in."""
    env: Annotated[dict[str, str], Names(ENVIRONMENT_NAME)] = field(default_factory=dict)
    """Environment variables of every rank. They are written into the script: name secrets in env_from instead."""
    env_from: Annotated[list[str], SHELL_VARIABLE] = field(default_factory=list)
    """Names of variables whose values every run takes from the shell that submits it, e.g. HF_TOKEN; never stored in
    the run directory."""
    secrets_dir: Annotated[str | None, Directory()] = None
    """Private folder, seen by all nodes, that holds the values of env_from for a run's jobs; default
    ~/.config/slurm-sft-launcher/secrets."""
    srun_args: Annotated[list[str], SRUN_OPTION] = field(default_factory=list)
    """Further srun options, one per list item, e.g. --mpi=none."""
    host: Annotated[str | None, HOST] = None
    """Login node of the cluster, as your ssh knows it: every command that concerns the cluster runs there. Unset:
    commands run on this machine."""
    host_directory: str | None = None
    """Directory on the host, seen by all nodes, in which commands run: runs/ is in it, and relative paths start
    there."""
    host_python: str = "python3"
    """Python on the host that has the launcher's dependencies; the launcher's own code is sent."""
    host_options: list[str] = field(default_factory=list)
    """Further ssh options, one word per list item, e.g. [-J, gateway.site.org]."""
    node_ledger: Annotated[str | None, FROM_ROOT] = None
    """File that records bad nodes, from / or ~ on: commands in any folder mean the same one. Default: a file in
    ~/.local/state for each user."""
    node_days: Annotated[float, AtLeast(0)] = 3.0
    """Days for which evidence against a node counts."""
    max_excluded: Annotated[int, AtLeast(0)] = 4
    """Largest number of nodes that are excluded because of the ledger."""
