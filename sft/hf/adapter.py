"""Low-rank adapters by Hugging Face names: which layers have one, and where its rows lie in Megatron-core's linears.

An adapter adds scale * B(A(x)) to a linear layer of the *files* (q_proj, gate_proj, ...), as PEFT has it. Megatron-core
fuses several of these into one linear, whose map (`sft.models.weight_map`) tells the rows of each. So every target
keeps an A and a B of its own, and an adapter trained here is an adapter there.

B is kept by blocks of the map: within a block a tensor-parallel rank holds a contiguous part, so that a checkpoint
can be cut anew for another number of ranks. Only Phi-3's gate_up_proj has two blocks.

Rejected: one adapter a fused linear (q, k and v would share an A, which no PEFT adapter can express).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from launcher.contract.spec import LoraSpec
from sft.models.architecture import Architecture, Experts
from sft.models.weight_map import SHARED_EXPERT, ParameterMap, Piece, checkpoint_key, split_parameter

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name of DoRA's magnitudes, in files."""
MARK = ".lora."
"""In the name of every adapter parameter, and of no other."""

_WEIGHT = ".weight"


class CheckpointTensors(Protocol):
    """What is needed of `sft.hf.sharded_reader.ShardedReader`."""

    def tensor(self, key: str, index: int | None = None) -> torch.Tensor:
        """Return a whole tensor, or one layer of it."""


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """The adapter of one layer."""

    a: torch.Tensor
    b: torch.Tensor
    magnitudes: torch.Tensor | None = None
    """The lengths of the rows of the adapted weight (DoRA); None without DoRA."""

    def named(self, module: str) -> dict[str, torch.Tensor]:
        """Return the tensors by the names that PEFT's files have, for the layer `module`."""
        prefix = f"{PEFT_PREFIX}{module}."
        tensors = {f"{prefix}lora_A.weight": self.a, f"{prefix}lora_B.weight": self.b}
        return tensors if self.magnitudes is None else tensors | {f"{prefix}{MAGNITUDE}": self.magnitudes}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTarget:
    """One linear layer of the files that has an adapter."""

    name: str
    """q_proj and the like."""
    module: str
    """The layer's whole Hugging Face name."""
    layer: int
    linear: str
    """The Megatron-core linear that holds its rows, within the layer."""
    parameter_map: ParameterMap
    """Its rows in that linear, in the order in which the linear has them."""
    stacked: bool
    """Whether checkpoints stack the layers of this model (`WeightMap.stacked`)."""

    @property
    def columns(self) -> int:
        """The size of its input."""
        assert self.parameter_map.columns is not None
        return self.parameter_map.columns

    @property
    def split_input(self) -> bool:
        """Whether tensor-parallel ranks hold parts of its input. Otherwise they hold parts of its rows, or all."""
        return self.parameter_map.split == 1

    @property
    def is_whole(self) -> bool:
        """Whether every tensor-parallel rank has all of it."""
        return self.parameter_map.split is None

    @property
    def block_rows(self) -> list[int]:
        """The number of rows of each block, over all ranks."""
        return [sum(piece.rows for piece in block) for block in self.parameter_map.blocks]

    def parameter(self, which: str) -> str:
        """Return the name of the parameter `lora_A` or `lora_B.<block>` in the whole model."""
        return f"decoder.layers.{self.layer}.{self.linear}{MARK}{self.name}.{which}"

    def checkpoint_key(self, which: str) -> tuple[str, int | None]:
        """Return the key of that parameter in a sharded checkpoint, and its index there."""
        return checkpoint_key(self.parameter(which), stacked=self.stacked)

    def parts(self, lora: LoraSpec) -> Iterator[tuple[str, str]]:
        """Yield the adapter's parameters as `parameter` takes them, each with its name in PEFT below the layer's."""
        yield "lora_A", "lora_A.weight"
        for block in range(len(self.parameter_map.blocks)):
            yield f"lora_B.{block}", "lora_B.weight"
            if lora.dora:
                yield f"magnitude.{block}", MAGNITUDE

    def draw_a(self, rank: int, seed: int) -> torch.Tensor:
        """Return the whole initial A."""
        return initial_a(self.module, rank, self.columns, seed)

    def read(self, source: CheckpointTensors, *, dora: bool = False) -> AdapterTensors:
        """Return the adapter of a sharded checkpoint, rows in the order of the files."""
        a = source.tensor(*self.checkpoint_key("lora_A"))
        magnitudes = self._rows(source, "magnitude")[:, 0] if dora else None
        return AdapterTensors(a, self._rows(source, "lora_B"), magnitudes)

    def _rows(self, source: CheckpointTensors, which: str) -> torch.Tensor:
        """Return B or, as one column, the magnitudes. Their blocks are parameters of their own."""
        import torch

        blocks = range(len(self.parameter_map.blocks))
        rows = torch.cat([source.tensor(*self.checkpoint_key(f"{which}.{block}")) for block in blocks])
        return split_parameter(self.parameter_map, rows.view(len(rows), -1))[f"{self.module}{_WEIGHT}"]


def initial_a(module: str, rank: int, columns: int, seed: int) -> torch.Tensor:
    """Return A of a layer's new adapter: random with PEFT's distribution, from the layer's name and the seed alone."""
    import torch

    digest = hashlib.sha256(f"{seed} {module}.lora_A.weight".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = float(columns**-0.5)
    return torch.empty((rank, columns), device="cpu").uniform_(-bound, bound, generator=generator)


def adapter_targets(architecture: Architecture, lora: LoraSpec, layer: int) -> list[AdapterTarget]:
    """Return the adapters of one layer, in the order of the files."""
    found = []
    has_experts = isinstance(architecture.layers[layer].mlp, Experts)
    for parameter, parameter_map in architecture.weights.layers[layer].items():
        of_experts = has_experts and parameter.startswith("mlp.") and not parameter.startswith(SHARED_EXPERT)
        if parameter_map.columns is None or parameter_map.depthwise or of_experts:  # not the matrix of a linear layer
            continue
        for weight in dict.fromkeys(piece.name for piece in parameter_map.pieces):
            module = weight.removesuffix(_WEIGHT)
            name = module.rpartition(".")[2]
            if not lora.names or name in lora.names:
                found.append(
                    AdapterTarget(
                        name=name,
                        module=module,
                        layer=layer,
                        linear=parameter.removesuffix(_WEIGHT),
                        parameter_map=_rows_of(weight, parameter_map),
                        stacked=architecture.weights.stacked,
                    )
                )
    return found


def all_targets(architecture: Architecture, lora: LoraSpec) -> list[AdapterTarget]:
    """Return the adapters of the whole model."""
    layers = range(architecture.shape.num_layers)
    return [target for layer in layers for target in adapter_targets(architecture, lora, layer)]


def target_names(architecture: Architecture, lora: LoraSpec) -> list[str]:
    """Return the names of the layers that have adapters, each once, in the order of the files."""
    return list(dict.fromkeys(target.name for target in all_targets(architecture, lora)))


def lora_problems(
    lora: LoraSpec, architecture: Architecture, tensor_parallel: int, of_experts: Sequence[str] = ()
) -> list[str]:
    """Return what the model cannot do of these settings. `of_experts` names the layers that its experts have."""
    if lora.rank is None:
        return []
    if any(part.transposed and not part.experts for part in architecture.weights.layers[0].values()):
        kind = architecture.shape.model_type
        return [f"model.lora.rank {lora.rank}: a {kind} model takes no adapters here; unset it to train all weights"]
    every = list(dict.fromkeys([*target_names(architecture, LoraSpec(rank=lora.rank)), *of_experts]))
    problems = [
        f"model.lora.targets: a {architecture.shape.model_type} model has no linear layer {name}; it has "
        f"{', '.join(every)}"
        for name in lora.names
        if name not in every
    ]
    groups = min(kind.num_query_groups for kind in architecture.shape.head_kinds)
    uneven = [name for name in (lora.names or every) if name in ("q_proj", "k_proj", "v_proj")]
    if tensor_parallel > groups and uneven:
        problems.append(
            f"model.lora.targets: adapters of {', '.join(uneven)} need topology.tensor_parallel {tensor_parallel} to "
            f"be at most the {groups} KV heads; with more, ranks hold unequal parts of them"
        )
    return problems


def merged_weight(weight: torch.Tensor, adapter: AdapterTensors, scale: float) -> torch.Tensor:
    """Return the layer's weight with the adapter in it, in fp32."""
    import torch

    whole: torch.Tensor = weight.float() + scale * (adapter.b.float() @ adapter.a.float())
    if adapter.magnitudes is None:
        return whole
    # Norms in the number type of the magnitudes, as in training.
    norms = torch.linalg.vector_norm(whole, dim=1).to(adapter.magnitudes.dtype).float()
    rows: torch.Tensor = whole * (adapter.magnitudes.float() / norms)[:, None]
    return rows


def _rows_of(weight: str, parameter_map: ParameterMap) -> ParameterMap:
    """Return the part of a fused linear's map that comes from one tensor of the files."""
    blocks: list[tuple[Piece, ...]] = [
        tuple(piece for piece in block if piece.name == weight) for block in parameter_map.blocks
    ]
    return ParameterMap(
        blocks=tuple(block for block in blocks if block), columns=parameter_map.columns, split=parameter_map.split
    )
