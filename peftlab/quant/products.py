"""The operations of layers with packed weights: the product, with its backward, and the dense weight.

torch.compile sees one operator for each, whose insides run as they do without a compiler: traced, the tiles of a 4096 x 4096 layer are hundreds of
nodes, which take most of a minute to compile and then run slower. torch.export sees PyTorch's own operations on the whole weight, so that what it
writes needs no peftlab where it runs.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from peftlab.model import layers
from peftlab.quant.codes import DECODE, FEW, TILE, WIDE, dequantise, exporting, fill, tables
from peftlab.quant.kernels import cpu as compiled
from peftlab.quant.kernels import triton as kernels
from peftlab.quant.packed import Format, Packed


def product(x: Tensor, b: Tensor | None, p: Packed) -> Tensor:
    """x W' + b in the dtype of x, differentiable in x and b."""
    if exporting():
        W = dequantise(p)
        return F.linear(x, (W if p.format.cast is None else W.to(p.format.cast)).to(x.dtype), b)
    if torch.compiler.is_compiling():
        return packed_product(x, b, *_parts(p), False)
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace does not see into quantised layers: torch.export does, or peftlab.dequantize the model")
    return Product.apply(x, b, p.format, False, *p[1:]) if _recorded(x, b) else multiply(x, b, p, False)


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd, torch.func or forward mode takes note of what is done: for them there is a Function, which costs as much as a small product."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def dense(p: Packed) -> Tensor:
    """The decoded weight in its own dtype."""
    if torch.compiler.is_compiling() and not exporting():
        return packed_dense(*_parts(p))
    return dequantise(p)


class Product(torch.autograd.Function):
    """x W' + b, or x W: the weight is decoded in tiles, and backward keeps its codes."""

    @staticmethod
    def forward(x: Tensor, b: Tensor | None, form: Format, transposed: bool, *tensors: Tensor | None) -> Tensor:
        return multiply(x, b, Packed(form, *tensors), transposed)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, _, ctx.form, ctx.transposed, *tensors = inputs
        ctx.shape = output.shape
        ctx.save_for_backward(*tensors), ctx.save_for_forward(*tensors)

    @staticmethod
    def vmap(info, in_dims, x, b, form, transposed, *tensors):
        """Over inputs and biases."""
        if any(d is not None for d in in_dims[4:]):
            raise NotImplementedError("vmap over the codes of a packed layer: only over its input and its bias")
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        y = Product.apply(x, b if in_dims[1] is None else None, form, transposed, *tensors)
        if in_dims[1] is not None:
            y = y + b.movedim(in_dims[1], 0).view(info.batch_size, *(1,) * (y.ndim - 2), -1)
        return y.clone(), 0  # what is added in place to a product must not be a view

    @staticmethod
    def jvp(ctx, tx, tb, *_):
        y = None if tx is None else Product.apply(tx, None, ctx.form, ctx.transposed, *ctx.saved_for_forward)
        return y if tb is None else tb.expand(ctx.shape) if y is None else y + tb

    @staticmethod
    def backward(ctx, g: Tensor):
        gx = Product.apply(g, None, ctx.form, not ctx.transposed, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        return gx, _bias_gradient(g) if ctx.needs_input_grad[1] else None, *(None,) * 6


Product.forward.__signature__ = inspect.signature(Product.forward)  # torch asks for it in every call, and finding it takes longer than a small product


def _bias_gradient(g: Tensor) -> Tensor:
    return g.reshape(-1, g.shape[-1]).sum(0)


def multiply(x: Tensor, b: Tensor | None, p: Packed, transposed: bool) -> Tensor:
    """x (..., n_in) W' + b, or x (..., n_out) W, in the dtype of x whatever autocast says; no more of W than a tile is dense at a time."""
    if layers.is_autocasting(x.device):
        with torch.autocast(x.device.type, enabled=False):
            return multiply(x, b, p, transposed)
    n_out, n_in = p.format.shape
    flat = x.reshape(-1, x.shape[-1])
    if kernels.fuses(flat, p, transposed):
        out = x.new_empty(*x.shape[:-1], n_in if transposed else n_out)
        kernels.multiply(flat, b, p, None if p.format.kind == "int8" else tables(p.format.kind, x.device), transposed, out)
        return out
    if compiled.fuses(flat, p, transposed):
        return compiled.multiply(flat, b, p).view(*x.shape[:-1], n_out)
    few = len(flat) < FEW and not compiled.serves(p, x)  # a compiled kernel has no temporaries that a small tile would keep in the cache
    rows = max(1, (WIDE if x.is_cuda else DECODE if few else TILE) // max(n_in, 1))
    if rows >= n_out or n_out * n_in <= TILE // 4:
        W = tile(p, 0, n_out, x.new_empty(n_out * n_in))
        return x @ W if transposed else F.linear(x, W, b)
    out = x.new_zeros(*x.shape[:-1], n_in) if transposed else x.new_empty(*x.shape[:-1], n_out)
    y = out.view(len(flat), out.shape[-1])
    memory = x.new_empty(rows * n_in)
    for i in range(0, n_out, rows):
        j = min(i + rows, n_out)
        W = tile(p, i, j, memory)
        if transposed:
            y.addmm_(flat[:, i:j], W)
        elif b is None:
            torch.mm(flat, W.t(), out=y[:, i:j])
        else:
            torch.addmm(b[i:j], flat, W.t(), out=y[:, i:j])
    return out  # no view: what is added in place to a product must be the tensor that autograd knows


def tile(p: Packed, i: int, j: int, memory: Tensor) -> Tensor:
    """Rows i..j of the weight in `memory`, rounded to the weight's own dtype and then cast to the memory's."""
    n, form = p.format.shape[1], p.format
    W = memory[: (j - i) * n]
    fill(p, i * n, j * n, W)
    W = W.view(j - i, n)
    return W if form.cast in (None, W.dtype) else W.to(form.cast).to(W.dtype)


def _parts(p: Packed) -> tuple:
    """What an operator is told of a packed tensor. By names: torch 2.6 cannot trace slices and properties of a named tuple."""
    form = p.format
    return p.codes, p.absmax, p.nested_absmax, p.offset, form.kind, list(form.shape), form.dtype, form.cast, form.blocksize


def _packed(codes, absmax, nested_absmax, offset, kind, shape, dtype, cast, blocksize) -> Packed:
    return Packed(Format(kind, tuple(shape), dtype, blocksize, nested_absmax is not None, cast=cast), codes, absmax, nested_absmax, offset)


_PARTS = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str kind, int[] shape, ScalarType dtype, ScalarType? cast, int blocksize"


@torch.library.custom_op("peftlab::packed_product", mutates_args=(), schema=f"(Tensor x, Tensor? b, {_PARTS}, bool transposed) -> Tensor")
def packed_product(x, b, codes, absmax, nested_absmax, offset, kind, shape, dtype, cast, blocksize, transposed):
    """`multiply`, with the packed tensor in parts."""
    return multiply(x, b, _packed(codes, absmax, nested_absmax, offset, kind, shape, dtype, cast, blocksize), transposed)


@packed_product.register_fake
def _(x, b, codes, absmax, nested_absmax, offset, kind, shape, dtype, cast, blocksize, transposed):
    return x.new_empty(*x.shape[:-1], shape[transposed])


def _keep(ctx, inputs, output) -> None:
    _, _, *tensors, ctx.kind, ctx.shape, ctx.dtype, ctx.cast, ctx.blocksize, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, g):
    facts = ctx.kind, ctx.shape, ctx.dtype, ctx.cast, ctx.blocksize
    gx = packed_product(g, None, *ctx.saved_tensors, *facts, not ctx.transposed) if ctx.needs_input_grad[0] else None
    return gx, _bias_gradient(g) if ctx.needs_input_grad[1] else None, *(None,) * 10


packed_product.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("peftlab::packed_dense", mutates_args=(), schema=f"({_PARTS}) -> Tensor")
def packed_dense(codes, absmax, nested_absmax, offset, kind, shape, dtype, cast, blocksize):
    """`dequantise`, with the packed tensor in parts."""
    return dequantise(_packed(codes, absmax, nested_absmax, offset, kind, shape, dtype, cast, blocksize))


@packed_dense.register_fake
def _(codes, absmax, nested_absmax, offset, kind, shape, dtype, cast, blocksize):
    return absmax.new_empty(shape, dtype=dtype)
