"""Every method against the paper's formula, on every layer type: output, gradients and merged weight, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import oracles
import pytest
import torch
from oracles import ORACLES, canonical, own, run
from torch import Tensor, nn

import peftlab
from peftlab import registry

TOLERANCE = dict(rtol=1e-10, atol=1e-10)


def conv1d_hf():
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 6)
    nn.init.normal_(layer.bias)
    return layer


def normal(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


def ids():
    return torch.tensor([[0, 3, 3, 11], [7, 1, 0, 5]])


@dataclass
class Layer:
    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]


# Canonical shapes, (n_out, n_in): all sides are even, so that a block size of 2 fits everywhere.
LAYERS = {
    "linear": Layer(lambda: nn.Linear(6, 8), normal(2, 5, 6)),
    "linear-nobias": Layer(lambda: nn.Linear(8, 6, bias=False), normal(3, 8)),
    "conv1d_hf": Layer(conv1d_hf, normal(2, 5, 6)),
    "conv1d": Layer(lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), normal(2, 4, 9)),
    "conv2d": Layer(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), normal(2, 4, 7, 6)),
    "conv2d-groups": Layer(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), normal(2, 4, 6, 5)),
    "conv2d-circular": Layer(lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="circular", bias=False), normal(2, 2, 5, 6)),
    "conv_transpose2d": Layer(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), normal(2, 4, 4, 3)),
    "conv_transpose2d-groups": Layer(lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2, bias=False), normal(2, 4, 4, 3)),
    "embedding": Layer(lambda: nn.Embedding(12, 6), ids),
    "embedding-padding": Layer(lambda: nn.Embedding(12, 6, padding_idx=3), ids),
}


# What stands for each method: a name of the registry with keywords that fit the layers above.
ROWS: dict[str, tuple[str, dict]] = {
    "adalora": ("adalora", dict(init_r=3, r=2, alpha=5)),
    "bitfit": ("bitfit", {}),
    "dora": ("dora", dict(r=2, alpha=3)),
    "dora-stabilized": ("dora", dict(r=2, alpha=3, rank_stabilized=True)),
    "fourierft": ("fourierft", dict(n=5, alpha=7.0, seed=3)),
    "full": ("full", {}),
    "ia3": ("ia3", {}),
    "ia3-in": ("ia3", dict(side="in")),
    "l1": ("l1", {}),
    "lokr": ("lokr", dict(r=3, alpha=5)),
    "lokr-lowrank": ("lokr", dict(r=1, alpha=5)),
    "lokr-both": ("lokr", dict(r=1, alpha=5, decompose_both=True, factor=2)),
    "lora": ("lora", dict(r=2, alpha=3)),
    "lora-default-alpha": ("lora", dict(r=2)),
    "lora-bias": ("lora", dict(r=2, alpha=3, bias=True)),
    "rslora": ("rslora", dict(r=3, alpha=5)),
    "pissa": ("pissa", dict(r=2, alpha=3)),
    "pissa-stabilized": ("lora", dict(r=3, alpha=5, init="pissa_exact", rank_stabilized=True)),
    "olora": ("olora", dict(r=2, alpha=3, bias=False)),
    "qalora": ("qalora", dict(r=3, alpha=5, group_size=2)),
    "oft": ("oft", dict(block_size=2)),
    "oft-blocks": ("oft", dict(blocks=2)),
    "sparse": ("sparse", dict(n=4)),
    "sparse-random": ("sparse", dict(n=4, select="random", seed=1)),
    "tokens": ("tokens", dict(ids=[7, 0])),
    "vera": ("vera", dict(r=3)),
}
FROM_DATA = {"corda", "eva", "fish", "lora_ga"}  # aliases that only choose a start or places from batches: the equation is lora's and sparse's

EMBEDDINGS = {"embedding", "embedding-padding"}
NO_BIAS = {"linear-nobias", "conv2d-circular", "conv_transpose2d-groups"} | EMBEDDINGS
# Where a method must refuse, and nowhere else.
REFUSED = {
    "bitfit": NO_BIAS,
    "lora-bias": NO_BIAS,
    "qalora": EMBEDDINGS,
    "oft": EMBEDDINGS,
    "oft-blocks": EMBEDDINGS,
    "tokens": LAYERS.keys() - EMBEDDINGS,
}
ONTO = [pytest.param(r, k, id=f"{r}-{k}") for r in ROWS for k in LAYERS if k not in REFUSED.get(r, ())]


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def built(row, kind):
    """The frozen layer, the wrapped model around a copy of it, the input, and what the oracle needs; every trained tensor is random."""
    torch.manual_seed(0)
    name, hyper = ROWS[row]
    layer, x = LAYERS[kind].make().double(), LAYERS[kind].x()
    model = Holder(copy.deepcopy(layer))
    peftlab.wrap(model, name, targets="layer", **hyper)
    trained = {k: t for k, t in own(model.layer).items() if t.requires_grad}
    assert trained
    with torch.no_grad():
        for k, t in trained.items():
            t.copy_(torch.randn_like(t) + (3 if k == "m" else 0))
    cls, fixed, method = registry.resolve(name)
    defaults = {k: p.default for k, p in registry.keywords(cls).items()}
    shared = {k.rsplit(".", 1)[1]: t.double() for k, t in model.named_buffers() if k.startswith("peftlab_shared.")}
    if "A" in shared:
        shared["A"] = shared["A"].T  # kept as (n_in, r)
    return layer, model, x, trained, method, {**defaults, **fixed, **hyper}, shared


def measured(f, x, tensors):
    """Output, and gradients by the adapter's tensors and by the input, of one fixed random functional."""
    inputs = dict(tensors)
    if x.is_floating_point():
        x = inputs["x"] = x.clone().requires_grad_()
    y = f(x)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad((y * weight).sum() + (y * y * weight).sum() / 3, list(inputs.values()))
    return y.detach(), dict(zip(inputs, grads, strict=True))


@pytest.mark.parametrize(("row", "kind"), ONTO)
def test_output_and_gradients(row, kind):
    layer, model, x, trained, method, hyper, shared = built(row, kind)
    y, grads = measured(model, x, trained)
    leaves = {k: t.detach().clone() for k, t in own(model.layer).items()} | {k: t.detach().clone().requires_grad_() for k, t in trained.items()}
    want, want_grads = measured(oracles.adapted(layer, method, leaves, hyper, shared), x, {k: leaves[k] for k in trained})
    torch.testing.assert_close(y, want, **TOLERANCE)
    assert (want - layer(x)).abs().max() > 1e-3, "the perturbation changed nothing, so the comparison says nothing"
    for k, g in grads.items():
        torch.testing.assert_close(g, want_grads[k], **TOLERANCE, msg=lambda m, k=k: f"gradient of {k}: {m}")


@pytest.mark.parametrize(("row", "kind"), ONTO)
def test_merged_weight(row, kind):
    layer, model, _, _, method, hyper, shared = built(row, kind)
    W, b = oracles.changed(layer, method, own(model.layer), hyper, shared)
    want = oracles.raw(layer, W).detach().clone()
    if kind == "embedding-padding":
        want[layer.padding_idx] = layer.weight.detach()[layer.padding_idx]
    peftlab.merge(model)
    torch.testing.assert_close(model.layer.weight.detach(), want, **TOLERANCE)
    if b is not None:
        torch.testing.assert_close(model.layer.bias.detach(), b.detach(), **TOLERANCE)


@pytest.mark.parametrize(("row", "kind"), [pytest.param(r, k, id=f"{r}-{k}") for r in REFUSED for k in sorted(REFUSED[r])])
def test_refused(row, kind):
    layer = LAYERS[kind].make()
    model = Holder(layer)
    with pytest.raises(ValueError, match="layer"):
        peftlab.wrap(model, ROWS[row][0], targets="layer", **ROWS[row][1])
    assert not hasattr(layer, "peftlab")
    assert type(layer).__module__.startswith(("torch.", "transformers."))


@pytest.mark.parametrize("name", registry.names())
def test_every_method_has_an_oracle(name):
    known = ORACLES if registry.resolve(name)[0].defined() else oracles.CALLS
    assert name in known, f"methods/{name}.py has no oracle: write its formula from the paper into tests/oracles.py"
    assert name in oracles.CALLS or any(registry.entries()[r].method == name for r, _ in ROWS.values()), f"no row of ROWS is {name}"


def test_every_name_is_compared():
    places = {n for n, e in registry.entries().items() if e.hyper.keys() == {"targets"}}  # the same method at a certain place
    calls = {n for n, e in registry.entries().items() if e.method in oracles.CALLS}
    assert {r for r, _ in ROWS.values()} | FROM_DATA | places | calls == set(registry.entries())
    assert ORACLES.keys() | oracles.CALLS.keys() == set(registry.names()), "an oracle without a method"
    assert oracles.RAW == {n for n in registry.names() if registry.resolve(n)[0].on == "tensor"}


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_oracle_is_the_layer(kind):
    """The reference for layer types is itself compared with torch."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind].make().double(), LAYERS[kind].x()
    W = canonical(layer)
    assert torch.equal(oracles.raw(layer, W), layer.weight)
    torch.testing.assert_close(run(layer, W, getattr(layer, "bias", None), x), layer(x), rtol=1e-12, atol=1e-12)
