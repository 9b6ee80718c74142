"""BitFit: only the biases are trained.

    b' = b + d        d (numel,) = 0, for every bias vector of the model, those of normalisation layers included

Trains: numel
Structure: every weight matrix is untouched
Family: selective
Paper: Ben Zaken et al. 2021, arXiv 2106.10199
Differs: the change is kept beside the bias, so that the base is not edited.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.method import Base, Method


class BitFit(Method):
    on = "tensor"
    additive = True

    def __init__(self, base: Base):
        super().__init__(base)
        self.d = nn.Parameter(torch.zeros(base.shape))

    @classmethod
    def fits(cls, site) -> bool:
        # torch names them bias, in_proj_bias, bias_ih_l0 ...
        return site.ndim == 1 and "bias" in site.param.split("_")

    def weight(self, W: Tensor) -> Tensor:
        return W + self.d
