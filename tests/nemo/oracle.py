"""What the real NeMo says. Run by the Python of .venv-nemo: `oracle.py COMMAND REQUEST.json ANSWER.json`.

NeMo needs CUDA; here it runs on CPU through the same rewriting of Megatron-core that this project uses
(sft/megatron/patches/cpu.py), and with those fusions off that need Transformer Engine.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from pydoc import locate
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sft.megatron.patches import cpu

cpu.install()

import torch  # noqa: E402 - after the rewriting

NO_KERNELS = (
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "gradient_accumulation_fusion",
    "bias_dropout_fusion",
)
"""Settings of speed that the CPU has no kernels for."""


def versions(request: Any) -> dict[str, str]:
    """Return the versions of what answers."""
    from importlib.metadata import version

    return {name: version(name) for name in ("nemo-toolkit", "megatron-core", "lightning", "transformers", "torch")}


def schedules(request: list[dict[str, Any]]) -> list[list[float]]:
    """Return the learning rate of every step."""
    from nemo.core.optim.lr_scheduler import CosineAnnealing

    return [_rates(CosineAnnealing, **wanted) for wanted in request]


def _rates(scheduler: Any, *, lr: float, min_lr: float, warmup: int, hold: int, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = scheduler(optimizer, max_steps=steps, warmup_steps=warmup, constant_steps=hold, min_lr=min_lr)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def masks(request: dict[str, Any]) -> list[dict[str, list[Any]]]:
    """Return ids and loss mask of every example of a file, as NeMo's SFT data sets give them: masks are of ids[1:]."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.data.core import create_sft_dataset

    data = create_sft_dataset(
        Path(request["file"]),
        AutoTokenizer(request["tokenizer"]),
        seq_length=512,
        memmap_workers=1,
        **request["options"],
    )
    found = []
    for index in range(len(data)):
        batch = data.collate_fn([data[index]])
        count = len(data[index]["input_ids"]) - 1
        ids = [int(batch["tokens"][0][0]), *batch["labels"][0][:count].tolist()]
        found.append({"ids": ids, "mask": batch["loss_mask"][0][:count].tolist()})
    return found


def write(request: dict[str, Any]) -> dict[str, Any]:
    """Build a model with random weights, save it as NeMo does, and say what it answers."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.lightning.io.connector import ModelConnector

    torch.manual_seed(0)
    fields = request["config"] | dict.fromkeys(NO_KERNELS, False) | {"params_dtype": torch.float32}
    config: Any = locate(request["config_class"])
    model_class: Any = locate(request["model_class"])
    model = model_class(config(**fields), tokenizer=AutoTokenizer(request["tokenizer"]))
    connector = ModelConnector("oracle")
    trainer = connector.nemo_setup(model)
    with torch.no_grad():  # NeMo leaves them as memory was, for an import to fill
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    connector.nemo_save(Path(request["path"]), trainer)
    return _answer(model, request["ids"])


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint with NeMo's own code, context and weights, and say what it answers."""
    import fiddle
    from nemo.lightning.io import api, pl
    from nemo.lightning.io.connector import ModelConnector

    load_context = api.load_context
    torch.cuda.Stream = lambda *_, **__: None
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    pl._fix_tensors_device = lambda checkpoint: (
        checkpoint
    )  # moves what is not on the GPU, and asserts that there is one

    def on_a_cpu(path: Path, subpath: str | None = None, build: bool = True) -> Any:
        context = load_context(path, subpath=subpath, build=False)
        for name in NO_KERNELS:
            setattr(context.config, name, False)
        return fiddle.build(context)

    api.load_context = on_a_cpu
    model, _ = ModelConnector("oracle").nemo_load(Path(request["path"]))
    answer = _answer(model, request["ids"])
    return answer | {"vocabulary": model.tokenizer.vocab_size, "model": type(model).__name__}


@torch.no_grad()
def _answer(model: Any, rows: list[list[int]]) -> dict[str, Any]:
    """Return the logits, and the loss of each token as the label of the one before it."""
    from megatron.core.tensor_parallel import random

    cpu.redirect_rng(random)
    random.model_parallel_cuda_manual_seed(1)
    model.eval()
    ids = torch.tensor(rows)
    positions = torch.arange(ids.size(1)).expand_as(ids)
    mask = (torch.tril(torch.ones(ids.size(1), ids.size(1))) < 0.5)[None, None]
    logits = model(ids, positions, mask)
    losses = model(ids[:, :-1], positions[:, :-1], mask[..., :-1, :-1], labels=ids[:, 1:])
    return {"logits": logits.float().tolist(), "losses": losses.float().tolist()}


def main() -> None:
    command, request, answer = sys.argv[1:]
    found = globals()[command](json.loads(Path(request).read_text()))
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":  # NeMo's saving starts processes that import this file again
    main()
