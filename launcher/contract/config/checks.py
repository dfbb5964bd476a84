"""Rules on a typed RunSpec: required values, ranges, forms, and files that must exist.

Each rule yields `(dotted key, message)`; `launcher.contract.config.load` adds where the value was written. Rules
between parallel sizes are in `launcher.contract.topology`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from launcher.contract.hardware import gpu_kinds
from launcher.contract.logger_packages import missing_loggers
from launcher.contract.rundir import COMPLETE, RUN_NAME
from launcher.contract.secret_names import is_secret_name
from launcher.contract.spec import RunSpec

Problem = tuple[str, str]

_TIME = re.compile(r"\d+|\d+:\d{2}|\d+:\d{2}:\d{2}|\d+-\d+(:\d{2}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_MEMORY = re.compile(r"\d+[KMGT]?B?", re.IGNORECASE)
_EMAIL = re.compile(r"[A-Za-z0-9._%+][A-Za-z0-9._%+-]*@[A-Za-z0-9.-]+")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def spec_problems(spec: RunSpec) -> Iterator[Problem]:
    """Everything wrong with the values themselves; looks at no file."""
    yield from _required(spec)
    yield from _ranges(spec)
    yield from _sources(spec)
    yield from _batches(spec)
    yield from _lora(spec)
    yield from _fp8(spec)
    yield from _scheduler(spec)
    yield from _runtime(spec)
    yield from _evaluation(spec)
    if spec.notify.email is not None and not _EMAIL.fullmatch(spec.notify.email):
        yield "notify.email", f"{spec.notify.email!r} is not an address, e.g. me@example.org"
    if spec.cluster.runtime.kind == "none" and spec.cluster.runtime.python is None:  # ranks run in this environment
        yield from missing_loggers(spec)
    if spec.logging.prompts and not spec.checkpoint.export:
        yield "logging.prompts", "answers need checkpoint.export: true"


def _required(spec: RunSpec) -> Iterator[Problem]:
    if not spec.name:
        yield "name", "missing; give the run a name"
    elif not RUN_NAME.fullmatch(spec.name):
        yield (
            "name",
            f"{spec.name!r} is not a run name: letters, digits, '.', '_', '-', first a letter or digit, <= 128",
        )
    if not spec.model.path:
        yield (
            "model.path",
            "missing; a Hugging Face model directory, a NeMo checkpoint, a .gguf file or package:NAME/FILE",
        )
    if not spec.data.train and not spec.data.sources:
        yield "data.train", "missing; one or more data files, or several sources with weights in data.sources"
    if spec.train.max_steps is None and spec.train.epochs is None:
        yield "train.max_steps", "missing; set train.max_steps or train.epochs"
    if spec.train.max_steps is not None and spec.train.epochs is not None:
        yield (
            "train.max_steps",
            f"{spec.train.max_steps} and train.epochs {spec.train.epochs} exclude each other; drop one",
        )


def _ranges(spec: RunSpec) -> Iterator[Problem]:
    optimizer = spec.train.optimizer
    least = {
        ("resources.nodes", spec.resources.nodes): 1,
        ("resources.gpus_per_node", spec.resources.gpus_per_node): 0,
        ("resources.tasks_per_node", spec.resources.tasks_per_node): 1,
        ("topology.tensor_parallel", spec.topology.tensor_parallel): 1,
        ("topology.pipeline_parallel", spec.topology.pipeline_parallel): 1,
        ("topology.virtual_pipeline", spec.topology.virtual_pipeline): 1,
        ("topology.context_parallel", spec.topology.context_parallel): 1,
        ("train.micro_batch_size", spec.train.micro_batch_size): 1,
        ("train.global_batch_size", spec.train.global_batch_size): 1,
        ("data.seq_length", spec.data.seq_length): 1,
        ("model.lora.rank", spec.model.lora.rank): 1,
        ("train.max_steps", spec.train.max_steps): 1,
        ("train.epochs", spec.train.epochs): 1,
        ("train.eval_every", spec.train.eval_every): 1,
        ("data.pad_to_multiple", spec.data.pad_to_multiple): 1,
        ("data.workers", spec.data.workers): 1,
        ("checkpoint.every", spec.checkpoint.every): 1,
        ("checkpoint.keep_last", spec.checkpoint.keep_last): 1,
        ("checkpoint.keep_best", spec.checkpoint.keep_best): 0,
        ("train.early_stopping.patience", spec.train.early_stopping.patience): 1,
        ("train.early_stopping.min_delta", spec.train.early_stopping.min_delta): 0,
        ("evaluation.max_new_tokens", spec.evaluation.max_new_tokens): 1,
        ("evaluation.temperature", spec.evaluation.temperature): 0,
        ("evaluation.top_k", spec.evaluation.top_k): 1,
        ("evaluation.batch_size", spec.evaluation.batch_size): 1,
        ("data.cyclic_seed", spec.data.cyclic_seed): 0,
        ("logging.every", spec.logging.every): 1,
        ("resources.cpus_per_task", spec.resources.cpus_per_task): 1,
        ("resources.signal_seconds", spec.resources.signal_seconds): 0,
        ("cluster.node_days", spec.cluster.node_days): 0,
        ("cluster.max_excluded", spec.cluster.max_excluded): 0,
        ("preflight.timeout_seconds", spec.preflight.timeout_seconds): 10,
        ("preflight.min_shm_mib", spec.preflight.min_shm_mib): 0,
        ("preflight.min_disk_gib", spec.preflight.min_disk_gib): 0,
        ("preflight.max_clock_skew_seconds", spec.preflight.max_clock_skew_seconds): 0,
        ("train.optimizer.warmup_steps", optimizer.warmup_steps): 0,
        ("train.optimizer.weight_decay", optimizer.weight_decay): 0,
        ("train.optimizer.min_lr", optimizer.min_lr): 0,
        ("train.optimizer.initial_lr", optimizer.initial_lr): 0,
        ("train.optimizer.decay_steps", optimizer.decay_steps): optimizer.warmup_steps + 1,
        ("train.optimizer.clip_grad", optimizer.clip_grad): 0,
    }
    for (key, value), smallest in least.items():
        if value is not None and not smallest <= value < float("inf"):
            yield key, f"{value} is not at least {smallest}"
    above_zero = {"train.optimizer.lr": optimizer.lr, "train.optimizer.eps": optimizer.eps}
    times = ("multiple", "floor_seconds", "first_step_seconds", "loading_seconds")
    for name in (*times, "evaluation_seconds", "checkpoint_seconds"):
        above_zero[f"watchdog.{name}"] = getattr(spec.watchdog, name)
    for key, value in above_zero.items():
        if not 0 < value < float("inf"):
            yield key, f"{value} is not above 0"
    fractions = {
        "train.optimizer.beta1": optimizer.beta1,
        "train.optimizer.beta2": optimizer.beta2,
        "model.attention_dropout": spec.model.attention_dropout,
        "model.hidden_dropout": spec.model.hidden_dropout,
        "model.lora.dropout": spec.model.lora.dropout,
    }
    for key, value in fractions.items():
        if not 0 <= value < 1:
            yield key, f"{value} is not in [0, 1)"
    for name, rate in (("min_lr", optimizer.min_lr), ("initial_lr", optimizer.initial_lr)):
        if rate > optimizer.lr:
            yield f"train.optimizer.{name}", f"{rate} is above train.optimizer.lr {optimizer.lr}"


def _fp8(spec: RunSpec) -> Iterator[Problem]:
    if spec.train.precision != "fp8":
        return
    if spec.model.lora.rank is not None:
        yield "train.precision", "fp8 with model.lora.rank: adapters are added to products in bf16; set it to bf16"
    name = (spec.cluster.gpu or spec.cluster.gpu_type or "").lower()
    if any(kind.name == name and kind.fp8_tflops is None for kind in gpu_kinds()):
        yield "train.precision", f"fp8 on GPUs of kind {name}, which have no fp8 products; set it to bf16"


def _lora(spec: RunSpec) -> Iterator[Problem]:
    lora = spec.model.lora
    if lora.rank is None:
        given = {"model.lora.alpha": lora.alpha, "model.lora.targets": lora.targets, "model.lora.dropout": lora.dropout}
        for key, value in (*given.items(), ("checkpoint.export_merged", spec.checkpoint.export_merged)):
            if value:
                yield key, f"{value} needs model.lora.rank, which is unset"
        return
    if lora.alpha is not None and not 0 < lora.alpha < float("inf"):
        yield "model.lora.alpha", f"{lora.alpha} is not above 0"
    if len(set(lora.targets)) < len(lora.targets):
        yield "model.lora.targets", f"{lora.targets} names a layer twice"
    if spec.model.init == "random":
        yield "model.init", "random with model.lora.rank: adapters need weights to adapt, and only they are saved"
    if spec.checkpoint.export_merged and not spec.checkpoint.export:
        yield "checkpoint.export_merged", "needs checkpoint.export: true"


def _sources(spec: RunSpec) -> Iterator[Problem]:
    if spec.data.train and spec.data.sources:
        yield "data.train", "excludes data.sources; give these files a name and a weight among the sources"
    for name, source in spec.data.sources.items():
        key = f"data.sources.{name}"
        if not source.files:
            yield f"{key}.files", "missing; one or more data files"
        if not 0 < source.weight < float("inf"):
            yield f"{key}.weight", f"{source.weight:g} is not above 0; to train without this source, take it out"


def _batches(spec: RunSpec) -> Iterator[Problem]:
    data, train = spec.data, spec.train
    if train.global_batch_unit == "tokens" and data.seq_length > 0 and train.global_batch_size % data.seq_length:
        below = train.global_batch_size // data.seq_length * data.seq_length
        nearest = ", ".join(str(size) for size in (below, below + data.seq_length) if size)
        yield (
            "train.global_batch_size",
            f"{train.global_batch_size} tokens are not a number of rows of data.seq_length {data.seq_length}; "
            f"nearest valid: {nearest}",
        )
    if data.cyclic_seed is not None:
        others = {
            "data.group_by_length": data.group_by_length,
            "train.global_batch_unit tokens": train.global_batch_unit == "tokens",
            "data.sources": bool(data.sources),
            "train.epochs; give train.max_steps": train.max_steps is None,
        }
        for other in (name for name, given in others.items() if given):
            yield "data.cyclic_seed", f"excludes {other}; drop one"
    if data.group_by_length:
        others = {
            "data.packing, which makes rows of any lengths full": data.packing,
            "train.global_batch_unit tokens, which sorts by length already": train.global_batch_unit == "tokens",
            "data.shuffle false, which keeps the order of the files": not data.shuffle,
        }
        for other in (name for name, given in others.items() if given):
            yield "data.group_by_length", f"excludes {other}; drop one"


def evaluation_metrics(spec: RunSpec) -> set[str]:
    """Names that evaluations give to their results; what evaluation.metric returns is not known beforehand."""
    held_out = ["", *(f"/{name}" for name in spec.data.validation_sets)][0 if spec.data.validation else 1 :]
    return {f"{kind}{name}" for kind in ("eval_loss", "perplexity") for name in held_out}


def _evaluation(spec: RunSpec) -> Iterator[Problem]:
    evaluation, train = spec.evaluation, spec.train
    known = evaluation_metrics(spec)
    if train.eval_every is not None and not known and not evaluation.prompts:
        yield (
            "train.eval_every",
            f"{train.eval_every} needs data.validation, data.validation_sets or evaluation.prompts, and all are empty",
        )
    for name in spec.data.validation_sets:
        if not RUN_NAME.fullmatch(name):
            yield "data.validation_sets", f"{name!r} is not a name: letters, digits, '.', '_', '-'"
    if evaluation.metric and not evaluation.prompts:
        yield "evaluation.metric", f"{evaluation.metric} needs evaluation.prompts, which is unset"
    if evaluation.metric and not re.fullmatch(r"[\w.]+:\w+", evaluation.metric):
        yield "evaluation.metric", f"{evaluation.metric!r} is not package.module:function"
    if not 0 < evaluation.top_p <= 1:
        yield "evaluation.top_p", f"{evaluation.top_p} is not in (0, 1]"
    if not 0 < evaluation.repetition_penalty < float("inf"):
        yield "evaluation.repetition_penalty", f"{evaluation.repetition_penalty} is not above 0"
    if "" in evaluation.stop_sequences:
        yield "evaluation.stop_sequences", "an empty text is in every answer; take it out"
    if train.spike_factor is not None and not 1 < train.spike_factor < float("inf"):
        yield "train.spike_factor", f"{train.spike_factor} is not above 1"
    wanted = []
    if train.early_stopping.patience is not None:
        wanted.append(("train.early_stopping.metric", train.early_stopping.metric))
    if spec.checkpoint.keep_best:
        wanted.append(("checkpoint.best_metric", spec.checkpoint.best_metric))
    for key, metric in wanted:
        if metric not in known and not (metric.startswith("metric/") and evaluation.metric):
            given = ", ".join(sorted(known) + (["metric/<name>"] if evaluation.metric else [])) or "none"
            yield key, f"{metric!r} is not what evaluations of this run give: {given}"


def _scheduler(spec: RunSpec) -> Iterator[Problem]:
    resources, cluster = spec.resources, spec.cluster
    if resources.time is not None and not _TIME.fullmatch(resources.time):
        yield "resources.time", f"{resources.time!r} is not a time limit: minutes, HH:MM:SS or D-HH:MM:SS"
    if resources.memory_per_node is not None and not _MEMORY.fullmatch(resources.memory_per_node):
        yield "resources.memory_per_node", f"{resources.memory_per_node!r} is not a size such as 200G"
    for option in resources.extra_sbatch:
        if not option.startswith("--"):
            yield (
                "resources.extra_sbatch",
                f"{option!r} does not start with --; one option an item, e.g. --mail-type=END",
            )
    for option in cluster.srun_args:
        if not option.startswith("-"):
            yield "cluster.srun_args", f"{option!r} does not start with -; one option an item, e.g. --mpi=none"
    for name in cluster.env:
        if not _ENV_NAME.fullmatch(name):
            yield "cluster.env", f"{name!r} is not the name of an environment variable"
        elif is_secret_name(name):
            yield (
                "cluster.env",
                f"{name} looks like a secret, and would be stored in the run directory; "
                f"name it in env_from: [{name}] instead, and export it in your shell",
            )
    webhook = [spec.notify.webhook_env] if spec.notify.webhook_env is not None else []
    sources = (("cluster.env_from", cluster.env_from), ("env_from", spec.env_from), ("notify.webhook_env", webhook))
    for key, names in sources:
        for name in names:
            if not _ENV_NAME.fullmatch(name):
                yield key, f"{name!r} is not the name of an environment variable"
            elif name in cluster.env or name.startswith(("SLURM_", "SFT_")):
                yield key, f"{name} is set by {'cluster.env' if name in cluster.env else 'the launcher'}; drop one"
    if cluster.scheduler == "local" and resources.nodes > 1:
        yield (
            "resources.nodes",
            f"{resources.nodes} on cluster {cluster.name}, which is this machine alone; set it to 1",
        )
    if set("%\\") & set(spec.run_root):  # both mean something in sbatch's --output and in submitit's folders
        yield "run_root", f"{spec.run_root!r} holds % or a backslash, which Slurm reads as part of a pattern"


def _runtime(spec: RunSpec) -> Iterator[Problem]:
    runtime = spec.cluster.runtime
    if runtime.kind in ("venv", "conda") and not runtime.path:
        yield "cluster.runtime.path", f"missing; runtime kind {runtime.kind} needs it"
    if runtime.kind in ("pyxis", "apptainer") and not runtime.image:
        yield "cluster.runtime.image", f"missing; runtime kind {runtime.kind} needs it"
    if runtime.kind == "pyxis" and spec.cluster.scheduler == "local":
        yield "cluster.runtime.kind", "pyxis is an extension of srun; a local run can use apptainer"
    for mount in runtime.mounts:
        if not re.fullmatch(r"[^:,]+:[^:,]+(:[^:,]+)?", mount):
            yield "cluster.runtime.mounts", f"{mount!r} is not SOURCE:TARGET[:OPTIONS]"


def file_problems(spec: RunSpec) -> Iterator[Problem]:
    """Files that are named and absent. Expects absolute paths and expanded globs."""
    if spec.model.path and not spec.comes_later(spec.model.path):
        yield from _model_file(spec.model.path)
    tokenizer = spec.model.tokenizer
    if tokenizer and not Path(tokenizer).is_dir() and not spec.comes_later(tokenizer):
        yield "model.tokenizer", f"{tokenizer} is not a directory"
    data = {"data.train": spec.data.train, "data.validation": spec.data.validation}
    data |= {f"data.sources.{name}.files": source.files for name, source in spec.data.sources.items()}
    for key, files in data.items():
        for file in files:
            if not Path(file).exists():  # a saved data set is a directory
                yield key, f"no file matches {file}"
    if spec.after_directory is not None and not (spec.after_directory / "manifest.json").is_file():
        yield "after", f"{spec.after} is not a run in {spec.run_root}, nor a run's directory"
    for name, pattern in spec.data.validation_sets.items():
        if not Path(pattern).exists() and not any(Path("/").glob(pattern.removeprefix("/"))):
            yield "data.validation_sets", f"{name}: no file matches {pattern}"
    prompts = spec.evaluation.prompts
    if prompts and not Path(prompts).is_file():
        yield "evaluation.prompts", f"{prompts} is not a file"
    template = spec.data.chat_template
    if template not in ("tokenizer", "none") and not Path(template).is_file():
        yield "data.chat_template", f"{template} is not a file (nor the word tokenizer or none)"
    resume = spec.checkpoint.resume_from
    if resume and not (Path(resume) / COMPLETE).is_file() and not spec.comes_later(resume):
        yield "checkpoint.resume_from", f"{resume} is not a complete checkpoint: it has no file {COMPLETE}"
    runtime = spec.cluster.runtime
    if runtime.kind == "venv" and runtime.path and not (Path(runtime.path) / "bin" / "activate").is_file():
        yield "cluster.runtime.path", f"{runtime.path} is not a venv: it has no bin/activate"


def _model_file(path: str) -> Iterator[Problem]:
    if not path.startswith("package:"):
        found = Path(path)
        if not found.is_dir() and not (found.is_file() and found.suffix in (".gguf", ".nemo")):
            what = "is neither a directory nor a .gguf or .nemo file" if found.exists() else "does not exist"
            yield "model.path", f"{path} {what}"
        return
    package, _, file = path.removeprefix("package:").partition("/")
    if package_file(path) is None:
        why = (
            f"package {package!r} is not installed here"
            if _package_dir(package) is None
            else f"it has no file {file!r}"
        )
        yield "model.path", f"{path}: {why}"


def _package_dir(package: str) -> Path | None:
    if not re.fullmatch(r"\w+", package):  # a dotted name would import its parent
        return None
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found is not None and found.origin else None


def package_file(path: str) -> Path | None:
    """The file that `package:NAME/FILE` names, without importing NAME; None where it is absent."""
    package, _, file = path.removeprefix("package:").partition("/")
    folder = _package_dir(package)
    return folder / file if folder is not None and file and (folder / file).is_file() else None
