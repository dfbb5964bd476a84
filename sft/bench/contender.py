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
from pathlib import Path

from launcher.contract.rundir import write_json


def main(request_file: Path, result_file: Path) -> None:
    """Run the contender of the request in `request_file`, and write its result to `result_file`."""
    import torch

    from sft.bench import automodel, ours, peers, torchtitan
    from sft.bench.workload import Workload

    request = json.loads(request_file.read_text(encoding="utf-8"))
    contender, settings = request["contender"], request["settings"]
    workload = Workload(**request["workload"])
    if os.environ.get("WORLD_SIZE") == "1" and contender != "ours":
        # On one GPU other trainers run as their users run them, without DDP around the model.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if contender == "ours":
        with tempfile.TemporaryDirectory() as folder:
            result = ours.run_ours(workload, Path(folder), **settings)
    elif contender == "automodel":
        result = automodel.run_automodel(workload, **settings)
    elif contender == "torchtitan":
        result = torchtitan.run_torchtitan(workload, **settings)
    elif contender == "trl":
        result = peers.run_trl(workload, **settings)
    else:
        result = peers.run_transformers(workload, **settings)
    if os.environ.get("RANK", "0") == "0":
        write_json(result_file, dataclasses.asdict(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # shutting down CUDA, NCCL and worker threads takes longer than a measurement
