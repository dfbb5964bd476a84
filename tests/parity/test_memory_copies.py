"""A run that goes on from copies in its nodes' memory is bitwise the one that was not disturbed.

Nodes are names here: each has a folder of its own in one folder that stands for their memory, and a lost node is a
folder that is removed. tests/slurm/test_in_place.py has the same on a real Slurm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import launcher.contract.copy_folder
from launcher.contract.errors import ConfigError
from launcher.contract.lease import Owner, release, take
from launcher.contract.rundir import RunPaths, read_lines
from launcher.contract.spec import LoraSpec, read_resolved, to_yaml
from sft.training.trainer import train
from tests.parity.runs import curve, make_run, run_training
from tests.parity.test_checkpoint import mounted
from tests.parity.test_families import family_model
from tests.ranks import run_ranks
from tests.tiny_model import make_material

pytestmark = pytest.mark.parity

STEPS = 7
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "every": 3, "packing": True, "distributed": True}
DIED = "the ranks died"
"""They do in step 6: copies are of steps 2 and 4, and the checkpoint is of step 3."""

Material = tuple[Path, Path]
Layout = tuple[int, int, dict[str, Any]]
"""So many nodes of so many ranks, and the topology over them."""

DP2: Layout = (2, 1, {})
TP2_PP2: Layout = (2, 2, {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True})


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"), 36, tied=True)


def train_on_nodes(config: Path, attempt: str, memory: Path, nodes: Sequence[str], dies_in: int | None) -> str:
    """Runs on a rank of one of `nodes`: the name of what `train` returns, or DIED."""
    import sft.engine.module

    training_step = sft.engine.module.SFTGPT.training_step

    def step(self: sft.engine.module.SFTGPT, batch: object, batch_idx: int) -> None:
        if self.trainer.global_step + 1 == dies_in:
            raise KeyError(DIED)
        training_step(self, batch, batch_idx)  # type: ignore[arg-type]

    sft.engine.module.SFTGPT.training_step = step  # type: ignore[method-assign]
    launcher.contract.copy_folder.MEMORY = memory
    rank, per_node = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) // len(nodes)
    os.environ |= {"SFT_ATTEMPT": attempt, "SLURMD_NODENAME": nodes[rank // per_node]}
    os.environ |= {"LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node)}
    try:
        return train(config).name
    except KeyError as fault:
        return str(fault.args[0])


class Disturbed:
    """A run whose ranks have died in step 6, with what its nodes have in their memory."""

    def __init__(
        self, root: Path, material: Material, layout: Layout, *, model: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        nodes, per_node, topology = layout
        self.ranks = nodes * per_node
        self.nodes = [f"node{number}" for number in range(nodes)]
        self.memory = root / "memory"
        self.memory.mkdir()
        given = {**SETTINGS, **settings, "ranks": per_node, "nodes": nodes, "topology": topology}
        self.whole = make_run(root, *material, name="whole", **given)
        self.paths = make_run(root, *material, copy_every=2, **given)
        for paths in (self.whole, self.paths):
            spec = read_resolved(paths.config)
            own = dataclasses.replace(spec.model, **{"hidden_dropout": 0.1, **(model or {})})
            paths.config.write_text(to_yaml(dataclasses.replace(spec, model=own)))
        assert self.start("7.0", self.nodes, dies_in=6) == [DIED] * self.ranks

    def start(self, attempt: str, nodes: Sequence[str], dies_in: int | None = None) -> list[str]:
        """Start ranks as a batch script does, which holds the run from one attempt to the next."""
        take(self.paths, Owner(attempt=attempt, job_id="7"))
        return run_ranks(self.ranks, train_on_nodes, self.paths.config, attempt, self.memory, nodes, dies_in)

    def folder(self, node: str) -> Path:
        (folder,) = self.memory.glob(f"sft-copies-*-{node}")
        return folder

    def part(self, node: str, step: int, rank: int) -> Path:
        path = self.folder(node) / f"step-{step:08d}.rank-{rank:05d}.pt"
        assert path.is_file()
        return path

    def goes_on(self, nodes: Sequence[str] | None = None) -> int:
        """Restart in place, with the end of the run that was not disturbed. Return the step that it goes on after."""
        assert self.start("7.0-1", nodes or self.nodes) == ["OK"] * self.ranks
        release(self.paths, Owner(attempt="7.0-1", job_id="7"))
        whole = run_ranks(self.ranks, train_on_nodes, self.whole.config, "by-hand", self.memory, self.nodes, None)
        assert whole == ["OK"] * self.ranks
        assert curve(self.paths) == curve(self.whole)
        return int(told(self.paths, "training_started")[-1]["step"])


def told(paths: RunPaths, event: str) -> list[dict[str, Any]]:
    return [record for record in read_lines(paths.events) if record["event"] == event]


LAYOUTS = [
    pytest.param(DP2, id="dp2"),
    pytest.param((1, 2, {"tensor_parallel": 2}), id="tp2_on_one_node", marks=pytest.mark.slow),
    pytest.param(TP2_PP2, id="tp2_pp2", marks=pytest.mark.slow),
    pytest.param((2, 2, {"tensor_parallel": 2}), id="tp2_dp2", marks=pytest.mark.slow),
    pytest.param((2, 2, {"pipeline_parallel": 2, "virtual_pipeline": 2}), id="pp2_vpp2_dp2", marks=pytest.mark.slow),
    pytest.param((2, 1, {"context_parallel": 2}), id="cp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_goes_on_from_the_newest_copy(layout: Layout, tmp_path: Path, material: Material) -> None:
    run = Disturbed(tmp_path, material, layout)
    for node in run.nodes:  # each has all parts here: its own, and those of the other
        names = sorted(path.name for path in run.folder(node).glob("*.pt"))
        assert names == [f"step-{step:08d}.rank-{rank:05d}.pt" for step in (2, 4) for rank in range(run.ranks)]
    assert run.goes_on() == 4
    (used,) = told(run.paths, "copy_used")
    assert (used["step"], used["made_by"], used["fetched"]) == (4, "7.0", [])
    assert [(event["step"], event["bytes"] > 0) for event in told(run.paths, "first_copy")] == [(2, True)]
    assert not list(run.memory.iterdir())


SLOW = pytest.mark.slow
KINDS = {
    "bf16": {"precision": "bf16"},
    "bf16_fused": {"precision": "bf16", "kernels": "fused"},
    "bf16_gathered_late": {"precision": "bf16", "overlap": True},
    "fp32_fused_gathered_late": {"kernels": "fused", "overlap": True},
    "fp8": {"precision": "fp8"},
    "plain_optimizer": {"distributed": False},
    "plain_optimizer_bf16": {"distributed": False, "precision": "bf16"},
    "lora": {"model": {"lora": LoraSpec(rank=4, dropout=0.1)}},
    "lora_fp8": {"model": {"lora": LoraSpec(rank=4)}, "precision": "fp8"},
    "asynchronous_checkpoints": {"asynchronous": True},
    "spikes": {"spike_factor": 5.0, "on_bad_step": "skip"},
}


@pytest.mark.slow  # dp2 in fp32 stands for them
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_goes_on_from_a_copy(kind: str, tmp_path: Path, material: Material) -> None:
    run = Disturbed(tmp_path, material, DP2, **KINDS[kind])
    assert run.goes_on() == 4


@pytest.mark.slow  # dp2 of a dense model stands for it
@pytest.mark.parametrize("case", ["qwen3_moe", "glm4_moe"])
def test_experts_of_two_nodes_go_on_from_a_copy(case: str, tmp_path: Path, material: Material) -> None:
    """Of the second, routers have biases that are buffers, which come from the model again."""
    directory = family_model(tmp_path / "model", case)
    run = Disturbed(tmp_path, (directory, material[1]), (2, 1, {"expert_parallel": 2}), model={"hidden_dropout": 0.0})
    assert run.goes_on() == 4


def test_a_lost_node_loses_nothing(tmp_path: Path, material: Material) -> None:
    """The ranks of a spare node, which has nothing, get their part from the lost node's neighbour."""
    run = Disturbed(tmp_path, material, DP2)
    shutil.rmtree(run.folder("node1"))
    assert run.goes_on(["node0", "node2"]) == 4
    assert [event["fetched"] for event in told(run.paths, "copy_used")] == [[1]]


def train_with_little_memory(config: Path, memory: Path, dies_in: int | None) -> str:
    """Runs on the only rank: its memory is full once the first copy is in it."""
    import sft.checkpoint.memory_copies

    make = sft.checkpoint.memory_copies.MemoryCopies.make

    def fill(self: sft.checkpoint.memory_copies.MemoryCopies, *arguments: Any) -> None:
        make(self, *arguments)
        with (memory / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass

    sft.checkpoint.memory_copies.MemoryCopies.make = fill  # type: ignore[method-assign]
    return train_on_nodes(config, "7.0", memory, ["node0"], dies_in)


@pytest.fixture
def little_memory(tmp_path: Path) -> Iterator[Path]:
    """Room for two copies on one node, and not for those of two nodes."""
    yield from mounted(tmp_path / "memory", "8m")


def test_a_copy_that_finds_no_room_leaves_the_one_before(
    little_memory: Path, tmp_path: Path, material: Material
) -> None:
    """Training goes on, too. Here there is no checkpoint at all."""
    paths = make_run(tmp_path, *material, **{**SETTINGS, "ranks": 1, "every": None, "copy_every": 2})
    take(paths, Owner(attempt="7.0", job_id="7"))
    assert run_ranks(1, train_with_little_memory, paths.config, little_memory, 6) == [DIED]
    (failed,) = told(paths, "copy_failed")
    assert failed["step"] == 4
    assert "No space left on device" in failed["reason"]
    (little_memory / "filler").unlink()
    take(paths, Owner(attempt="7.0-1", job_id="7"))
    assert run_ranks(1, train_on_nodes, paths.config, "7.0-1", little_memory, ["node0"], None) == ["OK"]
    assert [event["step"] for event in told(paths, "training_started")] == [0, 2]
    whole = make_run(tmp_path, *material, name="whole", **{**SETTINGS, "ranks": 1})
    run_training(whole, 1)
    assert curve(paths) == curve(whole)


def error_of_little_memory(config: Path, memory: Path) -> str:
    """Runs on a rank: the error of a job's first start."""
    try:
        return train_on_nodes(config, "7.0", memory, ["node0", "node1"], None)
    except ConfigError as error:
        return str(error)


def test_copies_that_do_not_fit_are_refused_with_the_arithmetic(
    little_memory: Path, tmp_path: Path, material: Material
) -> None:
    paths = make_run(tmp_path, *material, **{**SETTINGS, "ranks": 1, "nodes": 2, "copy_every": 2})
    said, _ = run_ranks(2, error_of_little_memory, paths.config, little_memory)
    sums = r"2 x \((\d\.\d) MiB of its own ranks \+ (\d\.\d) MiB of another node's\) = (\d\.\d) MiB"
    found = re.search(f"checkpoint.copy_every: rank 0: copies on node0 take {sums}, and 8.0 MiB are free in ", said)
    assert found, said
    own, other, all_of_it = map(float, found.groups())
    assert 2 * (own + other) == pytest.approx(all_of_it, abs=0.3)


@pytest.mark.slow  # the choice is in test_copy_choice.py
def test_ranks_that_move_to_other_nodes_take_their_parts_along(tmp_path: Path, material: Material) -> None:
    """node1 is lost, so that node2 has its ranks, and the spare node those of node2."""
    run = Disturbed(tmp_path, material, (3, 1, {}), global_batch_size=6)
    shutil.rmtree(run.folder("node1"))
    assert run.goes_on(["node0", "node2", "node3"]) == 4
    assert [event["fetched"] for event in told(run.paths, "copy_used")] == [[2]]


@pytest.mark.slow  # the choice is in test_copy_choice.py
def test_a_part_that_one_node_lacks_comes_from_its_neighbour(tmp_path: Path, material: Material) -> None:
    run = Disturbed(tmp_path, material, TP2_PP2)
    run.part("node1", 4, 2).unlink()
    damaged = run.part("node0", 4, 1)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert run.goes_on() == 4
    assert [event["fetched"] for event in told(run.paths, "copy_used")] == [[1, 2]]


@pytest.mark.slow  # the choice is in test_copy_choice.py
def test_where_both_nodes_lack_a_part_the_checkpoint_is_used(tmp_path: Path, material: Material) -> None:
    """The older copy is whole, but the checkpoint is newer."""
    run = Disturbed(tmp_path, material, DP2)
    for node in run.nodes:
        run.part(node, 4, 1).write_bytes(b"half")
    assert run.goes_on() == 3
    (told_why,) = told(run.paths, "copy_not_used")
    assert told_why["reason"].startswith("the newest whole copy is of step 2, and a checkpoint of step 3; rank 0: ")
    assert " has 4 bytes, written were " in told_why["reason"]
    assert told_why["step"] == 3
