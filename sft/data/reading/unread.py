"""Find the keys of a row that nothing reads: those that change what should be trained are refused, others are named.

A row may hold anything besides what is trained (ids, sources, scores), and prepare and audit name such keys with how
many rows have them. But a system prompt under another name, a context, a weight or an image would change the
training, and without it something else is learnt than the row says. data.ignore_keys lets such a key pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from launcher.contract.errors import DataError
from sft.data.reading.row import REASONING, Row, find, list_in

_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_SYSTEM = ("system_prompt", "system_message", "developer_prompt")
_WEIGHTS = (
    *("weight", "weights", "loss_weight", "loss_weights", "sample_weight", "sample_weights", "token_weights"),
    "loss_scale",
)

_READ = {
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "messages": ("messages", "system", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "tokens": (
        *("input_ids", "labels", "loss_mask", "attention_mask", "position_ids"),
        *("seq_lengths", "cu_seqlens", "segment_ids", "sequence_ids", "seq_idx"),
    ),
    "text": ("text",),
}
"""Keys of a row that are read."""

_TURNS = {"prompt_completion": ("prompt", "completion"), "messages": ("messages",), "sharegpt": ("conversations",)}
"""Keys of a row that hold turns."""

_READ_IN_TURNS = {
    "messages": (*("role", "content", "weight", "train", "tool_calls", *REASONING, "tool_call_id", "name"),),
    "sharegpt": ("from", "value", "weight", "train"),
}

_HINTS = {
    **dict.fromkeys(_SYSTEM, "name it with data.columns: {{system: {key}}}"),
    **dict.fromkeys(("context", "input"), "add it to the prompt with data.columns: {{input: {key}}}"),
    **dict.fromkeys(("completion_mask", "assistant_masks"), "name it with data.columns: {{loss_mask: {key}}}"),
    **dict.fromkeys(("loss", "training"), "write it as 'train': true or false"),
    **dict.fromkeys(_WEIGHTS, "give messages a 'weight', or take it out"),
}
_CALLS = ("function_call", "function_calls", "functions")
_CHANGES_ALL = (*_MEDIA, *_CALLS, "tool_calls", "documents", "chat_template_kwargs", "history", *_WEIGHTS)
_CHANGES = {
    "prompt_completion": (*_CHANGES_ALL, *_SYSTEM, *REASONING, "input", "context", "instruction"),
    "messages": (*_CHANGES_ALL, *_SYSTEM),
    "sharegpt": (*_CHANGES_ALL, *_SYSTEM),
    "tokens": (*_MEDIA, *_WEIGHTS, "completion_mask", "assistant_masks"),
    "text": (*_MEDIA, *_WEIGHTS),
}
"""Keys that change what should be trained, unless data.columns names them."""

_CHANGES_PROMPT = (*_MEDIA, *_SYSTEM, "functions", "documents", "chat_template_kwargs", "history")
"""Keys beside the messages of a prompt that change what is asked."""
_CHANGES_QUESTION = ("input", "context", "instruction")
"""The same beside a question in words, as in rows that are trained."""

_CHANGES_TURN = (
    *(*_MEDIA, *_CALLS, "tools", "tool_plan", "tool_responses", "documents", "reasoning_details", "thought"),
    *("thoughts", "refusal", "channel", "recipient"),
    *("loss", "training", "train_detail", "training_detail", "loss_weight", "loss_scale", "prefix"),
)
"""Keys of a turn that change what should be trained; in some trainers they choose what has a loss."""
_CHANGES_SHAREGPT_TURN = (*_CHANGES_TURN, "tool_calls", *REASONING)

_EMPTY: tuple[object, ...] = (None, [], {}, "", "[]", "{}")
_PREFERENCE = (
    "rows of prompt, completion and label are feedback for KTO, in which an answer with label false is a bad one"
)


def unread_keys(
    row: Row, where: str, row_format: str, columns: Mapping[str, str], ignored: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the keys with a value that nothing reads, those of turns as `messages[].key`.

    Raise DataError where one of them changes what should be trained and is not in `ignored`.
    """
    mapped = [columns.get(name, name) for name in _READ[row_format]] + list(columns.values())
    read = {*mapped, *(name.partition(".")[0] for name in mapped)}
    unread = [key for key in row if key not in read and not _is_empty(row[key])]
    _refuse_feedback(row, where, row_format, unread, ignored)
    changing = [key for key in _CHANGES[row_format] if key in unread and key not in ignored and not _is_one(key, row)]
    if changing:
        raise DataError(
            f"{where}: {', '.join(changing)} would be left out of training, and the answer may depend on it; "
            f"{_hint(changing[0])}remove it from the data, or let it pass with data.ignore_keys"
        )
    return (*unread, *dict.fromkeys(_of_turns(row, row_format, columns)))


def refuse_in_turn(item: Row, where: str, ignored: Collection[str], *, sharegpt: bool = False) -> None:
    """Raise DataError where a turn has a key that changes what should be trained, and that nothing reads."""
    names = _CHANGES_SHAREGPT_TURN if sharegpt else _CHANGES_TURN
    changing = [key for key in names if not _is_empty(item.get(key)) and key not in ignored]
    if changing:
        raise DataError(
            f"{where}: {', '.join(changing)} would be left out of training; {_hint(changing[0])}remove it from the "
            "data, or let it pass with data.ignore_keys"
        )


def refuse_in_prompt(row: Row, where: str, ignored: Collection[str]) -> None:
    """Raise DataError where a row that is to be answered has a key that nothing reads, and that changes the prompt."""
    known = (*_CHANGES_PROMPT, *(() if "messages" in row else _CHANGES_QUESTION))
    changing = [key for key in known if not _is_empty(row.get(key)) and key not in ignored]
    if changing:
        raise DataError(
            f"{where}: {', '.join(changing)} would be left out of the prompt; write it into 'system' or the messages, "
            "remove it, or let it pass with data.ignore_keys"
        )


def _of_turns(row: Row, row_format: str, columns: Mapping[str, str]) -> Iterator[str]:
    """Yield the keys of turns that nothing reads, each as often as it occurs."""
    for name in _TURNS.get(row_format, ()):
        key = columns.get(name, name)
        turns = find(row, key)
        turns = list_in(turns) if isinstance(turns, str) else turns
        for item in turns if isinstance(turns, list) else ():
            if isinstance(item, dict):
                kind = "sharegpt" if row_format == "sharegpt" and columns.get("from", "from") in item else "messages"
                read = {columns.get(known, known) for known in _READ_IN_TURNS[kind]}
                yield from (f"{key}[].{inner}" for inner in item if inner not in read and not _is_empty(item[inner]))


def _refuse_feedback(row: Row, where: str, row_format: str, unread: list[str], ignored: Collection[str]) -> None:
    """Raise DataError for a row whose label says whether its answer is a good one."""
    for key in ("label", "kto_tag") if row_format == "prompt_completion" else ("kto_tag",):
        value = row.get(key)
        is_verdict = isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))
        if is_verdict and key in unread and key not in ignored:
            raise DataError(
                f"{where}: {_PREFERENCE}; here every answer would be learnt. Keep the rows whose {key!r} is true, "
                f"without that key, or let it pass with data.ignore_keys"
            )


def _hint(key: str) -> str:
    return f"{_HINTS[key].format(key=key)}, " if key in _HINTS else ""


def _is_empty(value: object) -> bool:
    return value is None or (not isinstance(value, int | float) and value in _EMPTY)


def _is_one(key: str, row: Row) -> bool:
    """Return whether this is a weight of 1, which is what a row without it has."""
    return key in _WEIGHTS and row[key] in (1, 1.0)
