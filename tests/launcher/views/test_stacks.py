"""Ranks in groups: those that stand at the same place together, the odd ones first."""

from __future__ import annotations

from launcher.contract.rundir import JsonObject
from launcher.views.stacks import gather, names, render


def about(rank: int, **other: object) -> JsonObject:
    line = {"rank": rank, "host": f"node{rank // 4}", "pid": 100 + rank, "process": "S (sleeping)", "answered": True}
    return {**line, "phase": "step", "step": 12, "seconds": 3.0 + rank, **other}


def frame(rank: int, function: str, thread: str = "MainThread") -> JsonObject:
    return {"rank": rank, "thread": thread, "file": "/env/site-packages/sft/a.py", "line": 7, "function": function}


def test_groups() -> None:
    stuck = [rank for rank in range(8) if rank not in (2, 5, 6)]
    lines = [line for rank in stuck for line in (about(rank), frame(rank, "all_reduce"))]
    own_code = {"file": "/runs/first/bundle/code.zip/sft/b.py"}
    lines += [about(2, phase="data"), frame(2, "read") | own_code, frame(2, "keep", "lease")]
    lines += [about(5, answered=False, process="T (stopped)", phase=None, step=None, seconds=None)]
    text = render(gather("first", "7.0", 2, 8, reversed(lines)))
    assert text.split("\n\n") == [
        "run first, attempt 7.0: 7 ranks on 2 nodes",
        "rank 5 (node1, process 105): no answer; the process is T (stopped): stopped",
        "rank 2 (node0, process 102): data after step 12, for 5 s\n    sft/b.py:7 read",
        "ranks 0-1,3-4,7: step after step 12, for 3 to 10 s\n    sft/a.py:7 all_reduce",
        "rank 6: no process; it is starting or ending, or its node does not answer",
    ]
    assert "  lease\n    sft/a.py:7 keep" in render(gather("first", "7.0", 2, 8, lines), all_threads=True)


def test_names() -> None:
    assert [names([3]), names([0, 1, 2]), names([0, 2, 3])] == ["rank 3", "ranks 0-2", "ranks 0,2-3"]
