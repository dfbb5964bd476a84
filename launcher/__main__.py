"""`python -m launcher`: parse the arguments, run the command, print errors as one block."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import __version__
from launcher.commands import (
    beside,
    cluster,
    explain,
    import_config,
    init,
    logs,
    mcp,
    nodes,
    plan,
    prepare,
    report,
    resubmit,
    results,
    status,
    submit,
    top,
    usage,
)
from launcher.commands.arguments import Handler, command, json_text
from launcher.contract.errors import LauncherError, is_storage_fault
from launcher.contract.exit_codes import ExitCode, exit_code_reference

_EPILOG = "\n".join(
    [
        "exit codes:",
        *(f"{code.value:>4}  {code.meaning}" for code in ExitCode),
        "",
        "`submit --follow`, `logs -f` and `wait` exit with the run's own exit code.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        Path.cwd()
    except FileNotFoundError:
        print("error: the working directory was deleted; change to one that exists", file=sys.stderr)
        return int(ExitCode.BAD_INPUT)
    options = _parse(words)
    if os.path.expanduser("~") == "~":  # noqa: PTH111 (Path raises an error)
        print("error: this user has no home directory here; set HOME to a folder that is yours", file=sys.stderr)
        return int(ExitCode.BAD_INPUT)
    options.command_line = ["launcher", *words]
    handler: Handler = options.handler
    try:
        from launcher.remote.hand_over import hand_over  # late: --help does not need it

        elsewhere = hand_over(options, words)
        return handler(options) if elsewhere is None else elsewhere
    except LauncherError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.OK)
    except OSError as error:
        if options.debug or not (is_storage_fault(error) or error.errno == errno.ENAMETOOLONG):
            return _unforeseen(error, options)
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.IO_ERROR if is_storage_fault(error) else ExitCode.BAD_INPUT)
    except Exception as error:
        return _unforeseen(error, options)


def _unforeseen(error: Exception, options: argparse.Namespace) -> int:
    if options.debug:
        raise error
    print(f"error: {type(error).__name__}: {error} (a bug; --debug shows the traceback)", file=sys.stderr)
    return int(ExitCode.FAILURE)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. argparse leaves positional words after an option (`submit cfg.yaml --json a=b`) unparsed."""
    parser = build_parser()
    head = words[: words.index("--")] if "--" in words else words
    options, rest = parser.parse_known_args(head)
    if hasattr(options, "program"):  # `shell`: what follows -- is the program's
        options.program = list(words[len(head) + 1 :])
    elif head is not words:
        options, rest = parser.parse_known_args(words)
    if rest and getattr(options, "host", "") is None and not rest[0].startswith("-"):
        options.host = rest.pop(0)  # as in `nodes add --cluster=c node1`
    many = next((name for name in ("overrides", "runs") if hasattr(options, name)), None)
    if rest and (many is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and many is not None:
        setattr(options, many, [*getattr(options, many), *rest])
    return options


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="launcher",
        description="Fine-tune large language models on a Slurm cluster from one YAML file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"launcher {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for family in (
        *(submit, prepare, init, plan, status, logs, top, beside, usage, resubmit),
        *(results, nodes, cluster, import_config, report, explain, mcp),
    ):
        family.add(commands)
    completion = command(commands, "completion", _completion, "print a shell completion script")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell that will read the script")
    reference = command(
        commands, "reference", _reference, "print a page of the reference: config keys, exit codes or JSON"
    )
    reference.add_argument(
        "page", nargs="?", choices=("config", "exit-codes", "json"), default="config", help="default: config"
    )
    schema = command(
        commands, "schema", _schema, "print the JSON schema of a command's output or of a run's file, or their names"
    )
    schema.add_argument("name", nargs="?", metavar="NAME", help="e.g. status or events; default: print all names")
    return parser


def _completion(options: argparse.Namespace) -> int:
    from launcher.commands.completion import completion_script

    print(completion_script(build_parser(), options.shell))
    return int(ExitCode.OK)


def _reference(options: argparse.Namespace) -> int:
    if options.page == "exit-codes":
        print(exit_code_reference(), end="")
        return int(ExitCode.OK)
    if options.page == "json":
        from launcher.contract.forms.page import json_reference

        print(json_reference(), end="")
        return int(ExitCode.OK)
    from launcher.contract.config.reference import config_reference

    print(config_reference(), end="")
    return int(ExitCode.OK)


def _schema(options: argparse.Namespace) -> int:
    from launcher.contract.forms.schemas import read_schema, schema_names

    print("\n".join(schema_names()) if options.name is None else json_text(read_schema(options.name)))
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
