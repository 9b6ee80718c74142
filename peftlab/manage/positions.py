"""Which tokens the methods that act at chosen tokens take: `with peftlab.positions(model, where):`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from peftlab.core.adapters import adapter_modules, select_adapters
from peftlab.core.token_positions import TokenPositions
from peftlab.model.index import ensure_module


@contextlib.contextmanager
def positions(model: nn.Module, where: Tensor, names: str | Iterable[str] | None = None) -> Iterator[nn.Module]:
    """Inside the block, adapters that edit chosen tokens (loreft) take those that `where` says, in every forward and decoding step.

    Positions are columns of the batch as it enters the blocks, padding included, and stay what they are while a sequence grows: with
    and without a KV cache the same tokens are edited.

    Args:
        where: (batch, length) bool, true for the tokens of the prompt: the adapter's first and last tokens are counted among these
            (an attention mask of the prompt, as bool, does it); or (batch, first + last) integers, the positions themselves, negative for
            none. A batch of a multiple of the rows gives each row that many in succession, as beam search has them.
        names: the adapters that are meant; all that edit chosen tokens by default.

    Raises:
        TypeError, ValueError: for tensors of another kind, and where no such adapter is there.
    """
    if not isinstance(where, Tensor) or where.ndim != 2 or where.is_floating_point() or where.is_complex():
        raise TypeError("where: a tensor (batch, length) of bool, or (batch, first + last) of whole numbers")
    found = [m for _, _, site, m in adapter_modules(ensure_module(model), select_adapters(model, names)) if site is None and isinstance(m, TokenPositions)]
    if not found:
        raise ValueError(f"no adapter of {select_adapters(model, names)} edits chosen tokens")
    before = [m.where.get() for m in found]
    try:
        for m in found:
            m.where.put(where if where.dtype == torch.bool else where.long())
        yield model
    finally:
        for m, old in zip(found, before, strict=True):
            m.where.put(old)
