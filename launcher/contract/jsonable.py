"""What programs are told, as values that JSON has."""

from __future__ import annotations

import math
from collections.abc import Mapping


def jsonable(value: object) -> object:
    """Return dataclasses as objects, and null for each number that JSON does not have, as the loss of a lost run."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    fields = getattr(type(value), "__dataclass_fields__", None)
    return value if fields is None else {name: jsonable(getattr(value, name)) for name in fields}
