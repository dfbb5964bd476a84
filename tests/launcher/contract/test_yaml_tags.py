"""Tags of YAML: standard ones that are true change nothing, all others are refused with file and line."""

from __future__ import annotations

import pytest

from launcher.contract.config.yaml_leaves import read_yaml
from launcher.contract.errors import ConfigError
from launcher.contract.spec import RunSpec
from launcher.contract.yaml_document import compose


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("!half 2", "the tag !half means nothing in a config, and '2' would be read without it"),
        ("!!python/tuple [1, 2]", "the tag !!python/tuple means nothing in a config, and a list or mapping would"),
        ("!!python/name:os.system ''", "the tag !!python/name:os.system means nothing"),
        ("!!binary aGVsbG8=", "the tag !!binary means nothing"),
        ("!!set {a, b}", "the tag !!set means nothing"),
        ("!!str [a]", "the tag !!str means nothing"),
        ('!!float "x"', "!!float says what 'x' is not; correct the value, or remove the tag"),
        ("!!int 2.5", "!!int says what '2.5' is not"),
        ('!!int ""', "!!int says what '' is not"),
        ("!!bool 3", "!!bool says what '3' is not"),
        ("!!null 3", "!!null says what '3' is not"),
        ("[1, !half 2]", "the tag !half"),
        ("{a: {b: !half 2}}", "the tag !half"),
    ],
)
def test_a_tag_that_nothing_reads_is_refused(value: str, why: str) -> None:
    """Seen to be ignored: half of 2 was 2, and a null that says 3 was null."""
    with pytest.raises(ConfigError) as caught:
        read_yaml(f"name: a\ntrain:\n  max_steps: {value}\n", "cfg.yaml", RunSpec, "file")
    assert str(caught.value).startswith(f"cfg.yaml:3: {why}")


def test_a_tag_of_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cfg\.yaml:2: the tag !old means nothing"):
        read_yaml("name: a\n!old run_root: b\n", "cfg.yaml", RunSpec, "file")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("!!str 5", "5"),
        ("!!str null", "null"),
        ("!!int 5", "5"),
        ('!!int "5"', "5"),
        ("!!float 5", "5"),
        ("!!float 1e-5", "1e-5"),
        ("!!bool yes", "yes"),
        ("!!null", None),
        ("! 5", "5"),
        ("2024-13-45", "2024-13-45"),
        ("1:99", "1:99"),
    ],
)
def test_standard_tags_that_are_true_change_nothing(value: str, read: str | None) -> None:
    leaves = read_yaml(f"name: {value}\n", "cfg.yaml", RunSpec, "file")
    assert (leaves.problems, leaves.values["name"].value) == ([], read)


def test_tagged_collections_of_their_own_kind_are_read() -> None:
    assert compose("!!map {a: !!seq [1], b: =, <<: {}}", "cfg.yaml") is not None
