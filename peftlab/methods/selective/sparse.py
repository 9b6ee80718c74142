"""Sparse: a few entries of a tensor are trained, the rest is frozen.

    W' = W + scatter(v at index)        v (n,) = 0, index (n,) fixed

select: fisher (the largest mean squared gradients over the given batches) | magnitude (the largest |W|) | random (drawn from `seed`).
n entries at every site, or a share `density` of them.

Trains: count(numel, density, n)
Structure: at most n entries of W' - W are nonzero
Family: selective
Paper: FISH mask, Sung et al. 2021, arXiv 2111.09839
Aliases: fish = dict(select="fisher")
Differs: FISH sums squared gradients of single examples; here of the given batches, which is the same with batches of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peftlab.method import Base, Method, finite, positive_int
from peftlab.parts import masks


def count(numel: int, density: float, n: int | None) -> int:
    """How many entries are trained."""
    return max(1, int(density * numel)) if n is None else n


class Sparse(Method):
    on = "tensor"
    additive = True

    def __init__(self, base: Base, *, density: float = 0.005, n: int | None = None, select: str = "magnitude", seed: int = 0):
        super().__init__(base)
        numel = math.prod(base.shape)
        if not 0 < finite("density", density) <= 1:
            raise ValueError(f"density={density!r} at {base.path!r}: must lie in (0, 1]")
        if n is not None and positive_int("n", n, None, base) > numel:
            raise ValueError(f"n={n} at {base.path!r}: the tensor has {numel} entries")
        if select not in ("fisher", "magnitude", "random"):
            raise ValueError(f"select={select!r} at {base.path!r}: fisher, magnitude or random")
        n = count(numel, density, n)
        self.needs_data = "gradients" if select == "fisher" else None
        self.v = nn.Parameter(torch.zeros(n))
        index = torch.arange(n, dtype=masks.index_dtype(numel))
        self.register_buffer("index", index, persistent=select != "random")
        self.seen = None
        if not self.v.is_meta and select == "magnitude":
            self.index.copy_(masks.largest(base.weight.abs(), n))
        elif not self.v.is_meta and select == "random":
            self.index.copy_(masks.drawn(numel, n, seed).sort().values)

    def weight(self, W: Tensor) -> Tensor:
        return masks.scatter_into(W, self.index, self.v)

    def observe(self, base: Base, G: Tensor) -> None:
        squares = G.float().square().cpu()
        self.seen = squares if self.seen is None else self.seen.add_(squares)

    def pool(self, states: list[Tensor]) -> None:
        self.seen = sum(states) if states else None

    @torch.no_grad()
    def calibrated(self, base: Base) -> None:
        self.index.copy_(masks.largest(self.seen, len(self.index)))
        self.seen, self.needs_data = None, None
