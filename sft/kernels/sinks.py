"""Trained sinks of a softmax, by what any attention kernel gives: its output and the logarithms of its sums.

A sink is one more entry of each row's softmax, a score of the head that no value belongs to. With O and L, the kernel's
output and log-sum-exp without it,

    L' = log(exp(L) + exp(sink)),    O' = O * exp(L - L').

The kernel's own backward pass gives the gradients of queries, keys and values, once it is handed O' and L': it makes
the probabilities of scores and L', and the softmax's correction of O' and its gradient. What is left is the sink's:
-exp(sink - L') times that correction, added up over the tokens. Rejected: a kernel of our own, or a key of zeros with a
mask that adds the sink, which no flash kernel takes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(context: Tensor, log_sum: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return O' [tokens, heads, dim] in the context's type and L' [heads, tokens], of those without sinks [heads]."""
    # A kernel that orders its sums otherwise must not be taken for one that does not.
    assert log_sum.shape == (context.size(1), context.size(0)), (log_sum.shape, context.shape)
    sums = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[:, None])
    kept = torch.exp(log_sum - sums).t().unsqueeze(-1)
    return (context * kept).to(context.dtype), sums


def sinks_gradient(grad: Tensor, context: Tensor, log_sum: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of the sinks, [heads], from that of the context O', and L'."""
    # Autograd's softmax calls it the sum of probabilities times their gradients. With O' in hand it is one product.
    correction = (grad.to(log_sum.dtype) * context.to(log_sum.dtype)).sum(-1)
    own = torch.exp(sinks.to(log_sum.dtype)[:, None] - log_sum)
    return -(own * correction.t()).sum(1).to(sinks.dtype)
