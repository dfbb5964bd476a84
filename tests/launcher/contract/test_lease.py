"""The lease of a run directory: who may take it, renew it, and take it over."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path

import pytest

from launcher.contract import lease
from launcher.contract.errors import RunStateError
from launcher.contract.job_state import JobState
from launcher.contract.lease import (
    EXPIRY_SECONDS,
    Keeper,
    Owner,
    check_free,
    held,
    holder,
    release,
    renew,
    take,
    why_void,
)
from launcher.contract.rundir import RunPaths

FIRST = Owner(attempt="7.0", job_id="7", host="n1", pid=1)
AGAIN = Owner(attempt="7.1", job_id="7", host="n2", pid=1)
OTHER = Owner(attempt="8.0", job_id="8", host="n3", pid=1)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def test_second_writer_refuses_and_says_who_holds_it(run: RunPaths) -> None:
    assert take(run, FIRST) is None
    with pytest.raises(RunStateError, match=r"held by attempt 7\.0 \(job 7\) on n1"):
        take(run, OTHER)
    with pytest.raises(RunStateError, match="held by"):
        take(run, OTHER, JobState.RUNNING)
    assert take(run, FIRST) is None
    assert holder(run) == FIRST
    release(run, OTHER)
    assert holder(run) == FIRST
    release(run, FIRST)
    assert not list(run.root.iterdir())


def test_same_job_started_again_takes_over_but_not_back(run: RunPaths) -> None:
    take(run, FIRST)
    assert "its job was started again" in str(take(run, AGAIN))
    assert not renew(run, FIRST)
    with pytest.raises(RunStateError):
        take(run, FIRST)
    assert list(run.root.iterdir()) == [run.lease]


def test_ranks_started_again_in_place_follow_in_order(run: RunPaths) -> None:
    names = ("7.0", "7.0-2", "7.0-10", "7.1", "7.1-1")
    owners = [Owner(attempt=name, job_id="7") for name in names]
    for earlier, later in itertools.pairwise(owners):
        assert why_void(earlier, later, 0.0, JobState.RUNNING) == "its job was started again"
        assert why_void(later, earlier, 0.0, JobState.RUNNING) is None


def test_a_look_at_the_lease_before_a_write(run: RunPaths) -> None:
    """An old look is no look; and nothing brings back a lease that was lost."""
    take(run, FIRST)
    keeper = Keeper(run, FIRST)
    keeper.confirm()
    take(run, AGAIN)
    keeper.confirm(max_age=60.0)
    for _ in range(2):
        with pytest.raises(RunStateError, match=r"7\.0 writes no more"):
            keeper.confirm()
    release(run, AGAIN)
    with pytest.raises(RunStateError):
        keeper.confirm(max_age=60.0)


def test_owner_known_to_be_gone(run: RunPaths) -> None:
    assert why_void(FIRST, OTHER, 0.0, JobState.COMPLETED) == "its job is COMPLETED"
    assert why_void(FIRST, OTHER, EXPIRY_SECONDS + 1, JobState.RUNNING) is None
    assert why_void(FIRST, OTHER, EXPIRY_SECONDS - 1) is None
    assert why_void(FIRST, OTHER, EXPIRY_SECONDS + 1) is not None
    me = Owner.of_process("local-2")
    dead = Owner(attempt="local-1", host=me.host, pid=2**22 + 1, process_start=5)
    assert why_void(dead, me, 0.0) == "its process is gone"
    assert why_void(me, dead, 0.0) is None


def test_age_is_that_of_the_file_system(run: RunPaths) -> None:
    take(run, FIRST)
    old = time.time() - EXPIRY_SECONDS - 60
    os.utime(run.lease, (old, old))
    assert renew(run, FIRST)
    with pytest.raises(RunStateError):
        take(run, OTHER)
    os.utime(run.lease, (old, old))
    assert "not renewed for" in str(take(run, OTHER))


def test_of_many_claimants_one_gets_it(run: RunPaths) -> None:
    """A void lease is there, and all find it void at the same time."""
    take(run, FIRST)
    won: list[int] = []
    gate = threading.Barrier(8)

    def claim(number: int) -> None:
        gate.wait()
        try:
            take(run, Owner(attempt=f"{number}.0", job_id=str(number), host="n", pid=1))
        except RunStateError:
            return
        won.append(number)

    old = time.time() - EXPIRY_SECONDS - 60
    os.utime(run.lease, (old, old))
    threads = [threading.Thread(target=claim, args=(number,)) for number in range(10, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert holder(run) == Owner(attempt=f"{won[0]}.0", job_id=str(won[0]), host="n", pid=1)


def test_keeper_renews_and_notices_a_loss(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    take(run, FIRST)
    os.utime(run.lease, (0, 0))
    keeper = Keeper(run, FIRST)
    keeper.start()
    deadline = time.monotonic() + 20
    while run.lease.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run.lease.stat().st_mtime > 0
    assert not keeper.lost
    take(run, AGAIN)
    while not keeper.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert keeper.lost
    keeper.stop()


def test_ranks_by_hand_hold_what_no_script_holds(run: RunPaths) -> None:
    with held(run, "by-hand"):
        assert holder(run) == Owner.of_process("by-hand")
    assert holder(run) is None
    take(run, FIRST)
    with held(run, "7.0"):
        assert holder(run) == FIRST
    assert holder(run) == FIRST, "the batch script lets go of its own"
    with pytest.raises(RunStateError), held(run, "by-hand"):
        pass


def test_lease_that_was_never_filled_counts_until_it_is_old(run: RunPaths) -> None:
    run.lease.touch()
    with pytest.raises(RunStateError, match="held by attempt unknown"):
        take(run, FIRST)
    os.utime(run.lease, (0, 0))
    assert take(run, FIRST) is not None


def test_a_job_of_another_cluster_is_another_job(tmp_path: Path) -> None:
    """Its restart count says nothing of ours, although the ids are the same."""
    far = Owner(attempt="7.0", job_id="7", cluster="far", host="n", pid=1)
    assert why_void(far, Owner(attempt="7.1", job_id="7", cluster="far", host="m", pid=2), 1.0) is not None
    assert why_void(far, Owner(attempt="7.1", job_id="7", cluster="near", host="m", pid=2), 1.0) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", '{"attempt": 5}', '{"attempt": "a", "pid": "x"}', '{"attempt": "a", "job_id": null}', "[" * 99_999],
)
def test_a_damaged_lease_is_somebodys(tmp_path: Path, text: str) -> None:
    """An attempt that is no text was seen to be a traceback."""
    paths = RunPaths(tmp_path)
    paths.lease.write_text(text)
    owner = holder(paths)
    assert owner is not None and owner.attempt == "unknown"
    with pytest.raises(RunStateError, match="is held by attempt unknown"):
        check_free(paths)
