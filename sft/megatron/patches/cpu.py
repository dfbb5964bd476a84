"""Run Megatron-core on CPU ranks: rewrite its CUDA idioms while its modules are imported.

Megatron-core names CUDA literally in some 220 places (`torch.cuda.current_device()`, `device="cuda"`,
`param.type() == 'torch.cuda.FloatTensor'`). A finder on `sys.meta_path` replaces these few idioms in the source text
of `megatron.core` modules, in memory, before they are compiled. The installed files and their caches stay as they
are, line numbers do not move, and torch itself is not touched, so Lightning and transformers see an ordinary CPU
torch. Where CUDA exists, nothing happens at all.

Rejected: patching `torch.cuda.*` functions (the string literals and type names remain) and a fork of Megatron-core
(every release would have to be merged). `REWRITES` is checked by a contract test against the pinned release.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
import types
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One CUDA idiom and its CPU form; `name` identifies it in the contract test."""

    name: str
    pattern: re.Pattern[str]
    replacement: str

    @classmethod
    def of(cls, name: str, pattern: str, replacement: str) -> Rewrite:
        return cls(name, re.compile(pattern, re.MULTILINE), replacement)


REWRITES: tuple[Rewrite, ...] = (
    # The replacement has no quotes, because some of these stand inside f-strings.
    Rewrite.of("current_device", r"torch\.cuda\.current_device\(\)", "torch.get_default_device()"),
    Rewrite.of("device_literal", r"""device=(['"])cuda\1""", 'device="cpu"'),
    Rewrite.of("init_data", r"""init_data\((['"])cuda\1\)""", 'init_data("cpu")'),
    Rewrite.of("synchronize", r"torch\.cuda\.synchronize\(\)", "None"),
    Rewrite.of("current_stream", r"= torch\.cuda\.current_stream\(\)", "= None"),
    Rewrite.of("to_cuda", r"\.cuda\((non_blocking=True|torch\.get_default_device\(\))?\)", ".cpu()"),
    Rewrite.of("tensor_type", r"torch\.cuda\.(Half|BFloat16|Float)Tensor(?=['\",\s])", r"torch.\1Tensor"),
    Rewrite.of("rng_state", r"torch\.cuda\.(get_rng_state|set_rng_state)\(", r"torch.\1("),
    Rewrite.of("rng_of_device", r"torch\.cuda\.random\.get_rng_state\(device=device\)", "torch.get_rng_state()"),
    Rewrite.of("manual_seed", r"torch\.cuda\.manual_seed\(", "torch.manual_seed("),
    Rewrite.of("autocast", r"torch\.autocast\(\"cuda\"", 'torch.autocast("cpu"'),
    Rewrite.of("device_type", r"""device_type=(['"])cuda\1""", 'device_type="cpu"'),
    # Fused kernels are torch.compile'd when imported; on a CPU that needs a C++ compiler and gains nothing.
    Rewrite.of("jit_fuser", r"^enable_jit_fuser\(\)$", "disable_jit_fuser()"),
    # On a CPU the CPU generator is the device's generator: its state has to change.
    Rewrite.of(
        "rng_warning",
        r"logging\.getLogger\(__name__\)\.warning\('CPU RNG state changed within GPU RNG context'\)",
        "pass",
    ),
)

hits: Counter[str] = Counter()
"""How often each rewrite applied in this process."""


def install() -> None:
    """Make `megatron.core` importable and correct on a machine without CUDA. Call this before its first import.

    Does nothing where CUDA exists or when already installed. RuntimeError when megatron.core is already loaded.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    loaded = next((name for name in sys.modules if name.startswith("megatron.core")), None)
    if loaded:
        raise RuntimeError(
            f"{loaded} was imported before sft.megatron.core; import Megatron-core only through sft.megatron.core"
        )
    sys.meta_path.insert(0, _Finder())


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten source; never cached on disk, so other programs get the original."""

    def get_code(self, fullname: str) -> types.CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path).decode("utf-8")
        replaced = 0
        for rewrite in REWRITES:
            source, count = rewrite.pattern.subn(rewrite.replacement, source)
            hits[rewrite.name] += count
            replaced += count
        if not replaced:
            return super().get_code(fullname)
        code: types.CodeType = compile(source, path, "exec", dont_inherit=True)
        return code


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
