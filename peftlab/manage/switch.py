"""Which adapters act: `activate`, `active`, `using`, `disabled`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from peftlab.core.adapters import adapted_modules_and_names, match_names, refuse_inside_blocks, select_adapters
from peftlab.core.ledger import remembered_buffers
from peftlab.core.merged import fit_shape, stashed_parameters, storage_owners
from peftlab.core.site import STASH_PREFIX
from peftlab.core.stack import adapted_modules
from peftlab.manage.merge import merge_onto
from peftlab.manage.unmerge import check_merge_order, unmerge_at
from peftlab.model.index import ensure_module
from peftlab.support.contexts import paused_gc


@paused_gc()
def activate(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Let exactly these adapters act (None or an empty list: none). Changes no `requires_grad` and no training mode.

    An adapter that is merged and not named is unmerged first, exactly.
    """
    found, there = adapted_modules_and_names(ensure_module(model))
    chosen = [] if names is None else match_names(there, names)
    refuse_inside_blocks(model, found)
    for path, _, s in found:
        gone = [n for n in s.lossy if n not in chosen]
        if gone:
            raise ValueError(f"{gone[0]!r} was merged into {path!r} with keep=False and acts for good")
        if s.merged:
            check_merge_order(path, s, [n for n in s.merged if n in chosen], chosen)
    for _, host, s in found:
        if s.merged:
            unmerge_at(host, s, [n for n in s.merged if n not in chosen])
        s.set_active(chosen)


def active(model: nn.Module) -> list[str]:
    """The adapters that act now, in stacking order."""
    on = {n for _, _, s in adapted_modules(ensure_module(model)) for n in s.active}
    return [n for n in select_adapters(model, None) if n in on]


@contextlib.contextmanager
def using(model: nn.Module, names: str | Iterable[str] | None) -> Iterator[nn.Module]:
    """Let exactly these adapters act inside the block, whatever acts outside it.

    What this and `activate`, `disabled`, `route` and `positions` say is the model's: all threads that run it meanwhile see it.
    """
    before = [(s, s.active, s.merged, s.onto) for _, _, s in adapted_modules(ensure_module(model))]
    activate(model, names)
    try:
        yield model
    finally:
        for s, acting, _, _ in before:
            s.set_active(acting)
        again = {n for s, _, merged, _ in before for n in merged if n not in s.merged}
        if again:
            bases = {id(s): onto for s, _, _, onto in before}
            merge_onto(model, again, True, False, lambda todo: [bases[id(s)] for _, _, s, _ in todo])


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before `wrap`, bit for bit, inside the block; merged tensors and trained buffers included.

    A copy made inside stays so: a frozen reference. Make copies that are to have adapters outside.
    """
    found = adapted_modules(ensure_module(model))
    if any(s.silent for _, _, s in found):  # inside another such block
        yield model
        return
    in_place = [s.path for _, _, st in found for ps in st.sites.values() for s, m in ps if m.in_place]
    if in_place:
        raise ValueError(f"{in_place[0]!r} is trained in place: there is no frozen copy to go back to")
    lossy = [path for path, _, s in found if s.lossy]
    if lossy:
        raise ValueError(f"{lossy[0]!r} was merged with keep=False: the base bits are gone")
    swapped = [(storage_owners(host, s, p), s._buffers[STASH_PREFIX + p]) for _, host, s in found for p in stashed_parameters(s)]
    swapped += [([b], old.clone()) for b, old in remembered_buffers(model)]  # a copy: training mode would move what is remembered

    def turn(silent: bool) -> None:
        for _, _, s in found:
            s.silent = silent
            s.refresh()
        for there, kept in swapped:
            now = there[0].data
            for t in there:
                t.data = fit_shape(kept.data, t)
            kept.data = now.view(kept.dtype) if kept.dtype == torch.int32 else now

    turn(True)
    try:
        yield model
    finally:
        turn(False)
