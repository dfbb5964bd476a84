"""Read rows of token ids: which tokens are trained, and which are padding.

    {"input_ids": [...], "labels": [...]}   -100: not trained; or "loss_mask" in place of labels

Files of other trainers may also hold `attention_mask`, `position_ids` or the lengths of packed sequences. Each is used
or refused: otherwise left padding would become context, and the sequences of a packed row would attend to each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from launcher.contract.errors import DataError
from sft.data.reading.row import Row, find, get, kind, loss_weight

_NOT_A_LABEL = -100
_ONE_SEQUENCE = "a row must be one sequence; write each as its own row, and let data.packing pack them"


def parse_ids(row: Row, key: str, where: str) -> list[int]:
    """Return the token ids under `key`, or raise DataError."""
    ids = get(row, key, where)
    if not isinstance(ids, list) or not all(type(item) is int and 0 <= item < 2**31 for item in ids):
        raise DataError(f"{where}: {key!r} must be a list of token ids, found {kind(ids)}")
    return ids


def read_tokens(row: Row, where: str, columns: Mapping[str, str]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the token ids of a row without its padding, and the loss weight of each, or raise DataError."""
    id_key, label_key, mask_key = (columns.get(name, name) for name in ("input_ids", "labels", "loss_mask"))
    ids = parse_ids(row, id_key, where)
    ids_in_use = _without_padding(row, len(ids), id_key, where)
    mask, labels = find(row, mask_key, None), find(row, label_key, None)
    values = labels if mask is None else mask
    if not isinstance(values, list) or len(values) != len(ids):
        raise DataError(
            f"{where}: {len(ids)} {id_key!r} need as many {label_key!r} or {mask_key!r}, "
            f"found {len(values) if isinstance(values, list) else kind(values)}"
        )
    if mask is not None:
        weights = [loss_weight(float(w) if isinstance(w, bool) else w, f"{where}: {mask_key!r}") for w in values]
        if isinstance(labels, list) and [label != _NOT_A_LABEL for label in labels] != [
            weight > 0 for weight in weights
        ]:
            raise DataError(f"{where}: {label_key!r} and {mask_key!r} do not train the same tokens; keep one of them")
    else:
        for index, (token, label) in enumerate(zip(ids, values, strict=True)):
            if label not in (token, _NOT_A_LABEL):
                raise DataError(
                    f"{where}: {label_key}[{index}] is {label}, {id_key}[{index}] is {token}: a label must be the "
                    f"token at the same index or {_NOT_A_LABEL}; training shifts the labels, the data must not"
                )
        weights = [float(label != _NOT_A_LABEL) for label in values]
    if any(weights[: ids_in_use.start]) or any(weights[ids_in_use.stop :]):
        raise DataError(f"{where}: tokens whose 'attention_mask' is 0 are trained; set their {label_key!r} to -100")
    return tuple(ids[ids_in_use]), tuple(weights[ids_in_use])


def _without_padding(row: Row, count: int, id_key: str, where: str) -> slice:
    """Return which of the `count` tokens of a row are not padding, or raise DataError for several sequences."""
    mask = row.get("attention_mask")
    used = slice(0, count)
    if mask is not None:
        if not isinstance(mask, list) or len(mask) != count or any(item not in (0, 1) for item in mask):
            raise DataError(
                f"{where}: 'attention_mask' must be a list of {count} zeros and ones, one for each {id_key!r}"
            )
        if 1 not in mask:
            raise DataError(f"{where}: 'attention_mask' has no 1, so the row is all padding; remove it from the data")
        used = slice(mask.index(1), count - mask[::-1].index(1))
        if 0 in mask[used]:
            raise DataError(f"{where}: 'attention_mask' has zeros between ones; only the ends of a row can be padding")
    positions = row.get("position_ids")
    if positions is not None and (
        not isinstance(positions, list) or positions[used] != list(range(used.stop - used.start))
    ):
        raise DataError(f"{where}: 'position_ids' do not count up from 0; {_ONE_SEQUENCE}")
    for key in ("seq_lengths", "cu_seqlens"):
        lengths = row.get(key)
        if isinstance(lengths, list) and len(lengths) > (2 if key == "cu_seqlens" else 1):
            raise DataError(f"{where}: {key!r} names {len(lengths) - (key == 'cu_seqlens')} sequences; {_ONE_SEQUENCE}")
    for key in ("segment_ids", "sequence_ids", "seq_idx"):
        segments = row.get(key)
        if isinstance(segments, list) and len(set(map(str, segments[used]))) > 1:
            raise DataError(f"{where}: {key!r} names several sequences; {_ONE_SEQUENCE}")
    return used
