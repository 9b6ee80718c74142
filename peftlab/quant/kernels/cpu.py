"""Kernels for the CPU, an option: decode.cpp, compiled by the machine's own C++ compiler for its own instructions.

PyTorch's operations look values up, multiply, round and sum in passes of their own; the kernels do it in one, in registers.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from peftlab.quant.codebooks import BOOKS, DYNAMIC

if TYPE_CHECKING:
    from peftlab.quant.packed import Packed


SOURCE = Path(__file__).with_name("decode.cpp")

COMPILERS = ("c++", "g++", "clang++")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")

LEAST = 4096  # entries below which a call costs more than the decoding

SHARE = 1 << 16  # entries of a product that are worth a thread

DTYPES = (torch.bfloat16, torch.float32)


class Kernels(NamedTuple):
    """The functions of decode.cpp, which describes their arguments."""

    decode: Callable
    multiply: Callable


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
    library.decode.argtypes = *(at,) * 7, *(size,) * 3, flag, flag, ctypes.c_int
    library.multiply.argtypes = *(at,) * 9, *(size,) * 3, flag, flag, ctypes.c_int
    library.decode.restype = library.multiply.restype = None
    return Kernels(library.decode, library.multiply)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def _tried(kernels: Kernels) -> Kernels:
    """The kernels, after they decoded every code as PyTorch does, with plain and with coded scales, and multiplied with it."""
    with torch.device("cpu"):
        codes, x = torch.arange(768).to(torch.uint8), torch.arange(64) / 8
        coded = torch.arange(24).mul(11).to(torch.uint8), torch.tensor([5 / 7]), torch.tensor(1 / 3)
        tops = torch.arange(1, 25) / 3, DYNAMIC[coded[0].int()] * coded[1] + coded[2]
        for (kind, book), (top, packed), dtype in itertools.product(BOOKS.items(), zip(tops, ((tops[0], None, None), coded), strict=True), DTYPES):
            W = (book[torch.stack([codes >> 4, codes & 15], 1).int()].flatten() * top.repeat_interleave(64)).to(dtype)
            found = _decode(kernels, codes, packed, 64, kind, False, 0, torch.empty(1536, dtype=dtype))
            y, bias = torch.empty(24, dtype=dtype), top.to(dtype)
            wanted = F.linear(x.double(), W.view(24, 64).double(), bias.double())
            _multiply(kernels, codes, packed, 64, kind, dtype != torch.float32, x.to(dtype), bias, y)
            if not torch.equal(found, W) or not torch.allclose(y.double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5):
                raise RuntimeError(f"the kernels that the C++ compiler made for {kind} are wrong on this machine: they are not used")
    return kernels


def serves(p: Packed, like: Tensor) -> bool:
    """Whether a kernel decodes p to memory like this."""
    return like.dtype in DTYPES and _takes(p, like)


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


def fill(p: Packed, start: int, stop: int, out: Tensor) -> bool:
    """Write the entries start..stop of p to `out`. False, and nothing done, unless they are many whole blocks."""
    b = p.format.blocksize
    if start % b or stop % b or stop - start < LEAST:
        return False
    codes = p.codes.view(-1)[start // 2 : stop // 2]
    _decode(_kernels, codes, p[2:], b, p.format.kind, p.format.dtype == torch.bfloat16, start // b, out)
    return True


def multiply(x: Tensor, bias: Tensor | None, p: Packed) -> Tensor:
    """x (1, n_in) W' + bias, (1, n_out), summed in float32; only what `fuses` says."""
    form = p.format
    y = torch.empty(1, form.shape[0], dtype=x.dtype, device="cpu")
    rounded = torch.bfloat16 in (form.dtype, form.cast, x.dtype)
    return _multiply(_kernels, p.codes, p[2:], form.blocksize, form.kind, rounded, x, None if bias is None else bias.to(x.dtype), y)


def _decode(kernels: Kernels, codes: Tensor, scales: Sequence[Tensor | None], b: int, kind: str, rounded: bool, first: int, out: Tensor) -> Tensor:
    """Decode whole blocks, the first of which has the scale `first`, into `out`, contiguous; `rounded`: to bfloat16 first."""
    narrow, threads = out.dtype == torch.bfloat16, torch.get_num_threads()
    _call(kernels.decode, (codes, *scales, DYNAMIC, BOOKS[kind], out), first, len(out) // b, b, rounded, narrow, threads)
    return out


def _multiply(kernels: Kernels, codes: Tensor, scales: Sequence[Tensor | None], b: int, kind: str, rounded: bool, x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """W x + bias into y (..., n_out), for x (..., n_in) of one row and its dtype."""
    n_out, n_in = y.numel(), x.numel()
    threads = min(torch.get_num_threads(), 1 + n_out * n_in // SHARE)
    _call(kernels.multiply, (codes, *scales, DYNAMIC, BOOKS[kind], x, bias, y), n_out, n_in, b, rounded, x.dtype == torch.bfloat16, threads)
    return y


def _call(kernel: Callable, tensors: Iterable[Tensor | None], *facts: int) -> None:
    held = [None if t is None else t.contiguous() for t in tensors]
    kernel(*(None if t is None else t.data_ptr() for t in held), *facts)
