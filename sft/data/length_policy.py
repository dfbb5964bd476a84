"""What happens to an example that is longer than data.seq_length, and to tokens nothing is learnt from.

Everything that is taken away is counted: a run that loses a third of its data should say so before it trains.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from launcher.errors import DataError
from launcher.spec import DataSpec
from sft.data.cache import TokenPair
from sft.data.masking import Encoded


def fit(encoded: Encoded, spec: DataSpec, tally: Counter[str]) -> TokenPair | None:
    """The tokens to train on, None where no target is left; `tally` gets the names of sft.data.cache.Counts."""
    tally["longest_row"] = max(tally["longest_row"], len(encoded.ids))
    pair = _trim((encoded.ids, encoded.weights), tally)
    if pair is None:
        tally["unsupervised"] += 1
        return None
    over = len(pair[0]) - spec.seq_length
    if over <= 0:
        return pair
    if spec.length_policy == "error":
        raise DataError(
            f"{len(pair[0])} tokens are more than data.seq_length {spec.seq_length}; "
            "data.length_policy error allows none"
        )
    if spec.length_policy == "drop":
        tally["too_long"] += 1
        _lose(pair, tally)
        return None
    tally["truncated"] += 1
    if spec.length_policy == "truncate_left":
        kept, lost = _split(pair, over)[::-1]
    else:
        kept, lost = _split(pair, spec.seq_length)
    return _truncated(kept, lost, tally)


def _truncated(kept: TokenPair, lost: TokenPair, tally: Counter[str]) -> TokenPair | None:
    ids, weights = kept
    if weights[0]:  # it has lost the token that predicted it
        weights = weights.copy()
        weights[0] = 0.0
        tally["supervised_lost"] += 1
    _lose(lost, tally)
    pair = _trim((ids, weights), tally)
    if pair is None:
        tally["unsupervised"] += 1
        _lose(kept, tally, supervised=False)
    return pair


def _trim(pair: TokenPair, tally: Counter[str]) -> TokenPair | None:
    """Without the tokens after the last target."""
    ids, weights = pair
    targets = np.flatnonzero(weights[1:])
    if not len(targets):
        return None
    end = int(targets[-1]) + 2
    tally["tokens_trimmed"] += len(ids) - end
    return ids[:end], weights[:end]


def _split(pair: TokenPair, at: int) -> tuple[TokenPair, TokenPair]:
    ids, weights = pair
    return (ids[:at], weights[:at]), (ids[at:], weights[at:])


def _lose(pair: TokenPair, tally: Counter[str], *, supervised: bool = True) -> None:
    tally["tokens_lost"] += len(pair[0])
    tally["supervised_lost"] += int(np.count_nonzero(pair[1])) if supervised else 0
