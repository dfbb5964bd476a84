"""What each change to Megatron-core declares: what it changes, why, in which versions, and the test that proves it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from launcher.contract.versions import BOUNDS, parse_version

FIRST, AFTER_LAST = BOUNDS["megatron-core"].first, BOUNDS["megatron-core"].before or ""
"""The versions of Megatron-core that setup.cfg allows: from the first, and below the second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """A change to Megatron-core."""

    name: str
    why: str
    """What goes wrong without it."""
    targets: tuple[str, ...]
    """What it replaces or reaches into, as module:attribute.attribute."""
    test: str
    """The test that shows the wrong result without it, as file::function below tests/."""
    since: str = FIRST
    before: str = AFTER_LAST
    apply: Callable[[], None] | None = None
    """Installs it, once, when Megatron-core has been imported; None where it changes single objects when called."""

    def fits(self, version: str) -> bool:
        """Return whether the patch is meant for this version of Megatron-core."""
        return parse_version(self.since) <= parse_version(version) < parse_version(self.before)

    def missing(self) -> list[str]:
        """Return the targets that the installed Megatron-core does not have."""
        return [target for target in self.targets if not _exists(target)]


def _exists(target: str) -> bool:
    module, _, path = target.partition(":")
    try:
        reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


def install(patches: tuple[Patch, ...], version: str) -> None:
    """Apply the patches meant for `version`, or raise RuntimeError if one finds nothing to change."""
    for patch in patches:
        if not patch.fits(version):
            continue
        missing = patch.missing()
        if missing:
            raise RuntimeError(
                f"Megatron-core {version} has no {', '.join(missing)}, which the patch {patch.name} changes; "
                f"install megatron-core>={FIRST},<{AFTER_LAST}"
            )
        if patch.apply is not None:
            patch.apply()
