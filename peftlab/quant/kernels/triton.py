"""Triton kernels for codes on CUDA: quantise, decode, and products that decode in registers. PyTorch's own operations do the rest.

They are picked where Triton is installed, the tensors are plain CUDA tensors, and a first small decode came out right; inside the
operators of ops.py too, which torch.compile does not look into. What they promise:
- codes, absmax and decoded values are those of codes.py, bit for bit: each product and sum is rounded by itself, in the same order.
- a product multiplies these same values, in the dtype of its input, and adds in float32 (never in TF32). Its order of summation is its own, so
  it equals F.linear with the decoded weight up to rounding only.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peftlab.quant.packed import Packed


DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ROWS = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}  # of an input, up to which the weight is decoded inside the product

ENTRIES = 4096  # that a program decodes or quantises

OLDEST = (8, 0)  # compute capability from which on there is bfloat16

EARLIEST = (3, 3)  # Triton that compiles all of the kernels


class Tables(NamedTuple):
    """What kernels look up, on their device."""

    book: Tensor  # (16,) float32, the value of each code
    borders: Tensor  # (15,) float32, between the sorted values
    order: Tensor  # (16,) int32, codes by ascending value
    dynamic: Tensor  # (256,) float32, the values of coded scales
    nearest: Tensor  # (65536,) uint8, the code of a scale by its cell in [-1, 1]
    group: int  # scales that share a second scale


@functools.cache
def _module():
    """The kernels, or None where Triton is missing or too old."""
    try:
        from peftlab.quant.kernels import triton_source as kernels_triton
    except ImportError:
        return None
    return kernels_triton if kernels_triton.VERSION >= EARLIEST else None


def serves(*tensors: Tensor) -> bool:
    """Whether kernels may work on these tensors. Fake ones, subclasses, float64 and what is traced are PyTorch's."""
    if torch.compiler.is_compiling():
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_cuda and (t.dtype in DTYPES or not t.is_floating_point()) for t in tensors)
    return plain and works(tensors[0].device)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether a first small decode on this device comes out right; warns where Triton is there and it does not."""
    if _module() is None or torch.version.hip is not None or torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        wrong = None if sound(device) else "a decoded value is wrong"
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # no compiler, no driver, another Triton: whatever it is, PyTorch can do without
        wrong = f"{type(e).__name__}: {e}"
    if wrong:
        warnings.warn(f"Triton kernels do not work on {device} ({wrong}); quantised weights are decoded by PyTorch, with the same values")
    return wrong is None


def sound(device: torch.device) -> bool:
    """Whether 512 decoded entries are what PyTorch makes of them."""
    codes = torch.arange(256, device=device, dtype=torch.uint8)
    book, absmax = torch.arange(16, device=device) / 7, torch.arange(1, 9, device=device) / 3
    out = torch.empty(512, device=device)
    _decode_blocks(codes, (absmax, absmax, absmax, absmax), book, out, 0, 512, False, 1, 64, torch.float32)
    return torch.equal(out, book[torch.stack([codes >> 4, codes & 15], 1).int()].flatten() * absmax.repeat_interleave(64))


def fuses(x: Tensor, p: Packed, transposed: bool) -> bool:
    """Whether the product of x (rows, n_in) with W', or of x (rows, n_out) with W, is one that decodes in registers."""
    form = p.format
    if not serves(x, p.codes) or form.dtype not in DTYPES or form.cast not in (None, *DTYPES):
        return False
    fits = x.shape[1] == form.shape[not transposed] and form.numel > 0  # where it does not, PyTorch says so
    return fits and 0 < len(x) <= ROWS[x.dtype] and (form.kind == "int8" or form.shape[1] % form.blocksize == 0)


def _on(t: Tensor):
    """The device of a tensor as the current one, which is where Triton launches."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _scales(p: Packed, tables: Tables | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax, second absmax, mean and their code book; where there is none, anything stands in."""
    if p.nested_absmax is None:
        return (p.absmax,) * 4
    return p.absmax, p.nested_absmax, p.offset, tables.dynamic


def fill(p: Packed, tables: Tables | None, start: int, stop: int, out: Tensor) -> None:
    """Write the entries start..stop of the flattened tensor into `out`, (stop - start,) and contiguous. `tables`: those of p.format.kind, None for int8."""
    form = p.format
    if start == stop:
        return
    if form.kind == "int8":
        _decode_rows(p.codes, p.absmax, out, start, stop, form.blocksize, form.dtype)
    else:
        _decode_blocks(p.codes, _scales(p, tables), tables.book, out, start, stop, p.nested_absmax is not None, tables.group, form.blocksize, form.dtype)


def _decode_blocks(codes, scales, book, out, start, stop, nested, group, b, dtype) -> None:
    K, low, many = _module(), start // b, max(ENTRIES // b, 1)
    grid = (_parts(_parts(stop, b) - low, many),)
    with _on(codes):
        K.decode_blocks[grid](
            codes, *scales, book, out, low, start, stop, len(codes), NESTED=nested, GROUP=group, B=b, R=many, FORM=K.TYPES[dtype], enable_fp_fusion=False
        )  # fmt: skip


def _decode_rows(codes, absmax, out, start, stop, n, dtype) -> None:
    K, low = _module(), start // n
    block = min(_power(n), ENTRIES // 2)
    grid = (_parts(stop, n) - low, _parts(n, block))
    with _on(codes):
        K.decode_rows[grid](codes, absmax, out, low, start, stop, n, BLOCK=block, FORM=K.TYPES[dtype], enable_fp_fusion=False)


def quantise_blocks(x: Tensor, b: int, floor: float, tables: Tables, codes: Tensor, absmax: Tensor) -> None:
    """Codes and absmax of x, which is made of whole blocks of b entries; NaN gives an absmax of infinity."""
    blocks, many, x = x.numel() // b, max(ENTRIES // b, 1), x.contiguous()
    if blocks:
        with _on(x):
            _module().quantise_blocks[(_parts(blocks, many),)](
                x, tables.borders, tables.order, codes, absmax, blocks, FLOOR=floor, B=b, R=many, enable_fp_fusion=False
            )  # fmt: skip


def quantise_scales(absmax: Tensor, offset: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Codes (blocks,) of float32 scales less their mean, and the absmax of each group of them."""
    groups = _parts(len(absmax), tables.group)
    codes, second = torch.empty_like(absmax, dtype=torch.uint8), absmax.new_empty(groups)
    if groups:
        with _on(absmax):
            _module().quantise_scales[(groups,)](
                absmax, offset, tables.nearest, codes, second, len(absmax), GROUP=tables.group, enable_fp_fusion=False
            )  # fmt: skip
    return codes, second


def quantise_rows(x: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """int8 codes and absmax of the rows of x, (rows, n); NaN gives an absmax of infinity."""
    (rows, n), x = x.shape, x.contiguous()
    if x.numel():
        with _on(x):
            _module().quantise_rows[(rows,)](x, codes, absmax, n, BLOCK=min(_power(n), ENTRIES), enable_fp_fusion=False)


def multiply(x: Tensor, b: Tensor | None, p: Packed, tables: Tables | None, transposed: bool, out: Tensor) -> None:
    """x (rows, n_in) W' + b, or x (rows, n_out) W, into `out`, which is contiguous and of x's dtype. Only what `fuses` says."""
    K, form, rows, x = _module(), p.format, len(x), x.contiguous()
    (n_out, n_in), bias = form.shape, x if b is None else b.contiguous()
    four = form.kind != "int8"
    book = tables.book if four else p.absmax
    operands = (p.codes, *_scales(p, tables), book, out)
    facts = dict(
        FOUR=four, NESTED=p.nested_absmax is not None, GROUP=tables.group if four else 1, B=form.blocksize if four else 1, FORM=K.TYPES[form.dtype],
        CAST=K.TYPES[form.cast or x.dtype], enable_fp_fusion=False,
    )  # fmt: skip
    narrow = x.dtype == torch.float32
    with _on(x):
        if transposed:
            size = dict(BM=max(16, _power(rows)), BN=64 if narrow else 128, **_stretches(32, form))
            K.rows_backward[(_parts(n_in, 32), 1)](x, *operands, rows, n_out, n_in, n_in // 2, **facts, **size)
        elif rows == 1:
            facts |= dict(BIAS=b is not None, BN=8, **_stretches(512, form))
            K.one_row[(_parts(n_out, 8),)](x, bias, *operands, n_out, n_in, n_in // 2, **facts)
        else:
            size = dict(BM=max(16, _power(rows)), BN=32, **_stretches(64 if narrow else 128, form))
            K.rows_forward[(_parts(n_out, 32), 1)](x, bias, *operands, rows, n_out, n_in, n_in // 2, BIAS=b is not None, **facts, **size)


def _stretches(width: int, form) -> dict[str, int]:
    """A tile's width as stretches that stay inside blocks: their number G and length C."""
    length = width if form.kind == "int8" else min(width, form.blocksize)
    return {"G": width // length, "C": length}
