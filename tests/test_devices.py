"""Devices other than the default one. There may be no accelerator here, so "meta" stands for it: a tensor made on the wrong device shows there too."""

from __future__ import annotations

import contextlib
import copy
import shutil

import pytest
import torch
from cases import LM
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftlab
from peftlab.core.ledger import _sample_positions as _positions
from peftlab.formats.merge_files import merge_files

ROWS = {"0": {"q": [0, 3, 6], "k": [1, 4, 7], "v": [2, 5, 8, 9, 10, 11]}}


@pytest.fixture(autouse=True)
def _no_cache():
    _positions.cache_clear()
    yield
    _positions.cache_clear()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6))


def moved(model: nn.Module) -> nn.Module:
    """Off its start."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    return model


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_explicit_rows_lie_on_the_cpu_whatever_the_default_device(method, tmp_path):
    x, how = torch.randn(3, 8), {"targets": ["0.q", "0.v"], "split": ROWS} | ({} if method == "ia3" else {"r": 2})
    wanted = moved(peftlab.wrap(net(), method, **how))
    model = net()
    with torch.device("meta"):
        peftlab.wrap(model, method, **how)
    moved(model)
    assert torch.equal(model(x), wanted(x))
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = net()
    with torch.device("meta"):
        peftlab.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), wanted(x))
    peftlab.merge(fresh)


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_a_default_device_or_a_mode_leaves_no_cached_positions_behind(mode, tmp_path):
    if mode == "fake":
        with FakeTensorMode():
            peftlab.wrap(net(), "lora", r=2)
    else:
        model = net()
        with torch.device("meta"):
            peftlab.wrap(model, "lora", r=2)
        peftlab.save(model, tmp_path / "a.safetensors")
    peftlab.save(peftlab.wrap(net(), "lora", r=2), tmp_path / "a.safetensors")
    peftlab.load(net(), tmp_path / "a.safetensors")


def test_check_draws_on_the_cpu_whatever_the_default_device():
    model = peftlab.wrap(net(), "lora", r=2)
    x = torch.randn(3, 8)
    with torch.device("meta"):
        assert peftlab.check(model, x).ok


def test_merge_files_whatever_the_default_device(tmp_path):
    model = net()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    moved(peftlab.wrap(model, "lora", r=2))
    peftlab.save(model, tmp_path / "a.safetensors")
    merged = []
    for where in (contextlib.nullcontext(), torch.device("meta")):
        with where:
            merge_files(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
        merged.append((tmp_path / "out" / "model.safetensors").read_bytes())
        shutil.rmtree(tmp_path / "out")
    assert merged[0] == merged[1]


def test_an_average_is_kept_where_it_is():
    model = moved(peftlab.wrap(net(), "lora", r=2))
    average = {k: v.to("meta") for k, v in peftlab.snapshot(model).items()}
    peftlab.ema_update(average, model, 0.9)
    assert all(v.is_meta for v in average.values())


def test_rows_with_different_mixtures_on_another_device():
    model = peftlab.wrap(LM().to("meta"), "xlora", experts=2, r=2)
    peftlab.wrap(model, "xlora", experts=2, r=2, name="two")
    with peftlab.route(model, ["default", "two", None]):
        assert model(torch.zeros(3, 4, dtype=torch.long, device="meta")).shape == (3, 4, 12)


# ---------------------------------------------------------------- with an accelerator

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@cuda
def test_backward_before_and_after_a_move():
    """The guard of methods with a schedule compares values that it saw on the other device."""
    model = peftlab.wrap(net(), "adalora", r=2, init_r=3)
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)(torch.randn(3, 8, device=device)).sum().backward()


@cuda
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_is_loaded_and_quantised_lies_where_the_model_was(kind, tmp_path):
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    model = peftlab.load_quantized(net().cuda(), tmp_path / "model.safetensors", kind, targets="*")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}


@cuda
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_packed_layers_go_there_and_back(kind):
    """Codes, scales and decoded values keep their bits and dtypes; the product is that of the device's dense layer."""
    model = peftlab.quantize(net(), kind, targets="*")
    before = {k: t.clone() for k, t in model.state_dict().items()}
    W, x = model[0].weight + 0, torch.randn(3, 8)
    model.cuda()
    assert torch.equal((model[0].weight + 0).cpu(), W)
    torch.testing.assert_close(model(x.cuda()).cpu(), peftlab.dequantize(copy.deepcopy(model)).cpu()(x), rtol=1e-4, atol=1e-5)
    after = model.cpu().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[k]) and t.dtype == after[k].dtype for k, t in before.items())
