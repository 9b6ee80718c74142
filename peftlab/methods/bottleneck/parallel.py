"""Parallel: a bottleneck adapter beside the feed-forward part.

    y = base(x) + s g (E f(D x + c) + e)        D (dim, n_in), c (dim,), E (n_out, dim), e (n_out,)

x is the input of the part, s = alpha. E, e = 0 at the start. activation is f: relu, gelu, silu, tanh, sigmoid, elu or identity. bias=False
leaves c and e out. norm=True normalises x before D (LayerNorm, trained). gate: none (g = 1) | scalar | channel, a trained factor that starts at
1. init: zero | normal (standard deviation 0.02) | truncated (0.01, cut at two deviations); the last two start near the base only. The
adapter sits at the module that is called with x; where that one also adds x and normalises, as in BERT, its change goes into the sum. Where
the layers lie in the block itself there is no such module: targets says where (":blocks", ":linears"). `adapter_p` sits at every linear layer of the blocks.

Trains: size(n_in, n_out, dim, bias, norm, gate)
Structure: y - base(x) depends on x through at most dim features
Family: adapters
Paper: He et al. 2021, arXiv 2110.04366, table 1; on linear layers: Hu et al. 2023 (LLM-Adapters), arXiv 2304.01933; in vision: Chen et al.
    2022 (AdaptFormer), arXiv 2205.13535
Rate: 5e-4
Aliases: scaled_parallel = dict(gate="scalar", alpha=1.0); adapter_p = dict(targets=":linears", activation="tanh", bias=False, alpha=1.0);
    adaptformer = dict(alpha=0.1)
Differs: the input is what the part gets, so normalised where the block normalises first, as in the equations of AdaptFormer; its code
    takes the residual stream.
"""

from __future__ import annotations

from torch import Tensor

from peftlab.method import Base, Method, finite, positive_int
from peftlab.parts import bottleneck, hidden_state
from peftlab.parts.bottleneck import size  # noqa: F401 - named in the formula above


class Parallel(Method):
    on = "module"
    place = ":feedforwards"
    elsewhere = (
        '":blocks", beside whole blocks, or ":linears", beside every linear layer: no module is called with the input of a feed-forward part where '
        "its layers lie in the block itself"
    )
    opaque = True

    def __init__(
        self, base: Base, *, dim: int = 64, alpha: float = 4.0, activation: str = "relu", init: str = "zero", bias: bool = True, norm: bool = False,
        gate: str = "none",
    ):  # fmt: skip
        super().__init__(base)
        self.s, self.f, self.path = finite("alpha", alpha), activation, base.path
        dim = positive_int("dim", dim, None, base)
        bottleneck.create(self, base.n_in, base.n_out, dim, base.path, activation=activation, init=init, bias=bias, norm=norm, gate=gate)

    @classmethod
    def fits(cls, site) -> bool:
        return site.n_out > 0 and site.n_in > 0

    def branch(self, x: Tensor) -> Tensor:
        return bottleneck.branch(self, x, self.s, self.f, self.path)

    def forward(self, base: Base, *args, **kwargs):
        return self.routed(base, [(self, None)], *args, **kwargs)

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        if base.adds:
            x = list(hidden_state.declared_tensors(base.site.host, args, kwargs).values())
            if len(x) < 2:
                raise ValueError(f"{base.path!r} was called without the residual that it adds: sit at another module")
            x = x[base.adds]
        else:
            x = hidden_state.hidden_input(base.site.host, args, kwargs, base.n_in, base.path)

        def change(m: Parallel, h: Tensor, rows: Tensor | None) -> Tensor:
            return h + m.branch(x if rows is None else x.index_select(0, rows)).to(h.dtype)

        def whole(h: Tensor) -> Tensor:
            return change(parts[0][0], h, None) if parts[0][1] is None else hidden_state.apply_by_rows(h, parts, change)

        if base.adds:  # norm(layer(h) + x): what goes into the sum is added to x
            args, kwargs = hidden_state.replace_argument(args, kwargs, x, whole(x))
            return base(*args, **kwargs)
        return hidden_state.edit_hidden_state(base(*args, **kwargs), whole)
