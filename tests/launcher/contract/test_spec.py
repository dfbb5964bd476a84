"""A resolved config is read back as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launcher.contract.errors import ConfigError
from launcher.contract.spec import (
    DataSpec,
    LoggingSpec,
    OptimizerSpec,
    RunSpec,
    SourceSpec,
    TrainSpec,
    read_resolved,
    to_yaml,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), st.floats(allow_nan=False))
@example("${x} \\${y} ???", 1e-5)
@example("1:30:00", 1e22)
@example("\x85", 0.0)
@example("a\u2028b", 0.0)
def test_round_trip(tmp_path: Path, text: str, number: float) -> None:
    spec = RunSpec(
        name=text,
        data=DataSpec(columns={text: text}, sources={text: SourceSpec(files=[text], weight=number)}),
        train=TrainSpec(optimizer=OptimizerSpec(lr=number)),
        logging=LoggingSpec(prompts=[text]),
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(spec), encoding="utf-8")
    assert read_resolved(path) == spec


def test_edited_into_something_else(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(RunSpec()).replace("max_steps", "max_step"))
    with pytest.raises(ConfigError, match=r"config\.yaml: train\.not of a resolved config: max_step;"):
        read_resolved(path)
    path.write_text(to_yaml(RunSpec()).replace("sources: {}", "sources: []"))
    with pytest.raises(ConfigError, match=r"data\.sources\.not of a resolved config: no mapping;"):
        read_resolved(path)
    path.write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml: not of a resolved config: no mapping;"):
        read_resolved(path)


def test_config_of_an_earlier_version_has_todays_defaults(tmp_path: Path) -> None:
    spec = RunSpec(name="a", train=TrainSpec(max_steps=3))
    lines = to_yaml(spec).splitlines()
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(line for line in lines if not line.startswith(("after:", "  kernels:"))))
    assert len(path.read_text().splitlines()) == len(lines) - 2
    assert read_resolved(path) == spec
