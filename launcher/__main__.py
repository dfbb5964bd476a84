"""`python -m launcher`: parses arguments, calls the module that does the work, prints one block on error.

Handlers import what they need: `status` should not pay for OmegaConf, nor `--help` for anything.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.errors import LauncherError
from launcher.exit_codes import ExitCode

Handler = Callable[[argparse.Namespace], int]

_EPILOG = """exit codes:
   0  done
   1  a bug or an unforeseen fault; --debug shows the traceback
   2  config, data, model or arguments are wrong: nothing was submitted
   3  the scheduler cannot be reached, or refused
   4  the run's state does not allow it (still active, already finished, unknown run)
  74  a checkpoint or file could not be written; the last complete checkpoint is untouched
  75  stopped on request with a complete checkpoint: resubmit goes on
 130  interrupted (Ctrl-C)

A run's own exit code is what `submit --follow` and `logs -f` exit with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(words)
    options.command_line = ["launcher", *words]
    handler: Handler = options.handler
    try:
        return handler(options)
    except LauncherError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.OK)
    except Exception as error:
        if options.debug:
            raise
        print(f"error: {type(error).__name__}: {error} (unforeseen; --debug shows where)", file=sys.stderr)
        return int(ExitCode.FAILURE)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """argparse gives up on positional words after an option (`submit cfg.yaml --json a=b`): they are taken up here."""
    parser = build_parser()
    options, rest = parser.parse_known_args(words)
    many = next((name for name in ("overrides", "runs") if hasattr(options, name)), None)
    if rest and (many is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and many is not None:
        setattr(options, many, [*getattr(options, many), *rest])
    return options


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="launcher",
        description="Fine-tune large language models on a Slurm cluster from one YAML file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"launcher {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _config_commands(commands)
    _run_commands(commands)
    completion = _command(commands, "completion", _completion, "print a shell completion script")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    _command(commands, "reference", _reference, "print the reference of all config keys")
    return parser


def _command(commands: Any, name: str, handler: Handler, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(handler=handler)
    # SUPPRESS: the subcommand's default would undo a --debug given before it
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    return parser


def _config_commands(commands: Any) -> None:
    for name, handler, about in (
        ("submit", _submit, "check a config, create its run directory and submit it"),
        ("render", _render, "print the batch script; submits nothing, writes nothing"),
        ("validate", _validate, "check a config and print what would run"),
    ):
        parser = _command(commands, name, handler, about)
        config = parser.add_argument("config", type=Path, help="the YAML file of the run")
        config.complete = _FILE  # type: ignore[attr-defined]  # read by shtab
        _overrides(parser)
        if name != "render":
            parser.add_argument("--json", action="store_true", help="print JSON")
        if name == "submit":
            parser.add_argument("--dry-run", action="store_true", help="print summary and script, write nothing")
            parser.add_argument("--follow", action="store_true", help="show the logs until the run has ended")


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over the file's")
    parser.add_argument("--cluster", metavar="NAME", help="a file in cluster_configs/ to use instead of the config's")


def _run_commands(commands: Any) -> None:
    for name, handler, about, runs in (
        ("status", _status, "state and progress of runs", "*"),
        ("logs", _logs, "print the logs of a run", None),
        ("resubmit", _resubmit, "go on with a run from its newest complete checkpoint", None),
        ("cancel", _cancel, "end the jobs of runs", "+"),
        ("list", _list, "runs by their files alone; asks no scheduler", ""),
    ):
        parser = _command(commands, name, handler, about)
        parser.add_argument("--run-root", type=Path, help="where runs are; default SFT_RUN_ROOT or runs")
        if runs is None:
            parser.add_argument("run", metavar="RUN", help="a run's name or directory")
        elif runs:
            parser.add_argument("runs", metavar="RUN", nargs=runs, help="runs' names or directories")
        if name == "logs":
            _log_options(parser)
        else:
            parser.add_argument("--json", action="store_true", help="print JSON")
        if name == "resubmit":
            _overrides(parser)


def _log_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="N", help="this rank's log (default 0)")
    which.add_argument("--batch", action="store_true", help="the batch script's log: prepare, export, how ranks ended")
    parser.add_argument("--attempt", metavar="A", help="default: the newest")
    parser.add_argument("-f", "--follow", action="store_true", help="print more as it comes, until the attempt ends")


_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


def _submit(options: argparse.Namespace) -> int:
    from launcher.plan import make_plan
    from launcher.submit import next_steps, script_of, submit, summary

    plan = make_plan(options.config, options.overrides, options.cluster)
    if options.dry_run:
        print(f"{summary(plan)}\n\n{script_of(plan)}", end="")
        return int(ExitCode.OK)
    attempt = submit(plan, options.command_line)
    if options.json:
        _print_json({"run": plan.paths.name, "directory": str(plan.paths.root), "job": attempt.job_id})
    else:
        print(f"{summary(plan)}\n{next_steps(plan, attempt)}", flush=True)
    return _follow(plan.paths) if options.follow else int(ExitCode.OK)


def _render(options: argparse.Namespace) -> int:
    from launcher.plan import make_plan
    from launcher.submit import script_of

    plan = make_plan(options.config, options.overrides, options.cluster)
    print(script_of(plan), end="")
    return int(ExitCode.OK)


def _validate(options: argparse.Namespace) -> int:
    import dataclasses

    from launcher.plan import make_plan
    from launcher.submit import summary

    plan = make_plan(options.config, options.overrides, options.cluster)
    if options.json:
        _print_json(
            {
                "config": dataclasses.asdict(plan.spec),
                "sources": plan.config.sources,
                "topology": dataclasses.asdict(plan.topology),
            }
        )
    else:
        print(f"{summary(plan)}\nvalid")
    return int(ExitCode.OK)


def _status(options: argparse.Namespace) -> int:
    from launcher.runs import all_runs, default_run_root, find_run
    from launcher.status import collect, table

    root = options.run_root or default_run_root()
    runs = [find_run(word, root) for word in options.runs] or all_runs(root)
    rows, problem = collect(runs)
    if options.json:
        _print_json([row.as_json() for row in rows])
    elif rows:
        print(table(rows))
    else:
        print(f"no runs in {root.absolute()}", file=sys.stderr)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return int(ExitCode.SCHEDULER)
    return int(ExitCode.OK)


def _logs(options: argparse.Namespace) -> int:
    from launcher import logs

    paths = _run(options)
    choice = {"rank": options.rank, "attempt": options.attempt, "batch": options.batch}
    if options.follow:
        return _exit_with(logs.follow(paths, **choice))
    logs.show(paths, **choice)
    return int(ExitCode.OK)


def _follow(paths: Any) -> int:
    from launcher.logs import follow

    return _exit_with(follow(paths, rank=None, attempt=None, batch=False))


def _exit_with(status: Any) -> int:
    """The run's own exit code; a run that ended without one has failed."""
    from launcher.state import JobState

    if status.exit_code is not None:
        return int(status.exit_code)
    return int(ExitCode.OK if status.state is JobState.COMPLETED else ExitCode.FAILURE)


def _resubmit(options: argparse.Namespace) -> int:
    from launcher.resubmit import child_plan, same_run
    from launcher.submit import next_steps, submit, summary

    paths = _run(options)
    if options.overrides or options.cluster:
        plan = child_plan(paths, options.overrides, options.cluster)
        attempt = submit(plan, options.command_line, parent_run=str(paths.root))
        run, text = plan.paths, f"{summary(plan)}\n{next_steps(plan, attempt)}"
    else:
        attempt = same_run(paths)
        run, text = paths, f"submitted  run {paths.name} again as job {attempt.job_id}"
    if options.json:
        _print_json({"run": run.name, "directory": str(run.root), "job": attempt.job_id})
    else:
        print(text)
    return int(ExitCode.OK)


def _cancel(options: argparse.Namespace) -> int:
    from launcher.resubmit import cancel
    from launcher.runs import default_run_root, find_run

    root = options.run_root or default_run_root()
    lines = cancel([find_run(word, root) for word in options.runs])
    if options.json:
        _print_json({"cancelled": options.runs})
    else:
        print("\n".join(lines))
    return int(ExitCode.OK)


def _list(options: argparse.Namespace) -> int:
    from launcher.runs import all_runs, default_run_root, listing
    from launcher.status import columns

    rows = listing(all_runs(options.run_root or default_run_root()))
    if options.json:
        _print_json(rows)
    else:
        head = ("RUN", "STATE", "CREATED", "TOPOLOGY", "PARENT")
        body = [
            (
                row["run"],
                row["state"] or "-",
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created_at"])),
                row["topology"],
                Path(row["parent_run"]).name if row["parent_run"] else "-",
            )
            for row in rows
        ]
        print(columns([head, *body]))
    return int(ExitCode.OK)


def _completion(options: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(build_parser(), shell=options.shell))
    return int(ExitCode.OK)


def _reference(_options: argparse.Namespace) -> int:
    from launcher.reference import config_reference

    print(config_reference(), end="")
    return int(ExitCode.OK)


def _run(options: argparse.Namespace) -> Any:
    from launcher.runs import default_run_root, find_run

    return find_run(options.run, options.run_root or default_run_root())


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
