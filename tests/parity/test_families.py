"""Families beside Llama train the same model: losses and gradient norms equal plain PyTorch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.contract.exit_codes import ExitCode
from sft.__main__ import main
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.ranks import run_ranks
from tests.sft.hf_cases import save_hf_model
from tests.tiny_model import VOCAB_SIZE, make_chat_rows, make_tokenizer, write_jsonl

pytestmark = pytest.mark.parity

STEPS = 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {}),
    "gpt2": ("gpt2", {"n_inner": 160}),
    "gpt2_untied": ("gpt2_untied", {"n_inner": 160}),
    "phi3": ("phi3", {}),
    "phi3_partial_rope": ("phi3_partial_rope", {"num_key_value_heads": 2, "sliding_window": 256}),
    "mistral_window": ("mistral_window", {"sliding_window": 256}),
    "qwen2_yarn": ("qwen2_yarn", {}),
    "llama3_rope_other_numbers": ("llama3_rope_other_numbers", {}),
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


def family_model(directory: Path, case: str, **more: Any) -> Path:
    save_hf_model(case, directory, **{**SIZES, **more})
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", CASES)
def test_family_follows_reference_under_tp2_pp2(name: str, tmp_path: Path, chat: Path) -> None:
    case, more = CASES[name]
    model = family_model(tmp_path / "model", case, **more)
    expected = reference_curve(tmp_path / "reference", model, chat, steps=STEPS, lr=3e-3)
    topology = {"tensor_parallel": 2, "pipeline_parallel": 2}
    paths = make_run(tmp_path, model, chat, ranks=4, topology=topology, max_steps=STEPS, lr=3e-3)
    run_training(paths, 4)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=2e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=5e-5)


def test_learned_positions_in_packed_rows(tmp_path: Path, chat: Path) -> None:
    """Each example of a row begins at position 0, whatever layer knows of it."""
    model = family_model(tmp_path / "model", "gpt2")
    expected = reference_curve(tmp_path / "reference", model, chat, steps=STEPS, lr=3e-3)
    paths = make_run(tmp_path, model, chat, ranks=1, max_steps=STEPS, lr=3e-3, packing=True)
    run_training(paths, 1)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=2e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=5e-5)


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_norms_of_a_family_under_sequence_parallel(family: str, tmp_path: Path, chat: Path) -> None:
    """They are ours, and their gradients are partial sums there; so are those of GPT-2's output biases."""
    model = family_model(tmp_path / "model", family)
    expected = reference_curve(tmp_path / "reference", model, chat, steps=STEPS, lr=3e-3)
    topology = {"tensor_parallel": 2, "sequence_parallel": True}
    paths = make_run(tmp_path, model, chat, ranks=2, topology=topology, max_steps=STEPS, lr=3e-3)
    run_training(paths, 2)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=2e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=5e-5)


def test_a_window_that_hides_tokens_is_refused(tmp_path: Path, chat: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = family_model(tmp_path / "model", "mistral_window", sliding_window=255)
    paths = make_run(tmp_path, model, chat, ranks=1)
    assert main(["prepare", str(paths.config)]) == ExitCode.BAD_INPUT
    assert "data.seq_length 256: this model's layers see the last 255 tokens only" in capfd.readouterr().err
    assert run_ranks(1, exit_code, paths.config) == [ExitCode.BAD_INPUT]


def exit_code(config: Path) -> int:
    """Runs on a rank: the exit code of the rank main."""
    return main(["train", str(config)])
