"""Noise that depends on seed, position and channel alone, and is uniform all the same."""

from __future__ import annotations

import torch

from sft.data.batches.batch import example_seed
from sft.kernels.embedding_noise import uniform_noise


def drawn(examples: int, length: int, channels: int) -> torch.Tensor:
    seeds = torch.tensor([example_seed(1, 0, example) for example in range(examples)])[:, None].expand(-1, length)
    return uniform_noise(seeds, torch.arange(length).expand(examples, -1), channels)


def test_it_is_uniform_in_every_direction() -> None:
    """Mean, variance and fourth moment; neighbours in each direction, and one step apart, are not correlated."""
    noise = drawn(40, 50, 64).double()
    count = noise.numel()
    assert noise.abs().max() < 1
    assert noise.mean().abs() < 4 * (1 / 3 / count) ** 0.5
    assert (noise.square().mean() - 1 / 3).abs() < 4 * (4 / 45 / count) ** 0.5
    assert (noise.pow(4).mean() - 1 / 5).abs() < 4 * (16 / 225 / count) ** 0.5
    other = drawn(40, 50, 64).double()
    for axis in range(3):
        correlation = (noise * other.roll(1, axis)).mean() * 3
        assert correlation.abs() < 4 / count**0.5, axis
    histogram = torch.histc(noise, 32, -1, 1)
    expected = count / 32
    assert ((histogram - expected).square() / expected).sum() < 31 + 4 * 62**0.5


def test_a_part_has_the_numbers_of_the_whole() -> None:
    whole = drawn(4, 32, 16)
    seeds = torch.tensor([[example_seed(1, 0, 2)]])
    assert torch.equal(uniform_noise(seeds, torch.tensor([[7]]), 16)[0, 0], whole[2, 7])
    assert not torch.equal(uniform_noise(seeds, torch.tensor([[8]]), 16)[0, 0], whole[2, 7])
    assert len(torch.unique(whole)) > whole.numel() * 0.999


def test_it_is_the_same_forever() -> None:
    """A run that is resumed after an upgrade adds the same noise: that of the definition, in whole numbers."""
    seeds, positions = [0, 2**40 + 3, -1], [0, 5, 2**20]
    found = uniform_noise(torch.tensor([seeds]), torch.tensor([positions]), 3)[0]
    expected = [
        [defined(seed, position, channel) for channel in range(3)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert found.tolist() == expected


def defined(seed: int, position: int, channel: int) -> float:
    token = mixed(mixed(position ^ seed) ^ (seed >> 32))
    bits = mixed(mixed(token ^ channel * 0x9E3779B9) + mixed(token + 0x9E3779B9))
    signed = bits - 2**32 if bits >= 2**31 else bits
    return ((signed >> 8) + 0.5) / 2**23


def mixed(x: int) -> int:
    """Return lowbias32 of the lowest 32 bits."""
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16
