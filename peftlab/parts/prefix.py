"""Keys and values that are nobody's tokens: shaped to a call of attention, put in front of its own, weighed by a gate.

Legend: n virtual positions, w features of all heads together, B batch, H heads, L queries, S keys, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_heads(K: Tensor, like: Tensor, path: str = "") -> Tensor:
    """K (n, w) or (B, n, w) as heads (..., H, n, D) beside `like` (..., H, S, D); fewer heads are repeated as grouped queries do."""
    n, w = K.shape[-2:]
    D = like.shape[-1]
    if w % D:
        raise ValueError(f"virtual keys of {w} features do not divide into heads of {D} at {path!r}: say width=, the features of all key heads together")
    heads = K.to(like.dtype).reshape(*K.shape[:-1], w // D, D).transpose(-3, -2)
    if like.ndim < 4:
        return _to_flat_heads(heads, like, path)
    H = like.shape[-3]
    if H % heads.shape[-3]:
        raise ValueError(f"virtual keys for {heads.shape[-3]} heads, attention at {path!r} runs with {H}: say width=, the features of all key heads together")
    if heads.shape[-3] != H:
        heads = heads.repeat_interleave(H // heads.shape[-3], -3)
    if heads.ndim == 4 and like.ndim != 4:
        raise ValueError(f"attention at {path!r} has {like.ndim} dimensions: rows of the batch cannot be told apart there")
    return heads.expand(*like.shape[:-2], n, D)


def _to_flat_heads(heads: Tensor, like: Tensor, path: str) -> Tensor:
    """The same for attention on (B * H, S, D), or (B, S, D) with one head."""
    h, n, D = heads.shape[-3:]
    if like.ndim == 2:
        return heads[0]
    if heads.ndim == 3 and like.shape[0] % h:
        raise ValueError(f"virtual keys for {h} heads, but attention at {path!r} has {like.shape[0]} rows and heads together")
    rows = heads if heads.ndim == 4 else heads.expand(like.shape[0] // h, h, n, D)
    return rows.reshape(-1, n, D)


def to_features(k: Tensor, w: int) -> Tensor | None:
    """Keys (..., H, S, D) of a call, as (S, w) of its first row: heads that were repeated for grouped queries are taken once. None if w does not fit."""
    while k.ndim > 3:
        k = k[0]
    H, S, D = k.shape if k.ndim == 3 else (1, *k.shape)
    if w % D or H % (w // D):
        return None
    return k.reshape(H, S, D)[:: H // (w // D)].transpose(0, 1).reshape(S, w)


def attend_with_prefix(run, q: Tensor, k: Tensor, v: Tensor, options: dict, K: Tensor, V: Tensor, there: Tensor | None = None, path: str = "") -> Tensor:
    """run(q, [K; k], [V; v]) with the mask extended.

    K (n, w), V (n, w'), or with a batch in front, where `there` (B, n) says which virtual positions a row has.
    """
    S, n = k.shape[-2], K.shape[-2]
    k, v = torch.cat([to_heads(K, k, path), k], -2), torch.cat([to_heads(V, v, path), v], -2)
    return run(q, k, v, **lengthen_mask(options, q, S, n, there))


def lengthen_mask(options: dict, q: Tensor, S: int, n: int, there: Tensor | None) -> dict:
    """The options of an attention call with n keys in front of its S, which every query sees, or the rows that have them: there (B, n)."""
    mask = options["attn_mask"]
    if options["is_causal"]:
        mask = torch.ones(q.shape[-2], S, dtype=torch.bool, device=q.device).tril()
    if mask is None and there is None:
        return options
    if mask is None:
        mask = torch.ones(1, 1, 1, S, dtype=torch.bool, device=q.device)
    mask = mask.expand(*mask.shape[:-1], S)
    if there is None:
        return options | dict(attn_mask=F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0), is_causal=False)
    mask = mask[(None,) * (4 - mask.ndim)]
    seen = there[:, None, None, :]
    if mask.dtype != torch.bool:
        seen = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(~seen, float("-inf"))
    shape = (max(mask.shape[0], seen.shape[0]), *mask.shape[1:3])
    return options | dict(attn_mask=torch.cat([seen.expand(*shape, n), mask.expand(*shape, S)], -1), is_causal=False)


def attend_with_gate(
    run, q: Tensor, k: Tensor, v: Tensor, options: dict, K: Tensor, V: Tensor, g: Tensor, path: str = "", there: Tensor | None = None
) -> Tensor:  # fmt: skip
    """run(q, k, v) + g * softmax(q K^T / sqrt(D)) V: a softmax of its own, so that g = 0 is the attention as it was.

    there (B, n): which of the virtual positions a row has; where it has none, g is zero.
    """
    y = run(q, k, v, **options)
    K, V = to_heads(K, q, path), to_heads(V, q[..., :1].expand(*q.shape[:-1], v.shape[-1]), path)
    scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    scores = scale * (q @ K.mT)
    if there is not None:
        scores = scores.masked_fill((~there & there.any(1, keepdim=True))[:, None, None, :], float("-inf"))
    weights = F.softmax(scores, -1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    return y + g.to(y.dtype) * (weights @ V).to(y.dtype)


def pad_together(tensors: list[Tensor], rows: list[Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """Tensors (n_i, w) of different lengths for rows of a batch -> (B, n, w), their ends at the end, and which positions are there (B, n).

    Rows that have none are zero and not there.
    """
    n = max(t.shape[0] for t in tensors)
    device = tensors[0].device
    which = torch.zeros(batch, dtype=torch.long, device=device)
    for i, r in enumerate(rows):
        which = which.index_fill(0, r.to(device), i + 1)
    length = torch.tensor([0, *(t.shape[0] for t in tensors)], device=device)
    table = torch.stack([torch.zeros_like(F.pad(tensors[0], (0, 0, n - tensors[0].shape[0], 0))), *(F.pad(t, (0, 0, n - t.shape[0], 0)) for t in tensors)])
    return table[which], torch.arange(n, device=device)[None] >= n - length[which][:, None]
