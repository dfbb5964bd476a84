"""Load a tokenizer from a directory, and read the few facts about it that training depends on.

These are the control tokens, the token that ends a text, and what the tokenizer itself puts before a text. The padding
token is not among them: lengths decide what is padding, so a tokenizer whose padding token is its end token, or that
has none, needs no special case.

Rejected: setting `pad_token = eos_token` and masking by id, which takes the end token out of the loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.errors import ModelError
from launcher.contract.named_templates import NAMES, NONE, fit_all, needed_tokens, template_bytes
from launcher.contract.spec import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""A tokenizer has at least one of these."""

_OTHER_FILES = (
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)

_CLASS_HINTS = ("model_type", "tokenizer_class", "model_name", "_name_or_path", "transformers_version")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in directory `path`, without network access and without running code from it.

    Raise ModelError if there is none or it cannot be loaded.
    """
    if not path.is_dir():
        raise ModelError(f"model.tokenizer: {path} is not a directory")
    if not any((path / name).is_file() for name in VOCABULARY_FILES):
        raise ModelError(f"model.tokenizer: no tokenizer in {path}: it holds none of {', '.join(VOCABULARY_FILES)}")
    from transformers import AutoTokenizer  # most ranks read tokens only, and transformers is slow to import

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    # Third-party loaders: the Rust side raises bare Exception on a file it cannot parse.
    except Exception as error:
        raise ModelError(f"model.tokenizer: the tokenizer in {path} cannot be loaded: {error}") from error
    dropout = getattr(tokenizer.backend_tokenizer.model, "dropout", None) if tokenizer.is_fast else None
    if dropout:
        # Ids and offsets come from different calls: the loss would be on other tokens than those of the answer.
        raise ModelError(
            f"model.tokenizer: the tokenizer in {path} cuts words at random (model.dropout {dropout:g} in its "
            "tokenizer.json), so that a text has other tokens each time; set that to null"
        )
    # It would only cause warnings: data.seq_length is what limits an example.
    tokenizer.model_max_length = 10**30
    return tokenizer


def tokenizer_files(path: Path) -> list[Path]:
    """Return the files in `path` that decide which ids a text gets and how a conversation is written."""
    named = [path / name for name in (*VOCABULARY_FILES, *_OTHER_FILES)]
    templates = sorted((path / "additional_chat_templates").glob("*.jinja"))
    return [file for file in named if file.is_file()] + templates


def class_hints(path: Path) -> dict[str, object]:
    """Return what transformers reads from the model's config.json in `path` to choose the tokenizer's class.

    Two classes may give a text other ids with the same files: that of Qwen2 splits words in its own way, say. Nothing
    where there is no such file.
    """
    try:
        config: object = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: config[key] for key in _CLASS_HINTS if key in config} if isinstance(config, dict) else {}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return spelling and id of every special token: templates may write them, content may not become one."""
    added = tokenizer.added_tokens_decoder
    ids = {token.content: index for index, token in added.items() if token.special}
    ids.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return ids


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends texts and plain completions, or raise ModelError if there is none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError(
            "model.tokenizer: the tokenizer has no eos_token, without which the model would not learn to end an "
            "answer; set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer itself puts before a text: the id of its BOS, or nothing."""
    ids: list[int] = tokenizer("")["input_ids"]
    # Some tokenizers also add an end token, which is not wanted here: only BOS counts.
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id != tokenizer.eos_token_id else []


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """The Jinja2 templates of conversations."""

    default: str
    tool_use: str | None = None
    """The one for conversations with tools, where the tokenizer has one of its own for them."""

    def of(self, has_tools: bool) -> str:
        """Return the template of a conversation, as transformers chooses it."""
        return self.tool_use if has_tools and self.tool_use is not None else self.default


def chat_template(tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> ChatTemplates | None:
    """Return the templates of conversations, None with data.chat_template none.

    Raise ModelError if the tokenizer has none, the named file cannot be read, or a template of ours needs tokens that
    the tokenizer does not have.
    """
    if spec.chat_template == NONE:
        return None
    content = template_bytes(spec.chat_template)
    if content is None:
        return own_templates(tokenizer.chat_template)
    try:
        template = "\n".join(content.decode().replace("\r\n", "\n").split("\r"))  # as files are read as text
    except UnicodeDecodeError as error:
        raise ModelError(f"data.chat_template: {spec.chat_template} cannot be read: {error}") from error
    if spec.chat_template in NAMES:
        _check_tokens(template, spec.chat_template, tokenizer)
    return ChatTemplates(template)


def own_templates(templates: str | Mapping[str, str] | None) -> ChatTemplates:
    """Return the templates of a tokenizer, which has one, several by name, or none."""
    if isinstance(templates, Mapping):
        named = dict(templates)
        default = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        if default is not None:
            return ChatTemplates(default, named.get("tool_use"))
        raise ModelError(
            f"data.chat_template: the tokenizer has templates {', '.join(sorted(named))} and none is the default; "
            "write the one to use into a file of its own and name that"
        )
    if not templates:
        raise ModelError(
            f"data.chat_template: the tokenizer has no chat template; choose one of ours ({', '.join(NAMES)}), name a "
            "Jinja2 file, or none to join prompt and completion as they are"
        )
    return ChatTemplates(templates)


def _check_tokens(template: str, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError for a template whose turns would not end with a token of the tokenizer."""
    control = control_tokens(tokenizer)
    missing = [token for token in needed_tokens(template) if token not in control]
    if missing:
        raise ModelError(
            f"data.chat_template: {name} writes {', '.join(missing)}, which are not special tokens of this tokenizer: "
            f"the model would not learn to stop. {', '.join(fit_all())} end answers with the tokenizer's own end token"
        )
    if not needed_tokens(template):
        end_of_text(tokenizer)
