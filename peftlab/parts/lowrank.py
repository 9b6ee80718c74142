"""Low-rank factors of a matrix: truncated SVD with a stated error, starting factors, running principal components.

Legend: W (m, n); r rank; U (m, r), S (r,), Vh (r, n) with W ~ U diag(S) Vh; A (r, n), B (m, r) with B A a rank-r matrix; X' the transpose.
Everything is computed in float32 or better, on the device of W, and draws from generators of its own.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SAFE = 2.0**-30, 2.0**30  # largest entries whose powers need no care in float32


class Error(NamedTuple):
    """How good a rank-r approximation is. residual = |W - U S Vh|_F; no rank-r matrix has a residual below `floor`."""

    residual: float
    floor: float


class Truncated(NamedTuple):
    U: Tensor  # (m, r)
    S: Tensor  # (r,), decreasing
    Vh: Tensor  # (r, n)
    error: Error


def working(W: Tensor) -> Tensor:
    """W without gradient, in float32 or better."""
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))


def unit_scale(W: Tensor) -> tuple[Tensor, float]:
    """W / c and c, a power of two: 1, or near the largest entry where its powers and sums could overflow or vanish."""
    top = max(abs(v.item()) for v in torch.aminmax(W)) if W.numel() else 0.0
    if not math.isfinite(top):
        raise ValueError(f"a matrix of shape {tuple(W.shape)} has entries that are not finite: it has no singular values")
    if top == 0 or SAFE[0] < top < SAFE[1]:
        return W, 1.0
    c = 2.0 ** (math.frexp(top)[1] - 1)
    return W / c, c


def times(W: Tensor, Z: Tensor) -> Tensor:
    """W Z for few columns Z, as (Z'W')': the BLAS is up to twice as fast with few rows as with few columns."""
    return (Z.mT.contiguous() @ W.mT).mT


def krylov(W: Tensor, k: int, iterations: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Q, W'Q with orthonormal columns Q, at most (iterations + 1) k, whose span nearly holds the k leading left singular vectors of W.

    The block Krylov space of W W' from k random columns, kept whole: Musco, Musco 2015, arXiv 1504.05477. For the same number of
    products it comes far closer than subspace iteration, which keeps its last block alone.
    """
    draw = torch.randn(W.shape[1], k, generator=torch.Generator("cpu").manual_seed(seed), device="cpu", dtype=torch.float32)
    Q = torch.linalg.qr(times(W, draw.to(W))).Q
    P = times(W.mT, Q)
    for _ in range(iterations):
        room = min(W.shape) - Q.shape[1]
        if room == 0:
            break
        X = times(W, torch.linalg.qr(P[:, -k:]).Q)
        for _ in range(2):  # once leaves what rounding of a nearly dependent block hides
            X = torch.linalg.qr(X - Q @ (Q.mT @ X)).Q
        Q, P = torch.cat([Q, X[:, :room]], 1), torch.cat([P, times(W.mT, X[:, :room])], 1)
    if (Q.mT @ Q - torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)).abs().max() > 100 * torch.finfo(Q.dtype).eps:
        Q = torch.linalg.qr(Q).Q  # the space was exhausted: W has fewer dimensions than columns were asked for
        P = W.mT @ Q
    return Q, P


def largest_beyond(W: Tensor, Q: Tensor, power: int = 3, draws: int = 16, seed: int = 1) -> float:
    """An upper bound of the spectral norm of E = W - Q Q'W that fails with probability at most 4^-draws.

    Halko, Martinsson, Tropp 2011, arXiv 0909.4061, lemma 4.1, applied to (E E')^power E, whose norm is |E|^(2 power + 1).
    """
    z = torch.randn(W.shape[1], draws, generator=torch.Generator("cpu").manual_seed(seed), device="cpu", dtype=torch.float32).to(W)
    logs = torch.zeros(draws, dtype=torch.float64, device=W.device)
    for i in range(2 * power + 1):
        z = times(W.mT if i % 2 else W, z)
        z = z if i % 2 else z - Q @ (Q.mT @ z)  # E'z = W'z where z is orthogonal to Q
        size = torch.linalg.vector_norm(z, dim=0)
        logs += size.double().log()
        z = z / size.clamp_min(torch.finfo(z.dtype).tiny)
    return math.exp((math.log(4 * math.sqrt(2 / math.pi)) + logs.max().item()) / (2 * power + 1))


def leading_energy(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor, r: int, beyond: float) -> float:
    """An upper bound of the sum of the r largest squared singular values of W, from a subspace U (m, k) with U'W = diag(S) Vh.

    With R = W V - U S and E the rest of W, whose norm is at most `largest_beyond` and whose Frobenius norm is `beyond`, the matrix W'W
    in the basis (V, rest) is [[H, G'], [G, E'E]], H = S^2 + R'R, G = E'R. Ky Fan: the sum exceeds that of S^2 by at most
    min(beyond^2, r |E|^2). Schur complement: if h, the r-th eigenvalue of H, exceeds |E|^2, the sum is at most that of the r largest
    eigenvalues of H + G'G / (h - |E|^2), which is far sharper once the iteration has converged.
    """
    kappa = largest_beyond(W, U) ** 2
    ky_fan = S[:r].double().square().sum().item() + min(beyond**2, r * kappa)
    R = times(W, Vh.mT) - U * S
    G = times(W.mT, R)
    G = G - Vh.mT @ (Vh @ G)
    H = torch.diag(S.double().square()) + (R.mT @ R).double()
    gap = torch.linalg.eigvalsh(H)[-r].item() - kappa
    if gap <= 0:
        return ky_fan
    return min(ky_fan, torch.linalg.eigvalsh(H + (G.mT @ G).double() / gap)[-r:].sum().item())


def randomized_svd(W: Tensor, r: int, *, oversample: int = 4, iterations: int = 6, seed: int = 0) -> Truncated:
    """The r leading singular triplets of W from a block Krylov space, the same on every call.

    `error.residual` is the exact Frobenius error (one dense temporary). `error.floor` is below the best error that any matrix of
    rank r has (Eckart-Young), up to rounding and with probability 1 - 4^-16: see `leading_energy`.
    """
    W, c = unit_scale(working(W))
    Q, P = krylov(W, min(r + oversample, *W.shape), iterations, seed)
    rows, R = torch.linalg.qr(P)  # the decomposition of a wide matrix is quicker by way of a square one
    Uk, Sk, Vk = torch.linalg.svd(R.mT)
    few = min(2 * r, len(Sk))
    U, S, Vh = Q @ Uk[:, :few], Sk[:few], Vk[:few] @ rows.mT
    kept = S[:r].double().square().sum().item()
    residual = frobenius(torch.addmm(W, U[:, :r] * S[:r], Vh[:r], alpha=-1))
    tail = Sk[r:].double().square().sum().item()
    beyond = math.sqrt(max(0.0, residual**2 - S[r:].double().square().sum().item()))  # what the `few` leave, by Pythagoras
    floor = math.sqrt(max(tail, residual**2 + kept - leading_energy(W, U, S, Vh, r, beyond)))
    return Truncated(U[:, :r], S[:r] * c, Vh[:r], Error(residual * c, min(floor, residual) * c))


def frobenius(W: Tensor) -> float:
    """|W|_F, summed over the rows in float64."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(W, dim=1).double()).item()


def exact_svd(W: Tensor, r: int) -> Truncated:
    """The r leading singular triplets of W from its full decomposition; the error is the optimum."""
    W, c = unit_scale(working(W))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    best = math.sqrt(S[r:].double().square().sum().item()) * c
    return Truncated(U[:, :r], S[:r] * c, Vh[:r], Error(best, best))


# ---------------------------------------------------------------- starting factors (A, B)


Start = tuple[Tensor, Tensor, Error | None]


def positive_scale(s: float) -> None:
    """ValueError where the square root of a singular value over s does not exist."""
    if s <= 0:
        raise ValueError(f"this start divides by the scale alpha / r: {s} is not positive")


def principal(W: Tensor, r: int, s: float, svd: Callable = randomized_svd) -> Start:
    """A, B with s B A the best rank-r part of W: B = U sqrt(S / s), A = sqrt(S / s) Vh (PiSSA, arXiv 2404.02948)."""
    positive_scale(s)
    U, S, Vh, error = svd(W, r)
    root = (S / s).sqrt()
    return root[:, None] * Vh, U * root, error


def orthonormal(W: Tensor, r: int, s: float) -> Start:
    """A = R[:r], B = Q[:, :r] of W = Q R, whatever s (OLoRA, arXiv 2406.01775). The first r columns of Q need only those of W."""
    W = working(W)
    B = torch.linalg.qr(W[:, :r]).Q
    return B.mT @ W, B, None


STARTS: dict[str, Callable[[Tensor, int, float], Start]] = {
    "pissa": principal,
    "pissa_exact": functools.partial(principal, svd=exact_svd),
    "olora": orthonormal,
}
CODED = ("loftq", "qpissa")  # starts that are found together with the codes of the weight (peftlab.wrap_quantized)


REMEMBERED = 1 << 28  # bytes of factors that are kept for weights that come again
_made: OrderedDict[tuple, Start] = OrderedDict()


def start(init: str, W: Tensor, r: int, s: float) -> Start:
    """`STARTS[init](W, r, s)`; for content that was decomposed before in this process, what came of it then."""
    key = (init, r, s, W.dtype, tuple(W.shape), _digest(W))
    if key in _made:
        _made.move_to_end(key)
    else:
        A, B, error = STARTS[init](W, r, s)
        _made[key] = A.cpu().clone(), B.cpu().clone(), error
        while len(_made) > 1 and sum(a.nbytes + b.nbytes for a, b, _ in _made.values()) > REMEMBERED:
            _made.popitem(last=False)
    A, B, error = _made[key]
    return A.to(W.device), B.to(W.device), error


def _digest(W: Tensor) -> bytes:
    data = W.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).digest()


def disjoint(n_out: int, n_in: int, r: int) -> tuple[Tensor, Tensor]:
    """A (r, n_in), B (n_out, r), both filled and yet B A = 0 up to rounding: they use complementary halves of an orthonormal basis of the r dimensions."""
    if r % 2:
        raise ValueError(f"the orthogonal start splits the rank into halves: r={r} is odd")
    basis = torch.linalg.qr(torch.randn(r, r)).Q
    return basis[:, 0::2] @ torch.randn(r // 2, n_in) / 10, torch.randn(n_out, r // 2) @ basis[:, 1::2].mT / 10


def random_start(init: str, n_out: int, n_in: int, r: int, one_hot: bool = False) -> tuple[Tensor, Tensor]:
    """A, B with B A = 0, drawn from torch's generator. one_hot: the input is a token, so A = 0 and B is drawn instead.

    gaussian: A ~ N(0, 1 / r^2). orthogonal: see `disjoint`. Else A is Kaiming-uniform, U(-1 / sqrt(n_in), 1 / sqrt(n_in)).
    """
    if init == "orthogonal":
        return disjoint(n_out, n_in, r)
    if one_hot:
        return torch.zeros(r, n_in), torch.randn(n_out, r)
    A = torch.randn(r, n_in) / r if init == "gaussian" else (torch.rand(r, n_in) * 2 - 1) / n_in**0.5
    return A, torch.zeros(n_out, r)


# ---------------------------------------------------------------- principal components of a stream


class Stream(NamedTuple):
    """What is kept of the rows seen so far."""

    count: int
    mean: Tensor  # (n,)
    S: Tensor  # (k,)
    Vh: Tensor  # (k, n)


def observe_rows(seen: Stream | None, X: Tensor, r: int, oversample: int = 10) -> Stream:
    """Update the leading right singular vectors of the mean-centred rows with a batch X (rows, n).

    Incremental PCA: Ross, Lim, Lin, Yang 2008, "Incremental Learning for Robust Visual Tracking".
    """
    X = working(X)
    mean = X.mean(0)
    if seen is None:
        count, total, rows = len(X), mean, X - mean
    else:
        count = seen.count + len(X)
        total = seen.mean + (mean - seen.mean) * (len(X) / count)
        jump = math.sqrt(seen.count * len(X) / count) * (mean - seen.mean)
        rows = torch.cat([seen.S[:, None] * seen.Vh, X - mean, jump[None]])
    k = min(r + oversample, *rows.shape)
    if min(rows.shape) > 4 * k:
        rows = krylov(rows, k)[1].mT
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    return Stream(count, total, S[:k], Vh[:k])


def directions(seen: Stream | None, r: int, path: str) -> Tensor:
    """The r leading directions (r, n) of what was seen; too few raise."""
    found = 0 if seen is None else int((seen.S > 0).sum())
    if found < r:
        raise ValueError(f"the data show {found} input directions at {path!r}: r={r} needs as many")
    return seen.Vh[:r] * signs(seen.Vh[:r])


def signs(V: Tensor) -> Tensor:
    """The signs (rows, 1) that make the largest entry of every row positive: singular vectors are only given up to theirs."""
    return V.gather(1, V.abs().argmax(1, keepdim=True)).sign()


# ---------------------------------------------------------------- norms


def row_norms(W: Tensor, A: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """|W + s B A| of every row, (m,), without forming B A or any other (m, n) temporary.

    |W_i|^2 + 2 s <B_i, (W A')_i> + s^2 B_i (A A') B_i'
    """
    dtype = torch.promote_types(W.dtype, A.dtype)
    W, A, B = W.to(dtype), A.to(dtype), B.to(dtype)
    cross = (B.mT * torch.addmm(A @ W.mT, s * (A @ A.mT), B.mT, beta=2)).sum(0)
    return torch.linalg.vector_norm(W, dim=1).square().add(s * cross).clamp_min(0).sqrt()
