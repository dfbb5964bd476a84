"""`python -m sft chat RUN|DIR`: talk to an exported model, or to a checkpoint of a run, in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher.contract.errors import ConfigError, DataError, RunStateError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.model_shape import ADAPTER_CONFIG
from launcher.contract.rundir import RunPaths, named_run
from launcher.contract.spec import DataSpec, EvaluationSpec, RunSpec, read_resolved
from sft.commands.export import export_run
from sft.data.encoding.tokenizer import load_tokenizer
from sft.data.reading.messages import Message
from sft.generation.evaluation_prompts import stop_tokens
from sft.generation.talk import Talker, load_talker
from sft.hf.stop_tokens import recorded_stop_tokens

_HELP = "/reset forgets the conversation, /system TEXT sets its instructions, /quit or Ctrl-D ends"


def chat(options: argparse.Namespace) -> ExitCode:
    """Read questions from standard input and write answers, until it ends."""
    sampling = _sampling(options)
    with _model(options.model, options.step) as (directory, data, trained):
        tokenizer = load_tokenizer(directory)
        stops = stop_tokens(RunSpec(evaluation=sampling), tokenizer, directory) | trained
        talker = load_talker(directory, data, sampling, stops)
        if sys.stdin.isatty():
            print(f"{options.model}: {_HELP}", file=sys.stderr)
        if not talker.has_template:
            print("no chat template: each line is continued by itself", file=sys.stderr)
        _talk(talker, options.system)
    return ExitCode.OK


def _sampling(options: argparse.Namespace) -> EvaluationSpec:
    """Return the settings of answers, or raise ConfigError."""
    if options.max_new_tokens < 1 or not 0 <= options.temperature < math.inf or not 0 < options.top_p <= 1:
        raise ConfigError("--max-new-tokens must be at least 1, --temperature at least 0, and --top-p in (0, 1]")
    return EvaluationSpec(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )


@contextlib.contextmanager
def _model(place: Path, step: int | None) -> Iterator[tuple[Path, DataSpec, set[int]]]:
    """Yield a Hugging Face directory, how its prompts are written, and the tokens that it was trained to stop with.

    A checkpoint that was not exported is exported to a temporary directory.
    """
    place = named_run(place)
    paths = RunPaths(place.resolve())
    if not paths.config.is_file():
        if step is not None:
            raise RunStateError(f"--step: {place} is not a run directory: it has no {paths.config.name}")
        if not any((place / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise RunStateError(f"{place} is neither a run nor a model: it has no {paths.config.name} or config.json")
        yield place, DataSpec(), set()
        return
    spec, trained = read_resolved(paths.config), set(recorded_stop_tokens(paths))
    # An export has the run's template as its tokenizer's own.
    template = "none" if spec.data.chat_template == "none" else "tokenizer"
    data = dataclasses.replace(spec.data, chat_template=template)
    if step is None and paths.export.is_dir():
        yield paths.export, data, trained
        return
    with tempfile.TemporaryDirectory(prefix="sft-chat-") as scratch:
        export_run(paths.root, step, out_dir=Path(scratch) / "model")
        yield Path(scratch) / "model", data, trained


def _talk(talker: Talker, system: str | None) -> None:
    turns = _begun(system)
    for number, line in enumerate(_lines()):
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word in ("/reset", "/system"):
            system = rest if word == "/system" else system
            turns = _begun(system)
        elif word.startswith("/"):
            print(_HELP, file=sys.stderr)
        else:
            answer = _answer(talker, [*turns, Message("user", line)], number)
            if answer is not None:
                turns += [Message("user", line), Message("assistant", answer)]


def _begun(system: str | None) -> list[Message]:
    return [Message("system", system)] if system else []


def _lines() -> Iterator[str]:
    """Yield what is typed, without blank lines."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (input() then has arrows and a history)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _answer(talker: Talker, turns: list[Message], number: int) -> str | None:
    """Print an answer while it comes and return it, or None where it was refused or interrupted."""
    said = ""
    try:
        for piece in talker.answer(turns, number):
            said += piece
            print(_printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" (interrupted)")
        return None
    except (ConfigError, DataError) as error:
        print(f"error: {error}; /reset begins anew", file=sys.stderr)
        return None
    print(flush=True)
    return said


def _printable(text: str) -> str:
    """Return the text with control characters spelled out: they could do anything to a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
