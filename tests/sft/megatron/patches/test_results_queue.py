"""A save hands its results over without a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Never

import pytest

from sft.megatron.core import filesystem_async


class _Started(Exception):
    pass


def test_no_manager_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mode: str) -> Never:
        raise _Started(mode)

    monkeypatch.setattr(filesystem_async.mp, "get_context", refuse)
    renamed = getattr(filesystem_async, "get_write_results_queue", None)  # from 0.17 on
    get_queue: Callable[[], object] = renamed or filesystem_async._get_write_results_queue
    assert get_queue() is filesystem_async._results_queue
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    with pytest.raises(_Started, match="spawn"):
        get_queue()
