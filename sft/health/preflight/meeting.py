"""What the nodes do together through the store on the first one: compare clocks, and all-reduce in pairs."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from sft.health.preflight.pairs import all_reduce, rounds
from sft.runtime.rank_env import RankEnv

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

POLL_SECONDS = 0.01


def clock_offset(store: Store, node: int, seconds: float) -> tuple[float, float]:
    """Return by how much this clock is ahead of the first node's, and the uncertainty, in seconds.

    The uncertainty is half of the time that the answer took, or `seconds` if none came in that time.
    """
    if node == 0:
        return 0.0, 0.0
    asked = time.time()
    store.set(f"ping/{node}", "1")
    try:
        store.wait([f"pong/{node}"], timedelta(seconds=seconds))
    except Exception:  # torch raises several kinds; each means that there is no answer
        return 0.0, seconds
    answered = time.time()
    theirs = float(store.get(f"pong/{node}"))
    return (asked + answered) / 2 - theirs, (answered - asked) / 2


def host_meeting(store: Store, nodes: int, deadline: float) -> None:
    """Serve the other nodes on the first one: tell the time to those that ask, and to all who is present.

    Who is present is told once all nodes are, at the latest at `deadline` (by time.monotonic).
    """
    unasked, present, told = set(range(1, nodes)), set[int](), False
    while unasked or not told:
        for node in [node for node in unasked if store.check([f"ping/{node}"])]:
            store.set(f"pong/{node}", repr(time.time()))
            unasked.remove(node)
        present |= {node for node in set(range(nodes)) - present if store.check([f"here/{node}"])}
        if not told and (len(present) == nodes or time.monotonic() > deadline):
            store.set("present", json.dumps(sorted(present)))
            told = True
        time.sleep(POLL_SECONDS)


def meet_partners(store: Store, env: RankEnv, began: float, limit: float) -> dict[int, str | None]:
    """All-reduce with the partner of each round and return, for each partner, what went wrong or None.

    All nodes that are present begin the rounds together. A round has its share of the time that is left, and what the
    rounds before it did not use, because a partner may have waited in vain until their end.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout raises instead of ending the process
    store.set(f"here/{env.rank}", "1")
    store.wait(["present"], timedelta(seconds=limit))
    present: list[int] = json.loads(store.get("present"))
    if env.rank not in present:
        return {}
    schedule = rounds(len(present))
    start = time.monotonic()
    each = max(1.0, began + 0.8 * limit - start) / max(1, len(schedule))
    problems: dict[int, str | None] = {}
    for number, pairs in enumerate(schedule):
        for low, high in [(present[low], present[high]) for low, high in pairs]:
            if env.rank in (low, high):
                left = start + (number + 1) * each - time.monotonic()
                name, place = f"pair/{number}/{low}", int(env.rank == high)
                problems[low + high - env.rank] = all_reduce(store, name, place, left, on_gpu=on_gpu)
    return problems
