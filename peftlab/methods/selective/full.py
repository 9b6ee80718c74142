"""Full: every entry is trained, in a copy.

    W' = C + (W - W0)        C (shape) = W0, the frozen tensor; W is what the methods below made of it

in_place=True trains the base tensor itself instead (ordinary full fine-tuning, nothing of its own to save or to switch off).
gradual=True unfreezes layer by layer, last one first, in equal shares of the schedule's steps; a layer is a numbered block.

Trains: numel
Structure: any W'
Family: selective
Paper: LayerNorm tuning: Zhao et al. 2023, arXiv 2312.11420; gradual unfreezing: Howard and Ruder 2018 (ULMFiT), arXiv 1801.06146
Rate: 1e-4
Aliases: linear_probe = dict(targets=":head"); ln_tuning = dict(targets=":norms")
Differs: ULMFiT unfreezes one layer an epoch, here one every T / layers steps.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from peftlab.core.require_schedule import require_schedule
from peftlab.method import Base, Method


def layer(path: str) -> str:
    """The numbered block that a parameter lies in, or else its module."""
    block = re.match(r"(?:.*?\.)?\d+(?=\.)", path)
    return block.group() if block else path.rpartition(".")[0]


class Layers(nn.Module):
    """The layers of an adapter in the order in which they were found."""

    def __init__(self, paths: list[str]):
        super().__init__()
        self.order = list(dict.fromkeys(layer(p) for p in paths))


class Full(Method):
    on = "tensor"
    replaces = True

    def __init__(self, base: Base, *, in_place: bool = False, gradual: bool = False):
        super().__init__(base)
        self.in_place, self.gradual, self.awake, self._scheduled = in_place, gradual, True, False
        self.C = None if in_place else nn.Parameter(torch.zeros(base.shape, dtype=torch.promote_types(base.dtype, torch.float32)))
        if not in_place and not self.C.is_meta:
            self.C.copy_(base.site.frozen_weight())
        if gradual:
            self.turn = len(self.common.order) - 1 - self.common.order.index(layer(base.path))  # 0: the last layer
            self.awake = self.turn == 0
            self.guard()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.guard()

    def guard(self) -> None:
        if self.gradual and not self.in_place:
            require_schedule(self, self.C)

    @classmethod
    def shared(cls, sites, *, gradual: bool = False) -> nn.Module | None:
        return Layers([s.path for s in sites]) if gradual else None

    @property
    def scheduled(self) -> bool:
        return self._scheduled

    @scheduled.setter
    def scheduled(self, on: bool) -> None:
        self._scheduled = on
        if self.gradual and self.in_place:  # layers sleep from the first step on, and only while a schedule will wake them
            self.site.raw_tensor.requires_grad_(self.awake or not on)

    def weight(self, W: Tensor) -> Tensor:
        if self.in_place:
            return W
        asleep = self.scheduled and not self.awake
        C, origin = self.C.detach() if asleep else self.C, self.site.frozen_weight()
        return C if W is origin else C + (W - origin)

    def step(self, t: int, T: int, lr: float) -> None:
        if self.gradual:
            self.awake = t * len(self.common.order) >= self.turn * T
            if self.in_place:
                self.site.raw_tensor.requires_grad_(self.awake)
