"""`python -m sft`: the commands inside a job. `prepare` and `export` run as one process, `train` runs on every rank.

`audit` runs wherever the data are, before there is a job. Exit codes are those of launcher/contract/exit_codes.py.
Errors that a user can fix are printed without a traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from launcher.contract.errors import LauncherError, is_storage_fault
from launcher.contract.exit_codes import ExitCode
from launcher.contract.versions import check_versions
from sft.commands.bench_arguments import add_arguments
from sft.runtime.error_record import record_error
from sft.runtime.imports import uncollected
from sft.runtime.start_clock import StartClock


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, run the command, and return its exit code. Errors become exit codes too."""
    options = _parser().parse_args(arguments)
    _quieten_libraries()
    if options.command != "audit":  # audit runs before there is a job, and may fetch data from the hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        if options.command != "preflight":  # preflight itself compares the versions of all nodes
            check_versions()
        return int(options.run(options))
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _record(options, error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except Exception as error:  # whatever it is must get into the log, and other ranks must not wait for this one
        if isinstance(error, OSError) and is_storage_fault(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = ExitCode.IO_ERROR
        else:
            traceback.print_exc()
            code = ExitCode.FAILURE
        _record(options, error)
    return int(code)


def _record(options: argparse.Namespace, error: BaseException) -> None:
    """Write the error to the run directory, where the launcher looks for the first cause of a failure."""
    if "path" in options:  # a benchmark belongs to no run
        record_error(options.path, error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sft", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, what, argument in (
        ("prepare", _prepare, "convert the model if need be, tokenize the data into the cache", "config"),
        (
            "audit",
            _audit,
            "show what would be trained and what is lost, and write an HTML report",
            "config",
        ),
        ("preflight", _preflight, "look for a bad node (started once on each node)", "config"),
        ("train", _train, "train (started once for each rank)", "config"),
        ("export", _export, "write the best or newest checkpoint as a Hugging Face directory", "run"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("path", type=Path, metavar=argument.upper(), help=f"path of the {argument}")
        command.set_defaults(run=run)
        if name == "audit":
            command.add_argument("--output", type=Path, help="file of the report; default CONFIG.audit.html beside it")
        if name == "export":
            command.add_argument("--step", type=int, help="this checkpoint; default what checkpoint.export_step says")
            command.add_argument(
                "--format",
                choices=("hf", "nemo2"),
                default="hf",
                help="nemo2: a NeMo 2 checkpoint in export_nemo2/ as well",
            )
    what = "measure training speed and memory with random weights and tokens, optionally beside other trainers"
    command = commands.add_parser("bench", help=what, description=what)
    add_arguments(command)
    command.set_defaults(run=_bench)
    what = "talk to an exported model, or to a checkpoint of a run"
    command = commands.add_parser("chat", help=what, description=what)
    _add_chat_arguments(command)
    command.set_defaults(run=_chat)
    return parser


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="RUN|DIR", help="a run, or the directory of a model or adapter")
    parser.add_argument("--step", type=int, help="of a run, the checkpoint of this step instead of its export")
    parser.add_argument("--system", help="instructions: the system turn")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=1234, help="seed of sampling")


def _chat(options: argparse.Namespace) -> ExitCode:
    from sft.commands.chat import chat

    return chat(options)


def _bench(options: argparse.Namespace) -> ExitCode:
    from sft.commands.bench import bench

    return bench(options)


def _prepare(options: argparse.Namespace) -> ExitCode:
    with uncollected():
        from sft.commands.prepare import prepare

    return prepare(options.path)


def _audit(options: argparse.Namespace) -> ExitCode:
    with uncollected():
        from sft.commands.audit import audit

    return audit(options.path, options.output)


def _preflight(options: argparse.Namespace) -> ExitCode:
    with uncollected():
        from sft.health.preflight.run import preflight

    return preflight(options.path)


def _train(options: argparse.Namespace) -> ExitCode:
    clock = StartClock.from_environ()
    with uncollected():
        from sft.training.trainer import train
    clock.end("imports")

    # After the import, because Lightning sets the level of its loggers when it is imported.
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return train(options.path, clock)


def _export(options: argparse.Namespace) -> ExitCode:
    with uncollected():
        from sft.commands.export import export

    return export(options.path, options.step, nemo2=options.format == "nemo2")


def _quieten_libraries() -> None:
    """Keep warnings and advice of other libraries out of the logs. Their errors, and our own warnings, stay."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|pytorch_lightning|lightning_fabric|transformers)\b.*")
    for name in ("megatron", "torch.distributed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _leave(code: int) -> None:
    """End the process with exit code `code`, without cleaning up."""
    # After an error, an orderly exit would wait for collectives that other ranks never join.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
