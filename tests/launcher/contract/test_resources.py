"""Where templates and cluster files are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract import resources
from launcher.contract.config.load import load_config
from launcher.contract.errors import TemplateError

CHECKOUT = Path(__file__).parents[3]


def test_first_match_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SFT_LAUNCHER_HOME", str(tmp_path / "mine"))
    own = [tmp_path / "mine" / "templates", tmp_path / ".config" / "slurm-sft-launcher" / "templates"]
    assert resources.search_path("templates")[:3] == [*own, CHECKOUT / "templates"]
    assert resources.find("templates", "slurm.sh.j2") == CHECKOUT / "templates" / "slurm.sh.j2"
    for folder in reversed(own):
        folder.mkdir(parents=True)
        (folder / "slurm.sh.j2").touch()
        assert resources.find("templates", "slurm.sh.j2") == folder / "slurm.sh.j2"


def test_installed_package_looks_in_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "launcher"
    (package / "templates").mkdir(parents=True)
    (package / "templates" / "slurm.sh.j2").touch()
    (tmp_path / "site-packages" / "templates").mkdir()  # of some other package
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert resources.checkout_root() is None
    assert resources.find("templates", "slurm.sh.j2").parent == package / "templates"


def test_miss_prints_the_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_LAUNCHER_HOME", str(tmp_path))
    with pytest.raises(TemplateError) as caught:
        resources.find("templates", "slrum.sh.j2")
    first, *folders = str(caught.value).splitlines()
    assert first == "template 'slrum.sh.j2' not found; did you mean 'slurm.sh.j2'?; looked for slrum.sh.j2 in:"
    assert [folder.strip() for folder in folders] == list(map(str, resources.search_path("templates")))


@pytest.mark.parametrize("path", sorted((CHECKOUT / "cluster_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cluster_file_loads_and_explains_each_key(path: Path, workdir: Path) -> None:
    overrides = ["resources.tasks_per_node=", "train.global_batch_size=16", "topology.pipeline_parallel=1"]
    assert load_config(Path("cfg.yaml"), overrides, path.stem).spec.cluster.name == path.stem
    lines = [line for line in path.read_text().splitlines() if ": " in line and not line.startswith("#")]
    assert all("#" in line for line in lines)
