"""Tokens: chosen rows of an embedding are trained, the others stay as they are.

    E'[ids] = T + (E - E0)[ids]        T (n, dim) = E0[ids], E0 the frozen table; E is what the methods below made of it

The rows of T are in the order of increasing id.

Trains: len(ids) * n_out
Structure: every other row is unchanged, bit for bit
Family: selective
Paper: none; common practice for added tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.method import Base, Method


class Tokens(Method):
    replaces = True

    def __init__(self, base: Base, *, ids: Sequence[int]):
        super().__init__(base)
        if not isinstance(ids, Sequence) or not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ValueError(f"ids={ids!r} at {base.path!r}: must name at least one token by its number")
        if len(set(ids)) < len(ids):
            raise ValueError(f"ids at {base.path!r} name {sorted({i for i in ids if list(ids).count(i) > 1})} more than once")
        if min(ids) < 0 or max(ids) >= base.n_in:
            raise ValueError(f"ids from {min(ids)} to {max(ids)}, but the embedding at {base.path!r} has {base.n_in} rows (0 to {base.n_in - 1})")
        self.register_buffer("ids", torch.tensor(sorted(ids)), persistent=False)
        self.T = nn.Parameter(torch.zeros(len(ids), base.n_out, dtype=torch.promote_types(base.dtype, torch.float32)))
        if not self.T.is_meta:
            self.T.copy_(base.site.frozen_weight()[:, self.ids.to(base.device)].mT)

    @classmethod
    def fits(cls, site) -> bool:
        return site.rule.name == "embedding"

    def weight(self, W: Tensor) -> Tensor:
        W = W.to(torch.promote_types(W.dtype, self.T.dtype))
        return W.index_copy(1, self.ids, self.T.mT + (W - self.site.frozen_weight())[:, self.ids])

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        i = torch.searchsorted(self.ids, x).clamp_max(len(self.ids) - 1)
        rows = F.embedding(i, self.T) + (y - F.embedding(i, self.site.frozen_weight()[:, self.ids].mT))
        return torch.where((self.ids[i] == x)[..., None], rows.to(y.dtype), y)
