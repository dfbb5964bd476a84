"""`python -m sft prepare CONFIG`: the single process before the ranks, which gets model and data ready for them."""

from __future__ import annotations

from pathlib import Path

from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.logger_packages import missing_loggers
from launcher.contract.rundir import RunPaths, append_event
from launcher.contract.spec import RunSpec, read_resolved
from launcher.contract.topology import build_topology
from sft.data.encoding.same_split import check_split_of_export
from sft.data.prepared.held_out import open_validation_sets
from sft.data.prepared.ignored_keys import check_ignored_keys
from sft.data.prepared.prepare import check_vocabulary, prepare_data
from sft.data.prepared.report import report
from sft.data.prepared.schedule import check_schedule
from sft.generation.evaluation_prompts import check_prompts
from sft.hf.answer import answers_wanted, record_answers
from sft.hf.checks import check_model_settings
from sft.hf.files import check_model_files
from sft.hf.run_template import record_template
from sft.hf.stop_tokens import record_stop_tokens
from sft.model_source import resolve_model_dir
from sft.models.registry import read_architecture
from sft.models.unused_settings import unused_settings
from sft.runtime.rank_env import RankEnv


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
    print("".join(f"{remark}\n" for remark in unused_settings(model_dir, spec)), end="")
    tokenizer_dir = Path(spec.model.tokenizer) if spec.model.tokenizer else model_dir
    if spec.model.tokenizer:
        check_split_of_export(tokenizer_dir, model_dir)
    data = prepare_data(spec, tokenizer_dir)
    remark = check_schedule(spec, data.train)
    if remark is not None:
        print(remark)
    check_vocabulary(data, architecture.shape.vocab_size)
    record_stop_tokens(paths, data.stop_tokens)
    record_template(paths, spec)
    caches = data.caches
    for name, prepared in open_validation_sets(spec, tokenizer_dir, build=True):
        check_vocabulary(prepared, architecture.shape.vocab_size)
        if prepared.validation is not None:
            print(report(name, prepared.validation))
            caches += (prepared.validation,)
    check_ignored_keys(spec, caches)
    check_prompts(spec, tokenizer_dir, model_dir, architecture.shape.vocab_size)
    if answers_wanted(spec):
        record_answers(paths, spec, model_dir, "before")
    append_event(paths, "prepared", attempt=RankEnv.from_environ().attempt)
    return ExitCode.OK


def check_loggers(spec: RunSpec) -> None:
    """Raise ConfigError if a package is missing that a logger needs."""
    problems = [f"{key}: {message}" for key, message in missing_loggers(spec)]
    if problems:
        raise ConfigError(problems)
