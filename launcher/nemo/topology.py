"""Check the topology of a NeMo config by itself, before data or weights are named."""

from __future__ import annotations

from launcher.contract.config.conversion import typed_spec
from launcher.contract.errors import ConfigError
from launcher.contract.leaves import Leaf, Leaves
from launcher.contract.model_shape import ModelShape
from launcher.contract.nemo.convert import Conversion
from launcher.contract.topology import build_topology


def check_topology(conversion: Conversion) -> None:
    """Raise TopologyError that lists every rule which the topology of a converted config breaks.

    The config has to describe its model.
    """
    assert conversion.model is not None
    values = {key: Leaf(value, "file", outcome.where) for key, value, outcome in conversion.settings()}
    leaves = Leaves(values=values)
    spec = typed_spec(leaves)
    if leaves.problems:
        raise ConfigError(leaves.problems)
    build_topology(spec, ModelShape.from_config(conversion.model, "the model it describes"))
