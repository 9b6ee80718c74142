"""OFT: the input rotated, block by block.

    W' = W R^T,  R = blockdiag(R_1, ...),  R_i = (I + Q_i)(I - Q_i)^-1        Q_i (b, b) skew = 0

Q holds the strict upper triangles, row by row. block_size b divides n_in; without it and without `blocks` it is the largest divisor of
n_in not above 32.

Trains: n_in * (size(n_in, blocks, block_size) - 1) // 2
Structure: the Gram matrix of the rows is that of W: their norms and angles are kept
Family: orthogonal
Paper: Qiu et al. 2023, arXiv 2306.07280, eq. 2-3 and sec. 3.3 (Cayley form); on the input side as in OFTv2, Qiu et al. 2025,
    arXiv 2506.19847, eq. 2
Rate: 2e-3
Differs: the Cayley map is exact (a solve), OFTv2 truncates its Neumann series. Blocks that do not divide are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.method import Base, Method, positive_int
from peftlab.parts.cayley import cayley, rotate_blocks, skew
from peftlab.parts.kron import divisors, largest_divisor


def size(n_in: int, blocks: int | None, block_size: int | None) -> int:
    """The side of a block."""
    return block_size or (n_in // blocks if blocks else largest_divisor(n_in, 32))


class OFT(Method):
    opaque = True

    def __init__(self, base: Base, *, block_size: int | None = None, blocks: int | None = None):
        super().__init__(base)
        if block_size is not None and blocks is not None:
            raise ValueError("give block_size or blocks, not both")
        for name, value in (("block_size", block_size), ("blocks", blocks)):
            if value is not None and base.n_in % positive_int(name, value, None, base):
                raise ValueError(f"{name}={value} at {base.path!r} does not divide the {base.n_in} inputs; what does: {divisors(base.n_in)}")
        self.b = size(base.n_in, blocks, block_size)
        if self.b == 1:
            raise ValueError(f"blocks of size 1 at {base.path!r} turn nothing; the {base.n_in} inputs can be cut into blocks of {divisors(base.n_in)[1:]}")
        self.Q = nn.Parameter(torch.zeros(base.n_in // self.b, self.b * (self.b - 1) // 2))

    @classmethod
    def fits(cls, site) -> bool:
        return super().fits(site) and site.rule.name != "embedding"  # a token id cannot be rotated

    def rotation(self) -> Tensor:
        return cayley(skew(self.Q, self.b))

    def weight(self, W: Tensor) -> Tensor:
        R = self.rotation()
        return rotate_blocks(W.to(torch.promote_types(W.dtype, R.dtype)), R.mT)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if not base.pointwise:
            return super().forward(base, x)
        return base(rotate_blocks(x, self.rotation()))
