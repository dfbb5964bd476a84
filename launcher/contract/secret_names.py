"""Names of environment variables that hold secrets."""

from __future__ import annotations

import re

_SECRET = re.compile(r"TOKEN(?!IZER)|(?<!P)KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name probably holds a secret (but not TOKENIZERS_PARALLELISM or NCCL_IB_PKEY)."""
    return _SECRET.search(name) is not None
