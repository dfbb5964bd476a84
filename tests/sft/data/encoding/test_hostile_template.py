"""A chat template comes with a model from anywhere: it is rendered in a sandbox, and reaches no Python object."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract.errors import DataError, ModelError
from launcher.contract.spec import DataSpec
from tests.sft.data.encoding.test_masking import chat, encode
from tests.tiny_model import make_tokenizer

ESCAPES = (
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ lipsum.__globals__['os'].popen('touch ran').read() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('ran', 'w') }}",
    "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_reaches_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, escape: str) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = f"{escape}{{% for m in messages %}}{{{{ m['content'] }}}}{{% endfor %}}"
    with pytest.raises((DataError, ModelError)):
        encode(chat("hi", "yo"), tokenizer, DataSpec())
    assert not Path("ran").exists()
