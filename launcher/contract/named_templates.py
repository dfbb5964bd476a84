"""Chat templates that a config names by a word, such as chatml: Jinja2 files in chat_templates/, of our own writing.

A first line `{#- tokens: <|im_start|> ... -#}` lists the spellings that must be tokens of the tokenizer. A template
without one ends answers with the tokenizer's own end token, and fits every tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path

from launcher.contract.errors import ModelError
from launcher.contract.resources import packaged

TOKENIZER = "tokenizer"
"""The word for the tokenizer's own template."""
NONE = "none"
"""The word for joining prompt and completion without a template."""

NAMES = ("alpaca", "chatml", "gemma", "llama3", "mistral", "vicuna", "zephyr")
"""Files in chat_templates/, which cannot be listed where the package is imported from an archive."""
WORDS = (TOKENIZER, NONE, *NAMES)
"""Values of data.chat_template that are no files."""


def template_bytes(chat_template: str) -> bytes | None:
    """Return the template that data.chat_template means, or None where it is the tokenizer's own or none.

    Raise ModelError where it is a file that cannot be read.
    """
    if chat_template in (TOKENIZER, NONE):
        return None
    if chat_template in NAMES:
        return named_template(chat_template).encode()
    try:
        return Path(chat_template).read_bytes()
    except OSError as error:
        raise ModelError(f"data.chat_template: {chat_template} cannot be read: {error}") from error


def named_template(name: str) -> str:
    """Return the template of ours that has this name."""
    return packaged(f"chat_templates/{name}.jinja").decode()


def needed_tokens(template: str) -> list[str]:
    """Return the spellings that a template of ours lists as tokens."""
    match = re.match(r"\{#- tokens: (.*?) -#\}", template)
    return match[1].split() if match is not None else []


def fit_all() -> list[str]:
    """Return the names of the templates that need no tokens of their own."""
    return [name for name in NAMES if not needed_tokens(named_template(name))]
