"""Replace hub ids in a config by paths of their snapshots.

A text in place of a path is an id if it has the form ORG/NAME, nothing of that name is here, and ORG is no folder here
either (then a mistyped path would be sent to the hub). A revision or `:split` beside it says that it is an id all the
same. What is here wins, and a remark says so.

A resolved config holds the paths, and the commits as revisions. Read again, they are looked for in the cache that they
name, else in the user's own, else on the hub.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from launcher.contract.errors import HubError
from launcher.contract.hub.client import fetch
from launcher.contract.hub.data_sets import resolve_data
from launcher.contract.hub.found import DEFAULT_REVISION, Fetch, Found
from launcher.contract.hub.listing import Listing
from launcher.contract.hub.model_files import CONFIG, has_weights, settings_files, weight_files
from launcher.contract.hub.texts import is_meant
from launcher.contract.hub_cache import Repository, Snapshot, snapshot_of
from launcher.contract.spec import ModelSpec, RunSpec
from launcher.contract.spec.fields import Problem, rule_problems

_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """A config without ids, and what was met on the way."""

    spec: RunSpec
    fetches: tuple[Fetch, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]


def resolve_hub(spec: RunSpec) -> Resolution:
    """Return the config with the paths of snapshots in place of ids. Of models, config.json is fetched for that."""
    if any(key.endswith("revision") for key, _ in rule_problems(spec)):
        # Rules refuse such a revision, which would become part of a path here.
        return Resolution(spec=spec, fetches=(), notes=(), problems=())
    found = Found()
    model = _model(spec.model, found, may_come_later=spec.after is not None)
    data = resolve_data(spec.data, found)
    return Resolution(
        spec=dataclasses.replace(spec, model=model, data=data),
        fetches=tuple(found.fetches),
        notes=tuple(found.notes),
        problems=tuple(found.problems),
    )


def _model(model: ModelSpec, found: Found, *, may_come_later: bool) -> ModelSpec:
    with_weights = model.init == "pretrained"
    tokenizer = _tokenizer(model, found)
    key, text = "model.path", model.path
    pinned = snapshot_of(text)
    if pinned is not None:
        return dataclasses.replace(model, path=_pinned_model(pinned, model, found, with_weights), tokenizer=tokenizer)
    if not is_meant(key, text, found, named=model.revision is not None, may_come_later=may_come_later):
        if model.revision is not None:
            found.problem(
                "model.revision", f"{model.revision} needs a model of the hub (ORG/NAME) as model.path; drop it"
            )
        return dataclasses.replace(model, tokenizer=tokenizer)
    snapshot = _model_snapshot(key, text, model.revision or DEFAULT_REVISION, found, with_weights)
    if snapshot is None:
        return dataclasses.replace(model, tokenizer=tokenizer)
    return dataclasses.replace(model, path=str(snapshot.path), revision=snapshot.commit, tokenizer=tokenizer)


def _pinned_model(pinned: Snapshot, model: ModelSpec, found: Found, with_weights: bool) -> str:
    """Return the path of a snapshot that a resolved config names, wherever its files are now."""
    if model.revision not in (None, pinned.commit):
        found.problem(
            "model.revision",
            f"{model.revision}, but model.path is of commit {pinned.commit}; set model.path={pinned.repository.id} too",
        )
        return model.path
    if (pinned.path / CONFIG).is_file() and (not with_weights or has_weights(pinned.path)):
        return model.path
    snapshot = _model_snapshot("model.path", pinned.repository.id, pinned.commit, found, with_weights)
    return model.path if snapshot is None else str(snapshot.path)


def _model_snapshot(key: str, text: str, revision: str, found: Found, with_weights: bool) -> Snapshot | None:
    def names_of(listing: Listing) -> list[str]:
        _fetch_first(listing, CONFIG)
        return settings_files(listing) + (weight_files(listing) if with_weights else [])

    answer = found.look_up(key, Repository(kind="model", id=text), revision, names_of)
    return None if answer is None else answer[0].snapshot


def _tokenizer(model: ModelSpec, found: Found) -> str | None:
    """Return the path of the tokenizer's folder, that of a resolved config wherever its files are now."""
    text = model.tokenizer
    pinned = snapshot_of(text) if text is not None else None
    if pinned is not None:
        is_here = (pinned.path / _TOKENIZER_CONFIG).is_file()
        return text if is_here else _tokenizer_snapshot(str(text), pinned.repository.id, pinned.commit, found)
    if text is None or not is_meant("model.tokenizer", text, found, named=False, may_come_later=True):
        return text
    revision = model.revision if text == model.path and model.revision is not None else DEFAULT_REVISION
    return _tokenizer_snapshot(text, text, revision, found)


def _tokenizer_snapshot(text: str, repository: str, revision: str, found: Found) -> str:
    """Return the path of a repository's tokenizer, or the config's own text where it cannot be had."""

    def names_of(listing: Listing) -> list[str]:
        _fetch_first(listing, _TOKENIZER_CONFIG)
        return settings_files(listing)

    answer = found.look_up("model.tokenizer", Repository(kind="model", id=repository), revision, names_of)
    return text if answer is None else str(answer[0].snapshot.path)


def _fetch_first(listing: Listing, name: str) -> None:
    """Fetch a small file that checks need at once."""
    if name not in listing.sizes:
        raise HubError(f"{listing.snapshot.repository.id} has no {name}; is it a model's repository?")
    if listing.missing([name]):
        if listing.note:
            raise HubError(f"{listing.snapshot}: {name} is not in the cache, and {listing.note}")
        fetch(listing.snapshot, [name], quiet=True)
