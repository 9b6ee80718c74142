"""Low-rank factors against torch.linalg.svd: exact recovery, optimality, errors that are what they are said to be."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import outer_sum, own
from torch import nn

import peftlab
from peftlab.parts import lowrank

few = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**20)
sides = st.integers(2, 40)


def spectrum(kind: str, k: int) -> torch.Tensor:
    i = torch.arange(k, dtype=torch.float64)
    return {
        "decaying": 2.0**-i,
        "power": 1 / (1 + i),
        "flat": torch.ones(k, dtype=torch.float64),
        "step": torch.where(i < k // 2, 1.0, 1e-3).double(),
    }[kind]


SPECTRA = ["decaying", "power", "flat", "step"]


def with_spectrum(m, n, S, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    k = len(S)
    U = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    return ((U * S) @ V.T).to(dtype)


def optimum(W, r):
    """Eckart-Young: the Frobenius error of the best matrix of rank r."""
    return torch.linalg.svdvals(W.double())[r:].square().sum().sqrt().item()


def of_rank(m, n, r, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=g, dtype=torch.float64) @ torch.randn(r, n, generator=g, dtype=torch.float64)


# ---- a difference of rank r is recovered, without training


@few
@given(m=sides, n=sides, r=st.integers(1, 8), seed=seeds, start=st.sampled_from(sorted(lowrank.STARTS)), s=st.sampled_from([0.25, 1.0, 2.0]))
def test_factors_recover_a_matrix_of_their_rank(m, n, r, seed, start, s):
    r = min(r, m, n)
    D = of_rank(m, n, r, seed)
    A, B, error = lowrank.STARTS[start](D, r, s)
    assert A.shape == (r, n)
    assert B.shape == (m, r)
    scale = 1.0 if start == "olora" else s  # OLoRA's factors are those of W whatever s is
    torch.testing.assert_close(scale * B @ A, D, rtol=1e-7, atol=1e-7 * D.norm().item())
    if error is not None:
        assert error.floor <= error.residual <= 1e-7 * D.norm().item()


@pytest.mark.parametrize("init", ["pissa", "pissa_exact", "olora"])
def test_factors_of_a_trained_difference_reproduce_the_trained_model(init):
    """A full fine-tuning whose difference has rank 3, put into a LoRA of rank 3 by factorisation alone."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 7)).double()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for i in (0, 2):
            tuned[i].weight += of_rank(*tuned[i].weight.shape, 3, i)
    model = peftlab.wrap(copy.deepcopy(base), "lora", targets=["0", "2"], r=3, alpha=3)
    for i in (0, 2):
        A, B, _ = lowrank.STARTS[init]((tuned[i].weight - base[i].weight).detach(), 3, 1.0)
        with torch.no_grad():
            own(model[i])["A"].copy_(A)
            own(model[i])["B"].copy_(B)
    x = torch.randn(5, 10, dtype=torch.float64)
    torch.testing.assert_close(model(x), tuned(x), rtol=1e-9, atol=1e-9)


# ---- the truncated decompositions


@pytest.mark.parametrize("kind", SPECTRA)
@few
@given(m=sides, n=sides, r=st.integers(1, 40), seed=seeds)
def test_exact_svd_is_the_optimum(kind, m, n, r, seed):
    r = min(r, m, n)
    W = with_spectrum(m, n, spectrum(kind, min(m, n)), seed)
    U, S, Vh, error = lowrank.exact_svd(W, r)
    best = optimum(W, r)
    assert (W - (U * S) @ Vh).norm().item() == pytest.approx(best, abs=1e-12)
    assert error.residual == pytest.approx(best, abs=1e-12)
    assert error.floor == pytest.approx(best, abs=1e-12)


def check_randomised(W, r, **options):
    """Shapes, order, orthonormality, the stated error, the bound; returns the error and the optimum."""
    U, S, Vh, error = lowrank.randomized_svd(W, r, **options)
    assert U.shape == (W.shape[0], r)
    assert S.shape == (r,)
    assert Vh.shape == (r, W.shape[1])
    assert (S.diff() <= 0).all()
    assert (S >= 0).all()
    # Exact arithmetic on what came back, so that rounding of the check is not in the way.
    U, S, Vh, exact = U.double(), S.double(), Vh.double(), W.double()
    eps = 1e-5 if W.dtype != torch.float64 else 1e-11
    eye = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye, rtol=0, atol=10 * eps)
    torch.testing.assert_close(Vh @ Vh.T, eye, rtol=0, atol=10 * eps)
    slack = eps * exact.norm().item()
    truth = (exact - (U * S) @ Vh).norm().item()
    best = optimum(exact, r)
    assert error.residual == pytest.approx(truth, abs=slack), "the stated error is not the error"
    assert best <= error.residual + slack
    # squared norms are subtracted to reach the floor, so that its rounding is that of their square root where it is near zero
    assert error.floor**2 <= best**2 + 4 * eps * exact.norm().item() ** 2, "the floor is above the optimum"
    assert error.floor <= error.residual
    return error, best


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@few
@given(m=st.integers(2, 60), n=st.integers(2, 60), r=st.integers(1, 20), seed=seeds, iterations=st.integers(0, 4), oversample=st.integers(0, 10))
def test_randomised_error_is_true_and_its_bound_holds(kind, dtype, m, n, r, seed, iterations, oversample):
    r = min(r, m, n)
    check_randomised(with_spectrum(m, n, spectrum(kind, min(m, n)), seed, dtype), r, iterations=iterations, oversample=oversample)


@pytest.mark.parametrize("shape", [(120, 90), (64, 160)], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_randomised_is_nearly_the_optimum(kind, shape):
    """At the settings that pissa uses; on a flat spectrum every r directions are as good, and what is left is all of the tail."""
    W = with_spectrum(*shape, spectrum(kind, min(shape)))
    error, best = check_randomised(W, 8)
    assert error.residual <= best * (1 + 1e-3) + 1e-12
    if kind in ("decaying", "power", "flat"):
        assert best <= 1.05 * error.residual
    if kind == "decaying":
        assert error.residual - error.floor <= 1e-3 * error.residual, "the floor says little where the decomposition has converged"


def test_randomised_of_noise():
    """A Gaussian matrix, nearly flat: the bound is not vacuous."""
    W = torch.randn(150, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error, best = check_randomised(W, 8)
    assert error.residual <= 1.01 * best
    assert error.floor >= 0.8 * best


DEGENERATE = {
    "zero": torch.zeros(6, 9),
    "identity": torch.eye(5),
    "ones": torch.ones(7, 4),
    "rank1": torch.diag(torch.tensor([3.0, 0, 0, 0])),
}


@pytest.mark.parametrize("W", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_matrices(W):
    for r in (1, min(W.shape)):
        error, _ = check_randomised(W, r)
        assert math.isfinite(error.residual)
        assert math.isfinite(error.floor)


@pytest.mark.parametrize("kind", ["noise", "power"])
def test_randomised_is_as_accurate_as_sixteen_rounds_of_subspace_iteration(kind):
    """HF peft's pissa_niter_16 is torch.svd_lowrank with as many columns as the rank."""
    n, r = 600, 16
    g = torch.Generator().manual_seed(0)
    W = torch.randn(n, n, generator=g) if kind == "noise" else with_spectrum(n, n, 1 / torch.arange(1, n + 1).double().sqrt(), dtype=torch.float32)
    best = optimum(W, r)
    theirs = []
    for seed in range(5):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(W, r, niter=16)
        theirs.append((W.double() - ((U * S) @ V.T).double()).norm().item() / best - 1)
    ours = check_randomised(W, r)[0].residual / best - 1
    assert ours <= min(theirs)


@pytest.mark.parametrize("power", [-60, -18, 0, 18, 60])
@pytest.mark.parametrize("svd", [lowrank.randomized_svd, lowrank.exact_svd], ids=["randomised", "exact"])
def test_huge_and_tiny_entries_are_decomposed_as_well(svd, power):
    """Squares of 1e-60 and 1e60 exist in no float32, nor those of 1e18 and 1e-18 in sums."""
    W = with_spectrum(40, 30, spectrum("power", 30)).to(torch.float32 if abs(power) < 30 else torch.float64)
    plain, scaled = svd(W, 4), svd(W * 10.0**power, 4)
    for now, before in zip(scaled[:3], plain[:3]):
        assert torch.isfinite(now).all()
        assert now.dtype == before.dtype
    torch.testing.assert_close(scaled.S.double() / 10.0**power, plain.S.double(), rtol=1e-5, atol=1e-12)
    assert scaled.error.residual / 10.0**power == pytest.approx(plain.error.residual, rel=1e-5)
    assert 0 < scaled.error.floor / 10.0**power <= optimum(W, 4) * (1 + 1e-6)
    product = (scaled.U.double() * scaled.S.double()) @ scaled.Vh.double()
    assert (W.double() - product / 10.0**power).norm().item() == pytest.approx(plain.error.residual, rel=1e-5)


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_start_of_a_huge_or_tiny_weight(size):
    model = nn.Sequential(nn.Linear(40, 30, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(with_spectrum(30, 40, spectrum("power", 30)) * size)
    W = model[0].weight.detach().double()
    peftlab.wrap(model, "pissa", targets="0", r=4, alpha=4)
    t = own(model[0])
    left = (W - outer_sum(t["B0"], t["A0"]).double()).norm().item()
    assert left == pytest.approx(optimum(W, 4), rel=1e-3)
    assert model[0].peftlab.default.start_error == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("init", ["pissa", "pissa_exact"])
def test_a_weight_that_is_not_finite_is_refused(init, bad):
    model = nn.Sequential(nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight[2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        peftlab.wrap(model, "lora", init=init, targets="0", r=2)
    assert type(model[0]) is nn.Linear


def test_columns_stay_orthonormal_where_the_krylov_space_ends_early():
    for W in (*DEGENERATE.values(), of_rank(30, 20, 3, 0).float(), torch.diag(torch.tensor([1.0, 1e-20, 0, 0, 0]))):
        Q, P = lowrank.krylov(W, 2)
        assert Q.shape[1] <= min(W.shape)
        torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(P, W.T @ Q, rtol=0, atol=1e-5 * float(W.norm()))


def test_nothing_is_drawn_from_the_global_generator():
    W = with_spectrum(50, 30, spectrum("power", 30))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = lowrank.randomized_svd(W, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = lowrank.randomized_svd(W, 5)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))
    assert first.error == second.error
    assert not torch.equal(lowrank.randomized_svd(W, 5, seed=1, iterations=0).U, lowrank.randomized_svd(W, 5, iterations=0).U)


# ---- starts taken from the weight


LAYERS = {
    "linear": (lambda: nn.Linear(14, 10), lambda: torch.randn(3, 14)),
    "conv": (lambda: nn.Conv2d(4, 10, 3), lambda: torch.randn(2, 4, 5, 5)),
    "conv-groups": (lambda: nn.Conv2d(4, 10, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(20, 12), lambda: torch.tensor([[0, 4, 19], [4, 4, 1]])),
}
STARTS = ["pissa", "pissa_exact", "olora"]


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def canonical(layer):
    return layer.weight.detach().T if isinstance(layer, nn.Embedding) else layer.weight.detach().flatten(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("init", STARTS)
def test_start_is_the_base(init, kind, dtype):
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0]().to(dtype), LAYERS[kind][1]()
    x = x.to(dtype) if x.is_floating_point() else x
    model = Holder(copy.deepcopy(layer))
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    peftlab.wrap(model, "lora", targets="layer", init=init, r=4, alpha=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items()), "the base was edited"
    found = own(model.layer)
    assert found["A"].abs().sum() > 0
    assert found["B"].abs().sum() > 0
    assert torch.equal(found["A"], found["A0"])
    assert torch.equal(found["B"], found["B0"])
    torch.testing.assert_close(model(x), layer(x), rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)
    peftlab.merge(model)
    torch.testing.assert_close(model.layer.weight, layer.weight, rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)
    peftlab.unwrap(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("init", ["pissa", "pissa_exact"])
def test_principal_start_reaches_the_optimum(init, kind):
    """s B0 A0 is the best approximation of its rank (Eckart-Young), whatever alpha is, and the error that is reported is true."""
    torch.manual_seed(0)
    layer = LAYERS[kind][0]().double()
    model = Holder(copy.deepcopy(layer))
    peftlab.wrap(model, "lora", targets="layer", init=init, r=4, alpha=6)
    found, W = own(model.layer), canonical(layer)
    left = (W - 6 / 4 * outer_sum(found["B0"], found["A0"])).norm().item()
    best = optimum(W, 4)
    # these matrices are so small that the oversampled subspace is (nearly) everything
    assert left == pytest.approx(best, rel=1e-6)
    adapter = model.layer.peftlab.default
    assert adapter.start_error == pytest.approx(left, rel=1e-6)
    assert adapter.start_floor <= best * (1 + 1e-9)
    balance = found["B0"].norm(dim=0) - found["A0"].norm(dim=1)
    assert balance.abs().max() < 1e-6, "singular values are not shared equally"


@pytest.mark.parametrize("kind", LAYERS)
def test_olora_start_is_orthonormal(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind][0]().double()
    model = Holder(copy.deepcopy(layer))
    peftlab.wrap(model, "olora", targets="layer", r=4)
    B, A, W = own(model.layer)["B0"], own(model.layer)["A0"], canonical(layer)
    torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(outer_sum(B, A), Q[:, :4] @ R[:4], rtol=1e-6, atol=1e-6)


def test_start_is_the_same_in_every_run():
    """HF's pissa_niter draws from the global generator, so that its saved factors no longer fit the base they were taken from."""
    values = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model = Holder(nn.Linear(90, 60))
        torch.manual_seed(seed)
        peftlab.wrap(model, "pissa", targets="layer", r=4)
        values.append({k: v.clone() for k, v in own(model.layer).items()})
    assert all(torch.equal(values[0][k], values[1][k]) for k in values[0])


@few
@given(m=st.integers(2, 20), n=st.integers(2, 20), half=st.integers(1, 5), seed=seeds)
def test_orthogonal_start(m, n, half, seed):
    """Both factors are filled and their product is zero, so that both have a gradient from the first step."""
    half = min(half, m // 2, n // 2)
    model = Holder(nn.Linear(n, m))
    peftlab.wrap(model, "lora", targets="layer", init="orthogonal", r=2 * half, seed=seed)
    t = own(model.layer)
    A, B = t["A"].detach(), t["B"].detach()
    assert A.norm() > 0
    assert B.norm() > 0
    assert (B @ A).abs().max() < 1e-5 * A.norm() * B.norm()
    y = model(torch.randn(4, n)).square().sum()
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(y, [t["A"], t["B"]]))


@pytest.mark.parametrize("batches", [1, 4])
def test_eva_start_is_the_principal_directions_of_the_inputs(batches):
    """Rows of A are the leading right singular vectors of the layer's mean-centred inputs over all batches, and B = 0."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(9, 12), "layer": nn.Linear(12, 7)})
    model.forward = lambda x: model["layer"](model["first"](x).tanh())
    data = torch.randn(60, 5, 9) * torch.linspace(0.1, 3, 9) + 1
    inputs = model["first"](data).tanh().detach().double().flatten(0, 1)
    peftlab.wrap(model, "eva", targets="layer", r=3, data=list(data.chunk(batches)))
    t = own(model["layer"])
    _, _, Vh = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
    A = t["A"].detach().double()
    torch.testing.assert_close(A.T @ A, Vh[:3].T @ Vh[:3], rtol=0, atol=1e-4)
    assert (t["B"] == 0).all()


# ---- norms and streams


@few
@given(m=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(1, 5), seed=seeds, s=st.floats(-3, 3))
def test_row_norms(m, n, r, seed, s):
    g = torch.Generator().manual_seed(seed)
    W, A, B = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((m, n), (r, n), (m, r)))
    torch.testing.assert_close(lowrank.row_norms(W, A, B, s), (W + s * outer_sum(B, A)).norm(dim=1), rtol=1e-9, atol=1e-7)


@few
@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=6), n=st.integers(2, 12), seed=seeds)
def test_streamed_components_are_those_of_all_rows(cuts, n, seed):
    """While nothing is cut off, the running decomposition is exactly that of the mean-centred rows seen so far."""
    X = torch.randn(sum(cuts), n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3
    seen = None
    for part in X.split(cuts):
        seen = lowrank.observe_rows(seen, part, n)
    assert seen.count == len(X)
    torch.testing.assert_close(seen.mean, X.mean(0))
    centred = X - X.mean(0)
    V, S = seen.Vh, seen.S
    torch.testing.assert_close((V.T * S.square()) @ V, centred.T @ centred, rtol=1e-8, atol=1e-8 * len(X))
