"""The bottleneck of adapters: down to a few dimensions, a nonlinearity, up again.

    branch(x) = s g (E f(D norm(x) + c) + e)

Legend: D (dim, n_in), c (dim,), E (n_out, dim), e (n_out,), s a constant, g a trained factor (one, or one a channel), norm a LayerNorm with
trained gamma, beta (n_in,). What is not asked for is not there. Everything is computed in the precision of x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "elu": F.elu, "identity": lambda x: x,
}  # fmt: skip
INITS = ("zero", "normal", "truncated")
GATES = ("none", "scalar", "channel")


def create(m: nn.Module, n_in: int, n_out: int, dim: int, path: str, *, activation: str, init: str, bias: bool, norm: bool, gate: str) -> None:
    """Give `m` the tensors of a bottleneck at their start. ValueError for words that are none of those above.

    init: zero (D Kaiming-uniform, E = 0: the branch starts at zero) | normal, N(0, 0.02^2) | truncated, N(0, 0.01^2) cut at two deviations.
    """
    for what, value, there in (("activation", activation, ACTIVATIONS), ("init", init, INITS), ("gate", gate, GATES)):
        if not isinstance(value, str) or value not in there:
            raise ValueError(f"{what}={value!r} at {path!r}: one of {', '.join(there)}")
    m.D, m.E = nn.Parameter(torch.empty(dim, n_in)), nn.Parameter(torch.zeros(n_out, dim))
    m.c, m.e = (nn.Parameter(torch.zeros(k)) if bias else None for k in (dim, n_out))
    m.gamma, m.beta = (nn.Parameter(torch.full((n_in,), v)) if norm else None for v in (1.0, 0.0))
    m.g = None if gate == "none" else nn.Parameter(torch.ones(1 if gate == "scalar" else n_out))
    if init == "zero":
        nn.init.uniform_(m.D, -(n_in**-0.5), n_in**-0.5)
    for W in (m.D, m.E) if init != "zero" else ():
        nn.init.normal_(W, std=0.02) if init == "normal" else nn.init.trunc_normal_(W, std=0.01, a=-0.02, b=0.02)


def size(n_in: int, n_out: int, dim: int, bias: bool, norm: bool, gate: str) -> int:
    """The entries of such tensors."""
    return dim * (n_in + n_out) + bias * (dim + n_out) + norm * 2 * n_in + {"none": 0, "scalar": 1, "channel": n_out}[gate]


def branch(m: nn.Module, x: Tensor, s: float, activation: str, path: str) -> Tensor:
    """x (..., n_in) -> (..., n_out), of the tensors that `create` made."""
    if x.shape[-1] != m.D.shape[1]:
        raise ValueError(f"the hidden state at {path!r} has {x.shape[-1]} features, but its layers said {m.D.shape[1]}: sit at another module")
    D, E, c, e, g = (None if t is None else t.to(x.dtype) for t in (m.D, m.E, m.c, m.e, m.g))
    if m.gamma is not None:
        x = F.layer_norm(x, x.shape[-1:], m.gamma.to(x.dtype), m.beta.to(x.dtype))
    y = F.linear(ACTIVATIONS[activation](F.linear(x, D, c)), E, e)
    return s * (y if g is None else g * y)
