"""All-reduce between pairs of nodes in a few rounds, and find the bad nodes among pairs that fail.

In each round every node has one partner, so the time does not grow with the number of nodes. After a few rounds a node
has met several others. A node that fails with every partner, while they succeed with others, is the bad one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

ROUNDS = 3
_ELEMENTS = 1 << 20

Pair = tuple[int, int]


def rounds(nodes: int) -> list[list[Pair]]:
    """Return up to ROUNDS rounds of disjoint pairs: the first ones of a round-robin tournament.

    With an odd number of nodes, one rests in each round.
    """
    places = list(range(nodes)) + ([-1] if nodes % 2 else [])
    schedule = []
    for _ in range(min(ROUNDS, len(places) - 1)):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        schedule.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        places = [places[0], places[-1], *places[1:-1]]
    return schedule


def blame(results: Mapping[Pair, bool], known_bad: Collection[int]) -> dict[int, list[int]]:
    """Return each bad node with the partners it failed with.

    Failures with a node that is known to be bad say nothing about its partner. Of the rest, the node with most failures
    and fewest successes is blamed, then the next one, until every failure is explained. If nothing distinguishes the
    two nodes of a pair, both are blamed.
    """
    failed = {pair for pair, ok in results.items() if not ok and not set(pair) & set(known_bad)}
    successes = Counter(node for pair, ok in results.items() if ok for node in pair)
    blamed: dict[int, list[int]] = {}
    while failed:
        failures = Counter(node for pair in failed for node in pair)
        scores = {node: (count, -successes[node]) for node, count in failures.items()}
        worst = max(scores.values())
        chosen = {node for node, score in scores.items() if score == worst}
        for node in chosen:
            blamed[node] = sorted(sum(pair) - node for pair in failed if node in pair)
        failed = {pair for pair in failed if not set(pair) & chosen}
    return blamed


def all_reduce(store: Store, name: str, place: int, seconds: float, *, on_gpu: bool) -> str | None:
    """Sum a tensor with the partner, as rank `place` of the two, and return what went wrong, or None."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(name, store),  # type: ignore[attr-defined]
            rank=place,
            world_size=2,
            timeout=timedelta(seconds=max(seconds, 1.0)),
        )
        values = torch.full((_ELEMENTS,), place + 1.0, device=device)
        dist.all_reduce(values)
        wrong = int((values != 3.0).sum())
        return f"{wrong} of {_ELEMENTS} sums are wrong" if wrong else None
    except (RuntimeError, ValueError) as error:  # torch's own errors are subclasses of these
        return str(error).splitlines()[0][:200]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
