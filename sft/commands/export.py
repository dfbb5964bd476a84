"""`python -m sft export`: write a checkpoint of a run as a Hugging Face directory, and print what training changed."""

from __future__ import annotations

from pathlib import Path

from launcher.contract.errors import CheckpointError, ConfigError, RunStateError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.records import read_metrics
from launcher.contract.rundir import RunPaths, append_event, named_run
from launcher.contract.spec import RunSpec, read_resolved
from sft.checkpoint.choose import Choice, choose
from sft.checkpoint.contents import SHARDED, TrainerState
from sft.checkpoint.same_model import check_base_weights, check_model
from sft.hf.adapter_export import export_adapter
from sft.hf.answer import answers_wanted, record_answers
from sft.hf.exporter import export_checkpoint
from sft.hf.files import weights_identity
from sft.hf.run_template import recorded_template
from sft.hf.stop_tokens import add_stop_tokens, recorded_stop_tokens
from sft.model_source import resolve_model_dir
from sft.models.numerics import numerics
from sft.models.registry import read_architecture
from sft.nemo.export import export_nemo2
from sft.runtime.rank_env import RankEnv


def export(run: Path, step: int | None = None, *, nemo2: bool = False) -> ExitCode:
    """Write RUN/export from the best, newest or given checkpoint, and print what training changed.

    With `nemo2` the same model is written to RUN/export_nemo2, too.
    """
    paths = RunPaths(named_run(run).resolve())
    spec = _spec_of(paths, run)
    if nemo2 and spec.model.lora.rank is not None and not spec.checkpoint.export_merged:
        raise ConfigError(
            "--format nemo2: an adapter alone has no NeMo 2 form here; resubmit with checkpoint.export_merged=true"
        )
    choice = export_run(paths.root, step)
    print(f"exported to {paths.export}", flush=True)
    if nemo2:
        export_nemo2(paths.export, paths.export_nemo2)
        print(f"exported to {paths.export_nemo2}", flush=True)
    if answers_wanted(spec):
        record_answers(paths, spec, paths.export, "after")
    for line in _held_out_change(paths, choice.step):
        print(line, flush=True)
    attempt = RankEnv.from_environ().attempt
    append_event(paths, "exported", attempt=attempt, path=str(paths.export), step=choice.step, why=choice.why)
    return ExitCode.OK


def export_run(run_root: Path, step: int | None = None, *, out_dir: Path | None = None) -> Choice:
    """Write RUN/export, or `out_dir`, from the checkpoint of `step`, and return the choice.

    By default it is the checkpoint that the config says.
    """
    paths = RunPaths(run_root)
    spec = _spec_of(paths, run_root)
    choice = choose(paths, spec, step)
    stop_tokens = recorded_stop_tokens(paths)
    print(f"exporting {choice.path.name}: {choice.why}", flush=True)
    model_dir, target = resolve_model_dir(spec, convert=False), out_dir or paths.export
    _write(choice.path, spec, model_dir, target, recorded_template(paths, spec))
    add_stop_tokens(target, model_dir, stop_tokens)
    return choice


def _spec_of(paths: RunPaths, shown: Path) -> RunSpec:
    """Return the config of a run, or raise RunStateError where `shown`, as the user wrote it, is no run directory."""
    if not paths.config.is_file():
        raise RunStateError(f"{shown} is not a run directory: it has no {paths.config.name}")
    return read_resolved(paths.config)


def _write(checkpoint: Path, spec: RunSpec, model_dir: Path, out_dir: Path, template: bytes | None) -> None:
    tokenizer_dir = Path(spec.model.tokenizer) if spec.model.tokenizer else None
    _check_trained_with(checkpoint, model_dir)
    sharded = checkpoint / SHARDED
    if spec.model.lora.rank is None:
        export_checkpoint(sharded, model_dir, out_dir, tokenizer_dir=tokenizer_dir, chat_template=template)
        return
    merged = spec.checkpoint.export_merged
    export_adapter(
        sharded, model_dir, out_dir, spec.model.lora, merged=merged, tokenizer_dir=tokenizer_dir, chat_template=template
    )


def _check_trained_with(checkpoint: Path, model_dir: Path) -> None:
    """Raise ConfigError where a checkpoint records another model, or other frozen weights, than are in `model_dir`."""
    try:
        trainer = TrainerState.read(checkpoint)
    except CheckpointError:  # of another version: its bytes are as they were written, and it records neither
        return
    check_model(checkpoint, trainer, numerics(read_architecture(model_dir)))
    if trainer.base_weights is not None:
        check_base_weights(checkpoint, trainer, weights_identity(model_dir))


def _held_out_change(paths: RunPaths, step: int) -> list[str]:
    """Return a line with the held-out loss before training and at the last evaluation up to `step`, or no line."""
    records = [record for record in read_metrics(paths) if "eval_loss" in record and record["step"] <= step]
    if len(records) < 2:
        return []
    return [f"held-out loss: {records[0]['eval_loss']:.4f} before, {records[-1]['eval_loss']:.4f} after training"]
