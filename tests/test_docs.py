"""What README and docs name exists: links, files, modules, config keys; the commands they show parse."""

from __future__ import annotations

import argparse
import configparser
import contextlib
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import yaml

from launcher.__main__ import build_parser
from launcher.contract.forms.page import json_reference
from launcher.contract.forms.schemas import read_schema, schema_names
from launcher.contract.rundir import RunPaths

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tests/*.md")]
)
FOLDERS = "launcher|sft|tests|docs|templates|examples|scripts|benchmarks|cluster_configs|requirements"
SECTIONS = (
    "cluster|resources|topology|model|data|train|evaluation|checkpoint|restart|logging|metrics|notify|preflight"
    "|watchdog"
)

LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(rf"(?<![\w/.*~-])(?:{FOLDERS})/[\w./*-]*\w/?")
MODULE = re.compile(r"\b(?:launcher|sft)(?:\.[a-z_]\w*)+")
KEY = re.compile(rf"(?:{SECTIONS})(?:\.\w+)+")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    """Code spans outside of fenced blocks."""
    return CODE.findall(BLOCK.sub("", read(page)))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(BLOCK.sub("", read(page))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(read(page)) if "://" not in target)
        waiting += [(page.parent / target).resolve() for target in targets if target.endswith(".md")]
    assert set((ROOT / "docs").rglob("*.md")) - reached == set()


@pages
def test_named_files_exist(page: Path) -> None:
    """In prose, code spans and blocks; a pattern names at least one file. What an output shows is not ours to name."""
    text = BLOCK.sub(lambda block: "" if block[1] == "text" else block[0], read(page))
    missing = [name for name in PATH.findall(text) if not any(ROOT.glob(name.rstrip("/")))]
    assert missing == []


@pages
def test_named_modules_exist(page: Path) -> None:
    missing = []
    for name in MODULE.findall(read(page)):
        parts = name.split(".")
        places = [
            ROOT.joinpath(*parts[:length]) for length in (len(parts), len(parts) - 1)
        ]  # the last may be a name in it
        if not any(
            place.is_dir() or place.with_suffix(".py").is_file() for place in places if place != ROOT / parts[0]
        ):
            missing.append(name)
    assert [name for name in missing if not name.endswith((".md", ".yaml", ".org"))] == []


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".j2"))


def test_pages_that_the_sources_name_exist() -> None:
    named = {
        (name, str(path.relative_to(ROOT)))
        for folder in FOLDERS.split("|")
        for path in sources(folder)
        if path != Path(__file__)
        for name in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", read(path))
    }
    assert len(named) > 5
    assert {(name, path) for name, path in named if not (ROOT / name).is_file()} == set()


PROGRAM = re.compile(r"(?:python -m )?launcher [a-z]|python -m (?:launcher|sft) [a-z]")


def typed_commands() -> Iterator[tuple[str, str]]:
    """Page and command line of what blocks type; a line that is continued is one."""
    for page in PAGES:
        blocks = [text for language, text in BLOCK.findall(read(page)) if language in ("console", "text")]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        typed = [line.removeprefix("$ ") for line in lines if not line.startswith("next ")]
        yield from ((str(page.relative_to(ROOT)), line) for line in typed if PROGRAM.match(line))


def arguments_of(line: str) -> tuple[str, list[str]]:
    """Program (launcher or sft) and arguments of a command line, up to a comment, pipe, redirection or program."""
    words = shlex.split(line.replace(";", " ; "), comments=True)
    words = list(itertools.takewhile(lambda word: word not in ("|", ">", "&&", ";", "--"), words))
    words = words[2:] if words[0] == "python" else words
    return words[0], words[1:]


@pytest.mark.parametrize(("page", "line"), sorted(set(typed_commands())))
def test_commands_parse(page: str, line: str) -> None:
    program, arguments = arguments_of(line)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _, rest = parser_of(program).parse_known_args(arguments)  # arguments may follow options, as in the launcher
    except SystemExit:
        pytest.fail(said.getvalue())
    assert [word for word in rest if word.startswith("-")] == []


@pytest.mark.parametrize("program", ["launcher", "sft"])
def test_named_commands_and_options_exist(program: str) -> None:
    """In code spans, where the arguments are mostly left out."""
    commands = commands_of(parser_of(program))
    spans = [(str(page.relative_to(ROOT)), span) for page in PAGES for span in code_of(page) if PROGRAM.match(span)]
    checked = 0
    for page, span in spans:
        of, (name, *words) = arguments_of(span)
        if of == program:
            assert name in commands, (page, span)
            options = {option for action in commands[name]._actions for option in action.option_strings}
            assert {word for word in words if word.startswith("-")} <= options, (page, span)
            checked += 1
    assert checked > 5


def parser_of(program: str) -> argparse.ArgumentParser:
    if program == "launcher":
        return build_parser()
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="python -m sft needs the training packages")
    from sft.__main__ import _parser

    return _parser()


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


@pytest.mark.parametrize("program", ["launcher", "sft"])
def test_the_reference_has_every_command_and_option(program: str) -> None:
    text = read(ROOT / "docs" / "reference" / "commands.md")
    commands = commands_of(parser_of(program))
    assert {name for name in commands if not re.search(rf"^\| `{name}\b", text, re.MULTILINE)} == set()
    options = {
        option for command in commands.values() for action in command._actions for option in action.option_strings
    }
    long = {option for option in options if option.startswith("--")}
    assert {option for option in long if not re.search(rf"{option}\b(?!-)", text)} == set()


OF_EVERY_COMMAND = {"--help", "--debug"}


@pytest.mark.parametrize("program", ["launcher", "sft"])
def test_the_rows_of_a_command_have_its_options_and_no_others(program: str) -> None:
    launcher, title, sft = read(ROOT / "docs" / "reference" / "commands.md").partition("## python -m sft")
    assert title
    rows = [line.replace("\\|", " ") for line in (launcher if program == "launcher" else sft).splitlines()]
    checked = 0
    for name, command in commands_of(parser_of(program)).items():
        own = {option for action in command._actions for option in action.option_strings if option.startswith("--")}
        # The first two columns list options; the third may name those of other commands.
        said = [" ".join(row.split("|")[1:3]) for row in rows if re.match(rf"\| `{name}\b", row)]
        if name != "bench":  # which has a table of its own
            assert set(re.findall(r"--[a-z][a-z-]*", " ".join(said))) == own - OF_EVERY_COMMAND, name
            checked += 1
    assert checked > 4


@pytest.mark.parametrize("program", ["launcher", "sft"])
def test_every_argument_has_help(program: str) -> None:
    arguments = [
        (name, action) for name, command in commands_of(parser_of(program)).items() for action in command._actions
    ]
    assert len(arguments) > 30
    assert [(name, action.dest) for name, action in arguments if not action.help] == []


def test_the_map_has_every_package() -> None:
    """And the packages that it names are there, which test_named_files_exist sees."""
    packages = {
        f"{file.parent.relative_to(ROOT)}/" for top in ("launcher", "sft") for file in ROOT.glob(f"{top}/*/__init__.py")
    }
    assert len(packages) > 20
    text = read(ROOT / "docs" / "explanation" / "structure.md")
    assert {package for package in packages if f"| `{package}` |" not in text} == set()


def test_the_reference_has_every_event() -> None:
    said = re.compile(r'append_event\(\s*[\w.]+,\s*"(\w+)"|\.event\("(\w+)"|(?:^|; )\s*event ([a-z_]+)', re.MULTILINE)
    code = "".join(read(path) for folder in ("launcher", "sft", "templates") for path in sources(folder))
    events = {name for match in said.findall(code) for name in match if name}
    assert {"submitted", "attempt_started", "checkpoint_saved", "restart_decided"} <= events
    text = read(ROOT / "docs" / "reference" / "json.md")
    assert {event for event in events if f"| `{event}` |" not in text} == set()


def test_the_reference_has_every_file_of_a_run() -> None:
    paths, text = RunPaths(Path("RUN")), read(ROOT / "docs" / "reference" / "run-directory.md")
    files = [getattr(paths, name) for name, value in vars(RunPaths).items() if isinstance(value, property)]
    names = {str(path.relative_to("RUN")) for path in files if isinstance(path, Path)}
    assert len(names) > 15
    assert {name for name in names if f"`{name}" not in text} == set()


def test_the_reference_has_every_environment_variable() -> None:
    code = "".join(read(path) for folder in ("launcher", "sft", "templates") for path in sources(folder))
    names = set(re.findall(r"\bSFT_[A-Z_]+\b", code))
    assert "SFT_ATTEMPT" in names
    text = read(ROOT / "docs" / "reference" / "environment.md")
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_the_page_of_packages_has_every_extra() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", read(ROOT / "docs" / "reference" / "packages.md"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(setup["options.extras_require"])


def config_keys() -> set[str]:
    """Every key of the config reference and every section above one."""
    keys = set(re.findall(r"^\| `([\w.]+)` \|", read(ROOT / "docs" / "config.md"), re.MULTILINE))
    assert len(keys) > 100
    return keys | {key.rsplit(".", n)[0] for key in keys for n in (1, 2) if "." in key}


@pages
def test_named_config_keys_exist(page: Path) -> None:
    if page.name in ("nemo-and-trlx.md", "json.md"):
        pytest.skip("it names keys of trlx and NeMo, or fields of outputs, too")
    known = config_keys()
    spans = (span.split("=")[0].split(":")[0].strip() for span in code_of(page))
    named = [span for span in spans if KEY.fullmatch(span) and not re.search(r"\.(json|jsonl|yaml|py|md|prom)$", span)]
    assert [key for key in named if key not in known] == []


def leaves(value: object, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from leaves(below, f"{prefix}{'on' if key is True else key}.")  # YAML 1.1 reads `on` as true
    else:
        yield prefix.rstrip(".")


@pages
def test_configs_have_only_keys_that_exist(page: Path) -> None:
    """A cluster file has the keys of section cluster, at the top."""
    known = config_keys()
    mappings = re.compile(
        r"(cluster\.env|data\.(sources\.NAME\.)?columns|data\.validation_sets|data\.chat_template_kwargs)\."
    )
    for language, text in BLOCK.findall(read(page)):
        if language != "yaml":
            continue
        config = yaml.safe_load(text)
        swept = [*config.pop("sweep", {}).get("product", {})]
        for leaf in (*leaves(config), *swept):
            key = re.sub(r"^data\.sources\.\w+", "data.sources.NAME", leaf)
            forms = (key, f"cluster.{key}")
            assert any(form in known or mappings.match(form) for form in forms), leaf


def made_schemas() -> dict[str, object]:
    loader = SourceFileLoader("schemas", str(ROOT / "scripts" / "schemas"))
    spec = spec_from_loader("schemas", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return dict(module.schemas())


def test_schemas_and_page_are_up_to_date() -> None:
    """Renew them with scripts/schemas."""
    pytest.importorskip("pydantic", reason="schemas are made with pydantic")
    made = made_schemas()
    assert {name: read_schema(name) for name in schema_names()} == made
    assert (ROOT / "docs" / "reference" / "json.md").read_text() == json_reference()
