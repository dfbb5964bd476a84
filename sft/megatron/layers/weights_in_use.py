"""Weights that an operation uses without calling the module that has them."""

from __future__ import annotations

from torch.nn import Module


def await_weights(module: Module) -> None:
    """Run a module's forward pre-hooks when its weights are used without calling it.

    With overlapped gathering of updated weights, Megatron-core waits for them in these hooks.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
