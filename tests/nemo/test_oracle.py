"""Our learning rates, masks, losses and checkpoints against the real NeMo's, number by number."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.contract.spec import DataSpec, ModelSpec, RunSpec
from sft.data.encoding.masking import encode
from sft.data.encoding.tokenizer import load_tokenizer
from sft.data.reading.formats import Example, parse_row
from sft.model_source import resolve_model_dir
from sft.nemo.export import export_nemo2
from tests.nemo.conftest import Oracle
from tests.ranks import run_ranks
from tests.sft.hf_cases import example_ids, hf_logits, rank_logits, run_spec, save_hf_model
from tests.sft.megatron.optim.test_nemo_schedule import imported_rates
from tests.tiny_model import make_chat_rows, make_tokenizer, write_jsonl

pytestmark = [pytest.mark.nemo, pytest.mark.timeout(900)]  # importing NeMo takes a minute on a busy machine

GENERATION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML that tells NeMo which tokens are the assistant's."""

GPT = "nemo.collections.llm.gpt.model"
SIZES = {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6, "seq_length": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama3.1": {
        "model_class": f"{GPT}.llama.LlamaModel",
        "config_class": f"{GPT}.llama.Llama31Config",
        "config": {"num_query_groups": 2, "vocab_size": 344, "old_context_len": 16, "bias_activation_fusion": False},
    },
    "qwen2": {
        "model_class": f"{GPT}.qwen2.Qwen2Model",
        "config_class": f"{GPT}.qwen2.Qwen2Config",
        "config": {"num_query_groups": 2, "vocab_size": 344, "bias_activation_fusion": False},
    },
    # No vocab_size: NeMo pads the tokenizer's 331 to 384.
    "mistral": {
        "model_class": f"{GPT}.mistral.MistralModel",
        "config_class": f"{GPT}.mistral.MistralConfig7B",
        "config": {
            "num_query_groups": 2,
            "window_size": None,
            "cp_comm_type": None,
            "bias_activation_fusion": False,
        },
    },
    "gpt": {
        "model_class": f"{GPT}.base.GPTModel",
        "config_class": f"{GPT}.base.GPTConfig",
        "config": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "bias_activation_fusion": True},
    },
}


def save_tokenizer(directory: Path, template: str | None = None) -> Path:
    """A tokenizer that transformers 4 reads too: of version 5's names it knows none."""
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def parsed(row: dict[str, Any], row_format: str) -> Example:
    return parse_row(json.dumps(row).encode(), "row", row_format, {})


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[row, token] loss of each token as the label of the one before it."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def test_learning_rates_of_imported_schedules(oracle: Oracle) -> None:
    draw = random.Random(7)
    wanted = [
        {"lr": 1e-4, "min_lr": 1e-5, "warmup": warmup, "hold": hold, "steps": steps}
        for warmup, hold, steps in [(0, 0, 40), (10, 0, 40), (10, 8, 40), (0, 12, 40), (1, 1, 5), (39, 0, 40)]
    ]
    for _ in range(20):
        warmup, hold = draw.randint(0, 20), draw.randint(0, 20)
        steps = warmup + hold + draw.randint(1, 60)
        wanted.append({"lr": 3e-4, "min_lr": 0.0, "warmup": warmup, "hold": hold, "steps": steps})
    for case, expected in zip(wanted, oracle("schedules", wanted), strict=True):
        ours = imported_rates(case["steps"], case["warmup"], case["hold"], case["lr"], case["min_lr"])
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-15), case


def test_ids_and_masks_of_prompts_and_completions(oracle: Oracle, tmp_path: Path) -> None:
    """The blank of NeMo's template `{input} {output}` is part of our completions; NeMo ends each with end-of-text."""
    conversations = [row["messages"][-2:] for row in make_chat_rows(30, seed=5)]
    rows = [{"input": question["content"], "output": answer["content"]} for question, answer in conversations]
    tokenizer_dir = save_tokenizer(tmp_path / "tokenizer")
    file = write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    options = {"prompt_template": "{input} {output}", "label_key": "output", "truncation_field": "input"}
    expected = oracle("masks", {"file": str(file), "tokenizer": str(tokenizer_dir), "options": options})
    spec = DataSpec(chat_template="none", format="prompt_completion")
    tokenizer = load_tokenizer(tokenizer_dir)
    for row, theirs in zip(rows, expected, strict=True):
        example = parsed({"prompt": row["input"], "completion": f" {row['output']}"}, "prompt_completion")
        (ours,) = encode(example, tokenizer, spec)
        assert ours.ids.tolist() == theirs["ids"]
        assert ours.weights[1:].tolist() == theirs["mask"]


def test_ids_and_masks_of_chats(oracle: Oracle, tmp_path: Path) -> None:
    """With a template that marks answers for NeMo; the same ids, and loss on the same tokens."""
    rows = make_chat_rows(30, seed=6)
    tokenizer_dir = save_tokenizer(tmp_path / "tokenizer", GENERATION_TEMPLATE)
    file = write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    options = {"chat": True, "use_hf_tokenizer_chat_template": True}
    expected = oracle("masks", {"file": str(file), "tokenizer": str(tokenizer_dir), "options": options})
    tokenizer = load_tokenizer(tokenizer_dir)
    for row, theirs in zip(rows, expected, strict=True):
        (ours,) = encode(parsed(row, "messages"), tokenizer, DataSpec())
        count = len(ours.ids)
        assert ours.ids.tolist() == theirs["ids"][:count]
        assert ours.weights[1:].tolist() == theirs["mask"][: count - 1]


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_that_nemo_wrote_gives_its_losses_under_another_topology(
    name: str, oracle: Oracle, tmp_path: Path
) -> None:
    """NeMo writes with one rank; 2 tensor ranks in 2 stages read it."""
    ids = example_ids(331)
    tokenizer, source = save_tokenizer(tmp_path / "tokenizer"), tmp_path / "nemo"
    request = MODELS[name] | {"tokenizer": str(tokenizer), "path": str(source), "ids": ids.tolist()}
    theirs = oracle("write", request | {"config": SIZES | MODELS[name]["config"]})
    spec = RunSpec(model=ModelSpec(path=str(source)), data=DataSpec(cache_dir=str(tmp_path / "cache")))
    converted = resolve_model_dir(spec)
    assert load_tokenizer(converted).get_vocab() == load_tokenizer(tokenizer).get_vocab()
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2}
    found = run_ranks(4, rank_logits, run_spec(converted, 4, **layout), ids.tolist(), init=True)
    logits = next(torch.from_numpy(part) for part in found if part is not None)
    expected = torch.tensor(theirs["logits"])[..., : logits.shape[-1]]
    assert torch.allclose(logits, expected, atol=2e-5), (logits - expected).abs().max()
    if logits.shape == torch.tensor(theirs["logits"]).shape:  # NeMo counts the padding's logits in its losses
        assert torch.allclose(token_losses(logits, ids), torch.tensor(theirs["losses"]), atol=2e-5)


@pytest.mark.parametrize("case", ["llama_llama3_rope", "qwen2", "gpt2"])
def test_nemo_loads_what_we_wrote(case: str, oracle: Oracle, tmp_path: Path) -> None:
    save_hf_model(case, tmp_path / "hf", vocab_size=331)
    save_tokenizer(tmp_path / "hf")
    export_nemo2(tmp_path / "hf", tmp_path / "nemo")
    ids = example_ids(331)
    theirs = oracle("load", {"path": str(tmp_path / "nemo"), "ids": ids.tolist()})
    logits = hf_logits(tmp_path / "hf", ids)
    assert torch.allclose(torch.tensor(theirs["logits"]), logits, atol=2e-5)
    assert torch.allclose(torch.tensor(theirs["losses"]), token_losses(logits, ids), atol=2e-5)
    assert theirs["vocabulary"] == 331
