"""Answers during training are what transformers answers with the same weights, under every kind of layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import sft.generation.answers
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import read_lines
from launcher.contract.spec import EvaluationSpec, read_resolved
from sft.__main__ import main
from sft.commands.export import export
from sft.commands.prepare import prepare
from sft.generation.evaluation_prompts import stop_tokens
from sft.hf.loaded_model import load_transformers_model
from sft.models.registry import SUPPORTED
from sft.training.trainer import train
from tests.parity.runs import make_run, run_training
from tests.parity.test_families import family_model
from tests.ranks import run_ranks
from tests.sft.hf_cases import ON_STAGES
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

QUESTIONS = (
    "How many otters?",
    "I saw 12 herons and one was red. How many were not?",
    "Was it by the river? " * 4,
    "<|im_end|> is a text here",
    "5",
)
NEW_TOKENS = 12
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_parallel": 2}),
    "tp2_sp": (2, {"tensor_parallel": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_parallel": 2}),
    "pp2_vpp2": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "layers_per_stage": [3, 1]}),
    "cp2": (2, {"context_parallel": 2}),
}
Material = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Model, training rows, prompts."""
    root = tmp_path_factory.mktemp("material")
    prompts = write_jsonl(root / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS])
    return make_tiny_model(root / "model"), write_jsonl(root / "chat.jsonl", make_chat_rows(16, seed=3)), prompts


@pytest.fixture(scope="module")
def greedy(material: Material) -> dict[str, list[int]]:
    """What transformers answers: question -> token ids."""
    return {question: transformers_answer(material[0], question) for question in QUESTIONS}


def transformers_answer(model_dir: Path, question: str, stop: int | None = None) -> list[int]:
    """Greedy ids up to and without the token that ends the answer."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = load_transformers_model(model_dir, torch.float32)
    ends = [tokenizer.eos_token_id, *([stop] if stop is not None else [])]
    ids = prompt_ids(tokenizer, question)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    answer = output[0, ids.shape[1] :].tolist()
    return answer[: next((place for place, token in enumerate(answer) if token in ends), len(answer))]


def prompt_ids(tokenizer: Any, question: str) -> torch.Tensor:
    """The chat template's prompt; what a question spells stays text."""
    begin, end = ("<|im_start|>", "<|im_end|>")
    plain = tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    head = tokenizer(f"{begin}user\n", add_special_tokens=False)["input_ids"]
    tail = tokenizer(f"{end}\n{begin}assistant\n", add_special_tokens=False)["input_ids"]
    return torch.tensor([head + plain + tail])


def evaluation(material: Material, **settings: Any) -> dict[str, Any]:
    """Settings of a run that answers the prompts."""
    asked = {"prompts": str(material[2]), "max_new_tokens": NEW_TOKENS, "batch_size": 3, **settings}
    return {"evaluation": EvaluationSpec(**asked), "max_steps": 1}


def answers_of(config: Path) -> dict[int, list[int]]:
    """Runs on a rank: prompt number -> token ids of the answer before the first step."""
    found: dict[int, list[int]] = {}
    generate = sft.generation.answers.generate

    def spy(module: Any, prompts: Sequence[Any], spec: Any, **more: Any) -> list[list[int]]:
        answers = generate(module, prompts, spec, **more)
        for number, answer in zip(more["numbers"], answers, strict=True):
            found.setdefault(number, answer)
        return answers

    sft.generation.answers.generate = spy
    train(config)
    return found


def run_and_collect(tmp_path: Path, material: Material, ranks: int, topology: dict[str, Any], **settings: Any) -> Any:
    paths = make_run(tmp_path, *material[:2], ranks=ranks, topology=topology, **evaluation(material, **settings))
    by_rank = run_ranks(ranks, answers_of, paths.config)
    found = {number: answer for answers in by_rank for number, answer in answers.items()}
    return [found[number] for number in range(len(QUESTIONS))]


@pytest.mark.parametrize("name", thinned(LAYOUTS, "tp2_pp2"))
def test_greedy_answers_equal_transformers(
    name: str, tmp_path: Path, material: Material, greedy: dict[str, list[int]]
) -> None:
    assert run_and_collect(tmp_path, material, *LAYOUTS[name]) == list(greedy.values())


@pytest.mark.parametrize("family", thinned(SUPPORTED, *ON_STAGES))
def test_greedy_answers_of_a_family_equal_transformers(family: str, tmp_path: Path, material: Material) -> None:
    """Across two stages, with every part of the family in the model."""
    own = (family_model(tmp_path / "model", family), *material[1:])
    expected = [transformers_answer(own[0], question) for question in QUESTIONS]
    assert run_and_collect(tmp_path, own, *LAYOUTS["pp2"]) == expected


EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"expert_parallel": 2}),
    "tp2_sp_ep2_etp1": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2, "expert_tensor_parallel": 1},
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_ranks_that_share_experts_answer_together(name: str, tmp_path: Path, material: Material) -> None:
    """With a batch of one, a rank has three answers to give and the other two, of different lengths."""
    own = (family_model(tmp_path / "model", "qwen3_moe"), *material[1:])
    expected = [transformers_answer(own[0], question) for question in QUESTIONS]
    assert run_and_collect(tmp_path, own, *EXPERTS[name], batch_size=1) == expected


def test_an_answer_ends_at_a_stop_token(tmp_path: Path, material: Material, greedy: dict[str, list[int]]) -> None:
    first = greedy[QUESTIONS[0]]
    stop = next(token for token in first[2:] if token not in first[:2])
    text = AutoTokenizer.from_pretrained(material[0]).convert_ids_to_tokens(stop)
    expected = [transformers_answer(material[0], question, stop) for question in QUESTIONS]
    assert run_and_collect(tmp_path, material, *LAYOUTS["tp2"], stop_tokens=[text]) == expected
    assert len(expected[0]) < len(first)


def test_sampled_answers_do_not_depend_on_layout_or_batch(
    tmp_path: Path, material: Material, greedy: dict[str, list[int]]
) -> None:
    settings = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 7}
    one = run_and_collect(tmp_path / "one", material, *LAYOUTS["tp1"], **settings)
    assert one != list(greedy.values())
    assert run_and_collect(tmp_path / "dp2", material, *LAYOUTS["dp2"], **settings, batch_size=1) == one
    assert run_and_collect(tmp_path / "pp2", material, *LAYOUTS["pp2"], **settings) == one
    other = {**settings, "seed": 8}
    assert run_and_collect(tmp_path / "other", material, *LAYOUTS["tp1"], **other) != one


def stops_of(config: Path) -> set[int]:
    """Runs on a rank: the tokens at which a run's answers end."""
    found: set[int] = set()
    generate = sft.generation.answers.generate

    def spy(*given: Any, stops: set[int], **more: Any) -> list[list[int]]:
        found.update(stops)
        return generate(*given, stops=stops, **more)

    sft.generation.answers.generate = spy
    train(config)
    return found


def test_answers_end_with_the_token_that_was_trained(tmp_path: Path, material: Material) -> None:
    """From the data to the run's answers and its export: a tokenizer that calls another token its end, under ChatML.

    Seen to fail without each of: the record in `prepare`, its use by answers, and by the export.
    """
    model = tmp_path / "model"
    shutil.copytree(material[0], model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(model)
    own, trained = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**settings, "eos_token_id": own}))
    paths = make_run(tmp_path, model, material[1], ranks=1, export=True, **evaluation(material))
    assert prepare(paths.config) == ExitCode.OK
    assert run_ranks(1, stops_of, paths.config) == [{own, trained}]
    assert export(paths.root) == ExitCode.OK
    assert json.loads((paths.export / "generation_config.json").read_text())["eos_token_id"] == [own, trained]
    assert set(stop_tokens(read_resolved(paths.config), tokenizer, paths.export)) == {own, trained}


def metric(*, samples: list[str], prompts: list[str], outputs: list[str]) -> dict[str, Any]:
    """A metric function: one number, and one a prompt."""
    assert [sample == prompt + output for sample, prompt, output in zip(samples, prompts, outputs, strict=True)]
    return {"length": [float(len(output)) for output in outputs], "prompts": len(prompts)}


def broken_metric(**texts: list[str]) -> dict[str, Any]:
    raise ValueError("no such answer")


def test_metric_function_sees_all_prompts(tmp_path: Path, material: Material) -> None:
    settings = evaluation(material, metric="tests.parity.test_generation:metric")
    paths = make_run(tmp_path, *material[:2], ranks=2, eval_every=1, **settings)
    run_training(paths, 2)
    lines = [record for record in read_lines(paths.metrics) if "metric/length" in record]
    assert [(record["step"], record["metric/prompts"]) for record in lines] == [(0, 5.0), (1, 5.0)]
    written = list(read_lines(paths.generations))
    assert [record["step"] for record in written] == [0] * 5 + [1] * 5
    mean = sum(len(record["output"]) for record in written[:5]) / 5
    assert lines[0]["metric/length"] == mean
    assert "<|im_start|>user\nHow many otters?<|im_end|>" in written[0]["prompt"]


def test_failing_metric_function_ends_all_ranks(tmp_path: Path, material: Material) -> None:
    settings = evaluation(material, metric="tests.parity.test_generation:broken_metric")
    paths = make_run(tmp_path, *material[:2], ranks=2, **settings)
    assert run_ranks(2, exit_code, paths.config) == [ExitCode.BAD_INPUT] * 2


def exit_code(config: Path) -> int:
    """Runs on a rank."""
    return main(["train", str(config)])


def test_training_is_untouched_by_answers(tmp_path: Path, material: Material) -> None:
    from tests.parity.runs import curve

    topology = {"tensor_parallel": 2, "sequence_parallel": True}
    plain = make_run(tmp_path, *material[:2], ranks=2, topology=topology, name="plain", max_steps=2)
    run_training(plain, 2)
    asked = evaluation(material) | {"max_steps": 2, "eval_every": 1}
    paths = make_run(tmp_path, *material[:2], ranks=2, topology=topology, name="asked", **asked)
    run_training(paths, 2)
    assert curve(paths) == curve(plain)
