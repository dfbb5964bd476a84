"""Chat templates that a config names by a word, such as chatml: Jinja2 files in chat_templates/, of our own writing.

A first line `{#- tokens: <|im_start|> ... -#}` lists the spellings that must be tokens of the tokenizer. A template
without one ends answers with the tokenizer's own end token, and fits every tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path

TOKENIZER = "tokenizer"
"""The word for the tokenizer's own template."""
NONE = "none"
"""The word for joining prompt and completion without a template."""

_FOLDER = Path(__file__).with_name("chat_templates")
NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))
WORDS = (TOKENIZER, NONE, *NAMES)
"""Values of data.chat_template that are no files."""


def template_file(chat_template: str) -> Path | None:
    """Return the file that data.chat_template means, or None where it is the tokenizer's own or none."""
    if chat_template in (TOKENIZER, NONE):
        return None
    return _FOLDER / f"{chat_template}.jinja" if chat_template in NAMES else Path(chat_template)


def needed_tokens(template: str) -> list[str]:
    """Return the spellings that a template of ours lists as tokens."""
    match = re.match(r"\{#- tokens: (.*?) -#\}", template)
    return match[1].split() if match is not None else []


def fit_all() -> list[str]:
    """Return the names of the templates that need no tokens of their own."""
    return [name for name in NAMES if not needed_tokens((_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))]
