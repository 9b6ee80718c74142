"""QA-LoRA: a low-rank change that is the same for all inputs of a group.

    W' = W + s (B A) kron (1 ... 1)        A (r, n_in / g), B (n_out, r) = 0, g ones, s = alpha / r

The input is summed over groups of g = group_size neighbours, and A acts on the sums. Merged into dense weights the change is exact. What it is made
for is a quantiser that gives every group of g inputs of an output an offset of its own: the change is one number there, so the offsets can
take it up and the codes stay. nf4, fp4 and int8 of `peftlab.quantize` have scales without offsets; they hold it like any other change.
Without group_size it is the largest divisor of n_in not above 32 that leaves r groups.

Trains: r * (n_in // size(n_in, r, group_size) + n_out)
Structure: rank(W' - W) <= r, and W' - W is constant along the inputs of each group
Family: low rank
Paper: Xu et al. 2023, arXiv 2309.14717, algorithm 1
Rate: 1e-3
Differs: the input is summed, as in the paper; the authors' code takes the mean over the group, which divides s by g. On a convolution the groups lie
    along its flattened kernel. A starts Kaiming-uniform over the n_in / g sums.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.method import Base, Method, finite, positive_int, unit_interval
from peftlab.parts import kron, lowrank


def size(n_in: int, r: int, group_size: int | None) -> int:
    """The inputs of a group."""
    return group_size or kron.largest_divisor(n_in, max(1, min(32, n_in // r)))


class QALoRA(Method):
    additive = True
    opaque = True
    fast = ("B",)

    def __init__(self, base: Base, *, r: int = 8, alpha: float = 16.0, dropout: float = 0.0, group_size: int | None = None):
        super().__init__(base)
        self.r = positive_int("r", r, min(base.n_in, base.n_out), base)
        if group_size is not None and base.n_in % positive_int("group_size", group_size, None, base):
            near = sorted(sorted(kron.divisors(base.n_in), key=lambda k: abs(k - group_size))[:2])
            raise ValueError(f"group_size={group_size} at {base.path!r} does not divide the {base.n_in} inputs; the nearest that do: {near}")
        self.g = size(base.n_in, r, group_size)
        groups = base.n_in // self.g
        if r > groups:
            raise ValueError(f"r={r} at {base.path!r}: at most {groups}, the number of groups of {self.g} inputs")
        self.s = finite("alpha", alpha) / r
        self.p = unit_interval("dropout", dropout)
        A, B = lowrank.random_start("kaiming", base.n_out, groups, r)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    @classmethod
    def fits(cls, site) -> bool:
        return super().fits(site) and site.rule.name != "embedding"  # neighbouring token ids are no group

    def weight(self, W: Tensor) -> Tensor:
        return W + (self.s * self.B @ self.A).repeat_interleave(self.g, 1)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        z = F.dropout(x, self.p, self.training) if self.p else x
        if base.pointwise:
            h = base.apply(self.A, z.unflatten(-1, (-1, self.g)).sum(-1))
        else:
            h = base.apply(self.A.repeat_interleave(self.g, 1), z)
        return base.plus(x, self.B, self.s * h)
