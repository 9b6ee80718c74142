"""The first proof: every tensor of every adapter gets a gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peftlab.core.base import cuts_gradient
from peftlab.inspect.check.outputs import output_loss
from peftlab.inspect.check.trial import Subject, Trial, grad_or_none
from peftlab.model import layers
from peftlab.model.walk import Adapted, named_base_modules
from peftlab.support.text import list_names

TRIES = 5  # forwards in training mode until a randomly skipped layer counts as unreached


def prove_reached(t: Trial) -> None:
    """Every tensor of every adapter gets a gradient."""
    todo = {id(p): p for s in t.subjects for p in s.tensors.values()}
    odd: set[int] = set()
    with _cuts(t, list(todo.values())) as cut:
        for seed in range(TRIES if t.fence.random_mode else 1):
            for key, g in zip(list(todo), t.gradients(list(todo.values()), output_loss, seed), strict=True):
                if g is not None:
                    del todo[key]
                    if not torch.isfinite(g).all():
                        odd.add(key)
            if not todo:
                break
    missed = []
    for s in t.subjects:
        absent = [k for k, p in s.tensors.items() if id(p) in todo]
        s.row.reached = None if not s.tensors else not absent
        if absent:
            missed.append((s, absent))
        if any(id(p) in odd for p in s.tensors.values()):
            s.row.note = "gradient is not finite"
        wall = next((cut[id(p)] for p in s.tensors.values() if id(p) in cut), None)
        if wall is not None:
            s.row.fail("reached", f"{wall} has no backward: what lies below it gets a part of its gradient, or none. Adapt layers above it alone")
    if missed:
        reasons = _why_unreached(t, [s for s, _ in missed])
        for (s, absent), reason in zip(missed, reasons, strict=True):
            some = f"{list_names(absent)} of its tensors: " if len(absent) < len(s.tensors) else ""
            s.row.fail("reached", some + reason)
    t.fence.put_flags_back()


@contextlib.contextmanager
def _cuts(t: Trial, tensors: list[Tensor]) -> Iterator[dict[int, str]]:
    """Is filled while the model runs: tensors, by id, and the frozen layer that cuts their gradient on one way to the loss, or on all."""
    found: dict[int, str] = {}

    def look(path: str, m: nn.Module, args: tuple, y: object) -> None:
        if args and torch.is_grad_enabled() and cuts_gradient(args[0], y):
            below = grad_or_none(torch.autograd.grad, args[0].sum(), tensors, retain_graph=True, allow_unused=True) or [None] * len(tensors)
            found.update({id(p): f"{path!r}, a {type(m).__name__}," for p, g in zip(tensors, below, strict=True) if g is not None})

    packed = [(path, m) for path, m in named_base_modules(t.root) if layers.is_opaque_linear(m) and not isinstance(m, Adapted)]  # one with an adapter raises
    handles = [m.register_forward_hook(functools.partial(look, path)) for path, m in packed]
    try:
        yield found
    finally:
        for h in handles:
            h.remove()


def _why_unreached(t: Trial, missed: list[Subject]) -> list[str]:
    """Whether the host ran, and whether its frozen tensor reaches the loss without it: the two tell the cases apart."""
    called: set[int] = set()
    hosts = {id(s.site.host): s.site.host for s in missed if s.site is not None}
    raw = {id(s): s.site.raw_tensor for s in missed if s.site is not None}
    raw = {k: p for k, p in raw.items() if p is not None and p.is_floating_point()}
    handles = [h.register_forward_pre_hook(lambda m, *_: called.add(id(m)) or None) for h in hosts.values()]
    try:
        read = t.gradients(list(raw.values()), output_loss) if raw else []
    finally:
        for h in handles:
            h.remove()
        t.fence.put_flags_back()
    reads = {k for k, g in zip(raw, read, strict=True) if g is not None}
    out = []
    for s in missed:
        if s.site is None:
            out.append("no site of this adapter uses it")
        elif id(s.site.host) in called and id(s) in reads:
            out.append("its host is called, but the method's result does not depend on it")
        elif id(s.site.host) in called:
            out.append(
                "its host is called, but its output does not reach the loss: detached, unused, under no_grad, or under reentrant "
                "checkpointing of a block whose input requires no grad"
            )
        elif id(s) in reads:
            out.append("its host is read, not called: wrap(..., read=[{paths}])")
        else:
            out.append("its host is not used for this batch: give a batch that uses it, or wrap(..., exclude=[{paths}])")
    return out
