"""X-LoRA: a router weighs trained, frozen LoRAs anew for every token and layer.

    y_l = base_l(x) + sum_i g_li B_li s_li A_li x        A_li (r, n_in), B_li (n_out, r) of expert i at layer l
    g = softmax(classifier(h) / temperature)             h (d,), the token's last hidden state without any expert

The model runs twice: once without the experts for h, once with the gates. `experts` names LoRAs that this model holds; their factors are
copied, so that they may be taken off afterwards, and they must be switched off before: `activate(model, None)`. r is at least their ranks.
A number instead makes as many new ones, B = 0, which are trained along; train=True trains named ones too. The classifier has `depth` layers,
inside `dim` wide; layerwise=False gives all layers the same gates, softmax=False leaves them as they are, and only the k largest act
where k is given. Gates belong to the tokens of the model's input: a layer that is called with others, as keys and values are by llama_adapter,
must be excluded. One thread at a time runs the model.

Trains: (train or isinstance(experts, int)) * count(experts) * r * (n_in + n_out) if site.rule.pointwise else
    classifier_size(n_in, dim, depth, int(sites) - 2 if layerwise else 1, count(experts)) / 2
Structure: y - base(x) lies in the span of all B_li
Family: mixtures
Paper: Buehler and Buehler 2024, arXiv 2402.07148
Rate: 1e-3
Differs: no dropout in the classifier. With a KV cache the first run has one of its own, of the same size; the authors switch caches off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.core import mixture_router as router
from peftlab.core import paired_caches as caches
from peftlab.method import Base, Method, finite, positive_int
from peftlab.model.places import trunk
from peftlab.parts import hidden_state
from peftlab.parts.routing import classifier_size  # noqa: F401 - named in the formula above


def count(experts: int | list) -> int:
    """How many; ValueError for what is neither a number nor a list of adapters."""
    if isinstance(experts, (list, tuple)) and all(isinstance(name, str) for name in experts):
        experts = len(experts)
    return positive_int("experts", experts, None)


class XLoRA(Method):
    on = "module"
    place = ":adapted"
    opaque = True

    def __init__(
        self, base: Base, *, experts: int | list = 4, r: int = 8, depth: int = 1, dim: int = 2048, k: int | None = None, softmax: bool = True,
        temperature: float = 1.0, layerwise: bool = True, train: bool = False, seed: int = 0,
    ):  # fmt: skip
        super().__init__(base)
        n, self.path, self.owner = count(experts), base.path, base.path == self.common.owner
        positive_int("r", r, min(base.n_in, base.n_out) if base.pointwise else None, base)
        if not base.pointwise:
            return
        A, B = (torch.rand(n, r, base.n_in) * 2 - 1) / base.n_in**0.5, torch.zeros(n, base.n_out, r)
        if not isinstance(experts, int) and not base.meta:
            if acting := base.acting & {*experts}:
                raise ValueError(f"{min(acting)!r} acts at {base.path!r} itself and would count twice: switch it off first, activate(model, None)")
            found = [router.lora_factors(base.neighbours.get(name, ()), name, r, base.path, A[0], B[0]) for name in experts]
            A, B = (torch.stack(t) for t in zip(*found, strict=True))
        for name, t in (("A", A), ("B", B)):
            self.register_parameter(name, nn.Parameter(t)) if train or isinstance(experts, int) else self.register_buffer(name, t)

    @classmethod
    def fits(cls, site) -> bool:
        return site.rule.pointwise

    @classmethod
    def beside(cls, model, hosts, hyper) -> list[nn.Module]:
        held = {n for h in hosts if "peftlab" in h._modules for n in h._modules["peftlab"].sites}
        wanted = hyper.get("experts", 1)
        count(wanted)
        if not isinstance(wanted, int) and not held.issuperset(wanted):
            raise ValueError(f"experts={wanted!r}: the layers meant hold {sorted(held) or 'no adapters'}")
        return trunk(model)

    @classmethod
    def shared(cls, sites, *, experts=4, depth=1, dim=2048, k=None, softmax=True, temperature=1.0, layerwise=True, seed=0) -> nn.Module:
        there, trunk = [s.path for s in sites if s.rule.pointwise], [s for s in sites if not s.rule.pointwise]
        if len(trunk) != 2:
            raise ValueError("xlora needs a model with one list of blocks, whose last hidden state its router reads")
        if k is not None and positive_int("k", k, None) > count(experts):
            raise ValueError(f"k={k}: there are {count(experts)} experts")
        if finite("temperature", temperature) <= 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        widths = (trunk[0].n_in, positive_int("dim", dim, None), positive_int("depth", depth, None))
        owner = min((s.path for s in trunk), key=len)
        return router.GateClassifier(*widths, there, layerwise, count(experts), owner, seed, (k, softmax, temperature))

    def mixed(self, x: Tensor, g: Tensor) -> Tensor:
        h = F.linear(x, self.A.flatten(0, 1).to(x.dtype)) * g.to(x.dtype).repeat_interleave(self.A.shape[1], -1)
        return F.linear(h, self.B.mT.flatten(0, 1).mT.to(x.dtype))

    def forward(self, base: Base, *args, **kwargs):
        return self.routed(base, [(self, None)], *args, **kwargs)

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        if parts[0][0].owner:
            runs = caches.two_runs_with_caches(base, base.site.host, args, kwargs, "+".join(sorted(m.recipe.name for m, _ in parts)))
            return router.run_for_gates(base.site.host, *runs, [(m.common, m.common.how, rows) for m, rows in parts])
        out = base(*args, **kwargs)
        if not base.pointwise:
            for m, _ in parts:
                m.common.read(hidden_state.hidden_state_of(out))
            return out
        x = hidden_state.hidden_candidates(args, kwargs)[0]
        for m, rows in parts:
            g = m.common.of(m.path, x)
            if g is None:
                continue
            if rows is None:
                out = out + m.mixed(x, g).to(out.dtype)
            else:
                out = hidden_state.apply_by_rows(out, [(m, rows)], lambda m, y, at, g=g: y + m.mixed(x[at], g[at]))
        return out
