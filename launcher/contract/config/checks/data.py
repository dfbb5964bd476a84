"""Checks of data: sources, batches of tokens, orders that exclude each other."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.contract.divisors import nearest_multiples, shown_numbers
from launcher.contract.named_templates import NONE
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import Problem
from launcher.contract.yaml_document import MOST_ITEMS, WHY_FEW


def source_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield where training data is missing, given in two ways, or in too many files."""
    for key, files in (("data.train", spec.data.train), ("data.validation", spec.data.validation)):
        if len(files) > MOST_ITEMS:  # by a glob: longer lists are refused as they are read
            yield key, f"{len(files):,} files, and at most {MOST_ITEMS:,} are read, {WHY_FEW}"
    if not spec.data.train and not spec.data.sources:
        yield "data.train", "missing; one or more data files, or several sources with weights in data.sources"
    if spec.data.validation_split:
        yield from _excluded(
            "data.validation_split",
            {"data.validation": bool(spec.data.validation), "data.sources": bool(spec.data.sources)},
        )
    if spec.data.train and spec.data.sources:
        yield "data.train", "excludes data.sources; give these files a name and a weight among the sources"


def template_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield settings of a chat template where there is none."""
    if spec.data.chat_template == NONE:
        if spec.data.on_mismatch == "split":
            yield "data.on_mismatch", "split is for turns that a chat template rewrites, and data.chat_template is none"
        for key, variables in _template_variables(spec):
            names = ", ".join(variables)
            yield key, f"{names}: of a chat template, and data.chat_template is none"


def _template_variables(spec: RunSpec) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield key and value of each mapping of variables that is not empty."""
    own = {f"data.sources.{name}": source.chat_template_kwargs for name, source in spec.data.sources.items()}
    for section, variables in {"data": spec.data.chat_template_kwargs, **own}.items():
        if variables:
            yield f"{section}.chat_template_kwargs", variables


def batch_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield a batch of tokens that is no whole number of rows."""
    data, train = spec.data, spec.train
    if train.global_batch_unit == "tokens" and data.seq_length > 0 and train.global_batch_size % data.seq_length:
        yield (
            "train.global_batch_size",
            f"{train.global_batch_size} tokens are not a number of rows of data.seq_length {data.seq_length}; "
            f"nearest valid: {shown_numbers(nearest_multiples(train.global_batch_size, data.seq_length))}",
        )


def order_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield orders of the examples that exclude other settings."""
    data, train = spec.data, spec.train
    in_tokens = train.global_batch_unit == "tokens"
    if data.cyclic_seed is not None:
        yield from _excluded(
            "data.cyclic_seed",
            {
                "data.group_by_length": data.group_by_length,
                "data.shuffle false, which keeps the order of the files": not data.shuffle,
                "train.global_batch_unit tokens": in_tokens,
                "data.sources": bool(data.sources),
                "train.epochs; give train.max_steps": train.max_steps is None,
            },
        )
    if data.group_by_length:
        yield from _excluded(
            "data.group_by_length",
            {
                "data.packing, which makes rows of any lengths full": data.packing,
                "train.global_batch_unit tokens, which sorts by length already": in_tokens,
                "data.shuffle false, which keeps the order of the files": not data.shuffle,
            },
        )


def _excluded(key: str, others: dict[str, bool]) -> Iterator[Problem]:
    for other in (name for name, given in others.items() if given):
        yield key, f"excludes {other}; drop one"
