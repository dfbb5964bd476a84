"""Which of the layouts that fit `topology: auto` takes, what it keeps of a config, and how plan tells it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.cost_model.predict import Candidate
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import DataSpec, LoraSpec, ModelSpec, ResourcesSpec, RunSpec, TrainSpec
from launcher.planning.choice import MODEL_ERROR, simplest
from launcher.planning.search import search_layouts

CAPTURED = pytest.CaptureFixture[str]


def found(gpus: int = 8) -> tuple[Candidate, ...]:
    """The layouts of 3B on so many H100s, fastest first."""
    spec = RunSpec(
        resources=ResourcesSpec(nodes=1, gpus_per_node=gpus),
        data=DataSpec(seq_length=4096),
        train=TrainSpec(global_batch_size=32, max_steps=10),
    )
    return search_layouts(spec, named_model_shape("3b"), gpu_kind("h100")).fitting


def with_speed(candidate: Candidate, tokens_per_second: float) -> Candidate:
    return dataclasses.replace(candidate, tokens_per_second=tokens_per_second)


def test_the_simplest_of_about_equally_fast_layouts_is_taken() -> None:
    """By each aspect in turn, however small the lead of the others is, and never beyond the model's error."""
    every = found()

    def first(tp: int = 1, pp: int = 1, vpp: int = 1, recompute: str = "none", micro: int = 1) -> Candidate:
        for one in every:
            topology = one.layout.topology
            sizes = topology.tensor_parallel, topology.pipeline_parallel, topology.virtual_pipeline
            if (*sizes, topology.micro_batch_size, one.layout.recompute) == (tp, pp, vpp, micro, recompute):
                return one
        raise AssertionError

    ordered = [
        first(),
        first(recompute="norms"),
        first(tp=2),
        first(pp=2),
        first(pp=2, vpp=2),
        first(tp=2, pp=2),
    ]
    for simple, other in itertools.pairwise(ordered):
        fastest = with_speed(other, 1000.0)
        near = with_speed(simple, 1000.0 * (1 - MODEL_ERROR) + 1)
        choice = simplest([fastest, near], ())
        assert (choice.taken, choice.fastest) == (near, fastest)
        assert "2.9% slower" in choice.why
        assert simplest([fastest, with_speed(simple, 1000.0 * (1 - MODEL_ERROR) - 1)], ()).taken == fastest
        assert simplest([with_speed(simple, 1000.0), with_speed(other, 999.0)], ()).taken.layout == simple.layout


def test_of_equally_simple_layouts_the_one_with_more_memory_left_is_taken() -> None:
    one, two = (
        next(each for each in found() if each.overrides["train.micro_batch_size"] == size and _is_plain(each))
        for size in (1, 2)
    )
    assert one.memory.total < two.memory.total
    assert simplest([with_speed(two, 1000.0), with_speed(one, 980.0)], ()).taken.layout == one.layout


def _is_plain(candidate: Candidate) -> bool:
    topology = candidate.layout.topology
    return topology.tensor_parallel == topology.pipeline_parallel == 1 and candidate.layout.recompute == "none"


@pytest.fixture
def planned(big: Path, capsys: CAPTURED) -> Path:
    """The config `big`; what was printed before is gone."""
    capsys.readouterr()
    return big


def taken(capsys: CAPTURED) -> dict[str, object]:
    """What the plan that was just printed as JSON says of auto."""
    answer: dict[str, object] = json.loads(capsys.readouterr().out)[0]["auto"]
    return answer


def test_plan_tells_the_fastest_and_what_auto_takes(planned: Path, capsys: CAPTURED) -> None:
    assert main(["plan", str(planned)]) == 0
    lines = capsys.readouterr().out.splitlines()
    fastest, best = (next(line for line in lines if line.startswith(word)) for word in ("fastest", "best"))
    assert fastest.endswith(", by prediction")
    assert ": what topology: auto takes, " in best
    assert main(["plan", str(planned), "--json"]) == 0
    answer = taken(capsys)
    assert 0 <= float(str(answer["slower"])) <= MODEL_ERROR
    assert str(answer["why"]) in best


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.micro_batch_size", 3),
        ("train.recompute", "offload"),
        ("topology.sequence_parallel", False),
        ("topology.context_parallel", 2),
    ],
)
def test_what_the_config_sets_is_kept(planned: Path, capsys: CAPTURED, key: str, value: object) -> None:
    word = f"{key}={str(value).lower()}"
    sizes = ["train.global_batch_size=96"]
    assert main(["validate", str(planned), word, *sizes, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    section, name = key.split(".")
    assert answer["config"][section][name] == value
    assert answer["sources"][key] == "override"
    assert main(["plan", str(planned), word, *sizes, "--json"]) == 0
    auto = taken(capsys)
    assert auto["layout"]["overrides"].get(key, value) == value  # type: ignore[index]
    assert auto["kept"] == ([] if key == "topology.context_parallel" else [key])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["topology.expert_parallel=2"], "expert_parallel and expert_tensor_parallel are for models with experts"),
        (["topology.expert_tensor_parallel=2"], "fits: leave topology.expert_tensor_parallel out"),
        (["topology.context_parallel=3"], "do not divide by"),
        (["train.micro_batch_size=7"], "no layout that fits has train.micro_batch_size 7 (no layout of 16 GPUs keeps"),
        (["train.recompute=none", "train.micro_batch_size=64"], "leave train.micro_batch_size and train.recompute out"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    planned: Path, capsys: CAPTURED, words: list[str], message: str
) -> None:
    assert main(["validate", str(planned), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: topology: auto: ")
    assert message in error


def test_the_word_in_an_override_replaces_the_topology_of_the_file(planned: Path, capsys: CAPTURED) -> None:
    """Also what the choice would keep of overrides; sizes beside the word are refused, not dropped."""
    text = planned.read_text().replace("topology: auto", "topology: {tensor_parallel: 8, sequence_parallel: true}")
    planned.write_text(text)
    assert main(["validate", str(planned), "topology=auto", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["config"]["topology"]["tensor_parallel"], answer["sources"]["topology.tensor_parallel"]) == (
        1,
        "plan",
    )
    assert main(["validate", str(planned), "topology=auto", "topology.tensor_parallel=4"]) == 2
    assert "topology.tensor_parallel is what topology=auto chooses; leave one of the two out" in capsys.readouterr().err


def test_plan_says_what_the_config_excludes(planned: Path, capsys: CAPTURED) -> None:
    assert main(["plan", str(planned), "train.micro_batch_size=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fastest, best = (next(line for line in lines if line.startswith(word)) for word in ("fastest", "best"))
    assert fastest.endswith(", by prediction; the config sets train.micro_batch_size otherwise")
    assert ", micro-batch 4: what topology: auto takes, " in best
    assert "of those with the config's train.micro_batch_size" in best


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ("{tensor_parallel: 4, sequence_parallel: true}", r"config     tp4 x dp4 = 16 ranks \+ .* \d+\.\d% slower, "),
        ("{tensor_parallel: 3}", "config     cannot run as it is: topology.tensor_parallel 3 does not divide the 8"),
    ],
)
def test_plan_tells_what_the_config_itself_makes(planned: Path, capsys: CAPTURED, sizes: str, line: str) -> None:
    assert main(["plan", str(planned)]) == 0
    assert "\nconfig " not in capsys.readouterr().out
    planned.write_text(planned.read_text().replace("topology: auto", f"topology: {sizes}"))
    assert main(["plan", str(planned)]) == 0
    assert re.search(line, capsys.readouterr().out)


def test_a_rule_that_every_layout_breaks_is_said_once(planned: Path, capsys: CAPTURED) -> None:
    assert main(["plan", str(planned), "data.seq_length=200000"]) == 2
    text = capsys.readouterr().out
    assert text.count("is longer than the model's 131072 positions") == 1
    assert "no layout of 16 GPUs keeps the rules (tp1 pp1 and 13 others: data.seq_length 200000" in text


def test_plan_refuses_what_no_run_could_train(planned: Path, capsys: CAPTURED) -> None:
    assert main(["plan", str(planned), "model.lora.rank=8", "model.lora.targets=[k_projj]"]) == 2
    assert "model.lora.targets: a llama model has no linear layer k_projj" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lora", "sizes"), [({}, {1, 2}), ({"rank": 8}, {1}), ({"rank": 8, "targets": ["q_proj"]}, {1, 2})]
)
def test_experts_with_adapters_stay_whole(lora: dict[str, object], sizes: set[int]) -> None:
    """Ranks cannot share an expert that has adapters: such layouts would be refused after they were chosen."""
    shape = named_model_shape("30b-a3b")
    spec = RunSpec(
        resources=ResourcesSpec(nodes=1, gpus_per_node=2),
        data=DataSpec(seq_length=4096),
        model=ModelSpec(lora=LoraSpec(**lora)),  # type: ignore[arg-type]
        train=TrainSpec(global_batch_size=8, max_steps=10),
    )
    result = search_layouts(spec, shape, gpu_kind("h200"))
    layouts = [one.layout.topology for one in (*result.fitting, *result.too_large)]
    assert {topology.expert_tensor_parallel for topology in layouts if topology.tensor_parallel == 2} == sizes
