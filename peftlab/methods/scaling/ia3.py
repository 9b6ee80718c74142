"""IA3: outputs, or inputs, scaled by a learned vector.

    side="out": W' = diag(l) W, b' = l b        l (n_out,) = 1
    side="in":  W' = W diag(l)                  l (n_in,) = 1

The paper scales the outputs of the key and value projections, and the inputs of the second feed-forward layer (side="in").

Trains: n_out if side == "out" else n_in
Structure: W' / W is constant along rows (out) or columns (in)
Family: scaling
Paper: Liu et al. 2022, arXiv 2205.05638, sec. 3.3
Differs: with side="in" a convolution has an entry for every kernel position of every channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.method import Base, Method


class IA3(Method):
    opaque = True

    def __init__(self, base: Base, *, side: str = "out"):
        super().__init__(base)
        if side not in ("out", "in"):
            raise ValueError(f"side={side!r}: 'out' or 'in'")
        self.side = side
        self.l = nn.Parameter(torch.ones(base.n_out if side == "out" else base.n_in))

    def weight(self, W: Tensor) -> Tensor:
        return self.l[:, None] * W if self.side == "out" else W * self.l

    def bias(self, b: Tensor) -> Tensor:
        return self.l * b if self.side == "out" else b

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.side == "out":
            return base.scale(self.l, base(x))
        return base(x * self.l.to(x.dtype)) if base.pointwise else super().forward(base, x)
