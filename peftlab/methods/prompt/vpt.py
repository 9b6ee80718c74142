"""VPT: trained tokens among the patches of a vision transformer.

    x' = [c; P; E]        c the first `at` tokens (the class token), P (n, d), E the patches

deep=True: every block has tokens of its own, whose outputs are dropped. deep=False: they enter at the first block, go through all of them
and leave at the last. Nothing outside the blocks notices. at=0 for models without a class token. P starts uniform in (-v, v),
v^2 = 6 / (3 patch^2 + d), with patch the side of the model's patches.

Trains: n * n_out if deep else n * n_out / sites
Structure: the patches' embeddings are unchanged
Family: prompt
Paper: Jia et al. 2022, arXiv 2203.12119, sec. 3.2
Aliases: vpt_deep = dict(deep=True); vpt_shallow = dict(deep=False)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.method import Base, Method, positive_int
from peftlab.model.attention import is_attention_block, token_dimension
from peftlab.parts import hidden_state, prefix
from peftlab.parts import token_slots as slots
from peftlab.parts.token_slots import Place


def tokens(base: Base, args: tuple, kwargs: dict) -> Tensor:
    """The tokens that a block is called with, by position or by name."""
    found = hidden_state.hidden_candidates(args, kwargs)
    if not found:
        raise ValueError(f"{base.path!r} was called without tokens")
    return found[0]


class VPT(Method):
    on = "module"
    any_layout = True
    place = ":patch-blocks"
    neutral = False

    def __init__(self, base: Base, *, n: int = 10, deep: bool = True, at: Place = 1, patch: int = 16):
        super().__init__(base)
        self.n, self.deep, self.dim = positive_int("n", n, None, base), deep, token_dimension(base.site.host)
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
        ends.first, ends.last, ends.inside = sites[0].path, sites[-1].path, {}
        return ends

    @classmethod
    def fits(cls, site) -> bool:
        return site.kind == "module" and site.n_in == site.n_out > 0 and is_attention_block(site.host)

    def forward(self, base: Base, *args, **kwargs):
        return self.run(base, None if self.P is None else self.P[None], self.n, self.n, None, args, kwargs)

    def run(self, base: Base, P: Tensor | None, n: int, most: int, who: object, args: tuple, kwargs: dict):
        """The block with n virtual tokens, P (1 or B, n, d) where they enter; on the way there is room for `most`, the last n of it theirs."""
        old, d = tokens(base, args, kwargs), self.dim
        if any(isinstance(t, Tensor) and t is not old for t in (*args, *kwargs.values())):
            raise ValueError(f"{base.path!r} was called with more tensors than its tokens, a mask perhaps, which cannot be lengthened by {n} virtual ones")
        # Other adapters' tokens that entered below stand in front of these; how many, the first block's output shows.
        inside = 0 if most == n or self.enters else self.common.inside[who]
        x = slots.insert_among(old, P, self.at, d) if self.enters else slots.remove_among(old, self.at + inside, most - n, d)
        args, kwargs = hidden_state.replace_argument(args, kwargs, old, x)
        out = base(*args, **kwargs)
        if self.leaves:
            return hidden_state.edit_hidden_state(out, lambda y: slots.remove_among(y, self.at, n, d))
        if self.enters:
            inside = self.common.inside[who] = hidden_state.hidden_state_of(out).shape[d] - x.shape[d]
        return hidden_state.edit_hidden_state(out, lambda y: slots.insert_among(y, y.new_zeros(1, most - n, y.shape[-1]), self.at + inside, d))

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        first, x = parts[0][0], tokens(base, args, kwargs)
        B = x.shape[1 - first.dim]
        rest = torch.ones(B, dtype=torch.bool)
        groups: dict[int, list] = {}
        for m, rows in parts:
            rest[rows.cpu()] = False
            groups.setdefault(m.n, []).append((torch.zeros(m.n, base.n_out) if m.P is None else m.P, rows))
        if rest.any():
            groups[0] = [(torch.zeros(0, base.n_out), rest.nonzero()[:, 0])]
        who, runs = tuple(sorted((m.recipe.name, *rows.tolist()) for m, rows in parts)), []
        for n, found in groups.items():
            P, _ = prefix.pad_together([p for p, _ in found], [rows for _, rows in found], B)
            runs.append((first.run(base, P.to(x.device), n, max(groups), who, args, kwargs), torch.cat([rows for _, rows in found])))
        return hidden_state.join_rows([out for out, _ in runs], [rows for _, rows in runs], B, first.dim)
