"""Modules that iterate over their children, as hosts and as roots, and children that bear the library's own names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftlab


class Ensemble(nn.ModuleList):
    """The weighted mean of its members; it has a parameter of its own."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 4) for _ in range(3))
        self.gate = nn.Parameter(torch.rand(3))

    def forward(self, x):
        return torch.stack([g * member(x) for g, member in zip(self.gate, self, strict=True)]).mean(0)


@pytest.fixture
def wrapped() -> nn.Module:
    """VeRA keeps a shared pair at the root, the other adapter sits at the container itself."""
    model = peftlab.wrap(Ensemble(), "vera", r=2)
    peftlab.wrap(model, "full", targets="gate", name="gate")
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.2)
    return model


def test_a_container_shows_its_own_children_alone(wrapped):
    plain = Ensemble()
    assert len(wrapped) == 3
    assert list(wrapped) == [wrapped[i] for i in range(3)]
    assert wrapped[-1] is wrapped[2]
    assert list(wrapped[1:]) == [wrapped[1], wrapped[2]]
    x = torch.randn(2, 4)
    with peftlab.disabled(wrapped):
        assert torch.equal(wrapped(x), plain(x))
    peftlab.unwrap(wrapped)
    assert torch.equal(wrapped(x), plain(x))
    assert type(wrapped) is Ensemble


def test_a_container_computes_with_its_adapters(wrapped, tmp_path):
    x = torch.randn(2, 4)
    y = wrapped(x)
    assert peftlab.check(wrapped, x).ok
    assert torch.equal(copy.deepcopy(wrapped)(x), y)
    torch.testing.assert_close(torch.compile(wrapped, fullgraph=True, backend="aot_eager")(x), y)
    peftlab.save(wrapped, tmp_path / "a.safetensors")
    fresh = Ensemble()
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), y)
    peftlab.merge(wrapped)
    torch.testing.assert_close(wrapped(x), y)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), lambda: nn.ModuleDict({"a": nn.Linear(4, 4)})])
def test_a_root_that_is_a_container(make):
    model, plain = make(), make()
    peftlab.wrap(model, "vera", r=2)
    assert len(model) == len(plain)
    if isinstance(plain, nn.ModuleDict):
        assert list(model) == list(model.keys()) == [k for k, _ in model.items()] == ["a"]
        assert "peftlab_shared" not in model
        assert list(model.values()) == [model["a"]]
    else:
        assert isinstance(model[-1], nn.Tanh)
        assert [type(m).__name__ for m in model] == ["Linear", "Tanh"]
        assert type(model[1:]) is nn.Sequential
    peftlab.unwrap(model)
    assert type(model) is type(plain)


@pytest.mark.parametrize("name", ["peftlab", "peftlab_shared"])
def test_a_child_of_the_models_own_by_the_librarys_name_is_refused(name):
    model = nn.Module()
    model.add_module(name, nn.Linear(4, 4))
    model.lin = nn.Linear(4, 4)
    before = dict(model.named_modules())
    for call in (peftlab.plan, peftlab.wrap):
        with pytest.raises(ValueError, match=f"{name!r} is a Linear of the model's own"):
            call(model, "lora", r=2)
    assert dict(model.named_modules()) == before
    assert not peftlab.report(model)
