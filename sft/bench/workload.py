"""The workload of a benchmark: a named model shape with random weights, and examples of random tokens.

Speed does not depend on the values of weights and tokens, but on the lengths of examples and on how many of their
tokens are trained. With `full` each row is one example and every token is trained, as in pre-training benchmarks.
`ragged` is chat: lognormal lengths with a median of 375, cut at 4,000, close to those of OpenAssistant's English trees
(median 330), with the last 80 % of each example trained (there, 84 % of the characters are the assistant's).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from launcher.contract.model_shape import ModelShape, named_model_config

MEDIAN_LENGTH = 375
LONGEST = 4_000
TRAINED_SHARE = 0.8
INITIAL_STD = 0.02
"""Standard deviation of random matrices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Model and data of one benchmark."""

    shape: str
    """Name in launcher/contract/model_shapes.yaml."""
    data: Literal["full", "ragged"]
    seq_length: int
    rows: int
    """Rows of `seq_length` tokens in a step of one GPU."""
    layers: int | None = None
    """Decoder layers in place of all, where all do not fit."""
    router_std: float = INITIAL_STD
    """Standard deviation of the weights of routers. With a large one a few experts get most of the tokens."""
    lora_rank: int | None = None
    """Rank of LoRA adapters on every linear layer. None trains all weights."""
    seed: int = 1234

    @property
    def model_shape(self) -> ModelShape:
        return ModelShape.from_config(self.model_config, self.shape)

    @property
    def model_config(self) -> dict[str, Any]:
        """The model's config.json, with positions for the whole length of a row."""
        config = named_model_config(self.shape)
        if self.layers is not None:
            config["num_hidden_layers"] = self.layers
        config["max_position_embeddings"] = max(int(config["max_position_embeddings"]), self.seq_length)
        return {"rms_norm_eps": 1e-5, "hidden_act": "silu", **config}

    def lengths(self, steps: int) -> NDArray[np.int64]:
        """Return the tokens of each example, for `steps` steps and some more. One of n + 1 tokens has n inputs."""
        slots = self.rows * self.seq_length * steps
        if self.data == "full":
            return np.full(self.rows * steps, self.seq_length + 1, dtype=np.int64)
        generator = np.random.default_rng(self.seed)
        lognormal = generator.lognormal(np.log(MEDIAN_LENGTH), 1.0, 2 * slots // MEDIAN_LENGTH + 8)
        lengths = np.clip(lognormal, 8, min(LONGEST, self.seq_length)).astype(np.int64)
        return lengths[: int(np.searchsorted(np.cumsum(lengths), slots * 1.05)) + 1]

    def examples(self, steps: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Yield the token ids of each example, and which of them are trained."""
        generator = np.random.default_rng(self.seed + 1)
        share = 1.0 if self.data == "full" else TRAINED_SHARE
        for length in self.lengths(steps).tolist():
            trained = np.arange(length) >= round(length * (1 - share))
            yield generator.integers(10, self.model_shape.vocab_size, length, dtype=np.int32), trained
