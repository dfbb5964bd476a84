"""model: what training starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from launcher.contract.spec.paths import ExistingDirectory, ModelPath
from launcher.contract.spec.rules import REVISION, Above, AtLeast, Fraction, Required

ALL_LINEAR = "all-linear"
"""Stands for every linear layer in the list of LoRA targets, as in PEFT."""

_MODELS = "a Hugging Face model directory or hub id (ORG/NAME), a NeMo checkpoint, a .gguf file or package:NAME/FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """Train low-rank adapters and keep the model's own weights fixed."""

    rank: Annotated[int | None, AtLeast(1)] = None
    """Rank of each adapter; unset trains all weights."""
    alpha: Annotated[float | None, Above(0)] = None
    """Adapters are scaled by alpha / rank; default alpha = rank, a scale of 1."""
    rslora: bool = False
    """rsLoRA: scale adapters by alpha / sqrt(rank) instead."""
    dora: bool = False
    """DoRA: train the length of each row of an adapted layer's weight, too; the adapter then changes its direction."""
    targets: list[str] = field(default_factory=list)
    """Linear layers to adapt, by their Hugging Face names, e.g. [q_proj, v_proj]; empty or all-linear: all of them."""
    dropout: Annotated[float, Fraction()] = 0.0
    """Dropout on each adapter's input."""
    router: bool = False
    """Train the routers of a model with experts, too: their matrices as they are, without adapters."""

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        if self.rank is None:
            return 1.0
        return (self.rank if self.alpha is None else self.alpha) / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def names(self) -> list[str]:
        """The layers to adapt by name, empty for all of them."""
        return [] if self.targets == [ALL_LINEAR] else self.targets


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The model to start from."""

    path: Annotated[
        str,
        Required(_MODELS),
        ModelPath(),
    ] = ""
    """A Hugging Face model directory, a model of the hub by its id (ORG/NAME), a NeMo 1.x checkpoint (.nemo, or its
    folder), a NeMo 2 checkpoint, a Megatron-core sharded checkpoint with a config.json beside it, a .gguf file, or
    package:NAME/FILE for a file of an installed package."""
    revision: Annotated[str | None, REVISION] = None
    """Branch, tag or commit of a model of the hub; default main. The run keeps the commit."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: load the weights; random: take only the shape, and initialize weights from train.seed."""
    tokenizer: Annotated[str | None, ExistingDirectory()] = None
    """Tokenizer directory, or ORG/NAME of the hub; default model.path."""
    attention_dropout: Annotated[float, Fraction()] = 0.0
    """Dropout on attention probabilities, whatever the model's own config says."""
    hidden_dropout: Annotated[float, Fraction()] = 0.0
    """Dropout on the embeddings and on each residual branch, whatever the model's own config says."""
    lora: LoraSpec = field(default_factory=LoraSpec)
    """Train low-rank adapters instead of all weights."""
