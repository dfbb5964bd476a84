"""The versions that a run has of Python and of the packages it trains with, and which of them do not work.

`launcher validate`, preflight and the start of each rank look them up here. The bounds are those of setup.cfg, which
states what the tests were run with; pip keeps to them, a container image or a cluster's modules need not.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.contract.errors import ConfigError
from launcher.contract.spec import RuntimeSpec

PACKAGES = ("torch", "megatron-core", "pytorch-lightning", "transformers", "triton")
ABSENT = "absent"


def parse_version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, e.g. (2, 13, 0) for 2.13.0+cpu. Zeros at the end do not count."""
    release = re.match(r"\d+(\.\d+)*", text.strip())
    numbers = [int(number) for number in release.group().split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The versions of one package that work."""

    first: str
    """The first one; with earlier ones a run goes wrong."""
    why_first: str
    before: str | None = None
    """The first one of which nothing is known; None where newer ones are expected to work."""


_NEEDS_TRITON = (0, 18)
"""From this Megatron-core on, which imports it on CPUs, too; torch brings it with its CUDA builds alone."""

BOUNDS: dict[str, Bounds] = {
    "python": Bounds("3.11", "the code uses its syntax and library"),
    "torch": Bounds("2.8", "matrix products of bf16 factors with fp32 results came with it"),
    "megatron-core": Bounds("0.16.1", "the patches in sft/megatron/patches are written for it", before="0.20"),
    "pytorch-lightning": Bounds("2.6.6", "earlier ones resume at another step"),
    "transformers": Bounds("5", "it writes configs and tokenizers in another form"),
}


def installed_versions() -> dict[str, str]:
    """Return the versions that this Python has, by name, without importing a package."""
    return {"python": platform.python_version()} | {package: _installed(package) for package in PACKAGES}


@functools.cache  # a sweep checks hundreds of configs
def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def version_problems(versions: Mapping[str, str]) -> list[str]:
    """Return what is wrong with these versions, one message for each package that is not absent."""
    problems = []
    for name, bounds in BOUNDS.items():
        version = versions.get(name, ABSENT)
        if version == ABSENT:
            continue
        number = parse_version(version)
        if number < parse_version(bounds.first):
            problems.append(f"{name} {version} is too old: {bounds.why_first}; install {_wanted(name, bounds)}")
        elif bounds.before is not None and number >= parse_version(bounds.before):
            problems.append(f"{name} {version} is newer than what is known to work; install {_wanted(name, bounds)}")
    megatron = versions.get("megatron-core", ABSENT)
    if megatron != ABSENT and parse_version(megatron) >= _NEEDS_TRITON and versions.get("triton") == ABSENT:
        problems.append(f"megatron-core {megatron} imports triton, which is absent; install triton")
    return problems


def check_versions() -> None:
    """Raise ConfigError where this Python has versions that do not work."""
    problems = version_problems(installed_versions())
    if problems:
        raise ConfigError([f"{problem} (in {sys.executable})" for problem in problems])


def ranks_versions(runtime: RuntimeSpec) -> dict[str, str] | None:
    """Return the versions of the ranks' Python, if that is this one, else None, because only the nodes can tell."""
    return installed_versions() if runtime.kind == "none" and runtime.python is None else None


def describe_versions(versions: Mapping[str, str]) -> str:
    """Return one line for people, e.g. `python 3.12.1, torch 2.13.0`."""
    return ", ".join(f"{name} {versions[name]}" for name in BOUNDS if name in versions)


def _wanted(name: str, bounds: Bounds) -> str:
    return f"{name}>={bounds.first}{f',<{bounds.before}' if bounds.before else ''}"
