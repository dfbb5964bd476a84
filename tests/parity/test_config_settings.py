"""Every setting that a family's configuration class knows is followed as transformers follows it, or refused by name.

Found by asking the class and not by a list of ours: one that a later transformers adds is tried as well. Each setting
gets other values, one at a time, beside the family's small config, and logits are compared with transformers'. A
setting that is skipped over trains another model than the one that is exported.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.contract.errors import ConfigError
from launcher.contract.model_shape import read_model_shape
from launcher.contract.spec import RunSpec
from launcher.contract.usual_keys import language_model_config
from sft.hf.checks import check_model_settings
from sft.models.registry import SUPPORTED, family, read_architecture
from sft.models.unused_settings import unused_settings
from tests.ranks import run_ranks
from tests.sft.hf_cases import OUTER, auto_class, build_and_load, example_ids, forward_chunks, randomize, run_spec
from tests.tiers import thinned

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
"""Logits are of size 1; twice what is seen of rounding. Settings that are not followed differ by 0.1 and more."""
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
STRETCHED = {"rope_type": "dynamic", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.3, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES: list[dict[str, object]] = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 4.0},
    STRETCHED,
    *({**STRETCHED, "alpha": alpha} for alpha in (8.0, 0.0)),
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    YARN,
    *({**YARN, **more} for more in ({"attention_factor": 1.5}, {"beta_fast": 8.0}, {"beta_slow": 3.0})),
    *({**YARN, **more} for more in ({"mscale": 0.7}, {"mscale": 1.3, "mscale_all_dim": 0.7})),
    *({**YARN, **more} for more in ({"truncate": False}, {"factor": None})),
    {**LLAMA3, "original_max_position_embeddings": 32},
    {**LONGROPE, "original_max_position_embeddings": 64},
    {**LONGROPE, "original_max_position_embeddings": 64, "factor": 4.0},
    # By these transformers computes NaN as well, or stops.
    *({"rope_type": "default", "rope_theta": theta} for theta in (0.0, -500.0)),
    *({"rope_type": "linear", "factor": factor} for factor in (0.0, -4.0)),
    *({**YARN, **odd} for odd in ({"factor": 0.0}, {"original_max_position_embeddings": 0}, {"beta_slow": 0.0})),
    {**LLAMA3, "original_max_position_embeddings": 32, "factor": 0.0},
    {**LONGROPE, "original_max_position_embeddings": 64, "short_factor": [0.0, 1.3, 1.5, 2.0]},
]
"""RoPE settings; of families with two kinds of layers, for either kind."""
ACTIVATIONS: list[object] = ["gelu", "gelu_pytorch_tanh", "gelu_new", "silu", "relu", "quick_gelu"]
OTHER: dict[str, list[object]] = {
    "layer_types": [[FULL] * 4, [SLIDING] * 4, [FULL, SLIDING] * 2, [SLIDING, FULL] * 2, [FULL, LINEAR] * 2],
    "sliding_window": [6, None],
    "num_key_value_heads": [1, 6, None],
    "head_dim": [8, None],
    "mlp_only_layers": [[0, 2]],
    "decoder_sparse_step": [2],
    "no_rope_layers": [[0, 1, 1, 0], None],
    "max_window_layers": [2],
    "use_bidirectional_attention": [True],
    "final_logit_softcapping": [0.7, None],
    "attn_logit_softcapping": [0.7, None],
    "clip_qkv": [0.5, 0.0],
    "n_inner": [60, None],
    "moe_intermediate_size": [20],
    "router_jitter_noise": [0.2],
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), ACTIVATIONS),
    "rms_norm_eps": [0.05, 0.0, -1e-6],
}
"""Values for which a factor, or the other truth value, would mean nothing. For pairs of settings see PAIRS."""
PAIRS: list[dict[str, object]] = [
    {"is_causal": False},
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": None},
    {"use_sliding_window": True, "sliding_window": 6},
    {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 6, "layer_types": [FULL, SLIDING] * 2},
    {"use_sliding_window": False, "sliding_window": 6, "layer_types": [FULL, SLIDING] * 2},
    {"sliding_window": 6, "sliding_window_pattern": 3},
    {"n_head": 3, "num_attention_heads": 6},
    {"num_experts_per_tok": 1, "norm_topk_prob": True},
]
"""Settings that classes do not name themselves, and some that mean something together alone."""
NOT_OF_THE_MODEL = {"dtype", "vocab_size", "transformers_version", "model_type", "architectures", "_name_or_path"}
"""Keys that are about files, and sizes that the compared token ids depend on."""


def changes_of(name: str) -> Iterator[dict[str, object]]:
    """Yield settings to change, one at a time, from what the configuration class of a family knows."""
    from transformers import AutoConfig

    known: dict[str, Any] = language_model_config(AutoConfig.for_model(name).to_dict())
    for key, default in known.items():
        if key == "rope_parameters":
            yield from rope_changes(default)
        elif key not in NOT_OF_THE_MODEL and not key.endswith("token_id"):
            yield from ({key: value} for value in OTHER.get(key, list(other_values(default))))
    yield from PAIRS


def other_values(default: object) -> Iterator[object]:
    if isinstance(default, bool):
        yield not default
    elif isinstance(default, int):
        yield from (2 * default, default + 1) if default < 10 else ()  # larger ones are sizes: see the small configs
    elif isinstance(default, float):
        yield from (0.5 * default + 0.1, 0.0, -default or -1.0)


def rope_changes(default: Mapping[str, object]) -> Iterator[dict[str, object]]:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    for rope in ROPES:
        if FULL in default:
            yield {"rope_parameters": {FULL: rope, SLIDING: plain}}
            yield {"rope_parameters": {FULL: plain, SLIDING: rope}}
        else:
            yield {"rope_parameters": rope}
        yield {"rope_parameters": None, "rope_scaling": rope}  # as earlier files have it
        yield {"rope_parameters": None, "rope_scaling": rope, "rope_theta": 3000.0}


def with_changes(name: str, changes: Mapping[str, object]) -> dict[str, object]:
    """Return the config.json of a family's small model with changes. None drops the RoPE settings, as absent ones."""
    small: dict[str, Any] = dict(family(name).small_config)
    text = {**OUTER, **small.get("text_config", small), **changes}
    if text.get("rope_parameters", 0) is None:
        del text["rope_parameters"]
    nested = {**small, "text_config": text} if "text_config" in small else text
    return {**nested, "model_type": name}


def outcomes(name: str, changes: list[dict[str, object]], directory: Path) -> list[str]:
    """Runs on a rank: what became of each change."""
    logging.disable(logging.WARNING)  # of transformers, about settings that mean nothing
    found = []
    for index, change in enumerate(changes):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(with_changes(name, change)))
        found.append(outcome(name, directory, with_groups=not index))
    return found


def outcome(name: str, directory: Path, *, with_groups: bool) -> str:
    """Return "refused", "means nothing" (to transformers), "followed", or how logits differ."""
    spec, ids = run_spec(directory, 1), example_ids()
    try:
        check_model_settings(spec, read_architecture(directory))
    except ConfigError:
        return "refused"
    try:
        expected, trained = hf_logits_of_new_weights(name, directory, ids)
    except Exception as error:  # of whatever kind: its own checks, or operations on impossible sizes
        return f"means nothing: {type(error).__name__}"
    chunks = build_and_load(spec, with_groups=with_groups)
    logits = forward_chunks(chunks, ids, read_model_shape(directory).vocab_size)
    assert logits is not None
    difference = float((logits - expected).abs().max())
    if not difference < TOLERANCE:
        return f"not followed: logits differ by {difference:.3g}"
    if not torch.equal(expected, trained) and not list(unused_settings(directory, RunSpec())):
        return "not followed in training, and not named by prepare"
    return "followed"


def hf_logits_of_new_weights(name: str, directory: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write weights for the config in `directory`; return transformers' logits, and those of its training mode."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory)
    model = auto_class(name).from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomize(model)
    with torch.no_grad():
        expected, trained = model.eval()(ids).logits, model.train()(ids).logits
    written = (directory / "config.json").read_bytes()
    model.save_pretrained(directory)
    (directory / "config.json").write_bytes(written)
    return expected, trained


@pytest.mark.parametrize("name", thinned(SUPPORTED, "gemma3_text", "granite"))
def test_settings_are_followed_or_refused(name: str, tmp_path: Path) -> None:
    """Seen to give NaN, without a word, for an attention_multiplier of 0."""
    changes: list[dict[str, object]] = [{}, *changes_of(name)]
    (found,) = run_ranks(1, outcomes, name, changes, tmp_path / "model", init=True, timeout=300)
    wrong = {
        json.dumps(change): result
        for change, result in zip(changes, found, strict=True)
        if result.startswith("not followed")
    }
    assert wrong == {}
    assert found[0] == "followed"  # the small config itself
    assert found.count("followed") >= 10
    assert found.count("refused") >= 5
