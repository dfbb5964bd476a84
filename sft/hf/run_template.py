"""The chat template of a run: kept as the data were written with it, for the export.

`data.chat_template` may name a file. If it is edited after training, an export that reads it then would ask the model
in a form that it has never seen.
"""

from __future__ import annotations

from launcher.contract.named_templates import template_bytes
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import RunSpec


def record_template(paths: RunPaths, spec: RunSpec) -> None:
    """Keep the template that data.chat_template names in the run directory."""
    template = template_bytes(spec.data.chat_template)
    if template is None:
        paths.chat_template.unlink(missing_ok=True)
    else:
        paths.chat_template.write_bytes(template)


def recorded_template(paths: RunPaths, spec: RunSpec) -> bytes | None:
    """Return the template that was kept, or what the config names now if an earlier version kept none."""
    if paths.chat_template.is_file():
        return paths.chat_template.read_bytes()
    return template_bytes(spec.data.chat_template)
