"""The calls of huggingface_hub, and its errors in our words.

The user's own token is found by huggingface_hub itself (HF_TOKEN, or the file that `hf auth login` writes). It is
never read here, and messages quote neither requests nor answers.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from launcher.contract.errors import HubError, is_storage_fault
from launcher.contract.hub_cache import Repository, Snapshot

_SECONDS = 10.0
"""How long the hub may take to answer."""


class HubUnreachable(HubError):
    """The hub did not answer; what the cache holds may do."""


def ask(repository: Repository, revision: str) -> tuple[str, Mapping[str, int]]:
    """Return the commit of a revision, and file -> bytes.

    Raise HubError where the repository or the revision does not exist or is not for this user, HubUnreachable where
    the hub does not answer.
    """
    with _our_errors(repository, revision):
        from huggingface_hub import HfApi

        hub = HfApi(endpoint=_endpoint())
        info_of = hub.model_info if repository.kind == "model" else hub.dataset_info
        info = info_of(repository.id, revision=revision, timeout=_SECONDS, files_metadata=True)
    if info.sha is None:
        raise HubError(f"the hub names no commit of {repository.id} ({revision})")
    files = [file for file in info.siblings or () if _stays_inside(file.rfilename)]
    return info.sha, {file.rfilename: file.size or 0 for file in files}


def fetch(snapshot: Snapshot, names: Sequence[str], *, quiet: bool = False) -> None:
    """Fetch files of a snapshot into its cache, with a progress bar unless `quiet`.

    A cut connection goes on where it was; files that are there already are not fetched again.
    """
    with _our_errors(snapshot.repository, snapshot.commit), _without_bars() if quiet else contextlib.nullcontext():
        from huggingface_hub import snapshot_download

        snapshot_download(
            snapshot.repository.id,
            repo_type=snapshot.repository.kind,
            revision=snapshot.commit,
            cache_dir=snapshot.cache,
            allow_patterns=[glob.escape(name) for name in names],
            endpoint=_endpoint(),
        )
    missing = [name for name in names if not (snapshot.path / name).is_file()]
    if missing:
        raise HubError(f"{snapshot}: {', '.join(missing[:3])} did not come; try again")


def _stays_inside(name: str) -> bool:
    """Return whether a name that a hub gives to a file cannot lead out of the snapshot's folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Show no progress bars: those of small files would only flash up."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None  # huggingface_hub reads it only once, when it is imported


@contextlib.contextmanager
def _our_errors(repository: Repository, revision: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into HubError."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise HubUnreachable(
            "huggingface_hub is not installed; pip install 'slurm-sft-launcher[hub]' (or huggingface_hub)"
        ) from None
    what = f"{repository.kind} {repository.id}"
    # The base classes of its own error are those of its HTTP library, which is not the same in all versions.
    network: tuple[type[BaseException], ...] = (*errors.HfHubHTTPError.__bases__, OSError)
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{what} is gated: accept its conditions on the hub (/{repository.page}), then log in with "
            "`hf auth login`, or export HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{what} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise HubError(_absent(what)) from None
    except errors.LocalEntryNotFoundError as error:
        raise HubUnreachable(f"the hub cannot be reached ({_cause(error)})") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        if code == 401:  # the real hub's answer where there is no such repository, too
            raise HubError(_absent(what)) from None
        if code == 403:
            raise HubError(f"{what}: the token that the hub was given does not allow reading it") from None
        raise HubUnreachable(f"the hub answered with status {code}") from None
    except network as error:
        if isinstance(error, OSError) and is_storage_fault(error):
            raise  # a full disk or a cache that cannot be written, which has words and an exit code of its own
        raise HubUnreachable(f"the hub cannot be reached ({_cause(error)})") from None


def _absent(what: str) -> str:
    return (
        f"the hub has no {what}, or it is private; check the name, or log in with `hf auth login` or a valid HF_TOKEN"
    )


def _cause(error: BaseException) -> str:
    """Return the name of the error beneath: its text may quote the request."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
