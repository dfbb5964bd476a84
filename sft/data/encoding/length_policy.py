"""Apply data.length_policy to examples longer than data.seq_length, and trim tokens that nothing is learnt from.

Everything that is taken away is counted: a run that loses a third of its data should say so before it trains.

`split` cuts an example into pieces that share one token: the last of a piece is the first of the next, so every token
is still predicted once, but only from what its own piece holds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.encoding.masking import Encoded


def fit(encoded: Encoded, spec: DataSpec, tally: Counter[str]) -> list[Encoded]:
    """Return what is trained of an example: one item, several pieces, or nothing if no target is left.

    Add to `tally`, whose keys are the fields of `Counts`. Raise DataError with data.length_policy error.
    """
    tally["longest_row"] = max(tally["longest_row"], len(encoded.ids))
    trimmed = _trim(encoded, tally)
    if trimmed is None:
        tally["unsupervised"] += 1
        return []
    over = len(trimmed.ids) - spec.seq_length
    if over <= 0:
        return [trimmed]
    if spec.length_policy == "error":
        raise DataError(
            f"{len(trimmed.ids)} tokens are more than data.seq_length {spec.seq_length}, which data.length_policy "
            "error does not allow; raise data.seq_length, or choose another policy"
        )
    if spec.length_policy == "split":
        tally["split"] += 1
        return _pieces(trimmed, spec.seq_length, tally)
    if spec.length_policy == "drop":
        tally["too_long"] += 1
        _lose(trimmed, tally)
        return []
    tally["truncated"] += 1
    if spec.length_policy == "truncate_left":
        kept, lost = _part(trimmed, over, None), _part(trimmed, 0, over)
    else:
        kept, lost = _part(trimmed, 0, spec.seq_length), _part(trimmed, spec.seq_length, None)
    return _truncated(kept, lost, tally)


def _pieces(encoded: Encoded, size: int, tally: Counter[str]) -> list[Encoded]:
    """Return pieces of up to `size` tokens, without those that hold no target, whose tokens are counted as lost."""
    pieces = []
    for start in range(0, len(encoded.ids) - 1, max(size - 1, 1)):
        piece = _without_first(_part(encoded, start, start + size))
        trimmed = _trim(piece, tally)
        if trimmed is None:
            tally["tokens_lost"] += len(piece.ids)
        else:
            pieces.append(trimmed)
    return pieces


def _truncated(kept: Encoded, lost: Encoded, tally: Counter[str]) -> list[Encoded]:
    """Return `kept` if a target is left in it, and count what is lost."""
    if kept.weights[0]:  # truncated at the left: the token that predicted it is gone
        kept = _without_first(kept)
        tally["supervised_lost"] += 1
    _lose(lost, tally)
    trimmed = _trim(kept, tally)
    if trimmed is None:
        tally["unsupervised"] += 1
        _lose(kept, tally, supervised=False)
        return []
    return [trimmed]


def _trim(encoded: Encoded, tally: Counter[str]) -> Encoded | None:
    """Return the example without the tokens after its last target, or None if it has no target."""
    targets = np.flatnonzero(encoded.weights[1:])
    if not len(targets):
        return None
    end = int(targets[-1]) + 2  # one for the token left out of `targets`, one to be past the last
    tally["tokens_trimmed"] += len(encoded.ids) - end
    return _part(encoded, 0, end)


def _part(encoded: Encoded, start: int, end: int | None) -> Encoded:
    part = slice(start, end)
    return replace(encoded, ids=encoded.ids[part], weights=encoded.weights[part], ends=encoded.ends[part])


def _without_first(encoded: Encoded) -> Encoded:
    """Return the example with weight 0 for its first token, which nothing predicts."""
    weights = encoded.weights.copy()  # the caller's example keeps its weights
    weights[:1] = 0.0
    return replace(encoded, weights=weights)


def _lose(encoded: Encoded, tally: Counter[str], *, supervised: bool = True) -> None:
    tally["tokens_lost"] += len(encoded.ids)
    tally["supervised_lost"] += int(np.count_nonzero(encoded.weights)) if supervised else 0
