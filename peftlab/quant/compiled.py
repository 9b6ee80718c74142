"""Kernels for the CPU that torch.compile makes: an option, for 4-bit codes that become bfloat16, and for products of one token.

PyTorch's own operations look values up in float32, multiply, round and sum in passes of their own; one loop does all of it. A value is looked up by
masks instead of a table, which a compiler turns into vector instructions: bit k of the code picks one half of what is left of the book.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .books import BOOKS

if TYPE_CHECKING:
    from .codes import Packed

STRETCH = 32  # entries with one scale: the smallest block
LEAST = 4096  # entries below which a call costs more than the decoding
BITS = torch.int32
NARROW = torch.bfloat16
DTYPES = (NARROW, torch.float32)
BOOK_BITS = {kind: book.view(BITS).tolist() for kind, book in BOOKS.items()}
OPTIONS: dict[str, object] = {
    "cpp.dynamic_threads": True,  # otherwise the number of threads would for ever be that of the first call
    "realize_opcount_threshold": 10000,  # one loop, however long: by default what was decoded would be stored before it is summed
}
if hasattr(torch.compiler, "skip_guard_on_globals_unsafe"):  # torch has guard filters
    # Threads, deterministic algorithms and the like make no other kernel; after eight of them torch.compile would make none any more.
    STATES = ("GLOBAL_STATE", "GRAD_MODE", "DETERMINISTIC_ALGORITHMS", "TORCH_FUNCTION_STATE", "DEFAULT_DEVICE")
    OPTIONS["guard_filter_fn"] = lambda guards: [g.guard_type not in STATES for g in guards]


class Kernels(NamedTuple):
    decode: Callable
    dot: Callable


_kernels: Kernels | None = None  # while they are in use


def compile_decoding(enabled: bool = True) -> None:
    """On the CPU, have kernels that torch.compile makes decode nf4 and fp4 to bfloat16, and form products with one token; or no longer.

    Decoded values stay the same, bit for bit; the products equal the others up to rounding (they are summed in float32, in another order). It holds for
    all models of the process, eager and compiled ones. Switching it on compiles and tries the kernels: up to a minute the first time on a machine, less
    when torch finds them in its cache. Other dtypes than bfloat16 and float32, int8 and other devices are decoded as ever.

    Raises TypeError unless `enabled` is a bool, and RuntimeError where torch.compile makes no kernels (it needs a C++ compiler) or wrong ones.
    """
    global _kernels
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled={enabled!r}: True or False")
    if enabled and _kernels is None:
        _kernels = _tried(Kernels(*(torch.compile(f, fullgraph=True, dynamic=True, options=dict(OPTIONS)) for f in (_decode, _dot))))
    elif not enabled:
        _kernels = None


def _tried(kernels: Kernels) -> Kernels:
    """The kernels, after they decoded every code as PyTorch does, and multiplied with it."""
    with torch.device("cpu"):
        # 24 rows: where two sizes are equal, torch.compile takes them to be so always.
        codes, top, x = torch.arange(768).to(torch.uint8), torch.arange(1, 25) / 3, torch.arange(64) / 8
        values = {kind: book[torch.stack([codes >> 4, codes & 15], 1).int()].flatten() * top.repeat_interleave(64) for kind, book in BOOKS.items()}
        out = torch.empty(1536, dtype=NARROW)
    for kind, W in values.items():
        try:
            _run_decode(kernels, codes, top, 64, kind, out)
            y = [_run_dot(kernels, codes, top, 64, kind, narrow, x) for narrow in (False, True)]
        except Exception as e:  # no compiler, no headers: whatever it is, there is no kernel
            raise RuntimeError(f"torch.compile made no decoding kernels, for which it needs a C++ compiler: {_first_line(e)}") from e
        wanted = [V.view(-1, 64) @ x for V in (W, W.to(NARROW).float())]
        if not torch.equal(out, W.to(NARROW)) or not all(map(torch.allclose, y, wanted)):
            raise RuntimeError(f"the kernels that torch.compile made for {kind} are wrong on this machine: they are not used")
    return kernels


# ---------------------------------------------------------------- when they are picked


def serves(p: Packed, like: Tensor) -> bool:
    """Whether a kernel decodes p to memory like this."""
    return like.dtype == NARROW and _takes(p, like)


def fuses(x: Tensor, p: Packed, transposed: bool) -> bool:
    """Whether the product of x (rows, n_in) with W' is one that decodes in registers."""
    form = p.format
    fits = len(x) == 1 and not transposed and x.shape[1] == form.shape[1]  # where it does not, PyTorch says so
    return fits and x.dtype in DTYPES and _takes(p, x) and form.shape[1] % form.blocksize == 0 and form.cast in (None, *DTYPES) and form.numel >= LEAST


def _takes(p: Packed, t: Tensor) -> bool:
    if _kernels is None or _get_current_dispatch_mode_stack():  # counters and recorders see PyTorch's operations
        return False
    plain = t.device.type == "cpu" and type(p.codes) in (Tensor, nn.Parameter) and type(t) in (Tensor, nn.Parameter)
    return plain and p.format.kind != "int8" and p.format.dtype in DTYPES


def fill(p: Packed, scales: Callable[[int, int], Tensor], start: int, stop: int, out: Tensor) -> bool:
    """Write the entries start..stop of p to `out`. False, and nothing done, unless they are many whole blocks with finite scales and `out` is aligned."""
    b = p.format.blocksize
    if start % b or stop % b or stop - start < LEAST or out.storage_offset() % 2:
        return False
    codes = p.codes.view(-1)[start // 2 : stop // 2]
    return _runs(scales(start // b, stop // b), lambda kernels, top: _run_decode(kernels, codes, top, b, p.format.kind, out)) is not None


def multiply(x: Tensor, b: Tensor | None, p: Packed, scales: Callable[[], Tensor]) -> Tensor | None:
    """x (1, n_in) W' + b, (n_out,), summed in float32; only what `fuses` says. None where a scale is not finite."""
    form = p.format
    narrow = NARROW in (form.dtype, form.cast, x.dtype)
    y = _runs(scales(), lambda kernels, top: _run_dot(kernels, p.codes.view(-1), top, form.blocksize, form.kind, narrow, x.reshape(-1).float()))
    return y if y is None else (y if b is None else y + b).to(x.dtype)


def _runs(top: Tensor, run: Callable[[Kernels, Tensor], Tensor]) -> Tensor | None:
    """What a kernel gives, or None: where a scale is not finite, and, with a warning and for good, where it fails."""
    global _kernels
    kernels = _kernels
    if kernels is None or not math.isfinite(top.sum().item()):  # another thread switched it off; NaN has no bits that could be rounded
        return None
    try:
        return run(kernels, top)
    except Exception as e:
        if _kernels is kernels:
            _kernels = None
        warnings.warn(f"compiled decoding is off: {_first_line(e)}; PyTorch's operations go on")
        return None


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"


# ---------------------------------------------------------------- running


def _run_decode(kernels: Kernels, codes: Tensor, top: Tensor, b: int, kind: str, out: Tensor) -> Tensor:
    """Decode whole blocks into `out`."""
    return _call(kernels.decode, _lanes(out.view(BITS)), _lanes(codes), _spread(top, b), kind=kind)


def _run_dot(kernels: Kernels, codes: Tensor, top: Tensor, b: int, kind: str, narrow: bool, x: Tensor) -> Tensor:
    """W x, (n_out,) float32, for x (n_in,) float32."""
    m = len(x) // STRETCH
    first, second = x.view(m, STRETCH // 2, 2).unbind(-1)
    codes = codes.view(-1, m, STRETCH // 2)
    y = torch.empty(len(codes), STRETCH // 2, dtype=torch.float32, device="cpu")
    return _call(kernels.dot, y, codes, _spread(top, b).view(-1, m), first, second, kind=kind, narrow=narrow).sum(-1)


def _lanes(t: Tensor) -> Tensor:
    return t.view(-1, STRETCH // 2)


def _spread(top: Tensor, b: int) -> Tensor:
    """The scale of every stretch."""
    return top[:, None].expand(-1, b // STRETCH).reshape(-1)


def _call(kernel: Callable, out: Tensor, *tensors: Tensor, **facts) -> Tensor:
    """Into `out`, and always in one state: for other strides, views, modes of autograd and autocast, torch.compile would make kernels of their own."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        kernel(*(torch.from_dlpack(t.detach().contiguous()) for t in (out, *tensors)), **facts)
    return out


# ---------------------------------------------------------------- what is compiled


def _decode(out: Tensor, codes: Tensor, top: Tensor, kind: str) -> None:
    """codes (m, STRETCH / 2), two a byte; top (m,) float32; out (m, STRETCH / 2) int32: the bits of two bfloat16, the first entry's in the lower half."""
    byte = codes.to(BITS)
    first, second = (_rounded((_value(byte, low, kind) * top[:, None]).view(BITS)) for low in (4, 0))
    out.copy_(((first >> 16) & 0xFFFF) | (second & -0x10000))


def _dot(out: Tensor, codes: Tensor, top: Tensor, first: Tensor, second: Tensor, kind: str, narrow: bool) -> None:
    """codes (n_out, m, STRETCH / 2), top (n_out, m), first and second entries of x (m, STRETCH / 2); out (n_out, STRETCH / 2), to be summed."""
    byte = codes.to(BITS)

    def half(low: int) -> Tensor:
        W = _value(byte, low, kind) * top[..., None]
        return (_rounded(W.view(BITS)) & -0x10000).view(torch.float32) if narrow else W

    out.copy_((half(4) * first + half(0) * second).sum(1))


def _value(byte: Tensor, low: int, kind: str) -> Tensor:
    """The book's float32 values of the four bits from `low` on."""
    left = BOOK_BITS[kind]
    for k in range(4):
        mask = (byte << (31 - low - k)) >> 31  # all ones where bit k of the code is one
        left = [even ^ (mask & (even ^ odd)) for even, odd in zip(left[::2], left[1::2], strict=True)]
    return left[0].view(torch.float32)


def _rounded(bits: Tensor) -> Tensor:
    """The bits of finite float32 numbers, so that the upper half is the nearest bfloat16, the even one of two."""
    return bits + 0x7FFF + ((bits >> 16) & 1)
