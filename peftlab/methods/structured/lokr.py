"""LoKr: a change that is a Kronecker product, one factor of which may be of low rank.

    W' = W + s (w1 kron w2)        w1 (l, p), w2 (k, q), l k = n_out, p q = n_in, s = alpha / r

w2 = w2_a w2_b with w2_a (k, r), w2_b (r, q) where r < max(k, q) / 2, else w2 is full. decompose_both treats w1 in the same way. The pairs
(l, k) and (p, q) are the most square ones, smaller first, or begin with `factor`. On a convolution p divides the channels, and q
carries the kernel. init: kaiming (w1 = 0) | lycoris (w2 = 0).

Trains: size(factors(n_out, factor), inputs(n_in, shape, factor), r, decompose_both)
Structure: a rearrangement of W' - W has rank 1
Family: Kronecker
Paper: Yeh et al. 2023 (LyCORIS), arXiv 2309.14859, eq. 4; the product of low-rank factors of FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098
Rate: 2e-3
Differs: a `factor` that does not divide is refused, where LyCORIS takes the nearest divisor below it. The scale is alpha / r also where
    both factors are full. On a convolution q counts the kernel positions when w2 is full or not; HF peft compares r with the channels alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peftlab.method import Base, Method, finite, positive_int
from peftlab.parts.kron import factors, times_kron


def inputs(n_in: int, shape: tuple[int, ...], factor: int | None) -> tuple[int, int]:
    """(p, q): the channels are divided, the kernel positions behind them stay together."""
    kernel = math.prod(shape[2:])
    kernel = kernel if n_in % kernel == 0 else 1
    p, q = factors(n_in // kernel, factor)
    return p, q * kernel


def split(rows: int, columns: int, r: int, allowed: bool = True) -> list[tuple[int, int]]:
    """The shapes of a factor's own factors."""
    return [(rows, r), (r, columns)] if allowed and r < max(rows, columns) / 2 else [(rows, columns)]


def size(out: tuple[int, int], into: tuple[int, int], r: int, decompose_both: bool) -> int:
    """How many numbers the factors hold."""
    shapes = split(out[0], into[0], r, decompose_both) + split(out[1], into[1], r)
    return sum(a * b for a, b in shapes)


class LoKr(Method):
    additive = True
    opaque = True

    def __init__(self, base: Base, *, r: int = 8, alpha: float = 8.0, factor: int | None = None, decompose_both: bool = False, init: str = "kaiming"):
        super().__init__(base)
        self.r, self.s = positive_int("r", r, None, base), finite("alpha", alpha) / r
        if factor is not None:
            positive_int("factor", factor, None, base)
        if init not in ("kaiming", "lycoris"):
            raise ValueError(f"init={init!r} at {base.path!r}: kaiming or lycoris")
        (l, k), (p, q) = factors(base.n_out, factor), inputs(base.n_in, base.shape, factor)  # noqa: E741 - the paper's letter
        self.make("w1", split(l, p, r, decompose_both), init == "kaiming")
        self.make("w2", split(k, q, r), init == "lycoris")

    def make(self, name: str, shapes: list[tuple[int, int]], zero: bool) -> None:
        names = [name] if len(shapes) == 1 else [f"{name}_a", f"{name}_b"]
        for i, (key, shape) in enumerate(zip(names, shapes, strict=True)):
            t = nn.Parameter(torch.zeros(shape))
            self.register_parameter(key, t)
            # LyCORIS clears w1_a of a product w1_a w1_b, but w2_b of w2_a w2_b.
            if not (zero and i == (len(shapes) - 1 if name == "w2" else 0)):
                nn.init.kaiming_uniform_(t, a=5**0.5)

    def parts(self, name: str) -> tuple[Tensor, ...]:
        return (self._parameters[name],) if name in self._parameters else (self._parameters[f"{name}_a"], self._parameters[f"{name}_b"])

    def both(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """s w1 formed, w2 in its parts."""
        w1 = self.parts("w1")
        return self.s * (w1[0] if len(w1) == 1 else w1[0] @ w1[1]), self.parts("w2")

    def weight(self, W: Tensor) -> Tensor:
        w1, w2 = self.both()
        return W + torch.kron(w1, w2[0] if len(w2) == 1 else w2[0] @ w2[1])

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if not base.pointwise:
            return super().forward(base, x)
        return base(x) + times_kron(x, *self.both())
