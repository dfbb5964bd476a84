"""unsloth's LoRA on one GPU: its FastLanguageModel with random weights, trained by the SFTTrainer that it changes.

As its documentation advises: bf16 weights, adapters without dropout and bias, packed rows without padding, its own
kernels and loss; gradient checkpointing and bitsandbytes only save memory and are off. It gets our attention kernels
(sft.kernels.attention) like the others, in the place of the package flash-attn, so that it is not slow only because a
package is not installed.

unsloth changes transformers, trl and peft, so `load` comes before anything that imports them.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from sft.bench.workload import Workload

if TYPE_CHECKING:  # they import packages that unsloth changes
    from sft.bench.peers import Chosen
    from sft.bench.result import Result
    from sft.kernels.attention import Kernel

DEVICE = "cuda"
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear layers of a decoder layer."""
_FAMILIES = ("llama", "qwen2", "qwen3")
"""Types of models that it has a path of its own for, and whose linear layers are those above."""


def load(folder: Path) -> None:
    """Import unsloth, which changes other packages, and let it write its modules to the folder.

    Raise ValueError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"unsloth is run on a GPU here, and torch {torch.__version__} sees none")
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",  # it fetches a file of the hub to be counted
        "UNSLOTH_FLASH_ATTENTION_IMPL": "off",  # it would put other kernels in the place of torch's, and so of ours
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"),
    }
    importlib.import_module("unsloth")


def run_unsloth(
    workload: Workload, *, weights: str, attention: Chosen, micro_batches: int, warmup: int, steps: int, **_: object
) -> Result:
    """Train adapters with unsloth. Raise ValueError for a workload that it cannot train here."""
    from sft.bench.peers import choose_kernel
    from sft.bench.result import StepClock
    from sft.bench.sft_trainer import train_with_trl

    refuse(workload, weights)
    kernel = choose_kernel(attention, workload)
    use_kernel(kernel)
    model, tokenizer = build_model(workload)
    clock, rank = StepClock(warmup, steps), workload.lora_rank
    loss = train_with_trl(
        workload, clock, model, tokenizer, micro_batches=micro_batches,
        lengths_of=lambda inputs: inputs["packed_seq_lengths"],
    )  # fmt: skip
    settings = {"weights": weights, "rows": workload.rows, "packing": "bfd", "attention": kernel, "lora": rank}
    return clock.result("unsloth", settings, workload.model_shape, loss, lora_rank=rank)


def refuse(workload: Workload, weights: str) -> None:
    """Raise ValueError for what unsloth is not run on here, naming it."""
    kind = workload.model_config["model_type"]
    if workload.lora_rank is None:
        raise ValueError("unsloth is run with --lora-rank here")
    if kind not in _FAMILIES:
        raise ValueError(f"unsloth is run on models of type {', '.join(_FAMILIES)} here, not {kind} ({workload.shape})")
    if weights != "bf16":
        raise ValueError(f"unsloth keeps frozen weights in bf16, not {weights}: --vs-weights bf16")


def use_kernel(kernel: Kernel) -> None:
    """Make unsloth compute packed attention with one of our kernels, as if flash-attn were installed."""
    from unsloth.utils import attention_dispatch

    from sft.kernels.attention import flash

    def varlen(
        query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, key_offsets: Tensor, longest: int, longest_key: int,
        *, causal: bool, dropout_p: float = 0.0, softmax_scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        if not causal or dropout_p or longest != longest_key:
            raise ValueError("unsloth asked for an attention that is not causal, or has dropout or more keys")
        return flash(query, key, value, offsets, longest, softmax_scale, kernel)

    attention_dispatch.flash_attn_varlen_func = varlen
    attention_dispatch.HAS_FLASH_ATTENTION = True


def build_model(workload: Workload) -> tuple[Any, Any]:
    """Return unsloth's model with random weights and adapters, and a tokenizer."""
    from unsloth import FastLanguageModel

    from sft.bench.sft_trainer import tokenizer_of_two

    with tempfile.TemporaryDirectory() as name, random_weights(workload.seed):
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config_file(workload)), encoding="utf-8")
        tokenizer_of_two().save_pretrained(folder)
        model, tokenizer = FastLanguageModel.from_pretrained(
            name,
            max_seq_length=workload.seq_length,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            use_gradient_checkpointing=False,
            offload_embedding=False,
        )
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=workload.lora_rank,
        lora_alpha=workload.lora_rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=_TARGETS,
        use_gradient_checkpointing=False,
        random_state=workload.seed,
        max_seq_length=workload.seq_length,
    )
    check_kernels(adapted)
    return adapted, tokenizer


def check_kernels(model: Any) -> None:
    """Raise RuntimeError if a layer has not got unsloth's kernels for adapters: it says so in a message alone."""
    for number, layer in enumerate(model.base_model.model.model.layers):
        parts = layer.self_attn.apply_qkv, layer.self_attn.apply_o, layer.mlp.forward
        names = [getattr(part, "__func__", part).__name__ for part in parts]
        biased = layer.self_attn.q_proj.base_layer.bias is not None
        expected = ["original_apply_qkv" if biased else "apply_lora_qkv", "apply_lora_o", "apply_lora_mlp_swiglu"]
        if names != expected:
            raise RuntimeError(f"unsloth computes layer {number} with {', '.join(names)}, not {', '.join(expected)}")


def config_file(workload: Workload) -> dict[str, Any]:
    import transformers

    config = transformers.AutoConfig.for_model(**workload.model_config, dtype="bfloat16")
    config.pad_token_id, config.eos_token_id = 0, 1  # those of the tokenizer
    written: dict[str, Any] = config.to_dict()
    return written


def random_weights(seed: int) -> AbstractContextManager[object]:
    """Make transformers draw the weights of a model on the GPU where it would read them from files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def draw(name: str, *_: object, config: Any = None, attn_implementation: str | None = None, **__: object) -> Any:
        torch.manual_seed(seed)
        with torch.device(DEVICE):
            return AutoModelForCausalLM.from_config(
                config or AutoConfig.from_pretrained(name),
                dtype=torch.bfloat16,
                attn_implementation=attn_implementation or "sdpa",
            )

    return patch.object(AutoModelForCausalLM, "from_pretrained", draw)
