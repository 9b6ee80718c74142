"""Which adapters train: `freeze`, `unfreeze`, `train_only`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftlab.attach.select import lies_under
from peftlab.core.adapters import adapter_modules, select_adapters, site_path
from peftlab.core.build import trainable_parameters
from peftlab.model.patterns import PatternError, as_list, did_you_mean, show
from peftlab.model.walk import named_base_modules


def set_trainable(model: nn.Module, wanted: str | Iterable[str] | None, flag: bool, targets=None) -> None:
    found = adapter_modules(model, select_adapters(model, wanted))
    if targets is not None:
        patterns, kept = as_list(targets), []
        at = dict(named_base_modules(model))
        for pattern in patterns:
            mine = [f for f in found if f[2] is not None and lies_under(pattern, site_path(*f[:3]), at, f[2].host)]
            if not mine:
                there = [site_path(*f[:3]) for f in found if f[2] is not None]
                raise PatternError(f"{show(pattern)} matches none of the {len(there)} sites.{did_you_mean(str(pattern), there)}")
            kept += mine
        found = kept
    for _, _, site, m in found:
        for p in trainable_parameters(m):
            p.requires_grad_(flag)
        if site is not None and m.in_place:
            site.raw_tensor.requires_grad_(flag)


def freeze(model: nn.Module, *names: str, targets=None) -> None:
    """Stop training these adapters (all without names), only at the sites that `targets` means if it is given."""
    set_trainable(model, names or None, False, targets)


def unfreeze(model: nn.Module, *names: str, targets=None) -> None:
    """Train these adapters (all without names), only at the sites that `targets` means if it is given."""
    set_trainable(model, names or None, True, targets)


def train_only(model: nn.Module, *names: str) -> None:
    """Train these adapters and no others."""
    select_adapters(model, names)
    set_trainable(model, None, False)
    set_trainable(model, names, True)
