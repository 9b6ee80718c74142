"""Choosing and applying sparse supports. A support is the increasing flat positions of the chosen entries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def largest(score: Tensor, n: int) -> Tensor:
    """The positions (n,) of the n largest entries of a score of any shape, increasing; ties go by position, so the count is exact."""
    flat = score.flatten()
    return flat.topk(n, sorted=False).indices.sort().values.to(index_dtype(flat.numel()))


def index_dtype(numel: int) -> torch.dtype:
    """The smaller integer type that holds every position."""
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64


@functools.lru_cache(maxsize=32)
def _drawn(numel: int, n: int, seed: int) -> Tensor:
    return torch.randperm(numel, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:n].clone()


def drawn(numel: int, n: int, seed: int) -> Tensor:
    """n different positions (n,) out of numel, in the order drawn; a function of its arguments alone, on CPU."""
    return _drawn(numel, n, seed).clone()


def split_budget(scores: list[Tensor], budget: int) -> list[Tensor]:
    """Boolean masks, shaped like the scores, that keep exactly the `budget` largest entries over all of them."""
    flat = torch.cat([s.flatten() for s in scores])
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[flat.topk(budget).indices] = True
    return [k.view_as(s) for k, s in zip(keep.split([s.numel() for s in scores]), scores, strict=True)]


def soft_threshold(x: Tensor, by: float) -> Tensor:
    """sign(x) max(|x| - by, 0): the proximal map of by |x|_1 (Donoho 1995)."""
    return x.sign() * (x.abs() - by).clamp_min(0)


def scatter_into(W: Tensor, index: Tensor, v: Tensor) -> Tensor:
    """W with v (n,) added at the flat positions index (n,), in the wider of the two dtypes."""
    dtype = torch.promote_types(W.dtype, v.dtype)
    return W.to(dtype).flatten().index_add(0, index, v.to(dtype)).view(W.shape)
