"""Whether a tokenizer splits texts in one way, wherever its files are.

transformers chooses its class by the config.json beside it, too, and some classes split words in a way of their own,
whatever tokenizer.json says. An export has the tokenizer of `model.tokenizer` beside the model's config.json.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.errors import ModelError
from sft.data.encoding.tokenizer import class_hints, load_tokenizer, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = (
    "a  12 = 3\n\n  45",
    "I'm DON'T 1234567",
    "日本語 cafe\u0301\t\tx",
    " a leading space ",
    "f(x){return-1;}//...",
)
"""Texts in which ways to split differ: runs of digits and of white space, marks, accents, punctuation."""


_FILE = "tokenizer.json"
_OF_CLASS = ("model_type", "tokenizer_class")


def check_split_of_export(tokenizer_dir: Path, model_dir: Path) -> None:
    """Raise ModelError where texts would have other tokens in the export than in training."""
    chosen_by = [[class_hints(place).get(key) for key in _OF_CLASS] for place in (tokenizer_dir, model_dir)]
    if chosen_by[0] == chosen_by[1]:
        return
    own = load_tokenizer(tokenizer_dir)
    with tempfile.TemporaryDirectory() as folder:
        for file in tokenizer_files(tokenizer_dir):
            target = Path(folder) / file.relative_to(tokenizer_dir)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        shutil.copyfile(model_dir / "config.json", Path(folder) / "config.json")
        exported = load_tokenizer(Path(folder))
    for text in _split_apart(own, exported):
        raise ModelError(
            f"model.tokenizer: {text!r} has other tokens by {tokenizer_dir}, where transformers takes the class "
            f"{type(own).__name__}, than in the export, beside the model's config.json, where it takes "
            f"{type(exported).__name__}. Copy config.json of model.path beside the tokenizer to train with the latter"
        )


def unlike_its_file(directory: Path) -> str | None:
    """Return a remark where the tokenizer splits texts otherwise than the tokenizer.json in `directory` says."""
    from tokenizers import Tokenizer

    if not (directory / _FILE).is_file():
        return None
    loaded, stated = load_tokenizer(directory), Tokenizer.from_file(str(directory / _FILE))
    stated.no_padding()
    stated.no_truncation()
    for text in PROBES:
        ids, own = (
            loaded(text, add_special_tokens=False)["input_ids"],
            stated.encode(text, add_special_tokens=False).ids,
        )
        if ids != own:
            return (
                f"tokenizer: transformers loads {type(loaded).__name__}, which splits words otherwise than {_FILE}: "
                f"{text!r} has {len(ids)} tokens, or others, in place of {len(own)}. If the model was trained with the "
                "file, set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json, and audit again"
            )
    return None


def _split_apart(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the probes that have other tokens by one tokenizer than by the other."""
    for text in PROBES:
        if len({tuple(each(text, add_special_tokens=False)["input_ids"]) for each in (one, other)}) > 1:
            yield text
