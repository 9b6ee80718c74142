"""`schedule` and `param_groups`: what happens between optimizer steps, compared with the same thing written out by hand.

Row numbers in the names are those of the list of promised behaviours.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import peftlab
from peftlab.core.adapters import adapter_modules
from peftlab.core.base import Base
from peftlab.core.method import Method
from peftlab.registry import entries

adalora = pytest.mark.skipif("adalora" not in entries(), reason="AdaLoRA is not there")


class Net(nn.Module):
    def __init__(self, depth: int = 2, dim: int = 8, drop: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(11, dim)
        self.layers = nn.ModuleList([nn.Linear(dim, dim) for _ in range(depth)])
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(dim, 4)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(self.drop(x)))
        return self.head(x)


def net(**kw) -> Net:
    torch.manual_seed(0)
    return Net(**kw)


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(i)
    return torch.randint(0, 11, (4, 5), generator=g), torch.randint(0, 4, (4, 5), generator=g)


def loss_of(model: nn.Module, i: int) -> torch.Tensor:
    ids, labels = batch(i)
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """The bare loop, steps first..last."""
    for i in range(first, last + 1):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: t.detach().clone() for k, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


class Drawn(Method):
    """A dense change with a penalty, that notes every step."""

    additive = True

    def __init__(self, base: Base, *, strength: float = 0.1):
        super().__init__(base)
        self.strength, self.seen = strength, []
        self.D = nn.Parameter(torch.randn(base.n_out, base.n_in) * 0.1)
        self.register_buffer("mean", torch.zeros_like(self.D), persistent=False)

    def weight(self, W):
        return W + self.D

    def penalty(self):
        return self.strength * self.D.square().sum()

    def step(self, t, T, lr):
        self.seen.append((t, T, lr))
        self.mean.lerp_(self.D.grad.abs(), 0.1)


def drawn(model: nn.Module) -> list[Drawn]:
    return [m for m in model.modules() if isinstance(m, Drawn)]


class Plain(Method):
    additive = True

    def __init__(self, base: Base):
        super().__init__(base)
        self.D = nn.Parameter(torch.randn(base.n_out, base.n_in) * 0.1)

    def weight(self, W):
        return W + self.D


# ---------------------------------------------------------------- steps and penalties


def test_promise_27_steps_are_counted_and_given_the_learning_rate():
    model = peftlab.wrap(net(), Drawn, targets="layers.*")
    a, b = drawn(model)
    optimizer = torch.optim.SGD([{"params": [a.D], "lr": 0.1}, {"params": [b.D], "lr": 0.02}])
    schedule = peftlab.schedule(model, optimizer, total_steps=3)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    assert (schedule.t, schedule.T, a.scheduled, b.scheduled) == (0, 3, True, True)
    for i in range(3):
        run(model, optimizer, i, i)
        warm.step()
    assert [(t, T) for t, T, _ in a.seen] == [(1, 3), (2, 3), (3, 3)]
    assert [lr for *_, lr in a.seen] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert [lr for *_, lr in b.seen] == pytest.approx([0.02, 0.01, 0.02 / 3])
    run(model, optimizer, 3, 4)  # beyond the end, every step is the last one again
    assert [t for t, _, _ in a.seen] == [1, 2, 3, 3, 3]
    assert schedule.t == 3
    assert "step 3 of 3" in repr(schedule)
    assert "default" in repr(schedule)


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """The bare loop with the gradient of the penalty written out."""
    for i in range(first, last + 1):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        for m in drawn(model):
            m.D.grad += 2 * m.strength * m.D.detach()
        optimizer.step()


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.01),
    lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_promise_27_penalties_are_the_gradient_that_is_written_out(make):
    model = peftlab.wrap(net(), Drawn, targets="layers.*", seed=1)
    other = copy.deepcopy(model)
    optimizer = make(trained(model))
    peftlab.schedule(model, optimizer, total_steps=10)
    run(model, optimizer, 1, 5)
    by_hand(other, make(trained(other)), 1, 5)
    for m, n in zip(drawn(model), drawn(other), strict=True):
        torch.testing.assert_close(m.D, n.D, rtol=1e-6, atol=1e-7)
    plain = peftlab.wrap(net(), Plain, targets="layers.*")
    start = drawn(peftlab.wrap(net(), Drawn, targets="layers.*", seed=1))
    changes = [m for m in plain.modules() if isinstance(m, Plain)]
    for m, n in zip(changes, start, strict=True):
        m.D.data.copy_(n.D)
    run(plain, make(trained(plain)), 1, 5)
    assert not any(torch.allclose(m.D, n.D) for m, n in zip(drawn(model), changes, strict=True))


def test_promise_27_gradient_accumulation_is_one_step_and_one_penalty():
    model = peftlab.wrap(net(), Drawn, targets="layers.0")
    (m,) = drawn(model)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    peftlab.schedule(model, optimizer, total_steps=10)
    D = m.D.detach().clone()
    for i in range(4):
        (loss_of(model, i) / 4).backward()
    grad = m.D.grad.clone()
    optimizer.step()
    assert [t for t, _, _ in m.seen] == [1]
    torch.testing.assert_close(m.D.detach(), D - 0.1 * (grad + 0.2 * D))


def test_promise_27_a_penalty_alone_and_where_the_loss_gives_no_gradient():
    class Decayed(Plain):
        def penalty(self):
            return 0.1 * self.D.square().sum()

    model = peftlab.wrap(net(), Decayed, targets="layers.0")
    m = model.layers[0].peftlab.default
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    peftlab.schedule(model, optimizer, total_steps=10)
    D = m.D.detach().clone()
    optimizer.step()
    torch.testing.assert_close(m.D.detach(), D * (1 - 0.02))


@pytest.mark.parametrize("keyword", [True, False])
def test_promise_27_closures_have_the_penalty_in_value_and_gradient(keyword):
    model = peftlab.wrap(net().double(), Drawn, targets="layers.0", strength=0.5)
    plain = peftlab.wrap(net().double(), Plain, targets="layers.0")
    (m,), (n,) = drawn(model), [m for m in plain.modules() if isinstance(m, Plain)]
    n.D.data.copy_(m.D)
    seen = []

    def make(model, penalty):
        optimizer = torch.optim.LBFGS(trained(model), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            if penalty:
                loss = loss + 0.5 * n.D.square().sum()
            loss.backward()
            seen.append(loss.item())
            return loss

        return optimizer, closure

    optimizer, closure = make(model, False)
    schedule = peftlab.schedule(model, optimizer, total_steps=9)
    other, by_hand = make(plain, True)
    for k in range(3):
        value = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        want = other.step(by_hand)
        assert value.item() == pytest.approx(want.item(), rel=1e-12)
        torch.testing.assert_close(m.D, n.D, rtol=1e-9, atol=1e-12)
        assert schedule.t == k + 1
        assert len(m.seen) == k + 1
    assert len(seen) > 2 * 6


class Scaler(torch.amp.GradScaler):
    """A scaler on the CPU with an overflow wherever the test wants it."""

    overflow = False

    def unscale_(self, optimizer):
        super().unscale_(optimizer)
        if self.overflow:
            for t in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                t.fill_(1.0)

    def _check_inf_per_device(self, optimizer):
        super()._check_inf_per_device(optimizer)
        if self.overflow:
            for t in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                t.fill_(1.0)


@pytest.mark.parametrize("fused", [True, False])
def test_promise_27_a_grad_scaler_skips_and_scales(fused):
    """Skipped steps do not count, and a penalty that is added to scaled gradients is scaled."""
    model = peftlab.wrap(net(), Drawn, targets="layers.*")
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained(model), lr=0.01, fused=fused, eps=1e-4)
    reference = torch.optim.AdamW(trained(other), lr=0.01, fused=fused, eps=1e-4)
    schedule = peftlab.schedule(model, optimizer, total_steps=10)
    scaler = Scaler("cpu", init_scale=1024.0)
    for i in range(1, 6):
        scaler.overflow = i == 3
        before = tensors(model)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, i)).backward()
        scaler.step(optimizer)
        scaler.update()
        if i == 3:
            assert_equal({k: v for k, v in tensors(model).items()}, before)
        else:
            by_hand(other, reference, i, i)
    assert schedule.t == 4
    assert [t for t, _, _ in drawn(model)[0].seen] == [1, 2, 3, 4]
    for m, n in zip(drawn(model), drawn(other), strict=True):
        torch.testing.assert_close(m.D, n.D, rtol=1e-4, atol=1e-5)


def test_promise_27_only_active_unmerged_trainable_adapters_of_this_optimizer_are_driven():
    model = net()
    for name in "abcde":
        peftlab.wrap(model, Drawn, targets="layers.*", name=name)
    of = {n: [m for name, _, _, m in adapter_modules(model) if name == n] for n in "abcde"}
    peftlab.freeze(model, "b")
    peftlab.activate(model, ["a", "b", "c", "e"])
    held = [p for k, p in model.named_parameters() if k.split(".")[-2] in "abcd" and p.requires_grad]
    optimizer = torch.optim.SGD(held, lr=0.1)
    peftlab.schedule(model, optimizer, total_steps=10)
    before = tensors(model)
    run(model, optimizer, 1, 2)
    after = tensors(model)
    assert {n: [len(m.seen) for m in of[n]] for n in "abcde"} == {"a": [2, 2], "b": [0, 0], "c": [2, 2], "d": [0, 0], "e": [0, 0]}
    for k in before:
        name = k.split(".")[-2]
        assert torch.equal(before[k], after[k]) == (name not in ("a", "c")), k
    peftlab.merge(model, "a")
    peftlab.activate(model, ["a", "b", "d"])
    run(model, optimizer, 3, 3)
    assert {n: len(of[n][0].seen) for n in "abcde"} == {"a": 2, "b": 0, "c": 2, "d": 1, "e": 0}
    assert not of["e"][0].scheduled
    peftlab.freeze(model, "c")  # half of d is frozen: the other half still trains, and both are driven
    of["d"][0].D.requires_grad_(False)
    of["d"][0].D.grad = torch.zeros_like(of["d"][0].D)
    peftlab.activate(model, ["c", "d"])
    loss_of(model, 4).backward()
    optimizer.step()
    assert {n: [len(m.seen) for m in of[n]] for n in "cd"} == {"c": [2, 2], "d": [2, 2]}


def test_promise_27_two_schedules_drive_an_adapter_each():
    model = net()
    peftlab.wrap(model, Drawn, targets="layers.*", name="a")
    peftlab.wrap(model, Drawn, targets="layers.*", name="b")
    one, two = (torch.optim.SGD([p for k, p in model.named_parameters() if f".{n}." in k], lr=0.1) for n in "ab")
    first, second = peftlab.schedule(model, one, total_steps=5), peftlab.schedule(model, two, total_steps=7)
    loss_of(model, 0).backward()
    one.step(), two.step(), two.step()
    assert (first.t, second.t) == (1, 2)
    assert [len(m.seen) for m in drawn(model)] == [1, 2, 1, 2]
    assert drawn(model)[1].seen[0][:2] == (1, 7)


def test_promise_27_remove_stops_it():
    model = peftlab.wrap(net(), Drawn, targets="layers.*")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    schedule = peftlab.schedule(model, optimizer, total_steps=5)
    with pytest.raises(ValueError, match="has a schedule already"):
        peftlab.schedule(model, optimizer, total_steps=5)
    run(model, optimizer, 1, 1)
    schedule.remove()
    run(model, optimizer, 2, 3)
    assert schedule.t == 1
    assert [len(m.seen) for m in drawn(model)] == [1, 1]
    assert not any(m.scheduled for m in drawn(model))
    peftlab.schedule(model, optimizer, total_steps=5)


def test_schedule_without_anything_to_do_does_nothing():
    for method in (None, "lora"):
        model = net()
        if method:
            peftlab.wrap(model, method, r=2)
        other = copy.deepcopy(model)
        optimizer, reference = (torch.optim.AdamW(trained(m), lr=0.01) for m in (model, other))
        schedule = peftlab.schedule(model, optimizer, total_steps=3)
        run(model, optimizer, 1, 3)
        run(other, reference, 1, 3)
        assert_equal(tensors(model), tensors(other))
        assert schedule.t == 3
        assert schedule.state_dict()["buffers"] == {}
        assert "nothing" in repr(schedule)


def test_schedule_refuses_bad_calls_and_changes_nothing():
    model = peftlab.wrap(net(), Drawn, targets="layers.*")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for bad in (0, -1, 2.0, True, "10", None):
        with pytest.raises(ValueError, match="total_steps"):
            peftlab.schedule(model, optimizer, total_steps=bad)
    with pytest.raises(TypeError, match="optimizer"):
        peftlab.schedule(model, trained(model), total_steps=5)
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"holds none of this model's adapter tensors, 'layers\.0\.peftlab\.default\.D', 'layers\.1"):
        peftlab.schedule(model, head, total_steps=5)
    part = torch.optim.SGD([drawn(model)[0].D], lr=0.1)
    with pytest.raises(ValueError, match=r"'layers\.1\.peftlab\.default' has a penalty on 'D'"):
        peftlab.schedule(model, part, total_steps=5)
    assert not any(m.scheduled for m in drawn(model))
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in (optimizer, head, part))


def test_schedule_looks_into_wrappers_of_models_and_optimizers():
    class Wrapping:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = peftlab.wrap(net(), Drawn, targets="layers.*")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    compiled = torch.compile(model, backend="eager")
    schedule = peftlab.schedule(compiled, Wrapping(optimizer), total_steps=5)
    run(compiled, optimizer, 1, 2)
    assert schedule.t == 2
    assert [len(m.seen) for m in drawn(model)] == [2, 2]


# ---------------------------------------------------------------- resuming


def test_promise_47_state_holds_what_files_do_not():
    model = peftlab.wrap(net(), Drawn, targets="layers.*")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    schedule = peftlab.schedule(model, optimizer, total_steps=9)
    run(model, optimizer, 1, 3)
    state = schedule.state_dict()
    assert (state["t"], state["T"]) == (3, 9)
    assert state["buffers"].keys() == {f"layers.{i}.peftlab.default.mean" for i in range(2)}
    kept = copy.deepcopy(state)
    run(model, optimizer, 4, 5)
    assert_equal(state["buffers"], kept["buffers"])  # copies
    assert not torch.equal(drawn(model)[0].mean, kept["buffers"]["layers.0.peftlab.default.mean"])
    schedule.load_state_dict(state)
    assert schedule.t == 3
    assert torch.equal(drawn(model)[0].mean, kept["buffers"]["layers.0.peftlab.default.mean"])


def test_promise_47_state_of_another_run_is_refused_whole():
    model = peftlab.wrap(net(), Drawn, targets="layers.*")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    schedule = peftlab.schedule(model, optimizer, total_steps=9)
    run(model, optimizer, 1, 3)
    good, before = schedule.state_dict(), tensors(model)
    for bad, match in (
        (good | {"T": 10}, "total_steps=10, this one 9"),
        (good | {"buffers": {}}, r"other adapters: 'layers\.0"),
        (good | {"buffers": {k: b[:2] for k, b in good["buffers"].items()}}, "other adapters"),
        (good | {"flags": {"x": True}}, "other adapters"),
    ):
        with pytest.raises(ValueError, match=match):
            schedule.load_state_dict(bad | {"t": 1})
        assert schedule.t == 3
        assert_equal(tensors(model), before)


def resumable(path, method, options, total, k, make=lambda p: torch.optim.AdamW(p, lr=0.02)):
    """(uninterrupted, resumed at step k) adapter tensors and outputs."""

    def seeds(i=0):
        torch.manual_seed(i), random.seed(i), np.random.seed(i)

    model = peftlab.wrap(net(drop=0.2), method, **options)
    optimizer = make(trained(model))
    schedule = peftlab.schedule(model, optimizer, total_steps=total)
    seeds()
    run(model, optimizer, 1, k)
    peftlab.save(model, path / "adapter.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "rng": torch.get_rng_state()}, path / "rest.pt")
    run(model, optimizer, k + 1, total)

    again = net(drop=0.2)
    peftlab.load(again, path / "adapter.safetensors", trainable=True)
    rest = torch.load(path / "rest.pt", weights_only=True)
    optimizer = make(trained(again))
    optimizer.load_state_dict(rest["optimizer"])
    schedule = peftlab.schedule(again, optimizer, total_steps=total)
    schedule.load_state_dict(rest["schedule"])
    seeds(7)
    torch.set_rng_state(rest["rng"])
    run(again, optimizer, k + 1, total)
    return model, again


RESUMED = [
    ("adalora", dict(r=1, init_r=3, targets="layers.*", delta_t=2, dropout=0.1)),
    ("l1", dict(targets="layers.*.weight", strength=0.5, threshold=0.01)),
    ("full", dict(gradual=True, targets="layers.*")),
    ("full", dict(gradual=True, in_place=True, targets="layers.*")),
    ("lora", dict(r=2, dropout=0.1)),
    ("dora", dict(r=2, targets="layers.*")),
]


@pytest.mark.parametrize("k", [1, 7, 15])
@pytest.mark.parametrize(("method", "options"), [r for r in RESUMED if r[0] in entries()])
def test_promise_47_a_resumed_run_is_bitwise_the_uninterrupted_one(method, options, k, tmp_path):
    model, again = resumable(tmp_path, method, options, total=20, k=k)
    assert_equal(tensors(model), tensors(again))
    assert {k: p.requires_grad for k, p in model.named_parameters()} == {k: p.requires_grad for k, p in again.named_parameters()}


# ---------------------------------------------------------------- AdaLoRA


def kept_entries(model: nn.Module) -> int:
    return sum(int((m.E != 0).sum()) for name, _, site, m in adapter_modules(model) if site is not None and hasattr(m, "E"))


@adalora
@pytest.mark.parametrize("total", [10, 23, 60])
def test_promise_27_adalora_reaches_its_budget_in_the_bare_loop(total):
    model = peftlab.wrap(net(depth=3), "adalora", r=2, init_r=4, targets="layers.*", tinit=0.1, tfinal=0.2, delta_t=3)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    peftlab.schedule(model, optimizer, total_steps=total)
    counts = []
    for i in range(1, total + 1):
        run(model, optimizer, i, i)
        counts.append(kept_entries(model))
    assert counts[0] == 3 * 4
    assert counts[-1] == 3 * 2
    # Between the steps that share out the budget, entries may come back.
    shared_out = [counts[t - 1] for t in range(round(0.1 * total) + 3, total - round(0.2 * total), 3)]
    assert shared_out == sorted(shared_out, reverse=True), counts
    assert shared_out[0] < 12, counts
    assert set(counts[total - round(0.2 * total) - 1 :]) == {6}
    run(model, optimizer, total + 1, total + 5)  # beyond the end the budget stays
    assert kept_entries(model) == 6


@adalora
def test_promise_27_adalora_stays_a_plain_change_without_its_schedule_and_says_so():
    model = peftlab.wrap(net(), "adalora", r=1, init_r=3, targets="layers.*")
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    with pytest.raises(RuntimeError, match=r"AdaLoRA at 'layers\..*without its schedule.*peftlab\.schedule"):
        run(model, optimizer, 1, 25)
    assert kept_entries(model) == 2 * 3
    schedule = peftlab.schedule(model, optimizer, total_steps=10)
    run(model, optimizer, 1, 10)
    assert kept_entries(model) == 2
    schedule.remove()
    with pytest.raises(RuntimeError, match="without its schedule"):
        run(model, optimizer, 1, 25)


@adalora
def test_promise_27_adalora_is_kept_orthogonal_by_its_penalty():
    def off(model):
        gram = [g for _, _, s, m in adapter_modules(model) if s is not None for g in (m.P.mT @ m.P, m.Q @ m.Q.mT)]
        return sum((g - torch.eye(3)).square().sum().item() for g in gram)

    ends = {}
    for orth in (0.0, 0.5):
        model = peftlab.wrap(net(), "adalora", r=2, init_r=3, targets="layers.*", orth=orth)
        optimizer = torch.optim.SGD(trained(model), lr=0.05)
        peftlab.schedule(model, optimizer, total_steps=200)
        start = off(model)
        run(model, optimizer, 1, 60)
        ends[orth] = off(model) / start
    assert ends[0.5] < 0.05
    assert ends[0.0] > 0.5


@adalora
def test_promise_27_adalora_with_gradient_accumulation_and_groups():
    model = peftlab.wrap(net(), "adalora", r=1, init_r=3, targets="layers.*", delta_t=1)
    optimizer = torch.optim.AdamW(peftlab.param_groups(model, 0.02, weight_decay=0.01))
    schedule = peftlab.schedule(model, optimizer, total_steps=10)
    for i in range(1, 31):
        (loss_of(model, i) / 3).backward()
        if i % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert schedule.t == 10
    assert kept_entries(model) == 2


@adalora
def test_promise_58_an_adalora_that_is_off_or_frozen_is_not_pruned():
    model = net()
    peftlab.wrap(model, "adalora", r=1, init_r=3, targets="layers.*", name="old")
    with torch.no_grad():
        for _, _, site, m in adapter_modules(model, ["old"]):
            if site is not None:
                m.E += 1
    peftlab.freeze(model, "old")
    peftlab.wrap(model, "adalora", r=1, init_r=2, targets="layers.*", name="new", delta_t=1)
    before = {k: v for k, v in tensors(model).items() if ".old." in k}
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    peftlab.schedule(model, optimizer, total_steps=8)
    run(model, optimizer, 1, 4)
    peftlab.activate(model, "new")
    run(model, optimizer, 5, 8)
    assert_equal({k: v for k, v in tensors(model).items() if ".old." in k}, before)
    assert kept_entries(model) == 2 * 3 + 2


# ---------------------------------------------------------------- parameter groups


def named(groups: list[dict]) -> dict[str, dict]:
    assert len({g["name"] for g in groups}) == len(groups)
    return {g["name"]: g for g in groups}


def assert_partition(model: nn.Module, groups: list[dict]) -> None:
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in trained(model)}
    assert all(g["params"] for g in groups)


def paths(model: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {k for k, p in model.named_parameters() if id(p) in ids}


def test_promise_56_one_group_where_nothing_is_asked_for():
    model = peftlab.wrap(net(), "lora", r=2)
    (group,) = peftlab.param_groups(model, 1e-3)
    assert (group["name"], group["lr"], group["weight_decay"]) == ("adapter", 1e-3, 0.0)
    assert_partition(model, [group])


def test_promise_56_lora_plus_embeddings_decay_and_what_else_trains():
    model = net()
    peftlab.wrap(model, "lora", r=2, targets=["layers.*", "embed"], name="a", bias=False)
    peftlab.wrap(model, "bitfit", targets="layers.*.bias", name="b")
    peftlab.wrap(model, "full", targets="head.weight", name="c", in_place=True)
    peftlab.wrap(model, "full", targets="embed.weight", name="d")
    model.head.bias.requires_grad_(True)
    groups = named(peftlab.param_groups(model, 0.01, b_ratio=16, embedding_lr=0.003, weight_decay=0.1))
    assert_partition(model, list(groups.values()))
    where = {name: paths(model, g) for name, g in groups.items()}
    assert where == {
        "adapter": {"layers.0.peftlab.a.A", "layers.1.peftlab.a.A", "head.weight"},
        "adapter_no_decay": {"layers.0.peftlab.b.bias.d", "layers.1.peftlab.b.bias.d"},
        "fast": {"layers.0.peftlab.a.B", "layers.1.peftlab.a.B"},
        "embedding": {"embed.peftlab.a.A", "embed.peftlab.a.B", "embed.peftlab.d.weight.C"},
        "base_no_decay": {"head.bias"},
    }
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "adapter": (0.01, 0.1),
        "adapter_no_decay": (0.01, 0.0),
        "fast": (0.16, 0.1),
        "embedding": (0.003, 0.1),
        "base_no_decay": (0.01, 0.0),
    }


def test_promise_56_the_groups_really_apply():
    """axolotl#4010: LoRA+ ignored the weight decay."""
    model = peftlab.wrap(net(), "lora", r=2, targets="layers.*")
    with torch.no_grad():
        for p in trained(model):
            p.fill_(1.0)
            p.grad = torch.ones_like(p)
    torch.optim.SGD(peftlab.param_groups(model, 0.01, b_ratio=4, weight_decay=0.5)).step()
    for k, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - (0.04 if k.endswith("B") else 0.01) * 1.5))


def test_promise_56_frozen_adapters_are_in_no_group_and_wrappers_do_not_matter():
    model = peftlab.wrap(net(), "lora", r=2, targets="layers.0", name="a")
    peftlab.wrap(model, "lora", r=2, targets="layers.1", name="b")
    peftlab.freeze(model, "a")
    for m in (model, torch.compile(model, backend="eager")):
        groups = named(peftlab.param_groups(m, 0.01, b_ratio=2))
        assert_partition(model, list(groups.values()))
        assert paths(model, groups["fast"]) == {"layers.1.peftlab.b.B"}
        assert paths(model, groups["adapter"]) == {"layers.1.peftlab.b.A"}


def test_promise_56_an_embedding_that_trains_whole_is_an_embedding():
    model = peftlab.wrap(net(), "lora", r=2, targets="layers.*")
    model.embed.weight.requires_grad_(True)
    groups = named(peftlab.param_groups(model, 0.01, embedding_lr=0.5))
    assert paths(model, groups["embedding"]) == {"embed.weight"}
    assert groups["embedding"]["lr"] == 0.5
    assert_partition(model, list(groups.values()))
    assert named(peftlab.param_groups(model, 0.01)).keys() == {"adapter", "base"}


def test_promise_56_an_empty_group_that_was_asked_for_raises():
    """peft#3499: the embedding group was always empty."""
    model = peftlab.wrap(net(), "ia3", targets="layers.*")
    with pytest.raises(ValueError, match=r"b_ratio=16.*no trainable adapter"):
        peftlab.param_groups(model, 0.01, b_ratio=16)
    with pytest.raises(ValueError, match=r"embedding_lr=0\.1: no embedding"):
        peftlab.param_groups(model, 0.01, embedding_lr=0.1)
    with pytest.raises(ValueError, match=r"weight_decay=0\.1: no trainable tensor"):
        peftlab.param_groups(model, 0.01, weight_decay=0.1)
    lora = peftlab.wrap(net(), "lora", r=2, targets="embed")
    with pytest.raises(ValueError, match="b_ratio"):  # its B is in the embedding's group
        peftlab.param_groups(lora, 0.01, b_ratio=2, embedding_lr=0.1)
    assert named(peftlab.param_groups(lora, 0.01, b_ratio=2)).keys() == {"adapter", "fast"}
    peftlab.freeze(model)
    with pytest.raises(ValueError, match="nothing in this model trains"):
        peftlab.param_groups(model, 0.01)


@pytest.mark.parametrize(
    "bad",
    [
        dict(lr=0),
        dict(lr=-1.0),
        dict(lr="1"),
        dict(lr=float("nan")),
        dict(b_ratio=0),
        dict(b_ratio=-2),
        dict(embedding_lr=0.0),
        dict(weight_decay=-0.1),
        dict(weight_decay=None),
    ],
)
def test_promise_56_bad_values_raise_by_name(bad):
    model = peftlab.wrap(net(), "lora", r=2)
    with pytest.raises(ValueError, match=next(iter(bad))):
        peftlab.param_groups(model, **{"lr": 0.01, **bad})


# ---------------------------------------------------------------- the guard against a forgotten schedule


@adalora
def test_promise_27_accumulated_gradients_are_no_steps_for_the_guard():
    """60 backward passes for 10 steps are no run without a schedule; neither are gradients that nobody steps with."""
    model = peftlab.wrap(net(), "adalora", r=1, init_r=3, targets="layers.*")
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    for i in range(60):
        loss_of(model, i).backward()
        if i % 6 == 5:
            optimizer.step()
            optimizer.zero_grad()
    for i in range(40):
        optimizer.zero_grad()
        loss_of(model, i).backward()
    with pytest.raises(RuntimeError, match="20 steps without its schedule"):
        run(model, optimizer, 1, 25)


class ByData(torch.optim.Optimizer):
    """Writes through `.data`, as many optimizers outside torch do: version counters do not see it."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad.data, alpha=0.1)


@pytest.mark.parametrize("make", [ByData, lambda ps: torch.optim.SGD(ps, lr=0.1, foreach=True), lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True)])
@pytest.mark.parametrize("name", ["adalora", "l1"])
def test_promise_27_the_guard_counts_the_steps_of_every_optimizer(name, make):
    if name not in entries():
        pytest.skip(name)
    model = peftlab.wrap(net(dim=16), name, targets="layers.*.weight" if name == "l1" else "layers.*")
    with pytest.raises(RuntimeError, match="20 steps without its schedule"):
        run(model, make(trained(model)), 1, 25)


# ---------------------------------------------------------------- what a method declared frozen stays frozen


class Half(Method):
    """A frozen random matrix that is a Parameter, as some authors write it, beside a trained one."""

    def __init__(self, base: Base, *, r: int = 2):
        super().__init__(base)
        self.A = nn.Parameter(torch.randn(r, base.n_in), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(base.n_out, r))

    @classmethod
    def shared(cls, sites, *, r: int = 2):
        both = nn.Module()
        both.S = nn.Parameter(torch.randn(r), requires_grad=False)
        both.T = nn.Parameter(torch.ones(r))
        return both

    def weight(self, W):
        return W + (self.B * self.common.S * self.common.T) @ self.A


def flags(model) -> dict[str, bool]:
    return {k.rpartition(".")[2]: p.requires_grad for k, p in model.named_parameters() if "peftlab" in k}


@pytest.mark.parametrize("trainable", [None, True, False])
def test_frozen_tensors_of_a_method_stay_frozen(trainable, tmp_path):
    ours, none = {"A": False, "B": True, "S": False, "T": True}, dict.fromkeys("ABST", False)
    model = peftlab.wrap(net(), Half, targets="layers.*")
    assert flags(model) == ours
    peftlab.freeze(model)
    assert flags(model) == none
    for again in (peftlab.unfreeze, lambda m: peftlab.train_only(m, "default"), lambda m: peftlab.unfreeze(copy.deepcopy(m)) or peftlab.unfreeze(m)):
        peftlab.freeze(model)
        again(model)
        assert flags(model) == ours
    peftlab.freeze(model)
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = net()
    peftlab.load(fresh, tmp_path / "a.safetensors", trainable=trainable)
    assert flags(fresh) == (none if trainable is False else ours)
    assert flags(model) == none
    peftlab.load(model, tmp_path / "a.safetensors", trainable=trainable)  # over what is there
    assert flags(model) == (ours if trainable else none)
    x, _ = batch(0)
    assert torch.equal(fresh(x), model(x))


def test_plan_counts_what_trains():
    model = net()
    plan = peftlab.plan(model, Half, targets="layers.*")
    peftlab.wrap(model, Half, targets="layers.*")
    assert plan.trainable == sum(p.numel() for p in trained(model))
