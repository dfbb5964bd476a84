"""The two single-process steps of a job: `prepare` before the ranks start, `export` after they are done."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import ConfigError, RunStateError
from launcher.exit_codes import ExitCode
from launcher.rundir import RunPaths, append_event, read_lines
from launcher.spec import RunSpec, read_resolved
from launcher.topology import build_topology
from sft.data.prepare import check_vocabulary, prepare_data
from sft.data.report import report
from sft.export import export_run
from sft.held_out import open_validation_sets
from sft.hf.answer import record_answers
from sft.hf.architecture import read_architecture
from sft.hf.checks import check_model_settings
from sft.hf.files import check_model_files
from sft.hf.model_files import resolve_model_dir
from sft.loggers import check_loggers
from sft.nemo.export import export_nemo2
from sft.prompts import check_prompts
from sft.rank_env import RankEnv


def prepare(config: Path) -> ExitCode:
    """Convert and check the model, tokenize the data, answer the prompts with the model as it is.

    Everything that needs no other rank fails here, before a rank is started.
    """
    spec, paths = read_resolved(config), RunPaths(config.resolve().parent)
    check_loggers(spec)
    model_dir = resolve_model_dir(spec, convert=True)
    architecture = read_architecture(model_dir)
    build_topology(spec, architecture.shape)
    check_model_settings(spec, architecture)
    if spec.model.init == "pretrained":
        check_model_files(model_dir, architecture)
    tokenizer_dir = Path(spec.model.tokenizer) if spec.model.tokenizer else model_dir
    check_vocabulary(prepare_data(spec, tokenizer_dir), architecture.shape.vocab_size)
    for name, prepared in open_validation_sets(spec, tokenizer_dir, build=True):
        check_vocabulary(prepared, architecture.shape.vocab_size)
        if prepared.validation is not None:
            print(report(name, prepared.validation))
    check_prompts(spec, tokenizer_dir, model_dir)
    if _answers_wanted(spec):
        record_answers(paths, spec.logging.prompts, model_dir, "before")
    append_event(paths, "prepared", attempt=RankEnv.from_environ().attempt)
    return ExitCode.OK


def export(run: Path, step: int | None = None, *, nemo2: bool = False) -> ExitCode:
    """Write RUN/export from the best, newest or given checkpoint, and print what training changed.

    With `nemo2` the same model is written to RUN/export_nemo2, too.
    """
    paths = RunPaths(run.resolve())
    if not paths.config.is_file():
        raise RunStateError(f"{run}: no {paths.config.name}; it is not a run directory")
    spec = read_resolved(paths.config)
    if nemo2 and spec.model.lora.rank is not None and not spec.checkpoint.export_merged:
        raise ConfigError(
            "--format nemo2: an adapter alone has no NeMo 2 form here; resubmit with checkpoint.export_merged=true"
        )
    choice = export_run(paths.root, step)
    print(f"exported to {paths.export}", flush=True)
    if nemo2:
        export_nemo2(paths.export, paths.export_nemo2)
        print(f"exported to {paths.export_nemo2}", flush=True)
    if _answers_wanted(spec):
        record_answers(paths, spec.logging.prompts, paths.export, "after")
    for line in _held_out_change(paths, choice.step):
        print(line, flush=True)
    attempt = RankEnv.from_environ().attempt
    append_event(paths, "exported", attempt=attempt, path=str(paths.export), step=choice.step, why=choice.why)
    return ExitCode.OK


def _answers_wanted(spec: RunSpec) -> bool:
    return bool(spec.logging.prompts) and spec.checkpoint.export and spec.model.init == "pretrained"


def _held_out_change(paths: RunPaths, step: int) -> list[str]:
    """The held-out loss before training and at the exported step (or the last before it that was evaluated)."""
    records = [record for record in read_lines(paths.metrics) if "eval_loss" in record and record["step"] <= step]
    if len(records) < 2:
        return []
    return [f"held-out loss: {records[0]['eval_loss']:.4f} before, {records[-1]['eval_loss']:.4f} after training"]
