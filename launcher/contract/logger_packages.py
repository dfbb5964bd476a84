"""Check that the packages which a config's loggers need are installed.

The launcher checks where ranks run in its own environment, and `sft prepare` checks again in theirs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import field_problems

PROMETHEUS = "prometheus_client"
_PACKAGES = {"nemo": "nemo_toolkit"}
"""Packages whose name differs from that of their module."""


def missing_loggers(spec: RunSpec) -> Iterator[tuple[str, str]]:
    """Yield key and problem of every logger whose package is not installed here."""
    logging = spec.logging
    wanted = {
        "tensorboard": logging.tensorboard,
        "wandb": logging.wandb,
        "mlflow": logging.mlflow,
        "nemo": logging.nemo,
    }
    for module, setting in wanted.items():
        if setting and not any(field_problems(logging, module)) and importlib.util.find_spec(module) is None:
            package = _PACKAGES.get(module, module)
            yield f"logging.{module}", f"needs the package {package}: pip install {package}, or leave this out"
    if spec.prometheus_file is not None and importlib.util.find_spec(PROMETHEUS) is None:
        yield "metrics.prometheus", f"needs the package {PROMETHEUS}: pip install {PROMETHEUS}, or leave this out"
