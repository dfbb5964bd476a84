"""`python -m sft.bench.contender REQUEST RESULT`: run one contender on one workload.

Each contender runs in its own processes, so that it has all the memory and is not affected by what another has patched.
This runs on every rank; rank 0 writes the result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.contract.rundir import write_json

if TYPE_CHECKING:
    from sft.bench.result import Result
    from sft.bench.workload import Workload


def main(request_file: Path, result_file: Path) -> None:
    """Run the contender of the request in `request_file`, and write its result to `result_file`."""
    from sft.bench import unsloth
    from sft.bench.workload import Workload

    request = json.loads(request_file.read_text(encoding="utf-8"))
    contender, settings = request["contender"], request["settings"]
    workload = Workload(**request["workload"])
    if contender == "unsloth":
        unsloth.load(result_file.parent)  # it changes packages that the imports of _run use
    if os.environ.get("WORLD_SIZE") == "1" and contender != "ours":
        # On one GPU other trainers run as their users run them, without DDP around the model.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    result = _run(contender, workload, settings)
    if os.environ.get("RANK", "0") == "0":
        write_json(result_file, dataclasses.asdict(result))


def _run(contender: str, workload: Workload, settings: dict[str, Any]) -> Result:
    import torch

    from sft.bench import automodel, ours, peers, torchtitan, unsloth

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if contender == "ours":
        with tempfile.TemporaryDirectory() as folder:
            return ours.run_ours(workload, Path(folder), **settings)
    others: dict[str, Callable[..., Result]] = {
        "automodel": automodel.run_automodel,
        "torchtitan": torchtitan.run_torchtitan,
        "transformers": peers.run_transformers,
        "trl": peers.run_trl,
        "unsloth": unsloth.run_unsloth,
    }
    return others[contender](workload, **settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # shutting down CUDA, NCCL and worker threads takes longer than a measurement
