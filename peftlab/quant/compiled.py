"""Kernels for the CPU, an option: decode.cpp, compiled by the machine's own C++ compiler for its own instructions.

PyTorch's operations look values up, multiply, round and sum in passes of their own; the kernels do it in one, in registers.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .books import BOOKS, DYNAMIC

if TYPE_CHECKING:
    from .codes import Packed

SOURCE = Path(__file__).with_name("decode.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
LEAST = 4096  # entries below which a call costs more than the decoding
DTYPES = (torch.bfloat16, torch.float32)


class Kernels(NamedTuple):
    """The functions of decode.cpp, which describes their arguments."""

    scales: Callable
    decode: Callable
    dot: Callable


_kernels: Kernels | None = None  # once they are compiled
_on = False


def compile_decoding(enabled: bool = True) -> None:
    """On the CPU, have compiled kernels decode nf4 and fp4 to bfloat16 and float32, and form products with one token; or no longer.

    Decoded values stay the same, bit for bit; the products equal the others up to rounding (they are summed in float32, in another order). It holds for
    all models of the process. Switching it on compiles a file of C++, about a second, and tries the kernels; nothing is kept on disk. The compiler is the one
    that the environment variable CXX names, or the machine's c++, g++ or clang++. Other dtypes, int8 and other devices are decoded as ever.

    Raises TypeError unless `enabled` is a bool, and RuntimeError where there is no compiler, it fails, or the kernels that it makes are wrong.
    """
    global _kernels, _on
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled={enabled!r}: True or False")
    if enabled and _kernels is None:
        _kernels = _tried(_loaded(_compiler()))
    _on = enabled


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise RuntimeError(f"no C++ compiler ({', '.join(COMPILERS)}) to compile decoding with: install one, or name it in the environment variable CXX")
    return [found]


def _loaded(compiler: list[str]) -> Kernels:
    with tempfile.TemporaryDirectory() as folder:
        made = str(Path(folder) / "decode.so")
        try:
            try:
                _run([*compiler, *FLAGS, "-fopenmp", str(SOURCE), "-o", made])
            except subprocess.CalledProcessError:  # no OpenMP, as with Apple's compiler: one thread
                _run([*compiler, *FLAGS, str(SOURCE), "-o", made])
            library = ctypes.CDLL(made)
        except (OSError, subprocess.SubprocessError) as e:
            lines = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
            raise RuntimeError(f"{shlex.join(compiler)} made no decoding kernels: {next((s for s in lines if 'error' in s), lines[0])}") from e
    at, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
    library.scales.argtypes = at, at, at, at, at, size, size, ctypes.c_int
    library.decode.argtypes = at, at, at, at, size, size, flag, flag, ctypes.c_int
    library.dot.argtypes = at, at, at, at, at, at, size, size, size, flag, ctypes.c_int
    library.scales.restype = library.decode.restype = library.dot.restype = None
    return Kernels(library.scales, library.decode, library.dot)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def _tried(kernels: Kernels) -> Kernels:
    """The kernels, after they decoded every code as PyTorch does, and multiplied with it."""
    wrong = "the kernels that the C++ compiler made for {} are wrong on this machine: they are not used"
    with torch.device("cpu"):
        codes, top, x = torch.arange(768).to(torch.uint8), torch.arange(1, 25) / 3, torch.arange(64) / 8
        nested, offset = torch.arange(1, 4) / 7, torch.tensor(1 / 3)
        values = DYNAMIC[codes.int()] * nested.repeat_interleave(256) + offset
        if not torch.equal(_scales(kernels, codes, nested, offset, 200, 700), values[200:700]):
            raise RuntimeError(wrong.format("scales"))
        for kind, book in BOOKS.items():
            W = book[torch.stack([codes >> 4, codes & 15], 1).int()].flatten() * top.repeat_interleave(64)
            for dtype in DTYPES:
                y = _dot(kernels, codes, top, 64, kind, dtype != torch.float32, x)
                fits = torch.allclose(y, W.to(dtype).float().view(-1, 64) @ x)
                if not fits or not torch.equal(_decode(kernels, codes, top, 64, kind, False, torch.empty(1536, dtype=dtype)), W.to(dtype)):
                    raise RuntimeError(wrong.format(kind))
    return kernels


# ---------------------------------------------------------------- when they are picked


def serves(p: Packed, like: Tensor | None = None) -> bool:
    """Whether a kernel decodes p to memory like this, or its coded scales."""
    return (like is None or like.dtype in DTYPES) and _takes(p, p.absmax if like is None else like)


def fuses(x: Tensor, p: Packed, transposed: bool) -> bool:
    """Whether the product of x (rows, n_in) with W' is one that decodes in registers."""
    form = p.format
    fits = len(x) == 1 and not transposed and x.shape[1] == form.shape[1]  # where it does not, PyTorch says so
    return fits and x.dtype in DTYPES and _takes(p, x) and form.shape[1] % form.blocksize == 0 and form.cast in (None, *DTYPES) and form.numel >= LEAST


def _takes(p: Packed, t: Tensor) -> bool:
    if not _on or _get_current_dispatch_mode_stack() or torch._C._are_functorch_transforms_active():
        return False  # counters and recorders see PyTorch's operations; what torch.func passes on may have no memory
    plain = t.device.type == "cpu" and type(p.codes) in (Tensor, nn.Parameter) and type(t) in (Tensor, nn.Parameter)
    return plain and p.format.kind != "int8" and p.format.dtype in DTYPES


def scales(p: Packed, first: int, last: int) -> Tensor:
    """float32 absmax of the blocks first..last, which are coded."""
    return _scales(_kernels, p.absmax, p.nested_absmax, p.offset, first, last)


def fill(p: Packed, scales: Callable[[int, int], Tensor], start: int, stop: int, out: Tensor) -> bool:
    """Write the entries start..stop of p to `out`. False, and nothing done, unless they are many whole blocks."""
    b = p.format.blocksize
    if start % b or stop % b or stop - start < LEAST:
        return False
    codes = p.codes.view(-1)[start // 2 : stop // 2]
    _decode(_kernels, codes, scales(start // b, stop // b), b, p.format.kind, p.format.dtype == torch.bfloat16, out)
    return True


def multiply(x: Tensor, b: Tensor | None, p: Packed, top: Tensor) -> Tensor:
    """x (1, n_in) W' + b, (n_out,), summed in float32; only what `fuses` says."""
    form = p.format
    y = _dot(_kernels, p.codes.view(-1), top, form.blocksize, form.kind, torch.bfloat16 in (form.dtype, form.cast, x.dtype), x.reshape(-1))
    return (y if b is None else y + b).to(x.dtype)


# ---------------------------------------------------------------- calls


def _scales(kernels: Kernels, codes: Tensor, nested: Tensor, offset: Tensor, first: int, last: int) -> Tensor:
    codes, nested, top = codes.contiguous(), nested.contiguous(), torch.empty(last - first, dtype=torch.float32, device="cpu")
    kernels.scales(*(t.data_ptr() for t in (codes, nested, offset, DYNAMIC, top)), first, last, torch.get_num_threads())
    return top


def _decode(kernels: Kernels, codes: Tensor, top: Tensor, b: int, kind: str, rounded: bool, out: Tensor) -> Tensor:
    """Decode whole blocks into `out`, contiguous; `rounded`: to bfloat16 first."""
    codes, top = codes.contiguous(), top.contiguous()
    kernels.decode(*(t.data_ptr() for t in (codes, top, BOOKS[kind], out)), len(top), b, rounded, out.dtype == torch.bfloat16, torch.get_num_threads())
    return out


def _dot(kernels: Kernels, codes: Tensor, top: Tensor, b: int, kind: str, rounded: bool, x: Tensor) -> Tensor:
    """W x, (n_out,) float32, for x (n_in,)."""
    codes, top = codes.contiguous(), top.contiguous()
    first, second = x.float().view(-1, 2).t().contiguous()
    y = torch.empty(2 * len(codes) // len(x), dtype=torch.float32, device="cpu")
    kernels.dot(*(t.data_ptr() for t in (codes, top, BOOKS[kind], first, second, y)), len(y), len(x), b, rounded, torch.get_num_threads())
    return y
