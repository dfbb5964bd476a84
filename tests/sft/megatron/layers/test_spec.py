"""What is built is what was chosen: the type of every layer, norm, attention, MLP and linear, for each combination.

Megatron-core has ignored a choice without an error (a fused MLP set on its MLP spec, from 0.18 on), and such a model
trains all the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from launcher.contract.spec import LoraSpec, RunSpec
from sft.megatron.kernel_choice import Kernels
from sft.megatron.layers.spec import LayerOptions, decoder_spec
from sft.models.registry import SUPPORTED, read_architecture
from tests.ranks import run_ranks
from tests.sft.hf_cases import run_spec, save_config

PARTS = (
    "",
    "input_layernorm",
    "self_attention",
    "self_attention.core_attention",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "pre_mlp_layernorm",
    "mlp",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
LINEARS = {
    # (fp8, adapters): prefix of both linears' names
    (False, False): "",
    (False, True): "Lora",
    (True, False): "Fp8",
    (True, True): "LoraFp8",
}
Choice = tuple[bool, bool, bool]
"""(fused kernels, fp8, adapters)"""


def types_of_layers(spec: RunSpec) -> dict[Choice, list[dict[str, str]]]:
    """Runs on a rank: for each choice the type of each part of each layer."""
    from launcher.contract.topology import build_topology
    from sft.megatron.config import transformer_config
    from sft.megatron.kernel_choice import choose_kernels
    from sft.megatron.model import build_chunks
    from sft.megatron.parallel.groups import init_model_parallel

    architecture = read_architecture(Path(spec.model.path))
    topology = build_topology(spec, architecture.shape)
    init_model_parallel(topology, seed=1)
    found: dict[Choice, list[dict[str, str]]] = {}
    for fused, fp8, adapted in itertools.product((False, True), repeat=3):
        train = dataclasses.replace(
            spec.train, kernels="fused" if fused else "plain", precision="fp8" if fp8 else "bf16"
        )
        model = dataclasses.replace(spec.model, lora=LoraSpec(rank=2 if adapted else None))
        own = dataclasses.replace(spec, train=train, model=model)
        kernels = choose_kernels(own, architecture, on_gpu=False)
        config = transformer_config(own, architecture, topology, kernels, on_gpu=False)
        (chunk,) = build_chunks(own, architecture, topology, config, kernels)
        found[fused, fp8, adapted] = [
            {part: type(layer.get_submodule(part)).__name__ for part in PARTS} for layer in chunk.decoder.layers
        ]
    return found


def types_of_parameters(specs: dict[str, RunSpec]) -> dict[str, set[str]]:
    """Runs on a rank: by family the number types of its parameters."""
    from launcher.contract.topology import build_topology
    from sft.megatron.config import transformer_config
    from sft.megatron.kernel_choice import choose_kernels
    from sft.megatron.model import build_chunks
    from sft.megatron.parallel.groups import init_model_parallel

    found = {}
    for index, (name, spec) in enumerate(specs.items()):
        architecture = read_architecture(Path(spec.model.path))
        topology = build_topology(spec, architecture.shape)
        if index == 0:
            init_model_parallel(topology, seed=1)
        kernels = choose_kernels(spec, architecture, on_gpu=False)
        config = transformer_config(spec, architecture, topology, kernels, on_gpu=False)
        (chunk,) = build_chunks(spec, architecture, topology, config, kernels)
        found[name] = {str(parameter.dtype) for parameter in chunk.parameters()}
    return found


@pytest.mark.parity
def test_every_parameter_has_the_precision_of_the_run(tmp_path: Path) -> None:
    """Seen to fail for GPT-2, whose table of positions stayed fp32, so that its first norm raised an error on a GPU."""
    specs = {}
    for name in SUPPORTED:
        (tmp_path / name).mkdir()
        specs[name] = run_spec(save_config(name, tmp_path / name), 1, "bf16")
    (found,) = run_ranks(1, types_of_parameters, specs, init=True)
    assert found == {name: {"torch.bfloat16"} for name in SUPPORTED}


@pytest.mark.parity
def test_every_choice_is_built(tmp_path: Path) -> None:
    (found,) = run_ranks(1, types_of_layers, run_spec(save_config("llama", tmp_path), 1), init=True)
    assert len(found) == 8
    for (fused, fp8, adapted), layers in found.items():
        kind, norm = ("Fused", "FusedRMSNorm") if fused else ("", "RMSNorm")
        column, row = (f"{LINEARS[fp8, adapted]}{which}ParallelLinear" for which in ("Column", "Row"))
        expected = {
            "": f"{kind}TransformerLayer",
            "input_layernorm": norm,
            "self_attention": "FusedSelfAttention" if fused else "RotarySelfAttention",
            "self_attention.core_attention": f"{kind}CoreAttention",
            "self_attention.linear_qkv": column,
            "self_attention.linear_proj": row,
            "pre_mlp_layernorm": norm,
            "mlp": f"{kind}MLP",
            "mlp.linear_fc1": column,
            "mlp.linear_fc2": row,
        }
        assert layers == [expected] * 4, (fused, fp8, adapted)


def test_no_two_layers_share_an_object(tmp_path: Path) -> None:
    architecture = read_architecture(save_config("llama", tmp_path))
    for fused in (False, True):
        block = decoder_spec(architecture, LayerOptions(kernels=Kernels(fused=fused)), range(2, 5))
        specs = block.layer_specs
        assert len(specs) == 3
        for of in (
            lambda spec: spec,
            lambda spec: spec.submodules,
            lambda spec: spec.submodules.self_attention,
            lambda spec: spec.submodules.self_attention.submodules,
            lambda spec: spec.submodules.mlp,
        ):
            assert len({id(of(spec)) for spec in specs}) == 3


def test_layers_differ_where_the_architecture_says_so(tmp_path: Path) -> None:
    architecture = read_architecture(save_config("llama", tmp_path))
    first, *others = architecture.layers
    unlike = dataclasses.replace(first.attention, rotary=False, softmax_scale=0.5)
    layers = (*others, dataclasses.replace(first, attention=unlike, residual_multiplier=0.25))
    changed = dataclasses.replace(architecture, layers=layers)
    block = decoder_spec(changed, LayerOptions(kernels=Kernels(fused=True)), range(1, 5))
    attention = [spec.submodules.self_attention for spec in block.layer_specs]
    assert [spec.params["rotary"] for spec in attention] == [True, True, True, False]
    assert [spec.submodules.core_attention.params["scale"] for spec in attention] == [None, None, None, 0.5]
    assert [spec.params["residual_multiplier"] for spec in block.layer_specs] == [1.0, 1.0, 1.0, 0.25]
