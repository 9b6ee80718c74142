"""Packed weights under compilers: torch.compile sees operators, torch.export sees PyTorch, and decoding itself may be compiled."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quant import mlp, randn, subjects
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.flop_counter import FlopCounterMode

import peftlab
from peftlab.quant import codes as C
from peftlab.quant import products as ops
from peftlab.quant.kernels import cpu as compiled
from peftlab.quant.products import multiply
from peftlab.quant.quantize import packed_weights

KINDS = ("nf4", "fp4", "int8")


def quantised(W, kind):
    return C.quantise(W, kind, double=kind != "int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiler_sees_one_operator_a_layer(kind, frozen):
    """Forward and backward in one graph, with a trained bias and with nothing trained: the values are those without a compiler."""
    torch._dynamo.reset()
    model = peftlab.quantize(mlp(64), kind, targets="*").requires_grad_(False)
    model[0].bias.requires_grad_(not frozen)
    leaves = [] if frozen else [model[0].bias]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    fast = torch.compile(model, fullgraph=True, backend=backend)
    for x in (randn(5, 64), randn(2, 3, 64), randn(5, 64).requires_grad_()):
        y, wanted = fast(x), model(x)
        assert torch.equal(y, wanted)
        inputs = [t for t in (x, *leaves) if t.requires_grad]
        for a, b in zip(*(torch.autograd.grad(t.square().sum(), inputs) if inputs else () for t in (y, wanted)), strict=True):
            assert torch.equal(a, b)
    named = [[str(node.target) for node in graph.graph.nodes if "peftlab" in str(node.target)] for graph in graphs]
    assert named
    assert all(found == ["peftlab.packed_product.default"] * len(packed_weights(model)) for found in named)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_keep_torchs_rules(kind):
    """Their outlines on fake tensors, their gradients and what they may not change, as torch checks them."""
    x, b = randn(3, 64).requires_grad_(), randn(20, seed=1).requires_grad_()
    p = quantised(randn(20, 64, seed=2), kind)
    parts = ops._parts(p)
    for args in ((x, b, *parts, False), (x, None, *parts, False), (randn(2, 3, 20).requires_grad_(), None, *parts, True)):
        torch.library.opcheck(torch.ops.peftlab.packed_product, args)
    torch.library.opcheck(torch.ops.peftlab.packed_dense, parts)
    assert torch.equal(torch.ops.peftlab.packed_dense(*parts), C.dequantise(p))


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch cannot tell export from compile")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_exported_needs_no_peftlab(kind, dtype):
    model, x = peftlab.quantize(mlp(64).to(dtype), kind, targets="*"), randn(5, 64).to(dtype)
    exported = torch.export.export(model, (x,))
    assert not [node for node in exported.graph.nodes if "peftlab" in str(node.target)]
    assert torch.equal(exported.module()(x), model(x))


def test_torch_jit_is_refused_by_name():
    model, x = peftlab.quantize(mlp(64), targets="*"), randn(5, 64)
    with pytest.raises(RuntimeError, match=r"torch.jit.trace does not see into quantised layers: torch.export does"):
        torch.jit.trace(model, (x,))


# ---------------------------------------------------------------- decoding that is compiled itself


@pytest.fixture(scope="module", params=["", "-mno-avx512f"], ids=["this processor", "AVX2"])
def kernels(request):
    """Made for this processor, and as for one without AVX-512."""
    compiler = next(filter(shutil.which, compiled.COMPILERS), None)
    if compiler is None or "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("no C++ compiler, or no processor that the kernels are for")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(compiled, "_kernels", None)
        m.setattr(compiled, "_on", False)
        m.setenv("CXX", f"{compiler} {request.param}")
        peftlab.compile_decoding()
        yield compiled._kernels


@pytest.fixture
def runs(kernels, monkeypatch):
    """The kernels that ran, for small tensors too."""
    calls = []

    def spy(name):
        run = getattr(compiled, f"_{name}")
        monkeypatch.setattr(compiled, f"_{name}", lambda *a: calls.append(name) or run(*a))

    spy("decode"), spy("multiply")
    monkeypatch.setattr(compiled, "LEAST", 64)
    return calls


def without(f):
    """What f gives when PyTorch's own operations do the work."""
    on, compiled._on = compiled._on, False
    try:
        return f()
    finally:
        compiled._on = on


def same_bits(a, b):
    bits = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_compiled_values_are_the_same_bits(kind, runs):
    """Zeros, tiny and huge entries, borders of codes; from both dtypes to both, and a short last block, which PyTorch decodes."""
    for b, double in ((32, False), (32, True), (64, True), (4096, True)):
        groups = randn(600 * 32) * torch.linspace(0.1, 3, 600 * 32)  # of 256 coded scales, each with a scale of its own
        for name, W in {**subjects(kind, b), "groups": groups}.items():
            for stored, dtype in itertools.product(compiled.DTYPES, compiled.DTYPES):
                p = C.quantise(W.to(stored), kind, b, double)
                out, wanted = (torch.full(W.shape, 7.0, dtype=dtype) for _ in range(2))
                C.dequantise(p, out), without(lambda p=p, wanted=wanted: C.dequantise(p, wanted))
                assert same_bits(out, wanted), (name, stored, dtype, b)
    assert runs


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_stretch_of_compiled_values(kernels, data):
    """Of few entries as well, which are PyTorch's otherwise."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(compiled, "LEAST", 64)
        any_stretch(data)


def any_stretch(data):
    b = data.draw(st.sampled_from([32, 64, 256]))
    n = data.draw(st.integers(1, 2000))
    p = C.quantise(randn(n, seed=n), data.draw(st.sampled_from(["nf4", "fp4"])), b, data.draw(st.booleans()))
    start = data.draw(st.integers(0, n)) if data.draw(st.booleans()) else data.draw(st.integers(0, n // b)) * b
    stop = data.draw(st.integers(start, n)) if data.draw(st.booleans()) else start + (n - start) // b * b
    dtype = data.draw(st.sampled_from(compiled.DTYPES))
    memory, wanted = (torch.zeros(n + 8, dtype=dtype) for _ in range(2))
    first = data.draw(st.integers(0, 8))  # odd places are not aligned
    C.fill(p, start, stop, memory[first : first + stop - start])
    without(lambda: C.fill(p, start, stop, wanted[first : first + stop - start]))
    assert same_bits(memory, wanted)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_out", "n_in", "b"), [(96, 128, 64), (7, 4096, 4096), (300, 96, 32), (16, 512, 64)])
def test_a_compiled_product_of_one_token(kind, dtype, stored, n_out, n_in, b, runs):
    """Summed in float32: as near to the exact product as its dtype allows, or nearer than PyTorch's own."""
    p = C.quantise((0.1 * randn(n_out, n_in)).to(stored), kind, b)
    W = without(lambda: C.dequantise(p)).to(dtype).double()
    limit = {torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype]
    for bias in (None, randn(n_out, seed=1).to(dtype)):
        x = randn(1, 1, n_in, seed=2).to(dtype)
        y = multiply(x, bias, p, False)
        wanted = F.linear(x.double(), W, None if bias is None else bias.double())
        assert y.dtype == dtype
        assert y.shape == wanted.shape
        assert (y.double() - wanted).norm() <= limit * wanted.norm()
    assert runs == ["multiply", "multiply"]


def test_compiled_kernels_serve_layers(runs):
    p = C.quantise(randn(96, 128).bfloat16(), "nf4")
    W = without(lambda: C.dequantise(p))
    for rows, kernel in ((3, "decode"), (1, "multiply")):
        runs.clear()
        x, g = randn(rows, 128, seed=1).bfloat16().requires_grad_(), randn(rows, 96, seed=2).bfloat16()
        y = ops.product(x, None, p)
        y.backward(g)
        assert runs == [kernel, "decode"]  # there and back
        torch.testing.assert_close(y, F.linear(x, W))
        torch.testing.assert_close(x.grad, g @ W)
        with torch.inference_mode():
            assert torch.equal(ops.product(x, None, p), y)
    model = peftlab.quantize(mlp(64).bfloat16(), targets="*")
    for x in (randn(5, 64).bfloat16(), randn(1, 64).bfloat16()):
        runs.clear()
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
        assert len(runs) == 2 * len(packed_weights(model))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_compiled_values_that_are_not_finite(stored, runs):
    p = C.quantise(randn(8, 64).to(stored), "nf4", 64, False)
    x = randn(1, 64).bfloat16()
    for bits in (0x7FC00000, 0x7FFFFFFF, 0x7F800000):  # NaN, one that would become zero when rounded as a number, infinity
        broken = p._replace(absmax=p.absmax.view(torch.int32).index_fill(0, torch.tensor(3), bits).view(torch.float32))
        for f in (C.dequantise, lambda q: multiply(x, None, q, False).t(), lambda q: multiply(x.float(), None, q, False).t()):
            found, wanted = f(broken), without(lambda f=f, broken=broken: f(broken))
            assert not found[3].isfinite().all()
            torch.testing.assert_close(found, wanted, equal_nan=True)
    assert len(runs) == 9


def test_other_dtypes_and_a_switch_that_is_off(runs):
    for kind, dtype in (("int8", torch.bfloat16), ("nf4", torch.float64), ("nf4", torch.float16)):
        p = quantised(randn(8, 64).to(dtype), kind)
        C.dequantise(p), multiply(randn(1, 64).to(dtype), None, p, False)
    p = C.quantise(randn(8, 64), "nf4")
    C.dequantise(p, torch.empty(8, 64, dtype=torch.float16))
    C.dequantise(C.quantise(randn(8, 64).half(), "nf4"), torch.empty(8, 64, dtype=torch.bfloat16))  # rounded to float16 before
    without(lambda: (C.dequantise(p), multiply(randn(1, 64), None, p, False)))
    assert not runs


def test_kernels_use_the_threads_that_torch_has(runs):
    p, x = C.quantise(randn(96, 128).bfloat16(), "nf4"), randn(1, 128).bfloat16()
    wanted, y, threads = C.dequantise(p), multiply(x, None, p, False), torch.get_num_threads()
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            assert torch.equal(C.dequantise(p), wanted)
            assert torch.equal(multiply(x, None, p, False), y)
    finally:
        torch.set_num_threads(threads)


def test_counters_see_pytorchs_operations(runs):
    p, x = C.quantise(randn(96, 128).bfloat16(), "nf4"), randn(1, 128).bfloat16()
    with FlopCounterMode(display=False) as flops:
        assert torch.equal(multiply(x, None, p, False), without(lambda: multiply(x, None, p, False)))
    assert flops.get_total_flops() == 4 * 96 * 128
    assert not runs


def test_kernels_under_torch_func(runs):
    """Where a product reaches them with plain tensors they run; scales that a transform wraps are left to PyTorch."""
    layer = peftlab.quantize(nn.Linear(128, 96), "nf4", targets="*").requires_grad_(False)
    x, v = randn(3, 1, 128), randn(3, 1, 128, seed=1)
    scales = {k: t for k, t in layer.named_buffers() if t.is_floating_point()}

    def outputs():
        yield torch.func.vmap(layer)(x)
        yield from torch.func.jvp(layer, (x,), (v,))
        yield torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(x)
        yield torch.func.vjp(lambda buffers: torch.func.functional_call(layer, buffers, x), scales)[0]

    assert scales
    for found, wanted in zip(outputs(), without(lambda: list(outputs())), strict=True):
        torch.testing.assert_close(found, wanted)
    assert runs


def test_the_switch(kernels):
    peftlab.compile_decoding(False)
    assert not compiled._on
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CXX", "nothing")  # they are not compiled twice
        peftlab.compile_decoding()
    assert compiled._on
    assert compiled._kernels is kernels
    with pytest.raises(TypeError, match="enabled='no': True or False"):
        peftlab.compile_decoding("no")


def test_kernels_that_cannot_be_made_are_not_used(kernels, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "_kernels", None)
    monkeypatch.setattr(compiled, "_on", False)
    wrong, source = tmp_path / "decode.cpp", compiled.SOURCE.read_text()
    decodes, multiplies = (source.replace(f"look_up({name}, byte >> 4)", f"look_up({name}, byte)") for name in ("values", "here"))
    assert source not in (decodes, multiplies)
    for how, text in (
        (lambda: monkeypatch.setenv("CXX", "no-such-compiler"), "no-such-compiler made no decoding kernels: .*No such file"),
        (lambda: monkeypatch.setenv("CXX", "c++ -no-such-flag"), "c.. -no-such-flag made no decoding kernels: .*error: .*no-such-flag"),
        (lambda: monkeypatch.setenv("CXX", "c++ -mno-avx2"), "error.*the kernels look values up with instructions of AVX2 and FMA, or of AVX-512, which"),
        (lambda: (monkeypatch.delenv("CXX"), monkeypatch.setattr(compiled, "SOURCE", wrong), wrong.write_text(decodes)), "for nf4 are wrong on this machine"),
        (lambda: wrong.write_text(multiplies), "for nf4 are wrong on this machine: they are not used"),
        (lambda: monkeypatch.setenv("PATH", ""), r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\) to compile decoding with: install one, or name it in .* CXX"),
    ):
        how()
        with pytest.raises(RuntimeError, match=text):
            peftlab.compile_decoding()
        assert compiled._kernels is None
        assert not compiled._on


def test_a_compiler_without_openmp(kernels, monkeypatch, tmp_path):
    """Apple's, for one: then there is one thread."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(compiled, "_kernels", None)
    monkeypatch.setenv("CXX", str(compiler))
    p = C.quantise(randn(96, 128), "nf4")
    peftlab.compile_decoding()
    assert compiled._kernels is not kernels
    assert torch.equal(C.dequantise(p), without(lambda: C.dequantise(p)))
