"""Prefix tuning: trained keys and values in front of every attention's own.

    y = softmax(q [K; k]^T / sqrt(D)) [V; v]        K (n, keys), V (n, values), for all heads together

Every query sees all n virtual positions; causality among the real ones stays. With net=True a network makes them while they are trained,
[K, V] = tanh(E W1^T + b1) W2^T + b2, with E (n, dim) and W1 (dim, dim) shared by all layers and W2 of each; `peftlab.drop_reparametrization` keeps its
output alone. init: normal (of deviation std) | zeros (not the base either: keys of zero take attention); `peftlab.prefix_from` starts it from a text or
another layer. shift=True moves the positions of the real tokens by n, as if the prefix had been read. width: features of all key heads
together, where the module does not show them.

Trains: (n * dim + dim * (dim + 1)) / sites + sum(key_value_widths(site.host, width)) * (dim + 1) if net else n * sum(key_value_widths(site.host, width))
Structure: the keys and values of the real tokens are unchanged
Family: prompt
Paper: Li and Liang 2021, arXiv 2101.00190, sec. 4.2-4.3. Without the network: P-tuning v2, Liu et al. 2021, arXiv 2110.07602, sec. 3.2
Rate: 1e-3; p_tuning_v2 = 3e-2
Aliases: p_tuning_v2 = dict(net=False)
Differs: one size, dim, serves E and the hidden layer.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from peftlab.core.attention import refuse_handwritten_attention, surround_attention
from peftlab.core.shift_positions import call_with_shifted_positions, refuse_without_positions
from peftlab.method import Base, Method, finite, positive_int
from peftlab.model.attention import key_value_widths, runs_attention
from peftlab.model.tokens import token_models_above
from peftlab.parts import prefix


class PrefixTuning(Method):
    on = "module"
    any_layout = True
    place = ":attention"
    neutral = False

    def __init__(
        self, base: Base, *, n: int = 10, net: bool = True, dim: int = 512, init: str = "normal", std: float = 1.0, shift: bool = False,
        width: int | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__(base)
        self.n, self.shift = positive_int("n", n, None, base), shift
        self.K = self.V = self.W2 = self.b2 = None
        self.holds = not shift or runs_attention(base.site.host)  # else it sits at the stack, whose positions it shifts
        if init not in ("normal", "zeros"):
            raise ValueError(f"init={init!r} at {base.path!r}: one of normal, zeros")
        std = finite("std", std) * (init == "normal")
        width = None if width is None else positive_int("width", width, None, base)
        if not self.holds:
            refuse_without_positions(base)
            return
        refuse_handwritten_attention(base)
        self.keys, self.values = key_value_widths(base.site.host, width)
        if not self.keys:
            raise ValueError(f"how wide the keys of {base.path!r} are cannot be seen: say width=, the features of all key heads together")
        if net:
            self.W2 = nn.Parameter(torch.randn(self.keys + self.values, positive_int("dim", dim, None)) * std * dim**-0.5)
            self.b2 = nn.Parameter(torch.zeros(self.keys + self.values))
        else:
            self.K, self.V = (nn.Parameter(torch.randn(n, w) * std) for w in (self.keys, self.values))

    @classmethod
    def shared(cls, sites, *, n: int = 10, net: bool = True, dim: int = 512, seed: int = 0) -> nn.Module | None:
        if not net:
            return None
        positive_int("n", n, None), positive_int("dim", dim, None)
        trunk, g = nn.Module(), torch.Generator("cpu").manual_seed(seed)
        for name, shape, std in ("E", (n, dim), 1.0), ("W1", (dim, dim), dim**-0.5), ("b1", (dim,), 0.0):
            meta = torch.get_default_device().type == "meta"
            t = torch.empty(shape) if meta else torch.randn(shape, generator=g, device="cpu", dtype=torch.float32) * std
            trunk.register_parameter(name, nn.Parameter(t))
        return trunk

    @classmethod
    def beside(cls, model, hosts, hyper) -> list[nn.Module]:
        found = token_models_above(model, hosts) if hyper.get("shift") else []
        if hyper.get("shift") and hosts and not found:
            raise ValueError("shift=True: no module above the attention layers meant owns a token embedding and takes position ids that could be moved")
        return found

    @classmethod
    def fits(cls, site) -> bool:
        return site.kind == "module" and runs_attention(site.host)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """K (n, keys) and V (n, values)."""
        if self.K is not None:
            return self.K, self.V
        t = self.common
        return (torch.tanh(t.E @ t.W1.mT + t.b1) @ self.W2.mT + self.b2).split([self.keys, self.values], -1)

    def without_network(self) -> tuple[dict, dict[str, Tensor]]:
        """The keyword that says so, and the tensors that such a method has."""
        return {"net": False}, dict(zip("KV", self.tensors(), strict=True)) if self.holds else {}

    def forward(self, base: Base, *args, **kwargs):
        if not self.holds:
            return call_with_shifted_positions(base, self.n, args, kwargs)
        K, V = self.tensors()
        return surround_attention(base, functools.partial(prefix.attend_with_prefix, K=K, V=V, path=base.path), *args, **kwargs)

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        if not parts[0][0].holds:
            return call_with_shifted_positions(base, [(m.n, rows) for m, rows in parts], args, kwargs)
        tensors, rows = [m.tensors() for m, _ in parts], [r for _, r in parts]

        def change(run, q, k, v, options):
            (K, there), (V, _) = (prefix.pad_together(list(t), rows, q.shape[0]) for t in zip(*tensors, strict=True))
            return prefix.attend_with_prefix(run, q, k, v, options, K, V, there, base.path)

        return surround_attention(base, change, *args, **kwargs)
