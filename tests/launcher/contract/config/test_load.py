"""Reading a config: what is accepted, and the exact message for what is not."""

from __future__ import annotations

import dataclasses
import datetime
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launcher.contract.config.load import load_config
from launcher.contract.errors import ConfigError, TemplateError
from launcher.contract.spec import read_resolved, to_yaml

CFG = Path("cfg.yaml")


def problems(*overrides: str, cluster: str | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(CFG, overrides, cluster)
    return caught.value.problems


def problem_in(text: str) -> str:
    """The only problem of a good config with `text` below it."""
    CFG.write_text(CFG.read_text() + text)
    (problem,) = problems()
    return problem


def test_values_paths_and_sources(workdir: Path) -> None:
    loaded = load_config(CFG, ["train.seed=7", "cluster.env.A=b c", "data.validation=[a.jsonl]"])
    spec = loaded.spec
    assert (spec.train.seed, spec.cluster.env, spec.resources.time) == (7, {"A": "b c"}, "1:30:00")
    assert spec.model.path == str(workdir / "model")
    assert spec.run_root == str(workdir / "runs")
    assert spec.data.train == spec.data.validation == [str(workdir / "a.jsonl")]
    assert loaded.sources["train.seed"] == "override"
    assert loaded.sources["train.max_steps"] == "file"
    assert loaded.sources["train.precision"] == "default"
    assert ("train.seed", 7, "override") in list(loaded.changed())
    assert "train.precision" not in {key for key, _, _ in loaded.changed()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logging: {evry: 2}\n", "cfg.yaml:7: unknown key 'logging.evry'; did you mean 'every'?"),
        ("loging: {every: 2}\n", "cfg.yaml:7: unknown key 'loging'; did you mean 'logging'?"),
        ("logging:\n  every: ten\n", "cfg.yaml:8: logging.every: 'ten' is not an integer"),
        ("logging: {every: 1.5}\n", "cfg.yaml:7: logging.every: '1.5' is not an integer"),
        ("logging: {every: null}\n", "cfg.yaml:7: logging.every: null is not an integer"),
        ("logging: {every: [1]}\n", "cfg.yaml:7: logging.every: a list is not an integer"),
        ("logging: {plot: maybe}\n", "cfg.yaml:7: logging.plot: 'maybe' is not true or false"),
        ("logging: {prompts: {a: b}}\n", "cfg.yaml:7: logging.prompts: a mapping is not a list of strings"),
        ("logging: {prompts: [[a]]}\n", "cfg.yaml:7: logging.prompts[0]: a list is not a string"),
        ("logging: [a]\n", "cfg.yaml:7: logging must be a mapping (key: value lines), not a list"),
        ("logging: {every: 1, every: 2}\n", "cfg.yaml:7: key 'logging.every' is given twice; the first is on line 7"),
        ("name: again\n", "cfg.yaml:7: key 'name' is given twice; the first is on line 1"),
        ("logging:\n  every: ${nope.x}\n", "cfg.yaml:8: logging.every: '${nope.x}' does not resolve: "),
        ("logging: {prompts: ['a ${b']}\n", "cfg.yaml:7: logging.prompts: 'a ${b' is not a valid ${...} interpol"),
        ("logging: {prompts: ['???']}\n", "cfg.yaml:7: logging.prompts: '???' stands for a missing value; set it"),
        ("checkpoint: {keep_last: 0}\n", "cfg.yaml:7: checkpoint.keep_last: 0 is not at least 1"),
        ("logging: " + "[" * 5000 + "]" * 5000, "cfg.yaml: nested too deep"),
        ("logging: &a {prompts: *a}\n", "cfg.yaml: nested too deep, or an *alias holds itself"),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 8}]\n" for n in range(1, 30)),
            "cfg.yaml: more than 1,000,000 values, with every *alias written out",
        ),
        (
            "cluster: {gpu_directive: grse}\n",
            "cfg.yaml:7: cluster.gpu_directive: 'grse' is not one of gpus_per_node, gres, gpus_per_task, none; "
            "did you mean 'gres'?",
        ),
        (
            "logging: {prompts: ['${oc.env:HF_TOKEN}']}\n",
            "cfg.yaml:7: logging.prompts: HF_TOKEN looks like a secret, and the resolved config is stored; "
            "name it in env_from instead",
        ),
        ("a: b: c\n", "cfg.yaml:7: not valid YAML: mapping values are not allowed here"),
        ("<<: {name: x}\n", "cfg.yaml:7: a key must be a plain word"),
    ],
)  # fmt: skip
def test_bad_file(workdir: Path, text: str, message: str) -> None:
    assert problem_in(text).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", "override 'foo': expected key=value"),
        ("=3", "override '=3': expected key=value"),
        ("train.sed=3", "override 'train.sed=3': unknown key 'train.sed'; did you mean 'train.seed'?"),
        ("topology=3", "override 'topology=3': topology: '3' is not the word auto; give that, or its keys"),
        ("train.seed=x", "override 'train.seed=x': train.seed: 'x' is not an integer"),
        ("train.seed=", "override 'train.seed=': train.seed: null is not an integer"),
        ("name=../x", "override 'name=../x': name: '../x' is not a run name: letters, digits, '.', '_', '-', "),
        ("name=.hidden", "override 'name=.hidden': name: '.hidden' is not a run name: "),
        ("logging.prompts=[a", "override 'logging.prompts=[a': '[a' is not valid YAML"),
        ("resources.time=1h", "override 'resources.time=1h': resources.time: '1h' is not a time limit: "),
        ("data.train=b*.jsonl", "override 'data.train=b*.jsonl': data.train: no file matches /"),
        ("model.path=nope", "override 'model.path=nope': model.path: /"),
        ("model.path=package:nope_x/a.gguf", "override 'model.path=package:nope_x/a.gguf': model.path: "),
        ("cluster=../x", "override 'cluster=../x': cluster: '../x' is not the name of a cluster file"),
    ],
)  # fmt: skip
def test_bad_override(workdir: Path, override: str, message: str) -> None:
    (problem,) = problems(override)
    assert problem.startswith(message)


def test_every_problem_at_once(workdir: Path) -> None:
    CFG.write_text("train: {max_steps: ten, lr: 1}\ntopology: {tensor_paralel: 2}\n")
    assert problems("foo") == (
        "cfg.yaml:1: unknown key 'train.lr'; here it is train.optimizer.lr",
        "cfg.yaml:2: unknown key 'topology.tensor_paralel'; did you mean 'tensor_parallel'?",
        "override 'foo': expected key=value",
        "cfg.yaml:1: train.max_steps: 'ten' is not an integer",
        "cfg.yaml: name: missing; give the run a name",
        "cfg.yaml: model.path: missing; a Hugging Face model directory or hub id (ORG/NAME), a NeMo checkpoint, "
        "a .gguf file or package:NAME/FILE",
        "cfg.yaml: data.train: missing; one or more data files, or several sources with weights in data.sources",
    )


SOURCES = """\
data:
  seq_length: 128
  sources:
    chat: {files: "*.jsonl"}
    math:
      files: [a.jsonl, a.jsonl]
      weight: 2.5
      columns: {prompt: question}
"""


def with_sources(text: str = SOURCES) -> str:
    """The folder's config with these lines in place of its data."""
    return CFG.read_text().replace('data: {train: "*.jsonl", seq_length: 128}\n', text)


def test_a_run_on_another_cluster_has_what_that_clusters_file_gives(workdir: Path, tmp_path: Path) -> None:
    """A run's own config spells out every key. Seen to go to the default partition, without an account."""
    folder = tmp_path / ".config" / "slurm-sft-launcher" / "cluster_configs"
    folder.mkdir(parents=True)
    given = "{partition: big, account: mine, cpus_per_task: 12, exclusive: true, signal_seconds: 300, gpus_per_node: 8}"
    (folder / "far.yaml").write_text(f"scheduler: slurm\nresources: {given}\n")
    own = load_config(CFG, ["resources.account=ours"]).spec
    Path("config.yaml").write_text(to_yaml(own))
    found = load_config(Path("config.yaml"), cluster="far", resolved=True).spec.resources
    expected = {"partition": "big", "cpus_per_task": 12, "exclusive": True, "signal_seconds": 300}
    assert found == dataclasses.replace(own.resources, **expected)  # type: ignore[arg-type]


def test_sources_of_training_data(workdir: Path) -> None:
    CFG.write_text(with_sources())
    loaded = load_config(CFG, ["data.sources.math.weight=0.5", "data.sources.math.columns.completion=answer"])
    chat, math = loaded.spec.data.sources.values()
    file = str(workdir / "a.jsonl")
    assert (chat.files, chat.weight, math.files, math.weight) == ([file], 1.0, [file, file], 0.5)
    assert math.columns == {"prompt": "question", "completion": "answer"}
    assert loaded.sources["data.sources.math.weight"] == "override"
    assert loaded.sources["data.sources.chat.weight"] == "default"
    changed = {key.removeprefix("data.sources.") for key, *_ in loaded.changed() if key.startswith("data.sources.")}
    assert changed == {"chat.files", "math.files", "math.weight", "math.columns"}
    Path("config.yaml").write_text(to_yaml(loaded.spec))
    assert load_config(Path("config.yaml"), resolved=True).spec == read_resolved(Path("config.yaml")) == loaded.spec


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{files: a.jsonl, weight: 0}", "5: data.sources.x.weight: 0 is not above 0; to train without this source"),
        ("{files: a.jsonl, weight: -1}", "5: data.sources.x.weight: -1 is not above 0"),
        ("{files: a.jsonl, weight: nan}", "5: data.sources.x.weight: nan is not above 0"),
        ("{files: a.jsonl, weight: much}", "5: data.sources.x.weight: 'much' is not a number"),
        ("{files: a.jsonl, wweight: 1}", "5: unknown key 'data.sources.x.wweight'; did you mean 'weight'?"),
        ("{files: b.jsonl}", "5: data.sources.x.files: no file matches /"),
        ("{weight: 1}", "5: data.sources.x.files: missing; one or more data files"),
        ("{files: [], weight: 1}", "5: data.sources.x.files: missing; one or more data files"),
        ("{files: a.jsonl, loss_on: some}", "5: data.sources.x.loss_on: 'some' is not one of assistant, "),
        ("{}", "5: data.sources.x is empty; it needs files"),
        ("", "5: data.sources.x is empty; it needs files"),
        ("a.jsonl", "5: data.sources.x must be a mapping (key: value lines), not 'a.jsonl'"),
        ("{files: a.jsonl}\n    x: {files: b}", "6: key 'data.sources.x' is given twice; the first is on line 5"),
        ("{files: a.jsonl}\n    a.b: {files: a.jsonl}", "6: data.sources: 'a.b' is not a name: letters, digits, "),
        ("{files: a.jsonl}\n  train: a.jsonl", "6: data.train: excludes data.sources; give these files a name and"),
    ],
)  # fmt: skip
def test_bad_source(source: str, message: str, workdir: Path) -> None:
    CFG.write_text(with_sources(f"data:\n  sources:\n    x: {source}\n"))
    (problem,) = (problem for problem in problems() if not problem.startswith("cfg.yaml: data.train: missing"))
    assert problem.startswith(f"cfg.yaml:{message}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=a.jsonl", "'data.sources' is a section; set one of data.sources.NAME.files, data.sources.NAME."),
        ("data.sources.math=a.jsonl", "'data.sources.math' is a section; set one of data.sources.math.files, "),
        ("data.sources.math.wweight=2", "unknown key 'data.sources.math.wweight'; did you mean 'data.sources.math.w"),
        ("data.sources.a b.weight=2", "unknown key 'data.sources.a b.weight'"),
        ("data.sources.new.weight=2", "data.sources.new.files: missing; one or more data files"),
    ],
)  # fmt: skip
def test_bad_override_of_a_source(override: str, message: str, workdir: Path) -> None:
    CFG.write_text(with_sources())
    (problem,) = problems(override)
    assert problem.startswith(f"override '{override}': {message}")


def test_steps_or_epochs(workdir: Path) -> None:
    assert problems("train.max_steps=") == (
        "override 'train.max_steps=': train.max_steps: missing; set train.max_steps or train.epochs",
    )
    assert problems("train.epochs=2") == (
        "cfg.yaml:4: train.max_steps: 3 and train.epochs 2 exclude each other; drop one",
    )


def test_absent_file_names_a_near_one(workdir: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cgf\.yaml: no such file; did you mean 'cfg\.yaml'\?$"):
        load_config(Path("cgf.yaml"))


def test_a_runs_config_that_cannot_be_read(tmp_path: Path) -> None:
    for content in (b"{{{", b"\xff"):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.yaml cannot be read: "):
            read_resolved(tmp_path / "config.yaml")


def test_what_is_no_config_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for a writer
    (tmp_path / "binary").write_bytes(b"ab\xff")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    (tmp_path / "list").write_text("[1]")
    for name, reason in {
        ".": " is not a file",
        "pipe": " is not a file",
        "binary": ": not a text file in UTF-8 (byte 2)",
        "huge": " has 1,099,511,627,776 bytes, and a config at most 10,000,000",
        "list": ":1: the document must be a mapping (key: value lines), not a list",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name)
        assert caught.value.problems == (f"{tmp_path / name}{reason}",)


def test_what_yaml_would_misread_stays_as_written(workdir: Path) -> None:
    CFG.write_text(CFG.read_text() + "cluster: {env: {A: no, B: 007, C: 1e3, D: 1:30}, gpu_type: 1_0}\n")
    cluster = load_config(CFG, ["train.optimizer.lr=1e-4"]).spec.cluster
    assert cluster.env == {"A": "no", "B": "007", "C": "1e3", "D": "1:30"}
    assert cluster.gpu_type == "1_0"


def test_interpolation(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "x")
    CFG.write_text(
        CFG.read_text()
        + "logging: {prompts: ['${name} ${train.max_steps}', '\\${name}', '${oc.env:TOKENIZERS_PARALLELISM}']}\n"
    )
    assert load_config(CFG, ["train.max_steps=9"]).spec.logging.prompts == ["first 9", "${name}", "x"]


def test_named_cluster_and_its_resources(workdir: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "slurm-sft-launcher" / "cluster_configs"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("scheduler: slurm\nresources: {time: 5, partition: p}\n")
    loaded = load_config(CFG, cluster="mine")
    assert (loaded.spec.cluster.name, loaded.spec.cluster.scheduler) == ("mine", "slurm")
    assert (loaded.spec.resources.time, loaded.spec.resources.partition) == ("1:30:00", "p")
    assert (loaded.sources["resources.time"], loaded.sources["resources.partition"]) == ("file", "cluster")
    (folder / "mine.yaml").write_text("schedulr: slurm\nname: other\n")
    assert [problem.partition(": ")[2] for problem in problems(cluster="mine")] == [
        "unknown key 'schedulr'; did you mean 'scheduler'?",
        "name: 'other' is not the file's name 'mine'",
    ]


@pytest.mark.parametrize("text", ["", "resources: {partition: gpu, account: mine}\n"])
def test_a_cluster_file_says_its_scheduler(workdir: Path, tmp_path: Path, text: str) -> None:
    """Of a file for Slurm without it, runs were processes of the login node."""
    folder = tmp_path / ".config" / "slurm-sft-launcher" / "cluster_configs"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(text)
    (problem,) = problems(cluster="mine")
    assert problem == f"{folder}/mine.yaml: scheduler: missing; slurm, or local for processes of this machine"


def test_a_folder_is_no_cluster_file(workdir: Path, tmp_path: Path) -> None:
    (tmp_path / ".config" / "slurm-sft-launcher" / "cluster_configs" / "mine.yaml").mkdir(parents=True)
    with pytest.raises(TemplateError, match="cluster 'mine' not found; looked for"):  # it was seen to mean itself
        load_config(CFG, cluster="mine")


def test_cluster_option_displaces_the_files_settings(workdir: Path) -> None:
    CFG.write_text(CFG.read_text() + "cluster: {scheduler: local, gpu_type: h100}\n")
    cluster = load_config(CFG, ["cluster.env.A=b"], "slurm-dev").spec.cluster
    assert (cluster.name, cluster.gpu_type) == ("slurm-dev", None)
    assert cluster.env == {"GLOO_SOCKET_IFNAME": "lo", "A": "b"}


@pytest.mark.parametrize(
    ("option", "overrides", "where"),
    [
        ("slurm-dv", [], "--cluster slurm-dv"),
        (None, ["cluster=slurm-dv"], "override 'cluster=slurm-dv'"),
        (None, [], f"{CFG}:2"),
    ],
)
def test_unknown_cluster_prints_where_it_is_named_and_the_search_path(
    workdir: Path, option: str | None, overrides: list[str], where: str
) -> None:
    if where.startswith(str(CFG)):
        CFG.write_text("# the file's own word\ncluster: slurm-dv\n" + CFG.read_text())
    with pytest.raises(TemplateError) as caught:
        load_config(CFG, overrides, option)
    text = str(caught.value)
    found = f"{where}: cluster 'slurm-dv' not found; did you mean 'slurm-dev'?; looked for slurm-dv.yaml in:\n"
    assert text.startswith(found)
    assert f"{Path.home()}/.config/slurm-sft-launcher/cluster_configs" in text


def test_resolved_config_reads_back_the_same(workdir: Path) -> None:
    CFG.write_text(CFG.read_text() + "logging: {prompts: ['\\${name} costs $5 \\\\\\${x}']}\n")
    spec = load_config(CFG).spec
    assert spec.logging.prompts == ["${name} costs $5 \\${x}"]
    Path("config.yaml").write_text(to_yaml(spec))
    assert load_config(Path("config.yaml"), resolved=True).spec == read_resolved(Path("config.yaml")) == spec


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="ab:{}[]\n -'\"$?#&*!|>%@,.\\0", max_size=40), st.text(alphabet="a.={}[]$:\"' ", max_size=12))
@example("train: &a {optimizer: *a}", "")
@example("data: &a [*a]", "")
def test_no_text_is_worse_than_a_config_error(workdir: Path, text: str, override: str) -> None:
    CFG.write_text(text)
    with pytest.raises(ConfigError):
        load_config(CFG, [override])


def test_a_run_has_one_date(workdir: Path) -> None:
    """Seen to have two, where it was requeued after midnight."""
    submitted = load_config(CFG).spec
    assert submitted.data.date == datetime.date.today().isoformat()
    later = dataclasses.replace(submitted, data=dataclasses.replace(submitted.data, date="2026-01-31"))
    Path("resolved.yaml").write_text(to_yaml(later))
    assert load_config(Path("resolved.yaml"), resolved=True).spec.data.now == datetime.datetime(2026, 1, 31, 12)
    for wrong in ("31.01.2026", "2026-02-30", "20260131"):
        (problem,) = problems(f"data.date={wrong}")
        assert f"data.date: '{wrong}' is not a day, YYYY-MM-DD" in problem


def test_chat_templates_by_name(workdir: Path) -> None:
    assert load_config(CFG, ["data.chat_template=chatml"]).spec.data.chat_template == "chatml"
    (problem,) = problems("data.chat_template=chatlm")
    assert problem.endswith("alpaca, chatml, gemma, llama3, mistral, vicuna, zephyr); did you mean 'chatml'?")
