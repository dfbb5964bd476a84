"""(RunSpec, Topology, RunPaths) → the batch script, byte for byte the same for the same input.

The script is plain bash made by Jinja2 templates that a site can override block by block. Nothing reaches it unquoted:
each value passes a filter that makes it one word for its reader, which is the shell or sbatch. The two quote
differently: sbatch splits directive lines itself and takes backslash as an escape within single quotes too.

Rejected: building the script in Python (a site cannot change it), and wrapping a pickled function (a person can
neither read nor rerun it).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from launcher.contract import resources
from launcher.contract.copy_folder import MEMORY, PREFIX
from launcher.contract.errors import TemplateError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.race import candidate_paths
from launcher.contract.rundir import RunPaths
from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.spec import ClusterSpec, RunSpec
from launcher.contract.spec.fields import path_fields
from launcher.contract.topology import Topology
from launcher.submission.secret_files import secrets_file


def shell(value: object) -> str:
    """Return `value` as one word of bash."""
    return shlex.quote(_one_line(value))


def words(values: Iterable[object]) -> str:
    """Return several words of bash."""
    return " ".join(shell(value) for value in values)


def sbatch(value: object) -> str:
    """Return `value` as one word of an #SBATCH line."""
    text = _one_line(value)
    if text and all(letter.isalnum() or letter in "-_=./:,@%+" for letter in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _one_line(value: object) -> str:
    text = str(value)
    bad = next((letter for letter in text if letter in "\n\r\0"), None)
    if bad is not None:
        raise TemplateError(f"{text!r} holds {bad!r}, which cannot stand in a batch script; take it out")
    return text


def render(
    spec: RunSpec,
    topology: Topology,
    paths: RunPaths,
    launcher_python: str,
    source_root: Path | None = None,
    *,
    candidate: str = "",
) -> str:
    """Return the batch script of a run.

    `launcher_python` starts local ranks, and all of them where no runtime is configured; `source_root` is the copy of
    the code to put on PYTHONPATH, if the launcher is not installed. `candidate` is the script's own name in a race.
    """
    name = template_name(spec.cluster)
    resources.find("templates", name)  # says where it looked, which Jinja2 does not
    option, request = _gpu_directive(spec)
    mounts = _mounts(spec, paths, source_root)
    try:
        template = _environment().get_template(name)
        return template.render(
            run=paths,
            script=str((candidate_paths(paths, candidate) if candidate else paths).script.relative_to(paths.root)),
            cluster=spec.cluster,
            runtime=spec.cluster.runtime,
            resources=spec.resources,
            checkpoint=spec.checkpoint,
            restart=spec.restart,
            supervises=_supervises(spec),
            copies=str(MEMORY / PREFIX),
            has_preflight=spec.has_preflight,
            preflight_seconds=spec.preflight.timeout_seconds,
            notify=spec.notify,
            topology=topology,
            cache_dir=str(spec.cache_dir),
            python=_python(spec, mounts, launcher_python),
            launcher_python=launcher_python,
            source_root=str(source_root) if source_root else "",
            code=str(paths.code.relative_to(paths.root)),
            secrets_file=str(secrets_file(spec, paths) or ""),
            secret_names=spec.secret_names,
            srun_args=_srun_args(spec, mounts),
            gpu_option=option,
            gpu_request=request,
            exit_codes=ExitCode,
            candidate=candidate,
        )
    except jinja2.TemplateError as error:
        line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TemplateError(f"template {name}{line} does not render: {error}") from None


def _supervises(spec: RunSpec) -> bool:
    """Return whether the script itself looks after the nodes of its job, and starts ranks on them again."""
    return spec.restart.how == "in_place" and CAPABILITIES[spec.cluster.scheduler].allocates_nodes


def template_name(cluster: ClusterSpec) -> str:
    """Return the name of the cluster's template: its own, or the one for its scheduler."""
    return cluster.template or f"{cluster.scheduler}.sh.j2"


def render_array(name: str, directives: Sequence[str], folder: Path, runs: Sequence[Path]) -> str:
    """Return the script of a job array of which each element runs the script of one of `runs`.

    The array logs to `folder`.
    """
    template = _environment().get_template("array.sh.j2")
    return template.render(
        name=name, directives=directives, folder=str(folder), runs=[str(run) for run in runs], exit_codes=ExitCode
    )


def directives_of(script: str) -> list[str]:
    """Return a script's #SBATCH lines without those for its job's name and log."""
    own = ("#SBATCH --job-name=", '#SBATCH "--job-name=', "#SBATCH --output=", '#SBATCH "--output=')
    return [line for line in script.splitlines() if line.startswith("#SBATCH ") and not line.startswith(own)]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(folder) for folder in resources.search_path("templates")]),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(shell=shell, words=words, sbatch=sbatch)
    return environment


def _gpu_directive(spec: RunSpec) -> tuple[str, str]:
    """Return option and value that ask for GPUs in the cluster's dialect, both empty where nothing is asked for."""
    gpus, dialect = spec.resources.gpus_per_node, spec.cluster.gpu_directive
    if not gpus or dialect == "none":
        return "", ""
    kind = f"{spec.cluster.gpu_type}:" if spec.cluster.gpu_type else ""
    if dialect == "gres":
        return "--gres", f"gpu:{kind}{gpus}"
    if dialect == "gpus_per_task":
        return "--gpus-per-task", f"{kind}1"
    return "--gpus-per-node", f"{kind}{gpus}"


def _srun_args(spec: RunSpec, mounts: list[str]) -> list[str]:
    """Return the cluster's own srun options and those of the container."""
    arguments, runtime = list(spec.cluster.srun_args), spec.cluster.runtime
    if spec.resources.gpus_per_node and spec.cluster.gpu_directive == "gpus_per_task":
        arguments.append("--gpu-bind=none")  # a rank must see its neighbours' GPUs for NCCL's direct copies
    if runtime.kind == "pyxis":
        arguments += [f"--container-image={runtime.image}", f"--container-mounts={','.join(mounts)}"]
    return arguments


def _python(spec: RunSpec, mounts: list[str], launcher_python: str) -> list[str]:
    """Return the words that start Python in the configured runtime."""
    runtime = spec.cluster.runtime
    python = runtime.python or (launcher_python if runtime.kind == "none" else "python")
    if runtime.kind != "apptainer":
        return [python]
    gpu = ["--nv"] if spec.resources.gpus_per_node else []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *gpu, *binds, str(runtime.image), python]


def python_beside(spec: RunSpec, paths: RunPaths, launcher_python: str) -> tuple[list[str], list[str]]:
    """Return srun options and the words that start Python beside a rank, in the container where the run has one.

    Without a container it is the launcher's own: an environment that has yet to be activated may have none.
    """
    code = paths.code if paths.code.is_file() else None
    mounts, runtime = _mounts(spec, paths, code), spec.cluster.runtime
    in_container = runtime.kind in ("pyxis", "apptainer")
    return _srun_args(spec, mounts), _python(spec, mounts, launcher_python) if in_container else [launcher_python]


def _mounts(spec: RunSpec, paths: RunPaths, source_root: Path | None) -> list[str]:
    """Return the bind mounts of a container: the user's, then each folder that ranks read or write, outermost only."""
    runtime = spec.cluster.runtime
    if runtime.kind not in ("pyxis", "apptainer"):
        return []
    needed = (field.rule.mount(field.path) for field in path_fields(spec))
    folders = {paths.root, spec.cache_dir, *(folder for folder in (*needed, source_root) if folder is not None)}
    outermost = sorted(folder for folder in folders if not any(parent in folders for parent in folder.parents))
    bad = [str(folder) for folder in outermost if set(str(folder)) & set(":,")]
    if bad:
        raise TemplateError([f"{folder}: a container cannot mount a path with ':' or ','; rename it" for folder in bad])
    return [*runtime.mounts, *(f"{os.fspath(folder)}:{os.fspath(folder)}" for folder in outermost)]
