"""cluster: one machine or site."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from launcher.contract.spec.paths import ContainerImage, Directory, PathRule
from launcher.contract.spec.rules import (
    BIND_MOUNT,
    ENVIRONMENT_NAME,
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
    """Python program; default the launcher's own for kind none, else `python`."""
    path: Annotated[str | None, RuntimePath()] = None
    """The venv's directory, or the conda environment's name or directory."""
    image: Annotated[str | None, ContainerImage()] = None
    """Container image: a file or a registry reference."""
    mounts: Annotated[list[str], BIND_MOUNT] = field(default_factory=list)
    """Bind mounts SOURCE:TARGET[:OPTIONS] for containers; the run directory is always mounted."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load first, with any kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSpec:
    """One machine or site: how its jobs are written and started. One YAML file each in cluster_configs/."""

    name: str = "local"
    """Name, the same as its file's."""
    scheduler: Literal["slurm", "local"] = "local"
    """slurm: sbatch; local: processes on this machine."""
    template: str | None = None
    """Batch script template; default slurm.sh.j2 or local.sh.j2."""
    gpu_directive: Literal["gpus_per_node", "gres", "gpus_per_task", "none"] = "gpus_per_node"
    """How this site wants GPUs asked for; none where whole nodes are given out."""
    gpu_type: str | None = None
    """GPU type for the directive, e.g. h100 gives --gres=gpu:h100:8."""
    gpu: str | None = None
    """Kind of GPU for planning: h100, a100-80gb and others of launcher/contract/gpu_kinds.yaml; default what gpu_type
    names. A run that cannot fit into its memory is refused; where the kind is not known, nothing is planned or
    refused."""
    inter_node_bandwidth: Annotated[float | None, Above(0)] = None
    """GB/s between nodes, one direction a GPU, for planning; default that of the GPU's reference node."""
    gpu_hour_price: Annotated[float | None, AtLeast(0)] = None
    """Price of a GPU hour, in whatever unit the site counts; plans then show cost."""
    rendezvous: Literal["hostname", "node_addr"] = "hostname"
    """How ranks address the first node: its host name, or the address Slurm itself uses for it."""
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)
    """The environment a rank starts in."""
    env: Annotated[dict[str, str], Names(ENVIRONMENT_NAME)] = field(default_factory=dict)
    """Environment variables of every rank. Never secrets, which env_from is for: these are written into the script."""
    env_from: Annotated[list[str], SHELL_VARIABLE] = field(default_factory=list)
    """Names of variables whose values every run takes from the shell that submits it, e.g. HF_TOKEN; never stored in
    the run directory."""
    secrets_dir: Annotated[str | None, Directory()] = None
    """Private folder for the values of env_from on their way to a job, on a file system that all nodes see; default
    ~/.config/slurm-sft-launcher/secrets."""
    srun_args: Annotated[list[str], SRUN_OPTION] = field(default_factory=list)
    """Further srun options, one a list item, e.g. --mpi=none."""
    host: Annotated[str | None, HOST] = None
    """Login node of the cluster, as your ssh knows it: every command that concerns the cluster runs there. Unset: the
    commands run on this machine."""
    host_directory: str | None = None
    """Directory on the host, seen by all nodes, in which commands run: runs/ is there, relative paths begin there."""
    host_python: str = "python3"
    """Python on the host that has the launcher's packages; the launcher's code is sent."""
    host_options: list[str] = field(default_factory=list)
    """Further ssh options, one word a list item, e.g. [-J, gateway.site.org]."""
    node_ledger: str | None = None
    """File with the nodes to keep away from; default one of the user's own, in ~/.local/state."""
    node_days: Annotated[float, AtLeast(0)] = 3.0
    """Days for which evidence against a node counts."""
    max_excluded: Annotated[int, AtLeast(0)] = 4
    """Never keep away from more nodes than this because of the ledger."""
