"""The laws: what every method promises on every layer that it fits, driven by the registry, with no branch on a method's name.

One law is one test function, run for every pair (method, case) that the library accepts. The reference is `reference` below: a copy of the untouched
model whose tensors are what the methods' equations make of them, put in place by hand, so that fast paths, stacking, merging and switching
are each compared with the equation and not with one another. `cases.py` holds the layers, the rows and the exceptions.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import quant_oracle
import torch
from cases import (
    ALL,
    CASES,
    EXPECTED,
    PARTNERS,
    QUICK,
    RELAID,
    ROUNDED_START,
    ROWS,
    Net,
    build,
    data,
    fits,
    fitting,
    inputs,
    keywords,
    loss_of,
    methods,
    quick,
    row_of,
)
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlab
from peftlab import registry
from peftlab.model.packed import QuantizedModule as Quantised

METHODS = methods()
TIGHT = dict(rtol=1e-10, atol=1e-10)
CHILD = "peftlab"


# ---------------------------------------------------------------- which pairs a law is run for


def class_of(method: str) -> type[peftlab.Method]:
    return registry.resolve(method)[0]


def marks(law: str, method: str, case: str, slow: bool) -> list:
    reason = next((EXPECTED[k] for k in ((method, law), (method, law, case)) if k in EXPECTED), None)
    found = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    return found + ([pytest.mark.slow] if slow else [])


def law(test, where=lambda cls, case: True):
    """Every method on every case that it fits; outside the default selection what is not quick."""
    name = test.__name__.removeprefix("test_")
    rows = [pytest.param(m, c, marks=marks(name, m, c, c not in quick(m)), id=f"{m}-{c}") for m in METHODS for c in fitting(m) if where(class_of(m), CASES[c])]
    return pytest.mark.parametrize(("method", "case"), rows)(test)


def law_of_definitions(test):
    """For methods that are an equation on the tensors; what surrounds the call has none to compare with."""
    return law(test, lambda cls, case: cls.defined())


def law_of_starts(test):
    """For methods whose start is the base."""
    return law(test, lambda cls, case: cls.neutral)


def law_of_dropout(test):
    """For methods with a dropout on a branch beside the frozen one."""
    return law(test, lambda cls, case: cls.neutral and "dropout" in registry.keywords(cls))


def law_once(test):
    """Every method on the first case of its quick ones: for laws that take long."""
    name = test.__name__.removeprefix("test_")
    rows = [pytest.param(m, quick(m)[0], marks=marks(name, m, quick(m)[0], False), id=m) for m in METHODS]
    return pytest.mark.parametrize(("method", "case"), rows)(test)


def law_of_pairs(test):
    """Every ordered pair of a method and a partner, on the cases that both fit."""
    name = test.__name__.removeprefix("test_")
    rows = []
    for m in (m for m in METHODS if class_of(m).defined()):
        for p in PARTNERS:
            for below, above in {(m, p), (p, m)}:
                for c in fitting(m):
                    if fits(p, c):
                        rows.append(pytest.param(below, above, c, marks=marks(name, m, c, c not in QUICK), id=f"{below}-{above}-{c}"))
    rows = sorted({r.id: r for r in rows}.values(), key=lambda r: r.id)
    return pytest.mark.parametrize(("method", "above", "case"), rows)(test)


def law_of_smooth_layers(test):
    """For layers whose derivative torch itself gets right."""
    return law(test, lambda cls, case: case.smooth)


# ---------------------------------------------------------------- subjects


def wrap(model: nn.Module, method: str, case: str, dtype: torch.dtype | None = torch.float64, **more) -> nn.Module:
    base = next(dense(m, k).dtype for m in model.modules() for k, p in m._parameters.items() if p is not None and (p.is_floating_point() or isinstance(m, Quantised)))
    return peftlab.wrap(model, method, **keywords(method, case), **data(case, base), dtype=dtype, **more)


def subject(method: str, case: str, dtype: torch.dtype = torch.float64, **more) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """(the untouched base, an equal model that is wrapped, inputs)."""
    base = build(case, dtype)
    model = wrap(copy.deepcopy(base), method, case, dtype=torch.promote_types(dtype, torch.float32), **more)
    return base.requires_grad_(False), model, inputs(case, dtype)  # torch chooses kernels by requires_grad: to the last bit, it matters


def moved(method: str, case: str, dtype: torch.dtype = torch.float64, **more):
    """A subject whose adapters are no longer at their start."""
    base, model, x = subject(method, case, dtype, **more)
    perturb(model)
    return base, model, x


def perturb(model: nn.Module, seed: int = 0, size: float = 0.15) -> None:
    """Noise on everything that trains."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))


def is_float(model: nn.Module) -> bool:
    return all(p.is_floating_point() for p in model.parameters())


def stacks(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    return [(path, m, m._modules[CHILD]) for path, m in model.named_modules() if CHILD in m._modules]


def sites(model: nn.Module, name: str = "default") -> list:
    return [pair for _, _, stack in stacks(model) for pair in stack.sites.get(name, ())]


def own(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters, by their places in the object structure."""
    return {k: p for k, p in model.named_parameters() if any(part.startswith(CHILD) for part in k.split("."))}


def merge(model: nn.Module, names=None, **more):
    """peftlab.merge; a quantised base asks onto what, and then the decoded values are it."""
    chosen = {names} if isinstance(names, str) else None if names is None else set(names)
    packs = any(
        isinstance(host, Quantised) and site.param in host.peftlab_formats and method.has_weight()
        for _, host, stack in stacks(model)
        for name in stack.active
        if name not in stack.merged and (chosen is None or name in chosen)
        for site, method in stack.sites[name]
    )
    return peftlab.merge(model, names, onto="dequantized" if packs else None, **more)


def dense(host: nn.Module, param: str) -> Tensor:
    """A frozen parameter in its raw layout; codes are decoded in the papers' words."""
    raw = host._parameters[param]
    return raw if raw.is_floating_point() else quant_oracle.decoded(host, param)


def mergeable(model: nn.Module, name: str = "default") -> bool:
    return all(m.defined() and s.rule.name != "opaque" for s, m in sites(model, name))


# ---------------------------------------------------------------- the reference


def matrix(host: nn.Module, param: str, raw: Tensor) -> Tensor:
    """A raw parameter as (n_out, n_in), said once more in other words than the library's."""
    if param == "weight" and isinstance(host, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return rearrange(raw.flatten(2), "(g i) o k -> (g o) (i k)", g=host.groups)
    if param == "weight" and (isinstance(host, nn.Embedding) or any(c.__name__ == "Conv1D" for c in type(host).__mro__)):
        return rearrange(raw, "i o -> o i")
    return rearrange(raw, "o ... -> o (...)")


def unmatrix(host: nn.Module, param: str, W: Tensor, raw: Tensor) -> Tensor:
    if param == "weight" and isinstance(host, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        per_group = W.shape[0] // host.groups
        return rearrange(W, "(g o) (i k) -> (g i) o k", g=host.groups, o=per_group, k=math.prod(host.kernel_size)).reshape(raw.shape)
    if param == "weight" and isinstance(host, nn.Embedding):
        return with_padding_of(host, param, rearrange(W, "o i -> i o"), raw)
    if param == "weight" and any(c.__name__ == "Conv1D" for c in type(host).__mro__):
        return W.T
    return W.reshape(raw.shape)


def with_padding_of(host: nn.Module, param: str, table: Tensor, raw: Tensor) -> Tensor:
    """An embedding's padding row belongs to the model: no method moves it."""
    if not isinstance(host, nn.Embedding) or param != "weight" or host.padding_idx is None:
        return table
    rows = list(table)
    rows[host.padding_idx] = raw[host.padding_idx].to(table.dtype)
    return torch.stack(rows)


def changed(site, method, raw: Tensor) -> Tensor:
    """One raw parameter after one method's equation."""
    if site.kind == "tensor":
        return with_padding_of(site.host, site.param, method.weight(raw), raw)
    piece = raw if site.expert is None else raw[site.expert]
    whole = piece.T if site.transposed else matrix(site.host, site.param, piece)
    if site.rows is None:
        W = method.weight(whole)
    else:
        index = torch.arange(len(whole))[site.rows].tolist()
        part = method.weight(whole[index])
        W = torch.stack([part[index.index(i)] if i in index else row.to(part.dtype) for i, row in enumerate(whole)])
    piece = W.T if site.transposed else unmatrix(site.host, site.param, W, piece)
    if site.expert is None:
        return piece
    return torch.stack([piece if e == site.expert else other.to(piece.dtype) for e, other in enumerate(raw)])


def changed_bias(site, method, b: Tensor) -> Tensor:
    rows = site.rows if site.bias_rows is None else site.bias_rows
    if rows is None:
        return method.bias(b)
    index = torch.arange(len(b))[rows].tolist()
    part = method.bias(b[index])
    return torch.stack([part[index.index(i)] if i in index else v.to(part.dtype) for i, v in enumerate(b)])


def equations(model: nn.Module, base: nn.Module, names=None) -> dict[tuple[str, str], Tensor]:
    """(path, parameter) -> tensor, for all that the methods (the active ones by default) change; differentiable in the adapters."""
    out: dict[tuple[str, str], Tensor] = {}
    paths = {id(m): p for p, m in model.named_modules()}
    for path, host, stack in stacks(model):
        frozen = base.get_submodule(path)
        for name in stack.order:
            if name not in (stack.active if names is None else names):
                continue
            for site, method in stack.sites[name]:
                key = path, site.param
                if site.rule.name == "opaque":
                    out[path, "dense"] = method.weight(out.get((path, "dense"), frozen.dense()))
                elif type(method).has_weight():
                    out[key] = changed(site, method, out.get(key, dense(frozen, site.param)))
                    if site.param not in stack.untied:
                        out |= {(paths[id(h)], p): out[key] for h, p in site.tied}
                if site.has_bias and type(method).has_bias():
                    out[path, site.bias] = changed_bias(site, method, out.get((path, site.bias), frozen._parameters[site.bias]))
    return {k: t.to(t.dtype if k[1] == "dense" else dense(base.get_submodule(k[0]), k[1]).dtype) for k, t in out.items()}


def reference(model: nn.Module, base: nn.Module, names=None, detach: bool = False) -> nn.Module:
    """A copy of the untouched base that holds the equations' tensors as plain tensors: no code of the library runs in it."""
    twin = copy.deepcopy(base)
    twin.train(model.training)
    for (path, param), t in equations(model, base, names).items():
        host = twin.get_submodule(path)
        if param == "dense":
            host.dense = lambda W=t: W
        else:
            host._parameters[param] = nn.Parameter(t.detach().clone(), requires_grad=False) if detach else t
    for m in twin.modules():
        if isinstance(m, nn.RNNBase):
            m.__dict__["_flat_weights"] = [m._parameters[n] for n in m._flat_weights_names]
    return twin


def exact(model: nn.Module, base: nn.Module) -> nn.Module:
    """The reference in float64; where a method surrounds the call there is no equation on tensors, and its own float64 run is the measure."""
    if all(m.defined() for _, _, stack in stacks(model) for n in stack.order for _, m in stack.sites[n]):
        return reference(copy.deepcopy(model).double(), copy.deepcopy(base).double())
    return copy.deepcopy(model).double()


def gradients(model: nn.Module, x: tuple[Tensor, ...], wanted: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of a fixed random functional of it with respect to `wanted` and the inputs."""
    x = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in x)
    y = model(*x)
    g = torch.Generator().manual_seed(5)
    v = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    wanted = [*wanted, *(t for t in x if t.requires_grad)]
    grads = torch.autograd.grad((y * v).sum(), wanted, allow_unused=True)
    return y.detach(), [torch.zeros_like(w) if d is None else d for w, d in zip(wanted, grads, strict=True)]


# ---------------------------------------------------------------- the state of a model


def state(model: nn.Module) -> dict:
    """Everything that a call which raises, or an unwrap, must leave as it was: objects, classes, modes, flags, hooks and bits."""
    out = {}
    for path, m in model.named_modules(remove_duplicate=False):
        out[path] = (id(m), type(m), m.training, sorted(m.__dict__), list(m._modules), list(m._forward_hooks), list(m._forward_pre_hooks))
        if isinstance(m, nn.RNNBase):
            out[path, "flat"] = [id(t) for t in m._flat_weights] if CHILD not in m._modules else None
        for kind, table in (("parameter", m._parameters), ("buffer", m._buffers)):
            for k, t in table.items():
                out[path, kind, k] = None if t is None else (id(t), t.requires_grad, t.dtype, tuple(t.shape), bits(t))
    return out


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_state(model: nn.Module, before: dict) -> None:
    now = state(model)
    assert now.keys() == before.keys(), sorted(map(str, now.keys() ^ before.keys()))
    for k, v in before.items():
        assert now[k] == v, f"{k}: {str(now[k])[:200]} was {str(v)[:200]}"


def assert_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a, b), f"largest difference {(a.double() - b.double()).abs().max():.3e}"


# ---------------------------------------------------------------- the registry and the zoo


@pytest.mark.parametrize("method", METHODS)
def test_fit_matrix(method):
    """What each method fits is recorded: a layer that silently stops fitting, or starts to, is a change of the promise."""
    there = frozenset(fitting(method))
    assert there, f"{method} fits no layer of the zoo: add a case that it is for"
    recorded = row_of(method).fits
    assert recorded is not None, f"add one row to ROWS in cases.py: {method!r}: row({sorted(there)})"
    assert there == recorded, f"no longer fits {sorted(recorded - there)}, now fits {sorted(there - recorded)}"


def test_rows_are_of_methods():
    assert ROWS.keys() <= set(METHODS)
    assert {k[0] for k in EXPECTED} | ROUNDED_START.keys() <= set(METHODS)
    laws = {n.removeprefix("test_") for n in globals() if n.startswith("test_law")}
    assert {k[1] for k in EXPECTED} <= laws
    assert {k[2] for k in EXPECTED if len(k) > 2} <= ALL


def test_some_method_fits_every_case():
    assert {c for m in METHODS for c in fitting(m)} == ALL


@law
def test_law_00_wrap_does_what_plan_says(method, case):
    """plan accepted the pair, so wrap must."""
    base = build(case)
    rows = peftlab.plan(base, method, **keywords(method, case)).rows
    wrap(base, method, case)
    assert sorted(r.path for r in rows) == sorted(s.path for s, _ in sites(base))


# ---------------------------------------------------------------- 1. the start


@law_of_starts
def test_law_01_start_is_the_base(method, case):
    base, model, x = subject(method, case)
    for training in (True, False):
        base.train(training), model.train(training)
        torch.testing.assert_close(model(*x), base(*x), **TIGHT)


@law_of_starts
def test_law_01_start_is_the_base_bit_for_bit(method, case):
    """In the precisions that people train in. A method that cannot is named in ROUNDED_START, and only stays close."""
    for dtype in (torch.float32, torch.bfloat16):
        base, model, x = subject(method, case, dtype)
        y = model(*x)
        # Torch takes other kernels for weights that need no gradient. Which of the two the adapted layer meets is not ours to say.
        wanted = [copy.deepcopy(base).requires_grad_(flag)(*x) if is_float(base) else base(*x) for flag in (True, False)]
        if method in ROUNDED_START or case in RELAID:
            torch.testing.assert_close(y, wanted[0], rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        else:
            assert y.dtype == wanted[0].dtype
            assert any(torch.equal(y, w) for w in wanted), f"largest difference {(y - wanted[0]).abs().max():.3e}"


# ---------------------------------------------------------------- 2. fast path and definition


@law_of_definitions
def test_law_02_fast_path_is_the_definition(method, case):
    base, model, x = moved(method, case)
    tensors = list(own(model).values())
    y, found = gradients(model, x, tensors)
    wanted_y, wanted = gradients(reference(model, base), x, tensors)
    assert not torch.equal(wanted_y, base(*x)), "the perturbed adapter changes nothing: the comparison says nothing"
    torch.testing.assert_close(y, wanted_y, **TIGHT)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@law_of_definitions
def test_law_02_in_eval_mode_too(method, case):
    """Torch has fused paths that only run in eval mode without gradients, and read weights behind the modules' backs."""
    base, model, x = moved(method, case)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(*x), reference(model, base, detach=True)(*x), **TIGHT)


@law_of_dropout
def test_law_02_dropout_is_the_adapters_alone(method, case):
    """Dropout acts on the adapter's branch: the frozen path never sees it, and neither does eval mode, a merge or the generator outside."""
    base = build(case)
    model = peftlab.wrap(copy.deepcopy(base), method, **{**keywords(method, case), "dropout": 0.5}, **data(case), dtype=torch.float64)
    base.requires_grad_(False)
    x = inputs(case)
    model.train(), base.train()
    torch.testing.assert_close(model(*x), copy.deepcopy(base)(*x), **TIGHT)  # a copy: with max_norm torch edits the table that it looks up
    perturb(model)
    wanted = reference(model, base, detach=True)(*x)
    noisy = [model(*x) for _ in range(2)]
    model.eval()
    base.eval()
    torch.testing.assert_close(model(*x), reference(model, base, detach=True)(*x), **TIGHT)
    surrounded = any(not s.read_only and s.rule.name != "embedding" for s, _ in sites(model))
    assert torch.equal(*noisy) is not surrounded, "dropout needs the call: layers that are read, and token ids, have none"
    if not surrounded:
        torch.testing.assert_close(noisy[0], wanted, **TIGHT)


# ---------------------------------------------------------------- 3. merging


@law
def test_law_03_merged_is_wrapped_and_unmerge_gives_the_bits_back(method, case):
    base, model, x = moved(method, case)
    model.eval(), base.eval()
    before = state(model)
    if not mergeable(model):
        with pytest.raises(ValueError, match="merged"):
            merge(model)
        assert_state(model, before)
        return
    twin = reference(model, base, detach=True)
    y = model(*x)
    report = merge(model)
    assert report.layers > 0
    assert report.max_delta > 0
    torch.testing.assert_close(model(*x), y, **TIGHT)
    torch.testing.assert_close(model(*x), twin(*x), **TIGHT)
    adapters = {p.untyped_storage().data_ptr() for p in own(model).values()}
    for path, host, _ in stacks(model):
        for k, p in host._parameters.items():
            if p is not None:
                assert p.untyped_storage().data_ptr() not in adapters, "a later step of the adapter would change the merged weight"
                torch.testing.assert_close(p.detach(), twin.get_submodule(path)._parameters[k].detach(), **TIGHT)
    peftlab.unmerge(model)
    assert_state(model, before)
    torch.testing.assert_close(model(*x), y, **TIGHT)


@law
def test_law_03_merge_and_unload_leaves_a_plain_model(method, case):
    base, model, x = moved(method, case)
    model.eval(), base.eval()
    if not mergeable(model):
        pytest.skip("cannot be merged")
    twin = reference(model, base, detach=True)
    merge(model, unload=True)
    if any(isinstance(m, Quantised) for m in base.modules()) and not any(isinstance(m, Quantised) for m in model.modules()):
        base = peftlab.dequantize(base)  # what was merged onto decoded values is dense
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(model(*x), twin(*x), **TIGHT)


@law_once
def test_law_03_a_thousand_cycles_in_bfloat16(method, case):
    base, model, x = moved(method, case, torch.bfloat16)
    if not mergeable(model):
        pytest.skip("cannot be merged")
    before = state(model)
    for _ in range(1000):
        merge(model)
        peftlab.unmerge(model)
    assert_state(model, before)
    merge(model)
    with peftlab.disabled(model):
        assert_bits(model(*x), base(*x))
    peftlab.unwrap(model)
    assert_bits(model(*x), base(*x))


# ---------------------------------------------------------------- 4. unwrapping


@law
def test_law_04_unwrap_restores_everything(method, case):
    model, x = build(case), inputs(case)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(p.is_floating_point() and i % 2 == 0)
    calls = []
    for path, m in model.named_modules():
        m.register_forward_hook(lambda *_, path=path: calls.append(path))
    base = copy.deepcopy(model)
    base.train()(*x)
    wanted, before = list(calls), state(model)
    base = copy.deepcopy(model)
    wrap(model, method, case)
    perturb(model)
    model.train()
    calls.clear()
    loss_of(model, x).backward()  # moves a BatchNorm's statistics too
    assert calls == wanted, "hooks that were there before are called as before"
    model.eval()
    if mergeable(model):
        merge(model)
    model.train()
    assert peftlab.unwrap(model) is model
    assert_state(model, before)
    base.train()
    assert_bits(model(*x), base(*x))


@law
def test_law_04_objects_and_paths_stay(method, case):
    """Nothing that was there is renamed, replaced or of another kind while the model is wrapped."""
    base = build(case)
    modules = dict(base.named_modules())
    tensors = {k: id(t) for k, t in [*base.named_parameters(), *base.named_buffers()]}
    keys = base.state_dict().keys()
    kinds = {k: type(m) for k, m in modules.items()}
    signatures = {k: inspect.signature(m.forward) for k, m in modules.items()}
    wrap(base, method, case)
    for k, m in modules.items():
        assert base.get_submodule(k) is m
        assert isinstance(m, kinds[k])
        assert type(m).__name__ == kinds[k].__name__
        assert inspect.signature(m.forward) == signatures[k]
    now = dict([*base.named_parameters(), *base.named_buffers()])
    assert {k: id(now[k]) for k in tensors} == tensors
    assert keys <= base.state_dict().keys()
    assert all(any(part.startswith(CHILD) for part in k.split(".")) for k in [*(now.keys() - tensors.keys()), *(base.state_dict().keys() - keys)])


# ---------------------------------------------------------------- 5. what trains


@law
def test_law_05_trains_all_of_its_own_and_nothing_else(method, case):
    base, model, x = moved(method, case)
    mine = own(model)
    assert mine
    assert {k for k, p in model.named_parameters() if p.requires_grad} == mine.keys()
    frozen = {k: bits(p) for k, p in model.named_parameters() if k not in mine}
    start = {k: p.detach().clone() for k, p in mine.items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = loss_of(model, x)
    loss.backward()
    for k, p in model.named_parameters():
        if k in mine:
            assert p.grad is not None, f"{k} gets no gradient"
            assert torch.isfinite(p.grad).all()
            assert p.grad.abs().max() > 0, f"the gradient of {k} is zero"
        else:
            assert p.grad is None, f"the frozen {k} gets a gradient"
    optimizer.step()
    assert {k: bits(p) for k, p in model.named_parameters() if k not in mine} == frozen
    assert all(not torch.equal(p, start[k]) for k, p in mine.items())
    # And the next forward sees the step: nothing of the last one may be left in a cache.
    if class_of(method).defined():
        torch.testing.assert_close(model(*x), reference(model, base)(*x), **TIGHT)


@law_of_smooth_layers
def test_law_05_gradcheck(method, case):
    _, model, x = moved(method, case)
    mine = list(own(model).values())
    floats = [t.clone().requires_grad_() for t in x if t.is_floating_point()]

    def f(*args):
        rest = iter(args[len(mine) :])
        return model(*(next(rest) if t.is_floating_point() else t for t in x))

    assert torch.autograd.gradcheck(f, (*mine, *floats), fast_mode=True)


# ---------------------------------------------------------------- 6. counts


def formula(method: str, model: nn.Module) -> Fraction:
    """`Trains:` of the docstring, summed over the sites; what all sites share is written there divided by `sites`."""
    entry = registry.entries()[method]
    cls = class_of(method)
    pairs = sites(model)
    total = Fraction(0)
    for site, m in pairs:
        hyper = {k: p.default for k, p in registry.keywords(cls).items()} | m.recipe.hyper
        facts = dict(
            n_out=site.n_out, n_in=site.n_in, shape=site.shape, numel=math.prod(site.shape), has_bias=site.has_bias,
            sites=Fraction(len(pairs)), site=site, min=min, max=max,
        )  # fmt: skip
        total += Fraction(eval(entry.trains, vars(sys.modules[cls.__module__]) | hyper | facts))
    return total


@law
def test_law_06_counts_agree(method, case):
    """The formula of the docstring, plan, wrap, plan and wrap on meta, and the bytes of the file."""
    base = build(case, torch.float32)
    planned = peftlab.plan(base, method, **keywords(method, case))
    with torch.device("meta"):
        hollow = CASES[case].make()
    on_meta = peftlab.plan(hollow, method, **keywords(method, case))
    model = wrap(base, method, case, dtype=None)
    count = sum(p.numel() for p in own(model).values())
    assert formula(method, model) == count
    assert planned.trainable == count
    assert on_meta.trainable == count
    assert sum(r.trainable for r in planned.rows) <= count
    size = sum(t.numel() * t.element_size() for k, t in model.state_dict().items() if any(part.startswith(CHILD) for part in k.split(".")))
    assert planned.file_bytes == size
    assert on_meta.file_bytes == size
    if needs_data(method, case):
        return  # a start from data cannot be had on meta
    peftlab.wrap(hollow, method, **keywords(method, case))
    assert sum(p.numel() for p in own(hollow).values()) == count
    assert {k: p.shape for k, p in own(hollow).items()} == {k: p.shape for k, p in own(model).items()}
    assert all(p.is_meta for p in own(hollow).values())


def needs_data(method: str, case: str) -> bool:
    try:
        peftlab.wrap(build(case), method, **keywords(method, case))
    except ValueError as e:
        return "give data=" in str(e)
    return False


@law
def test_law_06_estimate_agrees(method, case):
    estimate = peftlab.estimate
    base = build(case, torch.float32)
    planned = peftlab.plan(base, method, **keywords(method, case))
    assert estimate(base, method, **keywords(method, case)).trainable == planned.trainable


# ---------------------------------------------------------------- 7. files


@law
def test_law_07_save_and_load_are_exact(method, case, tmp_path):
    base, model, x = moved(method, case)
    model.eval(), base.eval()
    y = model(*x)
    report = peftlab.save(model, tmp_path / "a.safetensors")
    assert report.adapters["default"] == sum(t.numel() * t.element_size() for t in saved(model).values())
    fresh = build(case).eval()
    torch.manual_seed(1234)  # what is derived from a seed must not come from here
    peftlab.load(fresh, tmp_path / "a.safetensors")
    there = saved(fresh)
    assert there.keys() == saved(model).keys()
    for k, t in saved(model).items():
        assert_bits(there[k], t)
    assert_bits(fresh(*x), y)
    assert {k for k, p in fresh.named_parameters() if p.requires_grad} == {k for k, p in model.named_parameters() if p.requires_grad}
    renamed = build(case).eval()
    peftlab.load(renamed, tmp_path / "a.safetensors", names={"default": "another"})
    assert_bits(renamed(*x), y)
    # The same file fills the adapter that is there already.
    perturb(fresh, seed=3)
    assert not torch.equal(fresh(*x), y)
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert_bits(fresh(*x), y)
    again = peftlab.save(fresh, tmp_path / "b.safetensors")
    assert again.bytes == report.bytes
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def saved(model: nn.Module) -> dict[str, Tensor]:
    return {k: t for k, t in model.state_dict().items() if any(part.startswith(CHILD) for part in k.split("."))}


@law
def test_law_07_a_damaged_file_is_refused(method, case, tmp_path):
    _, model, _ = moved(method, case)
    peftlab.save(model, tmp_path / "a.safetensors")
    blob = (tmp_path / "a.safetensors").read_bytes()
    head = int.from_bytes(blob[:8], "little") + 8
    fresh = build(case)
    before = state(fresh)
    spoilt = {
        "half of it is missing": blob[: head + (len(blob) - head) // 2],
        "one bit of the last tensor": blob[:-1] + bytes([blob[-1] ^ 4]),
        "one bit of the first tensor": blob[:head] + bytes([blob[head] ^ 1]) + blob[head + 1 :],
        "one letter of the header": blob.replace(b"settings", b"sottings", 1),
        "one digit of the header": blob.replace(b'seed\\":0', b'seed\\":1', 1),
        "empty": b"",
    }
    for what, content in spoilt.items():
        assert content != blob, what
        (tmp_path / "b.safetensors").write_bytes(content)
        with pytest.raises(peftlab.LoadError):
            peftlab.load(fresh, tmp_path / "b.safetensors")
        assert_state(fresh, before)


@law
def test_law_07_another_base_is_refused(method, case, tmp_path):
    _, model, x = moved(method, case)
    model.eval()
    y = model(*x)
    peftlab.save(model, tmp_path / "a.safetensors")
    other = Net(nn.Linear(3, 5))  # other shapes, or no such place at all
    before = state(other)
    with pytest.raises(peftlab.LoadError):
        peftlab.load(other, tmp_path / "a.safetensors")
    assert_state(other, before)
    near = build(case).eval()  # the same shapes with other values
    with torch.no_grad():
        for p in near.parameters():
            p.add_(1 if p.is_floating_point() else 17)  # both halves of a byte of codes
    before = state(near)
    if all(m.replaces or s.rule.name == "opaque" for s, m in sites(model)):
        peftlab.load(near, tmp_path / "a.safetensors")  # what it holds does not depend on the frozen values
        assert near(*x).shape == y.shape
        return
    with pytest.raises(peftlab.LoadError, match="other values"):
        peftlab.load(near, tmp_path / "a.safetensors")
    assert_state(near, before)
    peftlab.load(near, tmp_path / "a.safetensors", allow_base_mismatch=True)


@law_once
def test_law_07_keys_come_from_structure(method, case, tmp_path):
    """Neither a base whose own names look like an adapter's, nor an adapter with a strange name, confuses a file."""

    class Lookalike(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build(case)
            self.register_buffer("lora_A", torch.ones(2, dtype=torch.float64))
            self.default = nn.Linear(2, 2).double()
            self.lora_B = nn.Linear(2, 2).double()

        def forward(self, *x):
            return self.inner(*x)

    torch.manual_seed(0)
    base = Lookalike()
    model = wrap(copy.deepcopy(base), method, case, name="weight_layer")
    perturb(model)
    x = inputs(case)
    peftlab.save(model, tmp_path / "a.safetensors")
    peftlab.load(base, tmp_path / "a.safetensors")
    assert saved(base).keys() == saved(model).keys()
    assert_bits(base(*x), model(*x))


# ---------------------------------------------------------------- 8. switching off


@law
def test_law_08_disabled_is_the_base(method, case):
    base, model, x = moved(method, case)
    for training in (True, False):
        base.train(training), model.train(training)
        off = copy.deepcopy(base)(*x)  # a copy: BatchNorm counts, and inside the block what it counts is forgotten
        y = model(*x)
        with peftlab.disabled(model):
            assert_bits(model(*x), off)
        torch.testing.assert_close(model(*x), y, **TIGHT)
        assert not torch.equal(y, off)
    if mergeable(model):
        merge(model)
        with peftlab.disabled(model):
            assert_bits(model(*x), off)
        torch.testing.assert_close(model(*x), y, **TIGHT)


# ---------------------------------------------------------------- 9. several


@law_of_pairs
def test_law_09_stacks(method, above, case):
    """`above` on `method`: the output, its gradients, the merged stack, either one alone, and one after the other is taken off."""
    base = build(case).requires_grad_(False).eval()
    model = wrap(copy.deepcopy(base), method, case, name="one")
    before = state(model)
    try:
        wrap(model, above, case, name="two")
    except ValueError as e:  # a layer whose weight is packed takes both only where neither needs to see the other's work
        if "only offers a call" not in str(e):
            raise
        assert_state(model, before)
        return
    perturb(model)
    x = inputs(case)
    tensors = list(own(model).values())
    y, found = gradients(model, x, tensors)
    wanted_y, wanted = gradients(reference(model, base), x, tensors)
    torch.testing.assert_close(y, wanted_y, **TIGHT)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    alone = {n: reference(model, base, [n], detach=True)(*x) for n in ("one", "two")}
    for n in ("one", "two"):
        peftlab.activate(model, n)
        torch.testing.assert_close(model(*x), alone[n], **TIGHT)
    peftlab.activate(model, ["two", "one"])  # the order is that of wrapping, whatever is said here
    y = model(*x)
    torch.testing.assert_close(y, wanted_y, **TIGHT)
    if mergeable(model, "one") and mergeable(model, "two"):
        merge(model)
        torch.testing.assert_close(model(*x), y, **TIGHT)
        peftlab.unmerge(model)
        merge(model, "one")  # the lower one may always go first
        torch.testing.assert_close(model(*x), y, **TIGHT)
        peftlab.unmerge(model)
    torch.testing.assert_close(model(*x), y, **TIGHT)
    peftlab.unwrap(model, "one")
    torch.testing.assert_close(model(*x), alone["two"], **TIGHT)
    peftlab.unwrap(model)
    assert_bits(model(*x), base(*x))


@law
def test_law_09_two_names_of_one_method(method, case):
    base = build(case).requires_grad_(False)
    model = wrap(copy.deepcopy(base), method, case, name="a")
    wrap(model, method, case, name="b")
    x = inputs(case)
    perturb(model)
    model.eval()
    y = model(*x)
    if class_of(method).defined():
        torch.testing.assert_close(y, reference(model, base, detach=True)(*x), **TIGHT)
    peftlab.activate(model, "a")
    a = model(*x)
    peftlab.activate(model, "b")
    b = model(*x)
    assert not torch.equal(a, b)
    peftlab.activate(model, None)
    assert_bits(model(*x), base.eval()(*x))
    peftlab.activate(model, ["a", "b"])
    assert_bits(model(*x), y)
    with pytest.raises(ValueError, match="already"):
        wrap(model, method, case, name="b")
    peftlab.unwrap(model, "b")
    torch.testing.assert_close(model(*x), a, **TIGHT)
    wrap(model, method, case, name="b")  # made anew, at its start
    if class_of(method).neutral:
        torch.testing.assert_close(model(*x), a, **TIGHT)


@law
def test_law_09_a_refused_call_changes_nothing(method, case):
    model = build(case)
    before = state(model)
    kw = keywords(method, case)
    for spoilt in (dict(name="a.b"), dict(targets="no_such_place"), dict(no_such_option=1), dict(seed=0.5), dict(dtype=torch.int32), dict(exclude="nowhere")):
        with pytest.raises((ValueError, TypeError)):
            peftlab.wrap(model, method, **{**kw, **data(case), **spoilt})
        assert_state(model, before)
    wrap(model, method, case)
    perturb(model)
    before = state(model)
    for call in (
        lambda: wrap(model, method, case),
        lambda: peftlab.activate(model, "other"),
        lambda: peftlab.unmerge(model),
        lambda: merge(model, "other"),
        lambda: peftlab.unwrap(model, "other"),
        lambda: peftlab.save(model, "nowhere.safetensors", names="other"),
    ):
        with pytest.raises(ValueError, match=r"already|there is no adapter|none of"):
            call()
        assert_state(model, before)


OPERATIONS = 14


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] if s >= 8 else []) for s in range(80)])
def test_law_09_any_sequence_of_operations(seed):
    """Whatever was done before, the model equals the equations of what is active; an operation that is refused changes nothing."""
    rng = random.Random(seed)
    case = rng.choice(["linear", "two", "conv2d_groups", "attention", "embedding", "lstm", "fused"])
    there = [m for m in METHODS if fits(m, case) and class_of(m).defined()]
    base, x = build(case).eval().requires_grad_(False), inputs(case)
    model = copy.deepcopy(base)
    count = 0
    for _ in range(OPERATIONS):
        names = list(dict.fromkeys(n for _, _, s in stacks(model) for n in s.order))
        some = rng.sample(names, rng.randint(1, len(names))) if names else None
        operation = rng.choice(["wrap", "activate", "merge", "merge", "unmerge", "unwrap", "copy", "none"]) if names else "wrap"
        before = state(model)
        try:
            if operation == "wrap":
                count += 1
                wrap(model, rng.choice(there), case, name=f"n{count}", seed=count)
                perturb_new(model, f"n{count}")
            elif operation == "copy":
                model = pickle.loads(pickle.dumps(model)) if rng.random() < 0.5 else copy.deepcopy(model)
            elif operation != "none":
                (merge if operation == "merge" else getattr(peftlab, operation))(model, some)
        except ValueError:
            assert_state(model, before)
        torch.testing.assert_close(model(*x), reference(model, base, detach=True)(*x), **TIGHT, msg=lambda m, o=operation: f"after {o}: {m}")
        with peftlab.disabled(model):
            assert_bits(model(*x), base(*x))
    peftlab.unwrap(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert_bits(model(*x), base(*x))


def perturb_new(model: nn.Module, name: str) -> None:
    g = torch.Generator().manual_seed(hash(name) % 1000 if name.isdigit() else len(name))
    with torch.no_grad():
        for _, m in sites(model, name):
            for p in m.parameters():
                p.add_(0.15 * torch.randn(p.shape, generator=g, dtype=p.dtype))


# ---------------------------------------------------------------- 10. precisions


LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def runs(f) -> bool:
    """Whether torch itself can do it here; what it cannot is no matter of ours."""
    try:
        f()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def assert_near(y: Tensor, wanted: Tensor, dtype: torch.dtype, ulps: float = 16) -> None:
    """Within a few roundings of the largest entry."""
    scale = max(wanted.abs().max().item(), 1.0)
    error = (y.double() - wanted.double()).abs().max().item()
    assert error <= ulps * torch.finfo(dtype).eps * scale, f"error {error:.3e} at scale {scale:.3g}"


@pytest.mark.parametrize("low", LOW)
@law
def test_law_10_low_precision_base(method, case, low):
    """Adapter in float32, output in the base's precision, and as near to the exact value as that precision allows."""
    dtype = LOW[low]
    base, x = build(case, dtype), inputs(case, dtype)
    if not runs(lambda: loss_of(copy.deepcopy(base), x).backward()):
        pytest.skip(f"torch has no {low} for this layer on this device")
    model = wrap(copy.deepcopy(base), method, case, dtype=None)
    assert {p.dtype for p in own(model).values()} == {torch.float32}
    perturb(model)
    model.train()
    y = model(*x)
    assert y.dtype == base(*x).dtype
    loss_of(model, x).backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in own(model).values())
    wanted = exact(model, base)(*(t.double() if t.is_floating_point() else t for t in x))
    assert_near(y, wanted, dtype)
    model.eval()
    y = model(*x)
    if mergeable(model):
        merge(model)
        merged = model(*x)
        assert merged.dtype == y.dtype
        assert_near(merged, wanted if not has_statistics(model) else y, dtype)
        peftlab.unmerge(model)
        assert_bits(model(*x), y)


def has_statistics(model: nn.Module) -> bool:
    return any(isinstance(m, nn.BatchNorm1d) for m in model.modules())


@law
def test_law_10_explicit_dtype_and_conversion(method, case):
    base, x = build(case, torch.float32), inputs(case, torch.float32)
    model = wrap(copy.deepcopy(base), method, case, dtype=torch.bfloat16)
    assert {p.dtype for p in own(model).values()} == {torch.bfloat16}
    perturb(model)
    assert model(*x).dtype == torch.float32
    loss_of(model, x).backward()
    y = model.eval()(*x)
    model.to(torch.float64)  # the whole model, adapters included, as any other
    assert {p.dtype for p in own(model).values()} == {torch.float64}
    double = tuple(t.double() if t.is_floating_point() else t for t in x)
    assert model(*double).dtype == torch.float64
    assert_near(y, model(*double), torch.bfloat16)


@law
def test_law_10_autocast(method, case):
    base, x = build(case, torch.float32), inputs(case, torch.float32)

    def mixed(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(*x)

    if not runs(lambda: mixed(base).float().sum().backward()):
        pytest.skip("torch cannot autocast this layer on this device")
    model = wrap(copy.deepcopy(base), method, case, dtype=None)
    if method not in ROUNDED_START and class_of(method).neutral:
        assert_bits(mixed(model), mixed(base))
    perturb(model)
    y = mixed(model)
    assert y.dtype == mixed(base).dtype
    assert_near(y, exact(model, base)(*(t.double() if t.is_floating_point() else t for t in x)), torch.bfloat16)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in own(model).values())


# ---------------------------------------------------------------- 11. what else torch does with a module


@law
def test_law_11_copies(method, case):
    """deepcopy, pickle and torch.save give an independent model with the same bits and classes."""
    _, model, x = moved(method, case)
    model.eval()
    y = model(*x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert_bits(twin(*x), y)
        assert [(n, type(m)) for n, m in twin.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
        assert {k: p.requires_grad for k, p in twin.named_parameters()} == {k: p.requires_grad for k, p in model.named_parameters()}
        perturb(twin, seed=9)
        assert not torch.equal(twin(*x), y)
        assert_bits(model(*x), y)
        with peftlab.disabled(twin):
            off = twin(*x)
        peftlab.unwrap(twin).requires_grad_(False)  # unwrap puts the flags back, and torch takes other kernels for them
        assert_bits(twin(*x), off)


@law
def test_law_11_compile_without_breaks(method, case):
    base, model, x = moved(method, case)
    torch._dynamo.reset()
    if not runs(lambda: torch.compile(copy.deepcopy(base), fullgraph=True, backend="eager")(*x)):
        pytest.skip("torch cannot compile this layer")
    torch._dynamo.reset()
    tensors = list(own(model).values())
    y, wanted = gradients(model, x, tensors)
    compiled_y, found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x, tensors)
    torch.testing.assert_close(compiled_y, y, **TIGHT)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@law
def test_law_11_export(method, case):
    base, model, x = moved(method, case)
    model.eval(), base.eval()
    if not runs(lambda: torch.export.export(copy.deepcopy(base), x)):
        pytest.skip("torch cannot export this layer")
    y = model(*x)
    torch.testing.assert_close(torch.export.export(model, x).module()(*x), y, **TIGHT)
    if mergeable(model):
        merge(model)
        torch.testing.assert_close(torch.export.export(model, x).module()(*x), y, **TIGHT)


@law
def test_law_11_activation_checkpointing(method, case):
    """Gradients are those without it, in both kinds; where the reentrant kind would lose them, it says so."""
    _, model, x = moved(method, case)
    model.train()
    tensors = list(own(model).values())

    def grads(run) -> list[Tensor]:
        for t in tensors:
            t.grad = None
        run().square().sum().backward()
        return [t.grad.clone() for t in tensors]

    anchor = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    wanted = grads(lambda: model(*x))
    for found in (
        grads(lambda: checkpoint(model, *x, use_reentrant=False)),
        grads(lambda: checkpoint(lambda a, *t: model(*t) + 0 * a, anchor, *x, use_reentrant=True)),
    ):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, **TIGHT)
    with pytest.raises(RuntimeError, match="reentrant"):
        checkpoint(model, *x, use_reentrant=True)


@law
def test_law_11_checkpoint_runs_again_what_ran(method, case):
    """What is active when backward runs is not what was active when forward ran: the recomputation must see the latter."""
    model = wrap(build(case), method, case, name="a")
    wrap(model, method, case, name="b")
    perturb(model)
    model.train()
    x = inputs(case)
    mine = {n: [p for k, p in own(model).items() if n in k.split(".")] for n in "ab"}

    def losses(run):
        out = {}
        for n in "ab":
            peftlab.activate(model, n)
            out[n] = run(*x).square().sum()
        peftlab.activate(model, None)
        return out

    def grads(run):
        for p in model.parameters():
            p.grad = None
        found = losses(run)
        (found["a"] + 2 * found["b"]).backward()
        return [p.grad for n in "ab" for p in mine[n]]

    wanted = [g.clone() for g in grads(model)]
    for a, b in zip(grads(lambda *t: checkpoint(model, *t, use_reentrant=False)), wanted, strict=True):
        assert a is not None, "an adapter that ran in forward was not there in the recomputation"
        torch.testing.assert_close(a, b, **TIGHT)


# ---------------------------------------------------------------- 12. seeds


def starts(model: nn.Module, name: str) -> dict[str, Tensor]:
    """All start values of an adapter, those that are not saved included."""
    out = {}
    for site, m in sites(model, name):
        out |= {f"{site.path}:{k}": t for k, t in [*m.named_parameters(), *m.named_buffers()]}
    holder = model._modules.get("peftlab_shared")
    if holder is not None and name in holder._modules:
        out |= {f"shared:{k}": t for k, t in [*holder._modules[name].named_parameters(), *holder._modules[name].named_buffers()]}
    return out


@law
def test_law_12_same_seed_same_values(method, case):
    """In any wrap order, whatever the global generators hold; and they are left alone."""
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    found = []
    for before, after in ((), ("lora",)), (("lora",), ()), (("ia3", "lora"), ()):
        model = build(case)
        partners = [p for p in (*before, *after) if fits(p, case) and together(method, p, case)]
        for p in partners if before else ():
            wrap(model, p, case, name=f"other_{p}")
        kept = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate(), torch.get_default_dtype()
        wrap(model, method, case, name="mine", seed=7)
        assert torch.equal(torch.get_rng_state(), kept[0])
        assert (np.random.get_state()[1].tobytes(), random.getstate(), torch.get_default_dtype()) == kept[1:]
        for p in partners if after else ():
            wrap(model, p, case, name=f"other_{p}")
        found.append(starts(model, "mine"))
        torch.manual_seed(99), np.random.seed(99), random.seed(99)
    first = found[0]
    for other in found[1:]:
        assert other.keys() == first.keys()
        for k, t in first.items():
            if method in ROUNDED_START:
                torch.testing.assert_close(other[k], t, **TIGHT)
            else:
                assert_bits(other[k], t)


def together(method: str, other: str, case: str) -> bool:
    """Whether the library takes both at one place: a layer whose weight is packed cannot always be surrounded and read."""
    try:
        wrap(wrap(build(case), other, case, name="other"), method, case, name="mine")
    except ValueError as e:
        if "only offers a call" not in str(e):
            raise
        return False
    return True


def digest() -> dict[str, str]:
    """A fingerprint of every method's start values on its first case."""
    out = {}
    for method in METHODS:
        h = hashlib.sha256()
        for k, t in sorted(starts(wrap(build(quick(method)[0]), method, quick(method)[0], seed=3), "default").items()):
            h.update(k.encode() + bits(t))
        out[method] = h.hexdigest()
    return out


def answers(folder: str) -> dict[str, str]:
    """A fingerprint of every method's output after its file is loaded under another name."""
    out = {}
    for method in METHODS:
        model = build(quick(method)[0]).eval()
        peftlab.load(model, Path(folder, f"{method}.safetensors"), names={"default": "renamed"})
        out[method] = hashlib.sha256(bits(model(*inputs(quick(method)[0])))).hexdigest()
    return out


def test_law_12_same_values_in_another_process(tmp_path):
    """Start values, and what is not in a file because it can be derived again, depend on nothing that a process brings along."""
    wanted = {}
    for method in METHODS:
        _, model, x = moved(method, quick(method)[0])
        wanted[method] = hashlib.sha256(bits(model.eval()(*x))).hexdigest()
        peftlab.save(model, tmp_path / f"{method}.safetensors")
    # As many threads as here: a Fourier transform's last bits depend on them.
    code = "import sys, json, torch; torch.set_num_threads(1); import test_conformance as t; print(json.dumps([t.digest(), t.answers(sys.argv[1])]))"
    here = str(Path(__file__).parent)
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join([here, str(Path(peftlab.__file__).parents[1])])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    starts_there, answers_there = json.loads(done.stdout.splitlines()[-1])
    assert starts_there == digest()
    assert answers_there == wanted


# ---------------------------------------------------------------- 14. learning

STEPS = 200


@law
def test_law_13_routed_is_row_by_row(method, case):
    _, model, _ = moved(method, case)
    wrap(model, method, case, name="other")
    perturb(model, seed=1)
    model.eval()
    dim = CASES[case].batch_dim
    x = tuple(torch.cat(ts, dim) for ts in zip(*(inputs(case, seed=s) for s in (1, 2, 3)), strict=True))
    n = x[0].shape[dim]
    names = [("other", None, "default", ["default", "other"], "other")[i * 3 % 5] for i in range(n)]
    mine = list(own(model).values())

    def one_by_one():
        for i, name in enumerate(names):
            with peftlab.using(model, name):
                yield model(*(t.narrow(dim, i, 1) for t in x))

    rows = torch.cat(list(one_by_one()), dim)
    weights = torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).reshape(rows.shape)
    wanted = torch.autograd.grad((rows * weights).sum(), mine, allow_unused=True)
    with peftlab.route(model, names, batch_dim=dim):
        y = model(*x)
        found = torch.autograd.grad((y * weights).sum(), mine, allow_unused=True)
    torch.testing.assert_close(y, rows, rtol=1e-9, atol=1e-10)
    for a, b in zip(found, wanted, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(a.expand(b.shape) if a.ndim == 0 else a, b.expand(a.shape) if b.ndim == 0 else b, rtol=1e-8, atol=1e-9, check_dtype=False)


@law
def test_law_14_it_can_learn(method, case):
    """A teacher of the same kind; two hundred steps of Adam leave at most a twentieth of the starting loss."""
    _, teacher, x = subject(method, case)
    perturb(teacher, seed=1, size=0.1)
    teacher.train()
    target = teacher(*x).detach()
    _, model, _ = subject(method, case)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    peftlab.schedule(model, optimizer, total_steps=STEPS)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(*x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0
    assert max(losses[-20:]) < 0.05 * losses[0], f"from {losses[0]:.3e} to {losses[-1]:.3e}"
