"""Which copy in memory ranks go on from: the newest of which every rank's part is on some node."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sft.checkpoint.copy_choice import Choice, Seen, choose
from sft.checkpoint.copy_parts import Part


def part(rank: int, step: int = 4, attempt: str = "7.0") -> Part:
    return Part(identity="run", attempt=attempt, step=step, rank=rank, bytes=1, crc32=f"{rank}{step}")


def seen(*nodes: tuple[str, list[Part]]) -> list[Seen]:
    """One rank on each node."""
    return [Seen(node=name, parts=tuple(parts)) for name, parts in nodes]


def test_each_rank_takes_its_part_from_its_own_node() -> None:
    both = [part(0), part(1)]
    found = choose(seen(("a", both), ("b", both)))
    assert found == Choice(step=4, attempt="7.0", parts=(part(0), part(1)), sources=(0, 1))
    assert found.fetched == ()


def test_a_part_that_another_rank_of_the_node_has_looked_at_is_on_its_own_node() -> None:
    """Ranks of a node share the work: who has looked at a part says nothing about whose it is."""
    looked_at = seen(("a", [part(1)]), ("a", [part(0)]))
    assert choose(looked_at) == Choice(step=4, attempt="7.0", parts=(part(0), part(1)), sources=(0, 1))


def test_the_neighbours_part_is_fetched_where_the_own_one_is_missing() -> None:
    found = choose(seen(("a", [part(0), part(1)]), ("spare", [])))
    assert isinstance(found, Choice)
    assert (found.sources, found.fetched) == ((0, 0), (1,))


def test_an_older_copy_that_is_whole_comes_before_a_newer_one_that_is_not() -> None:
    found = choose(seen(("a", [part(0, 2), part(0, 4), part(1, 2)]), ("b", [part(1, 2)])))
    assert isinstance(found, Choice)
    assert found.step == 2


def test_parts_of_two_attempts_make_no_copy() -> None:
    """As where one of the ranks before has been left out of a restart, and comes back with what it had."""
    found = choose(seen(("a", [part(0, attempt="7.0")]), ("b", [part(1, attempt="7.0-1")])))
    assert found == "of the copy of step 4 no node has the part of rank 0, and no older one is whole"


def test_the_reason_names_the_ranks_without_a_part() -> None:
    assert choose(seen(("a", []), ("b", []))) == "no node has any copy that is whole"
    found = choose(seen(*((f"n{rank}", [part(0)] if rank == 0 else []) for rank in range(9))))
    lacking = "ranks 1, 2, 3, 4 and 4 more"
    assert found == f"of the copy of step 4 no node has the part of {lacking}, and no older one is whole"


places = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from(["7.0", "7.0-1"])), max_size=8)


@settings(deadline=None)
@given(st.lists(places, min_size=3, max_size=3))
def test_a_choice_is_whole_of_one_attempt_and_the_newest(held: list[list[tuple[int, int, str]]]) -> None:
    ranks = [
        Seen(node=f"n{node}", parts=tuple(part(rank, step, attempt) for rank, step, attempt in parts))
        for node, parts in enumerate(held)
    ]
    there = {(one.step, one.attempt, one.rank) for each in ranks for one in each.parts}
    whole = {key[:2] for key in there if all((*key[:2], rank) in there for rank in range(3))}
    found = choose(ranks)
    if isinstance(found, str):
        assert not whole
        return
    assert (found.step, found.attempt) == max(whole)
    for rank, (own, source) in enumerate(zip(found.parts, found.sources, strict=True)):
        assert own == part(rank, found.step, found.attempt)
        assert own in ranks[source].parts
