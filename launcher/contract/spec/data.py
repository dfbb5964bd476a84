"""data: what to train on."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field
from typing import Annotated, Literal

from launcher.contract.named_templates import TOKENIZER, WORDS
from launcher.contract.spec.paths import Directory, ExistingFile, Files
from launcher.contract.spec.rules import (
    REVISION,
    SET_NAME,
    SHARE_OF_ROWS,
    Above,
    AtLeast,
    Bits,
    Day,
    Names,
    Percent,
    Required,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSpec:
    """What is meant by the id of a data set on the hub, where ORG/NAME or ORG/NAME:SPLIT stands in place of files."""

    split: str | None = None
    """The split of training data without one in its id; default train. Held-out data names its split in the id."""
    config: str | None = None
    """The data set's config; default its own default."""
    revision: Annotated[str | None, REVISION] = None
    """Branch, tag or commit; default main. The run keeps the commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """A source of training data by a name of your own, one of several in place of data.train."""

    files: Annotated[list[str], Required("one or more data files"), Files()] = field(default_factory=list)
    """Files of this source, as in data.train."""
    weight: Annotated[float, Above(0, hint="to train without this source, take it out")] = 1.0
    """An epoch takes weight x n of the source's n examples, rounded to the nearest whole number (a half up): 2.5 is two
    copies of all examples and half of them once more, 0.1 a tenth of them. A part of a copy continues where the epoch
    before ended, in one shuffled order, so that over any number of epochs no example is used more than once more often
    than another."""
    format: Literal["auto", "prompt_completion", "messages", "sharegpt", "tokens", "text"] | None = None
    """How rows are read; unset: data.format."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the row's name; empty: data.columns."""
    loss_on: Literal["assistant", "last_assistant", "all"] | None = None
    """Tokens with loss; unset: data.loss_on."""
    chat_template_kwargs: dict[str, str] = field(default_factory=dict)
    """Variables for the chat template; empty: data.chat_template_kwargs."""
    hub: HubSpec = field(default_factory=HubSpec)
    """What is meant by hub ids among the files; all unset: data.hub."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """What to train on and which tokens count."""

    train: Annotated[list[str], Files()] = field(default_factory=list)
    """Training files: jsonl, json, csv, tsv, parquet, arrow, feather, compressed or not; directories of them; saved
    Hugging Face datasets; or a data set of the hub (ORG/NAME or ORG/NAME:SPLIT, see data.hub). Globs are allowed, order
    counts. An epoch is every example once. For several sources with weights use data.sources instead."""
    sources: dict[str, SourceSpec] = field(default_factory=dict)
    """Several sources of training data, by name."""
    validation: Annotated[list[str], Files()] = field(default_factory=list)
    """Held-out files that form one data set, whose loss is eval_loss. Empty, and without validation_split and
    validation_sets: no held-out loss."""
    validation_split: Annotated[str | None, SHARE_OF_ROWS] = None
    """Hold out a part of the rows of data.train in place of data.validation: a percentage (1%) or a number of rows. A
    hash of each row decides, so equal rows are on one side."""
    validation_sets: Annotated[dict[str, str], Names(SET_NAME), Files()] = field(default_factory=dict)
    """Further held-out data sets, name -> file or glob; the loss of each is eval_loss/<name>."""
    hub: HubSpec = field(default_factory=HubSpec)
    """Data sets of the hub that are named by id above."""
    format: Literal["auto", "prompt_completion", "messages", "sharegpt", "tokens", "text"] = "auto"
    """How rows are read; auto looks at the first row's keys."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the row's name, e.g. {prompt: question, completion: instances.0.output}; dots lead into nested
    values."""
    ignore_keys: list[str] = field(default_factory=list)
    """Keys of rows and messages that would change the training and that nothing reads, and that are left out all the
    same. Without it they are refused; keys that change nothing are only named."""
    chat_template: Annotated[str, ExistingFile(words=WORDS)] = TOKENIZER
    """tokenizer: the tokenizer's own; none: prompt and completion are joined without a template; alpaca, chatml, gemma,
    llama3, mistral, vicuna or zephyr: one of ours; else a Jinja2 file."""
    chat_template_kwargs: dict[str, str] = field(default_factory=dict)
    """Variables for the chat template, read as YAML, e.g. {enable_thinking: true}."""
    date: Annotated[str | None, Day()] = None
    """The day that a chat template is told if it writes today's date, YYYY-MM-DD; unset: the day of submission, which
    the run keeps."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Tokens with loss: completions / every assistant turn, the last assistant turn only, or all."""
    on_mismatch: Literal["error", "split"] = "error"
    """For chat templates that rewrite earlier turns: error refuses them, split trains each such turn as an example of
    its own."""
    seq_length: Annotated[int, AtLeast(1)] = 1024
    """Longest example in tokens."""
    length_policy: Literal["drop", "truncate_left", "truncate_right", "split", "error"] = "truncate_right"
    """What happens to longer examples (split: pieces of seq_length). What is lost is counted and printed."""
    max_lost_percent: Annotated[float, Percent()] = 100.0
    """Refuse data of which the length policy removes a larger percentage of the tokens to train than this."""
    require_end_tokens: bool = True
    """Refuse data in which no answer ends with a trained end token, from which a model would never learn to stop."""
    packing: bool = False
    """Put several examples into one row of up to seq_length tokens, without attention between them. A micro-batch is
    train.micro_batch_size such rows, joined. Steps hold the same examples with and without it."""
    pad_to_multiple: Annotated[int, AtLeast(1)] = 8
    """Batches are padded to their longest row, rounded up to this."""
    group_by_length: bool = False
    """Without packing: form batches of examples of similar lengths, which need less padding. Needs shuffle."""
    shuffle: bool = True
    """Shuffle anew in each epoch, from train.seed."""
    cyclic_seed: Annotated[int | None, AtLeast(0), Bits(63)] = None
    """Take examples in the order of trlx's NeMo trainers, from this seed: one permutation of global_batch_size x
    max_steps places, each of which stands for an example by its remainder. There are no epochs in it, and a run shorter
    than its data sees only a part of them. For comparison with such runs."""
    workers: Annotated[int | None, AtLeast(1)] = None
    """Tokenizing processes; default one per core."""
    cache_dir: Annotated[str | None, Directory(mounted=True)] = None
    """Where tokenized data and converted models are kept, on a file system that all nodes share; default .cache in
    run_root."""

    @property
    def now(self) -> datetime.datetime:
        """The time that chat templates are told: noon of `date`, or of today where it is unset."""
        day = datetime.date.fromisoformat(self.date) if self.date is not None else datetime.date.today()
        return datetime.datetime.combine(day, datetime.time(12))

    def of_source(self, name: str) -> DataSpec:
        """Return the settings of one source, with its files as `train`: its own settings, else those of all sources."""
        source = self.sources[name]
        special = ("format", "columns", "loss_on", "chat_template_kwargs")
        own = {key: value for key in special if (value := getattr(source, key))}
        return dataclasses.replace(self, train=source.files, sources={}, **own)
