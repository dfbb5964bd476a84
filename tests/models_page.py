"""Make docs/models.md from the registry of families and the tests that run over it: `python -m tests.models_page`."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

from launcher.contract.spec import RunSpec, TrainSpec
from sft.hf.gguf import COVERED as IN_GGUF
from sft.megatron.kernel_choice import choose_kernels
from sft.models.registry import SUPPORTED, family, read_architecture
from sft.nemo.context_writer import CLASSES as IN_NEMO
from tests.parity.test_families import FURTHER_LAYOUTS, LAYOUTS, VARIANTS
from tests.parity.test_lora import ADAPTABLE
from tests.sft.hf_cases import CASES, save_config

_PAGE = """\
# Models

Made from the registry (`sft/models/registry.py`) by `python -m tests.models_page > docs/models.md`. A model whose
config has one of these model types trains; what of a config is not covered is refused by name.

| model type | what it is | layers on a GPU | LoRA | also from or to |
|---|---|---|---|---|
{rows}

"Plain" layers are computed by torch's own operations, the loss and the optimizer by fused kernels all the same. Fused
layers have the kernels of [performance](explanation/performance.md), and fp8.

## What is tested

Of every model type a small model with random weights, norms and biases, and of some their variants, against
transformers' eager model in fp32:

| what | where |
|---|---|
| logits of imported ranks; import, checkpoint and export bitwise | `tests/sft/hf`, all {cases} cases |
| losses and every gradient under {layouts} | `tests/parity/test_families.py`, all types and {variants} |
| the same under {further} (slow tier) | the same file |
| packed rows against single ones, no bit of which changes with a neighbour | `tests/parity/test_documents.py` |
| packed rows that two ranks share | `tests/parity/test_context_parallel.py` |
| answers with a cache of keys and values | `tests/parity/test_generation.py` |
| adapters | `tests/parity/test_lora.py`, of experts `tests/parity/test_expert_lora.py` and `test_joined_experts.py` |
| the rest of a multimodal model byte for byte, loaded without a missing key | `tests/parity/test_multimodal.py` |
| three steps on one GPU in fp32 and bf16 | `tests/gpu/test_models.py` |

Tokens per second that were measured are in [benchmarks](../benchmarks/README.md).

## Limits

* Of multimodal models the language model is trained, on text.
* Quantized weights are not read, but for the MXFP4 of gpt-oss, which trains and is exported in bf16. Of other models
  use the unquantized ones.
* RoPE of type `dynamic` or `longrope` is covered up to the length from which it depends on the batch:
  `max_position_embeddings`, or `original_max_position_embeddings`. Longer rows are refused.
* Norms over all heads (Olmo, MiniMax-M2) need `topology.tensor_parallel` to be at most the number of KV heads.
* Adapters of experts need whole experts on a rank ([LoRA](how-to/lora.md)).
* Latent attention (DeepSeek, GLM-4.7-Flash) has no products in fp8 (`train.precision`). Where answers are generated
  during training, the cache holds the keys and values of all heads, and not the latents.
* Linear attention (Qwen3.5, Qwen3-Next) needs key heads that `topology.tensor_parallel` x `context_parallel` divides.
  Where only some layers have a layer that `model.lora.targets` names, each pipeline stage needs one.
* On one GPU (H200) all types have followed the reference in fp32 and bf16, in fp32 with every gradient of the first
  step to 1e-4, linear attention by torch's own operations. The rule of flash-linear-attention agreed there with torch's
  to 6e-3 in bf16. Exceptions: arcee, dots1, ernie4_5, ernie4_5_moe, exaone4, glm4, glm4_moe_lite, hunyuan_v1_dense,
  seed_oss, starcoder2 and DeepSeek have run there in fp32 alone; glm, and of Gemma 4 the experts and the models with
  towers, have not; of MiniMax-M2 the first loss agreed, and the rest was compared on data where rounding chose other
  experts.
* Capped scores (Gemma 2) with heads of more than 128 have no kernel of many sequences: they are computed one sequence
  after the other.
* Graphs of small micro-batches (`train.cuda_graphs`) are made for dense models without capped scores and linear
  attention.
* Weights of a bf16 run are in bf16, also those that files hold in fp32, such as decays (`A_log`) of linear attention.
"""


def models_page() -> str:
    """Return the page."""
    return _PAGE.format(
        rows="\n".join(map(_row, SUPPORTED)),
        cases=len(CASES),
        layouts=_joined(LAYOUTS),
        further=_joined(FURTHER_LAYOUTS),
        variants=_joined(VARIANTS),
    )


def _row(name: str) -> str:
    description = str(importlib.import_module(f"sft.models.families.{name}").__doc__).split("\n\n")[0].strip()
    with tempfile.TemporaryDirectory() as directory:
        architecture = read_architecture(save_config(name, Path(directory)))
    kernels = choose_kernels(RunSpec(train=TrainSpec(kernels="fused")), architecture, on_gpu=False)
    because = kernels.plain_layers_because
    others = [what for what, names in (("GGUF", IN_GGUF), ("NeMo 2", IN_NEMO)) if name in names]
    cells = (
        f"`{name}`",
        " ".join(description.split()),
        "fused" if because is None else f"plain: {because}",
        "yes" if name in ADAPTABLE else "no",
        ", ".join(others) or "-",
    )
    assert family(name).model_type == name
    return f"| {' | '.join(cells)} |"


def _joined(names: object) -> str:
    return ", ".join(f"`{name}`" for name in names)  # type: ignore[attr-defined]


if __name__ == "__main__":
    print(models_page(), end="")
