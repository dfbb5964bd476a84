"""The file of metrics.prometheus, as Prometheus's own parser reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher.__main__ import main
from launcher.attempts.attempt import main as attempt
from launcher.contract.config.load import load_config
from launcher.contract.errors import ConfigError
from launcher.contract.prometheus_file import Standing, write_prometheus
from launcher.contract.rundir import RunPaths, append_event, append_line, write_json
from launcher.contract.spec import MetricsSpec, RunSpec, sealed

ROOT = Path(__file__).parents[3]
PROGRESS = {
    "attempt": "7.0",
    "step": 20,
    "max_steps": 50,
    "loss": 1.5,
    "grad_norm": 0.25,
    "lr": 1e-5,
    "mfu": 0.4,
    "tokens_per_second": 1000.0,
    "consumed_examples": 160,
    "eta_seconds": 30.0,
    "time": 1.0,
}


def read(file: Path) -> dict[str, float]:
    """Name and set of every sample -> its value. Every one is of the run `first`."""
    found = {}
    for family in text_string_to_metric_families(file.read_text()):
        for sample in family.samples:
            assert sample.labels["run"] == "first"
            found[f"{sample.name} {sample.labels.get('set', '')}".strip()] = sample.value
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "first")
    paths.logs.mkdir(parents=True)
    append_event(paths, "attempt_started", attempt="7.0", job_id="7")
    append_event(paths, "bad_step", attempt="7.0", step=3)
    append_line(paths.metrics, {"step": 10, "eval_loss": 3.0})
    append_line(paths.metrics, {"step": 20, "eval_loss": 2.0, "eval_loss/math": 4.0})
    write_json(paths.progress, PROGRESS)
    return paths


def spec_of(run: RunPaths, prometheus: str | None) -> RunSpec:
    return RunSpec(name="first", run_root=str(run.root.parent), metrics=MetricsSpec(prometheus=prometheus))


def test_numbers(run: RunPaths) -> None:
    write_prometheus(spec_of(run, "true"), run, Standing(attempt="7.0", active=True))
    numbers = read(run.prometheus)
    assert numbers.pop("sft_updated_timestamp_seconds") > 1.7e9
    assert numbers == {
        "sft_run_info": 1,
        "sft_run_active": 1,
        "sft_attempts_total": 1,
        "sft_bad_steps_total": 1,
        "sft_step": 20,
        "sft_max_steps": 50,
        "sft_loss": 1.5,
        "sft_grad_norm": 0.25,
        "sft_learning_rate": 1e-5,
        "sft_tokens_per_second": 1000,
        "sft_mfu_ratio": 0.4,
        "sft_eta_seconds": 30,
        "sft_consumed_examples": 160,
        "sft_eval_loss": 2,
        "sft_eval_loss math": 4,
    }
    assert sorted(run.root.glob("*.prom*")) == [run.prometheus]


def test_the_page_has_every_name() -> None:
    page = (ROOT / "docs" / "how-to" / "dashboards.md").read_text()
    source = (ROOT / "launcher" / "contract" / "prometheus_file.py").read_text()
    names = {word.strip('"') for word in source.replace("(", " ").replace(",", " ").split() if word.startswith('"sft_')}
    assert len(names) > 12
    ends = {"sft_run": "_info", "sft_attempts": "_total", "sft_bad_steps": "_total"}
    assert {name for name in names if f"`{name}{ends.get(name, '')}`" not in page} == set()


def test_another_folder_and_none(run: RunPaths, tmp_path: Path) -> None:
    write_prometheus(spec_of(run, str(tmp_path / "site")), run, Standing(attempt="7.0", active=False, exit_code=76))
    numbers = read(tmp_path / "site" / "first.prom")
    assert (numbers["sft_run_active"], numbers["sft_run_exit_code"]) == (0, 76)
    for off in (None, "false"):
        write_prometheus(spec_of(run, off), run, Standing(attempt="7.0", active=False))
    assert not run.prometheus.exists()


@pytest.mark.handmade_records
def test_an_attempt_begins_and_ends_in_it(run: RunPaths, tmp_path: Path) -> None:
    run.config.write_text(sealed(spec_of(run, "true")))
    words = [str(run.root), "--attempt=local-1", "--job-id=7", "--pid=1"]
    assert attempt(["begin", *words]) == 0
    assert read(run.prometheus)["sft_run_active"] == 1
    assert attempt(["end", *words, "--exit-code=1"]) == 0
    numbers = read(run.prometheus)
    assert (numbers["sft_run_active"], numbers["sft_run_exit_code"]) == (0, 1)
    run.config.write_text(sealed(spec_of(run, "/proc/nowhere")))
    assert attempt(["begin", *words]) == 0  # a dashboard is not worth a run


def test_the_setting(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def file(*words: str) -> Path | None:
        return load_config(Path("cfg.yaml"), words).spec.prometheus_file

    assert file() is None
    assert file("metrics.prometheus=true") == workdir / "runs" / "first" / "metrics.prom"
    assert file("metrics.prometheus=site") == workdir / "site" / "first.prom"
    assert file("metrics.prometheus=false") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"metrics.prometheus: needs the package prometheus_client"):
        file("metrics.prometheus=true")
    assert main(["validate", "cfg.yaml"]) == 0
