"""Starting factors from data: what is kept of the batches, what several keepings come to, and the factors that follow.

Legend: X (rows, n) inputs of a layer; G (m, n) the gradient of its weight W (m, n); C (n, n) = X'X / rows; r rank; s the scale of B A;
A (r, n), B (m, r); X' the transpose. Sums are kept in float32 or better on the CPU, so that the accelerator holds one layer's at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from peftlab.parts import lowrank
from peftlab.parts.lowrank import Stream, directions, observe_rows, working

GAMMA = 16.0  # LoRA-GA's scale hyper-parameter, at its authors' value


class Sum(NamedTuple):
    """How many were added up, and their sum."""

    count: int
    total: Tensor


def add(seen: Sum | None, count: int, value: Tensor) -> Sum:
    """One more value, of `count` things."""
    value = working(value).cpu()
    return Sum(count, value.clone()) if seen is None else Sum(seen.count + count, seen.total.add_(value))


def keep_covariance(seen: Sum | None, X: Tensor, r: int) -> Sum:
    """X'X of all rows: n * n numbers."""
    X = working(X)
    return add(seen, len(X), X.mT @ X)


def keep_gradient(seen: Sum | None, G: Tensor, r: int) -> Sum:
    """The sum of the batches' gradients: m * n numbers."""
    return add(seen, 1, G)


def pool_states(states: list) -> Sum | Stream | None:
    """What one pass over the data of all these keepings would have kept (for a Stream: up to what truncation drops)."""
    states = [s for s in states if s is not None]
    if not states or isinstance(states[0], Stream):
        return functools.reduce(merge_streams, states) if states else None
    return Sum(sum(s.count for s in states), functools.reduce(torch.add, [s.total for s in states]))


def merge_streams(a: Stream, b: Stream) -> Stream:
    """The running principal components of the rows of both."""
    count, jump = a.count + b.count, b.mean - a.mean
    rows = torch.cat([a.S[:, None] * a.Vh, b.S[:, None] * b.Vh, (a.count * b.count / count) ** 0.5 * jump[None]])
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    k = max(len(a.S), len(b.S))
    return Stream(count, a.mean + jump * (b.count / count), S[:k], Vh[:k])


Factors = tuple[Tensor, Tensor | None]  # A, B; B is None where it starts at zero


def principal_inputs(seen: Stream | None, W: Tensor, r: int, s: float, path: str) -> Factors:
    """A = the leading principal directions of the inputs (EVA, arXiv 2410.07170)."""
    return directions(seen, r, path), None


def context(seen: Sum | None, W: Tensor, r: int, s: float, path: str, last: bool = False) -> Factors:
    """W = U S (V'C^-1) from the SVD of W C: of all rank-r matrices, s B A of its first r terms is nearest to W as C weighs it.

    B = U sqrt(S / s), A = sqrt(S / s) V'C^-1 (CorDA, arXiv 2406.05223). `last`: the r terms that the data need least. C has a mean
    diagonal of 1, to which `damping` is added.
    """
    lowrank.positive_scale(s)
    C = working(seen.total.to(W.device)) / seen.count
    W, c = lowrank.unit_scale(working(W).to(C.dtype))
    size = C.diagonal().mean()
    if not (torch.isfinite(size) and size > 0):
        raise ValueError(f"the data show {path!r} inputs that are zero, or not finite: their covariance says nothing")
    C = damped(C / size)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    U, S, Vh = (U[:, -r:], S[-r:], Vh[-r:]) if last else (U[:, :r], S[:r], Vh[:r])
    sign, root = lowrank.signs(Vh), (S / s).sqrt() * c**0.5
    return root[:, None] * torch.linalg.solve(C, (sign * Vh).mT).mT, U * sign.mT * root


def damped(C: Tensor, damping: float = 0.01, tolerance: float = 0.05) -> Tensor:
    """C + damping I, where the damping is doubled until |C C^-1 - I|_F is below the tolerance, as the authors of CorDA do."""
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    while True:
        found = C + damping * eye
        if torch.linalg.vector_norm(found @ torch.linalg.inv(found) - eye) < tolerance:
            return found
        damping *= 2


def gradient_directions(seen: Sum | None, W: Tensor, r: int, s: float, path: str) -> Factors:
    """A = c V_1..r', B = c U_r+1..2r of the mean gradient, c = m^1/4 / sqrt(GAMMA) (LoRA-GA, arXiv 2407.05000)."""
    U, _, Vh, _ = lowrank.randomized_svd(seen.total.to(W.device), 2 * r)
    c = W.shape[0] ** 0.25 / GAMMA**0.5
    A, B = Vh[:r], U[:, r:].mT
    return c * lowrank.signs(A) * A, c * (lowrank.signs(B) * B).mT


class DataInit(NamedTuple):
    """A start that is computed from data."""

    needs: str  # "inputs" or "gradients"
    keep: Callable
    factors: Callable[..., Factors]
    filled: bool = True  # B A is not zero at the start, so that its start is kept and subtracted


STARTS: dict[str, DataInit] = {
    "eva": DataInit("inputs", observe_rows, principal_inputs, filled=False),
    "corda": DataInit("inputs", keep_covariance, context),
    "corda_kpm": DataInit("inputs", keep_covariance, functools.partial(context, last=True)),
    "lora_ga": DataInit("gradients", keep_gradient, gradient_directions),
}
