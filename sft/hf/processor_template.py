"""The chat template of a multimodal model's processor, which has to be the one that the run was trained with.

Servers ask the processor before the tokenizer. It takes the template in processor_config.json, else that in
chat_template.json, else chat_template.jinja. The tokenizer, with which data are written, knows the last one alone, and
the one in its own tokenizer_config.json.
"""

from __future__ import annotations

from pathlib import Path

from launcher.contract.rundir import read_json, write_json

_OWN = "chat_template.jinja"
_KEY = "chat_template"
_LEGACY = "chat_template.json"
_SETTINGS = "processor_config.json"
_OTHERS = "additional_chat_templates"


def drop_processor_templates(directory: Path) -> None:
    """Remove the templates that processors take before chat_template.jinja."""
    (directory / _LEGACY).unlink(missing_ok=True)
    settings = read_json(directory / _SETTINGS)
    if isinstance(settings, dict) and settings.pop(_KEY, None) is not None:
        write_json(directory / _SETTINGS, settings)


def unite_templates(directory: Path) -> None:
    """Let the processor have the tokenizer's template, where the two have different ones."""
    templates = _of_tokenizer(directory)
    settings, legacy = (read_json(directory / name) for name in (_SETTINGS, _LEGACY))
    found = [each.get(_KEY) for each in (settings, legacy) if isinstance(each, dict)]
    default = templates.pop("default", None)
    if default is None or all(template in (None, default) for template in found):
        return
    (directory / _OWN).write_bytes(default.encode())
    for name, template in templates.items():  # of tokenizer_config.json, which is not read beside the file
        (directory / _OTHERS).mkdir(exist_ok=True)
        (directory / _OTHERS / f"{name}.jinja").write_bytes(template.encode())
    drop_processor_templates(directory)


def _of_tokenizer(directory: Path) -> dict[str, str]:
    """Return the tokenizer's templates by name, of those in files the default one alone: the others stay."""
    if (directory / _OWN).is_file():
        return {"default": (directory / _OWN).read_bytes().decode("utf-8")}
    settings = read_json(directory / "tokenizer_config.json")
    template = settings.get(_KEY) if isinstance(settings, dict) else None
    if isinstance(template, list):
        return {str(each["name"]): str(each["template"]) for each in template if isinstance(each, dict)}
    return {"default": template} if isinstance(template, str) else {}
