"""Find the answers of a long conversation in its text, without rendering every prefix of it.

Rendering the conversation once more for each answer takes time that grows with the square of its length: hundreds of
answers take a minute. Here each answer is rendered behind the messages just before it, from the answer before on, and
what that adds must follow in the text of the whole. So the text is proven to consist of these renderings, word by word.

That a template writes a turn in the same way behind a long history as behind a short one is checked, by rendering every
prefix, for some answers: the first and the last one of each shape, and others at equal distances. Where anything is
otherwise, there is no result, and the caller renders every prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from launcher.contract.errors import DataError
from sft.data.encoding.written import shape_of
from sft.data.reading.messages import TemplateMessage

LONG = 24
"""Answers in one text from which on this is worth it. With fewer, every prefix is rendered."""
_CHECKED = 6
"""Answers at equal distances whose prefixes are rendered."""
_MARGIN = 64
"""Characters behind an answer that its end may depend on: an end token and the header of the next turn."""

Place = tuple[int, int]
"""Where a turn begins and ends in a text."""


def chained_places(
    messages: Sequence[TemplateMessage],
    answers: Sequence[int],
    text: str,
    *,
    locate: Callable[[int, str], Place],
    render: Callable[[list[TemplateMessage], bool], str],
    end_of: Callable[[int, str, str], int | None],
) -> dict[int, Place] | None:
    """Return where each of `answers`, in ascending order, begins and ends in `text`, or None.

    `locate` finds one exactly, `render` renders messages with or without the generation prompt, and `end_of` finds the
    end of the last turn of a rendering, which begins at a place, in another one. What they raise is raised.
    """
    checked = _checked(messages, answers)
    places = {answers[0]: locate(answers[0], text)}
    for before, turn in itertools.pairwise(answers):
        window = _window(messages, before, turn)
        try:
            place = None if window is None else _next(window, text, places[before][1], render, end_of)
        except DataError:  # the template refuses the shorter conversation
            place = None
        if place is None or (turn in checked and locate(turn, text) != place):
            return None
        places[turn] = place
    return places


def _checked(messages: Sequence[TemplateMessage], answers: Sequence[int]) -> set[int]:
    """Return the answers that are to be located exactly."""
    firsts = {shape_of(dict(messages[turn])): turn for turn in reversed(answers)}
    lasts = {shape_of(dict(messages[turn])): turn for turn in answers}
    return {*firsts.values(), *lasts.values(), *answers[:: max(len(answers) // _CHECKED, 1)]}


def _window(messages: Sequence[TemplateMessage], before: int, turn: int) -> tuple[list[TemplateMessage], int] | None:
    """Return a conversation that ends with `turn`, short but whole, and the index of the answer `before` in it.

    None where there is none: it must begin as the whole does, and go on with a turn of the role that follows there.
    """
    begin = next((index for index, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    for head in (begin, begin + 1):
        role = messages[head]["role"]
        start = next((index for index in range(before, head - 1, -1) if messages[index]["role"] == role), None)
        if start is not None and (start < before or head > begin):
            return [*messages[:head], *messages[start : turn + 1]], head + before - start
    return None


def _next(
    window: tuple[list[TemplateMessage], int],
    text: str,
    end_before: int,
    render: Callable[[list[TemplateMessage], bool], str],
    end_of: Callable[[int, str, str], int | None],
) -> Place | None:
    """Return the place of the window's last turn, given where the answer before it ends in `text`."""
    messages, before = window
    prompt, answered = render(messages[:-1], True), render(messages, False)
    begins_before = len(render(messages[:before], True))
    ends_before = end_of(begins_before, render(messages[: before + 1], False), prompt)
    if ends_before is None or not answered.startswith(prompt) or answered == prompt:
        return None
    between = prompt[ends_before:]
    if not text.startswith(between, end_before):
        return None
    begin = end_before + len(between)
    spliced = prompt + text[begin : begin + len(answered) - len(prompt) + _MARGIN]
    end = end_of(len(prompt), answered, spliced)
    return None if end is None else (begin, begin + end - len(prompt))
