"""A cluster file written from what Slurm says, and the problems that a check of one reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.clusters.init import Survey, best_partition, cluster_yaml
from launcher.contract.exit_codes import ExitCode
from launcher.scheduler.slurm.partitions import parse_partitions
from tests.launcher.conftest import Commands

SINFO = """\
debug*|up|30:00|2|16|64000|(null)
gpu|up|2-00:00:00|30|64|512000|gpu:h100:8(S:0-1)
gpu|up|2-00:00:00|4|48+|256000+|gpu:a100:4
gone|down|infinite|1|1|1|(null)
half a line
"""


def test_partitions_are_what_each_of_their_nodes_has() -> None:
    debug, gpu = parse_partitions(SINFO)
    assert (debug.name, debug.is_default, debug.time_limit, debug.gpus) == ("debug", True, "30:00", 0)
    assert (gpu.nodes, gpu.cpus, gpu.memory_mib, gpu.gpus, gpu.gpu_type) == (34, 48, 256000, 4, None)
    assert best_partition([debug, gpu]) is gpu
    assert best_partition([debug]) is debug


def test_file_has_a_reason_for_each_value() -> None:
    found = Survey(
        partitions=parse_partitions(SINFO), names_resolve=True, has_pyxis=True, has_apptainer=False, modules=["cuda"]
    )
    text = cluster_yaml("big", found)
    assert "  gpus_per_node: 4 " in text and "  cpus_per_task: 12 " in text and "  time: 2-00:00:00 " in text
    assert "venv, conda, pyxis" in text and "(runtime.modules): cuda" in text


def fake_slurm(commands: Commands) -> None:
    commands.add("sinfo", f"case $* in *%N*) echo no-such-host.invalid;; *) cat <<'E'\n{SINFO}E\n;; esac")
    commands.add("srun", "echo --help")
    commands.add("sbatch", "cat >/dev/null; echo 'sbatch: error: invalid gres' >&2; exit 1")


def test_init_never_overwrites(workdir: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    fake_slurm(commands)
    assert main(["cluster", "init", "big"]) == 0
    path = Path("~/.config/slurm-sft-launcher/cluster_configs/big.yaml").expanduser()
    assert "rendezvous: node_addr" in path.read_text()
    path.write_text("scheduler: slurm\n")
    assert main(["cluster", "init", "big"]) == ExitCode.CONFLICT
    assert path.read_text() == "scheduler: slurm\n"
    assert main(["cluster", "init", "../x"]) == ExitCode.BAD_INPUT


def test_check_says_all_that_is_wrong(workdir: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    fake_slurm(commands)
    folder = Path("~/.config/slurm-sft-launcher/cluster_configs").expanduser()
    folder.mkdir(parents=True)

    def wrong(text: str) -> str:
        (folder / "big.yaml").write_text(text)
        assert main(["cluster", "check", "big"]) == ExitCode.BAD_INPUT
        return capsys.readouterr().err

    assert "unknown key 'schedular'" in wrong("schedular: slurm\n")
    said = wrong(
        "scheduler: slurm\ntemplate: none.sh.j2\nruntime: {kind: pyxis, image: /no/image.sqsh}\n"
        "resources: {partition: gpu, gpus_per_node: 5, time: 3-00}\n"
    )
    for words in (
        "template: template 'none.sh.j2' not found",
        "runtime.image: /no/image.sqsh does not exist",
        "runtime.kind: pyxis: srun knows no --container-image",
        "resources.gpus_per_node: 5, and nodes of gpu have 4",
        "resources.time: 3-00 is above the limit of gpu, 2-00:00:00",
    ):
        assert words in said
    assert "'gpus' is unknown; did you mean 'gpu'?" in wrong("scheduler: slurm\nresources: {partition: gpus}\n")
    assert "invalid gres" in wrong("scheduler: slurm\nresources: {partition: gpu}\n")
    assert "is not a venv" in wrong("scheduler: slurm\nruntime: {kind: venv, path: /no}\n")
    assert "runtime.path: missing; kind venv needs its directory" in wrong("scheduler: slurm\nruntime: {kind: venv}\n")
    assert "big.yaml:2: host_directory: needs host: without it" in wrong("scheduler: slurm\nhost_directory: /work\n")
    said = wrong("scheduler: slrm\nresources: {gpus_per_node: eight}\n")  # in the words that runs are told
    assert "big.yaml:1: scheduler: 'slrm' is not one of slurm, local; did you mean 'slurm'?" in said
    assert "big.yaml:2: resources.gpus_per_node: 'eight' is not an integer" in said
