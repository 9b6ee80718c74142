"""Nothing that is refused leaves a trace: wrong calls and damaged files raise one clear error, and the model and earlier files stay what they were."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import zlib
from contextlib import contextmanager
from pathlib import Path

import cases
import numpy as np
import pytest
import safetensors.torch
import torch
from cases import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftlab
from peftlab.core.stack import AdapterStack as Stack
from peftlab.formats import file
from peftlab.registry import keywords, resolve
from peftlab.support.files import LoadError

# ---------------------------------------------------------------- what "unchanged" means


def bits(t: torch.Tensor) -> bytes | None:
    return None if t.is_meta else t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def plain(value: object) -> object:
    """Simple values compare by value, everything else by identity."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, set):
        return sorted(map(repr, value))
    return id(value)


TABLES = ("_parameters", "_buffers", "_modules")
HOOKS = [k for k in vars(nn.Module()) if "hooks" in k]


def state_of(model: nn.Module) -> dict:
    """Everything that a user can see of a model and of the process around it, under names that make a difference readable."""
    out: dict = {}
    for path, m in model.named_modules(remove_duplicate=False):
        out[f"{path}: object"] = (id(m), type(m).__name__, id(type(m)))
        out[f"{path}: training"] = m.training
        if isinstance(m, Stack):  # bookkeeping: what it means counts, not which tables hold it
            out[f"{path}: adapters"] = (m.order, m.active, m.merged, m.read, [(id(a), id(b)) for links in m.links[:2] for a, b in links])
            out[f"{path}: kept"] = {k: bits(b) for k, b in m._buffers.items()}
            continue
        for k, v in vars(m).items():
            if k in HOOKS:
                out[f"{path}: {k}"] = [(key, id(h)) for key, h in v.items()] if isinstance(v, dict) else plain(v)
            elif k in TABLES:
                out[f"{path}: {k}"] = [(name, id(t)) for name, t in v.items()]
            elif k == "_peftlab_ledger":
                out[f"{path}: ledger"] = (dict(v.flags), copy.deepcopy(v.targets), {b: bits(t) for b, t in v.buffers.items()})
            elif k != "history":
                out[f"{path}: {k}"] = plain(v)
        for name, t in [*m._parameters.items(), *m._buffers.items()]:
            if t is not None:
                grad = None if t.grad is None else bits(t.grad)
                out[f"{path}: {name}"] = (t.dtype, str(t.device), tuple(t.shape), t.stride(), t.requires_grad, grad, bits(t))
                hooks = [getattr(t, h, None) for h in ("_backward_hooks", "_post_accumulate_grad_hooks")]
                out[f"{path}: hooks of {name}"] = [sorted(h) for h in hooks if h]
    out["state_dict"] = list(model.state_dict())
    return out | process_state()


def process_state() -> dict:
    numpy = np.random.get_state()
    return {
        "torch rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
        "numpy rng": (numpy[1].tolist(), numpy[2:]),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "device": torch.get_default_device(),
    }


@contextmanager
def unchanged(model: nn.Module):
    """The model, its flags, modes, hooks and bits, and the global generators are after the block what they were before it."""
    before = state_of(model)
    yield
    after = state_of(model)
    assert after.keys() == before.keys(), sorted(after.keys() ^ before.keys())
    odd = [k for k in before if after[k] != before[k]]
    assert not odd, odd


# What Python says when nobody looked at the value before.
UNCLEAR = re.compile(
    r"object is not (callable|iterable|subscriptable)|has no attribute|unhashable|not supported between|argument of type|sequence item|unexpected keyword"
)


@contextmanager
def refused(model: nn.Module, *words: str, errors=(ValueError, TypeError)):
    """One clear error that says these words, and nothing else happens."""
    with unchanged(model):
        with pytest.raises(errors) as e:
            yield
    said = str(e.value)
    assert said.strip()
    assert not UNCLEAR.search(said), said
    for word in words:
        assert word in said, f"{word!r} is not in: {said}"


def attempt(call, errors=(ValueError, TypeError)) -> Exception | None:
    """What the call raised; anything but these errors is let through."""
    try:
        call()
    except errors as e:
        return e
    return None


# ---------------------------------------------------------------- models in several states


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.q_proj, self.v_proj = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        return self.out(self.norm(self.drop(torch.tanh(self.q_proj(x)) * self.v_proj(x)).transpose(-1, -2)).transpose(-1, -2))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def fresh() -> Net:
    torch.manual_seed(0)
    return Net()


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def wrapped() -> Net:
    """Two adapters, one of them inactive; trained statistics; a module in eval mode; a hook; a gradient."""
    model = fresh()
    model.out.weight.requires_grad_(False)
    model.out.register_forward_hook(lambda *_: None)
    peftlab.wrap(model, "lora", r=2, targets=["q_proj", "v_proj"], name="first")
    peftlab.wrap(model, "dora", r=2, targets="q_proj", name="second")
    randomised(model)
    model(IDS).sum().backward()
    peftlab.activate(model, ["first"])
    model.drop.eval()
    return model


def merged() -> Net:
    model = wrapped()
    peftlab.activate(model, ["first", "second"])
    peftlab.merge(model, "first")
    return model


STATES = {"fresh": fresh, "wrapped": wrapped, "merged": merged}
in_every_state = pytest.mark.parametrize("make", STATES.values(), ids=STATES)


@in_every_state
def test_the_guard_itself_sees_changes(make):
    """`unchanged` is what all tests here rest on, so it must notice the smallest change of each kind."""
    changes = [
        lambda m: m.q_proj.weight.data.view(-1)[3:4].mul_(1 + 2e-7),
        lambda m: m.q_proj.bias.requires_grad_(not m.q_proj.bias.requires_grad),
        lambda m: m.norm.eval(),
        lambda m: m.norm.running_mean.add_(1e-3),
        lambda m: torch.rand(1),
        lambda m: random.random(),
        lambda m: np.random.rand(),
        lambda m: m.q_proj.register_forward_pre_hook(lambda *_: None),
        lambda m: m.add_module("x", nn.Identity()),
        lambda m: m.register_parameter("p", nn.Parameter(torch.zeros(1))),
        lambda m: setattr(m.q_proj, "in_features", 7),
        lambda m: setattr(m.q_proj, "__class__", type("Linear", (type(m.q_proj),), {})),
        lambda m: setattr(m.q_proj._parameters["weight"], "grad", torch.ones(8, 6)),
    ]
    for change in changes:
        model = make()
        with pytest.raises(AssertionError):
            with unchanged(model):
                change(model)


# ---------------------------------------------------------------- wrap


WRONG_WRAPS = [
    # method, keywords, words of the error
    ("lorra", {}, ["'lorra'", "'lora'"]),
    ("LoRA", {}, ["'LoRA'", "'lora'"]),
    (None, {}, ["None"]),
    (nn.Linear, {}, ["Linear"]),
    (peftlab.Method, {}, ["Method"]),
    ("lora", dict(rank=2), ["'rank'", "'r'"]),
    ("lora", dict(lora_alpha=2), ["'lora_alpha'", "'alpha'"]),
    ("lora", dict(r=2, droput=0.1), ["'droput'", "'dropout'"]),
    ("lora", dict(r=0), ["r=0", "at least 1"]),
    ("lora", dict(r=-3), ["r=-3", "at least 1"]),
    ("lora", dict(r=2.5), ["r=2.5", "whole number"]),
    ("lora", dict(r="8"), ["r='8'", "whole number"]),
    ("lora", dict(r=True), ["r=True", "whole number"]),
    ("lora", dict(r=None), ["r=None", "whole number"]),
    ("lora", dict(r=7, targets=["q_proj"]), ["r=7", "at most 6", "'q_proj'"]),
    ("lora", dict(r=1_000_000), ["r=1000000", "at most 6"]),
    ("lora", dict(r=5, targets=["q_proj", "out"]), ["r=5", "at most 3", "'out'"]),  # fits the first site and not the second
    ("dora", dict(r=5, targets=["q_proj", "out"]), ["r=5", "at most 3", "'out'"]),
    ("lora", dict(r=2, alpha=float("inf")), ["alpha=inf", "finite"]),
    ("lora", dict(r=2, alpha=float("nan")), ["alpha=nan", "finite"]),
    ("lora", dict(r=2, alpha="16"), ["alpha='16'", "finite"]),
    ("lora", dict(r=2, dropout=1.0), ["dropout=1.0", "[0, 1)"]),
    ("lora", dict(r=2, dropout=-0.1), ["dropout=-0.1", "[0, 1)"]),
    ("lora", dict(r=2, dropout=50), ["dropout=50", "[0, 1)"]),
    ("lora", dict(r=2, dropout=float("nan")), ["dropout=nan", "[0, 1)"]),
    ("lora", dict(r=2, init="pisa"), ["'pisa'", "pissa"]),
    ("lora", dict(r=2, bias="none"), ["bias='none'"]),  # as HF peft spells it; a true string must not train biases
    ("lora", dict(r=2, bias=True, targets="v_proj"), ["bias=True", "'v_proj'"]),
    ("lora", dict(r=2, rank_stabilized="no"), ["rank_stabilized='no'"]),
    ("pissa", dict(r=2, init="olora"), ["pissa", "init"]),
    ("oft", dict(block_size=4), ["block_size=4", "6"]),
    ("oft", dict(block_size=2, blocks=3), ["block_size", "blocks"]),
    ("ia3", dict(side="up"), ["'up'", "'out'", "'in'"]),
    ("fourierft", dict(n=10**9), ["n=1000000000", "entries"]),
    ("sparse", dict(density=0.0), ["density=0.0", "(0, 1]"]),
    ("sparse", dict(density="0.1"), ["density='0.1'"]),
    ("tokens", dict(targets="embed"), ["ids"]),
    ("tokens", dict(targets="embed", ids=[]), ["ids=[]"]),
    ("tokens", dict(targets="embed", ids=[1, 7]), ["7", "embed"]),
    ("tokens", dict(targets="embed", ids=[-1]), ["-1"]),
    ("tokens", dict(targets="embed", ids=[1, 1]), ["1", "once"]),
    ("tokens", dict(targets="embed", ids=3), ["ids=3"]),
    ("full", dict(in_place="no"), ["in_place='no'"]),
    ("adalora", dict(r=4, init_r=3), ["r=4", "init_r=3"]),
    ("eva", dict(r=2), ["data="]),
    ("fish", {}, ["data="]),
    ("lora", dict(r=2, targets="q_porj"), ["'q_porj'", "'q_proj'"]),
    ("lora", dict(r=2, targets=["q_proj", "k_proj"]), ["'k_proj' matches nothing"]),
    ("lora", dict(r=2, targets=[]), ["targets"]),
    ("lora", dict(r=2, targets="norm"), ["'norm'", "BatchNorm1d"]),
    ("lora", dict(r=2, targets="drop"), ["'drop'", "Dropout"]),
    ("lora", dict(r=2, exclude="gone"), ["exclude", "'gone'"]),
    ("lora", dict(r=2, overrides={"gone": dict(r=1)}), ["overrides", "'gone'"]),
    ("lora", dict(r=2, overrides={"q_proj": dict(rank=1)}), ["overrides", "'rank'", "'r'"]),
    ("lora", dict(r=2, overrides={"q_proj": 3}), ["overrides", "'q_proj'", "3"]),
    ("lora", dict(r=2, overrides=[3]), ["overrides"]),
    ("lora", dict(r=2, layers=[0]), ["layers", "of="]),
    ("lora", dict(r=2, seed="a"), ["seed='a'"]),
    ("lora", dict(r=2, seed=1.5), ["seed=1.5"]),
    ("lora", dict(r=2, dtype="float16"), ["dtype='float16'"]),
    ("lora", dict(r=2, dtype=torch.int8), ["int8"]),
    ("lora", dict(r=2, tie="both"), ["tie='both'", "'share'", "'untie'"]),
    ("lora", dict(r=2, name="a.b"), ["name='a.b'"]),
    ("lora", dict(r=2, name=""), ["name=''"]),
    ("lora", dict(r=2, name=None), ["name=None"]),
    ("lora", dict(r=2, name="a/b"), ["name='a/b'"]),
    ("lora", dict(r=2, split={"q_proj": {"q": 4, "k": 5}}, targets="q"), ["split", "'q_proj'", "8 rows"]),
    ("lora", dict(r=2, split={"q_proj": {"q": 4, "k": 2}}, targets="q"), ["split", "6", "8 rows"]),
    ("lora", dict(r=2, split={"q_proj": {"q": -4, "k": 12}}, targets="q"), ["split", "'q'", "-4"]),
    ("lora", dict(r=2, split={"q_proj": {"q": 0, "k": 8}}, targets="q"), ["split", "'q'"]),
    ("lora", dict(r=2, split={"q_proj": {"q": [9, 1]}}, targets="q"), ["split", "'q'"]),
    ("lora", dict(r=2, split={"q_proj": {"q": [1, 1]}}, targets="q"), ["split", "'q'"]),
    ("lora", dict(r=2, split={"q_proj": {"q": [0, 1], "k": [1, 2]}}, targets="q"), ["split", "'k'"]),
    ("lora", dict(r=2, split={"q_proj": {"q": "ab"}}, targets="q"), ["split", "'q'"]),
    ("lora", dict(r=2, split={"q_proj": 5}, targets="q"), ["split", "'q_proj'"]),
    ("lora", dict(r=2, split={"q_proj": {"q.x": 8}}, targets="q.x"), ["split", "'q.x'"]),
    ("lora", dict(r=2, split={"gone": {"q": 8}}, targets="q"), ["split", "'gone'"]),
    ("lora", dict(r=2, split=7), ["split"]),
    ("lora", dict(r=2, layout={"q_proj": "ie"}), ["layout"]),
    ("lora", dict(r=2, layout=7), ["layout"]),
    ("lora", dict(r=2, of=5, layers=[0]), ["of"]),
]  # fmt: skip


@in_every_state
@pytest.mark.parametrize(("method", "kw", "words"), WRONG_WRAPS, ids=lambda v: re.sub(r"\W+", "_", str(v))[:60])
@pytest.mark.parametrize("verb", [peftlab.wrap, peftlab.plan], ids=["wrap", "plan"])
def test_a_wrong_wrap_is_refused(make, method, kw, words, verb):
    if verb is peftlab.plan and method in ("eva", "fish"):
        pytest.skip("a plan needs no data")
    model = make()
    with refused(model, *words):
        verb(model, method, **{"name": "new", **kw})


# Surely wrong, by the annotation of an option; what lies in the right type but out of range is above.
WRONG = {
    "int": [0, -1, 1.5, "2", [2], float("nan")],
    "float": [float("nan"), float("inf"), "x", [1.0], None],
    "bool": ["no", None, 1, 0.0],
    "str": ["nonsense", 5, None, ["x"]],
}


SMALL = {"r": 2, "init_r": 3, "n": 4, "ids": [1], "density": 0.3}


def small_options(method: str) -> dict:
    return {k: v for k, v in SMALL.items() if k in keywords(resolve(method)[0])}


PLACED = {e.name for e in peftlab.methods(aliases=False) if attempt(lambda e=e: peftlab.plan(fresh(), e.name, **small_options(e.name))) is None}


MAY_BE_ZERO = {("loreft", "first"), ("loreft", "last")}  # no token from that end


def wrong_options():
    for method in [e.name for e in peftlab.methods(aliases=False)]:
        known = keywords(resolve(method)[0])
        for option, p in known.items():
            kinds = [k.strip() for k in str(p.annotation).split("|")]
            if option == "seed" or kinds[0] not in WRONG:
                continue
            for value in WRONG[kinds[0]]:
                if not (value is None and "None" in kinds) and not (value == 0 and (method, option) in MAY_BE_ZERO):
                    yield method, option, value, small_options(method)


@pytest.mark.parametrize(("method", "option", "value", "base"), list(wrong_options()), ids=lambda v: re.sub(r"\W+", "_", str(v))[:20])
def test_every_option_of_every_method_is_checked(method, option, value, base):
    if method in PLACED:
        model, hyper = fresh(), base
    else:  # needs blocks, attention or tokens: the laws have a case for it
        case = cases.quick(method)[0]
        model, hyper = build(case, torch.float32), cases.keywords(method, case)
    with refused(model, option):
        peftlab.wrap(model, method, **{**hyper, option: value})


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Flatten()), nn.Module()], ids=["leaf", "chain", "empty"])
def test_a_model_without_parameters(model):
    for verb in (peftlab.wrap, peftlab.plan):
        with refused(model, type(model).__name__, "no parameters"):
            verb(model, "lora")


THINGS = [None, 5, "model", lambda x: x, torch.zeros(2), nn.Linear, nn.Linear(2, 2).weight, [nn.Linear(2, 2)]]


@pytest.mark.parametrize("thing", THINGS, ids=lambda v: type(v).__name__)
def test_what_is_not_a_module(thing, tmp_path):
    path = tmp_path / "a"
    peftlab.save(wrapped(), path)
    verbs = [
        lambda m: peftlab.wrap(m, "lora"), lambda m: peftlab.plan(m, "lora"), peftlab.merge, peftlab.unmerge, peftlab.unwrap, peftlab.snapshot, peftlab.shared_base_copy,
        lambda m: peftlab.save(m, tmp_path / "b"), lambda m: peftlab.load(m, path), lambda m: peftlab.activate(m, "a"), lambda m: peftlab.restore(m, {}),
        lambda m: peftlab.disabled(m).__enter__(), lambda m: peftlab.using(m, None).__enter__(),
        peftlab.freeze, peftlab.unfreeze, peftlab.train_only, peftlab.active,
    ]  # fmt: skip
    for verb in verbs:
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            verb(thing)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("make", [wrapped, merged])
def test_wrapping_twice_under_one_name(make):
    model = make()
    for method, kw in (("lora", dict(r=2)), ("bitfit", {}), ("lora", dict(r=2, targets="out"))):
        with refused(model, "'first'", "already"):
            peftlab.wrap(model, method, name="first", **kw)


class Broken(peftlab.Method):
    """Fails at the site whose name it is told, after building the others."""

    def __init__(self, base, *, at: str = "", error: str = "value"):
        super().__init__(base)
        self.s = nn.Parameter(torch.rand(()))
        if base.path == at and not base.meta:
            raise {"value": ValueError, "memory": MemoryError, "stop": KeyboardInterrupt}[error](f"broken at {at}")

    def weight(self, W):
        return W * self.s


@in_every_state
@pytest.mark.parametrize("error", ["value", "memory", "stop"])
def test_a_method_that_fails_at_its_last_site(make, error):
    model = make()
    with refused(model, "broken at out", errors=(ValueError, MemoryError, KeyboardInterrupt)):
        peftlab.wrap(model, Broken, targets=["q_proj", "v_proj", "out"], name="new", at="out", error=error)


class Silent(peftlab.Method):
    pass


def test_a_method_that_says_no_equation():
    model = fresh()
    with refused(model, "Silent", "weight, bias nor forward"):
        peftlab.wrap(model, Silent)


def batches(n, fail=None):
    for i in range(n):
        if i == fail:
            raise RuntimeError("the disk is gone")
        yield (torch.randint(7, (4, 3), generator=torch.Generator().manual_seed(i)),)


@in_every_state
@pytest.mark.parametrize(
    ("method", "kw", "words"),
    [
        ("eva", dict(r=2, data=lambda: batches(3, fail=2)), ["the disk is gone"]),
        ("eva", dict(r=2, data=lambda: []), ["no batch"]),
        ("eva", dict(r=2, data=lambda: 5), ["data"]),
        ("eva", dict(r=6, data=lambda: [(torch.zeros(1, 1, dtype=torch.long),)]), ["r=6"]),
        ("eva", dict(r=2, data=lambda: [(torch.full((1, 2), 99),)]), []),
        ("fish", dict(data=lambda: batches(2)), ["loss"]),
        ("fish", dict(data=lambda: batches(2), loss=lambda m, b: m(b[0])), []),
        ("fish", dict(data=lambda: batches(2), loss=5), ["loss"]),
        ("fish", dict(data=lambda: batches(3, fail=1), loss=lambda m, b: m(b[0]).sum()), ["the disk is gone"]),
    ],
    ids=lambda v: str(v)[:12] if isinstance(v, str) else "",
)
def test_a_start_from_data_that_fails(make, method, kw, words):
    model = make()
    targets = {"eva": ["q_proj", "v_proj"], "fish": ["q_proj", "v_proj"]}[method]
    with refused(model, *words, errors=(ValueError, TypeError, RuntimeError, IndexError)):
        peftlab.wrap(model, method, targets=targets, name="new", **{k: v() if k == "data" else v for k, v in kw.items()})


# ---------------------------------------------------------------- adapters' names, orders, states


@pytest.mark.parametrize("make", [wrapped, merged])
@pytest.mark.parametrize("name", ["frist", "", "q_proj", 5, ["first", "secnd"]], ids=str)
def test_an_unknown_adapter_name(make, name, tmp_path):
    model = make()
    path = tmp_path / "a"
    verbs = [peftlab.activate, peftlab.merge, peftlab.unmerge, peftlab.unwrap, peftlab.freeze, peftlab.unfreeze, peftlab.train_only, peftlab.snapshot]
    verbs += [lambda m, n: peftlab.save(m, path, n), lambda m, n: peftlab.using(m, n).__enter__()]
    for verb in verbs:
        if isinstance(name, list) and verb in (peftlab.freeze, peftlab.unfreeze, peftlab.train_only):
            continue  # these take names one by one
        with refused(model, *{"frist": ["'frist'", "'first'"]}.get(name, []) if isinstance(name, str) else []):
            verb(model, name)
    assert not path.exists()


def test_what_a_model_without_adapters_cannot_do(tmp_path):
    model = fresh()
    named = [lambda m: peftlab.save(m, tmp_path / "a"), lambda m: peftlab.activate(m, "first"), lambda m: peftlab.merge(m, "first")]
    for verb in (peftlab.merge, peftlab.unmerge, *named):
        with refused(model):
            verb(model)
    assert not list(tmp_path.iterdir())
    for verb in (peftlab.unwrap, lambda m: peftlab.activate(m, None), peftlab.snapshot):
        with unchanged(model):
            verb(model)


def test_merging_what_cannot_be_merged():
    model = wrapped()
    with refused(model, "'second'", "not active"):
        peftlab.merge(model, "second")
    with refused(model, "none of", "merged"):
        peftlab.unmerge(model)
    peftlab.activate(model, ["first", "second"])
    with refused(model, "'second'", "commute"):  # dora on lora: the upper one alone would move below
        peftlab.merge(model, "second")
    peftlab.merge(model)
    with refused(model, "merged already"):
        peftlab.merge(model)
    with refused(model, "'second'", "commute"):
        peftlab.unmerge(model, "first")


def test_activate_is_all_or_nothing():
    model = fresh()
    for name in "abc":
        peftlab.wrap(model, "oft", block_size=2, targets="q_proj", name=name)
    randomised(model)
    peftlab.activate(model, ["b", "c"])
    peftlab.merge(model)
    with refused(model, "commute"):
        peftlab.activate(model, ["a", "b"])  # c would have to be unmerged, and b must not lie above a


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_a_merge_that_is_not_finite(value, keep):
    model = wrapped()
    with torch.no_grad():
        model.v_proj.peftlab.first.B[1, 1] = value
        model.v_proj.peftlab.first.A[1] = 10
    with refused(model, "non-finite", "v_proj"):  # q_proj comes first and must be put back
        peftlab.merge(model, keep=keep)


def test_a_merge_that_rounds_to_nothing():
    model = fresh().bfloat16()
    peftlab.wrap(model, "lora", r=2, targets=["q_proj", "v_proj"])
    with torch.no_grad():
        for m in (model.q_proj, model.v_proj):
            m.peftlab.default.B.fill_(1e-9)
    for keep in (True, False):
        with refused(model, "rounding", "bfloat16"):
            peftlab.merge(model, keep=keep)


def test_a_lossy_merge_cannot_be_undone_or_built_upon():
    model = wrapped()
    peftlab.merge(model, keep=False)
    for verb in (peftlab.unmerge, peftlab.unwrap, lambda m: peftlab.disabled(m).__enter__(), lambda m: peftlab.activate(m, None)):
        with refused(model, "keep=False"):
            verb(model)


def test_a_restore_that_does_not_fit():
    model = wrapped()
    good = peftlab.snapshot(model)
    key = next(iter(good))
    for values in ({"gone": torch.zeros(2)}, {**good, key: torch.zeros(9, 9)}, {**good, key: None}, 5):
        with refused(model):
            peftlab.restore(model, values)
    for decay in (-0.1, 1.1, float("nan"), "x"):
        with refused(model, "decay"):
            peftlab.ema_update(dict(good), model, decay)
    with refused(model, key, "(9, 9)", str(tuple(good[key].shape))):
        peftlab.restore(model, {**good, key: torch.zeros(9, 9)})
    with refused(model, key + "x", "not there", f"Did you mean {key!r}"):
        peftlab.restore(model, {k + "x" * (k == key): v for k, v in good.items()})
    average = {"gone": torch.zeros(2)}
    with refused(model, "gone"):
        peftlab.ema_update(average, model, 0.5)


def test_disabled_puts_everything_back_when_the_block_fails():
    for make in (wrapped, merged):
        model = make()
        with unchanged(model), pytest.raises(RuntimeError, match="inside"):
            with peftlab.disabled(model):
                raise RuntimeError("inside")
        with unchanged(model), pytest.raises(RuntimeError, match="inside"):
            with peftlab.using(model, None):
                raise RuntimeError("inside")


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, peftlab.shared_base_copy], ids=["copy", "pickle", "view"])
def test_copies_are_made_outside_route(copied):
    """A copy of a model inside would stay there for ever."""
    model = wrapped().eval()
    y = model(IDS)
    with peftlab.route(model, ["first", None]), refused(model, "with route(model", "Copy it before"):
        copied(model)
    assert torch.equal(model(IDS), y)


def test_a_copy_made_inside_disabled_is_a_reference():
    model = wrapped().eval()
    y = model(IDS)
    with peftlab.disabled(model):
        base, reference = model(IDS), copy.deepcopy(model)
    assert torch.equal(reference(IDS), base)
    assert torch.equal(model(IDS), y)
    assert not torch.equal(base, y)
    with refused(reference, "a copy that was made inside has no block to leave"):
        peftlab.activate(reference, "first")


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {}), ("houlsby", dict(targets="v_proj")), ("mola", {}), ("eva", dict(data=[IDS])), ("lora_ga", dict(data=[IDS]))]
)
def test_wrapping_and_loading_in_inference_mode(method, options, tmp_path):
    """What trains is made as if outside it, with the same start."""
    small = {"dim": 2} if method == "houlsby" else {"r": 2}
    loss = {"loss": lambda m, b: m(b).square().sum()} if method == "lora_ga" else {}
    usual, model, loaded = fresh(), fresh(), fresh()
    peftlab.wrap(usual, method, **small, **options, **loss)
    with torch.inference_mode():
        peftlab.wrap(model, method, **small, **options, **loss)
        peftlab.save(model, tmp_path / "a")
        peftlab.load(loaded, tmp_path / "a")
    for m in (usual, model, loaded):
        m.eval()(IDS).square().sum().backward()
    for (k, p), q, r in zip(usual.named_parameters(), model.parameters(), loaded.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad == r.requires_grad, k
        if p.requires_grad:
            assert torch.equal(p, q), k
            assert torch.equal(p.grad, q.grad), k
            assert torch.equal(p.grad, r.grad), k


def test_a_base_made_in_inference_mode(tmp_path):
    with torch.inference_mode():
        model = fresh()
    peftlab.save(wrapped(), tmp_path / "a", names="first")
    for call in (lambda: peftlab.wrap(model, "lora", r=2), lambda: peftlab.load(model, tmp_path / "a")):
        with pytest.raises(ValueError, match="inference_mode"):
            call()
    assert not any("peftlab" in k for k, _ in model.named_modules())


@pytest.mark.parametrize("flag", ["keep", "unload"])
@pytest.mark.parametrize("value", ["no", 0, None])
def test_merge_takes_true_or_false(flag, value):
    model = wrapped()
    with refused(model, f"{flag}={value!r}", errors=TypeError):
        peftlab.merge(model, **{flag: value})


def test_a_family_that_does_not_exist():
    there = {e.family for e in peftlab.methods()}
    assert all(peftlab.methods(f) for f in there)
    for wrong, near in (("adapter", "'adapters'"), ("", "adapters"), (5, "adapters")):
        with pytest.raises(ValueError, match=re.escape(near)):
            peftlab.methods(wrong)


@pytest.mark.parametrize("method", ["lora_ga", "fish"])
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m, b: 3.0, ["loss=", "3.0"]),
        (lambda m, b: None, ["loss=", "None"]),
        (lambda m, b: m(b), ["loss=", "a tensor (2, 3,"]),
        (lambda m, b: torch.ones((), dtype=torch.long), ["loss=", "int64"]),
        (lambda m, b: torch.zeros((), requires_grad=True), ["loss=", "depends on the weights"]),
        (lambda m, b: m(b).sum().detach(), ["loss=", "depends on the weights"]),
    ],
    ids=["float", "none", "several", "whole", "constant", "detached"],
)
def test_a_loss_without_a_gradient(method, loss, words):
    model = fresh()
    small = {"r": 2} if method == "lora_ga" else {}
    with refused(model, *words):
        peftlab.wrap(model, method, data=[IDS], loss=loss, **small)
    peftlab.wrap(model, method, data=[IDS], loss=lambda m, b: m(b).square().sum()[None], **small)  # one entry is one number


class Counting(peftlab.Method):
    """Its own tensor and a whole number beside it."""

    def __init__(self, base):
        super().__init__(base)
        self.v, self.n = nn.Parameter(torch.zeros(base.n_out, 1)), nn.Parameter(torch.tensor([5]), requires_grad=False)

    def weight(self, W):
        return W + self.v


def test_an_average_over_whole_numbers():
    model = peftlab.wrap(fresh(), Counting, targets="q_proj")
    average = peftlab.snapshot(model)
    m = model.q_proj.peftlab.default
    with torch.no_grad():
        m.v.fill_(1.0)
        m.n.fill_(9)
    peftlab.ema_update(average, model, 0.75)
    found = {k.rpartition(".")[2]: v for k, v in average.items()}
    assert torch.equal(found["v"], torch.full_like(m.v, 0.25))
    assert torch.equal(found["n"], torch.tensor([9]))


@pytest.mark.parametrize("verb", ["wrap", "merge", "unmerge", "unwrap", "save", "load"])
def test_what_would_mix_two_states_inside_disabled(verb, tmp_path):
    """Inside the block the tensors are the frozen ones; a call that reads or writes them must refuse or do the right thing."""
    path = tmp_path / "a"
    model = merged()
    model.norm(torch.randn(4, 8, 3))  # changed statistics
    x = IDS
    want = model.eval()(x)
    peftlab.save(model, path)
    calls = {
        "wrap": lambda: peftlab.wrap(model, "lora", r=2, name="new"), "merge": lambda: peftlab.merge(model), "unmerge": lambda: peftlab.unmerge(model),
        "unwrap": lambda: peftlab.unwrap(model), "save": lambda: peftlab.save(model, tmp_path / "b"),
        "load": lambda: peftlab.load(model, path, {"first": "again"}),
    }  # fmt: skip
    with peftlab.disabled(model):
        base = model(x)
        error = attempt(calls[verb])
        assert verb == "save" if error is None else "disabled" in str(error)
        assert torch.equal(model(x), base)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    if (tmp_path / "b").exists():
        assert (tmp_path / "b").read_bytes() == path.read_bytes()


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file with two adapters and changed statistics, and its bytes."""
    path = tmp_path_factory.mktemp("good") / "adapter.safetensors"
    model = wrapped()
    peftlab.save(model, path)
    return path, path.read_bytes()


def parts(blob: bytes) -> tuple[dict, bytes]:
    """The safetensors header and what follows it, read without the library."""
    n = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + n]), blob[8 + n :]


def assembled(head: dict, data: bytes) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data


def edited(blob: bytes, change) -> bytes:
    """The file with its own header changed, and the checksum made right again."""
    head, data = parts(blob)
    mine = json.loads(head["__metadata__"]["peftlab"])
    change(mine)
    text = json.dumps(mine)
    head["__metadata__"] |= {"peftlab": text, "peftlab.crc": f"{zlib.crc32(text.encode()):08x}"}
    return assembled(head, data)


def foreign_files() -> dict[str, bytes]:
    t = {"x": torch.arange(6.0)}
    hf = {f"base_model.model.q_proj.lora_{k}.weight": torch.zeros(2, 2) for k in "AB"}
    kohya = {f"lora_unet_down.lora_{k}.weight": torch.zeros(2, 2) for k in ("down", "up")}
    return {
        "empty": b"",
        "text": b"this is not a file of weights\n" * 20,
        "zeros": bytes(4096),
        "pickle": __import__("pickle").dumps({"a": 1}),
        "zip": b"PK\x03\x04" + bytes(200),
        "random": np.random.default_rng(0).bytes(3000),
        "huge header": struct.pack("<Q", 2**62) + b"{}",
        "json": b'{"adapters": []}',
        "no tensors": safetensors.torch.save({}),
        "other tensors": safetensors.torch.save(t),
        "hf": safetensors.torch.save(hf),
        "kohya": safetensors.torch.save(kohya),
        "another tool's metadata": safetensors.torch.save(t, {"peftlab": "{}", "format": "pt"}),
    }


@in_every_state
@pytest.mark.parametrize("kind", foreign_files())
def test_a_foreign_file(make, kind, tmp_path):
    path = tmp_path / "some.file"
    path.write_bytes(foreign_files()[kind])
    model = make()
    words = {"hf": ["HF peft"], "kohya": ["kohya"]}.get(kind, [])
    for kw in ({}, dict(strict=False), dict(allow_base_mismatch=True)):
        with refused(model, "some.file", *words, errors=LoadError):
            peftlab.load(model, path, **kw)


def test_a_real_hf_file(tmp_path):
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    fresh_one = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    with refused(fresh_one, "HF peft", errors=LoadError):
        peftlab.load(fresh_one, tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("path", ["gone.safetensors", "gone/adapter.safetensors", "."])
def test_a_file_that_is_not_there(path, tmp_path):
    model = fresh()
    with refused(model, str(tmp_path), "folder" if path == "." else path, errors=(LoadError, OSError)):
        peftlab.load(model, tmp_path / path)
    for wrong in (None, 5, b"\0"):
        with unchanged(model), pytest.raises((TypeError, OSError, ValueError)):
            peftlab.load(model, wrong)


@pytest.mark.parametrize("make", [fresh, wrapped])
def test_a_truncated_file(make, good, tmp_path):
    blob, path = good[1], tmp_path / "cut"
    ends = {0, 1, 7, 8, 9, 100, len(parts(blob)[0]), len(blob) - 1, len(blob) - 4, *np.random.default_rng(0).integers(0, len(blob), 30).tolist()}
    model = make()
    before = state_of(model)
    for end in ends:
        path.write_bytes(blob[:end])
        with pytest.raises(LoadError, match="cut"):
            peftlab.load(model, path)
    path.write_bytes(blob + b"\0")
    with pytest.raises(LoadError, match="cut"):
        peftlab.load(model, path)
    assert state_of(model) == before


def same_file(a, b) -> bool:
    (h, t), (h2, t2) = a, b
    return h == h2 and t.keys() == t2.keys() and all(torch.equal(t[k], t2[k]) and t[k].dtype == t2[k].dtype for k in t)


def test_every_flipped_byte_is_found_or_harmless(good, tmp_path):
    """One random bit of each byte of the whole file: the reader refuses, or reads exactly what was saved."""
    blob, path = bytearray(good[1]), tmp_path / "flipped"
    want = file.read(good[0])
    rng, harmless = np.random.default_rng(0), []
    for i in range(len(blob)):
        bit = 1 << int(rng.integers(8))
        blob[i] ^= bit
        path.write_bytes(blob)
        error = attempt(lambda: file.read(path), LoadError)
        if error is None:
            assert same_file(file.read(path), want), (i, bit)
            harmless.append(i)
        else:
            assert "flipped" in str(error)
        blob[i] ^= bit
    head = 8 + struct.unpack("<Q", blob[:8])[0]
    assert all(i < head for i in harmless)  # every byte of every tensor counts
    assert len(harmless) < 40, len(harmless)  # padding and the safetensors tag


@settings(max_examples=40)
@given(data=st.data())
def test_random_damage_leaves_the_model_alone(data, good, tmp_path_factory):
    blob = bytearray(good[1])
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "swap"]))
        i = data.draw(st.integers(0, max(len(blob) - 1, 0)))
        if kind == "flip" and blob:
            blob[i] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            blob[i : i + 8] = data.draw(st.binary(min_size=8, max_size=8))
        elif kind == "cut":
            del blob[i : i + data.draw(st.integers(1, 50))]
        elif kind == "insert":
            blob[i:i] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            j = data.draw(st.integers(0, max(len(blob) - 1, 0)))
            blob[i : i + 16], blob[j : j + 16] = blob[j : j + 16], blob[i : i + 16]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(blob)
    model = fresh()
    before = state_of(model)
    try:
        peftlab.load(model, path)
    except LoadError:
        assert state_of(model) == before
    else:
        assert same_file(file.read(path), file.read(good[0]))


def test_swapped_tensors_are_found(good, tmp_path):
    """Two tensors of one shape exchanged in the table: every checksum of bytes alone would pass."""
    head, data = parts(good[1])
    a, b = [k for k in head if k.endswith(("q_proj.peftlab.first.A", "v_proj.peftlab.first.A"))]
    head[a], head[b] = head[b], head[a]
    path = tmp_path / "swapped"
    path.write_bytes(assembled(head, data))
    with refused(fresh(), "swapped", errors=LoadError):
        peftlab.load(fresh(), path)


def drop(key):
    return lambda h: h.pop(key)


def put(value, *keys):
    def change(h):
        for k in keys[:-1]:
            h = h[k]
        h[keys[-1]] = value

    return change


EDITS = [
    (put(2, "format"), ["format 2"]),
    (put(99, "format"), ["format 99"]),
    (put(0, "format"), ["format"]),
    (put("1", "format"), ["format"]),
    (put(None, "format"), ["format"]),
    (drop("format"), ["format"]),
    (put("lorax", "adapters", 0, "method"), ["'lorax'", "'lora'"]),
    (put("os:system", "adapters", 0, "method"), ["os:system", "import"]),
    (put("subprocess:Popen", "adapters", 0, "method"), ["subprocess:Popen"]),
    (put({"options": {"r": 2, "shear": 3}, "at_default": []}, "adapters", 0, "settings", 0), ["'shear'", "3", peftlab.__version__]),
    (put({"options": {"r": 0}, "at_default": []}, "adapters", 0, "settings", 0), ["r=0"]),
    (put({"options": {"r": 3}, "at_default": []}, "adapters", 0, "settings", 0), ["shape"]),
    (put({"options": {"r": "2"}, "at_default": []}, "adapters", 0, "settings", 0), ["r='2'"]),
    (put("k_proj", "adapters", 0, "sites", 0, "host"), ["'k_proj'", "'q_proj'"]),
    (put("drop", "adapters", 0, "sites", 0, "host"), ["'drop", "Dropout"]),
    (put("wait", "adapters", 0, "sites", 0, "param"), ["wait"]),
    (put([9, 9], "adapters", 0, "sites", 0, "size"), ["9"]),
    (put("other", "adapters", 0, "sites", 0, "key"), ["other"]),
    (put(5, "adapters", 0, "sites", 0, "settings"), []),
    (put([], "adapters", 0, "sites"), []),
    (put("a.b", "adapters", 0, "name"), ["a.b"]),
    (put(7, "adapters"), []),
    (drop("adapters"), []),
    (drop("base"), []),
    (drop("tensors"), []),
    (put({}, "tensors"), []),
]


@pytest.mark.parametrize(("change", "words"), EDITS, ids=range(len(EDITS)))
@pytest.mark.parametrize("make", [fresh, wrapped])
def test_an_edited_header_with_a_right_checksum(make, change, words, good, tmp_path):
    """An older, a newer or a hand-made file: one LoadError, never a KeyError out of the depths and never half a load."""
    path = tmp_path / "edited"
    path.write_bytes(edited(good[1], change))
    model = make()
    words = words if make is fresh else []  # with an adapter of the name there, more can be wrong
    with refused(model, *words, errors=ValueError):  # a LoadError, or what wrap says of the same value
        peftlab.load(model, path)


def test_a_newer_header_with_more_in_it_still_loads(good, tmp_path):
    def newer(h):
        h["written_by"] = "tomorrow"
        h["adapters"][0]["remark"] = "x"
        h["adapters"][0]["sites"][0]["temperature"] = 0.5
        h["adapters"][0]["settings"][0]["options"]["shear"] = 0.0
        h["adapters"][0]["settings"][0]["at_default"].append("shear")

    path = tmp_path / "newer"
    path.write_bytes(edited(good[1], newer))
    model, same = fresh().eval(), fresh().eval()
    peftlab.load(model, path)
    peftlab.load(same, good[0])
    assert torch.equal(model(IDS), same(IDS))


def base_with(change):
    model = fresh()
    with torch.no_grad():
        change(model)
    return model


def replaced(name, layer):
    return lambda m: setattr(m, name, layer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.q_proj.weight.add_(1e-3), ["'q_proj.weight'", "other values"]),
        (lambda m: m.v_proj.weight.mul_(-1), ["'v_proj.weight'", "other values"]),
        (replaced("v_proj", nn.Linear(6, 9, bias=False)), ["'v_proj.weight'", "(9, 6)", "(8, 6)"]),
        (replaced("q_proj", nn.Linear(5, 8)), ["'q_proj.weight'", "(8, 5)", "(8, 6)"]),
        (replaced("q_proj", nn.ReLU()), ["'q_proj"]),
        (lambda m: m._modules.__delitem__("v_proj"), ["'v_proj"]),
        (replaced("norm", nn.Identity()), ["'norm.running_mean'"]),
        (replaced("norm", nn.BatchNorm1d(4)), ["'norm.running_mean'", "(4,)", "(8,)"]),
    ],
)
def test_another_base(change, words, good):
    model = base_with(change)
    with refused(model, *words, errors=LoadError):
        peftlab.load(model, good[0])


def test_another_base_may_be_asked_for_where_it_fits(good):
    model = base_with(lambda m: m.q_proj.weight.add_(1e-3))
    peftlab.load(model, good[0], allow_base_mismatch=True)
    assert peftlab.active(model) == ["first"]
    for change in (replaced("v_proj", nn.Linear(6, 9, bias=False)), replaced("q_proj", nn.ReLU()), lambda m: m._modules.__delitem__("v_proj")):
        model = base_with(change)
        with refused(model, errors=LoadError):
            peftlab.load(model, good[0], allow_base_mismatch=True)


@pytest.mark.parametrize(
    ("kw", "words"),
    [
        (dict(names="frist"), ["'frist'", "'first'"]),
        (dict(names=["first", "third"]), ["'third'"]),
        (dict(names={"first": "x", "second": "x"}), ["'x'"]),
        (dict(names={"first": "a.b"}), ["'a.b'"]),
        (dict(names={"first": ""}), ["''"]),
        (dict(names={"first": 5}), ["5"]),
        (dict(names={"first": None}), ["None"]),
        (dict(names=[]), ["adapter"]),
        (dict(names=5), ["names"]),
        (dict(trainable="no"), ["trainable"]),
        (dict(dtype=torch.int32), ["int32"]),
        (dict(dtype="float16"), ["float16"]),
        (dict(strict="yes"), ["strict"]),
        (dict(allow_base_mismatch=1), ["allow_base_mismatch"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [fresh, wrapped])
def test_wrong_arguments_of_load(make, kw, words, good):
    model = make()
    with refused(model, *words):
        peftlab.load(model, good[0], **kw)


def test_loading_over_an_adapter_that_is_another(good):
    for kw in (dict(r=1, targets=["q_proj", "v_proj"]), dict(r=2, targets="q_proj"), dict(r=2, alpha=2.0, targets=["q_proj", "v_proj"])):
        model = peftlab.wrap(fresh(), "lora", name="first", **kw)
        with refused(model, "'first'", errors=LoadError):
            peftlab.load(model, good[0])
    model = peftlab.wrap(fresh(), "vera", r=2, name="first", targets=["q_proj", "v_proj"])
    with refused(model, "'first'", errors=LoadError):
        peftlab.load(model, good[0])


def test_loading_over_a_merged_adapter(good):
    """New values under merged tensors would not act: refuse, or merge anew."""
    model = merged()
    peftlab.load(base := fresh().eval(), good[0])
    peftlab.activate(base, ["first", "second"])
    before = state_of(model)
    error = attempt(lambda: peftlab.load(model, good[0]), LoadError)
    if error is not None:
        assert re.search("first.*merged", str(error))
        assert state_of(model) == before
    else:
        torch.testing.assert_close(model.eval()(IDS), base(IDS))


# ---------------------------------------------------------------- saving


def directory(tmp_path):
    return tmp_path


def missing_parent(tmp_path):
    return tmp_path / "gone" / "adapter.safetensors"


def under_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    return tmp_path / "file" / "adapter.safetensors"


def read_only(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    return tmp_path / "locked" / "adapter.safetensors"


@pytest.mark.parametrize("where", [directory, missing_parent, under_a_file, read_only], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", [wrapped, merged])
def test_saving_where_nothing_can_be_written(where, make, tmp_path):
    path = where(tmp_path)
    there = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    model = make()
    with refused(model, repr(str(path)), errors=OSError):  # not the temporary file's
        peftlab.save(model, path)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == there  # nothing is left lying about
    for wrong in (None, 5):
        with unchanged(model), pytest.raises(TypeError):
            peftlab.save(model, wrong)


def test_a_save_that_cannot_know_what_it_writes(tmp_path):
    path = tmp_path / "adapter"
    model = wrapped()
    peftlab.save(model, path)
    earlier = path.read_bytes()
    model.out.bias.requires_grad_(True)
    with refused(model, "'out.bias'", "trainable"):
        peftlab.save(model, path)
    model.out.bias.requires_grad_(False)
    with refused(model, "include", "'otu'", "'out"):
        peftlab.save(model, path, include="otu")
    model.q_proj.peftlab.first.A.data = torch.zeros(0)
    with refused(model, "q_proj.peftlab.first.A", "empty or partial"):
        peftlab.save(model, path)
    assert path.read_bytes() == earlier


def test_a_write_that_fails_half_way(tmp_path, monkeypatch):
    """A full disk (here: a limit on the size of files) and a failing rename leave the earlier file and no crumbs."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "adapter"
    model = wrapped()
    peftlab.save(model, path)
    earlier = path.read_bytes()
    randomised(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(earlier) // 2, hard))
        with unchanged(model), pytest.raises(OSError):
            peftlab.save(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == earlier
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    for name in ("replace", "fsync"):
        with monkeypatch.context() as m:
            m.setattr(os, name, lambda *a: (_ for _ in ()).throw(OSError("the cable is out")))
            with unchanged(model), pytest.raises(OSError, match="cable"):
                peftlab.save(model, path)
        assert path.read_bytes() == earlier
        assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_saving_over_a_link_and_keeping_permissions(tmp_path):
    model = wrapped()
    real, link = tmp_path / "real", tmp_path / "link"
    peftlab.save(model, real)
    assert real.stat().st_mode & 0o777 == 0o666 & ~umask()
    link.symlink_to(real)
    randomised(model)
    peftlab.save(model, link)
    peftlab.load(fresh(), link)


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


KILLER = """
    import os, random, signal, sys, time
    import torch
    import peftlab
    from torch import nn

    torch.set_num_threads(1)
    path, rounds = sys.argv[1], int(sys.argv[2])
    model = peftlab.wrap(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), "lora", r=64, targets="*")
    own = [p for p in model.parameters() if p.requires_grad]
    rng = random.Random(0)

    def fill(value):
        with torch.no_grad():
            for p in own:
                p.fill_(value)

    def values():
        header, tensors = peftlab.formats.file.read(path)  # raises if a single bit is wrong
        found = {v for t in tensors.values() for v in t.unique().tolist()}
        assert len(found) == 1 and len(tensors) == len(own), found
        return found.pop()

    fill(0.0)
    start = time.perf_counter()
    for _ in range(5):
        peftlab.save(model, path)
    once = (time.perf_counter() - start) / 5
    last, torn, new = 0.0, 0, 0
    for i in range(1, rounds + 1):
        child = os.fork()
        if child == 0:
            fill(float(i))
            while True:
                peftlab.save(model, path)
        time.sleep(rng.random() * (4 * once + 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = values()
        assert now in (last, float(i)), (now, last, i)
        new += now != last
        last = now
        here = os.listdir(os.path.dirname(path))
        torn += len(here) > 1
        for name in here:
            if name != os.path.basename(path):
                os.unlink(os.path.join(os.path.dirname(path), name))
    print(torn, new)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(60)
def test_a_save_killed_at_a_random_moment(tmp_path):
    """200 times: a child that saves without end is killed; the file is then a whole one, the old or the new."""
    rounds = 200
    script = tmp_path / "killer.py"
    script.write_text(textwrap.dedent(KILLER))
    (tmp_path / "out").mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "out" / "adapter"), str(rounds)], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    torn, new = map(int, done.stdout.split())
    assert torn >= 5, "hardly a kill came in the middle of a write: the test proves nothing"
    assert new >= 20


# ---------------------------------------------------------------- fuzz


atoms = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.floats(allow_nan=True), st.binary(max_size=3), st.text(max_size=4), st.complex_numbers(max_magnitude=3),
    st.sampled_from(["q_proj", "v_proj", "*", "embed", "norm", "{", "[", "{a,", "[!", "**", "out", "re:(", "\\", "q", "", ".", "oi", "eio"]),
    st.sampled_from([re.compile("q.*"), re.compile(""), torch.zeros(2), torch.arange(8) < 3, nn.Linear(2, 2), object(), int, len, np.int64(2), np.zeros(2)]),
    st.sampled_from([Path("x"), range(3), slice(0, 4)]),
)  # fmt: skip
keys = st.one_of(st.none(), st.integers(-2, 9), st.text(max_size=3), st.sampled_from(["q_proj", "out", "*", "v_proj", "r", "q", "k"]))
garbage = st.recursive(atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner, inner), max_leaves=5)


def survives(model, call):
    """The call works, or raises one clear ValueError or TypeError and changes nothing."""
    before = state_of(model)
    error = attempt(call)
    if error is not None:
        assert str(error).strip()
        assert not UNCLEAR.search(str(error)), f"{type(error).__name__}: {error}"
        assert state_of(model) == before
    return error is None


@pytest.mark.parametrize("argument", ["targets", "exclude", "overrides", "layers", "of", "split", "layout", "read", "name", "seed", "dtype", "tie"])
@settings(max_examples=60)
@given(value=garbage)
def test_garbage_in_wrap(argument, value):
    model = fresh()
    kw = {"targets": ["q_proj", "v_proj"], "r": 2, argument: value}
    if argument == "of":
        kw["layers"] = [0]
    if survives(model, lambda: peftlab.wrap(model, "lora", **kw)):
        y = randomised(model).eval()(IDS)
        torch.testing.assert_close(y, (peftlab.merge(model), model(IDS))[1])
        peftlab.unwrap(model)
        assert type(model.q_proj) is nn.Linear


@settings(max_examples=150)
@given(data=st.data())
def test_garbage_in_options(data):
    method = data.draw(st.sampled_from([e.name for e in peftlab.methods()]))
    cls, fixed, _ = resolve(method)
    known = [k for k in keywords(cls) if k not in fixed]
    kw = {k: data.draw(garbage | st.integers(1, 3)) for k in data.draw(st.sets(st.sampled_from([*known, "shear"]), max_size=3))}
    model = fresh()
    if survives(model, lambda: peftlab.wrap(model, method, **kw)):
        randomised(model).eval()(IDS)
        peftlab.unwrap(model)


@settings(max_examples=60)
@given(value=garbage)
def test_garbage_as_names(value):
    model = wrapped()
    for verb in (peftlab.activate, peftlab.snapshot, peftlab.merge, peftlab.unmerge, peftlab.unwrap):
        if verb is not peftlab.activate and value is None:
            continue
        survives(model, lambda: verb(model, value))  # noqa: B023


@settings(max_examples=60)
@given(names=garbage, include=garbage)
def test_garbage_in_save_and_load(names, include, good, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "garbage"
    model = wrapped()
    with unchanged(model):
        survives(model, lambda: peftlab.save(model, path, names, include))
    bare = fresh()
    survives(bare, lambda: peftlab.load(bare, good[0], names))


def test_copies_of_files_load(good, tmp_path):
    """The opposite of it all: the good file, copied, loads everywhere it should."""
    shutil.copy(good[0], tmp_path / "copy")
    model = fresh()
    report = peftlab.load(model, tmp_path / "copy")
    assert report.adapters == ["first", "second"]
    assert not report.unconsumed
    assert not report.unfilled


def test_layers_that_only_offer_a_call_are_something_to_adapt():
    from torch.ao.nn.quantized.dynamic import Linear

    model = nn.Sequential(Linear(8, 8), nn.ReLU(), Linear(8, 4))
    peftlab.wrap(model, "lora", r=2, targets=["0", "2"])
    assert len(peftlab.report(model)) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), peftlab.shared_base_copy])
def test_copies_refuse_what_the_original_refuses(copied):
    model = nn.Sequential(cases.Packed(4, 4), nn.Linear(4, 4))
    peftlab.wrap(model, "lora", r=2, targets="*")
    for m in (model, copied(model)):
        with pytest.raises(ValueError, match="only offers a call"):
            peftlab.merge(m)
        assert peftlab.check(m, torch.randn(2, 4)).ok


def test_restoring_one_adapter_above_another_that_is_merged():
    model = nn.Linear(4, 4)
    peftlab.wrap(model, "lora", r=2, name="style")
    model.peftlab.style.B.data.normal_()
    peftlab.merge(model, "style")
    peftlab.wrap(model, "lora", r=2, name="task")
    kept = peftlab.snapshot(model, "task")
    model.peftlab.task.B.data.normal_()
    peftlab.restore(model, kept)
    assert not model.peftlab.task.B.any()
    with pytest.raises(ValueError, match="'style' is merged"):
        peftlab.restore(model, peftlab.snapshot(model, "style"))


def test_a_frozen_call_without_a_backward_is_not_silent():
    from torch.ao.nn.quantized.dynamic import Linear

    model, x = nn.Sequential(Linear(8, 8), Linear(8, 8), nn.LayerNorm(8)), torch.randn(3, 8)
    peftlab.wrap(model, "lora", r=2, targets=["0", "1"])
    with pytest.raises(RuntimeError, match="Linear has no backward"):
        model(x)
    with torch.no_grad():
        model(x)
    peftlab.freeze(model, targets="0")
    model(x)[0, 0].backward()
    assert model[1].peftlab.default.B.grad is not None
    assert model[0].peftlab.default.B.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_merging_between_a_checkpointed_forward_and_its_backward_is_refused(reentrant, first):
    below, layer = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleList([below, layer])
    peftlab.wrap(model, "lora", r=2, targets="*")
    layer.peftlab.default.B.data.fill_(0.3)
    if first:
        peftlab.merge(layer)
    y = torch.utils.checkpoint.checkpoint(lambda t: layer(t).tanh(), below(torch.randn(3, 4)), use_reentrant=reentrant)
    (peftlab.unmerge if first else peftlab.merge)(layer)
    with pytest.raises(RuntimeError, match="merged or unmerged between|modified by an inplace"):
        y.square().sum().backward()


def test_loading_into_a_meta_model_is_refused(tmp_path):
    model = peftlab.wrap(nn.Linear(4, 4), "lora", r=2)
    peftlab.save(model, tmp_path / "a.safetensors")
    with torch.device("meta"):
        bare = nn.Linear(4, 4)
    with pytest.raises(LoadError, match="meta device"):
        peftlab.load(bare, tmp_path / "a.safetensors")
    assert type(bare) is nn.Linear
