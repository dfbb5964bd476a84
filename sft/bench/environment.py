"""The environment of a contender's processes."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.contract.errors import ConfigError
from sft.bench.topology import parse_topology, replica_size

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def contender_variables(gpus: int, topology: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set for a contender that runs on `gpus` GPUs under `topology`.

    It sees the first `gpus` of the GPUs that this process may use, and no other: what runs on one GPU of several must
    not spread over all of them, as transformers' Trainer does with torch's DataParallel. Raise ConfigError if there are
    fewer.
    """
    # As in the batch script: with one hardware queue, collectives of a model's ranks start before the computation that
    # is to hide them.
    model_parallel = replica_size(parse_topology(topology)) > 1
    return {
        "PYTORCH_CUDA_ALLOC_CONF": environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1" if model_parallel else "32",
        _VISIBLE: _first_devices(gpus, environ.get(_VISIBLE)),
    }


def _first_devices(gpus: int, visible: str | None) -> str:
    """Return the first `gpus` of the devices that `visible` names: indices or UUIDs, None for all, "" for none."""
    if visible is None:
        return ",".join(map(str, range(gpus)))
    if not visible.strip():  # on purpose, to try a command out on the CPU
        return visible
    named = [name.strip() for name in visible.split(",")]
    if len(named) < gpus:
        raise ConfigError(f"--gpus {gpus}: {_VISIBLE} names only {len(named)} ({visible}); name more, or ask for fewer")
    return ",".join(named[:gpus])
