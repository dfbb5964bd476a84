"""Recognise environment variables that hold secrets by their names."""

from __future__ import annotations

import re

_SECRET = re.compile(r"TOKEN(?!IZER)|(?<!P)KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Return whether a variable of this name probably holds a secret, unlike TOKENIZERS_PARALLELISM or NCCL_IB_PKEY."""
    return _SECRET.search(name) is not None
