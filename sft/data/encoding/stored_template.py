"""The chat templates in a tokenizer's files, as transformers reads them: known without loading the tokenizer."""

from __future__ import annotations

from pathlib import Path

from launcher.contract.errors import ModelError
from launcher.contract.named_templates import TOKENIZER
from launcher.contract.rundir import read_json
from launcher.contract.spec import DataSpec
from sft.data.encoding.tokenizer import VOCABULARY_FILES, own_templates

_MISTRAL = "tekken.json"
"""With it another library may read the tokenizer, which has its own templates."""


def template_problem(directory: Path, data: DataSpec) -> str | None:
    """Return what `prepare` would say of conversations, where this tokenizer's own template is to write them.

    None where there is nothing to say, or where its files cannot be read: that is for the one who loads it to tell.
    """
    has_files = any((directory / name).is_file() for name in VOCABULARY_FILES)
    if data.chat_template != TOKENIZER or not has_files or (directory / _MISTRAL).is_file():
        return None
    try:
        own_templates(_stored(directory))
    except ModelError as error:
        return error.problems[0]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _stored(directory: Path) -> str | dict[str, str] | None:
    """Return the only template, or several by name. Files count before what tokenizer_config.json holds."""
    files = {path.stem: path for path in (directory / "additional_chat_templates").glob("*.jinja")}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if texts:
        return texts["default"] if set(texts) == {"default"} else texts
    found = (read_json(directory / "tokenizer_config.json") or {}).get("chat_template")
    return {each["name"]: each["template"] for each in found} if isinstance(found, list) else found
