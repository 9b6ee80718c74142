"""What quantising a large model costs does not grow with its size squared: how often it is walked is counted, not timed. And what its calls refuse."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import peftlab
from peftlab.core import ledger
from peftlab.quant import quantize as api
from peftlab.quant import wrap_quantized as starts
from peftlab.quant.quantize import packed_weights

KINDS = ("nf4", "fp4", "int8")
ALL = "one of 'nf4', 'fp4', 'int8'."


def net(n: int = 3) -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(n)))


CALLS = {
    "quantize": (net, lambda m: peftlab.quantize(m, targets="*")),
    "quantize after wrap": (lambda n: peftlab.wrap(net(n), "lora", r=2, targets="*"), lambda m: peftlab.quantize(m, targets="*")),
    "dequantize": (lambda n: peftlab.quantize(net(n), targets="*"), peftlab.dequantize),
    "wrap_quantized": (net, lambda m: peftlab.wrap_quantized(m, targets="*", r=2, iters=1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_model_is_not_walked_for_every_weight(name, monkeypatch):
    build, call = CALLS[name]
    walks = []

    def counting(model):
        walks.append(model)
        return real(model)

    real = ledger.base_records
    for module in (ledger, api, starts):
        monkeypatch.setattr(module, "base_records", counting, raising=False)
    found = []
    for n in (2, 9):
        model = build(n)
        walks.clear()
        call(model)
        found.append(len(walks))
    assert found[0] == found[1] <= 2


def test_what_the_ledger_remembers_is_still_the_packed_weight():
    model = peftlab.wrap(net(), "lora", r=2, targets="*")
    peftlab.quantize(model, targets="*")
    record = model.__dict__[ledger.RECORD_ATTRIBUTE]
    assert not any(record.flags[f"{i}.weight"] for i in range(3))
    assert record.flags["0.bias"]
    assert not any(record.moved(f"{i}.weight", model[i]._parameters["weight"]) for i in range(3))
    peftlab.unwrap(model)
    assert not any(model[i]._parameters["weight"].requires_grad for i in range(3))
    assert model[0].bias.requires_grad


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("call", [peftlab.quantize, peftlab.wrap_quantized, lambda m, kind="nf4", **how: peftlab.load_quantized(m, "nowhere", kind, **how)])
def test_odd_kinds_and_block_sizes_are_named(call):
    for blocksize in (64.0, "64", True, 65, 0, -64, np.float32(64), torch.tensor(64), [64]):
        with pytest.raises(ValueError, match=rf"^{re.escape(f'blocksize={blocksize!r}')}: one of 32, 64, "):
            call(net(), blocksize=blocksize)
    with pytest.raises(ValueError, match=rf"^kind='nf5': {ALL} Did you mean 'nf4'"):
        call(net(), kind="nf5")
    for kind in (4, 4.0, b"nf4", ["nf4"], ("nf4",), torch.tensor(4), nn.Linear):
        with pytest.raises(ValueError, match=rf"^{re.escape(f'kind={kind!r}')}: {ALL}$"):
            call(net(), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_meets_codes_says_how_to_go_on(kind):
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "layers": net()})
    peftlab.quantize(model, kind, targets=["embed", "layers.1"])
    for call in (peftlab.quantize, lambda m, **how: peftlab.wrap_quantized(m, r=2, iters=1, **how)):
        with pytest.raises(ValueError, match=rf"quantised already \({kind}\): dequantize first, or exclude it; exclude=") as e:
            call(model, targets="*")
        said = re.search(r"exclude=(\[.*\])", str(e.value))[1]
        call(model, targets="*", exclude=eval(said, {"peftlab": peftlab, "model": model}))
        assert len(packed_weights(model)) == 4
        peftlab.dequantize(model, targets=["layers.0", "layers.2"])
