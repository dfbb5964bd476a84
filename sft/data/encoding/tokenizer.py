"""Load a tokenizer from a directory, and read the few facts about it that training depends on.

These are the control tokens, the token that ends a text, and what the tokenizer itself puts before a text. The padding
token is not among them: lengths decide what is padding, so a tokenizer whose padding token is its end token, or that
has none, needs no special case.

Rejected: setting `pad_token = eos_token` and masking by id, which takes the end token out of the loss.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.contract.errors import ModelError
from launcher.contract.spec import DataSpec

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


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in directory `path`, without network access and without running code from it.

    Raise ModelError if there is none or it cannot be loaded.
    """
    if not path.is_dir():
        raise ModelError(f"model.tokenizer: {path} is not a directory")
    if not any((path / name).is_file() for name in VOCABULARY_FILES):
        raise ModelError(f"model.tokenizer: no tokenizer in {path}: it holds none of {', '.join(VOCABULARY_FILES)}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    # Third-party loaders: the Rust side raises bare Exception on a file it cannot parse.
    except Exception as error:
        raise ModelError(f"model.tokenizer: the tokenizer in {path} cannot be loaded: {error}") from error
    # It would only cause warnings: data.seq_length is what limits an example.
    tokenizer.model_max_length = 10**30
    return tokenizer


def tokenizer_files(path: Path) -> list[Path]:
    """Return the files in `path` that decide which ids a text gets and how a conversation is written."""
    named = [path / name for name in (*VOCABULARY_FILES, *_OTHER_FILES)]
    templates = sorted((path / "additional_chat_templates").glob("*.jinja"))
    return [file for file in named if file.is_file()] + templates


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


def chat_template(tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> str | None:
    """Return the Jinja2 template of conversations, None with data.chat_template none.

    Raise ModelError if the tokenizer has none or the named file cannot be read.
    """
    if spec.chat_template == "none":
        return None
    if spec.chat_template == "tokenizer":
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                "data.chat_template: the tokenizer has no chat template; name a Jinja2 file, or none to join prompt "
                "and completion as they are"
            ) from error
        return template
    try:
        return Path(spec.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"data.chat_template: {spec.chat_template} cannot be read: {error}") from error
