"""LoRA: a low-rank change of a weight.

    W' = W + s (B A - B0 A0)        A (r, n_in), B (n_out, r), s = alpha / r, or alpha / sqrt(r) if rank_stabilized

B = 0 at the start and there is no A0, B0, except for the starts with a product of their own (pissa, pissa_exact, olora, corda,
corda_kpm, lora_ga): these begin at A = A0, B = B0 and keep the frozen A0, B0 beside the trained factors, so that the base is never
edited. bias=True also trains b' = b + d. init: kaiming | gaussian (standard deviation 1 / r) | orthogonal; from the weight: pissa |
pissa_exact | olora; from data: eva (principal inputs) | corda, corda_kpm (the part of W that the inputs need most, least) | lora_ga
(the gradient); found with the codes of a quantised weight, by peftlab.wrap_quantized: loftq | qpissa, which start with W' near the dense
weight and have no A0, B0. On an embedding kaiming and gaussian start at A = 0, B ~ N(0, 1), so that tokens which never occur keep their
vectors.
While data are read, eva keeps (r + 10) * n_in numbers a site, corda n_in * n_in, lora_ga n_in * n_out, the latter two on the CPU.

Trains: r * (n_in + n_out) + bias * n_out
Structure: rank(W' - W) <= r, or <= 2 r for the starts with A0, B0
Family: low rank
Paper: Hu et al. 2021, arXiv 2106.09685, eq. 3. Scale: Kalajdzievski 2023, arXiv 2312.03732. Starts: PiSSA, Meng et al. 2024,
    arXiv 2404.02948; OLoRA, Buyukakyuz 2024, arXiv 2406.01775; EVA, Paischer et al. 2024, arXiv 2410.07170; CorDA, Yang et al. 2024,
    arXiv 2406.05223; LoRA-GA, Wang et al. 2024, arXiv 2407.05000; LoftQ, Li
    et al. 2023, arXiv 2310.08659
Rate: 1e-3
Aliases: rslora = dict(rank_stabilized=True); pissa = dict(init="pissa"); olora = dict(init="olora"); eva = dict(init="eva");
    corda = dict(init="corda"); lora_ga = dict(init="lora_ga")
Differs: pissa uses a randomised SVD and reports its error (start_error, start_floor), pissa_exact the full one. eva keeps the same
    rank at every site (rho = 1). corda's covariance is that of all rows, scaled to a mean diagonal of 1; the authors divide every
    batch by its largest entry. The base is never edited, where the authors of PiSSA, OLoRA, CorDA and LoRA-GA subtract s B0 A0 from it.
    loftq and qpissa keep the best of their turns, their authors the last one; s is divided out whatever alpha is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.method import Base, Method, finite, positive_int, unit_interval
from peftlab.parts import data_init as fromdata
from peftlab.parts import lowrank

INITS = ("kaiming", "gaussian", "orthogonal", *lowrank.STARTS, *fromdata.STARTS, *lowrank.CODED)


class LoRA(Method):
    additive = True
    opaque = True
    fast = ("B",)
    start_error: float | None = None  # |W - s B0 A0|_F of a pissa start, |W - Q - s B A|_F of one beside codes Q
    start_floor: float | None = None  # no pissa start of this rank has a smaller one

    def __init__(self, base: Base, *, r: int = 8, alpha: float = 16.0, dropout: float = 0.0, init: str = "kaiming", rank_stabilized: bool = False, bias: bool = False):
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
        self.data, self.seen = fromdata.STARTS.get(init), None
        self.needs_data = "codes" if init in lowrank.CODED else self.data and self.data.needs
        self.neutral = init not in lowrank.CODED
        filled = self.data.filled if self.data else init in lowrank.STARTS
        self.opaque = not filled
        self.register_buffer("A0", torch.zeros(r, base.n_in) if filled else None)
        self.register_buffer("B0", torch.zeros(base.n_out, r) if filled else None)
        if self.needs_data == "gradients" and 2 * r > min(base.n_in, base.n_out):
            raise ValueError(f"r={r} at {base.path!r}: init={init!r} takes 2 r directions of the gradient, of which there are {min(base.n_in, base.n_out)}")
        if self.A.is_meta:
            return
        if init in lowrank.STARTS:
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

    def observe(self, base: Base, value: Tensor) -> None:
        self.seen = self.data.keep(self.seen, value, self.r)

    def pool(self, states: list) -> None:
        self.seen = fromdata.pool_states(states)

    @torch.no_grad()
    def calibrated(self, base: Base) -> None:
        A, B = self.data.factors(self.seen, base.weight if self.data.filled else None, self.r, self.s, base.path)
        for kept, value in ((self.A, A), (self.B, B), (self.A0, A), (self.B0, B)):
            if kept is not None and value is not None:
                kept.copy_(value)
        self.seen, self.needs_data = None, None
