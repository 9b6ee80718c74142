"""Packed weights under compilers: torch.compile sees operators, torch.export sees PyTorch, and decoding itself may be compiled."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quant import mlp, randn, subjects
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.flop_counter import FlopCounterMode

import peftlab
from peftlab.quant import codes as C
from peftlab.quant import compiled, ops, packed_weights
from peftlab.quant.ops import multiply

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


@pytest.fixture(scope="module")
def kernels():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    peftlab.compile_decoding()
    yield compiled._kernels
    peftlab.compile_decoding(False)


@pytest.fixture
def runs(kernels, monkeypatch):
    """The kernels that ran, for small tensors too."""
    calls = []

    def spy(name):
        run = getattr(compiled, f"_run_{name}")
        monkeypatch.setattr(compiled, f"_run_{name}", lambda *a: calls.append(name) or run(*a))

    spy("decode"), spy("dot")
    monkeypatch.setattr(compiled, "LEAST", 2 * compiled.STRETCH)
    return calls


def without(f):
    """What f gives when PyTorch's own operations do the work."""
    kernels, compiled._kernels = compiled._kernels, None
    try:
        return f()
    finally:
        compiled._kernels = kernels


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_compiled_values_are_the_same_bits(kind, runs):
    """Zeros, tiny and huge entries, borders of codes; rounding to bfloat16 from both dtypes, and a short last block, which PyTorch decodes."""
    for b, double in ((32, False), (64, True), (4096, True)):
        for name, W in subjects(kind, b).items():
            for dtype in (torch.bfloat16, torch.float32):
                p = C.quantise(W.to(dtype), kind, b, double)
                out, wanted = (torch.full(W.shape, 7.0, dtype=torch.bfloat16) for _ in range(2))
                C.dequantise(p, out), without(lambda p=p, wanted=wanted: C.dequantise(p, wanted))
                assert same_bits(out, wanted), (name, dtype, b)
    assert runs


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_stretch_of_compiled_values(kernels, data):
    """Of few entries as well, which are PyTorch's otherwise."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(compiled, "LEAST", 2 * compiled.STRETCH)
        any_stretch(data)


def any_stretch(data):
    b = data.draw(st.sampled_from([32, 64, 256]))
    n = data.draw(st.integers(1, 2000))
    p = C.quantise(randn(n, seed=n), data.draw(st.sampled_from(["nf4", "fp4"])), b, data.draw(st.booleans()))
    start = data.draw(st.integers(0, n)) if data.draw(st.booleans()) else data.draw(st.integers(0, n // b)) * b
    stop = data.draw(st.integers(start, n)) if data.draw(st.booleans()) else start + (n - start) // b * b
    memory, wanted = (torch.zeros(n + 8, dtype=torch.bfloat16) for _ in range(2))
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
    assert runs == ["dot", "dot"]


def test_compiled_kernels_serve_layers(runs):
    p = C.quantise(randn(96, 128).bfloat16(), "nf4")
    W = without(lambda: C.dequantise(p))
    for rows, kernel in ((3, "decode"), (1, "dot")):
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


def test_what_is_not_finite_is_left_to_pytorch(runs):
    p = C.quantise(randn(8, 64).bfloat16(), "nf4", 64, False)
    x = randn(1, 64).bfloat16()
    for bad in (float("nan"), float("inf")):
        broken = p._replace(absmax=p.absmax.clone().index_fill_(0, torch.tensor(3), bad))
        for f in (C.dequantise, lambda q: multiply(x, None, q, False).t()):
            found, wanted = f(broken), without(lambda f=f, broken=broken: f(broken))
            assert not found[3].isfinite().all()
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert not runs


def test_other_dtypes_and_a_switch_that_is_off(runs):
    for kind, dtype in (("int8", torch.bfloat16), ("nf4", torch.float64), ("nf4", torch.float16)):
        p = quantised(randn(8, 64).to(dtype), kind)
        C.dequantise(p), multiply(randn(1, 64).to(dtype), None, p, False)
    p = C.quantise(randn(8, 64), "nf4")
    C.dequantise(p), multiply(randn(1, 8), None, p, True), multiply(randn(2, 64), None, p, False)
    C.dequantise(C.quantise(randn(8, 64).half(), "nf4"), torch.empty(8, 64, dtype=torch.bfloat16))  # rounded to float16 before
    without(lambda: multiply(randn(1, 64), None, p, False))
    assert not runs


@pytest.mark.skipif("guard_filter_fn" not in compiled.OPTIONS, reason="this torch makes a kernel for every state")
def test_kernels_outlast_changes_of_state(runs):
    p, x = C.quantise(randn(96, 128).bfloat16(), "nf4"), randn(1, 128).bfloat16()
    wanted, y, threads = C.dequantise(p), multiply(x, None, p, False), torch.get_num_threads()
    with FlopCounterMode(display=False) as flops:
        assert torch.equal(multiply(x, None, p, False), without(lambda: multiply(x, None, p, False)))
    assert flops.get_total_flops() == 4 * 96 * 128
    runs.clear()
    try:
        for n in range(1, 13):
            torch.set_num_threads(n)
            torch.use_deterministic_algorithms(n % 2 == 0)
            assert torch.equal(C.dequantise(p), wanted)
            torch.testing.assert_close(multiply(x, None, p, False), y)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert runs == 12 * ["decode", "dot"]


def test_kernels_that_fail_are_not_used(monkeypatch):
    monkeypatch.setattr(compiled, "_kernels", None)

    def zeros(out, *tensors, **facts):
        out.zero_()

    for kernel, text in (
        (lambda *a, **facts: 1 / 0, "made no decoding kernels, for which it needs a C.. compiler: ZeroDivisionError: division by zero"),
        (zeros, "for nf4 are wrong on this machine"),
    ):
        monkeypatch.setattr(torch, "compile", lambda f, kernel=kernel, **options: kernel)
        with pytest.raises(RuntimeError, match=text):
            peftlab.compile_decoding()
        assert compiled._kernels is None
    with pytest.raises(TypeError, match="enabled='no': True or False"):
        peftlab.compile_decoding("no")


def test_kernels_that_stop_working_are_left(runs, monkeypatch):
    def stops(*args, **facts):
        raise RuntimeError("recompile limit\nand much more")

    p = C.quantise(randn(8, 64).bfloat16(), "nf4")
    wanted = without(lambda: C.dequantise(p))
    monkeypatch.setattr(compiled, "_kernels", compiled.Kernels(stops, stops))
    with pytest.warns(UserWarning, match="compiled decoding is off: RuntimeError: recompile limit;"):
        assert torch.equal(C.dequantise(p), wanted)
    assert compiled._kernels is None
    assert torch.equal(C.dequantise(p), wanted)
