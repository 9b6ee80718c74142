"""Gates of tokens over experts, and how evenly they share the tokens out."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(p, chosen, g): g are the k largest of p, scaled to a sum of one (a single one keeps its size, through which its gradient flows)."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    if k == p.shape[-1]:
        return p, torch.ones_like(p), p
    chosen = torch.zeros_like(p).scatter(-1, p.topk(k, -1).indices, 1.0)
    g = p * chosen
    return p, chosen, g if k == 1 else g / g.sum(-1, keepdim=True)


@torch.no_grad()
def load_balance(p: Tensor, chosen: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(L, dL/dW) of the load-balancing loss L = E sum_i f_i P_i and of the router W (E, n) that gave p = softmax(W x).

    f_i is the share of the choices that fell on expert i, P_i the mean of p_i: Fedus et al. 2021 (Switch), arXiv 2101.03961, eq. 4-6. f has no
    gradient. x (..., n) is taken as it is: the loss trains the router, not what lies below.
    """
    p, chosen, x = p.flatten(0, -2), chosen.flatten(0, -2), x.flatten(0, -2)
    f = chosen.sum(0) / chosen.sum()
    slope = p.shape[-1] / len(p) * p * (f - p @ f[:, None])
    return p.shape[-1] * (f * p.mean(0)).sum(), (slope.to(x.dtype).mT @ x).to(p.dtype)


def mean_over_processes(t: Tensor) -> Tensor:
    """The mean over the processes of a distributed run; t itself in any other."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        t = t.clone()
        torch.distributed.all_reduce(t)
        t /= torch.distributed.get_world_size()
    return t


def classifier_size(d: int, dim: int, depth: int, layers: int, experts: int) -> int:
    """The entries of such a classifier."""
    widths = [d, *[dim] * (depth - 1), layers * experts]
    return sum((n + 1) * m for n, m in itertools.pairwise(widths))
