"""Tied tensors: found by their memory, and shared or untied as the caller says."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.model.index import ModelIndex, join_path, memory_extent, tensor_identity


def resolve_ties(model: ModelIndex, sites: list[Site], tie: str | None, label: str) -> list[Site]:
    """Tied tensors, found by their memory, need an explicit choice; `share` adapts every owner alike, `untie` only the one targeted."""
    if tie not in (None, "share", "untie"):
        raise ValueError(f"tie={tie!r}: one of 'share', 'untie'")
    out: dict[object, Site] = {}
    for s in sites:
        p = s.raw_tensor
        others = [o for o in model.owners.get(tensor_identity(p), ()) if o[0] is not s.host or o[1] != s.param] if p is not None else []
        key: object = id(s)
        if others:
            if tie is None:
                raise ValueError(
                    f"{join_path(model.path(s.host), s.param)!r} and {join_path(model.path(others[0][0]), others[0][1])!r} are one tensor (tied): {label} at {s.path!r} "
                    "would act on one end only. Say tie='share' (both ends see the change) or tie='untie' (only this end), or exclude it."
                )
            s.tied, s.shared = tuple(others), tie == "share"
            s.read_only = s.read_only or tie == "share" or any(h is s.host for h, _ in others)
            if tie == "share":
                key = (tensor_identity(p), s.key if s.rows is not None or s.expert is not None else None)
        if key not in out or _has_adapter(s.host, s.param):  # where an earlier adapter sits, the next one joins it
            out[key] = s
    for s in out.values():
        _refuse_other_end(model, s, label)
    _refuse_common_memory(model, list(out.values()), tie)
    return list(out.values())


def _has_adapter(host: nn.Module, param: str | None) -> bool:
    stack = host._modules.get(ADAPTERS_CHILD)
    return stack is not None and any(s.param == param for pairs in stack.sites.values() for s, _ in pairs)


def _refuse_other_end(model: ModelIndex, site: Site, label: str) -> None:
    """Adapters that change one tensor sit at one end of it, each above the last; or each end has a tensor of its own."""
    for host, param in site.tied:
        if not _has_adapter(host, param) or (not site.shared and param in host._modules[ADAPTERS_CHILD].untied):
            continue
        raise ValueError(
            f"{join_path(model.path(host), param)!r}, the other end of the tied tensor at {site.path!r}, has an adapter: {label} must sit at that end too. "
            "Target it there, or unwrap the other one first."
        )


def _refuse_common_memory(model: ModelIndex, sites: Collection[Site], tie: str | None) -> None:
    """A tensor that overlaps another without being the same cannot be changed for both."""
    mine = {tensor_identity(s.raw_tensor): s for s in sites if s.raw_tensor is not None}
    memories = {key[0] for key in mine}
    places: dict[int, list[tuple[int, int, tuple]]] = {}
    for key, owners in model.owners.items():
        if len(key) > 1 and key[0] in memories:
            host, param = owners[0]
            places.setdefault(key[0], []).append((*memory_extent(host._parameters[param]), key))
    for found in places.values() if tie != "untie" else ():
        end, last = -1, ()
        for start, stop, key in sorted(found):
            if start < end and (key in mine or last in mine):
                ours, other = (key, last) if key in mine else (last, key)
                host, param = model.owners[other][0]
                raise ValueError(
                    f"{mine[ours].path!r} and {join_path(model.path(host), param)!r} share some of their memory but are not the same tensor: "
                    "say tie='untie' (only the one that is targeted changes), or exclude it"
                )
            if stop > end:
                end, last = stop, key
