"""The queue by which a checkpoint's writer hands its results to the rank."""

from __future__ import annotations

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async

from sft.megatron.patches.patch import Patch


def _apply() -> None:
    filesystem_async._results_queue = queue.Queue()  # sft.checkpoint.save writes in a thread of the rank


PATCH = Patch(
    name="results_queue",
    why="each rank would start a multiprocessing manager only to pass results to itself: it imports `__main__` again, "
    "takes seconds, and outlives the rank",
    targets=("megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",),
    test="sft/megatron/patches/test_results_queue.py::test_no_manager_process_is_started",
    apply=_apply,
)
