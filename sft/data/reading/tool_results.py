"""Refuse results of tools that a model would read as those of other calls, or of none.

Most templates write no ids, so that a result is read as that of the call at its place; some write the ids as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from launcher.contract.errors import DataError
from sft.data.reading.messages import Message, ToolCall
from sft.data.reading.row import names

_SHOWN_IDS = 8


def check_results(*lists: tuple[str, Sequence[Message]]) -> None:
    """Raise DataError for results of calls that are not there, or in another order.

    The lists, each with its place for errors, are one conversation. Results without ids or names are taken to be in the
    order of their calls, and ids that no call has are left alone where the calls have none at all.
    """
    turns = [(f"{where}[{index}]", message) for where, messages in lists for index, message in enumerate(messages)]
    _check_ids(turns)
    _check_order(turns)


def _check_ids(turns: Sequence[tuple[str, Message]]) -> None:
    """Raise DataError where the id of a result is none of those that the calls before it have."""
    ids: dict[str, None] = {}  # an ordered set
    for place, message in turns:
        ids |= {call["id"]: None for call in message.extra.get("tool_calls", []) if call.get("id")}
        own = message.extra.get("tool_call_id")
        if own and ids and own not in ids:
            newest = [*ids][-_SHOWN_IDS:]
            earlier = f" and {len(ids) - len(newest)} earlier ones" if len(ids) > len(newest) else ""
            raise DataError(
                f"{place}: tool_call_id {own!r} is that of no call before it; these have {names(newest)}{earlier}. "
                "Give the result the id of its call"
            )


def _check_order(turns: Sequence[tuple[str, Message]]) -> None:
    """Raise DataError where results of several calls come in another order than the calls."""
    for turn, (place, message) in enumerate(turns, start=1):
        calls = message.extra.get("tool_calls", [])
        results = itertools.takewhile(lambda later: later.role == "tool", (later for _, later in turns[turn:]))
        answered = [call for result in results if (call := _call_of(result, calls)) is not None]
        if answered != sorted(answered):
            raise DataError(
                f"{place}: the results of its calls come in another order than the calls, by their "
                "tool_call_id or name; put them in the order of the calls, since chat templates may write no ids"
            )


def _call_of(result: Message, calls: Sequence[ToolCall]) -> int | None:
    """Return which call a result answers, by its id, or else by a name that one call alone has."""
    own = result.extra.get("tool_call_id")
    ids = [call.get("id") for call in calls]
    if own:
        return ids.index(own) if own in ids else None
    called = [call["function"]["name"] for call in calls]
    name = result.extra.get("name", "")
    return called.index(name) if called.count(name) == 1 else None
