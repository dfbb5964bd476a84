"""Path-valued config fields: `tokenizer: Annotated[str | None, ExistingDirectory()] = None`.

The annotation is all that a new path needs. It says how a relative path becomes absolute, what has to exist before a
run is submitted, which folder a container mounts, which files the lock file hashes, and whether the file travels with
a command to another machine. `launcher.contract.spec.fields.path_fields` finds the fields.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launcher.contract.arrival import here
from launcher.contract.errors import did_you_mean
from launcher.contract.hub_cache import snapshot_of
from launcher.contract.package_files import missing_package_file, package_file
from launcher.contract.rundir import COMPLETE

_MODEL_FILES = (".gguf", ".nemo")
_GLOB = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class PathRule:
    """A field that holds a path, a list of paths, or a mapping of names to paths. Empty values are left alone.

    The methods take one path. `section` is the dataclass instance that holds the field: whether a value is a path can
    depend on the field beside it.
    """

    description: ClassVar[str]
    """What the reference page says of the value."""
    sent: ClassVar[bool] = False
    """Whether the file goes along with a command that runs on another machine."""
    may_come_later: ClassVar[bool] = False
    """Whether the run before this one (`after`) may have yet to write it."""

    def is_path(self, text: str, section: object) -> bool:
        """Return whether the text is a path at all, and not a word with a meaning of its own."""
        return True

    def absolute(self, text: str) -> str:
        """Return the absolute path."""
        return absolute_path(text)

    def expand(self, text: str) -> list[str]:
        """Return the absolute paths that one item of a list stands for."""
        return [self.absolute(text)]

    def problem(self, path: str, section: object) -> str | None:
        """Return what is wrong with the file, or None."""
        return None

    def mount(self, path: str) -> Path | None:
        """Return the folder that a container needs in order to see the path."""
        return None

    def hashed(self, path: str) -> Path | None:
        """Return the file, folder or pattern whose content makes the run what it is."""
        return None


@dataclass(frozen=True, slots=True)
class Directory(PathRule):
    """A directory that is made where it does not exist."""

    mounted: bool = False
    description: ClassVar[str] = "a directory"

    def mount(self, path: str) -> Path | None:
        return Path(path) if self.mounted else None


@dataclass(frozen=True, slots=True)
class DirectoryOrTruth(Directory):
    """A directory, or true for a place in the run directory, or false for none."""

    description: ClassVar[str] = "true, or a directory"

    def is_path(self, text: str, section: object) -> bool:
        return text.lower() not in ("true", "false")


@dataclass(frozen=True, slots=True)
class ExistingDirectory(PathRule):
    """A directory that is read."""

    description: ClassVar[str] = "an existing directory"
    may_come_later: ClassVar[bool] = True

    def problem(self, path: str, section: object) -> str | None:
        return None if Path(path).is_dir() else f"{path} is not a directory{_near(path)}"

    def mount(self, path: str) -> Path | None:
        return _hub_cache(path) or Path(path)

    def hashed(self, path: str) -> Path | None:
        return Path(path)


@dataclass(frozen=True, slots=True)
class ExistingFile(PathRule):
    """A file small enough to go along with a command to another machine; `words` are values that are no paths."""

    words: tuple[str, ...] = ()
    description: ClassVar[str] = "an existing file"
    sent: ClassVar[bool] = True

    def is_path(self, text: str, section: object) -> bool:
        return text not in self.words

    def absolute(self, text: str) -> str:
        return absolute_path(here(text))

    def problem(self, path: str, section: object) -> str | None:
        if Path(path).is_file():
            return None
        words = f" (nor one of the words {', '.join(self.words)})" if self.words else ""
        near = did_you_mean(Path(path).name, self.words) or _near(path)
        return f"{path} is not a file{words}{near}"

    def mount(self, path: str) -> Path | None:
        return Path(path).parent

    def hashed(self, path: str) -> Path | None:
        return Path(path)


@dataclass(frozen=True, slots=True)
class Files(PathRule):
    """Data files: files, saved data sets (which are directories), or globs.

    In a list a glob is replaced by its matches, sorted; one without matches stays, to be reported.
    """

    description: ClassVar[str] = "an existing file or a glob"

    def expand(self, text: str) -> list[str]:
        pattern = self.absolute(text)
        # os.path.exists, which a name that is too long is only absent for.
        return [pattern] if os.path.exists(pattern) else _matches(pattern) or [pattern]  # noqa: PTH110

    def problem(self, path: str, section: object) -> str | None:
        if snapshot_of(path) is not None:
            return None  # it may have yet to be fetched: launcher.contract.hub sees to it
        return None if Path(path).exists() or _matches(path) else f"no file matches {path}{_near(path)}"

    def mount(self, path: str) -> Path | None:
        if (cache := _hub_cache(path)) is not None:
            return cache
        parts = Path(path).parts
        fixed = next((index for index, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
        return Path(*parts[: min(fixed, len(parts) - 1)])

    def hashed(self, path: str) -> Path | None:
        return Path(path)


@dataclass(frozen=True, slots=True)
class ModelPath(PathRule):
    """A model: a directory, a .gguf or .nemo file, or package:NAME/FILE."""

    description: ClassVar[str] = "an existing model"
    may_come_later: ClassVar[bool] = True

    def absolute(self, text: str) -> str:
        return text if text.startswith("package:") else absolute_path(text)

    def problem(self, path: str, section: object) -> str | None:
        if path.startswith("package:"):
            why = missing_package_file(path)
            return None if why is None else f"{path}: {why}"
        model = Path(path)
        if model.is_dir() or (model.is_file() and model.suffix in _MODEL_FILES):
            return None
        if model.exists():
            return f"{path} is neither a directory nor a .gguf or .nemo file"
        return f"{path} does not exist{_near(path)}"

    def mount(self, path: str) -> Path | None:
        if path.startswith("package:"):
            return None
        if (cache := _hub_cache(path)) is not None:
            return cache
        return Path(path).parent if Path(path).suffix in _MODEL_FILES else Path(path)

    def hashed(self, path: str) -> Path | None:
        return package_file(path) if path.startswith("package:") else Path(path)


@dataclass(frozen=True, slots=True)
class CompleteCheckpoint(PathRule):
    """A checkpoint directory that was written to its end."""

    description: ClassVar[str] = "a complete checkpoint"
    may_come_later: ClassVar[bool] = True

    def problem(self, path: str, section: object) -> str | None:
        complete = (Path(path) / COMPLETE).is_file()
        return None if complete else f"{path} is not a complete checkpoint: it has no file {COMPLETE}"

    def mount(self, path: str) -> Path | None:
        return Path(path)


@dataclass(frozen=True, slots=True)
class RunReference(PathRule):
    """Another run: a name in run_root, or a directory, which has a slash in it."""

    description: ClassVar[str] = "a run's name or directory"

    def is_path(self, text: str, section: object) -> bool:
        return "/" in text


@dataclass(frozen=True, slots=True)
class ContainerImage(PathRule):
    """A container image: a path where such a file is here, else a registry reference."""

    description: ClassVar[str] = "a file or a registry reference"

    def is_path(self, text: str, section: object) -> bool:
        return Path(os.path.expanduser(text)).exists()  # noqa: PTH111


def absolute_path(text: str) -> str:
    """Return the path made absolute against the working directory, `~` and `..` resolved, links left as they are."""
    # Not Path.expanduser, which raises an error for the home of a user that is not known here.
    return os.path.normpath(Path(os.path.expanduser(text)).absolute())  # noqa: PTH111


def _hub_cache(path: str) -> Path | None:
    """Return the whole cache for a path of a snapshot: its files are links to others of the cache."""
    snapshot = snapshot_of(path)
    return None if snapshot is None else snapshot.cache


def _near(path: str) -> str:
    """Return a hint at the file of the same folder with the closest name, to be put behind a message."""
    wanted = Path(path)
    try:
        names = [entry.name for entry in os.scandir(wanted.parent)]
    except (OSError, ValueError):
        return ""
    return "" if wanted.name in names or set(path) & _GLOB else did_you_mean(wanted.name, names)


def _matches(pattern: str) -> list[str]:
    if not set(pattern) & _GLOB:
        return []
    try:
        return sorted(map(str, Path("/").glob(pattern.removeprefix("/"))))
    except (ValueError, NotImplementedError, re.error):  # no pattern that Python knows, such as a**
        return []
