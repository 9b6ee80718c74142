"""Layers that another library has packed: bitsandbytes, torchao, HQQ, and a weight that is a tensor subclass of nobody's (rows 21, 28, 30)."""

# ruff: noqa: PT017, PT018

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import row_of
from torch import nn

import peftlab
from peftlab.model import layers
from peftlab.model import packed as packed_parameters

SIZE = 64


class Eighths(torch.Tensor):
    """A weight that wraps codes and a scale, as torchao's do: a linear takes it, hardly anything else does."""

    @staticmethod
    def __new__(cls, codes, step):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=step.dtype, device=codes.device)

    def __init__(self, codes, step):
        self.codes, self.step = codes, step

    def __tensor_flatten__(self):
        return ["codes", "step"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["step"])

    def dequantize(self):
        return self.codes.to(self.step.dtype) * self.step

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].dequantize().to(args[0].dtype), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].codes), func(args[0].step))
        raise NotImplementedError(f"{func} of codes")


class NoBackward(Eighths):
    """Its linear rounds the input as well, and has no backward."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, W, b = (*args, *(kwargs or {}).values(), None)[:3]
            with torch.no_grad():
                y = F.linear(x, W.dequantize())
            return y if b is None else y + b
        return super().__torch_function__(func, types, args, kwargs)


def wrapped(linear, cls=Eighths):
    codes = (linear.weight.detach() * 512).round().clamp(-127, 127).to(torch.int8)
    linear.weight = nn.Parameter(cls(codes, torch.tensor(1 / 512, dtype=linear.weight.dtype)), requires_grad=False)
    return linear


def present(name):
    """A module, or a skip where it is missing or does not go with this torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as e:
            pytest.skip(str(e))


def torchao(config, **how):
    def pack(linear):
        q = present("torchao.quantization")
        holder = nn.Sequential(linear)
        q.quantize_(holder, getattr(q, config)(**how))
        return holder[0]

    return pack


def four(linear):
    bnb = present("bitsandbytes")
    layer = bnb.nn.Linear4bit(SIZE, SIZE, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    layer.weight = layer.weight._quantize("cpu")
    return layer


def eight(threshold):
    def pack(linear):
        bnb = present("bitsandbytes")
        layer = bnb.nn.Linear8bitLt(SIZE, SIZE, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict(linear.state_dict())
        layer.weight = layer.weight._quantize("cpu")
        layer(torch.zeros(1, SIZE))  # its first call takes the scales from the weight into a state of the layer
        return layer

    return pack


def hqq(linear):
    core = present("hqq.core.quantize")
    return core.HQQLinear(linear, core.BaseQuantizeConfig(nbits=4, group_size=64), compute_dtype=torch.float32, device="cpu")


def of_torchao(bits):
    return torchao("IntxWeightOnlyConfig", weight_dtype=getattr(torch, f"int{bits}"))


KINDS = {
    "subclass": wrapped, "bnb Linear4bit": four, "bnb Linear8bitLt": eight(0.0), "bnb Linear8bitLt, threshold": eight(6.0),
    "torchao int8": torchao("Int8WeightOnlyConfig"), "torchao int4": of_torchao(4), "torchao float8": torchao("Float8WeightOnlyConfig"), "hqq": hqq,
}  # fmt: skip


def dense_of(layer):
    """The values that a foreign layer's codes stand for."""
    if hasattr(layer, "dequantize"):
        return layer.dequantize()
    if type(layer).__name__ == "Linear8bitLt":
        return layer.state.CB.float() * (layer.state.SCB[:, None] / 127)
    if type(layer).__name__ == "Linear4bit":
        return importlib.import_module("bitsandbytes").functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    return layer.weight.dequantize()


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE))


def packed(kind):
    model = plain()
    pack = KINDS[kind] if isinstance(kind, str) else kind
    model[0], model[2] = pack(model[0]), pack(model[2])
    return model.requires_grad_(False)


def decoded(model):
    """The same model with plain linear layers that hold the values of the codes."""
    twin = plain()
    with torch.no_grad():
        for i in (0, 2):
            twin[i].weight.copy_(dense_of(model[i]))
    return twin


def rows():
    return torch.randn(5, SIZE, generator=torch.Generator().manual_seed(3))


def stir(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def keywords(method):
    return {**row_of(method).hyper, "data": [rows()], "loss": lambda m, b: m(b).square().mean(), "targets": ["0", "2"]}


def close(a, b, tol=1e-5):
    return (a - b).norm() <= tol * b.norm() + 1e-7


def adapters(model):
    return {k: p for k, p in model.named_parameters() if ".peftlab." in k or k.startswith("peftlab")}


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "oft", "lokr", "fourierft", "adalora", "mola", "houlsby", "pfeiffer", "parallel", "loreft", "eva"])
def test_adapters_train_as_on_the_decoded_weight(kind, method):
    model, x = packed(kind), rows()
    base, twin = model(x), decoded(packed(kind))
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    for m in (model, twin):
        peftlab.wrap(m, method, **keywords(method))
    assert torch.equal(model(x), base)
    with torch.no_grad():
        for a, b in zip(adapters(twin).values(), adapters(model).values(), strict=True):
            a.copy_(b + 0.1 * torch.randn_like(b))
            b.copy_(a)
    found = []
    for m in (model.train(), twin.train()):
        inputs = x.clone().requires_grad_()
        y = m(inputs)
        tensors = [inputs, *(p for p in m.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    assert len(found[0]) == len(found[1]) > 2
    assert all(close(a, b) for a, b in zip(*found, strict=True))
    with peftlab.disabled(model):
        assert torch.equal(model(x), base)
    assert all(model.get_parameter(k).requires_grad == flag for k, flag in flags.items())
    peftlab.unwrap(model)
    assert torch.equal(model(x), base) and not adapters(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [e.name for e in peftlab.methods(aliases=False)])
def test_every_method_trains_or_says_at_once_why_not(kind, method):
    """No method reaches the first batch and fails there, and none leaves a parameter without a gradient."""
    model, x = packed(kind), rows()
    before = [type(m) for m in model.modules()], {k: p.requires_grad for k, p in model.named_parameters()}
    try:
        peftlab.wrap(model, method, **keywords(method))
    except (ValueError, TypeError) as e:
        assert str(e)
        if not isinstance(e, (peftlab.PatternError, TypeError)):
            assert "only offers a call" in str(e) or "blocks" in str(e)  # xlora wants a list of blocks, whatever the layer
        assert before == ([type(m) for m in model.modules()], {k: p.requires_grad for k, p in model.named_parameters()})
        return
    trained = [p for p in stir(model).parameters() if p.requires_grad]
    model.train()(x).square().sum().backward()
    assert trained and all(p.grad is not None for p in trained)
    assert all(layers.is_opaque_linear(model[i]) for i in (0, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_wants_the_values_is_refused(kind):
    for method in ("dora", "pissa", "olora", "lora_ga"):
        with pytest.raises(ValueError, match=r"needs the weight.*only offers a call"):
            peftlab.wrap(packed(kind), method, **keywords(method))
    model = stir(peftlab.wrap(packed(kind), "lora", r=2, targets=["0", "2"]))
    y = model(rows())
    for onto in (None, "dequantized", "requantized"):
        with pytest.raises(ValueError, match=r"'0' is a \w+ that only offers a call: nothing can be merged into it"):
            peftlab.merge(model, onto=onto)
    assert torch.equal(model(rows()), y)
    for how in ({}, {"targets": "*"}, {"targets": "0"}):
        fresh = packed(kind)
        with pytest.raises(peftlab.PatternError, match=r"2 layers, '0' \(\w+\) the first of them, only offer a call: another library has packed"):
            peftlab.quantize(fresh, **how)
        assert layers.is_opaque_linear(fresh[0])


# ---------------------------------------------------------------- what every model can do


@pytest.mark.parametrize("kind", KINDS)
def test_files_counts_and_copies(kind, tmp_path):
    model, x = stir(peftlab.wrap(packed(kind), "lora", r=2, targets=["0", "2"])), rows()
    y = model(x)
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = packed(kind)
    fresh(x)
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), y)
    if kind != "hqq":  # a HQQLinear's state_dict leaves its children out
        other = peftlab.wrap(packed(kind), "lora", r=2, targets=["0", "2"])
        other(x)
        whole = "torchao" in kind  # bitsandbytes' layers do not load what they saved
        other.load_state_dict({k: t for k, t in model.state_dict().items() if whole or "peftlab" in k}, strict=whole)
        assert torch.equal(other(x), y)
    assert peftlab.plan(packed(kind), "lora", r=2, targets="*").trainable == 2 * 2 * (SIZE + SIZE)
    assert "Linear" in repr(peftlab.plan(packed(kind), "lora", r=2, targets="*"))
    assert "lora" in repr(peftlab.report(model))
    held = sum(u.numel() * u.element_size() for t in (*packed(kind).parameters(), *packed(kind).buffers()) for u in packed_parameters.inner_tensors(t))
    assert peftlab.estimate(packed(kind), "lora", r=2, targets="*").base_bytes == held
    assert peftlab.check(model, x).ok
    twins = []
    if kind != "hqq":  # its scales are no leaves of a graph, which deepcopy refuses
        twins = [copy.deepcopy(model), peftlab.shared_base_copy(model)]
    assert all(torch.equal(twin(x), y) for twin in twins)
    with peftlab.route(model, ["default", None, "default", None, None]):
        routed = model(x)
    with peftlab.disabled(model):
        off = model(x)
    assert close(routed[[0, 2]], y[[0, 2]]) and close(routed[[1, 3, 4]], off[[1, 3, 4]])


@pytest.mark.parametrize("kind", [k for k in KINDS if k == "subclass" or "torchao" in k])
def test_a_file_tells_wrapped_weights_from_dense_ones(kind, tmp_path):
    peftlab.save(peftlab.wrap(packed(kind), "lora", r=2, targets=["0", "2"]), tmp_path / "a.safetensors")
    with pytest.raises(peftlab.LoadError, match="'0.weight' holds other values"):
        peftlab.load(plain(), tmp_path / "a.safetensors")
    other = plain()
    with torch.no_grad():
        other[0].weight.neg_()
    other[0], other[2] = KINDS[kind](other[0]), KINDS[kind](other[2])
    with pytest.raises(peftlab.LoadError, match="'0.weight' holds other values"):
        peftlab.load(other, tmp_path / "a.safetensors")
    peftlab.load(decoded(packed(kind)), tmp_path / "a.safetensors")  # the same values, whatever holds them


def test_a_weight_that_changes_is_noticed():
    model = peftlab.wrap(packed("subclass"), "lora", r=2, targets=["0"])
    ledger = vars(model)["_peftlab_ledger"]
    W = model[2].weight
    assert not ledger.moved("2.weight", W)
    torch.autograd.graph.increment_version(W)
    assert not ledger.moved("2.weight", W)  # written to, with the same values
    W.codes.neg_()
    assert ledger.moved("2.weight", W)


def test_parameters_that_are_no_linears_weight():
    """A foreign weight in an embedding or a convolution has neither a call that a method may surround nor values: nothing fits there."""
    model = nn.ModuleDict({"table": nn.Embedding(12, 8), "conv": nn.Conv1d(4, 4, 3), "last": nn.Linear(8, 8)})
    for name in ("table", "conv"):
        model[name].weight = nn.Parameter(Eighths(model[name].weight.detach().to(torch.int8), torch.tensor(0.5)), requires_grad=False)
    for method in ("lora", "full", "bitfit"):
        with pytest.raises(peftlab.PatternError, match="'table'"):
            peftlab.plan(model, method, targets="table", **row_of(method).hyper)
        with pytest.raises(peftlab.PatternError, match=r"'conv\.weight'"):
            peftlab.plan(model, method, targets="conv.weight", **row_of(method).hyper)
    assert [r.path for r in peftlab.plan(model, "lora", r=2, targets="*").rows] == ["last"]
    peftlab.quantize(model, targets="*")
    assert list(peftlab.packed_weights(model)) == ["last.weight"]


def test_a_weight_that_its_parent_reads_is_refused():
    model = nn.TransformerEncoderLayer(SIZE, 2, SIZE, batch_first=True)
    wrapped(model.linear1), wrapped(model.self_attn.out_proj)
    for target in ("linear1", "out_proj"):
        with pytest.raises(ValueError, match=rf"{target}' is a .*Linear that only offers a call, and the module that holds it reads"):
            peftlab.wrap(model, "lora", r=2, targets=target)
    peftlab.wrap(model, "lora", r=2, targets="linear2")


# ---------------------------------------------------------------- calls without a backward


@pytest.mark.parametrize("make", [lambda linear: wrapped(linear, NoBackward), torchao("Int8DynamicActivationInt8WeightConfig")], ids=["subclass", "torchao"])
def test_a_lost_gradient_is_told(make):
    """Where the frozen call has no backward, what lies below it would train on a wrong gradient: the call raises instead."""
    x = rows()
    for method in ("lora", "houlsby", "bitfit"):
        model = peftlab.wrap(packed(make), method, targets=["0", "2"], **row_of(method).hyper)
        with pytest.raises(RuntimeError, match="Linear has no backward"):
            stir(model)(x)
        with torch.no_grad():
            model(x)
    model = stir(peftlab.wrap(packed(make), "lora", r=2, targets="2"))  # nothing below asks for a gradient
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("residual", [False, True])
def test_check_finds_a_frozen_layer_that_cuts_the_gradient(residual):
    """A layer without an adapter is not the library's: nothing raises, and with a way around it something even trains."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.wall, self.above = plain()[0], wrapped(plain()[0], NoBackward), plain()[2]

        def forward(self, x):
            h = self.below(x)
            return self.above(self.wall(h) + (h if residual else 0))

    model = stir(peftlab.wrap(Net(), "lora", r=2, targets=["below", "above"]))
    with pytest.raises(peftlab.CheckError, match=r"'below' \(lora 'default'\): 'wall', a Linear, has no backward") as e:
        peftlab.check(model, rows())
    assert [r.path for r in e.value.report.rows if not r.reached] == ["below"]
    assert not model.wall._forward_hooks
    model = stir(peftlab.wrap(Net(), "lora", r=2, targets="above"))
    assert peftlab.check(model, rows()).ok
