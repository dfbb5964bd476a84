"""The topology of a NeMo config, checked by itself: it needs neither data nor weights, which may still be to come."""

from __future__ import annotations

from launcher.contract.config.load import typed
from launcher.contract.errors import ConfigError
from launcher.contract.leaves import Leaf, Leaves
from launcher.contract.model_shape import ModelShape
from launcher.contract.nemo.convert import Conversion
from launcher.contract.topology import build_topology


def check_layout(conversion: Conversion) -> None:
    """TopologyError with every rule that the file's layout breaks."""
    values = {key: Leaf(value, "file", outcome.where) for key, value, outcome in conversion.settings()}
    leaves = Leaves(values=values)
    spec = typed(leaves)
    if leaves.problems:
        raise ConfigError(leaves.problems)
    assert conversion.model is not None
    build_topology(spec, ModelShape.from_config(dict(conversion.model), "the model it spells out"))
