"""torchtitan's Llama 3 on the same data: FSDP2, compiled layers, its chunked and compiled loss, in a plain loop.

As its trainer does, also on one GPU: fp32 weights, which FSDP2 casts to bf16 for each layer and whose gradients it
reduces in fp32 (or bf16 weights alone). Layers are not recomputed. What its configs leave open is set to what is
fastest: rows of one example take torch's scaled dot product (cuDNN's first), packed ones flex attention with document
masks, and the rotation is torchtitan's by cosines and sines, which compiles into the kernels around it. Its other one,
by complex numbers, does not, and it is not in the order of transformers' weights.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import flex_attention

from sft.bench.plain_loop import PackedBatch, padded_batches, train_in_a_loop
from sft.bench.result import Result, StepClock
from sft.bench.workload import INITIAL_STD, Workload

Step = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
"""Inputs, labels, targets of the whole step and further arguments of the model to the share of the loss, backward
pass included."""


def run_torchtitan(
    workload: Workload,
    *,
    weights: Literal["fp32", "bf16"],
    attention: str,
    micro_batches: int,
    warmup: int,
    steps: int,
    graphs: Literal["never", "always"] = "never",
    **_: object,
) -> Result:
    """Train torchtitan's model of the workload's shape. Raise ValueError for a workload that it cannot train here."""
    refuse(workload)
    if attention != "auto":
        raise ValueError(f"torchtitan is run with an attention of its own here, not {attention}: leave --vs-attention")
    kernel = "sdpa" if workload.data == "full" else "flex"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kernel == "flex" and not masks_documents():
        raise ValueError(
            f"torchtitan's packed rows need masks that torch {torch.__version__} cannot make (create_block_mask takes "
            "no separate_full_blocks): use --data full, or a newer torch"
        )
    if kernel == "flex" and device.type == "cpu":
        raise ValueError("torchtitan's packed rows need flex attention, whose backward pass needs a GPU")
    rank, world = _join(device)
    model = shard(build_model(workload, kernel, weights, device), device, world)
    step = make_step(model, device, graphs)

    def share_of(batch: dict[str, Tensor], lengths: list[int], targets: int) -> Tensor:
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        whole = torch.tensor(targets, device=device)
        if world > 1:
            dist.all_reduce(whole)
        further = {}
        if kernel == "flex":
            positions = moved["position_ids"]
            further = {"positions": positions, "attention_masks": model.get_attention_masks(positions)}
        return step(moved["input_ids"], moved["labels"], whole, further).detach()

    clock = StepClock(warmup, steps)
    batches = _own(padded_batches(workload, (warmup + steps) * world, micro_batches), rank, world, micro_batches)
    loss = torch.tensor(
        train_in_a_loop(clock, batches, micro_batches, model, share_of, keep_gradients=graphs == "always")
    )
    if world > 1:
        on_device = loss.to(device)
        dist.all_reduce(on_device)
        loss = on_device
    settings: dict[str, object] = {"weights": weights, "rows": workload.rows, "attention": kernel}
    settings |= {"launches": "graphs"} if graphs == "always" else {}
    settings |= {"parallel": "fsdp"} if world > 1 else {}
    return clock.result("torchtitan", settings, workload.model_shape, float(loss))


def is_installed() -> bool:
    """Return whether torchtitan can be imported."""
    return find_spec("torchtitan") is not None


def masks_documents() -> bool:
    """Return whether torch makes the masks of documents that torchtitan 0.3 asks for. 2.13 does, 2.11 does not."""
    return "separate_full_blocks" in inspect.signature(flex_attention.create_block_mask).parameters


def refuse(workload: Workload) -> None:
    """Raise ValueError if torchtitan's Llama 3 is not exactly the model of the workload, naming what it lacks."""
    config = _config(workload)
    if workload.lora_rank is not None:
        raise ValueError("torchtitan is run without LoRA here")
    if config.model_type != "llama":
        raise ValueError(f"torchtitan is run on models of type llama here, not {config.model_type} ({workload.shape})")
    asked = {
        "rope_type": config.rope_parameters["rope_type"],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act,
    }
    has = {"rope_type": "default", "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for key, value in asked.items():
        if value != has[key]:
            raise ValueError(f"torchtitan is run with {key} {has[key]} here, not {value} ({workload.shape})")


def build_model(workload: Workload, kernel: str, weights: str, device: torch.device) -> Any:
    """Return torchtitan's model of the workload's shape on the device, with random weights."""
    _provide_names()
    made = model_config(workload, kernel)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if weights == "fp32" else torch.bfloat16)
    try:
        with torch.device("meta"):
            model = made.build()
    finally:
        torch.set_default_dtype(before)
    model.to_empty(device=device)
    torch.manual_seed(workload.seed)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return model.train()


def _config(workload: Workload) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(**workload.model_config)


def model_config(workload: Workload, kernel: str) -> Any:
    """Return the config of torchtitan's model, by its own builders."""
    from torchtitan.models import common
    from torchtitan.models.common import config_utils
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
    from torchtitan.models.common.param_init import skip_param_init
    from torchtitan.models.common.rope import CosSinRoPE
    from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    config = _config(workload)
    width, matrix = config.hidden_size, {"weight": partial(torch.nn.init.normal_, std=INITIAL_STD)}
    own_head = config.head_dim if config.head_dim * config.num_attention_heads != width else None
    inner = FlexAttention.Config() if kernel == "flex" else ScaledDotProductAttention.Config()
    theta = config.rope_parameters["rope_theta"]

    def norm() -> Any:
        ones = {"weight": torch.nn.init.ones_}
        return common.RMSNorm.Config(normalized_shape=width, eps=config.rms_norm_eps, param_init=ones)

    def layer() -> Any:
        rope = CosSinRoPE.Config(dim=config.head_dim, max_seq_len=workload.seq_length, theta=theta)
        attention = config_utils.make_gqa_config(
            dim=width, n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads, head_dim=own_head,
            wqkv_param_init=matrix, wo_param_init=matrix, inner_attention=inner, rope=rope, fuse_qkv=True,
        )  # fmt: skip
        mlp = config_utils.make_ffn_config(
            dim=width, hidden_dim=config.intermediate_size, w1_param_init=matrix, w2w3_param_init=matrix
        )
        return Llama3TransformerBlock.Config(
            attention=attention, feed_forward=mlp, attention_norm=norm(), ffn_norm=norm()
        )

    vocabulary, tied = config.vocab_size, bool(config.tie_word_embeddings)
    embedded = {"weight": skip_param_init} if tied else matrix  # tied weights are drawn once, as those of lm_head
    return Llama3Model.Config(
        dim=width,
        vocab_size=vocabulary,
        enable_weight_tying=tied,
        tok_embeddings=common.Embedding.Config(num_embeddings=vocabulary, embedding_dim=width, param_init=embedded),
        norm=norm(),
        lm_head=common.Linear.Config(in_features=width, out_features=vocabulary, param_init=matrix),
        layers=[layer() for _ in range(config.num_hidden_layers)],
    )


def shard(model: Any, device: torch.device, world: int) -> Any:
    """Compile the model's layers where there is a GPU, and shard it by FSDP2 over all ranks: torchtitan's own steps."""
    from torchtitan.config import CompileConfig, ParallelismConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.compile import apply_compile
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("partial_dtensor")  # its default needs an argument of fully_shard that came with torch 2.13
    if device.type == "cuda":
        parallel = ParallelDims.from_config(ParallelismConfig(spmd_backend="partial_dtensor"), world)
        apply_compile(model, compile_config=CompileConfig(enable=True), parallel_dims=parallel)
    mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("fsdp",))
    types = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    with patch("torchtitan.distributed.fsdp.fully_shard", partial(_shard_apart, model.norm)):
        apply_fsdp_to_decoder(model, mesh, pp_enabled=False, **types)
    return model


def _shard_apart(norm: Any, modules: Any, **settings: Any) -> None:
    """Shard modules as one unit, but the last norm as a unit of its own.

    torchtitan puts it with the output layer, whose loss gives the weights back before the norm's backward pass. torch
    2.13 gathers them once more, 2.11 does not.
    """
    from torch.distributed.fsdp import fully_shard

    if isinstance(modules, list) and norm in modules:
        fully_shard(norm, **settings)
        modules = [module for module in modules if module is not norm]
    fully_shard(modules, **settings)


def make_step(model: Any, device: torch.device, graphs: str) -> Step:
    """Return one forward and backward pass with torchtitan's chunked loss, replayed as a CUDA graph if asked for."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig
    from torchtitan.distributed.cudagraph import wrap_with_cuda_graph

    loss_of = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()).build(
        compile_config=CompileConfig(enable=device.type == "cuda")
    )
    loss_of.set_lm_head(model.lm_head)
    model._skip_lm_head = True

    def step(inputs: Tensor, labels: Tensor, targets: Tensor, further: dict[str, Any]) -> Tensor:
        loss, _ = loss_of(model(inputs, **further), labels, targets)
        loss.backward()
        made: Tensor = loss
        return made

    if graphs == "never":
        return step
    replayed: Step = wrap_with_cuda_graph(step)
    return replayed


def _provide_names() -> None:
    """Give torch 2.11 the one name that torchtitan imports from newer versions, for an annotation."""
    from torch.distributed import fsdp

    if not hasattr(fsdp, "DataParallelMeshDims"):
        setattr(fsdp, "DataParallelMeshDims", type("DataParallelMeshDims", (), {}))  # noqa: B010


def _join(device: torch.device) -> tuple[int, int]:
    """Join the process group of all ranks, or one of this process alone, and return rank and size."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def _own(batches: list[PackedBatch], rank: int, world: int, micro_batches: int) -> list[PackedBatch]:
    """Return the micro-batches of one rank: of each step as many as it has alone."""
    return [batch for index, batch in enumerate(batches) if index // micro_batches % world == rank]
