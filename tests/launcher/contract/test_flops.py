"""FLOPs and parameter counts, compared with published sizes and with the measured table."""

from __future__ import annotations

import pytest

from launcher.contract.errors import ModelError
from launcher.contract.flops import mfu, non_embedding_parameters, parameters, training_flops, training_flops_of
from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import LoraSpec


@pytest.mark.parametrize(
    ("name", "published"),
    [  # "num_parameters" of the models' cards, exact where a card gives all digits
        ("1b", 1_235_814_400),
        ("3b", 3_212_749_824),
        ("8b", 8_030_261_248),
        ("70b", 70_553_706_496),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("gemma3-270m", 268_098_176),
        ("gemma3-1b", 999_885_952),
        ("gemma2-2b", 2_614_341_888),
        ("gemma2-9b", 9_241_705_984),
    ],
)
def test_parameters_are_the_published_ones(name: str, published: int) -> None:
    assert parameters(named_model_shape(name)) == published


def test_a_token_meets_a_few_of_many_experts() -> None:
    """Qwen3-30B-A3B: 30.5 billion weights, of which 3.3 billion work for a token."""
    shape = named_model_shape("30b-a3b")
    assert parameters(shape) == pytest.approx(30.53e9, rel=1e-3)
    active = non_embedding_parameters(shape, active=True)
    assert active + 2 * shape.vocab_size * shape.hidden_size == pytest.approx(3.35e9, rel=1e-2)
    assert training_flops(shape, [1]) == pytest.approx(6 * (active + shape.vocab_size * shape.hidden_size), rel=1e-3)


@pytest.mark.parametrize(("tokens_per_second", "tflops"), [(46_277, 380), (51_430, 423), (57_642, 474), (62_705, 515)])
def test_flops_of_a_measured_row(tokens_per_second: int, tflops: int) -> None:
    """Measured on one H100, Llama-3.2-1B shape, rows of 4096: tokens/s and TFLOP/s by this convention."""
    per_token = training_flops(named_model_shape("1b"), [4096]) / 4096
    assert tokens_per_second * per_token / 1e12 == pytest.approx(tflops, abs=0.6)


def test_packing_costs_each_example_its_own_square() -> None:
    shape = named_model_shape("1b")
    apart = training_flops(shape, [1000]) + training_flops(shape, [3096])
    assert training_flops(shape, [1000, 3096]) == apart < training_flops(shape, [4096])
    assert training_flops_of(shape, 4096, 1000**2 + 3096**2) == apart


def test_layers_with_a_window_attend_to_it_alone() -> None:
    """Gemma 3 1B: 22 of 26 layers see 512 positions. Counted token by token, with twice what each attends to."""
    shape = named_model_shape("gemma3-1b")
    length, width = 4096, shape.num_attention_heads * shape.head_dim
    products = training_flops(shape, [1]) - 6 * shape.num_layers * width
    pairs = sum(4 * place + 22 * min(place, 512) for place in range(1, length + 1))
    found = training_flops(shape, [length]) - length * products
    assert found == pytest.approx(6 * width * 2 * pairs, rel=1e-3)
    assert training_flops(shape, [512]) - 512 * products == 6 * 26 * width * 512**2


def test_frozen_weights_cost_four_operations_and_adapters_six() -> None:
    """8B with adapters of rank 16 on all linear layers: 41.9 million weights, by the sizes of the model's card."""
    shape, lora = named_model_shape("8b"), LoraSpec(rank=16)
    adapters = 32 * 16 * (4 * (4096 + 4096) - 2 * (4096 - 1024) + 3 * (4096 + 14336))
    frozen = parameters(shape) - shape.vocab_size * shape.hidden_size  # an embedding is looked up
    assert training_flops_of(shape, 1, 0, lora) == 4 * frozen + 6 * adapters
    attention = training_flops_of(shape, 10, 100) - training_flops_of(shape, 10, 0)
    assert training_flops_of(shape, 10, 100, lora) - training_flops_of(shape, 10, 0, lora) == attention


def test_mfu() -> None:
    assert mfu(989e12 * 3, seconds=2, peak_tflops=989, gpus=3) == pytest.approx(0.5)


def test_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"^'12b' is not a known model size; did you mean '1b'\?; known: 0.5b, 1b, "):
        named_model_shape("12b")
