"""FourierFT: a change with few nonzero entries in its two-dimensional spectrum.

    W' = W + alpha Re(ifft2(F))        F (n_out, n_in) is zero but for n entries c (n,) = 0 at fixed random places

The places are the first n of a random order drawn from `seed`, the same at all sites of one shape. They are not saved.

Trains: n
Structure: at most 2 n entries of fft2(W' - W) are nonzero
Family: spectral
Paper: Gao et al. 2024, arXiv 2405.03003, eq. 2-4
Differs: c starts at zero, so that the model starts as the base; the authors draw it from N(0, 1). The transform
    carries 1 / (n_out n_in), as in the paper's algorithm 1; its eq. 3 leaves it out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.method import Base, Method, finite, positive_int
from peftlab.parts import fourier, masks


class FourierFT(Method):
    additive = True
    opaque = True

    def __init__(self, base: Base, *, n: int = 1000, alpha: float = 150.0, seed: int = 0):
        super().__init__(base)
        numel = base.n_out * base.n_in
        if positive_int("n", n, None, base) > numel:
            raise ValueError(f"n={n} at {base.path!r}: the weight has {numel} entries")
        self.s = finite("alpha", alpha)
        self.size = base.n_out, base.n_in
        self.c = nn.Parameter(torch.zeros(n))
        places = torch.empty(n, dtype=torch.int64) if self.c.is_meta else masks.drawn(numel, n, seed)
        self.register_buffer("places", places, persistent=False)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.s * fourier.dense(self.c, self.places, *self.size)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if not base.pointwise:
            return super().forward(base, x)
        y = base(x)
        return y + (self.s * fourier.times_dense(x, self.c, self.places, *self.size)).to(y.dtype)
