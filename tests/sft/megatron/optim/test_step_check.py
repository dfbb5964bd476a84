"""The verdict on a step, from its loss and gradient norm."""

from __future__ import annotations

import json

import pytest
import torch

from sft.megatron.optim.step_check import StepJudge


def verdict(judge: StepJudge, loss: float, norm: float) -> bool:
    return bool(judge(torch.tensor(loss), torch.tensor(norm, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("loss", "norm", "bad"),
    [
        (1.0, 1.0, False),
        (float("nan"), 1.0, True),
        (float("inf"), 1.0, True),
        (1.0, float("nan"), True),
        (1.0, float("inf"), True),
        (1.0, 1e30, False),
    ],
)
def test_what_is_not_finite_is_bad(loss: float, norm: float, bad: bool) -> None:
    assert verdict(StepJudge(None), loss, norm) is bad
    assert verdict(StepJudge(2.0), loss, norm) is bad


def test_spikes_are_bad_after_ten_good_steps() -> None:
    judge = StepJudge(3.0)
    assert [verdict(judge, 1.0, norm) for norm in (9.0, *[1.0] * 8)] == [False] * 9
    assert not verdict(judge, 1.0, 100.0)  # the tenth
    judge = StepJudge(3.0)
    assert [verdict(judge, 1.0, 1.0) for _ in range(10)] == [False] * 10
    assert [verdict(judge, 1.0, norm) for norm in (2.9, 3.9, 3.9, 1.0)] == [False, True, True, False]


def test_bad_steps_leave_the_mean_alone() -> None:
    judge = StepJudge(2.0)
    for _ in range(10):
        verdict(judge, 1.0, 1.0)
    before = judge.state()
    assert verdict(judge, 1.0, 50.0)
    assert verdict(judge, 1.0, float("nan"))
    assert judge.state() == before


def test_state_survives_json() -> None:
    first, second = StepJudge(2.0), StepJudge(2.0)
    for norm in (1.0, 0.3, 0.7):
        verdict(first, 1.0, norm)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
