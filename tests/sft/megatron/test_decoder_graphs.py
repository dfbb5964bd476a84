"""The forms that rows are filled up to, so that a graph fits many of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sft.megatron import decoder_graphs
from sft.megatron.decoder_graphs import DecoderGraphs, Inputs, RowForm
from sft.megatron.layers.packed_rows import packed_sequences


@pytest.mark.parametrize(
    ("lengths", "form"),
    [
        ([1000, 900, 800, 700, 600, 64], RowForm(4096, 16, 1024)),
        ([4000, 96], RowForm(4096, 16, 4096)),
        ([375] * 10 + [38], RowForm(3840, 16, 1024)),
        ([10] * 15 + [11], RowForm(192, 32, 1024)),  # one sequence more, for what fills the row up
        ([200] * 100 + [60], RowForm(20480, 128, 1024)),
        ([2048, 2048], RowForm(4096, 2, 2048, equal=True)),
        ([1000, 1000], RowForm(2000, 2, 1000, equal=True)),
        ([4096], RowForm(4096, 1, 4096, equal=True)),
        ([3001], RowForm(3072, 16, 4096)),  # as [3002] and many others
        ([37], RowForm(64, 16, 1024)),
    ],
    ids=str,
)
def test_forms(lengths: list[int], form: RowForm) -> None:
    assert RowForm.of(lengths) == form


@pytest.mark.parametrize("tokens", [64, 65, 1000, 4095, 4096, 4097, 30000, 131072])
@pytest.mark.parametrize("longest", [1, 60, 700])
def test_what_fills_a_row_up_is_a_sequence_that_attention_sees_whole(tokens: int, longest: int) -> None:
    whole, rest = divmod(tokens, longest)
    lengths = [longest] * whole + [rest] * (rest > 0)
    form = RowForm.of([*lengths, 1])
    assert form.equal or form.longest >= max(longest, form.tokens - tokens - 1)
    assert form.equal or form.documents > len(lengths) + 1
    assert tokens + 1 <= form.tokens <= (tokens + 1) * 9 / 8 + 64


def test_a_row_is_copied_over_the_one_before() -> None:
    """What an earlier, longer row left behind is gone."""
    long, short = [70, 60, 50], [30, 90, 16]
    form = RowForm(192, 4, 1024)
    inputs = Inputs(form, torch.zeros(1, 1, 8))
    for lengths in (long, short):
        tokens = sum(lengths)
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden = torch.randn(tokens, 1, 8)
        inputs.fill(hidden, packed_sequences(ends, tuple(lengths), positions))
        assert torch.equal(inputs.hidden[:tokens], hidden) and not inputs.hidden[tokens:].any()
        assert inputs.offsets.tolist() == [*ends.tolist(), 192]
        assert torch.equal(inputs.positions[:tokens], positions) and not inputs.positions[tokens:].any()
        found = inputs.sequences
        assert (found.max_seqlen_q, found.cu_seqlens_q is inputs.offsets) == (1024, True)


def test_a_graph_is_recorded_only_where_a_row_without_one_has_room_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One and a half times what both keep, and a GiB."""
    config = SimpleNamespace(overlap_grad_reduce=False, overlap_param_gather=False)
    graphs = DecoderGraphs([torch.nn.Linear(2, 2)], SimpleNamespace(ddp_config=config))
    small, large = RowForm(1024, 16, 1024), RowForm(4096, 16, 1024)
    gib = 2**30
    graphs._kept = {small: 2 * gib, large: 4 * gib}
    free = 0

    def recordable(form: RowForm, room: float) -> bool:
        nonlocal free
        free = int(room * gib)
        return graphs._has_room(form, torch.device("cpu"))

    monkeypatch.setattr(decoder_graphs, "free_memory", lambda _: free)
    assert not recordable(small, 1.5 * (2 + 4) + 0.9) and recordable(small, 1.5 * (2 + 4) + 1)
    assert not recordable(large, 1.5 * (4 + 4) + 0.9)
    graphs.recorded = {small: None}  # type: ignore[dict-item]
    assert not recordable(large, 1.5 * (4 + 4) + 0.9), "what is free includes the pool, which rows cannot use"
    assert recordable(large, 1.5 * (4 + 4) + 1)
    graphs.recorded = {large: None}  # type: ignore[dict-item]
    assert not recordable(small, 1.5 * (4 + 4) + 0.9) and recordable(small, 1.5 * (4 + 4) + 1)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "rows without one beside them, need 10.0 GiB of memory, and 9.9 are free" in said
