"""Blockwise quantisation entry by entry, from the papers and never from our file.

nf4: Dettmers et al. 2023, arXiv 2305.14314. Section 2: a block is divided by its absmax and every entry gets the nearest of 16 values; section 3
and appendix E: the values, 8 quantiles of N(0, 1) below zero, 7 above and zero itself, between an offset and 1/2, scaled to [-1, 1]. Section 3, double
quantisation: the absmax, less their mean, are quantised in blocks of 256 to 8 bits. fp4: sign, two bits of exponent, one of mantissa.
"""

from __future__ import annotations

import json
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

OFFSET = 0.9677083  # (1 - 1/32 + 1 - 1/30) / 2 of appendix E, as published


def nf4_values() -> list[float]:
    """The 16 quantiles: 8 parts above zero, 7 below, and zero."""
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(OFFSET, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(OFFSET, 0.5, 8)[:-1]]
    values = sorted([*above, *below, 0.0])
    return [v / max(values) for v in values]


def fp4_values() -> list[float]:
    """Bit patterns 0..15 as s e e m: bias 2, no infinities; the subnormal half step is one sixteenth, as bitsandbytes has it."""
    magnitudes = {0b000: 0.0, 0b001: 0.0625, 0b110: 2.0, 0b111: 3.0, 0b100: 4.0, 0b101: 6.0, 0b010: 8.0, 0b011: 12.0}
    return [(-1 if code & 8 else 1) * magnitudes[code & 7] / 12 for code in range(16)]


def nearest(values: list[float], x: float) -> set[int]:
    """The codes whose value is nearest to x (several in a tie)."""
    gaps = [abs(v - x) for v in values]
    return {i for i, g in enumerate(gaps) if g <= min(gaps) * (1 + 1e-6) + 1e-12}


def blocks(n: int, b: int) -> list[range]:
    return [range(i, min(i + b, n)) for i in range(0, n, b)]


def decoded(m: nn.Module, param: str) -> Tensor:
    """A packed parameter in its raw layout, from the module's state dict alone, in float32 arithmetic as the format demands."""
    state = {k: t for k, t in m.state_dict().items() if not k.startswith("peftlab")}
    dtype = m.peftlab_formats[param].out
    if "SCB" in state:
        W = [[np.float32(np.float32(c) * np.float32(s)) * np.float32(1 / 127) for c in row] for row, s in zip(state[param].tolist(), state["SCB"].tolist(), strict=True)]
        return turned(m, torch.tensor(np.array(W, dtype=np.float32))).to(dtype)
    key = next(k for k in state if k.startswith(f"{param}.quant_state."))
    facts = json.loads(bytes(state[key].tolist()))
    book = [np.float32(v) for v in state[f"{param}.quant_map"].tolist()]
    absmax = scales(param, state, facts)
    codes = [c for byte in state[param].flatten().tolist() for c in (byte >> 4, byte & 15)]
    n = int(np.prod(facts["shape"]))
    flat = [book[codes[i]] * absmax[i // facts["blocksize"]] for i in range(n)]
    return turned(m, torch.tensor(np.array(flat, dtype=np.float32)).view(facts["shape"])).to(dtype)


def scales(param: str, state: dict[str, Tensor], facts: dict) -> list[np.float32]:
    stored = state[f"{param}.absmax"].tolist()
    if "nested_offset" not in facts:
        return [np.float32(v) for v in stored]
    values, second = state[f"{param}.nested_quant_map"].tolist(), state[f"{param}.nested_absmax"].tolist()
    out = []
    for i, code in enumerate(stored):
        out.append(np.float32(np.float32(values[code]) * np.float32(second[i // facts["nested_blocksize"]])) + np.float32(facts["nested_offset"]))
    return out


def turned(m: nn.Module, W: Tensor) -> Tensor:
    """transformers' Conv1D holds the transpose of what it packs."""
    return W.t() if type(m).__name__ == "Conv1D" else W
