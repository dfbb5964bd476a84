"""Which files of a data set repository make up a split.

The repository's README.md may say it (`configs` in its front matter); otherwise names do, as the hub's own viewer and
`datasets` read them: `data/train-00000-of-00002.parquet`, `train.jsonl`, `dev/part1.csv`. A repository that names no
split at all is one split, `train`. Scripts are never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import yaml

from launcher.contract.errors import HubError, did_you_mean

CARD = "README.md"
DEFAULT_SPLIT = "train"

_READABLE = re.compile(r".*\.(jsonl|json|csv|tsv|parquet|arrow)(\.gz|\.zst)?", re.IGNORECASE)
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json")
_SHARD = re.compile(r"(?:.*/)?(?P<split>\w+(?:\.\w+)*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-\w+)?\.[\w.]+")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = r"[-._ 0-9]"

Splits = dict[str, list[str]]
"""Split -> its files, sorted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is asked of a data set."""

    split: str
    config: str | None = None


def split_files(names: Iterable[str], card: str | None, wanted: Wanted) -> list[str]:
    """Return the files of a split among a repository's `names`.

    `card` is the text of its README.md.
    Raise HubError, with what there is, where the config or split does not exist or its files are of several kinds.
    """
    files = sorted(name for name in names if _is_data(name))
    if not files:
        raise HubError(_no_data(names))
    configs = _configs_of(card)
    splits = _declared(files, configs, wanted.config) if configs else _by_name(files, wanted.config)
    if wanted.split not in splits:
        hint = did_you_mean(wanted.split, splits)
        raise HubError(f"no split {wanted.split!r}{hint}; it has {', '.join(sorted(splits))}")
    chosen = splits[wanted.split]
    _check_shards(chosen)
    kinds = sorted({_READABLE.sub(r"\1", name).lower() for name in chosen})
    if len(kinds) > 1:
        raise HubError(
            f"split {wanted.split!r} has files of several kinds ({', '.join(kinds)}), which may hold the same rows "
            "twice; fetch the repository (`hf download`) and name the files"
        )
    return chosen


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return not hidden and path.name not in _NOT_DATA and _READABLE.fullmatch(path.name) is not None


def _no_data(names: Iterable[str]) -> str:
    if any(name.endswith(".py") for name in names):
        return (
            "it has a script in place of data files, and scripts are not run; revision refs/convert/parquet has its "
            "rows as files, if the hub has converted them"
        )
    return "it has no data file that can be read (jsonl, json, csv, tsv, parquet, arrow)"


def _configs_of(card: str | None) -> list[Mapping[str, object]]:
    """Return the configs with files of their own in the front matter of a README."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", card or "", re.DOTALL)
    if match is None:
        return []
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return []  # the hub, too, takes such a README for one without front matter
    configs = front.get("configs") if isinstance(front, dict) else None
    listed = configs if isinstance(configs, list) else []
    return [item for item in listed if isinstance(item, dict) and ("data_files" in item or "data_dir" in item)]


def _declared(files: Sequence[str], configs: Sequence[Mapping[str, object]], name: str | None) -> Splits:
    named = {str(config.get("config_name", "default")): config for config in configs}
    if name is None:
        marked = [key for key, config in named.items() if config.get("default") is True]
        name = marked[0] if marked else "default" if "default" in named else next(iter(named))
        if len(named) > 1 and not marked and name != "default":
            raise HubError(f"it has several configs ({', '.join(named)}); choose one with data.hub.config")
    if name not in named:
        raise HubError(f"no config {name!r}{did_you_mean(name, named)}; it has {', '.join(named)}")
    config = named[name]
    folder = str(config.get("data_dir") or "").strip("/")
    below = [file for file in files if not folder or file.startswith(f"{folder}/")]
    if "data_files" not in config:
        return _inferred(below, _folder_split)
    splits: Splits = {}
    for split, pattern in _patterns(config["data_files"]):
        matcher = _matcher(f"{folder}/{pattern}" if folder else pattern)
        splits.setdefault(split, []).extend(file for file in files if matcher.fullmatch(file))
    return {split: list(dict.fromkeys(found)) for split, found in splits.items() if found}


def _patterns(data_files: object) -> Iterator[tuple[str, str]]:
    """Yield split and pattern of each entry: a pattern, a list of them, or a list of split and path."""
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        if isinstance(entry, dict):
            paths = entry.get("path")
            for path in paths if isinstance(paths, list) else [paths]:
                yield str(entry.get("split", DEFAULT_SPLIT)), str(path)
        else:
            yield DEFAULT_SPLIT, str(entry)


def _matcher(pattern: str) -> re.Pattern[str]:
    """Return a regular expression for a glob: `*` stays within a folder, `**` does not."""
    pattern = pattern.removeprefix("./")
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    forms = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile("".join(forms.get(part, re.escape(part)) for part in parts))


def _by_name(files: Sequence[str], config: str | None) -> Splits:
    """Return the splits that the names tell. Where all files are CONFIG/SPLIT/FILE, folders are configs."""
    nested = all(len(PurePosixPath(file).parts) > 2 for file in files)
    configs = sorted({PurePosixPath(file).parts[0] for file in files}) if nested else []
    if config is None and len(configs) > 1 and not any(map(_word_in, configs)):
        raise HubError(f"it has several configs ({', '.join(configs)}); choose one with data.hub.config")
    if config is None:
        config = configs[0] if len(configs) == 1 else None
    if config is None:
        return _inferred(files, _folder_split)
    below = [file for file in files if file.startswith(f"{config}/")]
    if not below:
        folders = sorted({PurePosixPath(file).parts[0] for file in files if "/" in file})
        raise HubError(
            f"no config {config!r}{did_you_mean(config, folders)}; its folders: {', '.join(folders) or 'none'}"
        )
    return _inferred(below, _second_folder if nested else _folder_split)


def _inferred(files: Sequence[str], by_folder: Callable[[str], str | None]) -> Splits:
    """Return the splits by numbered shards, else by words in names, else by folders, else all as one."""
    for split_of in (_shard_split, _name_split, by_folder):
        splits: Splits = {}
        for file in files:
            split = split_of(file)
            if split is not None:
                splits.setdefault(split, []).append(file)
        if splits:
            return splits
    return {DEFAULT_SPLIT: list(files)}


def _shard_split(file: str) -> str | None:
    match = _SHARD.fullmatch(file)
    return match["split"] if match is not None else None


def _name_split(file: str) -> str | None:
    return _word_in(PurePosixPath(file).name)


def _folder_split(file: str) -> str | None:
    return next((split for folder in PurePosixPath(file).parts[:-1] if (split := _word_in(folder)) is not None), None)


def _second_folder(file: str) -> str | None:
    return PurePosixPath(file).parts[1]


def _word_in(name: str) -> str | None:
    for split, words in _WORDS.items():
        if any(re.search(rf"(?:^|{_SEPARATOR}){word}(?:$|{_SEPARATOR})", name, re.IGNORECASE) for word in words):
            return split
    return None


def _check_shards(files: Sequence[str]) -> None:
    """Raise HubError where `-00001-of-00003` is here and one of the three is not."""
    found: dict[tuple[str, int], int] = {}
    for file in files:
        match = _SHARD.fullmatch(file)
        if match is not None:
            key = (file[: match.start("number")], int(match["count"]))
            found[key] = found.get(key, 0) + 1
    for (series, count), here in found.items():
        if here != count:
            raise HubError(f"of {count} files {series}*-of-{count:05d} only {here} are there")
