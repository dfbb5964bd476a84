"""axolotl's data sets: files or hub ids, each with the form of its rows."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.contract.nemo.entries import Entries
from launcher.contract.nemo.rule import Refused, Translation

_FORMATS: dict[str, dict[str, object]] = {
    "chat_template": {},
    "completion": {"data.format": "text"},
    "sharegpt": {"data.format": "sharegpt"},
}
"""Type of a data set -> our settings for it, where one exists."""
_KEYS = {
    *("path", "type", "split", "name", "data_files", "ds_type", "field", "field_messages", "revision"),
    *("message_property_mappings", "message_field_role", "message_field_content"),
    *("roles", "roles_to_train", "train_on_eos"),
}
_ROLES = {
    "messages": {"user": {"user"}, "assistant": {"assistant"}, "system": {"system"}, "tool": {"tool"}},
    "conversations": {
        "user": {"user", "human"},
        "assistant": {"assistant", "gpt", "chatgpt", "model"},
        "system": {"system"},
        "tool": {"tool", "observation", "function_response"},
    },
}
"""Our name for a row's turns -> role -> the words by which it is known among them."""


def datasets(value: object, entries: Entries) -> Translation:
    """Translate the list of data sets: files or hub ids, one format for all."""
    listed = [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    if not listed:
        raise Refused("no data set in it; give data.train")
    found = [_settings(each) for each in listed]
    for key in {key for settings in found for key in settings}:
        if any(settings.get(key) != found[0].get(key) for settings in found):
            raise Refused(f"data sets with different {key}; name them in data.sources, each with its own")
    trained = {"data.train": [_place(each) for each in listed]}
    return Translation(trained | found[0], "each counts as often as it has examples" if len(listed) > 1 else "")


def _place(each: dict[object, object]) -> str:
    files = each.get("data_files")
    if isinstance(files, list) and len(files) != 1:
        raise Refused("data_files with several files; name each in data.train")
    return str(files[0] if isinstance(files, list) else files or each.get("path"))


def _settings(each: dict[object, object]) -> dict[str, object]:
    unknown = [str(key) for key in each if key not in _KEYS]
    if unknown:
        raise Refused(f"{', '.join(unknown)} of a data set: see data.columns, data.loss_on and data.chat_template")
    kind = str(each.get("type") or "chat_template")
    if kind == "alpaca":
        raise Refused(
            "type 'alpaca' writes texts of its own around instruction, input and output; such rows are read here, but "
            "are written with data.chat_template: take type chat_template for that"
        )
    if kind not in _FORMATS:
        raise Refused(f"type {kind!r} is not known; {', '.join(_FORMATS)} are, others need data.columns")
    turns = "conversations" if kind == "sharegpt" else _turns(each)
    settings = dict(_FORMATS["sharegpt" if turns == "conversations" else kind])
    _check_what_is_trained(each, turns)
    named = {"split": "data.hub.split", "name": "data.hub.config", "revision": "data.hub.revision"}
    settings |= {ours: each[key] for key, ours in named.items() if each.get(key) not in (None, "train")}
    columns = {"text": each.get("field"), turns: each.get("field_messages")}
    given = {ours: str(name) for ours, name in columns.items() if name not in (None, ours)}
    return settings | ({"data.columns": given} if given else {})


def _turns(each: dict[object, object]) -> str:
    """Return our name for the turns of a row, by what its messages call role and text."""
    given = each.get("message_property_mappings")
    names: Mapping[object, object] = given if isinstance(given, dict) else {}
    if set(names) - {"role", "content"}:
        raise Refused(f"message_property_mappings of {', '.join(map(str, names))}: role and content are read alone")
    role = names.get("role") or each.get("message_field_role") or "role"
    text = names.get("content") or each.get("message_field_content") or "content"
    if (role, text) not in (("role", "content"), ("from", "value")):
        raise Refused(f"messages with {role!r} and {text!r}: they have role and content here, or from and value")
    return "messages" if role == "role" else "conversations"


def _check_what_is_trained(each: dict[object, object], turns: str) -> None:
    """Raise Refused where other turns are trained than those of the assistant, each with its end token."""
    given = each.get("roles")
    for role, words in (given if isinstance(given, dict) else {}).items():
        other = set(words if isinstance(words, list) else [words]) - _ROLES[turns].get(str(role), set())
        if other:
            raise Refused(f"roles: {', '.join(sorted(map(str, other)))} for {role}: see data.columns and data.format")
    trained = each.get("roles_to_train")
    if trained is not None and trained not in (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]):
        raise Refused(f"roles_to_train {trained!r} of a data set: here it is data.loss_on")
    if each.get("train_on_eos") not in (None, "turn"):
        raise Refused(
            f"train_on_eos {each['train_on_eos']!r} of a data set: each trained answer has its end token here"
        )


def held_out(value: object, entries: Entries) -> Translation:
    """Translate the list of held-out data sets."""
    listed = [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    # Files have no splits: axolotl's `split: train` of one means all of its rows.
    is_file = [bool(each.get("ds_type") or each.get("data_files")) for each in listed]
    splits = [
        "" if own or not each.get("split") else f":{each['split']}" for own, each in zip(is_file, listed, strict=True)
    ]
    paths = [f"{_place(each)}{split}" for each, split in zip(listed, splits, strict=True)]
    return Translation({"data.validation": paths} if paths else {})
