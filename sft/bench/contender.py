"""`python -m sft.bench.contender REQUEST RESULT`: one contender on one workload, in processes of its own.

So that each has all the memory, and none sees what another has patched. Runs on every rank; the first one writes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from launcher.contract.rundir import write_json


def main(request: Path, result: Path) -> None:
    """Run what the request asks for."""
    import torch

    from sft.bench import ours, peers
    from sft.bench.workload import Workload

    asked: dict[str, Any] = json.loads(request.read_text(encoding="utf-8"))
    workload = Workload(**asked["workload"])
    if os.environ.get("WORLD_SIZE") == "1" and asked["contender"] != "ours":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # on one GPU they run as their users run them, without DDP around the model
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    run = {"ours": ours.run_ours, "trl": peers.run_trl, "transformers": peers.run_transformers}[asked["contender"]]
    with tempfile.TemporaryDirectory() as folder:
        place = {"folder": Path(folder)} if asked["contender"] == "ours" else {}
        found = run(workload, **place, **asked["settings"])  # type: ignore[operator]
    if os.environ.get("RANK", "0") == "0":
        write_json(result, dataclasses.asdict(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an orderly end of CUDA, NCCL and worker threads takes longer than a measurement
