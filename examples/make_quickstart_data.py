"""Question/answer text of the `chatterbot-corpus` package as train.jsonl and validation.jsonl.

    python examples/make_quickstart_data.py runs/.cache/quickstart

The split is made by question, not by row: questions with several answers, and those that differ only in case or
punctuation, are on one side. It hangs on a hash of the question, so a new version of the corpus moves none over.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from launcher.contract.rundir import write_atomic

TOPICS = ("ai", "botprofile", "computers", "food", "literature", "money", "science", "trivia")
HELD_OUT_PERCENT = 12

Pair = tuple[str, str]


def read_topic(path: Path) -> Iterator[Pair]:
    """Yield the first question and answer of each conversation, leaving out entries of another shape."""
    for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
        if isinstance(conversation, list) and len(conversation) >= 2:
            question, answer = (" ".join(str(text).split()) for text in conversation[:2])
            if question and answer:
                yield question, answer


def question_key(question: str) -> str:
    """Return what two spellings of the same question have in common."""
    return " ".join(re.findall(r"\w+", question.casefold()))


def held_out(question: str) -> bool:
    """Return whether a question belongs to the validation data."""
    digest = hashlib.sha256(question_key(question).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Return the distinct pairs in their order, as (train, validation)."""
    distinct = list({(question_key(question), answer): (question, answer) for question, answer in pairs}.values())
    return [pair for pair in distinct if not held_out(pair[0])], [pair for pair in distinct if held_out(pair[0])]


def to_jsonl(pairs: list[Pair]) -> str:
    rows = ({"prompt": question, "completion": answer} for question, answer in pairs)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def corpus_folder() -> Path:
    """Return the folder of the installed corpus's English text, without importing the package and its loader."""
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or package.origin is None:
        sys.exit("chatterbot-corpus is not installed: pip install '.[examples]'")
    return Path(package.origin).parent / "data" / "english"


def main(target: Path) -> None:
    """Write both files. A reader never sees half of one."""
    pairs = [pair for topic in TOPICS for pair in read_topic(corpus_folder() / f"{topic}.yml")]
    train, validation = split(pairs)
    write_atomic(target / "train.jsonl", to_jsonl(train))
    write_atomic(target / "validation.jsonl", to_jsonl(validation))
    print(f"{target}: {len(train)} examples to train on, {len(validation)} held out")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/make_quickstart_data.py FOLDER")
    main(Path(sys.argv[1]))
