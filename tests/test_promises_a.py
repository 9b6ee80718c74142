"""What the library promises its users, rows 1 to 13, 15, 17, 19, 26 and 27: each test rebuilds a case that users of other libraries reported.

References are built here: W + dW is written out from the adapter's own numbers, never by merging and taking the merge back.
"""

# ruff: noqa: PT017, PT018 - several tests take either of two good outcomes, and many assertions are one statement in two halves

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import anywhere, place_or_skip
from oracles import ORACLES, canonical, raw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftlab
from peftlab.formats.file import read, write
from peftlab.registry import keywords, resolve

METHODS = [e.name for e in peftlab.methods(aliases=False) if e.name in anywhere()]
# Small sizes, given to every method that has an option of that name.
SMALL = {"r": 2, "init_r": 3, "n": 4, "density": 0.3, "ids": [1, 3], "n_tokens": 2, "dim": 2}


def small(method: str) -> dict:
    known = keywords(resolve(method)[0])
    return {k: v for k, v in SMALL.items() if k in known}


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()


class Block(nn.Module):
    def __init__(self, dim=8, names=("q_proj", "v_proj")):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(dim, dim))
        self.mlp = nn.Linear(dim, dim)

    def forward(self, x):
        for name, m in self.named_children():
            if name != "mlp":
                x = x + torch.tanh(m(x))
        return x + torch.tanh(self.mlp(x))


class Net(nn.Module):
    """A stack of blocks between an embedding and a head; a call takes token ids."""

    def __init__(self, depth=2, dim=8, vocab=11, classes=4):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def net(seed=0, **kw) -> Net:
    torch.manual_seed(seed)
    return Net(**kw)


def ids(seed=1):
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(seed))


def stir(model: nn.Module, scale=0.3, seed=0, name=None) -> nn.Module:
    """Noise on all trainable tensors, as if they had been trained."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.requires_grad and (name is None or name in path.split(".")):
                p.add_(torch.randn(p.shape, generator=gen, dtype=torch.float64).mul(scale).to(p.dtype))
    return model


def train(model: nn.Module, loss, steps=3, lr=0.1) -> None:
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        opt.zero_grad()
        loss(model).backward()
        opt.step()


def state(model: nn.Module) -> dict:
    """Everything that a call could change: bits, identities, flags, modes, classes, children, what is active and merged."""
    tensors = {k: (id(t), t.requires_grad, t.detach().clone()) for k, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    modules = {k: (id(m), type(m), m.training) for k, m in model.named_modules()}
    return {"tensors": tensors, "modules": modules, "active": peftlab.active(model)}


def assert_same_state(before: dict, after: dict, ids=True) -> None:
    assert before["tensors"].keys() == after["tensors"].keys()
    assert before["active"] == after["active"]
    for k, (ident, flag, value) in before["tensors"].items():
        other = after["tensors"][k]
        assert flag == other[1], k
        assert value.dtype == other[2].dtype and torch.equal(value, other[2]), k
        assert not ids or ident == other[0], k
    assert {k: v[1:] for k, v in before["modules"].items()} == {k: v[1:] for k, v in after["modules"].items()}


def flags(model: nn.Module) -> tuple[dict, dict]:
    """requires_grad of every tensor and training of every module."""
    params = {k: p.requires_grad for k, p in model.named_parameters(remove_duplicate=False)}
    return params, {k: m.training for k, m in model.named_modules()}


def delta(adapter: nn.Module, r=2, alpha=16.0) -> torch.Tensor:
    """dW of a LoRA, from its numbers."""
    return alpha / r * adapter.B.detach().double() @ adapter.A.detach().double()


def lora_of(module: nn.Module, name="default") -> nn.Module:
    return module.peftlab.get_submodule(name)


# ============================================================ row 1: load applies everything, or raises


@pytest.fixture
def saved(tmp_path):
    model = stir(peftlab.wrap(net(), "lora", r=2))
    path = tmp_path / "adapter.safetensors"
    peftlab.save(model, path)
    return model, path


def edited(path: Path, change) -> Path:
    """The file with other tensors, its checksums right: a whole file, as a tool that renames keys would write it."""
    header, tensors = read(path)
    out = path.with_name("edited.safetensors")
    write(out, change(tensors), header)
    return out


def test_promise_01_good_load_fills_every_tensor_bit_for_bit(saved):
    model, path = saved
    _, tensors = read(path)
    written = {k: p for k, p in model.named_parameters() if ".peftlab." in k}
    assert len(tensors) == len(written) == 2 * 6  # depth x (q, v, mlp) x (A, B)
    fresh = net()
    report = peftlab.load(fresh, path)
    assert report.tensors == len(written) and not report.unconsumed and not report.unfilled
    there = dict(fresh.named_parameters())
    assert all(torch.equal(there[k], p) and torch.equal(tensors[k], p) for k, p in written.items())
    assert torch.equal(fresh(ids()), model(ids())) and not torch.equal(fresh(ids()), net()(ids()))


KEY = "layers.1.q_proj.peftlab.default.A"
DAMAGES = {
    # a renamed key leaves one of each kind: the tensor nobody takes and the parameter nobody fills
    "renamed": (lambda ts: {k.replace(KEY, "layers.1.q_proj.peftlab.default.lora_A"): t for k, t in ts.items()}, 1, 1),
    "one missing": (lambda ts: {k: t for k, t in ts.items() if k != KEY}, 0, 1),
    "one too many": (lambda ts: {**ts, "layers.9.q_proj.peftlab.default.A": torch.ones(2, 8)}, 1, 0),
    "a stray tensor": (lambda ts: {**ts, "optimizer.step": torch.ones(1)}, 1, 0),
    "prefixed": (lambda ts: {f"base_model.model.{k}": t for k, t in ts.items()}, 12, 12),
    "another adapter's name": (lambda ts: {k.replace(".default.", ".other."): t for k, t in ts.items()}, 12, 12),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_promise_01_leftover_on_either_side_raises_with_both_lists(saved, damage):
    _, path = saved
    change, spare, empty = DAMAGES[damage]
    bad = edited(path, change)
    stored, needed = set(change(read(path)[1])), set(read(path)[1])
    fresh = net()
    before = state(fresh)
    with pytest.raises(peftlab.LoadError) as e:
        peftlab.load(fresh, bad)
    text = str(e.value)
    if spare:
        assert str(spare) in text and any(k in text for k in stored - needed), text
    if empty:
        assert str(empty) in text and any(k in text for k in needed - stored), text
    if spare and empty:  # the nearest name of each is among the other's
        assert "nearest" in text and "nearest: none" not in text
    assert_same_state(before, state(fresh))
    report = peftlab.load(net(), bad, strict=False)
    assert set(report.unconsumed) == stored - needed and set(report.unfilled) == needed - stored
    assert len(report.unconsumed) == spare and len(report.unfilled) == empty


def test_promise_01_nearest_name_is_the_right_one(saved):
    _, path = saved
    with pytest.raises(peftlab.LoadError, match=r"lora_A' \(nearest: 'layers\.1\.q_proj\.peftlab\.default\.A'\)"):
        peftlab.load(net(), edited(path, DAMAGES["renamed"][0]))


def test_promise_01_model_with_other_paths_raises_naming_the_place(saved):
    """diffusers#9950: the pipeline loads zero keys, and says nothing."""
    model, path = saved

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = net()

    outer = Outer()
    with pytest.raises(peftlab.LoadError, match=r"layers\.0\.q_proj.*does not have"):
        peftlab.load(outer, path)
    peftlab.load(outer.transformer, path)  # at the right place it is all there
    assert torch.equal(outer.transformer(ids()), model(ids()))


def test_promise_01_partly_applied_file_is_refused_when_a_layer_is_missing(saved):
    _, path = saved
    short = net(depth=1)
    before = state(short)
    with pytest.raises(peftlab.LoadError, match=r"layers\.1"):
        peftlab.load(short, path)
    assert_same_state(before, state(short))


def test_promise_01_trained_values_arrive_not_zeros(tmp_path):
    """openpi#958: trained B = 1.0 loads as 0.0 under a warning."""
    model = peftlab.wrap(net(), "lora", r=2)
    with torch.no_grad():
        for k, p in model.named_parameters():
            if k.endswith(".B"):
                p.fill_(1.0)
    peftlab.save(model, tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = net()
        peftlab.load(fresh, tmp_path / "a.safetensors")
    values = [p for k, p in fresh.named_parameters() if k.endswith(".B")]
    assert len(values) == 6 and all((p == 1).all() for p in values)


def test_promise_01_foreign_layout_is_never_a_quiet_base_model(tmp_path):
    """ST#3865: a file in another tool's layout; what comes out must be the trained model or an error."""
    peft = pytest.importorskip("peft")
    base = net()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path)
    found = next(p for p in tmp_path.iterdir() if p.suffix == ".safetensors")
    before = state(base)
    try:
        peftlab.load(base, found)
    except peftlab.LoadError as e:
        assert "HF peft" in str(e)
        assert_same_state(before, state(base))
    else:
        assert rel(base.eval()(ids()), theirs(ids())) < 1e-5


# ============================================================ row 2: the merged model is the trained model


def layer_cases(dtype):
    def x(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)

    tokens = torch.tensor([[1, 3, 0, 9], [2, 1, 8, 3]])
    return {
        "Linear": (lambda: nn.Linear(8, 6), x(3, 8)),
        "Linear without bias": (lambda: nn.Linear(6, 8, bias=False), x(2, 4, 6)),
        "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), x(2, 4, 7)),
        "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), x(2, 4, 6, 5)),
        "Conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), x(2, 4, 6, 5)),
        "Conv3d": (lambda: nn.Conv3d(2, 4, 2), x(1, 2, 3, 3, 3)),
        "ConvTranspose2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, stride=2), x(1, 4, 3, 3)),
        "Embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), tokens),
    }


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *x):
        return self.layer(*x)


def options(method, adapter) -> dict:
    """All options in force, defaults included."""
    return {k: p.default for k, p in keywords(resolve(method)[0]).items()} | adapter.recipe.hyper


def written_out(holder: nn.Module, method: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The adapted weight (raw layout) and bias of `holder.layer` in float64, from the paper's formula and the adapter's numbers."""
    layer = holder.layer
    adapters = {k: m for k, m in layer.peftlab.named_modules() if isinstance(m, peftlab.Method)}
    tensors = {}
    for key, m in adapters.items():
        part = key.partition(".")[2]
        found = {**dict(m.named_parameters()), **dict(m.named_buffers())}
        tensors |= {f"{part}.{k}" if part else k: t.detach().double() if t.is_floating_point() else t for k, t in found.items()}
    common = next(iter(adapters.values())).common
    if common is not None:
        common = {k: t.double() if t.is_floating_point() else t for k, t in [*common.named_parameters(), *common.named_buffers()]}
        if method == "vera":  # kept as (n_in, r); in the paper it is (r, n_in)
            common["A"] = common["A"].T
    clean = copy.deepcopy(layer).double()
    peftlab.unwrap(clean)
    b = None if getattr(clean, "bias", None) is None else clean.bias.detach()
    raw_method = any("." in k for k in adapters)
    W = clean.weight.detach() if raw_method else canonical(clean, clean.weight.detach())
    W2, b2 = ORACLES[method](W, b, tensors, options(method, next(iter(adapters.values()))), common)
    W2 = W2 if raw_method else raw(clean, W2)
    if getattr(clean, "padding_idx", None) is not None:  # the padding row belongs to the model
        W2 = torch.cat([W2[: clean.padding_idx], clean.weight.detach()[clean.padding_idx, None], W2[clean.padding_idx + 1 :]])
    return W2, b2


def plain_run(layer: nn.Module, W, b, x):
    clean = copy.deepcopy(layer).double()
    peftlab.unwrap(clean)
    clean.weight.data = W.reshape(clean.weight.shape).contiguous()
    if b is not None:
        clean.bias.data = b
    return clean(x.double() if x.is_floating_point() else x)


def try_wrap(holder, method, **kw):
    """Wrap the layer with every method that takes it; None where it is refused."""
    pattern = "layer" if resolve(method)[0].on != "tensor" else "layer.*"
    try:
        return peftlab.wrap(holder, method, targets=pattern, **small(method), **kw)
    except (peftlab.PatternError, ValueError):
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [m for m in METHODS if resolve(m)[0].defined()])
def test_promise_02_merged_is_the_trained_model_on_every_layer(method, dtype):
    bound, rounding = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-10, 1e-13), torch.bfloat16: (4e-2, 2**-8)}[dtype]
    done = []
    for kind, (build, x) in layer_cases(dtype).items():
        torch.manual_seed(0)
        holder = Holder(build().to(dtype))
        if try_wrap(holder, method) is None:
            continue
        stir(holder).eval()
        wrapped = holder(x)
        W, b = written_out(holder, method) if method in ORACLES else (None, None)
        report = peftlab.merge(holder)
        merged = holder(x)
        assert merged.dtype == wrapped.dtype == dtype
        assert rel(merged, wrapped) <= bound, kind
        assert report.layers == 1 and report.max_delta > 0, kind
        if W is not None:
            assert rel(merged, plain_run(holder.layer, W, b, x)) <= bound, kind
            # the merged tensor is the rounded sum, not a sum of rounded numbers
            assert rel(holder.layer.weight.detach().reshape(W.shape), W) <= rounding, kind
        done.append(kind)
    assert done, f"{method} sits on none of the layers"


@pytest.mark.parametrize("same_dim", [True, False])
def test_promise_02_multihead_attention_applies_out_proj_once(same_dim):
    """peft#3774: out_proj's delta acted twice after a merge: W + 2 dW matched to 6e-8, W + dW was off by 0.37."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **({} if same_dim else dict(kdim=6, vdim=4)))
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 4, 8 if same_dim else 6), torch.randn(2, 4, 8 if same_dim else 4)
    W0 = attention.out_proj.weight.detach().clone()
    model = nn.ModuleDict({"attn": attention})
    peftlab.wrap(model, "lora", targets="attn.out_proj", r=2)
    stir(model)
    reference = copy.deepcopy(attention)
    peftlab.unwrap(reference)
    dW = delta(lora_of(attention.out_proj)).float()
    with torch.no_grad():
        reference.out_proj.weight.copy_(W0 + dW)
    want = reference(q, k, v)[0]
    assert rel(attention(q, k, v)[0], want) < 1e-6
    peftlab.merge(model)
    assert rel(attention(q, k, v)[0], want) < 1e-6 and rel(attention.out_proj.weight, W0 + dW) < 1e-6


def test_promise_02_merge_and_unload_then_the_state_dict_of_a_plain_model():
    """unsloth#2009, #2142: the merged model that users export equals the base, or is garbage."""
    model = stir(peftlab.wrap(net(), "lora", r=2)).eval()
    want, base = model(ids()), net().eval()(ids())
    assert rel(want, base) > 0.01
    changed = {k: lora_of(m) for k, m in model.named_modules() if hasattr(m, "peftlab")}
    expected = {k: model.get_submodule(k).weight.detach().double() + delta(a) for k, a in changed.items()}
    report = peftlab.merge(model, unload=True)
    assert report.layers == len(expected) == 6
    plain = net(seed=5)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert rel(plain.eval()(ids()), want) < 1e-5
    assert all(rel(plain.get_submodule(k).weight, W) < 1e-6 for k, W in expected.items())
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules(), strict=True))


def test_promise_02_report_counts_layers_and_the_largest_change():
    model = peftlab.wrap(net(), "lora", r=2)
    with torch.no_grad():  # only two of six adapters have a change
        for path in ("layers.0.q_proj", "layers.1.mlp"):
            lora_of(model.get_submodule(path)).B.fill_(0.5)
    deltas = [delta(lora_of(model.get_submodule(p))).abs().max().item() for p in ("layers.0.q_proj", "layers.1.mlp")]
    report = peftlab.merge(model)
    assert report.layers == 2
    assert math.isclose(report.max_delta, max(deltas), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_promise_02_a_change_that_rounds_to_nothing_everywhere_raises(dtype):
    model = net().to(dtype)
    peftlab.wrap(model, "lora", r=2)
    with torch.no_grad():
        for k, p in model.named_parameters():
            if k.endswith(".B"):
                p.fill_(1e-9)
    before = state(model)
    with pytest.raises(ValueError, match=r"default.*changes no layer"):
        peftlab.merge(model)
    assert_same_state(before, state(model))


# ============================================================ row 3: gradient checkpointing with frozen inputs


class Checkpointed(nn.Module):
    """Frozen embedding, frozen blocks under checkpointing, and a head that goes on learning whatever happens."""

    def __init__(self, mode=None, attention=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) if attention else Block() for _ in range(2)])
        self.head = nn.Linear(8, 3)
        self.mode = mode
        self.input_grad = False

    def forward(self, ids):
        x = self.embed(ids)
        if self.input_grad:
            x.requires_grad_(True)
        for b in self.blocks:
            x = b(x) if self.mode is None else checkpoint(b, x, use_reentrant=self.mode == "reentrant")
        return self.head(x)


def adapter_grads(model) -> dict:
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}


def checkpoint_run(method, mode, attention=False, input_grad=False, **kw):
    model = Checkpointed(mode, attention)
    if attention:  # torch itself picks another attention kernel without gradients, so float32 would show its rounding
        model.double()
    model.input_grad = input_grad
    peftlab.wrap(model, method, **(small(method) | kw))
    peftlab.wrap(model, "full", targets="head.*", name="head")
    stir(model)
    model(ids()).square().mean().backward()
    return adapter_grads(model)


def in_blocks(method):
    pattern = "blocks.*" if resolve(method)[0].on == "tensor" else ["*.q_proj", "*.v_proj", "*.mlp"]
    return dict(targets=pattern)


BLOCK_METHODS = [m for m in METHODS if "ids" not in small(m) and resolve(m)[0].defined()]


@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_promise_03_gradients_are_those_without_checkpointing(method):
    """open-unlearning#178, transformers#26221: checkpointing must have no functional impact."""
    where = in_blocks(method)
    plain = checkpoint_run(method, None, **where)
    assert all(g is not None for g in plain.values()) and sum(bool((g != 0).any()) for g in plain.values()) > 1
    for mode, input_grad in (("non-reentrant", False), ("reentrant", True)):
        other = checkpoint_run(method, mode, input_grad=input_grad, **where)
        assert plain.keys() == other.keys()
        for k, g in plain.items():
            assert other[k] is not None, (mode, k)
            assert (other[k] - g).abs().max() <= 1e-6 * g.abs().max().clamp_min(1e-12), (mode, k)


@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_promise_03_reentrant_with_frozen_inputs_raises_naming_the_adapter(method):
    """Loss falls through the head while the adapters stand still: the step must raise instead."""
    with pytest.raises(RuntimeError, match=r"blocks\.0.*(?s:.*)no gradient|no gradient(?s:.*)blocks\.0"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint_run(method, "reentrant", **in_blocks(method))


@pytest.mark.parametrize("target", ["self_attn", "out_proj", "linear1", "linear2"])
def test_promise_03_weights_that_are_read_under_checkpointing(target):
    """Inside nn.TransformerEncoderLayer the weights are read, not called: the same promise holds."""
    run = lambda mode, ig=False: checkpoint_run("lora", mode, attention=True, input_grad=ig, targets=f"*.{target}")
    plain = run(None)
    for mode, ig in (("non-reentrant", False), ("reentrant", True)):
        other = run(mode, ig)
        assert all((other[k] - g).abs().max() <= 1e-6 * g.abs().max().clamp_min(1e-12) for k, g in plain.items())
    with pytest.raises(RuntimeError, match=r"blocks\.0"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run("reentrant")


def test_promise_03_evaluation_without_gradients_is_not_disturbed():
    model = Checkpointed()
    peftlab.wrap(model, "lora", r=2)
    with torch.no_grad():
        model(ids())  # train mode, no checkpointing, no gradients wanted
        model.eval()
        model(ids())


# ============================================================ row 4: no dead adapters


class ReadsWeight(nn.Module):
    """helicalAI/helical#405, Mamba's out_proj: a projection whose forward is never called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.out_proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.linear(torch.tanh(self.inner(x)), self.out_proj.weight, self.out_proj.bias))


def test_promise_04_check_names_every_adapter_that_is_not_reached():
    torch.manual_seed(0)
    model = peftlab.wrap(ReadsWeight(), "lora", r=2, targets=["inner", "out_proj"])
    with pytest.raises(peftlab.CheckError) as e:
        peftlab.check(model, torch.randn(4, 8))
    assert "out_proj" in str(e.value) and "'inner'" not in str(e.value)


@pytest.mark.parametrize("method", [m for m in METHODS if resolve(m)[0].defined() and resolve(m)[0].on == "matrix" and "ids" not in small(m)])
def test_promise_04_read_makes_the_adapter_act(method):
    torch.manual_seed(0)
    model, x = ReadsWeight(), torch.randn(4, 8)
    peftlab.wrap(model, method, targets="out_proj", read="out_proj", **small(method))
    stir(model)
    W, b = written_out(Holder(model.out_proj), method)
    want = model.head(F.linear(torch.tanh(model.inner(x)), W.float(), None if b is None else b.float()))
    got = model(x)
    assert rel(got, want) < 1e-5
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    peftlab.check(model, x)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "out_proj"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_promise_04_multihead_attention_acts_in_every_mode(part, need_weights, training):
    torch.manual_seed(0)
    attn, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    before = copy.deepcopy(attn)
    model = nn.ModuleDict({"attn": attn}).train(training)
    peftlab.wrap(model, "lora", targets=part, r=2)
    stir(model)
    adapter = lora_of(attn.out_proj) if part == "out_proj" else lora_of(attn, f"default.{part}")
    dW = delta(adapter).float()
    with torch.no_grad():
        if part == "out_proj":
            before.out_proj.weight += dW
        else:
            i = "qkv".index(part[0])
            before.in_proj_weight[8 * i : 8 * i + 8] += dW
    before.train(training)
    assert rel(attn(x, x, x, need_weights=need_weights)[0], before(x, x, x, need_weights=need_weights)[0]) < 1e-5
    if not training:  # the fused inference path is taken without gradients
        with torch.no_grad():
            assert rel(attn(x, x, x, need_weights=need_weights)[0], before(x, x, x, need_weights=need_weights)[0]) < 1e-5


@pytest.mark.parametrize("target", ["q_proj", "v_proj", "out_proj", "linear1", "linear2"])
def test_promise_04_encoder_layer_fast_path_sees_the_adapters(target):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    x = torch.randn(2, 5, 8)
    plain = copy.deepcopy(encoder)
    peftlab.wrap(encoder, "lora", targets=f"*.{target}", r=2)
    stir(encoder)
    with torch.no_grad():
        for a, b in zip(encoder.layers, plain.layers, strict=True):
            if target in ("q_proj", "v_proj"):
                i = "qkv".index(target[0])
                b.self_attn.in_proj_weight[8 * i : 8 * i + 8] += delta(lora_of(a.self_attn, f"default.{target}")).float()
            else:
                where = "self_attn.out_proj" if target == "out_proj" else target
                b.get_submodule(where).weight += delta(lora_of(a.get_submodule(where))).float()
    want = plain(x)
    assert rel(encoder(x), want) < 1e-5
    with torch.no_grad():
        encoder.eval(), plain.eval()
        assert rel(encoder(x), want) < 1e-5 and rel(plain(x), want) < 1e-5
    peftlab.check(encoder.train(), x)


# ============================================================ row 5: patterns that match nothing, a subset, or too much


class Uneven(nn.Module):
    """30 blocks, five of which have no v_proj."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(4, ("q_proj", "v_proj") if i % 6 else ("q_proj",)) for i in range(30)])
        self.lm_head = nn.Linear(4, 7)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.mark.parametrize("call", [peftlab.wrap, peftlab.plan])
@pytest.mark.parametrize("bad", ["qproj", "query_proj", "model.layers.*.q_projj", ["q_proj", "k_proj"], "layers.99.q_proj"])
def test_promise_05_a_pattern_without_match_raises_with_near_real_names(call, bad):
    """peft#1959, vllm#47088: an incorrect target must raise, and the error must be of use."""
    model = Uneven()
    before = state(model)
    with pytest.raises(peftlab.PatternError) as e:
        call(model, "lora", targets=bad, r=2)
    wrong = bad if isinstance(bad, str) else "k_proj"
    assert repr(wrong) in str(e.value)
    real = {k for k, _ in model.named_modules() if k}
    offered = [w.strip("',") for w in str(e.value).partition("Did you mean ")[2].partition("?")[0].split()]
    assert len(offered) == 3 and all(o in real for o in offered), str(e.value)
    if not isinstance(bad, str):
        assert "q_proj" in str(e.value).replace(wrong, "") and "30" in str(e.value)  # what the others matched
    assert_same_state(before, state(model))


@pytest.mark.parametrize("kw", [dict(exclude="k_proj"), dict(overrides={"k_proj": dict(r=4)}), dict(read="k_proj"), dict(layers=[0], of="decoder")])
def test_promise_05_exclusions_and_overrides_must_match_too(kw):
    """peft#3582: a rank pattern that matches nothing."""
    with pytest.raises(peftlab.PatternError, match="k_proj|decoder"):
        peftlab.wrap(Uneven(), "lora", r=2, **kw)


def test_promise_05_plan_counts_matches_and_changes_nothing():
    """peft#3658: target modules that match a subset of the layers."""
    model = Uneven()
    before = state(model)
    plan = peftlab.plan(model, "lora", targets=["q_proj", "v_proj"], r=3, overrides={"layers.3.q_proj": dict(r=2)})
    assert_same_state(before, state(model))
    assert plan.counts == {"q_proj": 30, "v_proj": 25}
    assert "q_proj" in repr(plan) and "30" in repr(plan) and "25" in repr(plan)
    assert len(plan.rows) == 55 and plan.method == "lora"
    ranks = {row.path: row.options["r"] for row in plan.rows}
    assert ranks["layers.3.q_proj"] == 2 and ranks["layers.4.q_proj"] == 3
    assert all(row.shape == (4, 4) and row.trainable == ranks[row.path] * 8 for row in plan.rows)
    peftlab.wrap(model, "lora", targets=["q_proj", "v_proj"], r=3, overrides={"layers.3.q_proj": dict(r=2)})
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == 54 * 24 + 16


def test_promise_05_plan_shows_the_rank_that_a_default_gives():
    plan = peftlab.plan(net(dim=16), "lora")
    assert {row.options["r"] for row in plan.rows} == {8}


def test_promise_05_all_linear_by_default_but_not_the_head():
    """peft#2877: "all-linear" took lm_head."""
    paths = {row.path for row in peftlab.plan(Uneven(), "lora", r=2).rows}
    assert "lm_head" not in paths and len(paths) == 30 + 25 + 30
    assert {row.path for row in peftlab.plan(net(), "lora", r=2).rows} == {f"layers.{i}.{p}" for i in (0, 1) for p in ("q_proj", "v_proj", "mlp")}


def test_promise_05_named_embedding_and_head_are_not_dropped():
    """unsloth#9326: embed_tokens and lm_head are asked for and silently left out."""
    rows = peftlab.plan(net(), "lora", targets=["embed", "head", "q_proj"], r=2).rows
    assert {r.path for r in rows} == {"embed", "head", "layers.0.q_proj", "layers.1.q_proj"}


def test_promise_05_names_are_whole_components():
    model = nn.ModuleDict({k: nn.Linear(4, 4) for k in ("q_proj", "my_q_proj", "q_proj2")})
    model["block"] = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    assert {r.path for r in peftlab.plan(model, "lora", targets="q_proj", r=2).rows} == {"q_proj", "block.q_proj"}


# ============================================================ row 6: tied and shared weights


class TiedLM(nn.Module):
    def __init__(self, how="parameter", bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=bias)
        if how == "parameter":
            self.head.weight = self.embed.weight
        elif how == "storage":  # another Parameter object over the same memory
            self.head.weight = nn.Parameter(self.embed.weight.data)
        elif how == "view":
            self.head.weight = nn.Parameter(self.embed.weight.detach().view(11, 8))

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


@pytest.mark.parametrize("how", ["parameter", "storage", "view"])
@pytest.mark.parametrize("target", ["embed", "head"])
def test_promise_06_a_tie_is_found_by_storage_and_needs_a_choice(how, target):
    """peft#2864, transformers#45127."""
    model = TiedLM(how)
    before = state(model)
    with pytest.raises(ValueError, match=r"(?s)embed\.weight.*tie|head\.weight.*tie") as e:
        peftlab.wrap(model, "lora", targets=target, r=2)
    assert "embed.weight" in str(e.value) and "head.weight" in str(e.value) and "'share'" in str(e.value) and "'untie'" in str(e.value)
    assert_same_state(before, state(model))
    peftlab.wrap(model, "lora", targets="body", r=2)  # a tie that is not touched is nobody's business


@pytest.mark.parametrize("how", ["parameter", "storage"])
@pytest.mark.parametrize("target", ["embed", "head", ["embed", "head"]], ids=str)
@pytest.mark.parametrize("tie", ["share", "untie"])
def test_promise_06_merged_is_wrapped_and_reloaded_is_merged(how, target, tie, tmp_path):
    model = TiedLM(how)
    W0 = model.embed.weight.detach().clone()
    peftlab.wrap(model, "lora", targets=target, r=2, tie=tie)
    stir(model).eval()
    wrapped = model(ids())
    # the reference: both ends see the change under "share", the targeted ends under "untie"
    E, H = W0.double(), W0.double()
    for m, name in ((model.embed, "embed"), (model.head, "head")):
        if hasattr(m, "peftlab") and "default" in m.peftlab._modules:
            a = lora_of(m)
            dW = delta(a).T if name == "embed" else delta(a)
            if tie == "share":
                E, H = E + dW, H + dW
            else:
                E, H = (E + dW, H) if name == "embed" else (E, H + dW)
    body = copy.deepcopy(model.body).double()
    want = F.linear(torch.tanh(body(F.embedding(ids(), E))), H)
    assert rel(wrapped, want) < 1e-5
    path = tmp_path / "tied.safetensors"
    peftlab.save(model, path)
    peftlab.merge(model)
    assert rel(model(ids()), want) < 1e-5
    if tie == "untie" and isinstance(target, str):
        other = model.head if target == "embed" else model.embed
        assert torch.equal(other.weight, W0)  # a merge into one end does not change the other
    fresh = TiedLM(how).eval()
    peftlab.load(fresh, path)
    assert torch.equal(fresh(ids()), wrapped)
    peftlab.merge(fresh)
    assert torch.equal(fresh(ids()), model(ids()))
    peftlab.unmerge(model)
    assert torch.equal(model(ids()), wrapped)
    peftlab.unwrap(model)
    assert torch.equal(model(ids()), TiedLM(how).eval()(ids())) and model.head.weight.data_ptr() == model.embed.weight.data_ptr()


def test_promise_06_trained_head_of_a_tied_model_survives_the_reload(tmp_path):
    """unsloth#3711, #9331: the trained head is lost on reload, or the embedding is trained along."""
    model = TiedLM()
    peftlab.wrap(model, "lora", targets="body", r=2)
    peftlab.wrap(model, "full", targets="head.weight", name="head", tie="untie")
    target = torch.randint(0, 11, (3, 5))
    train(model, lambda m: F.cross_entropy(m(ids()).flatten(0, 1), target.flatten()))
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = TiedLM()
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(ids()), model(ids())) and not torch.equal(model(ids()), TiedLM()(ids()))
    assert torch.equal(fresh.embed.weight, TiedLM().embed.weight)


def test_promise_06_one_module_at_two_paths_has_one_wrapper():
    """peft#2972: the second path stayed plain; the output changed by 14 % after the merge."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(8, 8)
            self.second = self.first
            self.nested = nn.ModuleList([nn.Linear(8, 8), self.first])

        def forward(self, x):
            return self.nested[1](torch.tanh(self.second(torch.tanh(self.first(x)))))

    for target in ("first", "second", "nested.1", ["first", "second"]):
        model, x = Twice(), torch.randn(4, 8)
        peftlab.wrap(model, "lora", targets=target, r=2)
        stir(model).eval()
        assert model.first is model.second is model.nested[1]
        W = model.first.weight.detach().double() + delta(lora_of(model.first))
        f = lambda h: F.linear(h, W, model.first.bias.double())
        want = f(torch.tanh(f(torch.tanh(f(x.double())))))
        assert rel(model(x), want) < 1e-5
        assert sum(p.requires_grad for p in model.parameters()) == 2
        peftlab.merge(model)
        assert rel(model(x), want) < 1e-5


# ============================================================ row 7: everything that was trained is in the file


class Everything(nn.Module):
    """One of each: embedding, convolution, BatchNorm, linear layers, LayerNorm, head; a call takes token ids."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.block = Block()
        self.ln = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = torch.tanh(self.bn(self.conv(self.embed(ids).transpose(1, 2)))).transpose(1, 2)
        return self.head(self.ln(self.block(x)))


def loss_on_ids(model):
    return model(ids()).square().mean() + model(ids(2)).sin().mean()


@pytest.mark.parametrize("method", METHODS)
def test_promise_07_heads_norms_biases_and_batchnorm_come_back(method, tmp_path):
    """transformers#48595, peft#602, #1732 (0.59 off after reload): on a fresh base the outputs are equal to the bit."""
    model = Everything()
    place_or_skip(method, model, exclude=["head", "ln"], **small(method))
    peftlab.wrap(model, method, exclude=["head", "ln"], **small(method))
    peftlab.wrap(model, "full", targets=["head.*", "ln.*"], name="trained")
    model.train()
    train(model, loss_on_ids, lr=0.2)
    path = tmp_path / "all.safetensors"
    report = peftlab.save(model, path)
    plain = Everything().eval()
    assert not torch.equal(plain.bn.running_mean, model.bn.running_mean)
    want = model.eval()(ids())
    fresh = Everything()
    peftlab.load(fresh, path)
    assert torch.equal(fresh.eval()(ids()), want) and not torch.equal(plain(ids()), want)
    assert torch.equal(fresh.bn.running_var, model.bn.running_var) and fresh.bn.num_batches_tracked == model.bn.num_batches_tracked
    assert {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"} <= report.other.keys()
    # exactly what was trained, and what changed, is in the file (persistent buffers of the methods themselves aside)
    names = {k for k, p in model.named_parameters() if p.requires_grad} | set(report.other)
    assert names <= set(read(path)[1]) and all(".peftlab." in k or "peftlab_shared" in k for k in set(read(path)[1]) - names)


def test_promise_07_bias_training_with_lora_comes_back(tmp_path):
    """peft#3306, #3369: bias="lora_only"."""
    for kind in (dict(method="lora", r=2, bias=True), dict(method="bitfit")):
        model = peftlab.wrap(Everything(), **kind)
        train(model.eval(), loss_on_ids)
        peftlab.save(model, tmp_path / "b.safetensors")
        fresh = Everything().eval()
        peftlab.load(fresh, tmp_path / "b.safetensors")
        assert torch.equal(fresh(ids()), model(ids())) and not torch.equal(fresh(ids()), Everything().eval()(ids()))


def test_promise_07_a_trained_base_tensor_that_nobody_saves_raises(tmp_path):
    model = peftlab.wrap(Everything(), "lora", r=2)
    model.head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"head\.weight"):
        peftlab.save(model, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    train(model.eval(), loss_on_ids)
    peftlab.save(model, tmp_path / "x.safetensors", include="head")
    fresh = Everything().eval()
    report = peftlab.load(fresh, tmp_path / "x.safetensors")
    assert torch.equal(fresh(ids()), model(ids())) and set(report.replaced) == {"head.weight", "head.bias"}


def test_promise_07_trained_and_frozen_again_is_still_trained(tmp_path):
    """Whatever required grad: freezing the head before saving does not make it untrained."""
    model = peftlab.wrap(Everything(), "lora", r=2).eval()
    model.head.requires_grad_(True)
    train(model, loss_on_ids)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"head\.(weight|bias)"):
        peftlab.save(model, tmp_path / "x.safetensors")
    peftlab.save(model, tmp_path / "x.safetensors", include="head.*")
    fresh = Everything().eval()
    peftlab.load(fresh, tmp_path / "x.safetensors")
    fresh.requires_grad_(False)  # torch's own kernels differ by the flag in the last bit
    assert torch.equal(fresh(ids()), model(ids()))


@pytest.mark.parametrize("size", [7, (1 << 20) + 3])
def test_promise_07_a_buffer_that_changed_is_saved_or_named(size, tmp_path):
    model = Everything()
    model.register_buffer("counts", torch.zeros(size))
    peftlab.wrap(model, "lora", r=2)
    model.counts[size // 2 : size // 2 + 2] += 1  # a few entries of it
    try:
        report = peftlab.save(model, tmp_path / "x.safetensors")
    except ValueError as e:
        assert "counts" in str(e)
    else:
        assert "counts" in report.other
        fresh = Everything()
        fresh.register_buffer("counts", torch.zeros(size))
        peftlab.load(fresh, tmp_path / "x.safetensors")
        assert torch.equal(fresh.counts, model.counts)


# ============================================================ row 8: the state machine


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


KINDS = [
    ("lora", dict(targets=["a", "b"], r=2)),
    ("lora", dict(targets="b", r=3)),
    ("ia3", dict(targets="a")),
    ("dora", dict(targets=["a", "b"], r=2)),
    ("full", dict(targets="b.weight")),
    ("oft", dict(targets="b", block_size=3)),
]


def declared(model: Two, order, active) -> torch.Tensor:
    """The output that the declared active set means: the papers' formulas, one on top of the other, in float64."""
    clean = Two()
    x = probe()
    for host, after in (("a", torch.tanh), ("b", None)):
        layer, W, b = model.get_submodule(host), clean.get_submodule(host).weight.detach(), clean.get_submodule(host).bias.detach()
        W0 = W
        for name in order:
            methods = layer.peftlab._modules.get(name) if hasattr(layer, "peftlab") else None
            if name not in active or methods is None:
                continue
            for m in [m for m in methods.modules() if isinstance(m, peftlab.Method)]:
                t = {**dict(m.named_parameters()), **dict(m.named_buffers())}
                t = {k: v.detach().double() if v.is_floating_point() else v for k, v in t.items()}
                label = m.recipe.label
                if label == "full":
                    W = t["C"] + (W - W0)
                else:
                    W, b = ORACLES[label](W, b, t, options(label, m), None)
        x = F.linear(x, W, b)
        x = x if after is None else after(x)
    return x


def probe():
    return torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5)


@pytest.mark.parametrize("seed", range(24))
def test_promise_08_any_sequence_of_operations_equals_the_declared_set(seed, tmp_path):
    import random

    rnd = random.Random(seed)
    model, order, active, files, n = Two(), [], [], {}, 0
    path = tmp_path / "s.safetensors"
    base = Two()(probe())
    refused = 0

    def subset(names, least=0):
        return [n for n in names if rnd.random() < 0.6] or rnd.sample(names, min(least, len(names)))

    for step in range(18):
        op = rnd.choice(["add", "add", "activate", "disable", "merge", "merge", "unmerge", "swap", "delete", "save", "file", "broken", "poison"])
        before = state(model)
        try:
            if op == "add" and len(order) < 4:
                method, kw = rnd.choice(KINDS)
                peftlab.wrap(model, method, name=f"n{n}", **kw)
                order.append(f"n{n}")
                active.append(f"n{n}")
                stir(model, 0.4, seed=step, name=f"n{n}")
                n += 1
            elif op == "activate" and order:
                chosen = subset(order)
                peftlab.activate(model, chosen)
                active = [a for a in order if a in chosen]
            elif op == "disable" and order:
                with peftlab.disabled(model):
                    assert torch.equal(model(probe()), base)
                assert_same_state(before, state(model))
            elif op == "merge" and active:
                peftlab.merge(model, subset(active, 1))
            elif op == "unmerge" and order:
                peftlab.unmerge(model, subset(order, 1))
            elif op == "swap" and files:
                name = rnd.choice(list(files))
                if name in order:
                    peftlab.load(model, files[name])
            elif op == "delete" and order:
                name = rnd.choice(order)
                peftlab.unwrap(model, name)
                order.remove(name)
                files.pop(name, None)
                active = [a for a in active if a != name]
            elif op == "file" and order:
                name = rnd.choice(order)
                files[name] = tmp_path / f"{name}-{step}.safetensors"
                peftlab.save(model, files[name], name)
            elif op == "save" and order:
                peftlab.save(model, path)
                fresh = Two()
                peftlab.load(fresh, path)
                assert peftlab.active(fresh) == active
                assert rel(fresh(probe()), declared(model, order, active)) < 1e-10
                assert_same_state(before, state(model))
            elif op == "broken":
                call = rnd.choice([
                    lambda: peftlab.merge(model, "nobody"), lambda: peftlab.activate(model, ["nobody"]), lambda: peftlab.unmerge(model, "nobody"),
                    lambda: peftlab.wrap(model, "lora", r=99, name="big"), lambda: peftlab.unwrap(model, "nobody"),
                    lambda: peftlab.wrap(model, "lora", r=2, targets=["a", "z"], name="z"),
                ])  # fmt: skip
                with pytest.raises((ValueError, TypeError)):
                    call()
                assert_same_state(before, state(model))
            elif op == "poison" and active:  # peft#3710: a merge that fails half-way
                open_ = [p for k, p in model.named_parameters() if p.requires_grad and any(f".peftlab.{a}." in k for a in active)]
                if open_:
                    p = rnd.choice(open_)
                    kept, place = p.detach().clone(), rnd.randrange(p.numel())
                    p.data.view(-1)[place] = float("nan")
                    before = state(model)
                    try:
                        peftlab.merge(model)
                    except ValueError:
                        assert_same_nan_state(before, state(model))
                    p.data.copy_(kept)
        except ValueError as e:  # an order that does not commute: refused, and nothing has moved
            assert op in ("merge", "unmerge", "activate", "swap", "delete", "add"), (op, e)
            assert_same_state(before, state(model))
            refused += 1
        assert peftlab.active(model) == active
        assert rel(model(probe()), declared(model, order, active)) < 1e-10, (seed, step, op)
    if order:
        peftlab.unwrap(model)
    assert torch.equal(model(probe()), base) and type(model.a) is nn.Linear


def assert_same_nan_state(before, after):
    for part in (before, after):
        for k, (i, flag, t) in part["tensors"].items():
            part["tensors"][k] = (i, flag, torch.nan_to_num(t, nan=1e30))
    assert_same_state(before, after)


def test_promise_08_merging_a_subset_leaves_the_rest_acting():
    """peft#3756."""
    model = Two()
    for name in ("x", "y", "z"):
        peftlab.wrap(model, "lora", r=2, targets=["a", "b"], name=name)
    stir(model)
    want = declared(model, ["x", "y", "z"], ["x", "y", "z"])
    peftlab.merge(model, "y")
    assert rel(model(probe()), want) < 1e-10 and peftlab.active(model) == ["x", "y", "z"]
    peftlab.activate(model, ["x", "y"])
    assert rel(model(probe()), declared(model, ["x", "y", "z"], ["x", "y"])) < 1e-10


@pytest.mark.parametrize("how", ["load", "restore"])
def test_promise_08_new_values_for_a_merged_adapter_are_not_ignored(how, tmp_path):
    """peft#3581: hot-swapping a merged adapter did nothing."""
    donor = stir(peftlab.wrap(Two(), "lora", targets=["a", "b"], r=2), seed=1)
    peftlab.save(donor, tmp_path / "d.safetensors")
    model = stir(peftlab.wrap(Two(), "lora", targets=["a", "b"], r=2), seed=2)
    old = model(probe())
    peftlab.merge(model)
    before = state(model)
    try:
        peftlab.load(model, tmp_path / "d.safetensors") if how == "load" else peftlab.restore(model, peftlab.snapshot(donor))
    except ValueError as e:
        assert "merged" in str(e) and "default" in str(e)
        assert_same_state(before, state(model))
        assert rel(model(probe()), old) < 1e-12
    else:
        assert rel(model(probe()), donor(probe())) < 1e-10


def test_promise_08_deleting_a_merged_adapter_leaves_the_base():
    """peft#3498."""
    model = Two()
    peftlab.wrap(model, "lora", r=2, targets="a", name="x")
    peftlab.wrap(model, "lora", r=2, targets="a", name="y")
    stir(model)
    peftlab.merge(model)
    peftlab.unwrap(model, "x")
    assert rel(model(probe()), declared(model, ["y"], ["y"])) < 1e-10
    peftlab.unwrap(model)
    assert torch.equal(model(probe()), Two()(probe()))


@pytest.mark.parametrize("method", [m for m in METHODS if resolve(m)[0].defined() and resolve(m)[0].on == "matrix" and "ids" not in small(m)])
def test_promise_08_a_merge_that_fails_leaves_nothing_half_written(method):
    """peft#3710: the second of two layers is bad, the first is written already."""
    model = peftlab.wrap(Two(), method, targets=["a", "b"], **small(method))
    stir(model)
    with torch.no_grad():
        p = next(p for k, p in model.named_parameters() if k.startswith("b.peftlab"))
        p.view(-1)[0] = float("inf")
    before = state(model)
    with pytest.raises(ValueError, match=r"non-finite.*'b\.(weight|bias)'|'b\.(weight|bias)'.*finite"):
        peftlab.merge(model)
    assert_same_nan_state(before, state(model))
    assert torch.equal(model.a.weight, Two().a.weight) and torch.equal(model.b.weight, Two().b.weight)


# ============================================================ row 9: merge and unmerge, a thousand times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_promise_09_a_thousand_cycles_leave_the_base_bits(dtype):
    """trl#6688: 67 % drift after 1,000 cycles in bf16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).to(dtype)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    peftlab.wrap(model, "lora", r=2, targets=["0", "1"])
    stir(model, 1.0)
    wrapped = model(torch.ones(1, 16, dtype=dtype))
    for i in range(1000):
        report = peftlab.merge(model)
        if i == 0:
            assert not torch.equal(model[0].weight, start["0.weight"])
            assert report.kept_bytes == sum(start[f"{j}.weight"].nbytes for j in (0, 1))  # its memory cost is shown
            assert f"{report.kept_bytes:,}" in repr(report)
        peftlab.unmerge(model)
    assert all(torch.equal(model.state_dict()[k], v) and model.state_dict()[k].dtype == v.dtype for k, v in start.items())
    assert torch.equal(model(torch.ones(1, 16, dtype=dtype)), wrapped)


def test_promise_09_the_lossy_mode_must_be_asked_for():
    model = stir(peftlab.wrap(Two(), "lora", r=2, targets=["a", "b"]))
    want = model(probe())
    report = peftlab.merge(model, keep=False)
    assert report.kept_bytes == 0 and rel(model(probe()), want) < 1e-12
    before = state(model)
    with pytest.raises(ValueError, match="keep=False"):
        peftlab.unmerge(model)
    with pytest.raises(ValueError, match="keep=False"), peftlab.disabled(model):
        pass
    assert_same_state(before, state(model))


# ============================================================ row 10: flags stay what they were


def flagged(tmp_path):
    """A model whose flags are as mixed as a user's: one adapter frozen, one trains; one block evaluates, another trains."""
    model = net()
    model.train()
    model.layers[0].eval()
    peftlab.wrap(model, "lora", r=2, name="one", dropout=0.5)
    peftlab.wrap(model, "ia3", targets="q_proj", name="two")
    peftlab.wrap(model, "full", targets="head.*", name="head")
    stir(model)
    path = tmp_path / "f.safetensors"
    peftlab.save(model, path)
    peftlab.freeze(model, "two")
    # by hand, too: half of an adapter
    lora_of(model.layers[1].mlp, "one").A.requires_grad_(False)
    return model, path


def checked(model):
    peftlab.check(model, ids())


CALLS = {
    "plan": lambda m, p: peftlab.plan(m, "lora", name="new"),
    "report": lambda m, p: repr(peftlab.report(m)),
    "methods": lambda m, p: peftlab.methods(),
    "estimate": lambda m, p: peftlab.estimate(m, "lora", name="new"),
    "active": lambda m, p: peftlab.active(m),
    "activate": lambda m, p: peftlab.activate(m, ["two"]),
    "activate none": lambda m, p: peftlab.activate(m, None),
    "disabled": lambda m, p: with_(peftlab.disabled(m), lambda: m(ids())),
    "using": lambda m, p: with_(peftlab.using(m, "two"), lambda: m(ids())),
    "merge": lambda m, p: peftlab.merge(m),
    "merge, unmerge": lambda m, p: (peftlab.merge(m), peftlab.unmerge(m)),
    "merge, activate": lambda m, p: (peftlab.merge(m), peftlab.activate(m, "one")),
    "merge, disabled": lambda m, p: (peftlab.merge(m), with_(peftlab.disabled(m), lambda: m(ids()))),
    "merge, using": lambda m, p: (peftlab.merge(m), with_(peftlab.using(m, "one"), lambda: m(ids()))),
    "save": lambda m, p: peftlab.save(m, p.with_name("again.safetensors")),
    "load over": lambda m, p: peftlab.load(m, p),
    "snapshot": lambda m, p: peftlab.restore(m, peftlab.snapshot(m)),
    "ema_update": lambda m, p: peftlab.ema_update(peftlab.snapshot(m), m, 0.9),
    "view": lambda m, p: peftlab.shared_base_copy(m),
    "deepcopy": lambda m, p: copy.deepcopy(m),
    "param_groups": lambda m, p: peftlab.param_groups(m, lr=1e-3),
    "schedule": lambda m, p: peftlab.schedule(m, torch.optim.SGD([q for q in m.parameters() if q.requires_grad], lr=0.1), total_steps=5),
    "check": lambda m, p: checked(m),
    "forward and backward": lambda m, p: m(ids()).sum().backward(),
}


def with_(context, call):
    with context:
        return call()


@pytest.mark.parametrize("call", CALLS)
def test_promise_10_no_call_changes_a_flag(call, tmp_path):
    """peft#3447: disable_adapter() unfreezes; #3487, #3580: loading one adapter flips another."""
    model, path = flagged(tmp_path)
    before = flags(model)
    try:
        CALLS[call](model, path)
    except peftlab.CheckError:
        pass  # half-frozen adapters may well be complained of; the flags stay all the same
    assert flags(model) == before


@pytest.mark.parametrize("call", ["wrap", "load", "unwrap", "merge and unload"])
def test_promise_10_calls_that_add_or_remove_leave_the_others_alone(call, tmp_path):
    model, path = flagged(tmp_path)
    params, modules = flags(model)
    if call == "wrap":
        peftlab.wrap(model, "lora", r=2, name="new")
    elif call == "load":
        peftlab.load(model, path, names={"one": "uno", "two": "due"})
    elif call == "unwrap":
        peftlab.unwrap(model, "head")
    else:
        peftlab.merge(model, "head", unload=True)
    params2, modules2 = flags(model)
    assert all(params2[k] == v for k, v in params.items() if k in params2) and all(modules2[k] == v for k, v in modules.items() if k in modules2)
    assert len(params2) != len(params)
    for k, m in model.named_modules():  # what is new has the mode of what it wraps
        if hasattr(m, "peftlab"):
            assert {c.training for c in m.peftlab.modules()} == {m.training}, k


def test_promise_10_freeze_unfreeze_and_train_only_change_what_they_say(tmp_path):
    model, _ = flagged(tmp_path)
    of = lambda name: {p.requires_grad for k, p in model.named_parameters() if f".peftlab.{name}." in k}
    base = lambda: {p.requires_grad for k, p in model.named_parameters() if ".peftlab." not in k}
    modes = flags(model)[1]
    peftlab.unfreeze(model, "two")
    assert of("two") == {True}
    peftlab.freeze(model, "one")
    assert of("one") == {False} and of("two") == {True} and of("head") == {True}
    peftlab.train_only(model, "one")
    assert of("one") == {True} and of("two") == of("head") == base() == {False}
    assert flags(model)[1] == modes


@pytest.mark.parametrize("method", [m for m in METHODS if "dropout" in keywords(resolve(m)[0])])
def test_promise_10_a_model_in_eval_mode_stays_deterministic(method):
    """peft#3753: wrapping an .eval() model turned dropout on."""
    model = net().eval()
    peftlab.wrap(model, method, **small(method) | dict(dropout=0.5))
    stir(model)
    assert torch.equal(model(ids()), model(ids()))
    model.train()
    assert not torch.equal(model(ids()), model(ids()))
    model.eval()
    assert torch.equal(model(ids()), model(ids()))


def test_promise_10_a_frozen_batchnorm_in_a_training_model_stays_in_eval():
    model = Everything().train()
    model.bn.eval()
    peftlab.wrap(model, "bitfit")
    assert not model.bn.training and {m.training for m in model.bn.modules()} == {False} and {m.training for m in model.conv.modules()} == {True}


def test_promise_10_unwrap_puts_the_original_flags_back():
    model = net()
    model.embed.requires_grad_(False)
    model.layers[1].eval()
    before = flags(model)
    peftlab.wrap(model, "lora", r=2)
    peftlab.wrap(model, "full", targets="head.*", name="head")
    peftlab.unwrap(model)
    assert flags(model) == before


# ============================================================ row 11: training ran and weights moved


@pytest.mark.parametrize("call", ["to dtype", "to device", "train", "load", "activate", "merge", "using", "save"])
def test_promise_11_parameters_keep_their_identity(call, tmp_path):
    """peft#3409, opacus#820: the optimizer holds stale references, and training does nothing for five months."""
    model = stir(peftlab.wrap(net(), "lora", r=2))
    peftlab.wrap(model, "full", targets="head.*", name="head")
    path = tmp_path / "a.safetensors"
    peftlab.save(model, path)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = {k: id(p) for k, p in model.named_parameters()}
    {
        "to dtype": lambda: model.to(torch.float64), "to device": lambda: model.to("cpu"), "train": lambda: (model.eval(), model.train()),
        "load": lambda: peftlab.load(model, path), "activate": lambda: (peftlab.activate(model, []), peftlab.activate(model, ["default", "head"])),
        "merge": lambda: (peftlab.merge(model), peftlab.unmerge(model)), "using": lambda: with_(peftlab.using(model, "head"), lambda: model(ids())),
        "save": lambda: peftlab.save(model, path),
    }[call]()  # fmt: skip
    assert {k: id(p) for k, p in model.named_parameters()} == before
    values = {k: p.detach().clone() for k, p in model.named_parameters()}
    model(ids()).square().mean().backward()
    opt.step()
    for k, p in model.named_parameters():  # the optimizer made before still trains what acts now
        assert torch.equal(p, values[k]) != p.requires_grad, k


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_promise_11_load_says_whether_the_adapter_trains(trainable, there, tmp_path):
    """peft#1340: loaded frozen by default; unsloth-zoo#939: the reload trains the whole base."""
    donor = stir(peftlab.wrap(net(), "lora", r=2))
    peftlab.save(donor, tmp_path / "a.safetensors")
    model = peftlab.wrap(net(), "lora", r=2) if there else net()
    try:
        report = peftlab.load(model, tmp_path / "a.safetensors", trainable=trainable)
    except ValueError:
        assert there  # flags of what exists are the user's; refusing to change them is fine, ignoring the word is not
        return
    training = {k for k, p in model.named_parameters() if p.requires_grad}
    assert report.trainable == trainable == bool(training)
    assert ("trainable" if trainable else "frozen") in repr(report)
    assert all(".peftlab." in k for k in training)


def test_promise_11_load_without_the_word_reports_what_is_true(tmp_path):
    donor = stir(peftlab.wrap(net(), "lora", r=2))
    peftlab.save(donor, tmp_path / "a.safetensors")
    for prepare in (lambda m: m, lambda m: peftlab.wrap(m, "lora", r=2), lambda m: (peftlab.wrap(m, "lora", r=2), peftlab.freeze(m))):
        model = net()
        prepare(model)
        report = peftlab.load(model, tmp_path / "a.safetensors")
        assert report.trainable == any(p.requires_grad for k, p in model.named_parameters() if ".peftlab." in k)
        assert not any(p.requires_grad for k, p in model.named_parameters() if ".peftlab." not in k) or "peftlab" not in repr(report)


def test_promise_11_loaded_adapter_trains_and_nothing_else_does(tmp_path):
    donor = stir(peftlab.wrap(net(), "lora", r=2))
    peftlab.save(donor, tmp_path / "a.safetensors")
    model = net()
    peftlab.load(model, tmp_path / "a.safetensors", trainable=True)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    train(model, loss_on_ids)
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved == {k for k in before if ".peftlab." in k}


def watched(model, steps=3, lr=0.1):
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    peftlab.watch(model, opt, steps=steps)
    for _ in range(steps):
        opt.zero_grad()
        loss_on_ids(model).backward()
        opt.step()


def test_promise_11_watch_is_quiet_while_everything_moves():
    watched(peftlab.wrap(net(), "lora", r=2))
    watched(peftlab.wrap(net(), "ia3"))


def test_promise_11_watch_names_what_did_not_move():
    with pytest.raises(RuntimeError, match=r"layers\.0\.q_proj\.peftlab\.default"):
        watched(peftlab.wrap(net(), "lora", r=2), lr=0.0)
    model = peftlab.wrap(ReadsWeight(), "lora", r=2, targets=["inner", "out_proj"])
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    peftlab.watch(model, opt, steps=3)
    with pytest.raises(RuntimeError, match=r"'out_proj\.peftlab\.default\.A'") as e:
        for _ in range(3):
            opt.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            opt.step()
    assert "inner" not in str(e.value)


def test_promise_11_watch_finds_an_optimizer_that_holds_other_tensors():
    """peft#3409, opacus#820: references that went stale; trl#6700: an optimizer without adapters."""
    model = peftlab.wrap(net(), "lora", r=2)
    stale = torch.optim.SGD([p for p in copy.deepcopy(model).parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj\.peftlab\.default"):
        peftlab.watch(model, stale)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj\.peftlab\.default"):
        peftlab.watch(model, torch.optim.SGD(list(model.head.parameters()), lr=0.1))
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    peftlab.watch(model, opt, steps=2)
    a = lora_of(model.layers[0].q_proj)
    a.B = nn.Parameter(a.B.detach().clone())  # replaced behind the optimizer's back
    with pytest.raises(RuntimeError, match=r"layers\.0\.q_proj\.peftlab\.default\.B"):
        for _ in range(2):
            opt.zero_grad()
            loss_on_ids(model).backward()
            opt.step()


# ============================================================ row 12: prefixes of compiled and wrapped models (see test_distributed.py for DDP and FSDP)


def wrappings(model):
    yield "compiled", torch.compile(model)
    yield "data parallel", nn.DataParallel(model)
    yield "both", nn.DataParallel(torch.compile(model))
    inner = copy.deepcopy(model)
    inner.layers[0] = torch.compile(inner.layers[0])
    yield "a block compiled", inner


def test_promise_12_saved_keys_and_bytes_know_no_wrapper(tmp_path):
    """Soup#335, #351: torch.compile's _orig_mod. prefix writes a dead adapter, exit code 0."""
    model = stir(peftlab.wrap(net(), "lora", r=2))
    peftlab.save(model, tmp_path / "bare.safetensors")
    want = (tmp_path / "bare.safetensors").read_bytes()
    for kind, wrapped in wrappings(model):
        peftlab.save(wrapped, tmp_path / "wrapped.safetensors")
        assert (tmp_path / "wrapped.safetensors").read_bytes() == want, kind


@pytest.mark.parametrize("kind", ["compiled", "data parallel", "both", "a block compiled"])
def test_promise_12_load_and_wrap_look_through_the_wrapper(kind, tmp_path):
    model = stir(peftlab.wrap(net(), "lora", r=2))
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = dict(wrappings(net()))[kind]
    report = peftlab.load(fresh, tmp_path / "a.safetensors")
    assert report.tensors == 12
    inside = next(m for m in fresh.modules() if isinstance(m, Net))
    assert inside is fresh or kind != "a block compiled"
    peftlab.save(fresh, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    other = dict(wrappings(net()))[kind]
    assert peftlab.wrap(other, "lora", r=2) is other
    peftlab.save(stir(other), tmp_path / "c.safetensors")
    assert read(tmp_path / "c.safetensors")[1].keys() == read(tmp_path / "a.safetensors")[1].keys()
    bare = net()
    peftlab.load(bare, tmp_path / "c.safetensors")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "_fsdp_wrapped_module."])
def test_promise_12_a_file_with_a_prefix_is_accepted_or_refused_never_dead(prefix, tmp_path):
    model = stir(peftlab.wrap(net(), "lora", r=2))
    peftlab.save(model, tmp_path / "a.safetensors")
    bad = edited(tmp_path / "a.safetensors", lambda ts: {prefix + k: t for k, t in ts.items()})
    fresh = net()
    try:
        peftlab.load(fresh, bad)
    except peftlab.LoadError as e:
        assert "layers.0.q_proj.peftlab.default.A" in str(e) and prefix in str(e)
    else:
        assert torch.equal(fresh(ids()), model(ids()))


# ============================================================ row 13: names come from structure


AWKWARD = ["mlp", "0", "weight", "lora_head", "default_extended", "layers", "q_proj", "peftlab", "A", "B", "bias", "base_layer", "peftlab_shared"]


def expected_keys(name, hosts, tensors=("A", "B")):
    return {f"{h}.peftlab.{name}.{t}" for h in hosts for t in tensors}


HOSTS = [f"layers.{i}.{p}" for i in (0, 1) for p in ("q_proj", "v_proj", "mlp")]


@pytest.mark.parametrize("name", AWKWARD)
def test_promise_13_adapters_named_like_parts_of_the_model(name, tmp_path):
    """peft#3584: two of four tensors are written, no warning."""
    model = net()
    peftlab.wrap(model, "lora", r=2, name="default")
    peftlab.wrap(model, "lora", r=3, name=name, targets=["q_proj", "mlp"])
    peftlab.wrap(model, "vera", r=4, name="shared", targets="q_proj")
    stir(model)
    want = model(ids())
    own_hosts = [h for h in HOSTS if not h.endswith("v_proj")]
    for chosen, keys in {
        name: expected_keys(name, own_hosts),
        "default": expected_keys("default", HOSTS),
        ("default", name): expected_keys("default", HOSTS) | expected_keys(name, own_hosts),
    }.items():
        path = tmp_path / "n.safetensors"
        peftlab.save(model, path, list(chosen) if isinstance(chosen, tuple) else chosen)
        _, tensors = read(path)
        assert set(tensors) == keys
        there = dict(model.named_parameters())
        assert all(torch.equal(t, there[k]) for k, t in tensors.items())
        fresh = net()
        peftlab.load(fresh, path)
        with peftlab.using(model, list(chosen) if isinstance(chosen, tuple) else chosen):
            assert torch.equal(fresh(ids()), model(ids()))
    peftlab.save(model, path)
    fresh = net()
    peftlab.load(fresh, path)
    assert torch.equal(fresh(ids()), want)
    peftlab.unwrap(fresh, name)
    peftlab.unwrap(model, name)
    assert torch.equal(fresh(ids()), model(ids())) and not any(f".peftlab.{name}." in k for k, _ in fresh.named_parameters() if name != "peftlab")


@pytest.mark.parametrize("pair", [("default", "default_extended"), ("a", "ab"), ("lora", "lora_head"), ("1", "11"), ("x", "X")])
def test_promise_13_names_that_begin_like_another(pair, tmp_path):
    """peft#3433, #3282: keys selected by a prefix mix two adapters."""
    model = net()
    for i, name in enumerate(pair):
        peftlab.wrap(model, "lora", r=2 + i, name=name)
    stir(model)
    for name in pair:
        peftlab.save(model, tmp_path / "p.safetensors", name)
        assert set(read(tmp_path / "p.safetensors")[1]) == expected_keys(name, HOSTS)
        fresh = net()
        peftlab.load(fresh, tmp_path / "p.safetensors")
        assert peftlab.active(fresh) == [name]
        with peftlab.using(model, name):
            assert torch.equal(fresh(ids()), model(ids()))
    peftlab.unwrap(model, pair[0])
    assert {k for k, _ in model.named_parameters() if ".peftlab." in k} == expected_keys(pair[1], HOSTS)


@pytest.mark.parametrize("name", ["active", "merged", "training", "forward", "sites", "read", "links", "order", "history", "state_dict", "children"])
def test_promise_13_names_of_attributes_work_or_are_refused(name, tmp_path):
    model = net()
    try:
        peftlab.wrap(model, "lora", r=2, name=name)
    except ValueError as e:
        assert repr(name) in str(e)
        assert not any("peftlab" in k for k, _ in model.named_modules())
        return
    stir(model)
    peftlab.save(model, tmp_path / "n.safetensors")
    fresh = net()
    peftlab.load(fresh, tmp_path / "n.safetensors")
    assert torch.equal(fresh(ids()), model(ids()))
    for k, p in model.named_parameters():
        assert model.get_parameter(k) is p
    assert torch.equal(copy.deepcopy(model)(ids()), model(ids()))
    model.eval().train()


def test_promise_13_modules_with_awkward_names(tmp_path):
    """A model whose own modules are called lora_A, weight_, default, peft."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lora_A = nn.Linear(8, 8)
            self.default = nn.ModuleDict({"lora_head": nn.Linear(8, 8), "weight_": nn.Linear(8, 8), "A": nn.Linear(8, 8)})

        def forward(self, x):
            for m in (self.lora_A, *self.default.values()):
                x = torch.tanh(m(x))
            return x

    model, x = Odd(), torch.randn(2, 8)
    peftlab.wrap(model, "lora", r=2, targets="*", name="lora_A")
    stir(model)
    peftlab.save(model, tmp_path / "o.safetensors")
    assert set(read(tmp_path / "o.safetensors")[1]) == expected_keys("lora_A", ["lora_A", "default.lora_head", "default.weight_", "default.A"])
    fresh = Odd()
    peftlab.load(fresh, tmp_path / "o.safetensors")
    assert torch.equal(fresh(x), model(x))


def test_promise_13_noncontiguous_and_aliased_tensors_save(tmp_path):
    """peft#1994 (BOFT), LF#3400 "Some tensors share memory"."""
    model = stir(peftlab.wrap(net(), "lora", r=2))
    first, second = lora_of(model.layers[0].q_proj), lora_of(model.layers[1].q_proj)
    first.A = nn.Parameter(first.A.detach().T.contiguous().T)  # strides of a transpose
    second.A = first.A  # one Parameter at two sites
    big = torch.randn(5, 8, 2)
    second.B = nn.Parameter(big[0])  # parts of one larger storage
    first.B = nn.Parameter(big[1])
    lora_of(model.layers[0].mlp).B = nn.Parameter(big[1:2].squeeze(0))  # and one that overlaps
    assert not first.A.is_contiguous()
    report = peftlab.save(model, tmp_path / "a.safetensors")
    assert sum(report.adapters.values()) == 6 * (2 * 8 + 8 * 2) * 4
    assert not first.A.is_contiguous()  # and without touching the model
    fresh = net()
    peftlab.load(fresh, tmp_path / "a.safetensors")
    there = dict(fresh.named_parameters())
    assert all(torch.equal(there[k], p) for k, p in model.named_parameters(remove_duplicate=False))
    assert rel(fresh(ids()), model(ids())) < 1e-6  # other strides, another summation order


# ============================================================ row 15: every parametric layer of torch.nn x every method


def floats(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class OwnInit(nn.Conv2d):
    """A subclass with a constructor of its own."""

    def __init__(self, width, *, hidden=True):
        super().__init__(width, 2 * width, 3, padding=1, bias=hidden)


class Standardised(nn.Conv2d):
    """A subclass with a forward of its own: weight standardisation."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class OwnMatrix(nn.Module):
    """A layer that torch knows nothing of: a parameter used as a matrix."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(floats(4, 6))

    def forward(self, x):
        return x @ self.kernel


class OwnLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([nn.Parameter(floats(4, 4, seed=i)) for i in range(2)])
        self.dict = nn.ParameterDict({"w": nn.Parameter(floats(4, 4))})

    def forward(self, x):
        for w in self.list:
            x = torch.tanh(x @ w)
        return x @ self.dict["w"]


def loss_layer():
    return nn.LinearCrossEntropyLoss(8, 4)


TOKENS = torch.tensor([[1, 3, 0, 9], [2, 1, 8, 3]])
SEQ = floats(2, 5, 8)
# class: (constructor, inputs); a layer that is several layers is targeted by what is in it
TABLE = {
    "Linear": (lambda: nn.Linear(8, 6), (SEQ,)),
    "Bilinear": (lambda: nn.Bilinear(4, 6, 8), (floats(3, 4), floats(3, 6))),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (floats(2, 4, 7),)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2), (floats(2, 4, 7, 8),)),
    "Conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1), (floats(2, 4, 7, 8),)),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (floats(2, 4, 7, 8),)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, (2, 2, 1)), (floats(1, 2, 4, 3, 3),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (floats(2, 4, 5),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (floats(2, 4, 3, 4),)),
    "ConvTranspose2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (floats(2, 4, 3, 4),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (floats(1, 2, 2, 3, 2),)),
    "Embedding": (lambda: nn.Embedding(10, 6), (TOKENS,)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(10, 6), (TOKENS,)),
    "RNN": (lambda: nn.RNN(8, 6, batch_first=True), (SEQ,)),
    "LSTM": (lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True), (SEQ,)),
    "LSTM projected": (lambda: nn.LSTM(8, 6, proj_size=4, batch_first=True), (SEQ,)),
    "GRU": (lambda: nn.GRU(8, 6, bias=False, batch_first=True), (SEQ,)),
    "RNNCell": (lambda: nn.RNNCell(8, 6), (floats(3, 8),)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 6), (floats(3, 8),)),
    "GRUCell": (lambda: nn.GRUCell(8, 6), (floats(3, 8),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (SEQ, SEQ, SEQ)),
    "MultiheadAttention kdim": (lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True), (SEQ, floats(2, 3, 6), floats(2, 3, 4))),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (floats(5, 4),)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (floats(5, 4, 2, 2),)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (floats(5, 4, 2, 2, 1),)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), (floats(5, 4, 2, 2),)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (floats(5, 4, 6),)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (floats(5, 4, 3, 2),)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4, affine=True), (floats(5, 4, 2, 2, 2),)),
    "LayerNorm": (lambda: nn.LayerNorm(8), (SEQ,)),
    "LayerNorm 2-D": (lambda: nn.LayerNorm((5, 8)), (SEQ,)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (floats(5, 4, 3),)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (SEQ,)),
    "PReLU": (lambda: nn.PReLU(4), (floats(5, 4),)),
    "AdaptiveLogSoftmaxWithLoss": (lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 12, [4, 8], div_value=2.0), (floats(6, 16), torch.tensor([0, 5, 11, 9, 4, 2]))),
    "Transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True), (SEQ, floats(2, 3, 8))),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2), (SEQ,)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True), (SEQ,)),
    "TransformerDecoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1), (SEQ, floats(2, 3, 8))),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (SEQ, floats(2, 3, 8))),
    "ParameterList, ParameterDict": (OwnLists, (floats(3, 4),)),
    "custom constructor": (lambda: OwnInit(4), (floats(2, 4, 5, 5),)),
    "custom forward": (lambda: Standardised(4, 6, 3), (floats(2, 4, 5, 5),)),
    "custom layer": (OwnMatrix, (floats(3, 4),)),
}  # fmt: skip
if hasattr(nn, "LinearCrossEntropyLoss"):
    TABLE["LinearCrossEntropyLoss"] = (loss_layer, (floats(5, 8), torch.tensor([0, 3, 1, 2, 2])))


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def layer_holder(kind, dtype=torch.float64):
    torch.manual_seed(0)
    build, inputs = TABLE[kind]
    holder = Holder(build().to(dtype)).eval()
    return holder, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def outputs(holder, inputs):
    """All floating outputs of a call as one vector."""
    flat, todo = [], [holder(*inputs)]
    while todo:
        y = todo.pop(0)
        if isinstance(y, (tuple, list)):
            todo += y
        elif isinstance(y, torch.Tensor) and y.is_floating_point():
            flat.append(y.flatten())
    return torch.cat(flat)


def patterns_for(holder, method):
    """What a user would write: the layer by its name, or all that lies in it where the layer is made of layers."""
    if resolve(method)[0].on == "tensor":
        return "layer.*"
    own_weight = [n for n, _ in holder.layer.named_parameters(recurse=False)]
    parts = ["layer"] if own_weight and not isinstance(holder.layer, OwnMatrix) else []
    parts += ["layer.out_proj"] if isinstance(holder.layer, nn.MultiheadAttention) else []
    return parts or ["layer.kernel" if own_weight else "layer.*.{0,1,w}" if isinstance(holder.layer, OwnLists) else "layer.*"]


def mentioned(text: str) -> set[str]:
    return {m for m in METHODS if m in text.replace(",", " ").replace(".", " ").replace(":", " ").split()}


def try_as_told(holder, method) -> str:
    """Wrap, following the error's own advice once; the text of the refusal, or nothing."""
    try:
        peftlab.wrap(holder, method, targets=patterns_for(holder, method), **small(method))
    except peftlab.PatternError as e:
        advice = re.search(r"such as '([^']+)'", str(e))
        if advice is None:
            return str(e)
        peftlab.wrap(holder, method, targets=advice.group(1), **small(method))
    return ""


def test_promise_15_the_table_has_every_parametric_layer_of_torch():
    covered = {type(m) for kind in TABLE for m in layer_holder(kind)[0].modules()}
    missing = []
    for name in dir(nn):
        cls = getattr(nn, name)
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)) or cls in covered or name.startswith("Lazy"):
            continue
        for args in ((), (2,), (2, 2), (2, 2, 2)):
            try:
                made = cls(*args)
            except (TypeError, ValueError, AssertionError, AttributeError, NotImplementedError):
                continue
            if list(made.parameters()):
                missing.append(name)
            break
    # PReLU(1) and the like are there; RNNBase needs a mode and is abstract, NLLLoss2d and DataParallel have no weight of their own
    assert missing == []


@pytest.mark.parametrize("kind", TABLE)
def test_promise_15_every_layer_with_every_method_or_a_refusal_that_helps(kind, tmp_path):
    fits, refused = set(), {}
    for method in METHODS:
        holder, inputs = layer_holder(kind)
        holder.requires_grad_(False)  # torch picks its kernels by this flag too
        with torch.no_grad():
            base_out = outputs(holder, inputs)
        before = {k: v.clone() for k, v in holder.state_dict().items()}
        text = try_as_told(holder, method)
        if text:
            refused[method] = text
            assert "peftlab" not in repr(holder)
            continue
        fits.add(method)
        params = {k: p for k, p in holder.named_parameters() if p.requires_grad}
        assert params and all("peftlab" in k for k in params)
        opt = torch.optim.SGD(params.values(), lr=0.05)
        start = {k: p.detach().clone() for k, p in params.items()}
        for _ in range(2):
            opt.zero_grad()
            outputs(holder, inputs).square().sum().backward()
            assert all(p.grad is not None for p in params.values()), (method, [k for k, p in params.items() if p.grad is None])
            opt.step()
        assert any(not torch.equal(p, start[k]) for k, p in params.items()), method
        stir(holder, 0.1)
        want = outputs(holder, inputs)
        assert torch.isfinite(want).all() and not torch.equal(want, base_out), method
        raw_bits = {k: v for k, v in holder.state_dict().items() if k in before}
        assert all(torch.equal(raw_bits[k], v) for k, v in before.items()), method  # nothing was merged inside forward
        if resolve(method)[0].defined():
            report = peftlab.merge(holder)
            assert report.layers >= 1 and rel(outputs(holder, inputs), want) < 1e-9, method
            peftlab.unmerge(holder)
            now = holder.state_dict()
            assert all(torch.equal(now[k], v) for k, v in before.items()), method
            assert torch.equal(outputs(holder, inputs), want), method
        peftlab.save(holder, tmp_path / "l.safetensors")
        fresh, _ = layer_holder(kind)
        peftlab.load(fresh, tmp_path / "l.safetensors")
        assert torch.equal(outputs(fresh, inputs), want), method
        with peftlab.disabled(holder), torch.no_grad():
            assert torch.equal(outputs(holder, inputs), base_out), method
        peftlab.unwrap(holder)
        with torch.no_grad():
            assert torch.equal(outputs(holder, inputs), base_out), method
    assert fits, refused
    for method, text in refused.items():
        named = mentioned(text) - {method}
        assert named, f"{method} is refused at {kind} without a word of what fits: {text}"
        assert named <= fits, (method, text)


REPARAMETRISED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old weight_norm": old_weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "conv weight_norm": lambda m: nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 6, 3, padding=1)),
    "conv old weight_norm": lambda m: old_weight_norm(nn.Conv1d(8, 6, 3, padding=1)),
}


@pytest.mark.parametrize("kind", REPARAMETRISED)
@pytest.mark.parametrize("method", METHODS)
def test_promise_15_a_weight_that_is_computed_anew_at_each_call(kind, method, tmp_path):
    """The weight is a product of others: an adapter acts on the call, or on the factors, or is refused at wrap; it is never lost."""
    x = floats(2, 8, 8).double()

    def made():
        torch.manual_seed(0)
        return Holder(REPARAMETRISED[kind](nn.Linear(8, 6)).double()).eval()

    for target in ("layer", "layer.*"):
        holder = made().requires_grad_(False)
        with torch.no_grad():
            base = holder(x)
        before = {k: v.clone() for k, v in holder.state_dict().items()}
        try:
            peftlab.wrap(holder, method, targets=target, **small(method))
        except ValueError as e:
            assert "layer" in str(e) and "peftlab" not in repr(holder)
            continue
        holder(x).square().sum().backward()
        assert all(p.grad is not None for p in holder.parameters() if p.requires_grad)
        stir(holder, 0.1)
        want = holder(x)
        assert rel(want, base) > 1e-4
        state_before = state(holder)
        try:
            peftlab.merge(holder)
        except ValueError as e:
            assert "layer" in str(e)
            assert_same_state(state_before, state(holder))
        else:
            assert rel(holder(x), want) < 1e-9
            peftlab.unmerge(holder)
        peftlab.save(holder, tmp_path / "l.safetensors")
        fresh = made()
        peftlab.load(fresh, tmp_path / "l.safetensors")
        assert torch.equal(fresh(x), want)
        peftlab.unwrap(holder)
        assert all(torch.equal(holder.state_dict()[k], v) for k, v in before.items())
        with torch.no_grad():
            assert torch.equal(holder(x), base)


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "out_proj"])
@pytest.mark.parametrize(
    "method", [m for m in METHODS if resolve(m)[0].on == "matrix" and resolve(m)[0].defined() and resolve(m)[0].has_weight() and "ids" not in small(m)]
)
def test_promise_15_attention_projections_one_by_one_without_a_merge_inside_forward(method, part, kdim, monkeypatch):
    """peft#761 "fine-tuning OpenClip", open since 2023; others merge inside forward, which threads and hooks can see."""
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=None if kdim is None else 4, batch_first=True).double()
    inputs = (SEQ.double(), SEQ.double(), SEQ.double()) if kdim is None else (SEQ.double(), floats(2, 3, 6).double(), floats(2, 3, 4).double())
    plain = copy.deepcopy(attn)
    model = nn.ModuleDict({"attn": attn})
    peftlab.wrap(model, method, targets=f"attn.{part}", **small(method))
    stir(model)
    host = attn.out_proj if part == "out_proj" else attn
    adapters = [m for m in host.peftlab.modules() if isinstance(m, peftlab.Method)]
    assert len(adapters) == 1
    # the reference: the part's own matrix, changed by the paper's formula
    if part == "out_proj":
        target, param, rows, bias, brows = plain.out_proj, "weight", slice(None), "bias", slice(None)
    else:
        third = slice(8 * "qkv".index(part[0]), 8 * "qkv".index(part[0]) + 8)
        param, rows = (f"{part}_weight", slice(None)) if kdim else ("in_proj_weight", third)
        target, bias, brows = plain, "in_proj_bias", third
    if method in ORACLES:
        t = {k: v.detach().double() if v.is_floating_point() else v for k, v in [*adapters[0].named_parameters(), *adapters[0].named_buffers()]}
        common = adapters[0].common and {k: v.double() for k, v in adapters[0].common.named_buffers()}
        if method == "vera":
            common["A"] = common["A"].T
        W2, b2 = ORACLES[method](getattr(target, param).detach()[rows], getattr(target, bias).detach()[brows], t, options(method, adapters[0]), common)
        with torch.no_grad():
            getattr(target, param)[rows] = W2
            getattr(target, bias)[brows] = b2
    raw_params = {k: (id(p), p._version, p.detach().clone()) for k, p in attn.named_parameters() if "peftlab" not in k}
    seen = []
    real = F.multi_head_attention_forward

    def spy(*args, **kw):
        seen.append(all(torch.equal(dict(attn.named_parameters())[k], v) for k, (_, _, v) in raw_params.items()))
        return real(*args, **kw)

    monkeypatch.setattr(F, "multi_head_attention_forward", spy)
    got = attn(*inputs)[0]
    assert seen == [True]
    assert all(id(p) == raw_params[k][0] and p._version == raw_params[k][1] for k, p in attn.named_parameters() if k in raw_params)
    if method in ORACLES:
        assert rel(got, plain(*inputs)[0]) < 1e-10


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(4), lambda: nn.LazyConv2d(4, 3)])
def test_promise_15_a_lazy_layer_is_refused_by_name(lazy):
    with pytest.raises(ValueError, match="layer"):
        peftlab.wrap(Holder(lazy()), "lora", r=2)


# ============================================================ row 17: wrapping, adding, loading and switching scale


class Many(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(n)])


def operations(call) -> int:
    """Python and C calls that a call makes: what a clock measures, without its noise."""
    count = 0

    def tick(frame, event, arg):
        nonlocal count
        if event in ("call", "c_call"):
            count += 1

    sys.setprofile(tick)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


STEPS = {
    "wrap": lambda m, p: peftlab.wrap(m, "lora", targets="layers.*", r=2),
    "add": lambda m, p: peftlab.wrap(m, "lora", targets="layers.*", r=2, name="second"),
    "activate": lambda m, p: peftlab.activate(m, "default"),
    "save": lambda m, p: peftlab.save(m, p),
    "load over": lambda m, p: peftlab.load(m, p),
    "merge": lambda m, p: peftlab.merge(m, "default"),
    "unmerge": lambda m, p: peftlab.unmerge(m),
    "report": lambda m, p: peftlab.report(m),
    "unwrap": lambda m, p: peftlab.unwrap(m),
    "load": lambda m, p: peftlab.load(m, p),
    "plan": lambda m, p: peftlab.plan(m, "lora", targets="layers.*", r=2, name="third"),
}


def test_promise_17_work_grows_linearly_with_the_number_of_layers(tmp_path):
    """peft#3039, #2055, diffusers#8953: 16 times the layers took 92 times as long."""
    counts = {}
    for n in (100, 400):
        model = Many(n)
        for step, call in STEPS.items():
            counts.setdefault(step, []).append(operations(lambda: call(model, tmp_path / f"{n}.safetensors")))
    ratios = {step: b / a for step, (a, b) in counts.items()}
    assert all(r <= 5 for r in ratios.values()), ratios  # 4 times the layers
    per_layer = {step: b / 400 for step, (_, b) in counts.items()}
    assert all(per_layer[k] <= n for k, n in {"wrap": 1000, "add": 1000, "load": 3000, "activate": 100}.items()), per_layer  # about twice what it is


def test_promise_17_load_does_not_draw_values_that_it_overwrites(tmp_path):
    path = tmp_path / "a.safetensors"
    for method, kw in (("lora", dict(r=2)), ("lora", dict(r=2, init="orthogonal")), ("dora", dict(r=2)), ("lora", dict(r=2, init="pissa"))):
        peftlab.save(peftlab.wrap(net(), method, **kw), path)
        drawn = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                costly = any(w in func.name() for w in ("uniform", "normal", "rand", "svd", "qr", "kaiming"))
                if costly and not any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
                    drawn.append(func.name())
                return func(*args, **(kwargs or {}))

        fresh = net()
        with Watch():
            peftlab.load(fresh, path)
        assert drawn == [], (method, kw)


# ============================================================ row 19: dtypes


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_promise_19_output_has_the_base_layers_dtype(method, dtype):
    """diffusers#8871, #7330, axolotl#3310: mixed-dtype errors, and outputs that turn to float32."""
    for kind in ("Linear", "Conv1d", "Embedding", "MultiheadAttention", "LayerNorm", "LSTM"):
        holder, inputs = layer_holder(kind, dtype)
        try:
            want = outputs(holder, inputs).dtype
        except RuntimeError:
            continue  # torch has no kernel for it
        try:
            peftlab.wrap(holder, method, targets=patterns_for(holder, method), **small(method))
        except ValueError as e:
            assert isinstance(e, peftlab.PatternError) or "list of blocks" in str(e)
            continue
        stir(holder, 0.05)
        base = {k: t.dtype for k, t in [*holder.named_parameters(), *holder.named_buffers()] if "peftlab" not in k}
        assert set(base.values()) == {dtype} | {t for t in base.values() if not t.is_floating_point}
        y = outputs(holder, inputs)
        assert y.dtype == want == dtype, kind
        y.float().sum().backward()
        own_tensors = {k: p for k, p in holder.named_parameters() if p.requires_grad}
        assert {p.dtype for p in own_tensors.values()} == {torch.promote_types(torch.float32, dtype)}, kind  # stated default
        assert all(torch.isfinite(p.grad).all() and p.grad.dtype == p.dtype for p in own_tensors.values()), kind


@pytest.mark.parametrize("method", [m for m in METHODS if "ids" not in small(m)])
def test_promise_19_autocast(method):
    model = net().train()
    place_or_skip(method, model, **small(method))
    peftlab.wrap(model, method, **small(method))
    with torch.autocast("cpu", torch.bfloat16):
        with peftlab.disabled(model):
            want = model(ids()).dtype
        y = model(ids())
    assert y.dtype == want
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_promise_19_half_base_and_grad_scaler_take_a_finite_step(method):
    """diffusers#6086 "Attempting to unscale FP16 gradients", peft#1249."""
    torch.manual_seed(0)
    model = Net().half().train()
    place_or_skip(method, model, **small(method))
    peftlab.wrap(model, method, **small(method))
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for _ in range(2):
        opt.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(ids()).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 128.0  # no step was skipped
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved and all(torch.isfinite(p).all() for p in model.parameters())
    assert all("peftlab" in k for k in moved) and all(p.dtype == before[k].dtype for k, p in model.named_parameters())


@pytest.mark.parametrize("base", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [None, *DTYPES], ids=str)
def test_promise_19_adapter_dtype_is_explicit_reported_and_kept_by_the_file(base, adapter, tmp_path):
    """peft#2421: adapters saved in float16 are loaded in float32."""
    model = net().to(base)
    peftlab.wrap(model, "lora", r=2, dtype=adapter)
    stir(model)
    want = adapter or torch.promote_types(torch.float32, base)
    assert {row.dtype for row in peftlab.report(model)} == {want} and str(want).removeprefix("torch.") in repr(peftlab.report(model))
    assert model(ids()).dtype == base
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = net().to(base)
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert {row.dtype for row in peftlab.report(fresh)} == {want} and torch.equal(fresh(ids()), model(ids()))
    told = net().to(base)
    peftlab.load(told, tmp_path / "a.safetensors", dtype=torch.float64)
    assert {row.dtype for row in peftlab.report(told)} == {torch.float64}
    for m in (model, fresh, told):
        assert {p.dtype for k, p in m.named_parameters() if "peftlab" not in k} == {base}


# ============================================================ row 26: no start edits the base


INITS = ["kaiming", "gaussian", "orthogonal", "pissa", "pissa_exact", "olora", "eva"]


def started(init, name="default", model=None, **kw):
    data = [(ids(s),) for s in range(3)] if init == "eva" else None
    model = net() if model is None else model
    return peftlab.wrap(model, "lora", r=2, init=init, data=data, name=name, **kw)


@pytest.mark.parametrize("init", INITS)
def test_promise_26_base_tensors_are_untouched_and_disabled_is_the_original(init, tmp_path):
    """peft#2184, transformers#34468 "PiSSA Updates Base Model Weights Silently"."""
    want = net()(ids())
    model = started(init)
    untouched = net().state_dict()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in untouched.items())
    assert rel(model(ids()), want) < 1e-6
    with peftlab.disabled(model):
        assert torch.equal(model(ids()), want)
    train(model, loss_on_ids)
    assert rel(model(ids()), want) > 1e-4
    assert all(torch.equal(model.state_dict()[k], v) for k, v in untouched.items())
    with peftlab.disabled(model):
        assert torch.equal(model(ids()), want)
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = net()
    peftlab.load(fresh, tmp_path / "a.safetensors")  # the untouched base, no extra step
    assert torch.equal(fresh(ids()), model(ids()))
    peftlab.merge(fresh)
    assert rel(fresh(ids()), model(ids())) < 1e-5
    peftlab.unwrap(fresh)
    assert torch.equal(fresh(ids()), want)


@pytest.mark.parametrize("init", INITS)
def test_promise_26_a_second_adapter_behaves_as_if_alone(init):
    """peft#2270, #1929."""
    alone = stir(peftlab.wrap(net(), "lora", r=3, name="second", seed=4), seed=9)
    model = stir(started(init), seed=3)
    peftlab.activate(model, None)
    peftlab.wrap(model, "lora", r=3, name="second", seed=4)
    stir(model, seed=9, name="second")
    peftlab.activate(model, "second")
    assert torch.equal(model(ids()), alone(ids()))
    # and together the changes add, from independent sums
    peftlab.activate(model, ["default", "second"])
    reference = net().double()
    with torch.no_grad():
        for path, m in model.named_modules():
            if hasattr(m, "peftlab"):
                a, b = lora_of(m), lora_of(m, "second")
                dW = delta(a) - (16.0 / 2 * a.B0.double() @ a.A0.double() if a.A0 is not None else 0) + delta(b, r=3)
                reference.get_submodule(path).weight += dW
    assert rel(model(ids()), reference(ids())) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_promise_26_no_method_edits_the_base_when_it_starts_or_trains(method):
    model = net()
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    want = model(ids())
    place_or_skip(method, model, **small(method))
    peftlab.wrap(model, method, **small(method))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in untouched.items())
    train(model, loss_on_ids)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in untouched.items())
    with peftlab.disabled(model):
        assert torch.equal(model(ids()), want)


# ============================================================ row 27: schedules are driven, or the run stops


def rank_of(model) -> int:
    return sum(int((p != 0).sum()) for k, p in model.named_parameters() if k.endswith(".E"))


@pytest.mark.parametrize("total", [30, 47, 100])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_promise_27_adalora_reaches_its_budget_in_a_bare_loop(total, optimizer):
    """ST#3842 "AdaLora silently acts as standard LoRA", peft#1801 "rank remains constant"."""
    model = peftlab.wrap(net(), "adalora", r=2, init_r=4, delta_t=1)
    opt = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], lr=0.05)
    peftlab.schedule(model, opt, total_steps=total)
    ranks = []
    for _ in range(total):
        opt.zero_grad()
        loss_on_ids(model).backward()
        opt.step()
        ranks.append(rank_of(model))
    sites = 6
    assert ranks[-1] == 2 * sites  # the budget, exactly
    assert max(ranks) == 4 * sites and len(set(ranks)) > 3  # and on the way there the rank falls


def test_promise_27_an_undriven_schedule_raises():
    model = peftlab.wrap(net(), "adalora", r=2, init_r=4)
    with pytest.raises(RuntimeError, match=r"(?s)schedule.*peftlab\.schedule"):
        train(model, loss_on_ids, steps=40)


def test_promise_27_every_method_that_acts_during_training_raises_undriven_or_trains_driven():
    """The rule is the protocol's, not AdaLoRA's: whoever overrides `step` or `penalty` must be driven."""
    acting = [m for m in METHODS if getattr(resolve(m)[0], "step", None) is not getattr(peftlab.Method, "step", None)]
    assert "adalora" in acting
    for method in acting:
        extra = dict(gradual=True) if "gradual" in keywords(resolve(method)[0]) else {}
        model = peftlab.wrap(net(), method, **small(method), **extra)
        with pytest.raises(RuntimeError, match="schedule"):
            train(model, loss_on_ids, steps=40, lr=0.01)
        driven = peftlab.wrap(net(), method, **small(method), **extra)
        opt = torch.optim.SGD([p for p in driven.parameters() if p.requires_grad], lr=0.01)
        peftlab.schedule(driven, opt, total_steps=25)
        for _ in range(25):
            opt.zero_grad()
            loss_on_ids(driven).backward()
            opt.step()


def test_promise_27_the_regulariser_is_included_and_testable():
    """With a loss that has no gradient, the step is the regulariser's: orth (|P'P - I|^2 + |QQ' - I|^2), written out."""
    model = peftlab.wrap(net(), "adalora", r=2, init_r=3, orth=0.5)
    stir(model)
    before = {k: p.detach().double().clone() for k, p in model.named_parameters() if p.requires_grad}
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    peftlab.schedule(model, opt, total_steps=100)
    opt.zero_grad()
    (loss_on_ids(model) * 0).backward()
    opt.step()
    moved = 0
    for k, p in model.named_parameters():
        if k.endswith((".P", ".Q")):
            M = before[k] if k.endswith(".P") else before[k].T
            grad = 0.5 * 4 * M @ (M.T @ M - torch.eye(3, dtype=torch.float64))
            want = M - 0.01 * grad
            assert rel(p if k.endswith(".P") else p.T, want) < 1e-5, k
            moved += 1
    assert moved == 12
    terms = [m.penalty() for m in model.modules() if isinstance(m, peftlab.Method)]
    assert len(terms) == 6 and all(t.ndim == 0 and t.requires_grad and t > 0 for t in terms)
