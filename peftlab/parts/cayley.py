"""Orthogonal matrices from skew ones.

Legend: u (..., b (b - 1) / 2) the strict upper triangle, row by row; Q, R (..., b, b); X' the transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skew(u: Tensor, b: int) -> Tensor:
    """Q = U - U' with u in the strict upper triangle of U."""
    i, j = torch.triu_indices(b, b, 1, device=u.device)
    U = u.new_zeros(*u.shape[:-1], b * b).scatter(-1, (i * b + j).expand(u.shape), u).unflatten(-1, (b, b))
    return U - U.mT


def cayley(Q: Tensor) -> Tensor:
    """R = (I + Q)(I - Q)^-1, a rotation for every skew Q; computed in float32 or better."""
    Q = Q.to(torch.promote_types(Q.dtype, torch.float32))
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    # 2 (I - Q)^-1 - I is the same, since I + Q = 2 I - (I - Q), and the gradient of an inverse needs no second solve. An infinite Q has a finite
    # inverse, zero: 0 Q makes that NaN, so that an overflow is seen.
    return 2 * torch.linalg.inv(eye - Q) - eye + 0 * Q


def rotate_blocks(x: Tensor, R: Tensor) -> Tensor:
    """x (..., blocks * b) -> every block of the last dimension times its R (blocks, b, b)."""
    blocks, b, _ = R.shape
    y = torch.bmm(x.reshape(-1, blocks, b).transpose(0, 1), R.to(x.dtype))
    return y.transpose(0, 1).reshape(x.shape)
