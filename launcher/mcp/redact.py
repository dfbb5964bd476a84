"""No secret leaves in an answer: values of variables that hold one are replaced by the variable's name.

The launcher itself never stores or prints such a value; a program that it runs may write one into a log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from launcher.contract.secret_names import is_secret_name

_SHORTEST = 6
"""Characters below which a value is no secret but a word that texts have anyway."""
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|"
    r"xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,})"
)
"""Forms of tokens that services give, for values that this process does not have."""
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
"""User and password in an address."""
_ADDRESS_NAME = re.compile(r"WEBHOOK", re.IGNORECASE)
"""Variables whose value is an address that is a secret itself."""


def redacted(value: object) -> object:
    """Return a value of JSON without secrets: those of this process's environment, and texts of known forms."""
    secrets = {
        held: f"<{name}>"
        for name, held in os.environ.items()
        if len(held) >= _SHORTEST and (is_secret_name(name) or _ADDRESS_NAME.search(name))
    }
    return _walk(value, dict(sorted(secrets.items(), key=lambda item: -len(item[0]))))


def _walk(value: object, secrets: Mapping[str, str]) -> object:
    if isinstance(value, str):
        for held, shown in secrets.items():
            value = value.replace(held, shown)
        return _IN_ADDRESS.sub("<password>", _TOKENS.sub("<token>", value))
    if isinstance(value, dict):
        return {_walk(key, secrets): _walk(item, secrets) for key, item in value.items()}
    return [_walk(item, secrets) for item in value] if isinstance(value, list) else value
