"""How a tensor is packed, and the tensors that hold it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FORMATS = ("nf4", "fp4", "int8")

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Format(NamedTuple):
    """How a tensor is packed: facts that no tensor holds."""

    kind: str  # one of FORMATS
    shape: tuple[int, ...]  # of the dense tensor
    dtype: torch.dtype  # that the dense tensor had: values are rounded to it
    blocksize: int  # entries a scale; for int8 the length of a row
    double: bool  # whether the absmax are quantised themselves
    compute: torch.dtype | None = None  # in which the layer's product is formed; None: in the input's
    cast: torch.dtype | None = None  # to which the model was converted since: rounded values are handed out in it

    @property
    def out(self) -> torch.dtype:
        """The dtype in which values are handed out."""
        return self.cast or self.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.blocksize) if self.blocksize else 0


class Packed(NamedTuple):
    """A quantised tensor. Without double quantisation absmax is float32 and the last two are None."""

    format: Format
    codes: Tensor
    absmax: Tensor  # (blocks,) float32, or uint8 with double quantisation
    nested_absmax: Tensor | None = None  # (ceil(blocks / 256),) float32
    offset: Tensor | None = None  # () float32, the mean that was taken away

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self[1:] if t is not None)
