"""L1: a dense change that is drawn towards zero, entry by entry, until most of it is exactly zero.

    W' = W + D        D (shape) = 0, trained on loss + strength |D|_1

`schedule` applies the proximal map of the penalty after every step, D <- sign(D) max(|D| - lr strength, 0), and after the last one sets
the entries below `threshold` to zero.

Trains: numel
Structure: in the end every entry of W' - W is zero or at least `threshold`
Family: selective
Paper: the penalty on the distance from the start: Li et al. 2018 (L2-SP and its L1 variant), arXiv 1802.01483
Differs: the L1 term is met by soft thresholding, which reaches exact zeros, not by its subgradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.core.require_schedule import require_schedule
from peftlab.method import Base, Method, finite
from peftlab.parts.masks import soft_threshold


class L1(Method):
    on = "tensor"
    additive = True

    def __init__(self, base: Base, *, strength: float = 0.01, threshold: float = 0.0):
        super().__init__(base)
        self.strength, self.threshold = finite("strength", strength), finite("threshold", threshold)
        if strength < 0 or threshold < 0:
            raise ValueError(f"strength={strength}, threshold={threshold} at {base.path!r}: neither may be negative")
        self.D = nn.Parameter(torch.zeros(base.shape))
        require_schedule(self, self.D)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        require_schedule(self, self.D)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.D

    @torch.no_grad()
    def step(self, t: int, T: int, lr: float) -> None:
        self.D.copy_(soft_threshold(self.D, lr * self.strength))
        if t == T:
            self.D.masked_fill_(self.D.abs() < self.threshold, 0)
