"""Expert parallelism over NCCL on all GPUs of this machine: the numbers of one GPU, and one wait a layer."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sft.megatron.core import TransformerConfig, parallel_state
from sft.megatron.layers.mixture_of_experts import ExpertMLP
from sft.models.architecture import Experts
from tests.gpu.test_topologies import Curves, at_once, found
from tests.parity.runs import make_run
from tests.parity.test_families import family_model
from tests.ranks import run_ranks
from tests.tiny_model import FLASH4_HEAD_DIM, make_chat_rows, write_jsonl

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} CUDA devices here; expert parallelism over NCCL needs 2"),
    pytest.mark.timeout(600),
]

STEPS = 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep": {"topology": {"expert_parallel": GPUS}},
    "ep-tp-sp": {
        "topology": {
            "tensor_parallel": 2,
            "sequence_parallel": True,
            "expert_parallel": GPUS,
            "expert_tensor_parallel": 1,
        }
    },
    "tp-sp-etp": {"topology": {"tensor_parallel": 2, "sequence_parallel": True}},
    "dp": {},
}
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp32-packed": {"precision": "fp32", "packing": True},
    "bf16-packed": {"precision": "bf16", "packing": True},
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """Every layout in every form, and each form on one GPU."""
    root = tmp_path_factory.mktemp("layouts")
    model = family_model(root / "model", "qwen3_moe", head_dim=FLASH4_HEAD_DIM)
    chat = write_jsonl(root / "chat.jsonl", make_chat_rows(36, seed=3))
    runs = {}
    for form, settings in FORMS.items():
        for layout in ("one", *LAYOUTS):
            ranks = 1 if layout == "one" else GPUS
            own = {"max_steps": STEPS, "lr": 1e-3, "global_batch_size": 4 * GPUS, "seq_length": 256, **settings}
            own |= {**LAYOUTS.get(layout, {}), "name": f"{layout}-{form}"}
            runs[layout, form] = make_run(root, model, chat, ranks=ranks, gpus_per_node=ranks, **own), ranks
    return at_once(runs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_one_gpu(layout: str, form: str, curves: Curves) -> None:
    losses, norms = found(curves, layout, form)
    exact_losses, exact_norms = found(curves, "one", form)
    exact = form != "bf16-packed"
    assert losses == pytest.approx(exact_losses, rel=1e-5 if exact else 2e-2)
    assert norms == pytest.approx(exact_norms, rel=1e-4 if exact else 1e-1)


def waits_of_a_layer() -> tuple[int, int]:
    """Return how often the host waits for the device in a layer's forward pass, and in its backward pass."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    config = TransformerConfig(
        num_layers=1, hidden_size=256, num_attention_heads=4, bf16=True, params_dtype=torch.bfloat16
    )
    experts = Experts(count=4 * dist.get_world_size(), chosen=2, width=128, normalized=True)
    layer = ExpertMLP(config, experts=experts, fused=True).cuda()
    torch.manual_seed(dist.get_rank())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(512, 1, 256, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[int, int]:
        with warnings.catch_warnings(record=True) as forward:
            warnings.simplefilter("always")
            output, _ = layer(x.clone().requires_grad_())
        with warnings.catch_warnings(record=True) as backward:
            warnings.simplefilter("always")
            output.backward(torch.ones_like(output))
        return _synchronizing(forward), _synchronizing(backward)

    step()  # the first one compiles kernels and builds communicators
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        return step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _synchronizing(seen: list[warnings.WarningMessage]) -> int:
    return sum("synchronizing CUDA operation" in str(message.message) for message in seen)


def test_the_host_waits_once_a_layer() -> None:
    assert run_ranks(GPUS, waits_of_a_layer) == [(1, 0)] * GPUS
