"""What prepare would refuse is refused by validate, without torch, where heads of files tell it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.contract.errors import ConfigError
from launcher.submission.submission import make_submission
from tests.launcher.conftest import MODEL

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "numpy", "safetensors", "megatron", "pytorch_lightning"):
    sys.modules[name] = None
from launcher.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make_submission(Path("cfg.yaml"), overrides)
    return str(caught.value)


def write_rows(*rows: object, name: str = "a.jsonl") -> None:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_misspelled_targets_of_adapters(workdir: Path) -> None:
    said = problems("model.lora.rank=4", "model.lora.targets=[q_prj,v_proj]")
    assert "model.lora.targets: a llama model has no linear layer q_prj; it has q_proj" in said
    make_submission(Path("cfg.yaml"), ["model.lora.rank=4", "model.lora.targets=[q_proj,v_proj]"])


def test_an_architecture_that_is_not_covered(workdir: Path) -> None:
    Path("model/config.json").write_text(json.dumps({**MODEL, "model_type": "bloom"}))
    assert "model_type 'bloom' is not supported" in problems()
    Path("model/config.json").write_text(json.dumps({**MODEL, "quantization_config": {"bits": 4}}))
    assert "quantized weights are not supported" in problems()


def test_rows_that_no_format_fits(workdir: Path) -> None:
    write_rows({"question": "a", "answer": "b"})
    assert "a.jsonl:1: no format fits the keys" in problems()


def test_token_rows_of_several_sequences(workdir: Path) -> None:
    write_rows({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 1, 0]})
    assert "position_ids" in problems()


def test_token_rows_of_another_vocabulary(workdir: Path) -> None:
    write_rows({"input_ids": [1, 255, 2], "labels": [1, 255, 2]})
    make_submission(Path("cfg.yaml"))
    write_rows({"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 256], "labels": [1, 256]})
    assert "a.jsonl:2: token id 256 is not in the model's vocabulary of 256" in problems()


def test_each_file_and_each_set_says_its_first_problem(workdir: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    write_rows(good, {"prompt": "a"})
    write_rows(good, {"prompt": 1, "completion": "b"}, {"prompt": 2}, name="b.jsonl")
    write_rows({"prompt": "a", "completion": None}, name="held.json")
    said = problems("data.train=[a.jsonl,b.jsonl]", "data.validation_sets={held: held.json}")
    assert [line.partition(": ")[0].rpartition("/")[2] for line in said.splitlines()] == [
        "a.jsonl:2",
        "b.jsonl:2",
        "held.json:1",
    ]


def test_columns_that_nobody_reads(workdir: Path) -> None:
    assert "data.columns: unknown name 'promt'" in problems("data.columns={promt: question}")


def test_only_the_heads_are_read(workdir: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    write_rows(*[good] * 30, {"prompt": 1})
    make_submission(Path("cfg.yaml"))


def test_none_of_it_needs_torch(workdir: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", WITHOUT_TORCH, "validate", "cfg.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bad = [*command, "model.lora.rank=4", "model.lora.targets=q_prj"]
    done = subprocess.run(bad, env=environment, capture_output=True, text=True, check=False)
    assert "has no linear layer q_prj" in done.stderr


TOKENS = {"input_ids": [1, 2], "labels": [-100, 2]}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("row", "override", "problem"),
    [
        (TOKENS, "data.loss_on=all", "data.loss_on: all is not read in rows of format tokens, which say themselves"),
        (TOKENS, "data.on_mismatch=split", "data.on_mismatch: split is for turns of conversations, and rows of format"),
        ({"text": "a"}, "data.loss_on=last_assistant", "data.loss_on: last_assistant is not read in rows of format"),
        ({"text": "a"}, "data.loss_on=all", None),
        (CHAT, "data.chat_template=none", "data.chat_template: none joins a prompt and its completion, but the rows h"),
        (CHAT, "data.loss_on=all", None),
        (CHAT, "data.columns.prompt=question", "data.columns: prompt is not read in rows of format messages, so that"),
    ],
)
def test_settings_that_no_rows_are_read_with(workdir: Path, row: object, override: str, problem: str | None) -> None:
    write_rows(row)
    if problem is None:
        make_submission(Path("cfg.yaml"), [override])
    else:
        assert problem in problems(override)
        write_rows(CHAT, name="b.json")  # others are: all that inherit the setting count
        if "loss_on" in override:
            make_submission(Path("cfg.yaml"), [override, "data.validation=[b.json]"])


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "completion": "b", "context": "x"}, "context"),
        ({"system": "Be kind.", "messages": [SYSTEM, *CHAT["messages"]]}, "system"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "completion": "b", "label": True}, "KTO"),
    ],
)
def test_rows_that_mean_something_else(workdir: Path, row: object, problem: str) -> None:
    """In the words of `prepare`."""
    write_rows(row)
    assert problem in problems()


@pytest.mark.parametrize(
    ("row", "override", "problem"),
    [
        ({"question": "?"}, "", "a row has prompt (a text) or messages"),
        (CHAT, "", "the last turn is the assistant's"),
        ({"prompt": "?", "context": "x"}, "", "context"),
        ({"messages": CHAT["messages"][:1]}, "data.chat_template=none", "need a chat template"),
        ({"prompt": "?"}, "data.chat_template=none", None),
        ({"messages": CHAT["messages"][:1]}, "", None),
    ],
)
def test_prompts_that_cannot_be_asked(workdir: Path, row: object, override: str, problem: str | None) -> None:
    write_rows({"prompt": "first"}, row, name="prompts.json")
    words = ["evaluation.prompts=prompts.json", *([override] if override else [])]
    if problem is None:
        make_submission(Path("cfg.yaml"), words)
    else:
        found = problems(*words)
        assert "prompts.json:2: " in found
        assert problem in found


def test_a_source_has_its_own_settings_read(workdir: Path) -> None:
    write_rows(TOKENS)
    write_rows(CHAT, name="b.json")
    sources = ["data.train=[]", "data.sources.ids.files=[a.jsonl]", "data.sources.chat.files=[b.json]"]
    make_submission(Path("cfg.yaml"), [*sources, "data.loss_on=last_assistant"])
    found = problems(*sources, "data.sources.ids.loss_on=last_assistant")
    assert "data.sources.ids.loss_on: last_assistant is not read in rows of format tokens" in found


PAIR = {"prompt": "a", "completion": "b"}
HAS_NONE = "data.chat_template: the tokenizer has no chat template; choose one of ours (alpaca, chatml, "


@pytest.mark.parametrize(
    ("row", "overrides", "is_refused"),
    [
        (CHAT, (), True),
        (PAIR, (), True),
        (TOKENS, (), False),
        ({"text": "a"}, (), False),
        (TOKENS, ("evaluation.prompts=prompts.json",), True),
        (CHAT, ("data.chat_template=zephyr",), False),
        (PAIR, ("data.chat_template=none",), False),
        (CHAT, ("model.tokenizer=other",), False),
    ],
)
def test_a_tokenizer_without_a_chat_template(
    workdir: Path, row: object, overrides: tuple[str, ...], is_refused: bool
) -> None:
    """Seen to be queued, and refused by prepare."""
    write_rows(row)
    write_rows({"prompt": "?"}, name="prompts.json")
    for folder, more in (("other", {"chat_template": "{{ messages }}"}), ("model", {})):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "tokenizer.json").write_text("{}")
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"} | more))
    if is_refused:
        assert problems(*overrides).startswith(HAS_NONE)
    else:
        make_submission(Path("cfg.yaml"), overrides)
