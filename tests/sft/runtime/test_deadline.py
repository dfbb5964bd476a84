"""The deadline: when ranks stop by themselves before the end of their job, on a made-up clock."""

from __future__ import annotations

from sft.runtime.deadline import Deadline


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(deadline: Deadline, clock: Clock, seconds: float) -> None:
    clock.now += seconds
    deadline.step_ended()
    deadline.step_begins()


def test_room_for_one_more_step_and_a_save_is_kept() -> None:
    clock = Clock()
    deadline = Deadline(1000.0, notice_seconds=120, clock=clock)
    step(deadline, clock, 300)  # the first step warms up, and is not counted
    assert deadline.needed == 120 + Deadline.MARGIN_SECONDS
    step(deadline, clock, 40)
    step(deadline, clock, 10)
    assert deadline.needed == 40 + 120 + Deadline.MARGIN_SECONDS
    deadline.saved(30)
    deadline.saved(20)
    assert deadline.needed == 40 + 30 + Deadline.MARGIN_SECONDS
    clock.now = 1000 - deadline.needed - 1
    assert not deadline.is_due
    clock.now += 1
    assert deadline.is_due


def test_no_end_is_never_due() -> None:
    assert not Deadline.from_environ(120, {}).is_due
    assert not Deadline.from_environ(120, {"SFT_END_TIME": ""}).is_due
    assert Deadline.from_environ(120, {"SFT_END_TIME": "1"}).is_due
