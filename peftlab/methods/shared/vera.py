"""VeRA: one frozen pair of random matrices for all sites, and two trained vectors at each.

    W' = W + diag(b) B diag(d) A        A (r, n_in), B (n_out, r) frozen, d (r,) = d_initial, b (n_out,) = 0

A and B are the leading columns and rows of one pair that lives at the model's root and is drawn from `seed`: it is not saved.

Trains: r + n_out
Structure: rank(W' - W) <= r
Family: shared random
Paper: Kopiczko et al. 2023, arXiv 2310.11454, eq. 2
Differs: the pair is kept with unit variance and scaled at each site by its own Kaiming factors, sqrt(2 / n_in) and sqrt(2 / r), so that
    a site's A and B do not depend on which other sites are adapted. The authors use the n_in of the largest site.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.method import Base, Method, finite, positive_int


def drawn(rows: int, r: int, seed: int) -> Tensor:
    """(rows, r), uniform with unit variance; the first rows do not depend on how many there are."""
    out = torch.rand(rows, r, generator=torch.Generator("cpu").manual_seed(seed), device="cpu", dtype=torch.float32)
    return (out * 2 - 1) * 3**0.5


class VeRA(Method):
    additive = True
    opaque = True

    def __init__(self, base: Base, *, r: int = 256, d_initial: float = 0.1, seed: int = 0):
        super().__init__(base)
        self.r = positive_int("r", r, None, base)
        if self.common is not None and r > self.common.A.shape[1]:
            raise ValueError(f"r={r} at {base.path!r}: the shared matrices have rank {self.common.A.shape[1]}")
        self.n_in, self.n_out = base.n_in, base.n_out
        self.d = nn.Parameter(torch.full((r,), finite("d_initial", d_initial)))
        self.b = nn.Parameter(torch.zeros(base.n_out))

    @classmethod
    def shared(cls, sites, *, r: int = 256, seed: int = 0) -> nn.Module:
        pair = nn.Module()
        positive_int("r", r, None)
        pair.register_buffer("A", drawn(max(s.n_in for s in sites), r, 2 * seed), persistent=False)
        pair.register_buffer("B", drawn(max(s.n_out for s in sites), r, 2 * seed + 1), persistent=False)
        return pair

    def frozen(self) -> tuple[Tensor, Tensor, Tensor]:
        """B (n_out, r) and A (r, n_in) with unit variance, and d with both of their scales in it."""
        A, B = self.common.A[: self.n_in, : self.r].to(self.d).mT, self.common.B[: self.n_out, : self.r].to(self.d)
        return B, A, self.d * (2 / (self.n_in * self.r) ** 0.5)

    def weight(self, W: Tensor) -> Tensor:
        B, A, d = self.frozen()
        return W + (self.b[:, None] * B * d) @ A

    def forward(self, base: Base, x: Tensor) -> Tensor:
        B, A, d = self.frozen()
        z = base.mix(B, base.scale(d, base.apply(A, x)))
        y = base(x)
        if base.pointwise and y.dtype == z.dtype == self.b.dtype:
            return torch.addcmul(y, z, self.b)  # b beside B, not in it: the gradient of B is never formed
        return y + base.scale(self.b, z).to(y.dtype)
