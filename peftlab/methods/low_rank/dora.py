"""DoRA: a low-rank change of a weight's direction, and a magnitude for every output.

    W' = diag(m / |V|) V,  V = W + s B A        m (n_out,) = |W|, A (r, n_in), B (n_out, r) = 0

s = alpha / r, or alpha / sqrt(r) if rank_stabilized. |V| is the norm of every row; no gradient flows through it.

Trains: r * (n_in + n_out) + n_out
Structure: |W'_i| = |m_i| for every row i
Family: low rank
Paper: Liu et al. 2024, arXiv 2402.09353, eq. 5; gradient of sec. 4.3
Rate: 1e-3
Differs: the norm comes from the Gram form and never forms B A. On a convolution a row is a whole kernel. The paper's |.|_c is a
    column of the transposed weight, our row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.method import Base, Method, finite, positive_int, unit_interval
from peftlab.parts import lowrank


class DoRA(Method):
    fast = ("B",)

    def __init__(self, base: Base, *, r: int = 8, alpha: float = 16.0, dropout: float = 0.0, rank_stabilized: bool = False):
        super().__init__(base)
        self.r = positive_int("r", r, min(base.n_in, base.n_out), base)
        self.s = finite("alpha", alpha) / (r**0.5 if rank_stabilized else r)
        self.p = unit_interval("dropout", dropout)
        self.A = nn.Parameter(torch.zeros(r, base.n_in))
        self.B = nn.Parameter(torch.zeros(base.n_out, r))
        self.m = nn.Parameter(torch.zeros(base.n_out, dtype=torch.promote_types(base.dtype, torch.float32)))
        if self.m.is_meta:
            return
        self.m.copy_(torch.linalg.vector_norm(lowrank.working(base.weight), dim=1))
        A, B = lowrank.random_start("kaiming", base.n_out, base.n_in, r, one_hot=base.site.rule.name == "embedding")
        self.A.copy_(A)
        self.B.copy_(B)

    def ratio(self, W: Tensor) -> Tensor:
        """m / |V|, (n_out,)."""
        with torch.no_grad():
            norm = lowrank.row_norms(W, self.A, self.B, self.s)
        return self.m / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def weight(self, W: Tensor) -> Tensor:
        return self.ratio(W)[:, None] * (W + self.s * self.B @ self.A)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        z = F.dropout(x, self.p, self.training) if self.p and x.is_floating_point() else x
        y = base.plus(x, self.B, self.s * base.apply(self.A, z))
        c, b = self.ratio(base.weight), base.bias
        if base.pointwise and b is not None and y.dtype == c.dtype:
            return torch.addcmul((1 - c) * b, y, c)  # the bias is not scaled; one pass over y
        if y.dtype == c.dtype:
            y = base.scale(c, y)
        else:
            y = y + base.scale(c - 1, y)  # c is near 1: in low precision its distance from 1 would be lost
        return y if b is None else base.shift((1 - c) * b, y)
