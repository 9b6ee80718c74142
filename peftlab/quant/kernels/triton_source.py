"""The Triton kernels, one program at a time. Imported by kernels.py alone, which says what they are for and launches them.

No kernel may be launched with fused multiply-adds: `enable_fp_fusion=False` keeps every product and every sum rounded by itself, as PyTorch
rounds them. Where a fused one is wanted, `tl.fma` says so.
Legend: B entries a block of 4-bit codes; R blocks a program; a tile of a weight is (rows, G, C): G stretches of C entries, none of which leaves its block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

VERSION = tuple(int(n) for n in triton.__version__.split(".")[:2])

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _scale(absmax, nested, offset, dynamic, block, inside, NESTED: tl.constexpr, GROUP: tl.constexpr):
    """float32 absmax of some blocks: as stored, or code book value * second absmax + mean."""
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        top = tl.load(dynamic + code) * tl.load(nested + block // GROUP, mask=inside, other=0.0) + tl.load(offset)
    else:
        top = tl.load(absmax + block, mask=inside, other=0.0)
    return top


@triton.jit
def _tile(codes, absmax, nested, offset, dynamic, book, row, k, n_out, n_in, half, FOUR: tl.constexpr, NESTED: tl.constexpr, GROUP: tl.constexpr,
          B: tl.constexpr, G: tl.constexpr, C: tl.constexpr, FORM: tl.constexpr, OUT: tl.constexpr, CAST: tl.constexpr):  # fmt: skip
    """(len(row), G, C) values of the columns from k on, rounded as `tile` of linear.py rounds them; zeros outside of the weight.

    row: int64; half: n_in // 2. 4-bit codes need rows of whole blocks, so that a stretch is inside as a whole or not at all.
    """
    there = row < n_out
    if FOUR:
        first = k + tl.arange(0, G) * C
        inside = there[:, None] & (first < n_in)[None, :]
        top = _scale(absmax, nested, offset, dynamic, row[:, None] * (n_in // B) + (first // B)[None, :], inside, NESTED, GROUP)
        at = (row[:, None] * half + (first // 2)[None, :])[:, :, None] + tl.arange(0, C // 2)[None, None, :]
        both = tl.load(codes + at, mask=inside[:, :, None], other=0).to(tl.int32)
        v = tl.interleave(tl.load(book + (both >> 4)) * top[:, :, None], tl.load(book + (both & 15)) * top[:, :, None])
    else:
        column = k + tl.arange(0, G)[:, None] * C + tl.arange(0, C)[None, :]
        inside = there[:, None, None] & (column < n_in)[None, :, :]
        top = tl.load(absmax + row, mask=there, other=0.0)
        code = tl.load(codes + row[:, None, None] * n_in + column[None, :, :], mask=inside, other=0)
        v = code.to(tl.float32) * top[:, None, None] * (1 / 127)
    return v.to(FORM).to(OUT).to(CAST).to(OUT)


@triton.jit
def decode_blocks(codes, absmax, nested, offset, dynamic, book, out, low, start, stop, n_bytes, NESTED: tl.constexpr, GROUP: tl.constexpr,
                  B: tl.constexpr, R: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    """Entries start..stop of a tensor of n_bytes of 4-bit codes; R blocks a program, from the block `low` on."""
    block = tl.program_id(0).to(tl.int64) * R + low + tl.arange(0, R)
    first = block * B
    top = _scale(absmax, nested, offset, dynamic, block, first < stop, NESTED, GROUP)
    byte = block[:, None] * (B // 2) + tl.arange(0, B // 2)[None, :]
    both = tl.load(codes + byte, mask=byte < n_bytes, other=0).to(tl.int32)
    v = tl.interleave(tl.load(book + (both >> 4)) * top[:, None], tl.load(book + (both & 15)) * top[:, None])
    i = first[:, None] + tl.arange(0, B)[None, :]
    tl.store(out + (i - start), v.to(FORM).to(out.dtype.element_ty), mask=(i >= start) & (i < stop))


@triton.jit
def decode_rows(codes, absmax, out, low, start, stop, n, BLOCK: tl.constexpr, FORM: tl.constexpr):
    """Entries start..stop of int8 rows of n entries; BLOCK entries of a row a program, from the row `low` on."""
    row = tl.program_id(0).to(tl.int64) + low
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = row * n + column
    inside = (column < n) & (i >= start) & (i < stop)
    v = tl.load(codes + i, mask=inside, other=0).to(tl.float32) * tl.load(absmax + row) * (1 / 127)
    tl.store(out + (i - start), v.to(FORM).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _size(v):
    """|v|, and infinity where v is not a number: a maximum would pass it over."""
    return tl.where(v == v, tl.abs(v), float("inf"))


@triton.jit
def _reciprocal(v):
    """1 / v as float32 rounds it: 53 bits are enough to round twice. In float32, Triton's divisions are inexact, or flush small numbers in old versions."""
    return (1.0 / v.to(tl.float64)).to(tl.float32)


@triton.jit
def quantise_blocks(x, borders, order, codes, absmax, blocks, FLOOR: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """4-bit codes, two a byte, and absmax of whole blocks: the count of borders below an entry, by halving."""
    block = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = block < blocks
    v = tl.load(x + (block * B)[:, None] + tl.arange(0, B)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    top = tl.max(_size(v), 1)
    tl.store(absmax + block, top, mask=inside)
    v = v * _reciprocal(tl.maximum(top, tl.full([R], FLOOR, tl.float32)))[:, None]
    below = tl.zeros([R, B], tl.int32)
    for k in tl.static_range(4):
        below += tl.where(v > tl.load(borders + below + ((8 >> k) - 1)), 8 >> k, 0)
    first, second = tl.split(tl.reshape(tl.load(order + below), [R, B // 2, 2]))
    at = (block * (B // 2))[:, None] + tl.arange(0, B // 2)[None, :]
    tl.store(codes + at, (first * 16 + second).to(tl.uint8), mask=inside[:, None])


@triton.jit
def quantise_scales(absmax, offset, nearest, codes, second, blocks, GROUP: tl.constexpr):
    """8-bit codes of one group of scales less their mean, by cells of [-1, 1], and the largest difference."""
    group = tl.program_id(0).to(tl.int64)
    i = group * GROUP + tl.arange(0, GROUP)
    inside = i < blocks
    v = tl.where(inside, tl.load(absmax + i, mask=inside, other=0.0) - tl.load(offset), 0.0)
    top = tl.max(tl.abs(v), 0)
    tl.store(second + group, top)
    v = v * _reciprocal(top)
    v = tl.where(v == v, tl.minimum(tl.maximum(v, -1.0), 1.0), -1.0)  # groups of zeros get code 0
    cell = ((v + 1.0) * 32767.5 + 0.5).to(tl.int32)
    tl.store(codes + i, tl.load(nearest + cell), mask=inside)


@triton.jit
def quantise_rows(x, codes, absmax, n, BLOCK: tl.constexpr):
    """int8 codes and absmax of one row of n entries a program."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], tl.float32)
    for k in range(0, n, BLOCK):
        column = k + tl.arange(0, BLOCK)
        most = tl.maximum(most, _size(tl.load(x + row * n + column, mask=column < n, other=0.0).to(tl.float32)))
    top = tl.max(most, 0)
    tl.store(absmax + row, top)
    factor = _reciprocal(top) * 127.0  # 127 / top is that, in PyTorch
    for k in range(0, n, BLOCK):
        column = k + tl.arange(0, BLOCK)
        v = tl.load(x + row * n + column, mask=column < n, other=0.0).to(tl.float32) * factor
        v = tl.where(tl.abs(v) < 128.0, v, 0.0)  # rows of zeros, or so small that the factor overflows
        v = (v + 12582912.0) - 12582912.0  # 1.5 * 2^23: floats beyond it are whole, so the sum rounds half to even
        tl.store(codes + row * n + column, v.to(tl.int8), mask=column < n)


@triton.jit
def one_row(x, bias, codes, absmax, nested, offset, dynamic, book, y, n_out, n_in, half, BIAS: tl.constexpr, FOUR: tl.constexpr,
            NESTED: tl.constexpr, GROUP: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
            FORM: tl.constexpr, CAST: tl.constexpr):  # fmt: skip
    """y (n_out,) = W x + b: BN rows of the weight a program, sums in float32."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    total = tl.zeros([BN, G, C], tl.float32)
    for k in range(0, n_in, G * C):
        W = _tile(codes, absmax, nested, offset, dynamic, book, row, k, n_out, n_in, half, FOUR, NESTED, GROUP, B, G, C, FORM, x.dtype.element_ty, CAST)
        column = k + tl.arange(0, G)[:, None] * C + tl.arange(0, C)[None, :]
        v = tl.load(x + column, mask=column < n_in, other=0.0).to(tl.float32)
        total = tl.fma(W.to(tl.float32), tl.broadcast_to(v[None, :, :], [BN, G, C]), total)
    out = tl.sum(tl.sum(total, 2), 1)
    if BIAS:
        out += tl.load(bias + row, mask=row < n_out, other=0.0).to(tl.float32)
    tl.store(y + row, out.to(y.dtype.element_ty), mask=row < n_out)


@triton.jit
def rows_forward(x, bias, codes, absmax, nested, offset, dynamic, book, y, rows, n_out, n_in, half, BIAS: tl.constexpr, FOUR: tl.constexpr,
                 NESTED: tl.constexpr, GROUP: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
                 C: tl.constexpr, FORM: tl.constexpr, CAST: tl.constexpr):  # fmt: skip
    """y (rows, n_out) = x (rows, n_in) W' + b: BM rows of x and BN of the weight a program, sums in float32."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, n_in, G * C):
        W = _tile(codes, absmax, nested, offset, dynamic, book, row, k, n_out, n_in, half, FOUR, NESTED, GROUP, B, G, C, FORM, x.dtype.element_ty, CAST)
        column = k + tl.arange(0, G * C)
        v = tl.load(x + m[:, None] * n_in + column[None, :], mask=(m < rows)[:, None] & (column < n_in)[None, :], other=0.0)
        total = tl.dot(v, tl.trans(tl.reshape(W, [BN, G * C])), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + row, mask=row < n_out, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * n_out + row[None, :], total.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (row < n_out)[None, :])


@triton.jit
def rows_backward(x, codes, absmax, nested, offset, dynamic, book, y, rows, n_out, n_in, half, FOUR: tl.constexpr, NESTED: tl.constexpr,
                  GROUP: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
                  FORM: tl.constexpr, CAST: tl.constexpr):  # fmt: skip
    """y (rows, n_in) = x (rows, n_out) W: BM rows of x and G * C columns of the weight a program, sums in float32."""
    k = tl.program_id(0) * (G * C)
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.zeros([BM, G * C], tl.float32)
    for first in range(0, n_out, BN):
        row = first + tl.arange(0, BN).to(tl.int64)
        W = _tile(codes, absmax, nested, offset, dynamic, book, row, k, n_out, n_in, half, FOUR, NESTED, GROUP, B, G, C, FORM, x.dtype.element_ty, CAST)
        v = tl.load(x + m[:, None] * n_out + row[None, :], mask=(m < rows)[:, None] & (row < n_out)[None, :], other=0.0)
        total = tl.dot(v, tl.reshape(W, [BN, G * C]), total, input_precision="ieee")
    column = k + tl.arange(0, G * C)
    tl.store(y + m[:, None] * n_in + column[None, :], total.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (column < n_in)[None, :])
