"""Merging onto a quantised base: onto what, what is then stored, and how far that is from what the adapters did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftlab.model.index import join_path
from peftlab.model.packed import QuantizedModule, dense_meta
from peftlab.model.patterns import did_you_mean
from peftlab.quant.codes import dequantise
from peftlab.quant.modules import packed

CHOICES = (
    "onto='dequantized' (dense weights: the decoded values with the adapters in them), onto='requantized' (rounded to codes again), or the model or the "
    "mapping with the weights that were quantised (dense: these with the adapters in them, which were trained beside other values)"
)


class Onto(NamedTuple):
    """What one module's adapters are merged onto."""

    how: str  # dequantized | requantized | originals
    originals: dict[str, Tensor]  # dense weights by parameter

    def same(self, other: Onto) -> bool:
        """Whether both are the same choice of the same weights."""
        mine, theirs = self.originals, other.originals
        return self.how == other.how and all(k not in mine or mine[k].data_ptr() == t.data_ptr() for k, t in theirs.items())


def choose(onto: object, hosts: list[tuple[str, nn.Module, set[str], bool]]) -> list[Onto | None]:
    """What the adapters at each (path, module, changed parameters, whether they started at the base) are merged onto.

    None where no packed parameter is changed.
    """
    packs = [sorted(p for p in params if isinstance(m, QuantizedModule) and p in m.peftlab_formats) for _, m, params, _ in hosts]
    first = next((path for (path, *_), mine in zip(hosts, packs, strict=True) if mine), None)
    if first is None:
        if onto is not None:
            raise ValueError("onto= says what becomes of a quantised base; none of the merged layers is quantised")
        return [None] * len(hosts)
    if onto is None:
        raise ValueError(f"{first!r} is quantised: say onto what the adapters are merged: {CHOICES}")
    if isinstance(onto, str):
        if onto not in ("dequantized", "requantized"):
            raise ValueError(f"onto={onto!r}: {CHOICES}.{did_you_mean(onto, ('dequantized', 'requantized'))}")
        return [Onto(onto, {}) if mine else None for mine in packs]
    if isinstance(onto, nn.Module):
        onto = dict(onto.named_parameters(remove_duplicate=False))
    if not isinstance(onto, Mapping):
        raise TypeError(f"onto={onto!r:.80}: {CHOICES}")
    for (path, _, _, neutral), mine in zip(hosts, packs, strict=True):
        if mine and not neutral:
            raise ValueError(
                f"the adapter at {path!r} started from what these codes lack of the original weights, which would then be added twice: "
                "onto='dequantized' gives dense weights"
            )
    return [Onto("originals", {p: _original(onto, path, m, p) for p in mine}) if mine else None for (path, m, *_), mine in zip(hosts, packs, strict=True)]


def _original(given: Mapping[str, Tensor], path: str, m: nn.Module, param: str) -> Tensor:
    key, like = join_path(path, param), dense_meta(m, param)
    if key not in given:
        raise ValueError(f"onto=: the weights that were given lack {key!r}.{did_you_mean(key, given)}")
    W = given[key].detach()
    shape = m.peftlab_formats[param].shape
    if tuple(W.shape) not in (tuple(like.shape), shape[::-1] if m._packed_flip else shape) or not W.is_floating_point() or W.is_meta:
        raise ValueError(f"onto=: {key!r} is {W.dtype} {tuple(W.shape)} on {W.device}; dense weights of shape {tuple(like.shape)} are wanted")
    return W.to(m._parameters[param].device)


def value_of(m: nn.Module, param: str, tensors: dict[str, Tensor]) -> Tensor:
    """The dense value that stored tensors stand for, in the parameter's raw layout."""
    if tensors[param].is_floating_point():
        return tensors[param]
    W = dequantise(packed(m, param, tensors)).to(m.peftlab_formats[param].out)
    return W.t() if m._packed_flip else W


def distances(there: Tensor, wanted: Tensor, base: Tensor) -> tuple[float, float]:
    """|there - wanted|_F relative to |wanted|_F and to |wanted - base|_F."""
    wide = torch.promote_types(wanted.dtype, torch.float32)
    there, wanted, base = there.to(wide), wanted.to(wide), base.to(wide)
    gap, size, change = ((a - b).norm().item() for a, b in ((there, wanted), (wanted, torch.zeros_like(wanted)), (wanted, base)))
    return gap / size if size else gap, gap / change if change else gap
