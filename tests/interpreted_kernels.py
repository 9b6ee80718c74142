# ruff: noqa: E402, PT018
"""Triton kernels under Triton's interpreter, on the CPU: run by test_kernels.py in a process of its own, with TRITON_INTERPRET=1.

The interpreter differs from compiled code in two places, which are set right here: conversions between float32 and bfloat16, where it cuts
instead of rounding and misreads subnormal numbers, and products of matrices of bfloat16, whose bits it takes for whole numbers. Before
version 3.9 it also reads the bounds of loops in a way that numpy 2.4 refuses.
"""

from __future__ import annotations

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads this when it is imported first"

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
import triton.runtime.interpreter as interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quant import gen, mlp, randn, stir, subjects
from torch import nn

import peftlab
from peftlab.quant import codes as C
from peftlab.quant import packed
from peftlab.quant.kernels import triton as K
from peftlab.quant.products import multiply

KINDS, FOUR = ("nf4", "fp4", "int8"), ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
LAUNCHED = ("fill", "quantise_blocks", "quantise_scales", "quantise_rows", "multiply")

convert, dot, patch = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor


def rounding(x, a, b, mode):
    if (a, b) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    if (a, b) == (tl.bfloat16, tl.float32):
        return x.astype(np.uint32) << 16
    return convert(x, a, b, mode)


def wide_dot(self, a, b, *rest):
    a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return dot(self, a, b, *rest)


def with_bounds(tensor, *rest):
    patch(tensor, *rest)
    tensor.__index__ = lambda self: int(self.handle.data.item())


@pytest.fixture(autouse=True, scope="module")
def _mended():
    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor = rounding, wide_dot, with_bounds
    yield
    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor = convert, dot, patch


@pytest.fixture
def served(monkeypatch):
    """A switch that lets the kernels work on CPU tensors; what it returns has the names of those that were launched."""
    plain = lambda *tensors: all(t.dtype in K.DTYPES or not t.is_floating_point() for t in tensors)

    def on():
        found = []

        def spy(name):
            original = getattr(K, name)
            monkeypatch.setattr(K, name, lambda *args: found.append(name) or original(*args))

        monkeypatch.setattr(K, "serves", plain)
        for name in LAUNCHED:
            spy(name)
        return found

    return on


def tables(kind):
    return None if kind == "int8" else C.tables(kind, torch.device("cpu"))


def quantised(W, kind, b=64, double=True):
    return C.quantise(W, kind, None, False) if kind == "int8" else C.quantise(W, kind, b, double)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))  # signs of zeros too


def small(kind, b):
    """Tensors to quantise by name: ties, zeros, odd sizes, subnormal and large numbers."""
    return {name: x[:2] if name == "even" else x for name, x in subjects(kind, b).items()}


def filled(p, i, j, dtype):
    out = torch.full((j - i,), 7.0, dtype=dtype)
    K.fill(p, tables(p.format.kind), i, j, out)
    return out


def expected(p, i, j, dtype):
    out = torch.empty(j - i, dtype=dtype)
    C.fill(p, i, j, out)
    return out


# ---------------------------------------------------------------- decode


def test_decode_the_first_one_comes_out_right():
    assert K.sound(torch.device("cpu"))


@pytest.mark.parametrize("b", packed.BLOCKSIZES)
@pytest.mark.parametrize("kind", FOUR)
def test_decode_blocks_bit_for_bit(kind, b):
    pairs = [(a, o) for a in DTYPES for o in DTYPES]
    for n, (name, x) in enumerate(small(kind, b).items()):
        for dtype, out in pairs if b == 64 else (pairs[n % 9], pairs[-1 - n % 9]):
            for double in (False, True):
                p = C.quantise(x.to(dtype), kind, b, double)
                assert same(filled(p, 0, x.numel(), out), expected(p, 0, x.numel(), out)), (name, dtype, out, double)


def test_decode_every_code_and_scale():
    codes = torch.arange(256, dtype=torch.uint8).repeat(64)  # 512 blocks of 64
    for kind in FOUR:
        for scale in (1.0, 3e38, 1e-38, 1e-44):  # values beyond float16, and subnormal ones
            p = packed.Packed(packed.Format(kind, (512, 64), torch.float32, 64, False), codes[:, None], scale * torch.rand(512, generator=gen(2)))
            for dtype in DTYPES:
                assert same(filled(p, 0, 512 * 64, dtype), expected(p, 0, 512 * 64, dtype)), (kind, scale, dtype)
        second = torch.tensor([0.3, 1e-38])
        p = packed.Packed(packed.Format(kind, (512, 64), torch.float32, 64, True), codes[:, None], codes[:512], second, torch.tensor(0.7))
        assert same(filled(p, 0, 512 * 64, torch.float32), expected(p, 0, 512 * 64, torch.float32))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), b=st.sampled_from((32, 64, 512)), double=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_decode_any_stretch(data, kind, b, double, dtype):
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 90)))
    p = quantised(randn(*shape).to(dtype), kind, b, double)
    i = data.draw(st.integers(0, shape[0] * shape[1]))
    j = data.draw(st.integers(i, shape[0] * shape[1]))
    out = data.draw(st.sampled_from(DTYPES))
    assert same(filled(p, i, j, out), expected(p, i, j, out))


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 10), (1, 1), (2, 2049), (33, 64)])
def test_decode_rows_bit_for_bit(shape):
    for x in (randn(*shape), torch.zeros(shape), 1e-41 * randn(*shape), 1e38 * randn(*shape).clamp(-3, 3)):
        for dtype in DTYPES[:2]:
            p = quantised(x.to(dtype), "int8")
            for out in DTYPES:
                assert same(filled(p, 0, x.numel(), out), expected(p, 0, x.numel(), out))


def test_decode_beyond_two_to_the_31_entries():
    n, b = (1 << 31) + 4096, 64
    codes = torch.zeros(n // 2, 1, dtype=torch.uint8)  # memory that is never touched is never there
    absmax = torch.zeros(n // b)
    codes[-2048:, 0], absmax[-64:] = torch.randint(256, (2048,), generator=gen()).to(torch.uint8), torch.rand(64, generator=gen())
    p = packed.Packed(packed.Format("nf4", (n // 64, 64), torch.float32, b, False), codes, absmax)
    found = filled(p, n - 4001, n - 5, torch.float32)
    assert found.abs().sum() > 0 and same(found, expected(p, n - 4001, n - 5, torch.float32))


def test_decode_through_the_library(served):
    p, q = quantised(randn(9, 31), "nf4"), quantised(randn(9, 31).double(), "fp4")
    wanted = C.dequantise(p), C.dequantise(q)
    launched = served()
    assert same(C.dequantise(p), wanted[0]) and launched == ["fill"]
    assert same(C.dequantise(q), wanted[1]) and launched == ["fill"]  # float64 is PyTorch's


# ---------------------------------------------------------------- quantise


@pytest.mark.parametrize("b", packed.BLOCKSIZES)
@pytest.mark.parametrize("kind", FOUR)
def test_quantise_blocks_bit_for_bit(kind, b, served):
    inputs = [(name, x.to(dtype)) for name, x in small(kind, b).items() for dtype in (DTYPES if b == 64 else DTYPES[:2])]
    inputs += [("large", 3e38 * randn(2, 4096).clamp(-1, 1)), ("ties and both zeros", torch.tensor([0.0, -0.0, 1.0, -1.0]).repeat(b))]
    wanted = [C.quantise(x, kind, b, n % 2 == 0) for n, (_, x) in enumerate(inputs)]
    launched = served()
    for n, ((name, x), want) in enumerate(zip(inputs, wanted, strict=True)):
        p = C.quantise(x, kind, b, n % 2 == 0)
        assert all(same(s, t) for s, t in zip(p[1:], want[1:], strict=True) if t is not None), (name, x.dtype)
    assert launched == [k for n in range(len(inputs)) for k in ("quantise_blocks", "quantise_scales")[: 1 + (n % 2 == 0)]]


def test_quantise_scales_at_the_ends_of_float32(served):
    """A reciprocal that is subnormal, and one of a subnormal number."""
    x = torch.cat([a * torch.cat([torch.ones(1), 2 * torch.rand(63, generator=gen(3)) - 1]) for a in (3.3e38, 1.7e38, 1e-37, 1.1e-38, 9e-39, 1e-42, 1e-45)])
    wanted = C.quantise(x, "nf4", 64, False), C.quantise(x.view(-1, 64), "int8")
    served()
    for found, want in zip((C.quantise(x, "nf4", 64, False), C.quantise(x.view(-1, 64), "int8")), wanted, strict=True):
        assert same(found.codes, want.codes) and same(found.absmax, want.absmax)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_quantise_scales_of_any_number_and_size(data, seed):
    """Double quantisation: a short last group, groups of equal scales, scales that differ by little, by much and not at all."""
    n, spread = data.draw(st.integers(1, 700)), data.draw(st.sampled_from((0.0, 1e-44, 1e-7, 1.0, 1e37)))
    absmax = data.draw(st.sampled_from((0.0, 1.0))) + spread * torch.rand(n, generator=gen(seed))
    want = C._quantise_scales(absmax, "nf4")
    codes, second = K.quantise_scales(absmax, want[2], tables("nf4"))
    assert same(codes, want[0]) and same(second, want[1])


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 10), (1, 1), (1, 4101), (9, 64)])
def test_quantise_rows_bit_for_bit(shape, served):
    half = torch.arange(-254, 255)[: shape[-1]] / 2  # halves round to the even side
    inputs = [x.to(d) for x in (randn(*shape), torch.zeros(shape), 1e-3 * randn(*shape), F.pad(half, (0, shape[-1] - len(half)))[None]) for d in DTYPES]
    wanted = [C.quantise(x, "int8") for x in inputs]
    launched = served()
    for x, want in zip(inputs, wanted, strict=True):
        p = C.quantise(x, "int8")
        assert same(p.codes, want.codes) and same(p.absmax, want.absmax)
    assert launched == ["quantise_rows"] * len(inputs)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), kind=st.sampled_from(FOUR), b=st.sampled_from((32, 64, 128)))
def test_quantise_any_values(data, kind, b):
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    W = torch.tensor(data.draw(st.lists(values, min_size=b, max_size=b)), dtype=torch.float32)
    want = C.quantise(W, kind, b, False)
    codes, absmax = torch.empty(b // 2, dtype=torch.uint8), torch.empty(1)
    K.quantise_blocks(W, b, C.FLOOR, tables(kind), codes, absmax)
    assert same(codes, want.codes[:, 0]) and same(absmax, want.absmax)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_quantise_refuses_what_is_not_finite(kind, bad, served):
    W = randn(8, 64)
    W[3, 5] = bad
    launched = served()
    with pytest.raises(ValueError, match="not finite"):
        quantised(W, kind)
    assert len(launched) == 1


def test_quantise_takes_any_layout(served):
    W, v = randn(64, 96).t(), randn(4096)[::2]
    wanted = quantised(W, "nf4"), quantised(W, "int8"), quantised(v, "fp4")
    served()
    for x, kind, want in zip((W, W, v), KINDS[::2] + ("fp4",), wanted, strict=True):
        assert same(quantised(x, kind).codes, want.codes)


# ---------------------------------------------------------------- products


def product(x, b, p, transposed):
    n_out, n_in = p.format.shape
    out = torch.full((len(x), n_in if transposed else n_out), 7.0, dtype=x.dtype)
    K.multiply(x, b, p, tables(p.format.kind), transposed, out)
    return out


def exact(x, b, p, transposed):
    """In float64, with the weight as it is decoded for inputs of this dtype."""
    W = C.dequantise(p, torch.empty(p.format.shape, dtype=x.dtype))
    W = (W if p.format.cast is None else W.to(p.format.cast).to(x.dtype)).double()
    return x.double() @ W if transposed else F.linear(x.double(), W, None if b is None else b.double())


def near(found, wanted, dtype):
    assert found.shape == wanted.shape and found.dtype == dtype
    assert (found.double() - wanted).norm() <= LIMIT[dtype] * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_a_unit_matrix_is_the_decoded_weight_bit_for_bit(kind, dtype):
    for b, own in ((64, torch.float32), (32, torch.bfloat16), (128, torch.float16)):
        p = quantised(randn(48, 128).to(own), kind, b)
        W = C.dequantise(p, torch.empty(48, 128, dtype=dtype))
        assert torch.equal(product(torch.eye(128, dtype=dtype), None, p, False).t(), W)
        assert torch.equal(product(torch.eye(48, dtype=dtype), None, p, True), W)
        for k in (0, 77):
            assert torch.equal(product(torch.eye(128, dtype=dtype)[k : k + 1], None, p, False)[0], W[:, k])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 19])
def test_product_is_the_dense_one(kind, dtype, rows):
    for (n_out, n_in), b, own in (((40, 192), 64, torch.bfloat16), ((5, 1024), 512, torch.float32), ((9, 96), 32, dtype)):
        p, bias = quantised(randn(n_out, n_in).to(own), kind, b), randn(n_out, seed=1).to(dtype)
        x, g = randn(rows, n_in, seed=2).to(dtype), randn(rows, n_out, seed=3).to(dtype)
        near(product(x, bias, p, False), exact(x, bias, p, False), dtype)
        near(product(x, None, p, False), exact(x, None, p, False), dtype)
        near(product(g, None, p, True), exact(g, None, p, True), dtype)


@settings(max_examples=20, deadline=None)
@given(n_out=st.integers(1, 70), blocks=st.integers(1, 9), rows=st.integers(1, 16), kind=st.sampled_from(KINDS), cut=st.integers(0, 31), transposed=st.booleans())
def test_product_of_any_size(n_out, blocks, rows, kind, cut, transposed):
    n_in = 32 * blocks - (cut if kind == "int8" else 0)
    p = quantised(randn(n_out, n_in), kind, 32)
    x = randn(rows, n_out if transposed else n_in, seed=1)
    near(product(x, None, p, transposed), exact(x, None, p, transposed), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_product_after_a_conversion_of_the_model(kind):
    for own, cast, dtype in ((torch.float32, torch.float16, torch.float32), (torch.float32, torch.bfloat16, torch.float16)):
        p = quantised(randn(24, 128).to(own), kind)
        p = p._replace(format=p.format._replace(cast=cast))
        x = torch.eye(128, dtype=dtype)
        assert torch.equal(product(x, None, p, False).double(), exact(x, None, p, False))
        assert torch.equal(product(x[:1], None, p, False).double(), exact(x[:1], None, p, False))


def test_product_where_kernels_take_part(served):
    """Many rows, blocks across rows, float64 and wrong sizes are PyTorch's affair; any layout of x is not."""
    p, crossing, odd, bytes_ = (
        quantised(randn(20, 64), "nf4"),
        quantised(randn(20, 96), "nf4"),
        quantised(randn(20, 65), "fp4"),
        quantised(randn(20, 65), "int8"),
    )
    b, launched = randn(20), served()

    def runs(x, p, b, *kernels, transposed=False):
        launched.clear()
        y = multiply(x, b, p, transposed)
        assert launched == list(kernels)
        W = C.dequantise(p).to(x.dtype)
        wanted = x @ W if transposed else F.linear(x, W, b if b is None else b.to(x.dtype))
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)

    runs(randn(64), p, b, "multiply")
    runs(randn(2, 3, 64), p, None, "multiply")
    runs(randn(64, 5).t(), p, b, "multiply")
    runs(randn(2, 3, 20), p, None, "multiply", transposed=True)
    runs(randn(4, 65), bytes_, b, "multiply")
    runs(randn(17, 64), p, b, "fill")
    runs(randn(0, 64), p, b, "fill")
    runs(randn(2, 0, 64), p, b, "fill")
    runs(randn(4, 96), crossing, b, "fill")
    runs(randn(4, 65), odd, b, "fill")
    runs(randn(4, 64).double(), p, b.double())
    for shape, transposed in (((4, 63), False), ((4, 64), True)):
        with pytest.raises(RuntimeError, match="shape"):
            multiply(randn(*shape), None, p, transposed)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("convert", [None, torch.bfloat16, torch.float16])
def test_layers_give_the_same_values_and_gradients(kind, convert, served):
    model = stir(peftlab.wrap(peftlab.quantize(mlp(64), kind, targets=["0"]), "lora", r=2, targets=["0"]))
    model = model if convert is None else model.to(convert)
    x = randn(2, 3, 64).to(convert or torch.float32).requires_grad_()
    tensors = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run():
        y = model(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), tensors)]

    wanted = run()
    launched = served()
    limit = 1e-5 if convert is None else 3e-2
    for a, b in zip(run(), wanted, strict=True):
        assert (a - b).double().norm() <= limit * b.double().norm()
    assert launched == ["multiply", "multiply"]  # there and back


def test_layers_quantised_and_decoded_by_kernels_are_the_same_bits(served):
    def both():
        model = peftlab.quantize(mlp(64), targets="*")
        state = {k: t.clone() for k, t in model.state_dict().items()}
        return state, [m.weight.clone() for m in peftlab.dequantize(model) if isinstance(m, nn.Linear)]

    state, weights = both()
    launched = served()
    found, values = both()
    assert set(launched) == {"quantise_blocks", "quantise_scales", "fill"}
    assert found.keys() == state.keys() and all(same(found[k], state[k]) for k in state)
    assert all(same(a, b) for a, b in zip(values, weights, strict=True))
