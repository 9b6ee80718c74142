"""Copies of adapters without the base: snapshots, averages, and a model that shares its base with another."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peftlab.core.adapters import adapter_modules, select_adapters
from peftlab.core.stack import adapted_modules
from peftlab.model.index import ensure_module
from peftlab.model.packed import QuantizedModule
from peftlab.model.patterns import did_you_mean
from peftlab.model.walk import named_base_modules, unwrap_parallel


def snapshot(model: nn.Module, names: str | Iterable[str] | None = None) -> dict[str, Tensor]:
    """Copies of the adapters' own tensors, by path; the base is not copied."""
    mods = adapter_modules(unwrap_parallel(ensure_module(model)), select_adapters(model, names))
    return {f"{path}.{k}": p.detach().clone() for _, path, _, m in mods for k, p in m.named_parameters()}


def _adapter_tensors(model: nn.Module, values: object) -> dict[str, nn.Parameter]:
    """The adapters' own tensors by path, if `values` is a snapshot that fits them."""
    there = {f"{path}.{k}": p for _, path, _, m in adapter_modules(unwrap_parallel(ensure_module(model))) for k, p in m.named_parameters()}
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise TypeError(f"a snapshot is a dict of tensors, not {values!r:.80}")
    wrong = [k for k, v in values.items() if k not in there or v.shape != there[k].shape]
    if wrong:
        shown = [f"{k!r} {tuple(values[k].shape)}, here {tuple(there[k].shape) if k in there else 'not there'}" for k in wrong[:3]]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the snapshot does not fit this model: {'; '.join(shown)}{more}.{did_you_mean(wrong[0], [k for k in there if k not in values])}")
    return there


@torch.no_grad()
def restore(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Write a snapshot (or an average of snapshots) back, in place."""
    there = _adapter_tensors(model, values)
    meant = {f"{path}.{k}": name for name, path, _, m in adapter_modules(unwrap_parallel(model)) for k, _ in m.named_parameters()}
    merged = {n for _, _, s in adapted_modules(model) for n in s.merged} & {meant[k] for k in values}
    if merged:
        raise ValueError(f"{min(merged)!r} is merged: unmerge it before its tensors are overwritten")
    for k, v in values.items():
        there[k].copy_(v)


@torch.no_grad()
def ema_update(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * adapter, in place; touches adapter tensors only. Whole numbers have no average: they are copied."""
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        raise ValueError(f"decay={decay!r}: must lie in [0, 1]")
    there = _adapter_tensors(model, average)
    for k, a in average.items():
        new = there[k].detach()
        a.lerp_(new.to(a), 1 - decay) if a.is_floating_point() or a.is_complex() else a.copy_(new)


def shared_base_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with adapters of its own on the same base storage."""
    root = unwrap_parallel(ensure_module(model))
    memo: dict[int, object] = {}
    for _, m in named_base_modules(root):
        # Tensor objects of its own on the same storage, so that merging and freezing the one leaves the other alone.
        memo |= {id(p): _parameter_on_same_storage(p) for p in m._parameters.values() if p is not None}
        if isinstance(m, QuantizedModule):  # with its codes it shares their scales
            memo |= {id(b): b.detach() for n, b in m._buffers.items() if b is not None and n in m._non_persistent_buffers_set}
    return copy.deepcopy(root, memo)


def _parameter_on_same_storage(p: nn.Parameter) -> nn.Parameter:
    """Another parameter on the same storage; a foreign kind keeps its class and what it carries (bitsandbytes' scales)."""
    if type(p) is nn.Parameter or not issubclass(type(p), nn.Parameter):
        return nn.Parameter(p.detach(), requires_grad=p.requires_grad)
    twin = torch.Tensor._make_subclass(type(p), p.detach(), p.requires_grad)
    twin.__dict__.update(p.__dict__)
    return twin
