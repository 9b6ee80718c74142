"""Codes and scales: quantise a tensor in blocks, and decode any stretch of it.

    x = absmax(block of x) * book[code]        (nf4, fp4: 4 bits an entry, two entries a byte, the first in the high half)
    x = absmax(row of x) / 127 * code          (int8)

With double quantisation the absmax of the blocks are themselves quantised: their mean is taken away and what is left is coded in 8 bits
in blocks of 256. The values equal those of bitsandbytes 0.50 bit for bit.

Papers: QLoRA, Dettmers et al. 2023, arXiv 2305.14314 (nf4: appendix E; double quantisation: section 3). The 8-bit code of the absmax:
    Dettmers 2015, arXiv 1511.04561 (dynamic tree). int8: Dettmers et al. 2022, arXiv 2208.07339.
Legend: n entries of a tensor, b entries a block; codes (ceil(n / 2), 1) uint8, or (rows, columns) int8; absmax (ceil(n / b),).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from peftlab.quant.codebooks import BOOKS, DYNAMIC, ORDER, borders, nearest
from peftlab.quant.kernels import cpu as compiled
from peftlab.quant.kernels import triton as kernels
from peftlab.quant.packed import BLOCKSIZES, FORMATS, Format, Packed

SCALES = 256  # absmax values that share a second scale

DECODE = 1 << 19  # entries that are decoded at a time: larger pieces leave the cache, in smaller ones the calls cost more than the work

TILE = 1 << 21  # entries of a weight that are dense at once while a product is formed

WIDE = 1 << 24  # the same on CUDA, where a narrow product leaves most of the device idle

FEW = 64  # rows of an input below which the product costs less than the decoding: then a tile is a piece

HUGE = 1 << 22  # bytes from which on new memory is asked for in huge pages

PIECE = 1 << 18  # entries that are quantised at a time: the temporaries stay in the cache

FLOOR = 1e-38  # an absmax below this does not divide


@functools.cache
def tables(kind: str, device: torch.device) -> kernels.Tables:
    """What Triton kernels look up for nf4 and fp4."""
    with torch.device("cpu"):
        found = BOOKS[kind], torch.tensor(borders(kind)), torch.tensor(ORDER[kind], dtype=torch.int32), DYNAMIC, nearest()
    return kernels.Tables(*(t.to(device) for t in found), SCALES)


@functools.cache
def _sorted_to_code(device: torch.device) -> Tensor:
    """(256,) uint8: two sorted positions in a byte -> the two codes of fp4 in a byte."""
    order = torch.tensor(ORDER["fp4"], dtype=torch.uint8, device="cpu")
    return (order[:, None] * 16 + order).flatten().to(device)


@functools.cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """(256, 2) float32: a byte -> the two values that it stands for."""
    with torch.device("cpu"):
        byte = torch.arange(256)
        return BOOKS[kind][torch.stack([byte >> 4, byte & 15], 1)].to(device)


def check(kind: object, blocksize: int | None = None, double: bool | None = None) -> None:
    """Raise on what there is no format for."""
    from peftlab.model.patterns import did_you_mean

    if not isinstance(kind, str) or kind not in FORMATS:
        hint = did_you_mean(kind, FORMATS) if isinstance(kind, str) else ""
        raise ValueError(f"kind={kind!r}: one of {', '.join(map(repr, FORMATS))}.{hint}")
    if double is not None and not isinstance(double, bool):
        raise TypeError(f"double_quant={double!r}: True or False")
    if kind == "int8" and (blocksize is not None or double):
        raise ValueError("int8 has one scale a row: blocksize= and double_quant= belong to nf4 and fp4")
    if blocksize is not None and (type(blocksize) is not int or blocksize not in BLOCKSIZES):
        raise ValueError(f"blocksize={blocksize!r}: one of {', '.join(map(str, BLOCKSIZES))}")


def outline(shape: tuple[int, ...], dtype: torch.dtype, kind: str, blocksize: int | None = None, double: bool = True) -> Packed:
    """The empty tensors of a packed tensor, on meta: their sizes."""
    if kind == "int8":
        form = Format(kind, tuple(shape), dtype, shape[-1], False)
        return Packed(form, torch.empty(shape, dtype=torch.int8, device="meta"), torch.empty(form.blocks, device="meta"))
    form = Format(kind, tuple(shape), dtype, blocksize or 64, double)
    codes = torch.empty(-(-form.numel // 2), 1, dtype=torch.uint8, device="meta")
    if not double:
        return Packed(form, codes, torch.empty(form.blocks, device="meta"))
    absmax = torch.empty(form.blocks, dtype=torch.uint8, device="meta")
    return Packed(form, codes, absmax, torch.empty(-(-form.blocks // SCALES), device="meta"), torch.empty((), device="meta"))


@torch.no_grad()
def quantise(W: Tensor, kind: str, blocksize: int | None = None, double: bool = True, dtype: torch.dtype | None = None) -> Packed:
    """Pack a floating tensor; `dtype` is that of the values handed out later (its own by default).

    Temporaries take a few MB, whatever the size of W. Raises ValueError on entries that are not finite in float32.
    """
    check(kind, blocksize, double and kind != "int8")
    W = W.detach()
    form = outline(tuple(W.shape), dtype or W.dtype, kind, blocksize, double)
    if W.is_meta:
        return form
    if kind == "int8":
        return _quantise_rows(W, form.format)
    b, n = form.format.blocksize, form.format.numel
    codes = torch.empty(form.codes.shape, dtype=torch.uint8, device=W.device)
    absmax = torch.empty(form.format.blocks, dtype=torch.float32, device=W.device)
    flat, whole = W.reshape(-1), n // b * b
    if kernels.serves(W):
        kernels.quantise_blocks(flat[:whole], b, FLOOR, tables(kind, W.device), codes, absmax)
    else:
        _quantise_blocks(flat[:whole], b, kind, codes, absmax)
    if whole < n:  # the short last block: bitsandbytes divides here, and gives an absmax of zero as FLOOR
        x = flat[whole:].to(torch.float32)
        absmax[-1] = x.abs().max().clamp(min=FLOOR)
        x = torch.nn.functional.pad(x / absmax[-1], (0, len(x) % 2))
        codes[whole // 2 :, 0] = _pack(x, kind)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError(f"a tensor of shape {tuple(W.shape)} has entries that are not finite in float32: they have no code")
    return Packed(form.format, codes, *(_quantise_scales(absmax, kind) if double else (absmax,)))


def _quantise_blocks(flat: Tensor, b: int, kind: str, codes: Tensor, absmax: Tensor) -> None:
    """Codes and absmax of whole blocks."""
    piece = max(PIECE, b)
    for i in range(0, len(flat), piece):
        x = flat[i : i + piece].to(torch.float32).view(-1, b)
        top = absmax[i // b : i // b + len(x)]
        torch.amax(x.abs(), 1, out=top)
        codes[i // 2 : (i + x.numel()) // 2, 0] = _pack(x * top.clamp(min=FLOOR).reciprocal()[:, None], kind)


def _pack(x: Tensor, kind: str) -> Tensor:
    """Entries in [-1, 1], an even number of them, -> two codes a byte."""
    first, *others = borders(kind)
    count = torch.gt(x, first).view(torch.uint8)
    above = torch.empty_like(count, dtype=torch.bool)
    for border in others:
        torch.gt(x, border, out=above)
        count.add_(above.view(torch.uint8))
    pair = count.flatten().view(torch.int16)  # the first entry in the low byte
    both = ((pair << 4) | (pair >> 8)).to(torch.uint8)
    return both if kind == "nf4" else _sorted_to_code(x.device)[both.int()]


def _quantise_scales(absmax: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, absmax of the blocks of 256, mean) of the scales."""
    offset = absmax.mean()
    if kernels.serves(absmax):
        return *kernels.quantise_scales(absmax, offset, tables(kind, absmax.device)), offset
    x = absmax - offset
    x = torch.nn.functional.pad(x, (0, -len(x) % SCALES)).view(-1, SCALES)
    top = x.abs().amax(1)
    cell = (((x * top.reciprocal()[:, None]).clamp_(-1, 1) + 1) * 32767.5 + 0.5).nan_to_num_(0).int()  # blocks of zeros get code 0
    codes = nearest().to(absmax.device)[cell.flatten()[: len(absmax)]]
    return codes, top, offset


def _quantise_rows(W: Tensor, form: Format) -> Packed:
    codes = torch.empty(form.shape, dtype=torch.int8, device=W.device)
    absmax = torch.empty(form.blocks, dtype=torch.float32, device=W.device)
    flat, out = W.reshape(form.blocks, form.blocksize), codes.view(form.blocks, form.blocksize)
    (kernels.quantise_rows if kernels.serves(W) else _code_rows)(flat, out, absmax)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError(f"a tensor of shape {form.shape} has entries that are not finite in float32: they have no code")
    return Packed(form, codes, absmax)


def _code_rows(flat: Tensor, out: Tensor, absmax: Tensor) -> None:
    """int8 codes and absmax of rows."""
    rows = max(1, PIECE // max(flat.shape[1], 1))
    for i in range(0, len(flat), rows):
        x = flat[i : i + rows].to(torch.float32)
        top = absmax[i : i + rows] = x.abs().amax(1)
        out[i : i + rows] = (x * (127.0 / top)[:, None]).round().nan_to_num_(0, 0, 0)  # rows of zeros, or so small that the factor overflows


def exporting() -> bool:
    """Whether torch.export traces, which writes PyTorch's own operations only."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()  # torch 2.6 cannot tell it from torch.compile


def _book(kind: str, like: Tensor) -> Tensor:
    """A code book, or "dynamic", that of coded scales, on the device of a tensor: copied there once."""
    if type(like) is Tensor and not torch.compiler.is_compiling():
        return _moved(kind, like.device)
    return _moved.__wrapped__(kind, like.device)  # what is made of fake tensors must not be cached


@functools.cache
def _moved(kind: str, device: torch.device) -> Tensor:
    return (DYNAMIC if kind == "dynamic" else BOOKS[kind]).to(device)


def scales(p: Packed, first: int = 0, last: int | None = None) -> Tensor:
    """float32 absmax of the blocks first..last."""
    if p.nested_absmax is None:
        return p.absmax[first:last]
    blocks = p.format.blocks
    last = blocks if last is None else last
    low, high = first // SCALES * SCALES, min(-(-last // SCALES) * SCALES, blocks)  # whole blocks of scales
    values = torch.index_select(_book("dynamic", p.absmax), 0, p.absmax[low:high].int())
    second = p.nested_absmax[low // SCALES : -(-high // SCALES)]
    if (high - low) % SCALES:
        second = second.repeat_interleave(SCALES)[: high - low]
        return values.mul_(second).add_(p.offset)[first - low : last - low]
    return values.view(-1, SCALES).mul_(second[:, None]).add_(p.offset).view(-1)[first - low : last - low]


def decode(p: Packed, start: int, stop: int, out: Tensor | None = None) -> Tensor:
    """float32 values of the entries start..stop of the flattened tensor, (stop - start,).

    `out`: float32 memory of `room(p, stop - start)` entries to decode into; the result is a view of it.
    """
    b, n = p.format.blocksize, p.format.numel
    if p.format.kind == "int8":
        return _decode_rows(p, start, stop, out)
    low, high = start // b * b, min(-(-stop // b) * b, n)  # whole blocks, which start at a whole byte
    out = torch.empty(room(p, stop - start), dtype=torch.float32, device=p.codes.device) if out is None else out
    codes = p.codes.view(-1)[low // 2 : -(-high // 2)]
    values = _look_up(codes, p.format.kind, out)
    top = scales(p, low // b, -(-high // b))
    whole = (high - low) // b * b
    values[:whole].view(-1, b).mul_(top[: whole // b, None])
    if low + whole < high:
        values[whole:].mul_(top[-1])
    return values[start - low : stop - low]


def room(p: Packed, entries: int) -> int:
    """Entries of memory that decoding a stretch may need: the blocks at its ends are decoded whole."""
    return min(entries + 2 * p.format.blocksize, p.format.numel + 1) + 2


def _look_up(codes: Tensor, kind: str, out: Tensor) -> Tensor:
    """The book's values of packed codes, two a byte, in `out`."""
    if type(codes).__name__ == "FakeTensor" and not exporting():  # estimate counts memory, and there are no values to look up
        codes.int()
        return out[: 2 * len(codes)]
    if exporting() or type(codes) is not Tensor:  # what is made of fake tensors must not be cached
        return BOOKS[kind].to(codes.device)[torch.stack([codes >> 4, codes & 15], 1).int()].flatten()
    table, values = _pairs(kind, codes.device), out[: 2 * len(codes)]
    if codes.device.type == "cpu":
        # A pair is one number of 8 bytes: rows of two take three times as long, and a table of two bytes' values leaves the fastest cache.
        torch.index_select(table.view(torch.float64).view(-1), 0, codes.int(), out=values.view(torch.float64))
    else:
        values.view(-1, 2).copy_(table.index_select(0, codes.int()))
    return values


def _decode_rows(p: Packed, start: int, stop: int, out: Tensor | None) -> Tensor:
    b = p.format.blocksize
    if not b:
        return torch.empty(0, dtype=torch.float32, device=p.codes.device)
    low, high = start // b, -(-stop // b)
    rows = p.codes.view(-1, b)[low:high]
    values = torch.empty(rows.shape, dtype=torch.float32, device=rows.device) if out is None else out[: rows.numel()].view(rows.shape)
    values.copy_(rows).mul_(p.absmax[low:high, None]).mul_(1 / 127)
    return values.view(-1)[start - low * b : stop - low * b]


def _fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """New memory. Linux is asked for huge pages: the first touch of small ones takes longer than decoding into them (64 MiB: 40 ms, else 15)."""
    out = torch.empty(shape, dtype=dtype, device=device)
    size = out.numel() * out.element_size()
    if sys.platform == "linux" and type(out) is Tensor and out.device.type == "cpu" and size >= HUGE:
        first = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise()(first, (out.data_ptr() + size - first) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)  # advice: a refusal does not matter
    return out


@functools.cache
def _madvise() -> Callable:
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


@torch.no_grad()
def dequantise(p: Packed, out: Tensor | None = None) -> Tensor:
    """The dense tensor in its dtype, in new memory or in a contiguous `out` of its shape: a product in float32, rounded once.

    Where `out` has another dtype, the values are cast to it after that.
    """
    if exporting():  # pieces would be nodes
        return decode(p, 0, p.format.numel).to(p.format.dtype).view(p.format.shape)
    out = _fresh(p.format.shape, p.format.dtype, p.codes.device) if out is None else out
    if not p.codes.is_meta:
        fill(p, 0, p.format.numel, out.view(-1))
    return out


def fill(p: Packed, start: int, stop: int, out: Tensor) -> None:
    """Write the entries start..stop of the flattened tensor into `out`, (stop - start,), piece by piece: no temporary exceeds a piece."""
    form, scratch = p.format, None
    if kernels.serves(p.codes, out) and form.dtype in kernels.DTYPES:
        return kernels.fill(p, None if form.kind == "int8" else tables(form.kind, out.device), start, stop, out)
    if compiled.serves(p, out) and compiled.fill(p, start, stop, out):
        return
    b, n = max(form.blocksize, 1), form.numel
    piece = max(DECODE // b, 1) * b
    i = start
    while i < stop:
        j = min((i // piece + 1) * piece, stop)  # pieces begin and end with blocks
        whole = i % b == 0 and (j % b == 0 or j == n) and (j - i) % 2 == 0
        whole = whole and (out.storage_offset() + i - start) % 2 == 0  # pairs are written as one number
        if whole and out.dtype == form.dtype == torch.float32:
            decode(p, i, j, out[i - start : j - start])
        else:
            scratch = torch.empty(room(p, min(piece, n)), dtype=torch.float32, device=out.device) if scratch is None else scratch
            values = decode(p, i, j, scratch)
            out[i - start : j - start].copy_(values if form.dtype in (torch.float32, out.dtype) else values.to(form.dtype))
        i = j


def entries(p: Packed, index: Tensor) -> Tensor:
    """float32 values at flat positions, of any shape: for a few rows of a large table."""
    b = p.format.blocksize
    if p.format.kind == "int8":
        return p.codes.view(-1)[index] * p.absmax[index // b] * (1 / 127)
    byte = p.codes.view(-1)[index // 2].int()
    code = torch.where(index % 2 == 0, byte >> 4, byte & 15)
    block = index // b
    top = p.absmax[block]
    if p.nested_absmax is not None:
        top = _book("dynamic", top)[top.int()] * p.nested_absmax[block // SCALES] + p.offset
    return _book(p.format.kind, top)[code] * top
