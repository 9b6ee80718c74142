"""Starts that are computed from data: what reaches the methods, what they make of it, and that nothing else changes."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracles import outer_sum, own
from torch import nn

import peftlab
from peftlab.core.base import Base
from peftlab.core.method import Method
from peftlab.parts import data_init as fromdata
from peftlab.parts import lowrank

R, ALPHA = 3, 6
S = ALPHA / R


class Net(nn.Module):
    """`twice` is used two times in one forward, `idle` never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.last = nn.Linear(9, 12), nn.Linear(12, 12), nn.Linear(12, 8)
        self.idle = nn.Linear(5, 5)
        self.norm, self.drop = nn.BatchNorm1d(12), nn.Dropout(0.5)

    def forward(self, x):
        h = self.drop(self.norm(self.first(x).tanh()))
        h = self.twice(torch.tanh(self.twice(h)))
        return self.last(h)


def net() -> Net:
    return Net().double()


def batches(n: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(7, 9, generator=g, dtype=torch.float64), torch.randint(0, 8, (7,), generator=g)) for _ in range(n)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def inputs_of(path: str) -> torch.Tensor:
    """Every row that the layer is called with."""
    model, seen = net().eval(), []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for x, _ in batches():
        model(x)
    handle.remove()
    return torch.cat(seen)


def gradients_of(path: str) -> list[torch.Tensor]:
    """Of every batch, by plain autograd."""
    model = net().eval()
    W = model.get_submodule(path).weight
    return [torch.autograd.grad(loss(model, b), W)[0] for b in batches()]


def wrapped(init: str, targets=("first", "twice", "last"), **options):
    return peftlab.wrap(net(), "lora", targets=list(targets), r=R, alpha=ALPHA, init=init, data=batches(), loss=loss, **options)


# ---------------------------------------------------------------- what the starts are


@pytest.mark.parametrize("init", ["corda", "corda_kpm", "lora_ga", "eva"])
def test_the_start_is_the_base(init, tmp_path):
    model, base = wrapped(init).eval(), net().eval()
    x = batches()[0][0]
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.state_dict().items()), "the base was edited"
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype) / 10)
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = net().eval()
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), model(x)), "a file needs no data to be loaded"
    assert not torch.equal(fresh(x), base(x))


@pytest.mark.parametrize("path", ["first", "twice", "last"])
def test_corda_is_the_best_factor_pair_in_the_norm_of_the_data(path):
    """|(W - s B0 A0) C|_F is the Eckart-Young optimum of W C, where C is the damped covariance; kpm takes what is least."""
    X, W = inputs_of(path), net().get_submodule(path).weight.detach()
    C = X.T @ X
    C = C / C.diagonal().mean() + 0.01 * torch.eye(len(C), dtype=C.dtype)
    values = torch.linalg.svdvals(W @ C)
    for init, kept in (("corda", values[:R]), ("corda_kpm", values[-R:])):
        t = own(wrapped(init).get_submodule(path))
        part = S * outer_sum(t["B0"], t["A0"]) @ C
        torch.testing.assert_close(torch.linalg.svdvals(part)[:R], kept, rtol=1e-8, atol=1e-10)
        assert torch.linalg.matrix_norm(W @ C - part).item() == pytest.approx((values.square().sum() - kept.square().sum()).sqrt().item(), rel=1e-8)
        assert torch.equal(t["A"], t["A0"])
        assert torch.equal(t["B"], t["B0"])


def test_corda_with_white_inputs_is_pissa():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    W, data = model[0].weight.detach(), [torch.eye(6, dtype=torch.float64) * 3]
    peftlab.wrap(model, "corda", targets="0", r=2, alpha=2, data=data)
    t = own(model[0])
    U, s, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(outer_sum(t["B0"], t["A0"]), (U[:, :2] * s[:2]) @ Vh[:2], rtol=1e-9, atol=1e-9)


def test_corda_of_degenerate_inputs():
    """One row: the covariance has rank 1, the damping makes it invertible. Zeros are refused by name."""
    model = nn.Sequential(nn.Linear(6, 5))
    peftlab.wrap(model, "corda", targets="0", r=2, data=[torch.randn(1, 6)])
    assert all(torch.isfinite(t).all() for t in own(model[0]).values())
    plain = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError, match="'0' inputs that are zero"):
        peftlab.wrap(plain, "corda", targets="0", r=2, data=[torch.zeros(3, 6)])
    assert type(plain[0]) is nn.Linear


@pytest.mark.parametrize("path", ["first", "twice", "last"])
def test_lora_ga_takes_its_directions_from_the_mean_gradient(path):
    """A spans the r leading right singular directions, B the next r left ones, both of length m^1/4 / sqrt(16)."""
    G = torch.stack(gradients_of(path)).mean(0)
    U, _, Vh = torch.linalg.svd(G)
    t = own(wrapped("lora_ga").get_submodule(path))
    c = G.shape[0] ** 0.25 / 4
    A, B = t["A0"].detach() / c, t["B0"].detach() / c
    torch.testing.assert_close(A.T @ A, Vh[:R].T @ Vh[:R], rtol=0, atol=1e-6)
    torch.testing.assert_close(B @ B.T, U[:, R : 2 * R] @ U[:, R : 2 * R].T, rtol=0, atol=1e-6)


def test_lora_ga_follows_the_full_gradient_at_the_first_step():
    """What LoRA-GA is for: the first change of W by gradient descent on A and B is closer to -G than that of the plain start."""
    G = torch.stack(gradients_of("last")).mean(0)
    cosine = {}
    for init in ("lora_ga", "kaiming"):
        t = own(wrapped(init, targets=["last"]).last)
        change = t["B"].detach() @ (t["B"].detach().T @ G) + (G @ t["A"].detach().T) @ t["A"].detach()
        cosine[init] = F.cosine_similarity(change.flatten(), G.flatten(), dim=0).item()
    assert cosine["lora_ga"] > 1.2 * cosine["kaiming"]


@pytest.mark.parametrize("init", ["corda", "lora_ga", "eva"])
def test_one_big_batch_or_many_small_ones(init):
    """corda and eva see rows, so the cut does not matter; lora_ga averages batches of one size."""
    x, y = (torch.cat(t) for t in zip(*batches(), strict=True))
    many = wrapped(init, targets=["first"])
    one = peftlab.wrap(net(), "lora", targets=["first"], r=R, alpha=ALPHA, init=init, data=[(x, y)], loss=loss)
    for k, t in own(many.first).items():
        other = own(one.first)[k]
        torch.testing.assert_close(t.T @ t if "A" in k else t @ t.T, other.T @ other if "A" in k else other @ other.T, rtol=1e-6, atol=1e-8)


def test_starts_may_differ_by_site():
    model = wrapped("eva", overrides={"last": dict(init="lora_ga"), "twice": dict(init="kaiming")})
    assert torch.equal(own(model.last)["A"], own(wrapped("lora_ga").last)["A"])
    assert torch.equal(own(model.first)["A"], own(wrapped("eva").first)["A"])
    assert model.twice.peftlab.default.seen is None


def test_a_start_above_another_adapter_takes_what_lies_below():
    model = net()
    peftlab.wrap(model, "full", targets="last.weight", name="below")
    with torch.no_grad():
        next(iter(own(model.last, "below").values())).mul_(2)
    base = copy.deepcopy(model).eval()
    peftlab.wrap(model, "corda", targets="last", r=8, alpha=8, data=batches(), loss=loss, name="above")
    t = own(model.last, "above")
    torch.testing.assert_close(outer_sum(t["B0"], t["A0"]), 2 * net().last.weight.detach(), rtol=1e-8, atol=1e-8)
    x = batches()[0][0]
    torch.testing.assert_close(model.eval()(x), base(x), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- what reaches a method


class Watcher(Method):
    """Notes what it is shown."""

    additive = True
    needs_data = "gradients"

    def __init__(self, base: Base, *, kind: str = "gradients"):
        super().__init__(base)
        self.needs_data = kind
        self.D = nn.Parameter(torch.zeros(base.n_out, base.n_in))

    def weight(self, W):
        return W + self.D

    def observe(self, base, value):
        self.seen = [*(self.seen or []), value.clone()]
        ALIVE.append(weakref.ref(value))
        MOST.append(sum(r() is not None for r in ALIVE))

    def pool(self, states):
        self.seen = sum(states, [])

    def calibrated(self, base):
        self.needs_data = None


ALIVE: list = []
MOST: list = []


def test_gradients_are_those_of_the_batches_and_one_exists_at_a_time():
    ALIVE.clear()
    MOST.clear()
    model = peftlab.wrap(net(), Watcher, targets=["first", "twice", "last"], data=batches(), loss=loss)
    for path in ("first", "twice", "last"):
        for seen, true in zip(model.get_submodule(path).peftlab.default.seen, gradients_of(path), strict=True):
            torch.testing.assert_close(seen, true, rtol=1e-12, atol=1e-14)
    assert max(MOST) == 1


def test_calibration_of_gradients_copies_no_weight():
    """Memory: nothing of a weight's size is kept between forward and backward but the weight itself."""
    big = nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(4)))
    weights, kept = {m.weight.data_ptr() for m in big}, []

    def loss_of(model, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.data_ptr(), t.numel())) or t, lambda t: t):
            return model(x).square().mean()

    peftlab.wrap(big, Watcher, targets="*", data=[torch.randn(2, 300)], loss=loss_of)
    assert {p for p, n in kept if n == 300 * 300} <= weights
    assert len(kept) >= 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forwards_show_the_same_gradients_or_are_refused(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            h = torch.utils.checkpoint.checkpoint(lambda v: self.norm(self.first(v).tanh()), x.requires_grad_(), use_reentrant=reentrant)
            h = torch.utils.checkpoint.checkpoint(lambda v: self.twice(torch.tanh(self.twice(v))), h, use_reentrant=reentrant)
            return self.last(h)

    model = Checkpointed().double()
    if reentrant:  # its backward within the backward cannot be asked for the gradients of some tensors alone
        with pytest.raises(ValueError, match="reached 2 of 3 sites, 'first'"):
            peftlab.wrap(model, Watcher, targets=["first", "twice", "last"], data=batches(), loss=loss)
        return
    peftlab.wrap(model, Watcher, targets=["first", "twice", "last"], data=batches(), loss=loss)
    for path in ("first", "twice", "last"):
        total = torch.stack(model.get_submodule(path).peftlab.default.seen).sum(0)
        torch.testing.assert_close(total, torch.stack(gradients_of(path)).sum(0), rtol=1e-10, atol=1e-12)


def test_progress_is_told():
    calls: list = []
    wrapped("lora_ga", targets=["first", "last"], progress=lambda *a: calls.append(a))
    built, read, made = calls[:2], calls[2:6], calls[6:]
    assert built == [(1, 2, "first"), (2, 2, "last")]
    assert read == [(i, 4, "data") for i in range(1, 5)]
    assert made == [(1, 2, "first"), (2, 2, "last")]
    calls.clear()
    peftlab.wrap(net(), "eva", targets=["first"], r=2, data=iter(batches()), loss=loss, progress=lambda *a: calls.append(a))
    assert [c for c in calls if c[2] == "data"] == [(i, None, "data") for i in range(1, 5)]


# ---------------------------------------------------------------- nothing else changes; bad calls


def snapshot(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {k: (p.requires_grad, p.grad) for k, p in model.named_parameters()},
        {k: (type(m), m.training, len(m._forward_pre_hooks)) for k, m in model.named_modules()},
    )


def assert_unchanged(model, before):
    now = snapshot(model)
    assert all(torch.equal(now[0][k], v) for k, v in before[0].items())
    assert now[0].keys() == before[0].keys()
    assert now[1:] == before[1:]


class Stop(Exception):
    pass


def broken():
    yield batches()[0]
    raise Stop


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
@pytest.mark.parametrize("data", [broken, lambda: [], lambda: [(torch.randn(2, 3), 0)]], ids=["raises", "empty", "wrong"])
def test_a_failed_pass_leaves_the_model_alone(init, data):
    model = net()
    before = snapshot(model)
    with pytest.raises((Stop, ValueError, RuntimeError)):
        peftlab.wrap(model, init, targets=["first", "last"], r=2, data=data(), loss=loss)
    assert_unchanged(model, before)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_a_site_without_data_is_named(init):
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"reached 1 of 2 sites, 'idle'"):
        peftlab.wrap(model, init, targets=["first", "idle"], r=2, data=batches(), loss=loss)
    assert_unchanged(model, before)


def test_lora_ga_needs_twice_the_rank():
    with pytest.raises(ValueError, match=r"r=5 at 'last'.*2 r directions.*8"):
        peftlab.wrap(net(), "lora_ga", targets="last", r=5, data=batches(), loss=loss)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_data_must_be_given(init):
    with pytest.raises(ValueError, match="give data="):
        peftlab.wrap(net(), init, targets="last", r=2)


def test_batch_statistics_and_the_mode_stay():
    model = net().train()
    before = snapshot(model)
    wrapped_model = peftlab.wrap(model, "lora_ga", targets="last", r=2, data=batches(), loss=loss)
    peftlab.unwrap(wrapped_model)
    assert_unchanged(model, before)


# ---------------------------------------------------------------- what several processes keep


@pytest.mark.parametrize("cuts", [[10, 30], [1, 39], [13, 13, 14]])
def test_pooled_streams_are_the_stream_of_all_rows(cuts):
    X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    together = fromdata.pool_states([None, *(lowrank.observe_rows(None, part, 6) for part in X.split(cuts))])
    one = lowrank.observe_rows(None, X, 6)
    assert together.count == 40
    torch.testing.assert_close(together.mean, one.mean)
    torch.testing.assert_close(together.S, one.S, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((together.Vh.T * together.S) @ together.Vh, (one.Vh.T * one.S) @ one.Vh, rtol=1e-9, atol=1e-9)


def test_pooled_nothing_is_nothing():
    assert fromdata.pool_states([None, None]) is None
