"""Greedy answers of a Hugging Face directory: what the model says before and after training, side by side.

Answers come from vanilla transformers and not from the trained ranks: they show what anyone gets who loads the
export, and need no generation code for Megatron-core.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.contract.rundir import RunPaths, append_line, read_lines
from launcher.contract.spec import DataSpec, RunSpec
from sft.data.encoding.prompt import Prompt, PromptWriter
from sft.data.encoding.tokenizer import chat_template, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def answer(
    model_dir: Path,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    *,
    data: DataSpec | None = None,
    tokenizer_dir: Path | None = None,
) -> list[str]:
    """Return one greedy answer for each prompt, of a model or an adapter: in fp32 on a CPU, as stored on a GPU.

    Prompts are written as `data` has them written in training. The tokenizer is the model's own unless `tokenizer_dir`
    names another.
    """
    data = data or DataSpec()
    tokenizer = load_tokenizer(tokenizer_dir or model_dir)
    has_template = data.chat_template != "tokenizer" or tokenizer.chat_template
    writer = PromptWriter(tokenizer, chat_template(tokenizer, data) if has_template else None, data)
    model = load_for_answers(model_dir)
    return [_answer_one(model, tokenizer, writer.question(prompt), max_new_tokens) for prompt in prompts]


def load_for_answers(model_dir: Path) -> Any:
    """Return the model in a directory, or the one that its adapter belongs to with the adapter added."""
    # Slow to import, and few runs ask for answers.
    import torch
    from transformers.utils import logging

    from sft.hf.adapter_export import adapted_model, add_adapter
    from sft.hf.loaded_model import load_transformers_model

    # A bar that is rewritten in place would be one long line of a log.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: torch.dtype | Literal["auto"] = "auto" if device == "cuda" else torch.float32
    base = adapted_model(model_dir)
    model: Any = load_transformers_model(base or model_dir, dtype)
    if base is not None:
        add_adapter(model, model_dir)
    return model.to(device).eval()


def record_answers(paths: RunPaths, spec: RunSpec, model_dir: Path, label: Literal["before", "after"]) -> list[str]:
    """Answer logging.prompts, print the answers and append them to samples.jsonl. Without prompts nothing is loaded.

    A run that is prepared again (after a requeue) keeps the answers it has.
    """
    prompts = spec.logging.prompts
    named = spec.model.tokenizer if label == "before" else None  # an export has the tokenizer with it
    tokenizer_dir = Path(named) if named else model_dir
    known = {
        line["prompt"]: line["answer"]
        for line in read_lines(paths.samples)
        if line.get("label") == label and isinstance(line.get("prompt"), str) and isinstance(line.get("answer"), str)
    }
    missing = [prompt for prompt in prompts if label == "after" or prompt not in known]
    fresh = (
        dict(zip(missing, answer(model_dir, missing, data=spec.data, tokenizer_dir=tokenizer_dir), strict=True))
        if missing
        else {}
    )
    for prompt, text in fresh.items():
        append_line(paths.samples, {"label": label, "prompt": prompt, "answer": text})
    answers = [str({**known, **fresh}[prompt]) for prompt in prompts]
    for prompt, text in zip(prompts, answers, strict=True):
        print(f"[{label} training] {prompt}\n    {text}", file=sys.stdout, flush=True)
    return answers


def _answer_one(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_new_tokens: int) -> str:
    import torch

    ids = torch.tensor([prompt.ids], device=model.device)
    # Sampling settings that the model brings along would only be warned about; greedy is what is compared.
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def answers_wanted(spec: RunSpec) -> bool:
    """Return whether the prompts of the config are answered before and after training."""
    return bool(spec.logging.prompts) and spec.checkpoint.export and spec.model.init == "pretrained"
