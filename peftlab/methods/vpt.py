"""VPT: trained tokens among the patches of a vision transformer.

    [c; P; E]        c the first `at` tokens (the class token), P (n, d), E the patches

deep=True: every block has tokens of its own, whose outputs are dropped. deep=False: they enter at the first block, go through all of them
and leave at the last. Nothing outside the blocks notices. at=0 for models without a class token. P starts uniform in (-v, v),
v^2 = 6 / (3 patch^2 + d), with patch the side of the model's patches.

Trains: n * n_out if deep else n * n_out / sites
Structure: the patches' embeddings are unchanged
Family: prompt
Paper: Jia et al. 2022, arXiv 2203.12119, sec. 3.2, eq. 3-6
Aliases: vpt_deep = dict(deep=True); vpt_shallow = dict(deep=False)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..attend import attend, is_block, tokens_dim
from ..method import Base, Method, positive_int
from ..parts import outputs, prefix, slots


class VPT(Method):
    on = "module"
    place = ":blocks"
    neutral = False

    def __init__(self, base: Base, *, n: int = 10, deep: bool = True, at: int = 1, patch: int = 16):
        super().__init__(base)
        self.n, self.deep, self.dim = positive_int("n", n, None, base), deep, tokens_dim(base.site.host)
        if isinstance(at, bool) or not isinstance(at, int) or at < 0:
            raise ValueError(f"at={at!r} at {base.path!r}: how many tokens stand in front of the virtual ones")
        self.at = at
        self.enters, self.leaves = (True, True) if deep else (base.path == self.common.first, base.path == self.common.last)
        v = (6 / (3 * positive_int("patch", patch, None) ** 2 + base.n_out)) ** 0.5
        self.P = nn.Parameter((torch.rand(n, base.n_out) * 2 - 1) * v) if self.enters else None

    @classmethod
    def shared(cls, sites, *, deep: bool = True) -> nn.Module | None:
        if deep:
            return None
        lists = {s.path.rpartition(".")[0] for s in sites}
        if len(lists) > 1:
            raise ValueError(f"deep=False goes through one list of blocks, not through {', '.join(map(repr, sorted(lists)))}: say targets=")
        ends = nn.Module()
        ends.first, ends.last = sites[0].path, sites[-1].path
        return ends

    @classmethod
    def fits(cls, site) -> bool:
        return site.kind == "module" and site.n_in == site.n_out > 0 and is_block(site.host)

    def forward(self, base: Base, *args, **kwargs):
        return self.run(base, base, None if self.P is None else self.P[None], self.n, args, kwargs)

    def run(self, base: Base, block: Callable, P: Tensor | None, n: int, args: tuple, kwargs: dict):
        """The block on the longer sequence; P (1 or B, n, d) where virtual tokens enter."""
        (x, *rest), d = args, self.dim
        if any(isinstance(t, Tensor) for t in (*rest, *kwargs.values())):
            raise ValueError(f"{base.path!r} was called with more tensors than its tokens, a mask perhaps, which cannot be lengthened by {n} virtual ones")
        out = block(slots.among(x, P, self.at, d) if self.enters else x, *rest, **kwargs)
        return outputs.edited(out, lambda y: slots.without(y, self.at, n, d)) if self.leaves else out

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        first, B = parts[0][0], args[0].shape[1 - parts[0][0].dim]
        P, there = prefix.together([torch.zeros(m.n, 0) if m.P is None else m.P for m, _ in parts], [r for _, r in parts], B)

        def block(x, *rest, **more):
            seen = slots.among(there.new_ones(B, x.shape[first.dim] - P.shape[1]), there, first.at, 1)
            return attend(base, lambda run, q, k, v, o: run(q, k, v, **prefix.lengthened(o, q, k.shape[-2], 0, None, seen)), x, *rest, **more)

        everywhere = bool(there.all())  # else rows with fewer must not see what fills the others' places
        return first.run(base, base if everywhere else block, P if first.enters else None, P.shape[1], args, kwargs)
