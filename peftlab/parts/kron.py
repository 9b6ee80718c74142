"""Divisors, and products with a Kronecker matrix that is never formed.

Legend: C (l, p), D (k, q), so C kron D is (l k, p q); X' the transpose.
"""

from __future__ import annotations

import math

from torch import Tensor


def divisors(d: int) -> list[int]:
    """All divisors of d, increasing."""
    small = [k for k in range(1, math.isqrt(d) + 1) if d % k == 0]
    return small + [d // k for k in reversed(small) if k * k != d]


def largest_divisor(d: int, limit: int) -> int:
    """The largest divisor of d not above limit."""
    return max(k for k in divisors(d) if k <= limit)


def factors(d: int, factor: int | None = None) -> tuple[int, int]:
    """d as a product: the most square one, smaller first, or (factor, d / factor)."""
    small = largest_divisor(d, math.isqrt(d)) if factor is None else factor
    if d % small:
        raise ValueError(f"factor={factor} does not divide {d}; its divisors are {divisors(d)}")
    return small, d // small


def times_kron(x: Tensor, C: Tensor, D: tuple[Tensor, ...]) -> Tensor:
    """x (..., p q) -> x (C kron (D[0] D[1] ...))', (..., l k), by the vec trick; the Ds are applied last factor first.

    C goes in where the feature axis is shortest, between the Ds or beside them.
    """
    h = x.unflatten(-1, (C.shape[1], -1))  # (..., p, q)
    widths = [h.shape[-1], *(d.shape[0] for d in reversed(D))]
    turn = widths.index(min(widths))
    for i, d in enumerate([*reversed(D), None]):
        if i == turn:
            h = C.to(h.dtype) @ h
        if d is not None:
            h = h @ d.mT.to(h.dtype)
    return h.flatten(-2)
