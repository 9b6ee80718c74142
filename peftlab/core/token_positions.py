"""Which tokens of a sequence are meant: the first and the last of the real ones, or those that the caller names.

Legend: B rows of a batch, T tokens in this call, `past` tokens that a cache holds already. Masks come as the call of a block shows them:
(B, K) with nonzero for real tokens, (B, 1, Q, K) true or additive as attention takes them, or key padding, which says the opposite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.model.arguments import past_in, shown_real_tokens
from peftlab.model.caches import find_cache
from peftlab.support.timeline import Timeline


class TokenPositions(nn.Module):
    """What the sites of an adapter share: the positions that the caller names for the forwards to come, if any."""

    def __init__(self):
        super().__init__()
        self.where = Timeline()


def cached_tokens(host: nn.Module, given: dict) -> int:
    """How many tokens the cache holds before this call of a block; zero without one."""
    if find_cache(given) is None:
        return 0
    layer = next((i for m in host.modules() if isinstance(i := getattr(m, "layer_idx", None), int)), 0)
    past = past_in(given, layer)
    if past.tokens is None:
        raise ValueError("the cache does not count its tokens, so which of them are meant cannot be told: use_cache=False")
    return past.tokens


def real_tokens(given: dict, h: Tensor) -> Tensor:
    """(B, T) bool: which tokens of the hidden state h (B, T, d) are no padding, as the block's arguments say; all, where they say nothing."""
    B, T = h.shape[:2]
    shown = shown_real_tokens(given)
    if shown is None:
        return torch.ones(B, T, dtype=torch.bool, device=h.device)
    mask, padding = shown
    if padding:
        real = ~mask if mask.dtype == torch.bool else mask >= 0  # additive, where torch has made it canonical
    elif mask.ndim == 2:
        real = mask != 0
    else:
        seen = mask if mask.dtype == torch.bool else mask >= 0
        real = seen.flatten(1, -2).any(1)  # a token that some query attends to
    return real[:, :T].expand(B, T)


def first_and_last(real: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """(B, T) bool, twice: the first and the last of the real tokens. A token in both belongs to the first."""
    order = real.long().cumsum(1)
    head = real & (order <= first)
    return head, real & ~head & (order > order[:, -1:] - last)


def requested_positions(where: Tensor, B: int, T: int, past: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The same from what the caller names, for the T tokens that follow `past` ones.

    where: bool (rows, any length), the tokens from which first and last are counted; or integers (rows, first + last), the positions
    themselves, negative for none. B is a multiple of the rows (beam search repeats each).
    """
    if not len(where) or B % len(where):
        raise ValueError(f"positions of {len(where)} rows were named, and a batch of {B} came")
    if where.dtype != torch.bool and where.shape[1] != first + last:
        raise ValueError(f"{where.shape[1]} positions a row were named; the adapter edits first={first} and last={last}, {first + last} in all")
    where = where.repeat_interleave(B // len(where), 0)
    if where.dtype == torch.bool:
        head, tail = (F.pad(m, (0, max(0, past + T - m.shape[1])))[:, past : past + T] for m in first_and_last(where, first, last))
        return head, tail
    hits = where[:, :, None] == torch.arange(past, past + T, device=where.device)
    return hits[:, :first].any(1), hits[:, first:].any(1)
