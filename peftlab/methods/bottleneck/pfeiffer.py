"""Pfeiffer: a bottleneck adapter after the feed-forward part and its normalisation.

    y = norm(u + a(norm(u)))        u = h + x, where the block adds and then normalises
    y = z + a(z)                    z the block's output, where it normalises first

    a(z) = s g (E f(D z + c) + e),  D (dim, n_out), c (dim,), E (n_out, dim), e (n_out,)

h is the feed-forward output, x its input. The norm is the model's own and frozen: it comes before the adapter and once more after it, and the
adapter's residual is taken before it. E, e = 0 at the start, s = alpha. activation is f: relu, gelu, silu, tanh, sigmoid, elu or identity.
bias=False leaves c and e out. norm=True puts one more, trained LayerNorm in front of D. gate: none (g = 1) | scalar | channel, a trained
factor that starts at 1. init: zero | normal (standard deviation 0.02) | truncated (0.01, cut at two deviations). The first form is taken at a
normalisation layer, the second at every other module. By default the norm is found where it stands beside the output layer, as in BERT, and
in torch's encoder; where all layers lie in the block itself, whether it normalises first cannot be seen: targets says the norm.

Trains: size(n_out, n_out, dim, bias, norm, gate)
Structure: the adapter's change of the sum depends on its argument through at most dim features
Family: adapters
Paper: Pfeiffer et al. 2020 (MAD-X), arXiv 2005.00052, eq. 1; Pfeiffer et al. 2020 (AdapterFusion), arXiv 2005.00247
Rate: 1e-3
Differs: starts at the base itself, the authors near it.
"""

from __future__ import annotations

from torch import Tensor

from peftlab.method import Base, Method, finite, positive_int
from peftlab.parts import bottleneck, hidden_state
from peftlab.parts.bottleneck import size  # noqa: F401 - named in the formula above


class Pfeiffer(Method):
    on = "module"
    place = ":feedforward-norms"
    opaque = True

    def __init__(
        self, base: Base, *, dim: int = 64, alpha: float = 1.0, activation: str = "relu", init: str = "zero", bias: bool = True, norm: bool = False,
        gate: str = "none",
    ):  # fmt: skip
        super().__init__(base)
        self.s, self.f, self.path = finite("alpha", alpha), activation, base.path
        dim = positive_int("dim", dim, None, base)
        bottleneck.create(self, base.n_out, base.n_out, dim, base.path, activation=activation, init=init, bias=bias, norm=norm, gate=gate)

    @classmethod
    def fits(cls, site) -> bool:
        return site.n_in > 0 and site.n_out > 0

    def change(self, z: Tensor, onto: Tensor) -> Tensor:
        return onto + bottleneck.branch(self, z, self.s, self.f, self.path).to(onto.dtype)

    def forward(self, base: Base, *args, **kwargs):
        out = base(*args, **kwargs)
        if not base.is_norm:
            return hidden_state.edit_hidden_state(out, lambda z: self.change(z, z))
        u = hidden_state.hidden_input(base.site.host, args, kwargs, base.n_in, base.path)
        args, kwargs = hidden_state.replace_argument(args, kwargs, u, self.change(hidden_state.hidden_state_of(out), u))
        return base(*args, **kwargs)

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        out = base(*args, **kwargs)
        if not base.is_norm:
            return hidden_state.edit_hidden_state(out, lambda h: hidden_state.apply_by_rows(h, parts, lambda m, z, rows: m.change(z, z)))
        u, z = hidden_state.hidden_input(base.site.host, args, kwargs, base.n_in, base.path), hidden_state.hidden_state_of(out)
        new = hidden_state.apply_by_rows(u, parts, lambda m, v, rows: m.change(z.index_select(0, rows), v))
        args, kwargs = hidden_state.replace_argument(args, kwargs, u, new)
        return base(*args, **kwargs)
