"""What unsloth is refused, and what is made for it; that it trains needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from sft.bench import unsloth
from sft.bench.workload import Workload

ADAPTED = Workload(shape="8b", data="ragged", seq_length=512, rows=2, lora_rank=16)


@pytest.mark.parametrize(
    ("workload", "weights", "message"),
    [
        (Workload(shape="8b", data="ragged", seq_length=512, rows=2), "bf16", "with --lora-rank here"),
        (Workload(shape="gemma3-1b", data="full", seq_length=512, rows=2, lora_rank=8), "bf16", "not gemma3_text"),
        (ADAPTED, "fp32", "in bf16, not fp32: --vs-weights bf16"),
    ],
)
def test_what_it_is_not_run_on_is_refused(workload: Workload, weights: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unsloth.run_unsloth(workload, weights=weights, attention="auto", micro_batches=1, warmup=1, steps=1)


def test_without_a_gpu_it_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"unsloth is run on a GPU here, and torch .* sees none"):
        unsloth.load(tmp_path)
    assert "unsloth" not in sys.modules


def test_it_is_loaded_before_the_packages_that_it_changes(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(
        json.dumps({"contender": "unsloth", "settings": {}, "workload": {**_fields(ADAPTED), "seed": 1}})
    )
    code = (
        "import sys; from pathlib import Path; from sft.bench import contender, unsloth\n"
        "def load(folder):\n"
        "    print(folder, [name for name in ('transformers', 'trl', 'peft', 'accelerate') if name in sys.modules])\n"
        "    raise SystemExit\n"
        "unsloth.load = load\n"
        f"contender.main(Path({str(request)!r}), Path({str(tmp_path / 'result.json')!r}))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == f"{tmp_path} []\n"


def test_weights_are_drawn_where_they_would_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 64,
            "tie_word_embeddings": False}  # fmt: skip
    monkeypatch.setattr("sft.bench.workload.named_model_config", lambda shape: tiny)
    monkeypatch.setattr(unsloth, "DEVICE", "cpu")
    (tmp_path / "config.json").write_text(json.dumps(unsloth.config_file(ADAPTED)))
    with unsloth.random_weights(seed=3):
        drawn = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), device_map="cuda:0", token=None)
        again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert {parameter.dtype for parameter in drawn.parameters()} == {torch.bfloat16}
    assert drawn.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(drawn.lm_head.weight, again.lm_head.weight)
    assert (drawn.config.pad_token_id, drawn.config.eos_token_id) == (0, 1)
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_a_layer_without_its_kernels_is_told() -> None:
    """Biases of queries, as Qwen2 has them, are what it has no kernel for."""

    def apply_lora_qkv() -> None: ...
    def original_apply_qkv() -> None: ...
    def apply_lora_o() -> None: ...
    def apply_lora_mlp_swiglu() -> None: ...
    def forward() -> None: ...

    def model_of(qkv: object, *forwards: object, bias: object = None) -> object:
        projection = SimpleNamespace(base_layer=SimpleNamespace(bias=bias))
        attention = SimpleNamespace(apply_qkv=qkv, apply_o=apply_lora_o, q_proj=projection)
        layers = [SimpleNamespace(self_attn=attention, mlp=SimpleNamespace(forward=each)) for each in forwards]
        return SimpleNamespace(base_model=SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace(layers=layers))))

    unsloth.check_kernels(model_of(apply_lora_qkv, apply_lora_mlp_swiglu))
    unsloth.check_kernels(model_of(original_apply_qkv, apply_lora_mlp_swiglu, bias=torch.ones(2)))
    with pytest.raises(RuntimeError, match="layer 1 with apply_lora_qkv, apply_lora_o, forward, not"):
        unsloth.check_kernels(model_of(apply_lora_qkv, apply_lora_mlp_swiglu, forward))
    with pytest.raises(RuntimeError, match="layer 0 with original_apply_qkv"):
        unsloth.check_kernels(model_of(original_apply_qkv, apply_lora_mlp_swiglu))


def _fields(workload: Workload) -> dict[str, object]:
    return {name: getattr(workload, name) for name in ("shape", "data", "seq_length", "rows", "lora_rank")}
