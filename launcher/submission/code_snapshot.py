"""Pack the code that a run uses into its directory, so that later edits of the source tree do not change the run.

From a checkout, everything is packed that git would add (tracked files as they are now, untracked ones that are not
ignored), without its tests and documentation. Unpacked, the snapshot is thus a checkout itself, whose launcher is this
very version. An installed launcher is not packed: its version identifies it. Modules that a config names by import path
are packed in both cases.

It is one zip file, which Python imports as it is. Rejected: the same as a folder (500 files that each rank looks up on
the shared file system, and as many in every run's quota); an archive that each node unpacks to a disk of its own
(one more thing that can fail after the wait in the queue, and containers see other disks); and a git worktree for each
run (it stays tied to the repository).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from launcher.contract.errors import ConfigError
from launcher.contract.resources import checkout_root
from launcher.contract.rundir import write_atomic
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import values_under
from launcher.contract.spec.rules import FUNCTION

LARGEST_FILE = 10 << 20
"""Bytes; a larger file is data, and is left out with a warning."""

LARGEST_SNAPSHOT = 100 << 20
"""Bytes before compression, of which every run has a copy."""

MOST_FILES = 60_000
"""With more, Python would not import the archive: it would be one of the newer format with 64-bit numbers."""

_OURS = ("launcher", "sft", "templates", "cluster_configs", "setup.cfg", "pyproject.toml", "README.md")
_NOT_RUN = ("tests", "docs", "benchmarks", "scripts")
"""Folders of the checkout that no run needs: they are half of its files, and each run would have a copy."""
_CACHE = "__pycache__"


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What was packed."""

    files: int
    bytes: int
    sha256: str
    """Over names and contents, not over the archive: compression differs between versions of zlib."""
    left_out: tuple[str, ...]
    """Files over LARGEST_FILE, and those whose names an archive cannot hold."""


def has_own_code(spec: RunSpec) -> bool:
    """Return whether this run uses code that is not installed."""
    return checkout_root() is not None or next(_named_modules(spec), None) is not None


def take_snapshot(spec: RunSpec, target: Path) -> Snapshot:
    """Pack the run's code into the zip file `target`, read-only, and return what was packed.

    The same files give the same bytes. Raise ConfigError where it is too much to be code.
    """
    kept, total, left_out = _within_limits(_sources(spec))
    files = {name: (path.read_bytes(), os.access(path, os.X_OK)) for name, path in sorted(kept.items())}
    write_atomic(target, _packed(files), mode=0o444)
    sha256 = digest_of((name, content) for name, (content, _) in files.items())
    return Snapshot(files=len(kept), bytes=total, sha256=sha256, left_out=tuple(left_out))


def _packed(files: Mapping[str, tuple[bytes, bool]]) -> bytes:
    """Return a zip archive of name -> (content, whether it is a program), without times."""
    packed = io.BytesIO()
    folders = sorted({f"{folder}/" for name in files for folder in map(str, Path(name).parents) if folder != "."})
    with zipfile.ZipFile(packed, "w") as archive:
        for folder in folders:  # without an entry of its own, a folder is no namespace package
            archive.writestr(_entry(folder, 0o40755), b"")
        for name, (content, is_program) in files.items():
            entry = _entry(name, 0o100555 if is_program else 0o100444)
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _entry(name: str, mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # of 1980-01-01, the format's first day
    entry.create_system, entry.external_attr = 3, mode << 16
    return entry


def travelling_code(spec: RunSpec) -> dict[str, Path]:
    """Return name -> file of all that another machine needs to run this very launcher, as in a checkout."""
    files = _sources(spec)
    if checkout_root() is None:
        package = Path(__file__).resolve().parents[1]
        ours = {f"launcher/{name}": path for name, path in _below(package).items()}
        for folder in ("templates", "cluster_configs"):
            inside = f"launcher/{folder}/"
            ours = {name.replace(inside, f"{folder}/", 1): path for name, path in ours.items()}
        files |= ours | {f"sft/{name}": path for name, path in _below(package.parent / "sft").items()}
    return _within_limits(files)[0]


def _within_limits(files: Mapping[str, Path]) -> tuple[dict[str, Path], int, list[str]]:
    """Return the files that can be code, their bytes in all, and the names of the others.

    Raise ConfigError where all of them together are too large or too many.
    """
    sizes = {name: path.stat().st_size for name, path in files.items()}
    left_out = sorted(name for name, size in sizes.items() if size > LARGEST_FILE or not _is_utf8(name))
    kept = {name: path for name, path in files.items() if name not in left_out}
    total = sum(sizes[name] for name in kept)
    if total > LARGEST_SNAPSHOT:
        largest = sorted(kept, key=lambda name: -sizes[name])[:5]
        shown = ", ".join(f"{name} ({sizes[name] >> 20} MiB)" for name in largest)
        raise ConfigError(
            f"the code snapshot of {checkout_root()} would be {total >> 20} MiB, more than {LARGEST_SNAPSHOT >> 20}; "
            f"keep data out of the checkout or list it in .gitignore. Largest: {shown}"
        )
    if len(kept) > MOST_FILES:
        raise ConfigError(
            f"the code snapshot of {checkout_root()} would have {len(kept):,} files, more than {MOST_FILES:,}; "
            "keep data out of the checkout or list it in .gitignore"
        )
    return kept, total, left_out


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(folder: Path) -> str:
    """Return the `sha256` of a snapshot that an earlier version has made as a folder, without Python's caches."""
    return digest_of((name, path.read_bytes()) for name, path in sorted(_below(folder).items()))


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    """Return one hash over names and contents, in the order given."""
    whole = hashlib.sha256()
    for name, content in files:
        whole.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _sources(spec: RunSpec) -> dict[str, Path]:
    """Return name in the snapshot -> file."""
    root = checkout_root()
    files = dict(_checkout_files(root)) if root is not None else {}
    for module in _named_modules(spec):
        if module.is_dir():
            files |= {f"{module.name}/{name}": path for name, path in _below(module).items()}
        else:
            files[module.name] = module
    return files


def _checkout_files(root: Path) -> Mapping[str, Path]:
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        names = [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    except (OSError, subprocess.SubprocessError):
        names = []
    if "launcher/__init__.py" not in names:  # no repository, or one that ignores this folder: a snapshot in its runs
        return {name: path for part in _OURS for name, path in _prefixed(root, part)}
    needed = [name for name in names if name.partition("/")[0] not in _NOT_RUN]
    return {name: root / name for name in needed if (root / name).is_file()}


def _prefixed(root: Path, part: str) -> Iterable[tuple[str, Path]]:
    if (root / part).is_file():
        return [(part, root / part)]
    return [(f"{part}/{name}", path) for name, path in _below(root / part).items()]


def _below(folder: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(folder)): path
        for path in folder.rglob("*")
        if path.is_file() and _CACHE not in path.parts[len(folder.parts) :]
    }


def _named_modules(spec: RunSpec) -> Iterator[Path]:
    """Yield packages and modules that the config names by import path and that no package manager has installed."""
    for _, word in values_under(spec, FUNCTION):
        top = word.partition(":")[0].partition(".")[0]
        module = _module(top) if top.isidentifier() else None
        if module is None:
            continue
        places = [*(module.submodule_search_locations or []), *([module.origin] if module.origin else [])]
        path = Path(places[0]).absolute() if places else None
        if path is not None and path.exists() and not _is_installed(path):
            yield path


def _module(name: str) -> ModuleSpec | None:
    """Find a module as `python -m launcher` does: the command `launcher` has no working directory on its path."""
    return importlib.util.find_spec(name) or PathFinder.find_spec(name, [str(Path.cwd())])


def _is_installed(path: Path) -> bool:
    homes = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
    in_packages = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(in_packages) or any(path.resolve().is_relative_to(home) for home in homes)
