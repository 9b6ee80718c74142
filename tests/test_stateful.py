"""Any order of operations: the model's output is always that of the adapters which are declared to act, and a call that raises changes nothing.

The machine plays wrap, activate, disable, merge, unmerge, delete, save, load, copy and wrong calls in random order on a small model in float64. The
reference keeps its own list of adapters with copied tensors and computes effective weights from the naive formulas of `oracles` (two names
without one: dropped to the definition on copied tensors), on a functional copy of the model that peftlab never sees.
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracles import ORACLES, RAW, canonical, raw
from test_bad_input import attempt, bits, refused, state_of
from torch import Tensor, nn

import peftlab
from peftlab.registry import keywords, resolve

DTYPE = torch.float64
IDS = torch.tensor([[0, 3, 1, 2, 5, 3], [4, 0, 5, 5, 2, 1]])


class Net(nn.Module):
    """Embedding, linear, convolution, normalisation, and a linear that is its last layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.fc = nn.Linear(4, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids):
        x = torch.tanh(self.fc(self.embed(ids)))
        return self.head(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))


def reference(t: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The same network as one function of its tensors."""
    x = t["embed.weight"][ids]
    x = torch.tanh(F.linear(x, t["fc.weight"], t["fc.bias"]))
    x = F.conv1d(x.transpose(1, 2), t["conv.weight"], t["conv.bias"], padding=1, groups=2).transpose(1, 2)
    return F.linear(F.layer_norm(x, (4,), t["norm.weight"], t["norm.bias"]), t["head.weight"], t["head.bias"])


@dataclass
class Kind:
    """How the machine wraps a method, and what the oracle must be told."""

    method: str
    hyper: dict = field(default_factory=dict)
    targets: tuple = ("fc", "conv")
    oracle: dict = field(default_factory=dict)
    additive: bool = False

    @property
    def wrap(self) -> dict:
        return {"targets": list(self.targets), **self.hyper}


KINDS = {
    "lora": Kind("lora", dict(r=2, alpha=3.0), ("fc", "conv", "embed", "head"), dict(r=2, alpha=3.0), additive=True),
    "pissa": Kind("pissa", dict(r=2, alpha=2.0), ("fc", "head"), dict(r=2, alpha=2.0), additive=True),
    "dora": Kind("dora", dict(r=1, alpha=2.0), ("fc", "conv"), dict(r=1, alpha=2.0)),
    "adalora": Kind("adalora", dict(r=1, init_r=2, alpha=2.0), ("fc", "head"), dict(init_r=2, alpha=2.0), additive=True),
    "oft": Kind("oft", dict(block_size=2), ("fc", "head")),
    "ia3": Kind("ia3", dict(side="out"), ("fc", "conv", "head"), dict(side="out")),
    "lokr": Kind("lokr", dict(r=1, alpha=2.0), ("fc", "conv"), dict(r=1, alpha=2.0), additive=True),
    "vera": Kind("vera", dict(r=3), ("fc", "head"), dict(r=3), additive=True),
    "fourierft": Kind("fourierft", dict(n=4, alpha=5.0), ("fc", "head"), dict(alpha=5.0), additive=True),
    "bitfit": Kind("bitfit", {}, ("fc", "conv", "norm"), additive=True),
    "full": Kind("full", {}, ("norm", "head.bias")),
    "full-weight": Kind("full", {}, ("fc.weight", "embed.weight")),
    "tokens": Kind("tokens", dict(ids=[1, 4]), ("embed",)),
    "sparse": Kind("sparse", dict(n=2, select="random"), ("head", "fc"), additive=True),
    "l1": Kind("l1", {}, ("conv", "norm.weight"), additive=True),
}
NAMES = ("a", "b", "c", "weight", "fc")


def sites_of(kind: Kind, model: Net) -> list[tuple[str, str]]:
    """(module, parameter) pairs that the kind adapts; a matrix method stands under its weight."""
    out = []
    for target in kind.targets:
        path, _, param = target.partition(".")
        m = model.get_submodule(path)
        found = [param] if param else [n for n, _ in m.named_parameters(recurse=False)] if kind.method in RAW else ["weight"]
        out += [(path, n) for n in found if kind.method != "bitfit" or n == "bias"]
    return out


@dataclass
class Adapter:
    """What the reference knows of one adapter: copied numbers."""

    kind: Kind
    tensors: dict[tuple[str, str], dict[str, Tensor]]
    common: dict[str, Tensor] | None
    active: bool = True
    merged: bool = False
    trainable: bool = True
    seed: int | None = None  # where the method's own tensors follow from it, so that it is one of the settings


def read(model: Net, name: str, kind: Kind) -> Adapter:
    """Copies of an adapter's tensors, found by their paths."""
    tensors = {}
    for path, param in sites_of(kind, model):
        node = model.get_submodule(path)._modules["peftlab"]._modules[name]
        node = node._modules[param] if kind.method in RAW else node
        tensors[path, param] = {k: t.detach().clone() for k, t in [*node._parameters.items(), *node._buffers.items()] if t is not None}
    holder = model._modules.get("peftlab_shared")
    shared = holder._modules.get(name) if holder is not None else None
    return Adapter(kind, tensors, {"A": shared.A.to(DTYPE).T, "B": shared.B.to(DTYPE)} if kind.method == "vera" else None)


def change(kind: Kind, layer: nn.Module, param: str, W: Tensor, origin: Tensor, t: dict[str, Tensor], adapter: Adapter) -> Tensor:
    """One adapter's effect on one raw tensor, by the paper's formula; an embedding's padding row belongs to the model."""
    if kind.method == "full":
        out = t["C"] + (W - origin)
    elif kind.method == "tokens":
        out = W.clone()
        for row, i in enumerate(sorted(kind.hyper["ids"])):
            out[i] = t["T"][row] + (W - origin)[i]
    elif kind.method in RAW:
        key = "bias" if kind.method == "bitfit" else "weight"
        named = {f"{key}.{k}": v for k, v in t.items()}
        w, b = ORACLES[kind.method](W if key == "weight" else torch.zeros(0), W if key == "bias" else None, named, kind.oracle)
        out = w if key == "weight" else b
    else:
        oracle = ORACLES["lora" if kind.method == "pissa" else kind.method]
        out = raw(layer, oracle(canonical(layer, W), None, t, kind.oracle, adapter.common)[0])
    if isinstance(layer, nn.Embedding):
        out = out.clone()
        out[layer.padding_idx] = W[layer.padding_idx]
    return out


def change_of_bias(kind: Kind, b: Tensor, t: dict[str, Tensor]) -> Tensor:
    return t["l"] * b if kind.method == "ia3" else b


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.n = 0

    def teardown(self):
        self.folder.cleanup()

    @initialize(
        seed=st.integers(0, 99),
        train=st.booleans(),
        frozen=st.sampled_from([None, "head.bias", "norm.weight"]),
        first=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(sorted(KINDS))), min_size=1, max_size=3, unique_by=lambda pair: pair[0]),
    )
    def start(self, seed, train, frozen, first):
        torch.manual_seed(seed)
        model = Net().to(DTYPE).train(train)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.5)
        if frozen:
            model.get_parameter(frozen).requires_grad_(False)
        self.model = model
        self.base = {k: t.clone() for k, t in model.state_dict().items()}
        self.flags = {k: p.requires_grad for k, p in model.named_parameters()}
        self.classes = {p: type(m) for p, m in model.named_modules()}
        self.objects = {p: id(m) for p, m in model.named_modules()}
        self.layers = {p: copy.deepcopy(m) for p, m in model.named_modules() if p}  # never touched: shapes and settings for the formulas
        self.train = train
        self.adapters: dict[str, Adapter] = {}
        self.files: list[tuple[Path, dict[str, Adapter]]] = []
        self.folded = False
        for name, kind in first:
            self.attach(name, KINDS[kind], seed)

    # ---- the reference
    def expected(self, silent: bool = False) -> Tensor:
        tensors = dict(self.base)
        for a in self.adapters.values():
            if silent or not a.active:
                continue
            for (path, param), t in a.tensors.items():
                key, layer = f"{path}.{param}", self.layers[path]
                tensors[key] = change(a.kind, layer, param, tensors[key], self.base[key], t, a)
                if a.kind.method not in RAW and f"{path}.bias" in tensors:
                    tensors[f"{path}.bias"] = change_of_bias(a.kind, tensors[f"{path}.bias"], t)
        return reference(tensors, IDS)

    def conflict(self, merged: set[str], active: set[str]) -> bool:
        """Whether some layer would have a merged adapter above an unmerged one with which it does not commute."""
        for path in self.layers:
            mine = [n for n, a in self.adapters.items() if n in active and any(p == path for p, _ in a.tensors)]
            for i, low in enumerate(mine):
                for high in mine[i + 1 :]:
                    if high in merged and low not in merged and not (self.adapters[low].kind.additive and self.adapters[high].kind.additive):
                        return True
        return False

    @property
    def active(self) -> set[str]:
        return {n for n, a in self.adapters.items() if a.active}

    @property
    def merged(self) -> set[str]:
        return {n for n, a in self.adapters.items() if a.merged}

    @contextmanager
    def refuses(self, *words):
        with refused(self.model, *words, errors=(ValueError, TypeError, OSError)):
            yield

    def some(self, data, minimum=1):
        return data.draw(st.lists(st.sampled_from(sorted(self.adapters)), min_size=minimum, unique=True))

    # ---- operations
    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 5))
    def wrap(self, name, kind, seed):
        kind = KINDS[kind]
        if name in self.adapters:
            with self.refuses(f"'{name}'", "already"):
                peftlab.wrap(self.model, kind.method, name=name, **kind.wrap)
            return
        if len(self.adapters) < 4:
            self.attach(name, kind, seed)

    def attach(self, name, kind, seed):
        before = self.model(IDS).detach()
        rng = torch.get_rng_state()
        peftlab.wrap(self.model, kind.method, name=name, seed=seed, **kind.wrap)
        assert torch.equal(torch.get_rng_state(), rng)
        torch.testing.assert_close(self.model(IDS), before, rtol=1e-9, atol=1e-9)  # a start changes nothing
        node = [p for k, p in self.model.named_parameters() if k.split(".")[1:3] == ["peftlab", name]]
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for p in node:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
        self.adapters[name] = read(self.model, name, kind)
        self.adapters[name].seed = seed if "seed" in keywords(resolve(kind.method)[0]) else None

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def train_a_little(self, data):
        """Numbers change in place, as an optimizer changes them; a merged adapter does not act and is left alone."""
        free = sorted(n for n, a in self.adapters.items() if not a.merged)
        if not free:
            return
        name = data.draw(st.sampled_from(free))
        with torch.no_grad():
            for k, p in self.model.named_parameters():
                if k.split(".")[1:3] == ["peftlab", name]:
                    p.mul_(1.1)
        old = self.adapters[name]
        self.adapters[name] = new = read(self.model, name, old.kind)
        new.active, new.trainable = old.active, old.trainable

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def activate(self, data):
        chosen = set(data.draw(st.lists(st.sampled_from([*sorted(self.adapters), None]), unique=True))) - {None}
        left = self.merged & chosen
        gone = self.merged - chosen
        if self.conflict(left, chosen) or (gone and self.conflict(left, self.active & self.merged | (self.active & chosen))):
            # whether the way there is possible is the library's affair; if it refuses, nothing has changed
            if not self.worked(lambda: peftlab.activate(self.model, sorted(chosen))):
                return
        else:
            peftlab.activate(self.model, sorted(chosen))
        self.settle(chosen, left)

    def worked(self, call, words: str = "commute") -> bool:
        """Whether the call did what it says; if it is refused, then in these words, and nothing has changed."""
        before = state_of(self.model)
        error = attempt(call)
        if error is not None:
            assert words in str(error), error
            assert state_of(self.model) == before
        return error is None

    def settle(self, chosen, merged):
        for n, a in self.adapters.items():
            a.active, a.merged = n in chosen, n in merged

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def merge(self, data):
        chosen = set(self.some(data))
        new = chosen & self.active - self.merged
        if chosen - self.active:
            with self.refuses("not active"):
                peftlab.merge(self.model, sorted(chosen))
        elif not new:
            with self.refuses("merged already"):
                peftlab.merge(self.model, sorted(chosen))
        elif self.conflict(self.merged | new, self.active):
            with self.refuses("commute"):
                peftlab.merge(self.model, sorted(chosen))
        else:
            report = peftlab.merge(self.model, sorted(chosen))
            assert report.max_delta > 0
            for n in new:
                self.adapters[n].merged = True

    @precondition(lambda self: self.adapters)
    @rule()
    def merge_all(self):
        new = self.active - self.merged
        if not new:
            with self.refuses():
                peftlab.merge(self.model)
        else:  # everything that acts: no order can be broken
            peftlab.merge(self.model)
            for n in new:
                self.adapters[n].merged = True

    @precondition(lambda self: self.active)
    @rule(keep=st.booleans())
    def fold(self, keep):
        """What acts becomes the base, for good; adapters that do not act stay where they are and start from the new base."""
        want, gone = self.expected(), self.active
        if self.merged or any(not a.active for a in self.adapters.values()):
            if not self.worked(lambda: peftlab.merge(self.model, keep=keep, unload=True), ""):
                return
        else:
            peftlab.merge(self.model, keep=keep, unload=True)
        torch.testing.assert_close(self.model(IDS), want, rtol=1e-9, atol=1e-9)
        self.adapters = {n: a for n, a in self.adapters.items() if n not in gone}
        self.base = {k: t.clone() for k, t in self.model.state_dict().items() if "peftlab" not in k}
        self.files = []  # they are of the old base
        self.folded = True

    @precondition(lambda self: self.merged)
    @rule(data=st.data())
    def unmerge(self, data):
        chosen = set(self.some(data))
        if not chosen & self.merged:
            with self.refuses("merged"):
                peftlab.unmerge(self.model, sorted(chosen))
        elif self.conflict(self.merged - chosen, self.active):
            with self.refuses("commute"):
                peftlab.unmerge(self.model, sorted(chosen))
        else:
            peftlab.unmerge(self.model, sorted(chosen))
            for n in chosen:
                self.adapters[n].merged = False

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def delete(self, data):
        chosen = set(self.some(data))
        if self.merged & chosen and self.conflict(self.merged - chosen, self.active):
            if not self.worked(lambda: peftlab.unwrap(self.model, sorted(chosen))):
                return
        else:
            peftlab.unwrap(self.model, sorted(chosen))
        for n in chosen:
            del self.adapters[n]

    @rule()
    def disabled(self):
        with peftlab.disabled(self.model):
            self.base_is_back()
        before = state_of(self.model)
        with pytest.raises(RuntimeError, match="on purpose"), peftlab.disabled(self.model):
            raise RuntimeError("on purpose")
        assert state_of(self.model) == before

    def base_is_back(self):
        untouched = Net().to(DTYPE).train(self.train)
        untouched.load_state_dict(self.base)
        assert torch.equal(self.model(IDS), untouched(IDS))

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def using(self, data):
        chosen = set(self.some(data, 0))
        before, acting = state_of(self.model), {n: a.active for n, a in self.adapters.items()}

        def inside():
            with peftlab.using(self.model, sorted(chosen)):
                for n, a in self.adapters.items():
                    a.active = n in chosen
                self.right()

        error = attempt(inside)
        assert error is None or "commute" in str(error), error
        for n, a in self.adapters.items():
            a.active = acting[n]
        assert state_of(self.model) == before

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def freeze(self, data):
        chosen, flag = self.some(data), data.draw(st.booleans())
        (peftlab.unfreeze if flag else peftlab.freeze)(self.model, *chosen)
        for n in chosen:
            self.adapters[n].trainable = flag

    @precondition(lambda self: self.adapters and len(self.files) < 3)
    @rule(data=st.data())
    def save(self, data):
        chosen = self.some(data)
        path = Path(self.folder.name) / f"{len(self.files)}.safetensors"
        before = state_of(self.model)
        error = attempt(lambda: peftlab.save(self.model, path, chosen))
        assert state_of(self.model) == before
        if error is not None:  # a base that was changed under adapters that stay is in no file
            assert self.folded, error
            assert "changed after wrap" in str(error)
            return
        kept = {n: copy.deepcopy(a) for n, a in self.adapters.items() if n in chosen}
        self.files.append((path, kept))

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def load(self, data):
        path, saved = data.draw(st.sampled_from(self.files))
        old = data.draw(st.sampled_from(sorted(saved)))
        new = data.draw(st.sampled_from(NAMES))
        trainable = data.draw(st.booleans())
        there = self.adapters.get(new)
        if there is None and len(self.adapters) == 4:
            return
        if there is not None and (there.kind != saved[old].kind or there.seed != saved[old].seed or there.merged):
            with self.refuses(f"'{new}'"):
                peftlab.load(self.model, path, {old: new})
            return
        if there is None:
            active, top = saved[old].active, self.active | {new}
            assert not self.conflict(self.merged, top)
            peftlab.load(self.model, path, {old: new}, trainable=trainable)
        else:
            active, trainable = there.active, there.trainable
            peftlab.load(self.model, path, {old: new})
        self.adapters[new] = a = copy.deepcopy(saved[old])
        if there is not None:  # keeps its place in the stack
            self.adapters = {n: (a if n == new else x) for n, x in self.adapters.items()}
        a.active, a.merged, a.trainable = active, False, trainable

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def load_into_a_fresh_model(self, data):
        """The file alone, on an untouched base, gives the saved adapters' output."""
        path, saved = data.draw(st.sampled_from(self.files))
        model = Net().to(DTYPE).train(self.train)
        model.load_state_dict(self.base)
        peftlab.load(model, path)
        mine, self.adapters = self.adapters, saved
        try:
            torch.testing.assert_close(model(IDS), self.expected(), rtol=1e-9, atol=1e-9)
        finally:
            self.adapters = mine

    @rule(kind=st.sampled_from(["deepcopy", "view"]))
    def copied(self, kind):
        """Goes on with the copy; what is done to the copy must not reach the original."""
        original, before = self.model, state_of(self.model)
        self.model = copy.deepcopy(original) if kind == "deepcopy" else peftlab.shared_base_copy(original)
        assert state_of(original) == before
        self.objects = {p: id(m) for p, m in self.model.named_modules() if p in self.objects}
        self.right()
        if self.adapters:  # take the original apart: the copy must not notice
            peftlab.unwrap(original)
            assert {k: bits(t) for k, t in original.state_dict().items()} == {k: bits(t) for k, t in self.base.items()}

    @rule(call=st.sampled_from(["activate", "merge", "unmerge", "unwrap", "save", "load", "wrap", "wrap late", "lossy"]))
    def wrong(self, call):
        """Calls that can never work."""
        if call == "lossy" and not self.active - self.merged:
            return
        with self.refuses():
            if call == "wrap":
                peftlab.wrap(self.model, "lora", r=99, targets="*", name="new")
            elif call == "wrap late":
                peftlab.wrap(self.model, "lora", r=3, targets=["fc", "head"], name="new")
            elif call == "save":
                peftlab.save(self.model, Path(self.folder.name) / "gone" / "x")
            elif call == "load":
                peftlab.load(self.model, Path(self.folder.name))
            elif call == "lossy":
                peftlab.merge(self.model, "nobody", keep=False)
            else:
                getattr(peftlab, call)(self.model, "nobody")

    # ---- what always holds
    def right(self):
        torch.testing.assert_close(self.model(IDS), self.expected(), rtol=1e-9, atol=1e-9)

    @invariant()
    def output_is_that_of_the_declared_adapters(self):
        if hasattr(self, "model"):
            self.right()

    @invariant()
    def names_and_flags(self):
        if not hasattr(self, "model"):
            return
        model = self.model
        assert peftlab.active(model) == [n for n, a in self.adapters.items() if a.active]
        for path, i in self.objects.items():
            m = model.get_submodule(path)
            assert id(m) == i
            assert isinstance(m, self.classes[path])
            assert m.training == self.train
            if not self.adapters:
                assert type(m) is self.classes[path]
                assert "peftlab" not in m._modules
        flags = {k: p.requires_grad for k, p in model.named_parameters()}
        if not self.adapters:
            assert flags == self.flags
            return
        for k, flag in flags.items():
            parts = k.split(".")
            mine = parts[1] == "peftlab"
            assert flag == (self.adapters[parts[2]].trainable if mine else False), k

    @invariant()
    def frozen_bits(self):
        """Where nothing is merged, the tensors themselves are the frozen ones, bit for bit."""
        if not hasattr(self, "model"):
            return
        folded = {(p, n) for a in self.adapters.values() if a.merged for p, n in a.tensors}
        folded |= {(p, "bias") for a in self.adapters.values() if a.merged and a.kind.method == "ia3" for p, _ in a.tensors}
        for key, want in self.base.items():
            path, _, param = key.rpartition(".")
            if (path, param) not in folded:
                assert bits(self.model.get_submodule(path)._parameters[param]) == bits(want), key


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=25)
TestMachine = Machine.TestCase


class LongMachine(Machine):
    pass


LongMachine.TestCase.settings = settings(max_examples=600, stateful_step_count=40)
TestLongMachine = pytest.mark.slow(LongMachine.TestCase)
