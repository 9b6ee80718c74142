"""Where virtual tokens go in a sequence: put them in, take them out.

Legend: B rows, L tokens of the caller, n virtual tokens, M >= L tokens that a mask knows (with those of a cache).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Place = str | int | Sequence[int]


def check_place(at: object, n: int, path: str) -> Place:
    """`at` if it says where n virtual tokens go: "start", "end", one place for all, or one each in ascending order."""
    whole = isinstance(at, int) and not isinstance(at, bool)
    each = isinstance(at, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in at)
    if not (at in ("start", "end") if isinstance(at, str) else whole or each):
        raise ValueError(f'at={at!r} at {path!r}: "start", "end", a place among the tokens, or a list of {n} such places')
    if each and (len(at) != n or list(at) != sorted(at) or min(at) < 0):
        raise ValueError(f"at={at!r} at {path!r}: one place for each of the n={n} virtual tokens, ascending and not negative")
    return at


class TokenSlots:
    """The places of n virtual tokens among the L of each row."""

    def __init__(self, at: Place, n: int, tokens: Tensor, real: Tensor | None):
        """tokens (B, L, ...); real (B, L), which of them are not padding (None: all)."""
        self.n, (self.B, self.L) = n, tokens.shape[:2]
        self.order = self.new = None  # in front, as they are
        if at == "start" and real is None:
            return
        cuts = self._cuts(at, tokens, real)
        i, j = torch.arange(self.L, device=tokens.device), torch.arange(n, device=tokens.device)
        keys = torch.cat([cuts * 2 * (n + 1) + j, (2 * i + 1).expand(self.B, -1) * (n + 1)], 1)
        self.order = keys.argsort(1)
        self.new = self.order.argsort(1)  # where the virtual tokens (first n columns) and the real ones went

    def _cuts(self, at: Place, tokens: Tensor, real: Tensor | None) -> Tensor:
        """(B, n): before which of the row's slots each virtual token goes."""
        first = tokens.new_zeros(self.B, dtype=torch.long)
        end = first + self.L
        if real is not None:
            first, end = real.int().argmax(1), self.L - real.int().flip(1).argmax(1)
        if isinstance(at, str):  # next to the first or the last token, not beyond its padding: some models count slots
            return (first if at == "start" else end)[:, None].expand(-1, self.n)
        places = torch.tensor(list(at) if isinstance(at, (list, tuple)) else [at] * self.n, device=tokens.device)
        cuts = torch.where(places >= 0, first[:, None] + places, end[:, None] + places)
        if not torch.compiler.is_compiling() and bool(((cuts < first[:, None]) | (cuts > end[:, None])).any()):
            raise ValueError(f"virtual tokens at {at!r}, but the shortest row of the batch has {int((end - first).min())} tokens")
        return cuts

    def put(self, x: Tensor, virtual: Tensor) -> Tensor:
        """x (B, L, ...) with virtual (B or 1, n, ...) in its places."""
        both = torch.cat([virtual.expand(x.shape[0], *virtual.shape[1:]).to(x.dtype), x], 1)
        if self.order is None:
            return both
        index = self.order[(...,) + (None,) * (x.ndim - 2)].expand(-1, -1, *x.shape[2:])
        return both.expand(self.B, *both.shape[1:]).gather(1, index)

    def take(self, y: Tensor, last: bool = False) -> Tensor:
        """The real tokens' rows of y (B, n + L, ...); last: of each token the row of the last virtual one behind it, as a causal model predicts."""
        if self.order is None:
            return y[:, self.n :]
        at = self.new[:, self.n :]
        if last:
            at = torch.cat([at[:, 1:] - 1, torch.full_like(at[:, :1], self.n + self.L - 1)], 1)
        return y.gather(1, at[(...,) + (None,) * (y.ndim - 2)].expand(-1, -1, *y.shape[2:]))

    def positions(self, given: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Position ids (B or 1, L) of the real tokens -> (B or 1, n + L), where virtual tokens count as tokens.

        lengths (B,): how many of the n a row has, the last ones, all of them in front.
        """
        j = torch.arange(self.n, device=given.device)[None]
        if self.order is None:
            return torch.cat([given[:, :1] + j, given + self.n], 1)
        given = given.expand(self.B, -1)
        before = self.new[:, : self.n] - j  # how many real tokens stand before each virtual one
        virtual = given.gather(1, before.clamp_max(self.L - 1)) + (before == self.L).to(given.dtype)
        if lengths is None:
            virtual, real = virtual + j, given + self.new[:, self.n :] - torch.arange(self.L, device=given.device)
        else:
            virtual, real = virtual + (j - (self.n - lengths)[:, None]).clamp_min(0), given + lengths[:, None]
        return torch.cat([virtual, real], 1).gather(1, self.order)


def mask_around_cache(mask: Tensor, virtual: Tensor) -> Tensor:
    """A mask (B, M) with `virtual` (B or 1, n) put before the first token of each row, where a cache or an encoder's output has them."""
    n = virtual.shape[1]
    first = mask.int().argmax(1, keepdim=True)
    i = torch.arange(mask.shape[1] + n, device=mask.device)[None]
    inside = (i >= first) & (i < first + n)
    source = torch.where(i < first, i, i - n).clamp_min(0)
    return torch.where(inside, virtual.to(mask.dtype).expand(len(mask), -1).gather(1, (i - first).clamp(0, n - 1)), mask.gather(1, source))


def insert_among(x: Tensor, virtual: Tensor, at: int, dim: int) -> Tensor:
    """x with virtual (1 or B, n, ...) behind its first `at` entries of dimension `dim` (1, or 0 where the sequence comes first)."""
    virtual = virtual.to(x.dtype).expand(x.shape[1 - dim], *virtual.shape[1:])
    virtual = virtual if dim == 1 else virtual.transpose(0, 1)
    return torch.cat([x.narrow(dim, 0, at), virtual, x.narrow(dim, at, x.shape[dim] - at)], dim)


def remove_among(x: Tensor, at: int, n: int, dim: int) -> Tensor:
    """x without the n entries behind its first `at` ones."""
    return torch.cat([x.narrow(dim, 0, at), x.narrow(dim, at + n, x.shape[dim] - at - n)], dim)


def numbers_of_rows(parts: list[tuple[int, Tensor]], B: int, device) -> Tensor:
    """(B,): the number that belongs to each row, zero for the others."""
    out = torch.zeros(B, dtype=torch.long, device=device)
    for value, rows in parts:
        out = out.index_fill(0, rows.to(device), value)
    return out
