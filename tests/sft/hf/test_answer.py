"""Answers: greedy, through the chat template, recorded once before training and each time after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.contract.rundir import RunPaths, read_lines
from launcher.contract.spec import DataSpec, LoggingSpec, RunSpec
from sft.hf import answer as module
from sft.hf.answer import answer, record_answers
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def greedy_by_hand(directory: Path, text: str, steps: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    start = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = list(start)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[len(start) :], skip_special_tokens=True)).strip()


def test_greedy_through_the_chat_template(model: Path) -> None:
    question = "How many otters?"
    rendered = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert answer(model, [question, question], max_new_tokens=8) == [greedy_by_hand(model, rendered, 8)] * 2


def test_without_a_chat_template_the_prompt_is_the_text(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    assert answer(directory, ["How many"], max_new_tokens=8) == [greedy_by_hand(directory, "How many", 8)]


def test_prompts_are_written_as_in_training(model: Path, tmp_path: Path) -> None:
    """Seen to be asked with the model's own template and without data.chat_template_kwargs."""
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ tag }}{{ m['content'] }}{% endfor %}")
    data = DataSpec(chat_template=str(template), chat_template_kwargs={"tag": "Q>"})
    assert answer(model, ["How many"], max_new_tokens=8, data=data) == [greedy_by_hand(model, "Q>How many", 8)]


def test_the_tokenizer_may_be_elsewhere(tmp_path: Path) -> None:
    """Seen to die with a ValueError: the tokenizer was looked for beside the model."""
    directory = make_tiny_model(tmp_path / "model")
    expected = answer(directory, ["How many?"], max_new_tokens=8)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in directory.iterdir():
        if file.name.startswith(("tokenizer", "special", "chat", "added")):
            file.rename(tokenizer / file.name)
    assert answer(directory, ["How many?"], max_new_tokens=8, tokenizer_dir=tokenizer) == expected


def test_sampling_settings_of_the_model_do_not_matter(model: Path, tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    (directory / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20}'
    )
    assert answer(directory, ["How many?"], max_new_tokens=8) == answer(model, ["How many?"], max_new_tokens=8)


def test_recorded_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = RunPaths(tmp_path)
    asked: list[str] = []

    def fake(model_dir: Path, prompts: list[str], **_: object) -> list[str]:
        asked.extend(prompts)
        return [f"{model_dir.name}: {prompt}" for prompt in prompts]

    monkeypatch.setattr(module, "answer", fake)
    prompts = ["one", "two"]
    spec = RunSpec(logging=LoggingSpec(prompts=prompts))
    assert record_answers(paths, spec, Path("base"), "before") == ["base: one", "base: two"]
    assert record_answers(paths, spec, Path("base"), "before") == ["base: one", "base: two"]
    record_answers(paths, spec, Path("export"), "after")
    record_answers(paths, spec, Path("export"), "after")

    assert asked == prompts * 3  # before: once, however often prepared; after: each export
    lines = list(read_lines(paths.samples))
    assert lines[0] == {"label": "before", "prompt": "one", "answer": "base: one"}
    assert [line["label"] for line in lines] == ["before"] * 2 + ["after"] * 4
    assert capsys.readouterr().out.startswith("[before training] one\n    base: one\n[before training] two\n")


def test_no_prompt_no_model(tmp_path: Path) -> None:
    assert record_answers(RunPaths(tmp_path), RunSpec(), tmp_path / "absent", "before") == []
    assert not RunPaths(tmp_path).samples.exists()
