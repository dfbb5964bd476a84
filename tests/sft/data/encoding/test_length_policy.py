"""Each length policy on a golden example, and what is counted."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
import pytest

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.encoding.length_policy import fit
from sft.data.encoding.masking import Encoded

Policy = Literal["drop", "truncate_left", "truncate_right", "split", "error"]

IDS = [10, 11, 12, 13, 14, 15, 16, 17]
WEIGHTS = [0.0, 0, 1, 1, 0, 0, 1, 0]


def example(weights: list[float]) -> Encoded:
    return Encoded(
        np.array(IDS, dtype=np.int32), np.array(weights, dtype=np.float32), np.zeros(len(IDS), dtype=np.bool_)
    )


def fitted(seq_length: int, policy: Policy, weights: list[float] | None = None) -> tuple[Any, dict[str, int]]:
    """Ids and weights that are left, and the counts that are not 0."""
    tally: Counter[str] = Counter()
    kept = fit(example(weights or WEIGHTS), DataSpec(seq_length=seq_length, length_policy=policy), tally)
    counts = {name: n for name, n in tally.items() if n and name != "longest_row"}
    pairs = [(piece.ids.tolist(), piece.weights.tolist()) for piece in kept]
    return (pairs if policy == "split" else pairs[0] if pairs else None), counts


def test_tokens_after_the_last_target_are_trimmed() -> None:
    policies: tuple[Policy, ...] = ("drop", "truncate_left", "truncate_right", "error")
    assert fitted(7, "split") == ([(IDS[:7], WEIGHTS[:7])], {"tokens_trimmed": 1})
    for policy in policies:
        assert fitted(7, policy) == ((IDS[:7], WEIGHTS[:7]), {"tokens_trimmed": 1})


def test_trap_10_truncate_right_keeps_the_beginning() -> None:
    """Seen to fail with the cut made before weights (ids and weights then differ in length)."""
    pair, counts = fitted(5, "truncate_right")
    assert pair == ([10, 11, 12, 13], [0, 0, 1, 1])
    assert counts == {"truncated": 1, "tokens_lost": 2, "supervised_lost": 1, "tokens_trimmed": 2}


def test_trap_10_truncate_left_keeps_the_end() -> None:
    """The first kept token has lost what predicted it. Seen to fail with its weight left at 1."""
    pair, counts = fitted(4, "truncate_left")
    assert pair == ([13, 14, 15, 16], [0, 0, 0, 1])
    assert counts == {"truncated": 1, "tokens_lost": 3, "supervised_lost": 2, "tokens_trimmed": 1}


def test_trap_10_drop_counts_what_it_drops() -> None:
    """Seen to fail with a drop that is not counted."""
    pair, counts = fitted(6, "drop")
    assert pair is None
    assert counts == {"too_long": 1, "tokens_lost": 7, "supervised_lost": 3, "tokens_trimmed": 1}


def test_trap_10_error_says_how_long_the_example_is() -> None:
    """Seen to fail with the policy treated as truncate_right."""
    with pytest.raises(DataError, match=r"7 tokens are more than data\.seq_length 6"):
        fitted(6, "error")


def test_trap_10_an_example_cut_before_its_first_target_is_dropped_and_counted() -> None:
    """A row of zero weight would count as an example. Seen to fail without the second trim."""
    pair, counts = fitted(2, "truncate_right")
    assert pair is None
    assert counts == {
        "truncated": 1,
        "unsupervised": 1,
        "tokens_lost": 7,
        "supervised_lost": 3,
        "tokens_trimmed": 1,
    }


def test_split_predicts_every_token_once() -> None:
    """Pieces share a token. Seen to fail with pieces side by side: the target at each cut is then lost."""
    pairs, counts = fitted(3, "split", [0, 1, 1, 1, 1, 1, 1, 1])
    assert pairs == [
        ([10, 11, 12], [0, 1, 1]),
        ([12, 13, 14], [0, 1, 1]),
        ([14, 15, 16], [0, 1, 1]),
        ([16, 17], [0, 1]),
    ]
    assert counts == {"split": 1}


def test_split_drops_pieces_without_a_target_and_counts_their_tokens() -> None:
    pairs, counts = fitted(3, "split", [0, 0, 1, 0, 0, 0, 0, 1])
    assert pairs == [([10, 11, 12], [0, 0, 1]), ([16, 17], [0, 1])]
    assert counts == {"split": 1, "tokens_lost": 6}


def test_an_example_without_targets_is_dropped() -> None:
    assert fitted(99, "error", [1, 0, 0, 0, 0, 0, 0, 0]) == (None, {"unsupervised": 1})


def test_the_caller_keeps_its_weights() -> None:
    encoded = example(WEIGHTS)
    fit(encoded, DataSpec(seq_length=4, length_policy="truncate_left"), Counter())
    assert encoded.weights.tolist() == WEIGHTS
