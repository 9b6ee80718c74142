"""`unmerge`: merged adapters come out of the tensors again, and the frozen bits come back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftlab.core.adapters import refuse_inside_blocks, select_adapters
from peftlab.core.merged import held_tensors, merged_tensors, names_to_fold, rebind_storage, restore_tie, stashed_parameters
from peftlab.core.site import STASH_PREFIX
from peftlab.core.stack import AdapterStack, adapted_modules
from peftlab.model.index import ensure_module
from peftlab.support.contexts import paused_gc


def check_merge_order(path: str, stack: AdapterStack, merged: Iterable[str], acting: Iterable[str]) -> None:
    """A merged adapter lies below every unmerged one; that is the declared stack only if the two commute."""
    merged = set(merged)
    open_below: list[str] = []
    for n in stack.order:
        if n not in acting:
            continue
        methods = [m for _, m in stack.sites[n] if m.unmergeable() is None]
        if n not in merged:
            open_below += [n] if methods else []
            continue
        pairs = [stack.sites[b] for b in open_below]
        if pairs and not all(m.additive for ps in [*pairs, stack.sites[n]] for _, m in ps if m.unmergeable() is None):
            raise ValueError(f"at {path!r}, {n!r} lies above {open_below[-1]!r} and the two do not commute: merge {[*open_below, n]} together")


@paused_gc()
def unmerge(model: nn.Module, names: str | Iterable[str] | None = None) -> None:
    """Take merged adapters out of the tensors again; the frozen bits come back exactly."""
    chosen = select_adapters(ensure_module(model), names)
    refuse_inside_blocks(model)
    found = [(path, host, s) for path, host, s in adapted_modules(model) if any(n in s.merged for n in chosen)]
    if not found:
        raise ValueError(f"none of {chosen} is merged")
    for path, _, s in found:
        gone = [n for n in s.lossy if n in chosen]
        if gone:
            raise ValueError(f"{gone[0]!r} was merged into {path!r} with keep=False: the base bits are gone")
        check_merge_order(path, s, [n for n in s.merged if n not in chosen], s.active)
    for _, host, s in found:
        unmerge_at(host, s, chosen)


def unmerge_at(host: nn.Module, stack: AdapterStack, names: Iterable[str]) -> None:
    """The checked part of `unmerge` on one host."""
    if not any(n in stack.merged for n in names):
        return
    stack.merged = tuple(n for n in stack.merged if n not in names)
    left = {k: t for param, value in merged_tensors("", host, stack, names_to_fold(stack, [])) for k, t in held_tensors(host, stack, param, value).items()}
    for param in stashed_parameters(stack):
        if param in left:
            rebind_storage(host, stack, param, left[param])
        else:
            rebind_storage(host, stack, param, stack._buffers.pop(STASH_PREFIX + param))
            restore_tie(host, stack, param)
    stack.onto = stack.onto if stack.merged else None
    stack.refresh()
