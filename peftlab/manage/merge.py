"""`merge`: adapters are folded into the tensors that they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlab.core.adapters import refuse_inside_blocks, select_adapters
from peftlab.core.base import adapted_values
from peftlab.core.merged import (
    drop_stash,
    held_tensors,
    mergeable_pairs,
    merged_tensors,
    names_to_fold,
    rebind_storage,
    restore_tie,
    stash_and_rebind,
    stashed_parameters,
    unload_ties,
)
from peftlab.core.site import STASH_PREFIX, frozen_values
from peftlab.core.stack import AdapterStack, adapted_modules
from peftlab.manage.unmerge import check_merge_order
from peftlab.manage.unwrap import take_off
from peftlab.model import layers
from peftlab.model.index import ensure_module
from peftlab.model.packed import QuantizedModule, dense_parameter, is_quantized
from peftlab.support.contexts import paused_gc
from peftlab.support.table import table


@dataclass
class MergeReport:
    """Which layers were changed by a merge, by how much at most, and the memory that keeps their frozen bits.

    `errors` has, for the packed weights of a quantised base, how far the stored weight is from the one that acted before the merge: the
    Frobenius norm of the difference, relative to that of the weight (the expected relative error of the layer's output for inputs without
    preferred directions), and relative to that of the adapters' change: near 1 after requantising, what was learned is lost in rounding.
    """

    rows: list[tuple[str, str, float]]  # (path, parameter, max |change|)
    kept_bytes: int
    errors: list[tuple[str, str, float, float]] = field(default_factory=list)  # (path, parameter, error, error of the change)

    @property
    def layers(self) -> int:
        return len({path for path, _, delta in self.rows if delta > 0})

    @property
    def max_delta(self) -> float:
        return max((d for _, _, d in self.rows), default=0.0)

    def above(self, limit: float) -> list[tuple[str, str, float, float]]:
        """The layers whose error exceeds a limit."""
        return [row for row in self.errors if row[2] > limit]

    def __repr__(self) -> str:
        errors = {(p, n): (f"{e:.3e}", f"{of:.3e}") for p, n, e, of in self.errors}
        body = [(p, n, f"{d:.3e}", *errors.get((p, n), ("", ""))) for p, n, d in self.rows]
        head = ("layer", "tensor", "max change", *(("error", "of the change") if errors else ("", "")))
        return f"{table(head, body, right=(2, 3, 4))}\n{self.layers} layers changed, {self.kept_bytes:,} bytes kept for unmerge"


@paused_gc()
def merge(model: nn.Module, names: str | Iterable[str] | None = None, *, keep: bool = True, unload: bool = False, onto=None) -> MergeReport:
    """Fold active adapters into the frozen tensors (all active weight methods by default).

    Args:
        keep: hold the frozen bits so that `unmerge` and `disabled` are exact; their memory is in the report. `keep=False` is lossy.
        unload: take the merged adapters off afterwards, so that classes and forwards are the original ones.
        onto: needed where the base is quantised: "dequantized" leaves dense weights, "requantized" rounds to codes again, a module or a mapping
            of its parameters by path gives the dense weights to merge onto. The report says how far the result is from what was trained.

    Raises:
        ValueError: for methods without a weight, inactive adapters, non-finite results, an order that cannot be kept, or an
            adapter whose change rounds to nothing everywhere. The model is then unchanged.
        TypeError: where keep or unload is neither True nor False.
    """

    for what, flag in (("keep", keep), ("unload", unload)):
        if not isinstance(flag, bool):
            raise TypeError(f"{what}={flag!r}: True or False")

    def choose(todo: list) -> list:
        acting = [(path, host, [(site, m) for n in new for site, m in s.sites[n] if m.has_weight()]) for path, host, s, new in todo]
        hosts = [(path, host, {site.param for site, _ in pairs}, all(m.neutral for _, m in pairs)) for path, host, pairs in acting]
        if onto is None and not any(isinstance(host, QuantizedModule) for _, host, _, _ in hosts):
            return [None] * len(todo)
        from peftlab.quant.merging import choose  # most models have no quantised layers

        return choose(onto, hosts)

    return merge_onto(model, names, keep, unload, choose)


def merge_onto(model: nn.Module, names: str | Iterable[str] | None, keep: bool, unload: bool, choose: Callable[[list], list]) -> MergeReport:
    """`merge`, with what each of the (path, host, stack, names) is merged onto chosen by a function."""
    found = adapted_modules(ensure_module(model))
    refuse_inside_blocks(model)
    for path, _, s in found:
        s.current()  # start values that are still to come are made now
        if any(site.device.type == "meta" for pairs in s.sites.values() for site, _ in pairs):
            raise ValueError(f"{path!r} is on the meta device: it has no values to merge")
    chosen = _mergeable_names(model, found, names)
    todo = _to_merge(found, chosen, unload)
    bases, wanted = [s.onto for _, _, s, _ in todo], choose(todo)
    for (path, _, s, _), old, new in zip(todo, bases, wanted, strict=True):
        if s.merged and old is not None and (new is None or not old.same(new)):
            raise ValueError(f"{s.merged[0]!r} is merged at {path!r} onto another base: unmerge it first")
    for (_, _, s, _), new in zip(todo, wanted, strict=True):
        s.onto = new if new is not None else s.onto
    try:
        if not keep:  # without the frozen bits there is no way back, so look before leaping
            values = ((path, host, s, p, v) for path, host, s, new in todo for p, v in merged_tensors(path, host, s, names_to_fold(s, new)))
            _refuse_lost_in_rounding([(path, p, _largest_change(host, s, p, held_tensors(host, s, p, v))) for path, host, s, p, v in values], todo)
        rows, errors = _fold_adapters(todo, keep)
    except BaseException:
        for (_, _, s, _), base in zip(todo, bases, strict=True):
            s.onto = base
        raise
    if unload or not keep:
        _unpack_merged(todo)
    kept_bytes = sum(s._buffers[STASH_PREFIX + p].numel() * s._buffers[STASH_PREFIX + p].element_size() for _, _, s, _ in todo for p in stashed_parameters(s))
    if unload:
        for _, _, s, _ in todo:
            drop_stash(s)
        take_off(model, chosen, restore=False)
    return MergeReport(rows, 0 if unload else kept_bytes, errors)


def _mergeable_names(model: nn.Module, found: list, names: str | Iterable[str] | None) -> list[str]:
    """The adapters to merge: those named, or every active one that changes weights."""
    chosen = select_adapters(model, names)
    callers = {n: (path, why) for path, _, s in found for n in s.order for _, m in s.sites[n] if (why := m.unmergeable()) is not None}
    on = {n for _, _, s in found for n in s.active}
    if names is None:
        can = [n for n in chosen if n in on and n not in callers]
        if can or not callers.keys() & on:
            return can
    for n in chosen:
        if n in callers:
            path, why = callers[n]
            raise ValueError(f"at {path!r}, {n!r} {why}, and cannot be merged")
        if n not in on:
            raise ValueError(f"{n!r} is not active; activate it before merging")
    return chosen


def _to_merge(found: list, chosen: list[str], unload: bool) -> list[tuple[str, nn.Module, AdapterStack, list[str]]]:
    """(path, host, stack, adapters to merge there), checked."""
    todo = []
    for path, host, s in found:
        new = [n for n in s.order if n in chosen and n in s.active and n not in s.merged]
        if not new:
            continue
        check_merge_order(path, s, {*s.merged, *new}, s.active)
        if any(p[0].rule is layers.OPAQUE for n in new for p in s.sites[n]):
            raise ValueError(f"{path!r} is a {type(host).__name__} that only offers a call: nothing can be merged into it")
        others = [n for n in s.merged if n not in chosen and n not in s.lossy]
        if unload and others:
            raise ValueError(f"{others[0]!r} is merged into {path!r} as well: unload them together, or unmerge it first")
        todo.append((path, host, s, new))
    if not todo:
        raise ValueError(f"{chosen} are merged already" if chosen else "nothing to merge: no adapter that changes weights is active")
    return todo


def _fold_adapters(todo: list, keep: bool) -> tuple[list, list]:
    """Write the merged tensors; where that fails, everything is put back. Returns the rows and errors of the report."""
    done: list[tuple] = []
    rows: list[tuple[str, str, float]] = []
    errors: list[tuple[str, str, float, float]] = []
    try:
        for path, host, s, new in todo:
            before = (s.merged, {p: s._buffers[STASH_PREFIX + p] for p in stashed_parameters(s)})
            done.append((host, s, before, unload_ties(host, s)))
            for param, value in merged_tensors(path, host, s, names_to_fold(s, new)):
                tensors = held_tensors(host, s, param, value)
                rows.append((path, param, _largest_change(host, s, param, tensors)))
                if s.onto is not None and param in host.peftlab_formats:
                    errors.append((path, param, *_rounding_errors(host, s, param, tensors, names_to_fold(s, new))))
                for name, t in tensors.items():
                    stash_and_rebind(host, s, name, t)
            s.merged = tuple(n for n in s.order if n in {*s.merged, *new})
            s.refresh()
            if not keep:
                drop_stash(s)
                s.lossy = s.merged
        _refuse_lost_in_rounding(rows, todo)
    except BaseException:
        for host, s, (merged, kept), rebound in reversed(done if keep else []):
            _restore_tensors(host, s, merged, kept, rebound)
        raise
    return rows, errors


def _rounding_errors(host: nn.Module, stack: AdapterStack, param: str, tensors: dict[str, Tensor], names: list[str]) -> tuple[float, float]:
    """How far what is stored is from the weight that acted before, relative to that weight and to the adapters' change."""
    from peftlab.quant.merging import distances, value_of

    with torch.no_grad():
        base = frozen_values(host, param)
        return distances(value_of(host, param, tensors), adapted_values(host, param, mergeable_pairs(stack, names), base), base)


def _unpack_merged(todo: list) -> None:
    """A layer that is dense for good has the class that it had before it was quantised."""
    for _, host, s, _ in todo:
        for param in [p for p in getattr(host, "peftlab_formats", ()) if not is_quantized(host, p)]:
            from peftlab.quant.modules import unpack

            unpack(host, param, None)
        s.onto = None


def _largest_change(host: nn.Module, stack: AdapterStack, param: str, tensors: dict[str, Tensor]) -> float:
    """The largest change of an entry; of codes, that which rounding alone would not have made."""
    value, before = tensors[param], dense_parameter(host, param).detach()
    if not value.is_floating_point():
        from peftlab.quant.merging import value_of

        value, before = value_of(host, param, tensors), value_of(host, param, held_tensors(host, stack, param, before))
    wide = torch.promote_types(value.dtype, torch.float32)
    return (value.to(wide) - before.to(wide)).abs().max().item() if value.numel() else 0.0


def _refuse_lost_in_rounding(rows: list, todo: list) -> None:
    moved = any(d > 0 for _, _, d in rows)
    if moved or not rows:
        return
    for path, host, s, new in todo:
        links = tuple(p for n in new for p in s.sites[n])
        for param in {site.param for site, _ in links}:
            raw = frozen_values(host, param)
            with torch.no_grad():
                wide = torch.promote_types(raw.dtype, torch.float32)
                if not torch.equal(adapted_values(host, param, links, raw).to(wide), raw.to(wide)):
                    kind = host.peftlab_formats[param].kind if s.onto is not None and s.onto.how == "requantized" else raw.dtype
                    raise ValueError(f"merging {new} changes no layer: the change at {path!r} is lost in the rounding of {kind}")


def _restore_tensors(host: nn.Module, stack: AdapterStack, merged: tuple, kept: dict[str, Tensor], rebound: list[str]) -> None:
    for param in stashed_parameters(stack):
        if param not in kept:
            rebind_storage(host, stack, param, stack._buffers.pop(STASH_PREFIX + param))
    for param in rebound:
        restore_tie(host, stack, param)
    stack.merged = merged
    for param, value in merged_tensors("", host, stack, names_to_fold(stack, [])):
        for name, t in held_tensors(host, stack, param, value).items():
            rebind_storage(host, stack, name, t)
    stack.refresh()
