"""LLaMA-Adapter: trained tokens that every attention layer also attends to, behind a gate that starts at zero.

    y' = y + g softmax(q k(P)^T / sqrt(D)) v(P)        P (n, d), g = tanh(a), a = 0;  y the layer's own attention, before its output projection

k and v are the layer's own projections, so that P lives where its inputs do; no position is put on k(P). The two softmaxes are separate.
tanh=False has g = a.

Trains: n * projection_input_width(site.host) + 1
Structure: where a = 0 the layer is the base's
Family: prompt
Paper: Zhang et al. 2023, arXiv 2303.16199, sec. 3.1-3.2
Rate: 1e-2
Differs: one gate a layer; the authors' later code has one a head. They adapt the topmost layers: say layers=.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.core.attention import KeyValueProjections, refuse_handwritten_attention, surround_attention
from peftlab.method import Base, Method, positive_int
from peftlab.model.attention import projection_input_width, runs_attention
from peftlab.parts import hidden_state, prefix


class LlamaAdapter(Method):
    on = "module"
    any_layout = True
    place = ":attention"

    def __init__(self, base: Base, *, n: int = 10, tanh: bool = True):
        super().__init__(base)
        refuse_handwritten_attention(base)
        d = projection_input_width(base.site.host)
        if not d:
            raise ValueError(f"which projections of {base.path!r} make its keys and values cannot be seen: they run on P too")
        self.tanh, self.kv = tanh, KeyValueProjections.of(base.site)
        self.P = nn.Parameter(torch.randn(positive_int("n", n, None, base), d))
        self.a = nn.Parameter(torch.zeros(1))

    @classmethod
    def fits(cls, site) -> bool:
        return site.kind == "module" and runs_attention(site.host)

    def gate(self) -> Tensor:
        """(1,)."""
        return torch.tanh(self.a) if self.tanh else self.a

    def forward(self, base: Base, *args, **kwargs):
        x = hidden_state.hidden_candidates(args, kwargs)[0]
        K, V = (t[0] if t.shape[0] == 1 else t for t in self.kv(self.P[None].to(x.dtype)))

        def change(run, q, k, v, options):
            self.kv.confirm(x, v, base.path)
            return prefix.attend_with_gate(run, q, k, v, options, K, V, self.gate(), base.path)

        return surround_attention(base, change, *args, **kwargs)

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        def change(run, q, k, v, options):
            rows = [r for _, r in parts]
            P, there = prefix.pad_together([m.P for m, _ in parts], rows, q.shape[0])
            g = torch.zeros(q.shape[0], dtype=P.dtype, device=P.device)
            for m, r in parts:
                g = g.index_copy(0, r.to(P.device), m.gate().expand(len(r)))
            K, V = parts[0][0].kv(P.to(q.dtype))
            return prefix.attend_with_gate(run, q, k, v, options, K, V, g.view(-1, 1, 1, 1), base.path, there)

        return surround_attention(base, change, *args, **kwargs)
