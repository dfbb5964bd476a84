"""Batch scripts: golden files, their syntax, and the quoting of values."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launcher.contract.config.load import load_config
from launcher.contract.errors import TemplateError
from launcher.contract.lease import Owner, take
from launcher.contract.rundir import RunPaths, read_lines, write_json
from launcher.contract.spec import (
    CheckpointSpec,
    ClusterSpec,
    DataSpec,
    ModelSpec,
    NotifySpec,
    ResourcesSpec,
    RestartSpec,
    RunSpec,
    RuntimeSpec,
    TopologySpec,
    TrainSpec,
)
from launcher.contract.topology import build_topology
from launcher.submission import intent
from launcher.submission.render_script import render, sbatch
from tests.launcher.conftest import Commands

GOLDEN = Path(__file__).parents[2] / "golden"
SITES = ("slurm-dev", "site-gres-modules", "site-pyxis", "site-apptainer")
RUNTIMES = {
    "none": RuntimeSpec(),
    "venv": RuntimeSpec(kind="venv", path="/home/me/my venv"),
    "conda": RuntimeSpec(kind="conda", path="sft", modules=["cuda/12.8"]),
    "apptainer": RuntimeSpec(kind="apptainer", image="/images/sft.sif", mounts=["/scratch:/scratch"]),
}
TOPOLOGIES = {
    "dp8": TopologySpec(),
    "tp2-pp2": TopologySpec(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
    "pp4": TopologySpec(pipeline_parallel=4),
}
ROOT = Path("/shared/runs/demo")


def make_spec(**changes: Any) -> RunSpec:
    """A run of two GPU nodes with four ranks each."""
    spec = RunSpec(
        name="demo",
        run_root="/shared/runs",
        model=ModelSpec(path="/models/llama"),
        data=DataSpec(train=["/data/a.jsonl", "/data/b.jsonl"], validation=["/data/held/out.jsonl"]),
        train=TrainSpec(max_steps=10, global_batch_size=8),
        topology=TopologySpec(tensor_parallel=4),
        resources=ResourcesSpec(nodes=2, gpus_per_node=4, cpus_per_task=8, time="01:00:00"),
    )
    return dataclasses.replace(spec, **changes)


def script(spec: RunSpec, root: Path = ROOT, source_root: Path | None = None) -> str:
    return render(spec, build_topology(spec, None), RunPaths(root), "/opt/python", source_root)


def golden_scripts() -> dict[str, RunSpec]:
    specs = {}
    for name, runtime in RUNTIMES.items():
        cluster = ClusterSpec(runtime=runtime)
        specs[f"local-{name}"] = make_spec(cluster=cluster, resources=ResourcesSpec(tasks_per_node=4))
        specs[f"slurm-{name}"] = make_spec(cluster=ClusterSpec(name="c", scheduler="slurm", runtime=runtime))
    slurm = ClusterSpec(name="c", scheduler="slurm")
    pyxis = RuntimeSpec(kind="pyxis", image="registry.example/sft:1", mounts=["/scratch:/scratch"])
    specs["slurm-pyxis"] = make_spec(cluster=dataclasses.replace(slurm, runtime=pyxis))
    for name, topology in TOPOLOGIES.items():
        specs[f"slurm-{name}"] = make_spec(cluster=slurm, topology=topology)
        on_cpu = ResourcesSpec(nodes=1, tasks_per_node=8)
        specs[f"local-{name}"] = make_spec(topology=topology, resources=on_cpu)
    everything = ResourcesSpec(
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=8,
        memory_per_node="0",
        time="1-00:00:00",
        partition="gpu",
        account="a b",
        qos="high",
        constraint="h100&ib",
        reservation="r",
        nodelist="n[1-4]",
        exclude="n3",
        exclusive=True,
        signal_seconds=60,
        extra_sbatch=["--mail-type=END", '--comment=it\'s "a" # \\ comment'],
    )
    cluster = ClusterSpec(scheduler="slurm", gpu_directive="gpus_per_task", gpu_type="h100", env={"A": "$x 'y'"})
    specs["slurm-everything"] = make_spec(
        cluster=cluster,
        resources=everything,
        notify=NotifySpec(email="me@example.org"),
        checkpoint=CheckpointSpec(export=False),
    )
    specs["slurm-in-place"] = make_spec(
        cluster=dataclasses.replace(slurm, srun_args=["--mpi=none"]),
        resources=dataclasses.replace(make_spec().resources, spare_nodes=1),
        restart=RestartSpec(how="in_place"),
    )
    return specs


def site_spec(site: str, workdir: Path) -> RunSpec:
    overrides = ["name=demo", "resources.tasks_per_node=", "topology.pipeline_parallel=1", "train.global_batch_size=16"]
    spec = load_config(workdir / "cfg.yaml", overrides, site).spec
    return dataclasses.replace(
        make_spec(),
        cluster=spec.cluster,
        train=spec.train,
        topology=spec.topology,
        resources=dataclasses.replace(spec.resources, nodes=2),
    )


def compare(name: str, text: str) -> None:
    """UPDATE_GOLDEN=1 writes the files anew; read the difference before you commit it."""
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def check_syntax(text: str) -> None:
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", golden_scripts())
def test_golden(name: str) -> None:
    spec = golden_scripts()[name]
    check_syntax(script(spec))
    compare(name, script(spec))
    assert script(spec) == script(spec)


@pytest.mark.parametrize("site", SITES)
def test_golden_of_cluster_files(site: str, workdir: Path) -> None:
    spec = site_spec(site, workdir)
    check_syntax(script(spec))
    compare(site, script(spec))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: shellcheck)")
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sh")), ids=lambda path: path.stem)
def test_shellcheck(path: Path) -> None:
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


REQUEUE = """\
job_id=7
sleep() { :; }
scontrol() {
  if [ "$1" = show ]; then [ "$calls" -le 2 ] || echo "JobState=$STATE"; return; fi
  calls=$((calls + 1))
  echo "$*"
  [ "$1" = update ] || [ "$calls" -gt "$FAILURES" ]
}
calls=0
follow 75 requeue node2
"""


@pytest.mark.parametrize(
    ("failures", "state", "said"),
    [
        (0, "RUNNING", ["requeue 7", "update JobId=7 ExcNodeList=node2"]),
        (2, "RUNNING", ["requeue 7"] * 3 + ["update JobId=7 ExcNodeList=node2"]),  # no controller for a while
        (9, "RUNNING", ["requeue 7"] * 3 + ["requeueing is not allowed here; a new job goes on", "sbatch node2"]),
        (9, "CANCELLED", ["requeue 7"] * 3),
    ],
)
def test_a_requeue_outlasts_an_absent_controller(failures: int, state: str, said: list[str]) -> None:
    text = script(make_spec(cluster=ClusterSpec(scheduler="slurm")))
    functions = text[text.index("job_view() {") : text.index("resubmit() {")]
    program = f'{functions}resubmit() {{ echo "sbatch $1"; }}\n{REQUEUE}'
    environment = {**os.environ, "FAILURES": str(failures), "STATE": state}
    done = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == said


@pytest.mark.parametrize(
    ("holder", "asked"),
    [("8", ["8"]), ("12_3", ["12_3"]), ("12_30", ["12_30"]), ("7_1", []), ("", [])],  # 7_1 is this very job
)
def test_the_scheduler_is_asked_about_the_job_that_holds_the_lease(
    tmp_path: Path, commands: Commands, holder: str, asked: list[str]
) -> None:
    commands.add("squeue", "echo RUNNING")
    take(RunPaths(tmp_path), Owner(attempt=f"{holder}.0", job_id=holder))
    text = script(make_spec(cluster=ClusterSpec(scheduler="slurm")))
    function = text[text.index("holder_state() {") : text.index("nodes_down() {")]
    program = f"run_dir={tmp_path}\njob_id=7_1\n{function}holder_state"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert [call.split("--jobs=")[1].split()[0] for call in commands.calls("squeue")] == asked
    assert done.stdout == "RUNNING\n" * len(asked)


def in_place_script() -> str:
    return script(golden_scripts()["slurm-in-place"])


def test_what_is_left_of_ranks_on_a_node_is_ended() -> None:
    """Also a stopped process; not that of another job or node. This machine stands for both nodes."""
    text = in_place_script()
    sweep = text[text.index("sweep=") : text.index("nodes_in() {")]
    job = f"test-{os.getpid()}"

    def start(of: str, node: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "SFT_RANKS_OF": of, "SLURMD_NODENAME": node}
        process = subprocess.Popen(["sleep", "60"], env=environment)
        while b"sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():  # then it has its environment, too
            time.sleep(0.01)
        return process

    left = [start(job, "n1"), start(job, "n1")]
    others = [start(job, "n2"), start(f"{job}1", "n1")]
    try:
        left[0].send_signal(signal.SIGSTOP)
        reaper = threading.Thread(target=lambda: [process.wait() for process in left])
        reaper.start()
        look = f'{sweep}\nbash -c "$sweep" bash {job}'
        done = subprocess.run(
            ["bash", "-uc", look], env={**os.environ, "SLURMD_NODENAME": "n1"}, capture_output=True, text=True
        )
        reaper.join()
        assert (done.returncode, done.stdout, done.stderr) == (0, "n1\n", "")
        assert [process.returncode for process in left] == [-signal.SIGKILL] * 2
        assert [process.poll() for process in others] == [None, None]
    finally:
        for process in (*left, *others):
            process.kill()
            process.wait()


def run_functions(text: str, program: str, seconds: float = 30.0) -> str:
    """Run bash with the functions of a script, up to where it takes the run, and return what it prints."""
    functions = text[text.index("host_args=(") : text.index("\nlight_process -m launcher.attempts.attempt begin")]
    functions = functions.removesuffix("watch_this_node")
    whole = f"set -uo pipefail\njob_id=7 SFT_ATTEMPT=7.0 node_list=n1,n2\n{functions}\n{program}"
    done = subprocess.run(["bash", "-c", whole], capture_output=True, text=True, timeout=seconds, check=True)
    return done.stdout


LOOK = """\
allocated=(n1 n2 n3 n4 n5)
look=()
look_at_nodes
printf '%s\\n' "${look[@]}"
"""


def test_nodes_that_answer_are_usable(commands: Commands) -> None:
    """Of five one is down, one hangs, and one cannot end a process."""
    spec = golden_scripts()["slurm-in-place"]
    spec = dataclasses.replace(spec, restart=RestartSpec(how="in_place", node_seconds=1))
    commands.add("scontrol", "echo 'JobId=7 JobState=RUNNING'")
    commands.add("sinfo", 'case "$*" in *states=down,fail*) echo n4 ;; *states=drain*) echo n5; echo n5 ;; esac')
    answer = 'n2) sleep 60 ;; n3) exit 1 ;; *) echo "$node" ;; esac'
    commands.add("srun", f"given=$*; node=${{given#*--nodelist=}}; node=${{node%% *}}; case $node in {answer}")
    said = run_functions(script(spec), LOOK).splitlines()
    words = dict(zip(said[1::2], said[2::2], strict=True))
    assert sorted(words.pop("--nodes-usable").split(",")) == ["n1", "n5"]
    assert words == {"--nodes": "n1,n2,n3,n4,n5", "--nodes-used": "n1,n2", "--nodes-draining": "n5"}
    asked = [call for call in commands.calls("srun") if "--nodelist=" in call]
    assert len(asked) == 4
    commands.add("scontrol", "echo 'JobId=7 JobState=COMPLETING'")  # such a job is over
    assert run_functions(script(spec), LOOK).split() == []


def copying_script() -> str:
    spec = golden_scripts()["slurm-in-place"]
    return script(dataclasses.replace(spec, checkpoint=dataclasses.replace(spec.checkpoint, copy_every=5)))


def test_copies_in_memory_go_with_the_start_of_the_job(commands: Commands) -> None:
    """On this node even where Slurm starts nothing any more, and on all others."""
    commands.add("srun", "")
    job = f"test{os.getpid()}"
    folders = [Path(f"/dev/shm/sft-copies-0-{start}-abc-n1") for start in (f"{job}.2", f"{job}.21", f"{job}1.2")]
    try:
        for folder in folders:
            folder.mkdir()
            (folder / "run").write_text("")
        beside = "sleep 60 >/dev/null & guards=$!"  # which is not waited for
        drop = f"allocated=(n1 n2) job_id={job} SLURM_RESTART_COUNT=2\n{beside}\ndrop_copies\nkill $guards"
        run_functions(copying_script(), drop)
        assert [folder.exists() for folder in folders] == [False, True, True]
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    asked = [call for call in commands.calls("srun") if "sft-copies" in call]
    assert len(asked) == 2
    assert all(f"--nodelist={node} " in "".join(asked) for node in ("n1", "n2"))
    assert all(call.endswith(f" bash {job}.2") for call in asked)


@pytest.mark.parametrize(
    ("end", "dropped"),
    [("1 stop", True), ("0 stop", True), ("1 requeue", True), ("75 requeue", False), ("1 in_place 7.0-1 n1,n2", False)],
)
def test_copies_in_memory_stay_for_a_restart_in_place(end: str, dropped: bool, commands: Commands) -> None:
    """Ranks that exit with 75 have removed them, and at a time limit no second is left."""
    commands.add("scontrol", "")
    program = f"drop_copies() {{ echo dropped; }}\nstart_again() {{ :; }}\nfollow {end}"
    assert run_functions(copying_script(), program).split() == ["dropped"] * dropped


@pytest.mark.parametrize(
    ("view", "done"),
    [
        ("JobState=RUNNING Restarts=0 NodeList=n2,n3 BatchHost=n1 NumNodes=2", ["requeue 7"]),
        ("JobState=RUNNING Restarts=0 NodeList=n10,n2 BatchHost=n1 NumNodes=2", ["requeue 7"]),
        ("JobState=RUNNING Restarts=0 NodeList=n1,n3 BatchHost=n1 NumNodes=2", []),
        ("JobState=RUNNING Restarts=1 NodeList=n2,n3 BatchHost=n1 NumNodes=2", []),  # another start of the job
        ("JobState=COMPLETING Restarts=0 NodeList=n2,n3 BatchHost=n1 NumNodes=2", []),
        ("slurm_load_jobs error: Unable to contact slurm controller", []),
    ],
)
def test_a_job_that_has_lost_the_node_of_its_script_is_requeued(
    view: str, done: list[str], tmp_path: Path, commands: Commands
) -> None:
    """The guard on another node; its time stands still after the second wait."""
    hosts = 'tr , "\\n" <<<"$3"'
    said = f"echo 'JobId=7 ReqNodeList=(null) ExcNodeList=(null) {view} '"
    commands.add("scontrol", f'case "$*" in "show job"*) {said} ;; "show hostnames"*) {hosts} ;; esac')
    commands.add("sleep", f'echo "$1" >>{tmp_path}/waits; [ "$(wc -l <{tmp_path}/waits)" -lt 3 ]')
    run_functions(in_place_script(), 'SLURM_PROCID=1 bash -c "$guard" bash 7 0 || true')
    assert [call for call in commands.calls("scontrol") if not call.startswith("show")] == done
    assert (tmp_path / "waits").read_text().split() == (["15", "60", "15"] if done else ["15"] * 3)


def test_cpu_ranks_get_nothing_of_cuda() -> None:
    spec = make_spec(cluster=ClusterSpec(scheduler="slurm"), resources=ResourcesSpec(nodes=2, tasks_per_node=4))
    assert "CUDA" not in script(spec)
    assert "gpu" not in script(spec)


def test_checkout_goes_first_on_pythonpath() -> None:
    spec = make_spec(resources=ResourcesSpec(tasks_per_node=4))
    assert "export PYTHONPATH='/a b'${PYTHONPATH:+:$PYTHONPATH}\n" in script(spec, source_root=Path("/a b"))
    assert "PYTHONPATH" not in script(spec)


def test_no_setting_takes_the_runs_own_code_from_pythonpath(tmp_path: Path) -> None:
    """With PYTHONPATH in cluster.env the ranks ran the code that is installed."""
    spec = make_spec(cluster=ClusterSpec(env={"PYTHONPATH": "/from/env"}))
    lines = script(spec, source_root=Path("/own")).splitlines()
    own = lines.index("export PYTHONPATH=/own${PYTHONPATH:+:$PYTHONPATH}")
    assert lines.index("export PYTHONPATH=/from/env") < own
    spec = make_spec(cluster=ClusterSpec(scheduler="slurm", secrets_dir=str(tmp_path)), env_from=["PYTHONPATH"])
    lines = script(spec, source_root=Path("/own")).splitlines()
    read = next(number for number, line in enumerate(lines) if line.startswith('. "$secrets"'))
    assert read < lines.index("export PYTHONPATH=/own${PYTHONPATH:+:$PYTHONPATH}")


def test_newline_is_refused() -> None:
    spec = make_spec(cluster=ClusterSpec(scheduler="slurm", env={"A": "x\ny"}))
    with pytest.raises(TemplateError, match=r"'x\\ny' holds '\\n', which cannot stand in a batch script"):
        script(spec)


def test_container_cannot_mount_a_path_with_a_colon() -> None:
    cluster = ClusterSpec(scheduler="slurm", runtime=RuntimeSpec(kind="pyxis", image="i"))
    spec = make_spec(cluster=cluster, model=ModelSpec(path="/models/a:b"))
    with pytest.raises(TemplateError, match=r"^/models/a:b: a container cannot mount a path with ':' or ','"):
        script(spec)


def test_site_template_overrides_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "templates"
    folder.mkdir()
    monkeypatch.setenv("SFT_LAUNCHER_HOME", str(tmp_path))
    spec = make_spec(cluster=ClusterSpec(scheduler="slurm", template="mine.sh.j2"))
    mine = folder / "mine.sh.j2"
    mine.write_text('{% extends "slurm.sh.j2" %}\n{% block finish %}\nrm -rf /tmp/scratch\n{% endblock %}\n')
    assert 'rm -rf /tmp/scratch\nexit "$rc"\n' in script(spec)
    mine.write_text("{{ resources.nods }}")
    with pytest.raises(TemplateError, match=r"^template mine\.sh\.j2 does not render: .* no attribute 'nods'"):
        script(spec)
    mine.write_text("\n{% if %}")
    with pytest.raises(TemplateError, match=r"^template mine\.sh\.j2:2 does not render: "):
        script(spec)
    with pytest.raises(TemplateError, match=r"^template 'main\.sh\.j2' not found; did you mean 'mine\.sh\.j2'\?"):
        script(make_spec(cluster=ClusterSpec(template="main.sh.j2")))


def test_sbatch_words() -> None:
    assert sbatch("--nodes=2") == "--nodes=2"
    assert sbatch('--comment=a "b" \\') == '"--comment=a \\"b\\" \\\\"'
    assert sbatch("") == '""'


NASTY = st.text(alphabet="a 'b\"$(){}`;&|<>*?#!~\\%é\t", min_size=1, max_size=20)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=NASTY, folder=st.text(alphabet="a 'b\"$()`;&#!~é", min_size=1, max_size=10))
@example(value="$(touch pwned)", folder="`touch pwned`")
@example(value="'; touch pwned; '", folder='"; touch pwned; "')
@example(value="\\", folder="-n")
def test_values_stay_data_when_the_script_runs(
    tmp_path: Path, workdir: Path, commands: Commands, value: str, folder: str
) -> None:
    """The script really runs, with srun, scontrol and Python replaced by scripts that write down what they get."""
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    root = tmp_path / "x" / folder.strip() / "run"
    seen = tmp_path / "x" / "seen"
    root.mkdir(parents=True)
    python = root / f"py {folder}"
    python.write_text(f'#!/bin/bash\nprintf "%s\\0" "$A" "${{@:1:4}}" >>"{seen}"\n')
    python.chmod(0o755)
    commands.add("srun", 'while [[ "$1" == -* ]]; do shift; done; SLURM_PROCID=0 SLURMD_NODENAME=n exec "$@"')
    commands.add("scontrol", "echo node1")
    spec = make_spec(
        run_root=str(root.parent),
        resources=ResourcesSpec(nodes=2, tasks_per_node=4),
        cluster=ClusterSpec(scheduler="slurm", env={"A": value}, runtime=RuntimeSpec(python=str(python))),
    )
    (root / "job.sh").write_text(script(spec, root))
    job = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_END_TIME": "4102444800"}
    done = subprocess.run(["bash", str(root / "job.sh")], cwd=workdir, env=job, capture_output=True, text=True)
    log = (root / "logs" / "7.0" / "batch.log").read_text()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), log
    words = seen.read_text().split("\0")[:-1]
    assert [words[start : start + 5] for start in range(0, len(words), 5)] == [
        [value, "-m", module, phase, where]
        for module, phase, where in (
            ("launcher.attempts.attempt", "begin", str(root)),
            ("sft", "prepare", f"{root}/config.yaml"),
            ("sft", "preflight", f"{root}/config.yaml"),
            ("sft", "train", f"{root}/config.yaml"),
            ("sft", "export", str(root)),
            ("launcher.attempts.attempt", "end", str(root)),
        )
    ]
    assert not list(tmp_path.rglob("pwned"))


def run_modules(tmp_path: Path, *modules: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Run a script up to its ranks and return its exit code and events."""
    root = tmp_path / "run"
    root.mkdir(exist_ok=True)
    runtime = RuntimeSpec(modules=list(modules), python="/bin/false")
    spec = make_spec(run_root=str(tmp_path), cluster=ClusterSpec(runtime=runtime), resources=ResourcesSpec())
    spec = dataclasses.replace(
        spec, topology=TopologySpec(), data=dataclasses.replace(spec.data, cache_dir=str(tmp_path))
    )
    program = script(spec, root)
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment}
    done = subprocess.run(["bash", "-c", program], env=clean, capture_output=True, text=True)
    return done.returncode, list(read_lines(root / "events.jsonl"))


MODULE = 'module() { [ "$2" != missing ] || { echo "no \\"$2\\""; return 3; }; echo "loaded $2"; }\n'


@pytest.mark.parametrize("variable", ["MODULESHOME", "LMOD_PKG"])
def test_modules_are_found_where_the_site_says(tmp_path: Path, variable: str) -> None:
    init = tmp_path / "modules" / "init"
    init.mkdir(parents=True)
    (init / "bash").write_text(MODULE)
    place = {variable: str(tmp_path / "modules")}
    code, told = run_modules(tmp_path, "cuda", **place)
    log = next((tmp_path / "run" / "logs").rglob("batch.log")).read_text()
    assert "loaded cuda\n" in log
    assert (
        told[-1]["detail"] == "the run could not be taken: loaded cuda"
    )  # /bin/false, which stands in for Python, is silent
    code, told = run_modules(tmp_path, "cuda", "missing", **place)
    assert (code, told[-1]["exit_code"]) == (3, 3)
    assert told[-1]["detail"] == 'module load missing failed: no "missing"'


def test_a_detail_with_quotes_is_json(tmp_path: Path) -> None:
    init = tmp_path / "modules" / "init"
    init.mkdir(parents=True)
    (init / "bash").write_text("module() { printf 'no\\\\th\\ting\\n'; return 1; }\n")
    _, told = run_modules(tmp_path, 'a"b\\c', MODULESHOME=str(tmp_path / "modules"))
    assert told[-1]["detail"] == 'module load a"b\\c failed: no\\thing'  # the tab of the module's words is left out


OWN_SUBMISSION = """\
exec >>"$run_dir/batch.log" 2>&1
job_id=7 SFT_ATTEMPT=7.0 cluster_name=far
event() { printf '{"event":"%s"%s}\\n' "$1" "$2" >>"$run_dir/events.jsonl"; }
sleep() { :; }
echo "what was said before"
follow 75 resubmit
"""


def own_submission(text: str, run: Path) -> str:
    """The functions of a script with which it submits the run's next job, and that submission."""
    (run / "job.sh").write_text(text)
    write_json(run / "manifest.json", {"digests": {"job.sh": hashlib.sha256(text.encode()).hexdigest()}})
    functions = text[text.index("job_view() {") : text.index("\nlight_process -m launcher.attempts.attempt begin")]
    unchanged = text[text.index("unchanged() {") : text.index("last_words() {")]
    return f"set -uo pipefail\nrun_dir={run}\n{unchanged}\n{functions}\n{OWN_SUBMISSION}"


IN_THE_FIRST_INSTANT = """
set -T
trap '[ "$BASH_COMMAND" != "child=\\$!" ] || kill -TERM $$' DEBUG
attended sleep 60
echo "code $?"
"""


def test_a_signal_between_the_start_of_a_process_and_the_note_of_its_id_is_passed_on() -> None:
    text = script(make_spec(resources=ResourcesSpec(tasks_per_node=4)))
    functions = text[text.index("child='' stopped=''") : text.index("one_process() {")]
    done = subprocess.run(["bash", "-c", functions + IN_THE_FIRST_INSTANT], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == ["asked to stop by TERM", "code 143"]


def test_a_changed_script_is_not_submitted_by_the_run_itself(tmp_path: Path, commands: Commands) -> None:
    commands.add("sbatch", "echo 9")
    commands.add("squeue", "")
    commands.add("scontrol", "")
    program = own_submission(script(make_spec(cluster=ClusterSpec(scheduler="slurm"))), tmp_path)
    with (tmp_path / "job.sh").open("a") as file:
        file.write("# changed\n")
    subprocess.run(["bash", "-c", program], check=True, capture_output=True)
    assert commands.calls("sbatch") == []
    assert "job.sh is not what was submitted, so the run does not go on" in (tmp_path / "batch.log").read_text()


@pytest.mark.parametrize("answer", ["echo Welcome; echo '9;far'; echo 'charged to 5'", "echo 'sent'"])
def test_the_runs_own_submission(tmp_path: Path, commands: Commands, answer: str) -> None:
    """The new job is found in what a site's sbatch prints, or else by the token in its comment."""
    commands.add("sbatch", f'printf "%s\\n" "$@" >{tmp_path}/given; {answer}')
    token = f"$(sed -n 's/.*\\(sft-[0-9a-f]*\\)$/\\1/p' {tmp_path}/given)"
    commands.add(
        "squeue",
        f'case "$*" in *%F*) echo "8|(null)"; echo "9|mine {token}" ;; '
        "*%E*) echo '20|afterok:7(unfulfilled)'; echo '21|afterok:77(unfulfilled)' ;; esac",
    )
    commands.add("scontrol", 'case "$*" in "show job"*) echo "JobState=RUNNING ExcNodeList=node[3-4] x=y" ;; esac')
    resources = ResourcesSpec(nodes=2, gpus_per_node=4, extra_sbatch=["--comment=mine", "--clusters=far,near"])
    text = script(make_spec(cluster=ClusterSpec(scheduler="slurm"), resources=resources))
    program = own_submission(text, tmp_path)
    subprocess.run(["bash", "-c", program], check=True, capture_output=True)
    given = (tmp_path / "given").read_text().splitlines()
    assert [word for word in given if word.startswith(("--clusters", "--exclude"))] == [
        "--clusters=far",
        "--exclude=node[3-4]",
    ]
    (submitted,) = read_lines(tmp_path / "events.jsonl")
    assert (submitted["job_id"], submitted["by"], submitted["cluster"]) == ("9", "7.0", "far")
    assert f"--comment=mine {submitted['token']}" in given
    assert not (tmp_path / "submission.json").exists()
    assert (tmp_path / "batch.log").read_text().startswith("what was said before\n")
    updates = [call for call in commands.calls("scontrol") if call.startswith("update")]
    assert updates == ["update JobId=20 Dependency=afterok:9"]


def test_a_submission_of_which_nothing_is_known_is_left_to_be_found(tmp_path: Path, commands: Commands) -> None:
    commands.add("sbatch", "exit 1")
    commands.add("squeue", "exit 1")
    commands.add("scontrol", "exit 1")
    text = script(make_spec(cluster=ClusterSpec(scheduler="slurm")))
    program = own_submission(text, tmp_path)
    subprocess.run(["bash", "-c", program], check=False, capture_output=True)
    assert not (tmp_path / "events.jsonl").exists()
    begun = intent.pending(RunPaths(tmp_path))
    assert begun is not None
    assert begun.scheduler == "slurm"
    assert re.fullmatch(r"sft-[0-9a-f]{32}", begun.token)
