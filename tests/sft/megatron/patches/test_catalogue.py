"""Every patch finds what it changes in the installed Megatron-core, and names a test that is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sft.megatron import core
from sft.megatron.patches.catalogue import PATCHES
from sft.megatron.patches.patch import Patch, install

TESTS = Path(__file__).parents[3]
FITTING = [patch for patch in PATCHES if patch.fits(core.__version__)]


@pytest.mark.parametrize("patch", FITTING, ids=lambda patch: patch.name)
def test_targets_exist_in_the_installed_version(patch: Patch) -> None:
    assert patch.missing() == []


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.name} from {patch.since}")
def test_test_exists(patch: Patch) -> None:
    file, _, name = patch.test.partition("::")
    functions = [node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in functions


def test_each_patch_is_for_one_version_once() -> None:
    for version in ("0.16.1", "0.17.1", "0.18.2", "0.19.2"):
        names = [patch.name for patch in PATCHES if patch.fits(version)]
        assert len(set(names)) == len(names)
        assert ("write_errors common.pt" in names) == (version < "0.19")


def test_a_patch_without_its_target_is_an_error() -> None:
    applied: list[str] = []
    stale = Patch(
        name="stale",
        why="",
        targets=("megatron.core.parallel_state:gone",),
        test="",
        apply=lambda: applied.append("stale"),
    )
    with pytest.raises(RuntimeError, match=r"has no megatron\.core\.parallel_state:gone, which the patch stale"):
        install((stale,), "0.18.0")
    install((stale,), "0.20")  # not for this version: left alone
    assert applied == []
