"""Houlsby: a bottleneck adapter in series, at the output of attention and feed-forward.

    y = h + s g (E f(D h + c) + e)        h = base(x), D (dim, n_out), c (dim,), E (n_out, dim), e (n_out,)

h is what the sub-layer gives before the residual sum, s = alpha. E, e = 0 at the start. activation is f: relu, gelu, silu, tanh, sigmoid,
elu or identity. bias=False leaves c and e out. norm=True normalises h before D (LayerNorm, trained). gate: none (g = 1) | scalar | channel, a
trained factor that starts at 1. init: zero | normal (standard deviation 0.02) | truncated (0.01, cut at two deviations); the last two
start near the base only. The adapter sits at the layer that projects back to the block's width (at the module itself where experts do so, or
nn.MultiheadAttention); `adapter_s` sits at every linear layer of the blocks.

Trains: size(n_out, n_out, dim, bias, norm, gate)
Structure: y - h depends on h through at most dim features
Family: adapters
Paper: Houlsby et al. 2019, arXiv 1902.00751, sec. 2.1; on linear layers: Hu et al. 2023 (LLM-Adapters), arXiv 2304.01933
Rate: 5e-4
Aliases: adapter_s = dict(targets=":linears", activation="tanh", bias=False)
Differs: starts at the base itself, the authors near it. The LayerNorms are not trained along: wrap ln_tuning as well.
"""

from __future__ import annotations

from torch import Tensor

from peftlab.method import Base, Method, finite, positive_int
from peftlab.parts import bottleneck, hidden_state
from peftlab.parts.bottleneck import size  # noqa: F401 - named in the formula above


class Houlsby(Method):
    on = "module"
    place = ":sublayers"
    opaque = True

    def __init__(
        self, base: Base, *, dim: int = 64, alpha: float = 1.0, activation: str = "gelu", init: str = "zero", bias: bool = True, norm: bool = False,
        gate: str = "none",
    ):  # fmt: skip
        super().__init__(base)
        self.s, self.f, self.path = finite("alpha", alpha), activation, base.path
        dim = positive_int("dim", dim, None, base)
        bottleneck.create(self, base.n_out, base.n_out, dim, base.path, activation=activation, init=init, bias=bias, norm=norm, gate=gate)

    @classmethod
    def fits(cls, site) -> bool:
        return site.n_in > 0 and site.n_out > 0

    def change(self, h: Tensor) -> Tensor:
        return h + bottleneck.branch(self, h, self.s, self.f, self.path)

    def forward(self, base: Base, *args, **kwargs):
        return hidden_state.edit_hidden_state(base(*args, **kwargs), self.change)

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        return hidden_state.edit_hidden_state(base(*args, **kwargs), lambda h: hidden_state.apply_by_rows(h, parts, lambda m, z, rows: m.change(z)))
