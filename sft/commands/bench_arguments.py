"""The arguments of `python -m sft bench`, apart from the benchmark, which imports torch: every command reads them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from launcher.contract.argument_types import count
from launcher.contract.cost_model.workload import Recompute
from sft.bench.workload import INITIAL_STD


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sft bench`."""
    parser.add_argument("--shape", nargs="+", default=["1b"], help="named shapes: 0.5b, 1b, 3b, 8b, ...")
    parser.add_argument("--data", nargs="+", default=["ragged"], choices=["full", "ragged"], help="kinds of rows")
    parser.add_argument("--seq-length", nargs="+", type=count, default=[4096], help="tokens of a row")
    parser.add_argument("--rows", nargs="+", type=count, default=[8], help="rows of one GPU in a step")
    parser.add_argument("--layers", type=count, help="decoder layers in place of all that the shape has")
    parser.add_argument(
        "--router-std", type=float, default=INITIAL_STD, help="standard deviation of the weights of experts' routers"
    )
    parser.add_argument("--lora-rank", type=count, help="train LoRA adapters of this rank on every linear layer alone")
    parser.add_argument(
        "--kernels", nargs="+", default=["auto"], choices=["auto", "plain", "fused"], help="as train.kernels"
    )
    parser.add_argument(
        "--attention", nargs="+", default=["auto"], choices=["auto", "flash2", "flash4"], help="as train.attention"
    )
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=["bf16", "fp8"], help="as train.precision")
    parser.add_argument(
        "--recompute", nargs="+", default=["none"], choices=get_args(Recompute), help="as train.recompute"
    )
    parser.add_argument("--fp8-experts", action="store_true", help="as train.fp8.experts, where --precision is fp8")
    parser.add_argument("--recompute-layers", type=count, help="as train.recompute_layers, where --recompute is full")
    parser.add_argument(
        "--cuda-graphs", nargs="+", default=["auto"], choices=["auto", "never", "always"], help="as train.cuda_graphs"
    )
    parser.add_argument("--micro-batches", type=count, default=1, help="micro-batches of a step")
    _add_peers(parser)
    parser.add_argument("--gpus", nargs="+", type=count, default=[1], help="how many GPUs of this machine to use")
    parser.add_argument(
        "--topology", nargs="+", default=["dp"], help="topologies on several GPUs: dp, tp2+sp, pp2, ..."
    )
    parser.add_argument("--warmup", type=int, default=4, help="steps before the clock starts")
    parser.add_argument("--steps", type=count, default=12, help="timed steps")
    parser.add_argument("--output", type=Path, help="JSON file of the results")


def _add_peers(parser: argparse.ArgumentParser) -> None:
    """Add which other trainers to run, and how."""
    parser.add_argument(
        "--vs",
        nargs="+",
        default=[],
        choices=["trl", "transformers", "automodel", "torchtitan", "unsloth"],
        help="other trainers to run",
    )
    parser.add_argument(
        "--vs-weights", nargs="+", default=["fp32"], choices=["fp32", "bf16"], help="precision of their weights"
    )
    parser.add_argument(
        "--vs-attention", nargs="+", default=["auto"], choices=["auto", "flash2", "flash4"], help="kernel of the others"
    )
    parser.add_argument(
        "--vs-experts", nargs="+", default=["liger"], choices=["liger", "grouped"], help="experts of transformers"
    )
    parser.add_argument(
        "--vs-cuda-graphs",
        nargs="+",
        default=["never"],
        choices=["never", "always"],
        help="whether torchtitan's passes are launched as CUDA graphs",
    )
    parser.add_argument("--vs-micro-batches", type=count, help="micro-batches of the others; default: as many as ours")
    parser.add_argument("--vs-parallel", nargs="+", default=["ddp"], choices=["ddp", "fsdp"], help="on several GPUs")
