"""What the library promises its users, rows 1 to 13, 15, 17, 19, 26 and 27: each test rebuilds a case that users of other libraries reported.

References are built here: W + dW is written out from the adapter's own numbers, never by merging and taking the merge back.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import ORACLES, canonical, own, raw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftlab
from peftlab.io.file import read, write
from peftlab.registry import keywords, resolve

METHODS = [e.name for e in peftlab.methods(aliases=False)]
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

    def __init__(self, depth=2, dim=8, vocab=11, classes=3):
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
    clean = copy.deepcopy(layer).double()
    peftlab.unwrap(clean)
    b = None if getattr(clean, "bias", None) is None else clean.bias.detach()
    raw_method = any("." in k for k in adapters)
    W = clean.weight.detach() if raw_method else canonical(clean, clean.weight.detach())
    W2, b2 = ORACLES[method](W, b, tensors, options(method, next(iter(adapters.values()))), common)
    W2 = W2 if raw_method else raw(clean, W2)
    if getattr(clean, "padding_idx", None) is not None and not raw_method:  # the padding row belongs to the model
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
    offered = [w.strip("'\"?.,") for w in str(e.value).partition("Did you mean")[2].split() if "'" in w]
    assert len(offered) >= 3 and all(o in real for o in offered[:3])
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
    assert {r.path for r in peftlab.plan(net(), "lora", targets=["embed", "head", "q_proj"], r=2).rows} == {"embed", "head", "layers.0.q_proj", "layers.1.q_proj"}


def test_promise_05_names_are_whole_components():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "my_q_proj": nn.Linear(4, 4), "q_proj2": nn.Linear(4, 4), "block": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
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
