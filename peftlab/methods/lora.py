"""LoRA: a low-rank change of a weight.

    W' = W + s (B A - B0 A0)        A (r, n_in), B (n_out, r), s = alpha / r, or alpha / sqrt(r) if rank_stabilized

B = 0 at the start and there is no A0, B0, except for the starts that are taken from the weight (pissa, pissa_exact, olora): these
begin at A = A0, B = B0 and keep the frozen A0, B0 beside the trained factors, so that the base is never edited. bias=True also trains
b' = b + d. init: kaiming | gaussian (standard deviation 1 / r) | orthogonal | pissa | pissa_exact | olora | eva (from data). On an
embedding kaiming and gaussian start at A = 0, B ~ N(0, 1), so that tokens which never occur keep their vectors.

Trains: r * (n_in + n_out) + bias * n_out
Structure: rank(W' - W) <= r, or <= 2 r for the starts taken from the weight
Family: low rank
Paper: Hu et al. 2021, arXiv 2106.09685, eq. 3. Scale: Kalajdzievski 2023, arXiv 2312.03732. Starts: PiSSA, Meng et al. 2024,
    arXiv 2404.02948, eq. 2-4; OLoRA, Buyukakyuz 2024, arXiv 2406.01775; EVA, Paischer et al. 2024, arXiv 2410.07170
Aliases: rslora = dict(rank_stabilized=True); pissa = dict(init="pissa"); olora = dict(init="olora"); eva = dict(init="eva")
Differs: pissa uses a randomised SVD and reports its error (start_error, start_floor), pissa_exact the full one. eva keeps the same
    rank at every site (rho = 1). The base is never edited, where the authors of PiSSA and OLoRA subtract s B0 A0 from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method import Base, Method, finite, positive_int, unit_interval
from ..parts import lowrank

INITS = ("kaiming", "gaussian", "orthogonal", *lowrank.STARTS, "eva")


class LoRA(Method):
    additive = True
    opaque = True
    fast = ("B",)
    start_error: float | None = None  # |W - s B0 A0|_F of a pissa start
    start_floor: float | None = None  # no start of this rank has a smaller one

    def __init__(
        self, base: Base, *, r: int = 8, alpha: float = 16.0, dropout: float = 0.0, init: str = "kaiming", rank_stabilized: bool = False, bias: bool = False
    ):
        super().__init__(base)
        self.r = positive_int("r", r, min(base.n_in, base.n_out), base)
        self.s = finite("alpha", alpha) / (r**0.5 if rank_stabilized else r)
        self.p = unit_interval("dropout", dropout)
        if bias and not base.has_bias:
            raise ValueError(f"bias=True at {base.path!r}: this layer has no bias")
        if init not in INITS:
            raise ValueError(f"init={init!r} at {base.path!r}: one of {', '.join(INITS)}")
        self.A = nn.Parameter(torch.zeros(r, base.n_in))
        self.B = nn.Parameter(torch.zeros(base.n_out, r))
        self.d = nn.Parameter(torch.zeros(base.n_out)) if bias else None
        from_weight = init in lowrank.STARTS
        self.opaque = not from_weight
        self.register_buffer("A0", torch.zeros(r, base.n_in) if from_weight else None)
        self.register_buffer("B0", torch.zeros(base.n_out, r) if from_weight else None)
        self.needs_data, self._seen = "inputs" if init == "eva" else None, None
        if self.A.is_meta:
            return
        if from_weight:
            A, B, error = lowrank.start(init, base.weight, r, self.s)
            self.start_error, self.start_floor = error or (None, None)
            self.A0.copy_(A)
            self.B0.copy_(B)
        else:
            A, B = lowrank.random_start(init, base.n_out, base.n_in, r, one_hot=base.site.rule.name == "embedding")
        self.A.copy_(A)
        self.B.copy_(B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B, A with W' = W + s B A, of rank 2 r after a start from the weight."""
        if self.A0 is None:
            return self.B, self.A
        # B A - B0 A0 = (B - B0) A + B0 (A - A0): exactly zero at the start, and small differences are not lost in rounding.
        return torch.cat([self.B - self.B0, self.B0], 1), torch.cat([self.A, self.A - self.A0])

    def weight(self, W: Tensor) -> Tensor:
        B, A = self.factors()
        return W + self.s * B @ A

    def bias(self, b: Tensor) -> Tensor:
        return b if self.d is None else b + self.d

    def forward(self, base: Base, x: Tensor) -> Tensor:
        B, A = self.factors()
        z = F.dropout(x, self.p, self.training) if self.p and x.is_floating_point() else x
        y = base.plus(x, B, self.s * base.apply(A, z))
        return y if self.d is None else base.shift(self.d, y)

    def observe(self, base: Base, x: Tensor) -> None:
        if self.needs_data:
            self._seen = lowrank.observe_rows(self._seen, x, self.r)

    @torch.no_grad()
    def calibrated(self, base: Base) -> None:
        if self.needs_data:
            self.A.copy_(lowrank.directions(self._seen, self.r, base.path))
            self._seen, self.needs_data = None, None
