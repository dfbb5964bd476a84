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
    is_config_of,
    read_resolved,
    sealed,
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


def test_a_resolved_config_that_lost_or_changed_a_byte_is_refused(tmp_path: Path) -> None:
    """One that was cut short was seen to be read as a shorter config, its other values defaults."""
    spec = RunSpec(name="x", train=TrainSpec(max_steps=7))
    file = tmp_path / "config.yaml"
    whole = sealed(spec)
    file.write_text(whole)
    assert read_resolved(file) == spec
    assert is_config_of(file, spec)
    for cut in [*range(0, len(whole) - 1, 97), len(whole) - 1]:
        file.write_text(whole[:cut])
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            read_resolved(file)
    content = whole.encode()
    for at in [*range(90), *range(90, len(content), 41)]:
        file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            read_resolved(file)


def test_a_resolved_config_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    spec = RunSpec(name="x")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(spec))
    assert read_resolved(file) == spec
    assert is_config_of(file, spec)
