"""Settings of conversations that no rows are read with: token ids and texts say themselves what is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from launcher.contract.spec import DataSpec

NEEDS_TEMPLATE = (
    "data.chat_template: none joins a prompt and its completion, but the rows hold messages; name a Jinja2 file, or "
    "tokenizer for its own template"
)
_OF_CONVERSATIONS = ("prompt_completion", "messages", "sharegpt")


def policy_problems(data: DataSpec, formats: Mapping[str, str]) -> Iterator[str]:
    """Yield the settings of `data` that no data set is read with. `formats` has the format of each, by its key."""
    own = {f"data.sources.{name}": source.loss_on for name, source in data.sources.items() if source.loss_on}
    for key, loss_on in own.items():
        if key in formats:
            yield from _loss_on_problems(f"{key}.loss_on", loss_on, {formats[key]})
    inherits = {row_format for key, row_format in formats.items() if key not in own}
    if inherits:
        yield from _loss_on_problems("data.loss_on", data.loss_on, inherits)
    if data.on_mismatch == "split" and formats and not any(each in _OF_CONVERSATIONS for each in formats.values()):
        yield f"data.on_mismatch: split is for turns of conversations, and {_rows(formats.values())} have none; drop it"


def _loss_on_problems(key: str, loss_on: str, formats: Collection[str]) -> Iterator[str]:
    done_anyway = ("assistant", "all") if "text" in formats else ("assistant",)
    if loss_on not in done_anyway and not any(each in _OF_CONVERSATIONS for each in formats):
        yield (
            f"{key}: {loss_on} is not read in {_rows(formats)}, which say themselves what is trained (tokens by labels "
            "or loss_mask, all of a text); drop it"
        )


def _rows(formats: Collection[str]) -> str:
    return f"rows of format {' or '.join(sorted(set(formats)))}"
