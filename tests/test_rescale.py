"""Changing an adapter's scale after `wrap`. Promise 36's second clause is tested here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftlab

SCALED = ["lora", "dora", "adalora", "fourierft", "lokr", "houlsby"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))


def moved(method: str, **hyper) -> nn.Module:
    hyper |= {"n": 4} if method == "fourierft" else {"init_r": 2, "r": 2} if method == "adalora" else {"dim": 2} if method == "houlsby" else {"r": 2}
    model = peftlab.wrap(net(), method, targets=["0", "2"], **hyper)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize("method", SCALED)
def test_rescaled_is_wrapped_with_that_alpha(method, tmp_path):
    x = torch.randn(4, 8)
    model, wanted = moved(method, alpha=6.0), moved(method, alpha=6.0 * 0.7)
    before = model(x)
    peftlab.rescale(model, 0.7)
    assert not torch.allclose(model(x), before)
    assert torch.equal(model(x), wanted(x))
    assert peftlab.report(model)[0].scale == peftlab.report(wanted)[0].scale
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = net()
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("method", SCALED)
def test_promise_36_a_new_scale_compiles_nothing_again(method):
    torch._dynamo.reset()
    model, x, count = moved(method), torch.randn(4, 8), []

    def backend(graph, _):
        count.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(x)
    once = len(count)
    for factor in (0.5, 3.0, 0.1):
        peftlab.rescale(model, factor)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(count) == once == 1


def test_only_the_named_adapters_change():
    model, x = moved("lora"), torch.randn(4, 8)
    peftlab.wrap(model, "lora", r=2, targets="3", name="b")
    model[3].peftlab.b.B.data.normal_()
    with peftlab.using(model, "b"):
        before = model(x)
    peftlab.rescale(model, 2.0, "default")
    with peftlab.using(model, "b"):
        assert torch.equal(model(x), before)
    assert [r.scale for r in peftlab.report(model)] == [16.0, 16.0, 8.0]


@pytest.mark.parametrize(("factor", "error"), [(float("nan"), ValueError), (True, ValueError), ("2", ValueError)])
def test_a_factor_is_a_finite_number(factor, error):
    with pytest.raises(error, match="factor"):
        peftlab.rescale(moved("lora"), factor)


def test_what_has_no_scale_or_is_merged_is_refused_before_anything_changes():
    model = moved("lora")
    peftlab.wrap(model, "ia3", targets="3", name="b")
    before = [r.scale for r in peftlab.report(model)]
    with pytest.raises(ValueError, match="ia3 at '3' has no alpha"):
        peftlab.rescale(model, 2.0)
    peftlab.merge(model, "default")
    with pytest.raises(ValueError, match="'default' is merged"):
        peftlab.rescale(model, 2.0, "default")
    assert [r.scale for r in peftlab.report(model)] == before
