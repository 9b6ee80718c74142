"""LoReFT: hidden states of chosen tokens are edited in a small subspace.

    y = h + R' (W h + b - R h)        R (r, n_out) with orthonormal rows, W (r, n_out), b (r,), W = R + U with U = 0, b = 0

h is what a block gives for one token. Edited are the `first` and the `last` real tokens: padding is not counted, as the block's attention mask
shows it, and tokens after a filled KV cache are none of them. `with peftlab.positions(model, ...)` says others, example by example.
tied=False: the first and the last tokens have tensors of their own. R is the orthonormal factor of the trained V, so its rows are
orthonormal after every step.

Trains: (2 - tied) * r * (2 * n_out + 1)
Structure: R R' = 1; y - h lies in the r rows of R, and is zero at tokens that are not chosen
Family: representation edits
Paper: Wu et al. 2024 (ReFT), arXiv 2404.03592, eq. 2
Rate: 2e-3
Differs: W is kept as its difference from R, which is zero at the start, so that the start is the base; the authors draw W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.core import token_positions as spots
from peftlab.method import Base, Method, positive_int
from peftlab.model.arguments import named_arguments
from peftlab.parts import hidden_state


class LoReFT(Method):
    on = "module"
    place = ":blocks"
    opaque = True

    def __init__(self, base: Base, *, r: int = 4, first: int = 1, last: int = 1, tied: bool = True):
        super().__init__(base)
        positive_int("r", r, base.n_out, base)
        for what, n in (("first", first), ("last", last)):
            if isinstance(n, bool) or not isinstance(n, int) or n < 0:
                raise ValueError(f"{what}={n!r} at {base.path!r}: a whole number of tokens")
        if first + last == 0:
            raise ValueError(f"first=0 and last=0 at {base.path!r}: no token would be edited")
        if any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in base.site.host.modules()):
            raise ValueError(f"{base.path!r} has the sequence before the batch (batch_first=False), where tokens cannot be told apart")
        self.first, self.last, sets = first, last, 1 if tied else 2
        self.V = nn.Parameter(torch.zeros(sets, r, base.n_out))
        self.U = nn.Parameter(torch.zeros(sets, r, base.n_out))
        self.b = nn.Parameter(torch.zeros(sets, r))
        if not self.V.is_meta:
            self.V.copy_(torch.linalg.qr(torch.randn(sets, base.n_out, r)).Q.mT)

    @classmethod
    def fits(cls, site) -> bool:
        return site.n_in > 0 and site.n_out > 0

    @classmethod
    def shared(cls, sites) -> nn.Module:
        return spots.TokenPositions()

    @property
    def R(self) -> Tensor:
        """(sets, r, n_out), the orthonormal rows; at least in float32."""
        return torch.linalg.qr(self.V.mT.to(torch.promote_types(self.V.dtype, torch.float32))).Q.mT

    def chosen(self, h: Tensor, given: dict, past: int) -> tuple[Tensor, Tensor]:
        """(B, T) bool, twice: the first and the last tokens to edit."""
        where = self.common.where.get()
        if where is not None:
            return spots.requested_positions(where.to(h.device), *h.shape[:2], past, self.first, self.last)
        real = spots.real_tokens(given, h)
        return spots.first_and_last(real if past == 0 else torch.zeros_like(real), self.first, self.last)

    def change(self, h: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
        sets, y = chosen if len(self.V) == 2 else (chosen[0] | chosen[1],), h
        for R, U, b, here in zip(self.R.to(h.dtype), self.U.to(h.dtype), self.b.to(h.dtype), sets, strict=True):
            y = torch.where(here[..., None], h + F.linear(F.linear(h, U, b), R.mT), y)
        return y

    def forward(self, base: Base, *args, **kwargs):
        return self.routed(base, [(self, None)], *args, **kwargs)

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        given = named_arguments(base.site.host, args, kwargs)
        past = spots.cached_tokens(base.site.host, given)  # now: the call itself fills the cache
        if past and all(m.common.where.get() is None for m, _ in parts):  # a decoding step, which edits nothing
            return base(*args, **kwargs)

        def edit(h: Tensor) -> Tensor:
            z = h.flatten(1, -2) if h.ndim > 2 else h[:, None]  # without a sequence every row is one token
            for m, rows in parts:
                chosen = m.chosen(z, given, past)
                if rows is None:
                    z = m.change(z, chosen)
                else:
                    z = hidden_state.apply_by_rows(z, [(m, rows)], lambda m, part, at, c=chosen: m.change(part, tuple(t[at] for t in c)))
            return z.reshape(h.shape)

        return hidden_state.edit_hidden_state(base(*args, **kwargs), edit)
