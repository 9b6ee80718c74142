"""How far a long call is: bars, functions, refusals, and what an interrupt leaves (rows 43, 44)."""

from __future__ import annotations

import builtins
import copy
import importlib.util
import io
import itertools
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peftlab
from peftlab.formats.merge_files import merge_files
from peftlab.quant.quantize import packed_weights
from peftlab.support.progress import check_progress
from peftlab.support.progress import reported as told


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.Linear(16, 16))


def rows():
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def square(model, batch):
    return model(batch).square().mean()


class Bar:
    """Stands for tqdm and keeps what it was told."""

    made: list[Bar]

    def __init__(self, desc, **how):
        self.desc, self.n, self.total, self.seen, self.open = desc, 0, None, [], True
        Bar.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.open = False

    def set_postfix_str(self, text, refresh):
        self.text = text

    def update(self, k):
        self.n += k
        self.seen.append((self.n, self.total, self.text))


@pytest.fixture
def bars(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    Bar.made = []
    return Bar.made


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base").mkdir()
    save_file(mlp().state_dict(), tmp_path / "base" / "model.safetensors")
    peftlab.save(peftlab.wrap(mlp(), "lora", r=2, targets="*"), tmp_path / "adapter.safetensors")
    return tmp_path


def calls(folder):
    """Every public call that takes progress=, with the phases that it goes through."""
    data = [rows(), rows()]
    quantised = peftlab.quantize(mlp(), targets="*")
    return {
        "wrap": (lambda p: peftlab.wrap(mlp(), "lora", r=2, targets="*", progress=p), {"lora": 3}),
        "wrap with data": (
            lambda p: peftlab.wrap(mlp(), "eva", r=2, targets="*", data=data, loss=square, progress=p),
            {"lora": 3, "data": 2, "starts from data": 3},
        ),
        "quantize": (lambda p: peftlab.quantize(mlp(), targets="*", progress=p), {"quantize": 3}),
        "dequantize": (lambda p: peftlab.dequantize(copy.deepcopy(quantised), progress=p), {"dequantize": 3}),
        "load_quantized": (lambda p: peftlab.load_quantized(mlp(), folder / "base", targets="*", progress=p), {"load": 6}),
        "merge_files": (lambda p: merge_files(folder / "base", folder / "adapter.safetensors", folder / str(next(NUMBERS)), progress=p), {"merge": 3}),
    }


NAMES = ("wrap", "wrap with data", "quantize", "dequantize", "load_quantized", "merge_files")
NUMBERS = itertools.count()  # a new folder every time


@pytest.mark.parametrize("name", NAMES)
def test_one_bar_a_phase(name, bars, folder):
    call, phases = calls(folder)[name]
    call(True)
    assert {b.desc: b.n for b in bars} == phases
    assert not any(b.open for b in bars)
    for b in bars:
        assert [n for n, _, _ in b.seen] == list(range(1, phases[b.desc] + 1))
        assert {total for _, total, _ in b.seen} == {phases[b.desc]}
        assert all(text == "" for _, _, text in b.seen) if b.desc == "data" else all(text for _, _, text in b.seen)


def test_batches_of_unknown_number(bars):
    peftlab.wrap(mlp(), "eva", r=2, targets="*", data=iter([rows()]), loss=square, progress=True)
    assert next(b for b in bars if b.desc == "data").seen == [(1, None, "")]


@pytest.mark.parametrize("name", NAMES)
def test_a_function_is_told_and_nobody_need_be(name, folder, bars):
    call, phases = calls(folder)[name]
    seen = []
    call(lambda *step: seen.append(step))
    for nobody in (None, False):
        call(nobody)
    assert not bars
    assert len(seen) == sum(phases.values())
    assert all(isinstance(what, str) for _, _, what in seen)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [3, "yes", [], 1.0])
def test_anything_else_is_refused(name, bad, folder):
    with pytest.raises(TypeError, match=r"progress=.*: True for a bar, or a function of \(done, total, path\)"):
        calls(folder)[name][0](bad)


@pytest.mark.parametrize("name", NAMES)
def test_without_tqdm_the_error_says_how_to_get_it(name, folder, monkeypatch):
    call = calls(folder)[name][0]
    find = importlib.util.find_spec
    monkeypatch.setattr("peftlab.support.progress.find_spec", lambda module, *more: None if module == "tqdm" else find(module, *more))
    with pytest.raises(ImportError, match="pip install tqdm"):
        call(True)
    call(lambda *step: None)


def test_a_refusal_changes_nothing():
    for bad in (3, "yes"):
        model = mlp()
        for call in (peftlab.quantize, lambda m, **how: peftlab.wrap(m, "lora", r=2, **how)):
            with pytest.raises(TypeError, match="progress"):
                call(model, targets="*", progress=bad)
        assert [type(m) for m in model.modules()] == [type(m) for m in mlp().modules()]
        assert all(p.requires_grad for p in model.parameters())


def test_tqdm_is_imported_only_for_a_bar(monkeypatch):
    asked = []
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *more: asked.append(name) or real(name, *more))
    check_progress(None), check_progress(False), check_progress(print)
    with told(None, "nothing") as tell:
        tell(1, 2, "x")
    with told(lambda *step: None, "nothing") as tell:
        tell(1, 2, "x")
    assert not [name for name in asked if name.startswith("tqdm")]


def test_what_tqdm_draws(monkeypatch):
    pytest.importorskip("tqdm")
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    peftlab.quantize(mlp(), targets="*", progress=True)
    said = text.getvalue()
    assert "quantize: 100%" in said
    assert "3/3" in said
    assert said.endswith("\n")


# ---------------------------------------------------------------- interrupts


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_closes_the_bar(name, error, bars, folder, monkeypatch):
    call = calls(folder)[name][0]
    update = Bar.update

    def second(bar, k):
        update(bar, k)
        if bar.n == 2:
            raise error

    monkeypatch.setattr(Bar, "update", second)
    with pytest.raises(error):
        call(True)
    assert bars
    assert not any(b.open for b in bars)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_an_interrupted_wrap_or_load_changes_nothing(error, folder):
    def third(done, total, what):
        if done == 3:
            raise error

    model = mlp()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    for call in (
        lambda: peftlab.wrap(model, "lora", r=2, targets="*", progress=third),
        lambda: peftlab.wrap(model, "eva", r=2, targets="*", data=[rows()] * 4, loss=square, progress=third),
        lambda: peftlab.load_quantized(model, folder / "base", targets="*", progress=third),
    ):
        with pytest.raises(error):
            call()
        assert [type(m) for m in model.modules()] == [type(m) for m in mlp().modules()]
        assert all(p.requires_grad for p in model.parameters())
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("adapted", [False, True])
def test_an_interrupted_quantize_leaves_every_layer_whole(kind, adapted):
    def make():
        return peftlab.wrap(mlp(), "lora", r=2, targets="*") if adapted else mlp()

    def second(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    model, whole = make(), peftlab.quantize(make(), kind, targets="*")
    with pytest.raises(KeyboardInterrupt):
        peftlab.quantize(model, kind, targets="*", progress=second)
    assert sorted(packed_weights(model)) == ["0.weight", "2.weight"]
    half = copy.deepcopy(model)
    assert torch.equal(model[0](rows()), whole[0](rows()))
    assert torch.isfinite(model(rows())).all()
    peftlab.quantize(model, kind, targets="*", exclude=[*packed_weights(model)])  # goes on
    assert torch.equal(model(rows()), whole(rows()))
    with pytest.raises(KeyboardInterrupt):
        peftlab.dequantize(model, progress=second)
    assert sorted(packed_weights(model)) == ["3.weight"]
    assert torch.equal(model(rows()), whole(rows()))
    for m in (model, half):
        peftlab.dequantize(m)
        assert not packed_weights(m)
        assert [type(a) for a in m.modules()] == [type(a) for a in make().modules()]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("verb", "where"),
    [("quantize", f) for f in ("modules.hold", "modules.packing_class", "modules.become", "quantize.note_quantized")]
    + [("dequantize", f) for f in ("modules.scale_names", "modules.become", "quantize.note_quantized")],
)
def test_an_interrupt_in_the_middle_of_a_layer(verb, where, adapted, monkeypatch):
    """Between the first and the last change of a module, too."""

    def make():
        return peftlab.wrap(mlp(), "lora", r=2, targets="*") if adapted else mlp()

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    packed = peftlab.quantize(make(), targets="*")
    model = make() if verb == "quantize" else copy.deepcopy(packed)
    tensors, y = {k: id(p) for k, p in model.named_parameters()}, model(rows())
    with monkeypatch.context() as patch:
        patch.setattr(f"peftlab.quant.{where}", stop)
        with pytest.raises(KeyboardInterrupt):
            getattr(peftlab, verb)(model, targets="*")
    assert {k: id(p) for k, p in model.named_parameters()} == tensors
    assert torch.equal(model(rows()), y)
    getattr(peftlab, verb)(model, targets="*")
    assert [type(m) for m in model.modules()] == [type(m) for m in (packed if verb == "quantize" else make()).modules()]
    assert torch.equal(model(rows()), packed(rows()))
