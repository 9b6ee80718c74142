"""Tensors that share memory: the same tensor under two names, parts of one flat buffer, and everything between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftlab


class Autoencoder(nn.Module):
    """Two names of one parameter in one module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Parameter(torch.randn(4, 4))
        self.dec = self.enc

    def forward(self, x):
        return torch.tanh(x @ self.enc) @ self.dec


class Tied(nn.Module):
    """An embedding whose table is the output layer's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.emb(ids)))


def moved(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=g))
    return model


def flat(model: nn.Module) -> nn.Module:
    """All parameters as parts of one vector."""
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    return model


def goes_round(model: nn.Module, x: torch.Tensor, base: torch.Tensor) -> None:
    """Merged is wrapped, and the base comes back."""
    y = model(x)
    assert not torch.allclose(y, base)
    peftlab.merge(model)
    torch.testing.assert_close(model(x), y)
    peftlab.unmerge(model)
    assert torch.equal(model(x), y)
    peftlab.unwrap(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("targets", ["enc", "dec", ["enc", "dec"]])
def test_two_names_in_one_module_need_a_choice(targets):
    with pytest.raises(ValueError, match="tied"):
        peftlab.wrap(Autoencoder(), "full", targets=targets)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("tie", ["share", "untie"])
@pytest.mark.parametrize("targets", ["enc", "dec", ["enc", "dec"]])
def test_two_names_in_one_module(method, tie, targets):
    model, x = Autoencoder(), torch.randn(3, 4)
    base = model(x)
    hyper = {"r": 2} if method == "lora" else {}
    peftlab.wrap(model, method, targets=targets, tie=tie, **hyper)
    moved(model)
    if tie == "share":
        assert torch.equal(model.enc, model.dec)
    else:
        assert torch.equal(model.enc, model.dec) == (model.enc is model.dec)
    goes_round(model, x, base)


def test_recurrent_weights_under_two_names():
    model, x = nn.LSTM(4, 4, num_layers=2), torch.randn(5, 2, 4)
    model.weight_hh_l1 = model.weight_hh_l0
    base = model(x)[0]
    peftlab.wrap(model, "lora", r=2, targets="weight_hh_l0", tie="share")
    moved(model)
    y = model(x)[0]
    peftlab.merge(model)
    torch.testing.assert_close(model(x)[0], y)
    peftlab.unwrap(model)
    assert torch.equal(model(x)[0], base)


@pytest.mark.parametrize(("first", "second"), [(("emb", "share"), ("head", "share")), (("emb", "share"), ("head", "untie")), (("head", "untie"), ("emb", "share"))])
def test_a_second_adapter_at_the_other_end_is_refused(first, second):
    model, ids = Tied(), torch.arange(9)
    peftlab.wrap(model, "lora", r=2, targets=first[0], tie=first[1], name="a")
    before = model(ids)
    with pytest.raises(ValueError, match="other end of the tied tensor"):
        peftlab.wrap(model, "lora", r=2, targets=second[0], tie=second[1], name="b")
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("ends", [("emb", "head"), ("head", "emb")])
def test_each_end_its_own_adapter(ends):
    model, ids = Tied(), torch.arange(9)
    base = model(ids)
    for name, end in zip("ab", ends, strict=True):
        peftlab.wrap(model, "lora", r=2, targets=end, tie="untie", name=name)
    goes_round(moved(model), ids, base)


@pytest.mark.parametrize("end", ["emb", "head"])
def test_a_second_adapter_joins_the_first_ones_end(end):
    model, ids = Tied(), torch.arange(9)
    base = model(ids)
    peftlab.wrap(model, "lora", r=2, targets=end, tie="share", name="a")
    peftlab.wrap(model, "lora", r=2, targets=["emb", "head"], tie="share", name="b")
    assert [r.path for r in peftlab.report(model)] == [end, end]
    goes_round(moved(model), ids, base)


def test_parts_of_one_flat_buffer_are_not_tied():
    model, x = flat(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))), torch.randn(3, 8)
    base = model(x)
    assert peftlab.plan(model, "lora", r=2, targets="*").total == 144
    assert peftlab.estimate(model, "lora", r=2, targets="*").total == 144
    peftlab.wrap(model, "lora", r=2, targets="*")
    goes_round(moved(model), x, base)


def test_recurrent_weights_in_one_flat_buffer():
    model = flat(nn.LSTM(4, 8))
    assert peftlab.plan(model, "lora", r=2, targets="*").total == sum(p.numel() for p in model.parameters()) == 448


def test_an_adapter_of_one_part_is_saved_with_the_other_part_changed(tmp_path):
    model = flat(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    peftlab.wrap(model, "lora", r=2, targets="0")
    with torch.no_grad():
        model[1].weight.add_(1)
    with pytest.raises(ValueError, match=r"'1.weight' was changed after wrap"):
        peftlab.save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("other", [lambda w: w[4:], lambda w: w.t()])
def test_tensors_that_overlap_are_refused(other):
    w = torch.randn(8, 8)
    model = nn.ParameterDict({"a": w[:6], "b": other(w)})
    for targets in ("a", "b"):
        with pytest.raises(ValueError, match="share some of their memory"):
            peftlab.wrap(model, "lora", r=2, targets=targets)
