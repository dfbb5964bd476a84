"""Which names a chat template reads, to refuse rows that have one of them under which nothing is handed to it.

A template may read more of a message than role, content, reasoning and calls (`end_turn`, say), and variables that
data.chat_template_kwargs sets for all rows alike. A row that has such a key means it: without it the template would
write another text than the row says, without an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import jinja2
import jinja2.meta
import jinja2.nodes

from launcher.contract.errors import DataError

_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*[-+]?%}")
_OF_MESSAGE = re.compile(
    r"""\b(?:message|msg|turn|m|(?:loop_)?messages\[[^\]]*\])(?:\.get\(\s*['"]|\[\s*['"]|\.)(\w+)"""
)
_ASKED = re.compile(r"(?<![.\w])(\w+)(?:\s+is\s+(?:not\s+)?defined|\s*\|\s*default)")
_IN_TURNS = "[]."


class TemplateReads:
    """The variables of some templates, and the keys that they read of messages."""

    def __init__(self, templates: Collection[str]) -> None:
        self._variables = {name for template in templates for name in _variables(template)}
        self._keys = {name for template in templates for name in _OF_MESSAGE.findall(template)}

    def check(self, unread: Collection[str], ignored: Collection[str]) -> None:
        """Raise DataError if one of the keys of a row that are not handed to the template is among what it reads.

        `unread` has keys of turns as `messages[].key`.
        """
        for key in unread:
            name = key.rpartition(_IN_TURNS)[2]
            if name not in ignored and name in (self._variables if name == key else self._keys):
                raise DataError(
                    f"the chat template reads {name!r}, which {'the row' if name == key else 'a message'} has and is "
                    "not handed to it; remove it from the data, or let it pass with data.ignore_keys"
                    + (" and set it for all rows with data.chat_template_kwargs" if name == key else "")
                )


def _variables(template: str) -> Iterator[str]:
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except jinja2.TemplateError:  # what cannot be parsed is refused when it is rendered
        return
    # One that the template sets itself is its own, unless it asks first whether it was given.
    own = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx != "load"}
    asked = set(_ASKED.findall(template))
    yield from (jinja2.meta.find_undeclared_variables(tree) - own) | (own & asked)
