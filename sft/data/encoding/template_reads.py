"""Which names a chat template reads, to refuse rows that have one of them under which nothing is handed to it.

A template may read more of a message than role, content, reasoning and calls (`end_turn`, say), and variables that
data.chat_template_kwargs sets for all rows alike. A row that has such a key means it: without it the template would
write another text than the row says, without an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import jinja2
import jinja2.meta
import jinja2.nodes

from launcher.contract.errors import DataError, ModelError, did_you_mean

_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*[-+]?%}")
_OF_MESSAGE = re.compile(
    r"""\b(?:message|msg|turn|m|(?:loop_)?messages\[[^\]]*\])(?:\.get\(\s*['"]|\[\s*['"]|\.)(\w+)"""
)
_ASKED = re.compile(r"(?<![.\w])(\w+)(?:\s+is\s+(?:not\s+)?defined|\s*\|\s*default)")
_IN_TURNS = "[]."


class TemplateReads:
    """The variables of some templates, and the keys that they read of messages."""

    def __init__(self, templates: Collection[str]) -> None:
        names = [_names(template) for template in templates]
        self._variables = {name for variables, _ in names for name in variables}
        self._looked_up = {name for _, looked_up in names for name in looked_up}
        self._keys = {name for template in templates for name in _OF_MESSAGE.findall(template)}

    def check_given(self, names: Collection[str]) -> None:
        """Raise ModelError for a variable of data.chat_template_kwargs that no template reads: it would change nothing.

        A word of the template that is something else (a key, a role, a loop's own variable) is none.
        """
        unread = [name for name in names if name not in self._looked_up]
        if unread:
            near = did_you_mean(unread[0], self._variables)
            raise ModelError(f"data.chat_template_kwargs: the chat template does not read {unread[0]!r}{near}")

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


def _names(template: str) -> tuple[set[str], set[str]]:
    """Return a template's variables, and all names that it may look up, those that it sets on one path included."""
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
        looked_up = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateError:  # what cannot be parsed is refused when it is rendered
        return set(), set(re.findall(r"\w+", template))
    # One that the template sets itself is its own, unless it asks first whether it was given.
    own = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx != "load"}
    asked = set(_ASKED.findall(template))
    return (looked_up - own) | (own & asked), looked_up
