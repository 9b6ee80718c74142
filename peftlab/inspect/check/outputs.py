"""The floating tensors in what a model returns, losses of them, and how far two runs differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def floating_outputs(output: object, depth: int = 8) -> list[Tensor]:
    """All floating tensors in a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() or output.is_complex() else []
    if depth == 0 or isinstance(output, (str, bytes, nn.Module)):
        return []
    if isinstance(output, Mapping):
        inside: Iterable = output.values()
    elif isinstance(output, (list, tuple)):
        inside = output
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        inside = [getattr(output, f.name) for f in dataclasses.fields(output)]
    elif hasattr(output, "__dict__"):
        inside, depth = vars(output).values(), min(depth, 2)  # an object of its own: not all that hangs on it
    else:
        return []
    return [t for x in inside for t in floating_outputs(x, depth - 1)]


def output_loss(output: object) -> Tensor:
    """The output's `.loss`, else the sum of squares of all floating outputs."""
    given = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(given, Tensor):
        return given.sum()
    found = floating_outputs(output)
    if not found:
        raise ValueError("the model returned no floating tensor: there is no loss to take")
    return sum(_real(t).square().sum().cpu() for t in found)


def random_mixture(output: object) -> Tensor:
    """A fixed random mixture of all floating outputs: unlike a sum of squares, it sees what a normalisation would hide."""
    generator, total = torch.Generator().manual_seed(1), 0
    for t in floating_outputs(output):
        t = torch.where(torch.isfinite(t), t, 0)
        total = total + (_real(t) * torch.randn(_real(t).shape, generator=generator, device="cpu").to(t.device)).sum().cpu()
    return total


def _real(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t if t.dtype == torch.float64 else t.float()


def output_distance(a: list[Tensor], b: list[Tensor], moved: list[Tensor] | None = None) -> float:
    """Largest difference between two runs, relative to the largest entry among those that differ between a and `moved` (b).

    Entries that never differ, such as a mask's -1e9, would hide the others.
    """
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y, z in zip(a, b, b if moved is None else moved, strict=True):
        x, y, z = (_real(t) for t in (x, y, z))
        differ = (x != y) & ~(x.isnan() & y.isnan())
        if not differ.any():
            continue
        gap = (x - y).abs()[differ].max().item()
        live = ((x != z) | differ) & x.isfinite()
        scale = x[live].abs().max().item() if live.any() else 0.0
        worst = max(worst, gap / scale if scale and gap == gap else float("inf"))
    return worst
