"""Rules on model.lora: settings without a rank are refused, because they would have no effect."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.contract.config.checks import spec_problems
from launcher.contract.spec import CheckpointSpec, LoraSpec, ModelSpec, RunSpec


def problems(lora: LoraSpec, init: str = "pretrained", **checkpoint: bool) -> list[tuple[str, str]]:
    spec = RunSpec(
        model=ModelSpec(lora=lora, init=init),  # type: ignore[arg-type]
        checkpoint=dataclasses.replace(CheckpointSpec(), **checkpoint),
    )
    return [problem for problem in spec_problems(spec) if "lora" in problem[0] + problem[1] or "merged" in problem[0]]


def test_none_and_all() -> None:
    assert problems(LoraSpec()) == []
    assert problems(LoraSpec(rank=8, targets=["all-linear"], rslora=True, dora=True)) == []
    assert problems(LoraSpec(rank=8, alpha=16.0, targets=["q_proj"], dropout=0.1), export_merged=True) == []


@pytest.mark.parametrize(
    ("lora", "more", "problem"),
    [
        (LoraSpec(rank=0), {}, ("model.lora.rank", "0 is not at least 1")),
        (LoraSpec(alpha=8.0), {}, ("model.lora.alpha", "8.0 needs model.lora.rank, which is unset")),
        (LoraSpec(targets=["q_proj"]), {}, ("model.lora.targets", "['q_proj'] needs model.lora.rank, which is unset")),
        (LoraSpec(dropout=0.1), {}, ("model.lora.dropout", "0.1 needs model.lora.rank, which is unset")),
        (LoraSpec(rslora=True), {}, ("model.lora.rslora", "True needs model.lora.rank, which is unset")),
        (LoraSpec(dora=True), {}, ("model.lora.dora", "True needs model.lora.rank, which is unset")),
        (LoraSpec(router=True), {}, ("model.lora.router", "True needs model.lora.rank, which is unset")),
        (
            LoraSpec(rank=4, dora=True, dropout=0.1),
            {},
            (
                "model.lora.dora",
                "with model.lora.dropout 0.1 each layer's own product would have to be computed a second time, of "
                "dropped inputs; set model.lora.dropout to 0",
            ),
        ),
        (
            LoraSpec(rank=4, targets=["all-linear", "q_proj"]),
            {},
            ("model.lora.targets", "all-linear stands for every linear layer; drop it or the other names"),
        ),
        (LoraSpec(rank=4, dropout=1.0), {}, ("model.lora.dropout", "1 is not in [0, 1)")),
        (LoraSpec(rank=4, alpha=0.0), {}, ("model.lora.alpha", "0 is not above 0")),
        (
            LoraSpec(rank=4, targets=["q_proj", "q_proj"]),
            {},
            ("model.lora.targets", "['q_proj', 'q_proj'] names a layer twice"),
        ),
        (
            LoraSpec(),
            {"export_merged": True},
            ("checkpoint.export_merged", "True needs model.lora.rank, which is unset"),
        ),
        (
            LoraSpec(rank=4),
            {"export_merged": True, "export": False},
            ("checkpoint.export_merged", "needs checkpoint.export: true"),
        ),
        (
            LoraSpec(rank=4),
            {"init": "random"},
            (
                "model.init",
                "random with model.lora.rank: adapters need weights to adapt, and only they are saved",
            ),
        ),
    ],
)
def test_refusals(lora: LoraSpec, more: dict[str, object], problem: tuple[str, str]) -> None:
    assert problems(lora, **more) == [problem]  # type: ignore[arg-type]


def test_scale() -> None:
    assert [LoraSpec(rank=8).scale, LoraSpec(rank=8, alpha=4.0).scale, LoraSpec().scale] == [1.0, 0.5, 1.0]
