"""Code books: what each code of nf4, fp4 and of double-quantised scales stands for.

nf4: QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E. Scales: Dettmers 2015, arXiv 1511.04561 (dynamic tree).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

FP4 = tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))  # sign, two bits of exponent, one of mantissa

# Codes by ascending value. Both zeros of fp4 are there, the positive one first: zero itself and what is just below it take code 0.
ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}

BOOKS = {k: torch.tensor(v, dtype=torch.float32, device="cpu") for k, v in (("nf4", NF4), ("fp4", FP4))}  # kind -> (16,), the value of each code


@functools.cache
def borders(kind: str) -> tuple[float, ...]:
    """The 15 midpoints between the sorted values; an entry on a border belongs to the lower side."""
    values = BOOKS[kind][list(ORDER[kind])]
    return tuple(((values[:-1] + values[1:]) / 2).tolist())


def _dynamic() -> Tensor:
    """(256,) float32, ascending: 0, 1 and +-10^(k - 6) times the midpoints of 2^k equal parts of [0.1, 1], k = 0..6."""
    found = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for k in range(7):
        ends = torch.linspace(0.1, 1, 2**k + 1, dtype=torch.float32, device="cpu")
        part = 10 ** (k - 6) * ((ends[:-1] + ends[1:]) / 2)
        found += [part, -part]
    return torch.cat(found).sort().values


DYNAMIC = _dynamic()


@functools.cache
def nearest() -> Tensor:
    """(65536,) uint8: the place in DYNAMIC of the value that is nearest to the middle of each of 65,536 cells of [-1, 1]."""
    with torch.device("cpu"):
        middle = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
        values = DYNAMIC.double()
        return torch.bucketize(middle, (values[:-1] + values[1:]) / 2).to(torch.uint8)
