"""Documents of a packed row do not meet, in any family: what is in one changes no bit of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from launcher.contract.spec import RunSpec
from sft.megatron.layers.packed_rows import packed_sequences
from sft.models.registry import read_architecture
from tests.ranks import run_ranks
from tests.sft.hf_cases import CASES, DISTINCT, VOCAB_SIZE, build_and_load, hf_logits, run_spec, save_hf_model
from tests.tiers import thinned

pytestmark = pytest.mark.parity

LENGTHS = (21, 30, 13)
"""Longer than the windows and original positions of small models."""


def packed_logits(spec: RunSpec, rows: list[list[list[int]]]) -> list[NDArray[np.float32]]:
    """Runs on a rank: the logits of each row of documents, [tokens, vocabulary]."""
    (chunk,) = build_and_load(spec)
    chunk.eval()
    found = []
    for documents in rows:
        lengths = tuple(len(document) for document in documents)
        positions = torch.cat([torch.arange(length) for length in lengths])
        offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        ids = torch.tensor([[token for document in documents for token in document]])
        with torch.no_grad():
            logits = chunk(ids, positions[None], None, packed_seq_params=packed_sequences(offsets, lengths, positions))
        found.append(logits[0, :, :VOCAB_SIZE].numpy())
    return found


@pytest.mark.parametrize("case", thinned(CASES, *DISTINCT))
def test_a_document_does_not_change_its_neighbours(case: str, tmp_path: Path) -> None:
    save_hf_model(case, tmp_path)
    draw = torch.Generator().manual_seed(5)
    documents = [torch.randint(3, VOCAB_SIZE, (length,), generator=draw).tolist() for length in LENGTHS]
    other = torch.randint(3, VOCAB_SIZE, (LENGTHS[1],), generator=draw).tolist()
    first, last = LENGTHS[0], sum(LENGTHS[:2])
    ((packed, changed),) = run_ranks(
        1, packed_logits, run_spec(tmp_path, 1), [documents, [documents[0], other, documents[2]]], init=True
    )
    for place in (slice(first), slice(last, None)):
        difference = np.abs(packed[place] - changed[place]).max()
        if read_architecture(tmp_path).shape.num_experts:
            # How a product rounds depends on how many tokens an expert has: up to 1.1e-6 was seen of logits up to 2.4.
            assert difference < 2e-6
        else:
            assert difference == 0.0
    assert np.abs(packed[first:last] - changed[first:last]).max() > 0.01
    alone = torch.cat([hf_logits(tmp_path, torch.tensor([document]))[0] for document in documents])
    assert np.abs(packed - alone.numpy()).max() < 1e-5
