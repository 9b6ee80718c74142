"""What happens to adapters after wrapping: switch, disable, merge, unmerge, take off, copy."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlab.host import SHARED, STASH, Shape, Stack, as_kind, bare, changes_bias, effective, frozen, paused_gc, refresh_alias_free, stacks, swap_out, walk
from peftlab.method import finite
from peftlab.model import layers
from peftlab.model.patterns import did_you_mean
from peftlab.registry import keywords
from peftlab.sites import ensure_module, join, storage
from peftlab.support.table import table
from peftlab.wrap import LEDGER, Ledger, adapter_modules, ledgers, named, outside_disabled, survey, which

# ---------------------------------------------------------------- switching


@paused_gc()
def activate(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Let exactly these adapters act (None or an empty list: none). Changes no `requires_grad` and no training mode.

    An adapter that is merged and not named is unmerged first, exactly.
    """
    found, there = survey(ensure_module(model))
    chosen = [] if names is None else named(there, names)
    outside_disabled(model, found)
    for path, _, s in found:
        gone = [n for n in s.lossy if n not in chosen]
        if gone:
            raise ValueError(f"{gone[0]!r} was merged into {path!r} with keep=False and acts for good")
        if s.merged:
            _check_order(path, s, [n for n in s.merged if n in chosen], chosen)
    for _, host, s in found:
        if s.merged:
            _unmerge(host, s, [n for n in s.merged if n not in chosen])
        s.set_active(chosen)


def active(model: nn.Module) -> list[str]:
    """The adapters that act now, in stacking order."""
    on = {n for _, _, s in stacks(ensure_module(model)) for n in s.active}
    return [n for n in which(model, None) if n in on]


def rescale(model: nn.Module, factor: float, names: str | Iterable[str] | None = None) -> None:
    """Multiply the option `alpha` of adapters (all by default), and with it their change; compiled models are not compiled again.

    Raises:
        ValueError: for methods without `alpha`, for merged adapters, and where the factor is not a finite number.
    """
    found = [(n, m) for n, _, site, m in adapter_modules(bare(ensure_module(model)), which(model, names)) if site is not None]
    outside_disabled(model)
    finite("factor", factor)
    for n, m in found:
        if "alpha" not in keywords(type(m)) or not isinstance(m.__dict__.get("s"), Tensor):
            raise ValueError(f"{n!r} cannot be rescaled: {m.recipe.label} at {m.site.path!r} has no alpha")
    merged = {n for _, _, s in stacks(model) for n in s.merged} & {n for n, _ in found}
    if merged:
        raise ValueError(f"{min(merged)!r} is merged: unmerge it before it is rescaled")
    scales: dict[int, Tensor] = {}
    for _, m in found:
        recipe = m.recipe
        if id(recipe) not in scales:
            alpha = recipe.hyper.get("alpha", keywords(recipe.cls)["alpha"].default)
            recipe.hyper = {**recipe.hyper, "alpha": alpha * factor}
            scales[id(recipe)] = recipe.build(as_kind(m.site, Shape), (), "meta").s  # as a model that loads the file will have it
        m.s.copy_(scales[id(recipe)])


@contextlib.contextmanager
def using(model: nn.Module, names: str | Iterable[str] | None) -> Iterator[nn.Module]:
    """Let exactly these adapters act inside the block, whatever acts outside it.

    What this and `activate`, `disabled`, `route` and `positions` say is the model's: all threads that run it meanwhile see it.
    """
    before = [(s, s.active, s.merged, s.onto) for _, _, s in stacks(ensure_module(model))]
    activate(model, names)
    try:
        yield model
    finally:
        for s, acting, _, _ in before:
            s.set_active(acting)
        again = {n for s, _, merged, _ in before for n in merged if n not in s.merged}
        if again:
            bases = {id(s): onto for s, _, _, onto in before}
            _merge(model, again, True, False, lambda todo: [bases[id(s)] for _, _, s, _ in todo])


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before `wrap`, bit for bit, inside the block; merged tensors and trained buffers included.

    A copy made inside stays so: a frozen reference. Make copies that are to have adapters outside.
    """
    found = stacks(ensure_module(model))
    if any(s.silent for _, _, s in found):  # inside another such block
        yield model
        return
    in_place = [s.path for _, _, st in found for ps in st.sites.values() for s, m in ps if m.in_place]
    if in_place:
        raise ValueError(f"{in_place[0]!r} is trained in place: there is no frozen copy to go back to")
    lossy = [path for path, _, s in found if s.lossy]
    if lossy:
        raise ValueError(f"{lossy[0]!r} was merged with keep=False: the base bits are gone")
    swapped = [(_owners(host, s, p), s._buffers[STASH + p]) for _, host, s in found for p in _stashed(s)]
    swapped += [([b], old.clone()) for b, old in _remembered(model)]  # a copy: training mode would move what is remembered

    def turn(silent: bool) -> None:
        for _, _, s in found:
            s.silent = silent
            s.refresh()
        for there, kept in swapped:
            now = there[0].data
            for t in there:
                t.data = _fitted(kept.data, t)
            kept.data = now.view(kept.dtype) if kept.dtype == torch.int32 else now

    turn(True)
    try:
        yield model
    finally:
        turn(False)


def _remembered(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(buffer, its value before wrap) of the base's persistent buffers, such as BatchNorm statistics."""
    for _, m, ledger in ledgers(model):
        there = {join(path, n): b for path, sub in walk(m) for n, b in sub._buffers.items() if b is not None}
        for path, old in ledger.buffers.items():
            b = there.get(path)
            if b is not None and b.shape == old.shape:
                ledger.buffers[path] = old.to(b.device, b.dtype)
                yield b, ledger.buffers[path]


def _changed_buffers(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Those that have changed since."""
    return ((b, old) for b, old in _remembered(model) if not torch.equal(b, old))


# ---------------------------------------------------------------- merging


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


def _stashed(stack: Stack) -> list[str]:
    return [n.removeprefix(STASH) for n in stack._buffers if n.startswith(STASH)]


def _check_order(path: str, stack: Stack, merged: Iterable[str], acting: Iterable[str]) -> None:
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
        if onto is None and not any(isinstance(host, layers.Quantised) for _, host, _, _ in hosts):
            return [None] * len(todo)
        from peftlab.quant.merging import choose  # most models have no quantised layers

        return choose(onto, hosts)

    return _merge(model, names, keep, unload, choose)


def _merge(model: nn.Module, names: str | Iterable[str] | None, keep: bool, unload: bool, choose: Callable[[list], list]) -> MergeReport:
    """`merge`, with what each of the (path, host, stack, names) is merged onto chosen by a function."""
    found = stacks(ensure_module(model))
    outside_disabled(model)
    for path, _, s in found:
        s.current()  # start values that are still to come are made now
        if any(site.device.type == "meta" for pairs in s.sites.values() for site, _ in pairs):
            raise ValueError(f"{path!r} is on the meta device: it has no values to merge")
    chosen = _mergeable(model, found, names)
    todo = _to_merge(found, chosen, unload)
    bases, wanted = [s.onto for _, _, s, _ in todo], choose(todo)
    for (path, _, s, _), old, new in zip(todo, bases, wanted, strict=True):
        if s.merged and old is not None and (new is None or not old.same(new)):
            raise ValueError(f"{s.merged[0]!r} is merged at {path!r} onto another base: unmerge it first")
    for (_, _, s, _), new in zip(todo, wanted, strict=True):
        s.onto = new if new is not None else s.onto
    try:
        if not keep:  # without the frozen bits there is no way back, so look before leaping
            values = ((path, host, s, p, v) for path, host, s, new in todo for p, v in _merged_tensors(path, host, s, _kept(s, new)))
            _refuse_nothing([(path, p, _change(host, s, p, _held(host, s, p, v))) for path, host, s, p, v in values], todo)
        rows, errors = _fold(todo, keep)
    except BaseException:
        for (_, _, s, _), base in zip(todo, bases, strict=True):
            s.onto = base
        raise
    if unload or not keep:
        _unpack_merged(todo)
    kept_bytes = sum(s._buffers[STASH + p].numel() * s._buffers[STASH + p].element_size() for _, _, s, _ in todo for p in _stashed(s))
    if unload:
        for _, _, s, _ in todo:
            _forget(s)
        _take_off(model, chosen, restore=False)
    return MergeReport(rows, 0 if unload else kept_bytes, errors)


def _mergeable(model: nn.Module, found: list, names: str | Iterable[str] | None) -> list[str]:
    """The adapters to merge: those named, or every active one that changes weights."""
    chosen = which(model, names)
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


def _to_merge(found: list, chosen: list[str], unload: bool) -> list[tuple[str, nn.Module, Stack, list[str]]]:
    """(path, host, stack, adapters to merge there), checked."""
    todo = []
    for path, host, s in found:
        new = [n for n in s.order if n in chosen and n in s.active and n not in s.merged]
        if not new:
            continue
        _check_order(path, s, {*s.merged, *new}, s.active)
        if any(p[0].rule is layers.OPAQUE for n in new for p in s.sites[n]):
            raise ValueError(f"{path!r} is a {type(host).__name__} that only offers a call: nothing can be merged into it")
        others = [n for n in s.merged if n not in chosen and n not in s.lossy]
        if unload and others:
            raise ValueError(f"{others[0]!r} is merged into {path!r} as well: unload them together, or unmerge it first")
        todo.append((path, host, s, new))
    if not todo:
        raise ValueError(f"{chosen} are merged already" if chosen else "nothing to merge: no adapter that changes weights is active")
    return todo


def _fold(todo: list, keep: bool) -> tuple[list, list]:
    """Write the merged tensors; where that fails, everything is put back. Returns the rows and errors of the report."""
    done: list[tuple] = []
    rows: list[tuple[str, str, float]] = []
    errors: list[tuple[str, str, float, float]] = []
    try:
        for path, host, s, new in todo:
            before = (s.merged, {p: s._buffers[STASH + p] for p in _stashed(s)})
            done.append((host, s, before, unload_ties(host, s)))
            for param, value in _merged_tensors(path, host, s, _kept(s, new)):
                tensors = _held(host, s, param, value)
                rows.append((path, param, _change(host, s, param, tensors)))
                if s.onto is not None and param in host.peftlab_formats:
                    errors.append((path, param, *_errors(host, s, param, tensors, _kept(s, new))))
                for name, t in tensors.items():
                    _store(host, s, name, t)
            s.merged = tuple(n for n in s.order if n in {*s.merged, *new})
            s.refresh()
            if not keep:
                _forget(s)
                s.lossy = s.merged
        _refuse_nothing(rows, todo)
    except BaseException:
        for host, s, (merged, kept), rebound in reversed(done if keep else []):
            _restore(host, s, merged, kept, rebound)
        raise
    return rows, errors


def _held(host: nn.Module, stack: Stack, param: str, value: Tensor) -> dict[str, Tensor]:
    """The tensors that hold a merged value, by name: where a quantised base is merged onto itself, codes and scales."""
    if stack.onto is None:
        return {param: value}
    from peftlab.quant.merging import stored

    return stored(host, param, value, stack.onto)


def _errors(host: nn.Module, stack: Stack, param: str, tensors: dict[str, Tensor], names: list[str]) -> tuple[float, float]:
    """How far what is stored is from the weight that acted before, relative to that weight and to the adapters' change."""
    from peftlab.quant.merging import distances, value_of

    with torch.no_grad():
        base = frozen(host, param)
        return distances(value_of(host, param, tensors), effective(host, param, _folded(stack, names), base), base)


def _unpack_merged(todo: list) -> None:
    """A layer that is dense for good has the class that it had before it was quantised."""
    for _, host, s, _ in todo:
        for param in [p for p in getattr(host, "peftlab_formats", ()) if not layers.holds_codes(host, p)]:
            from peftlab.quant.linear import unpack

            unpack(host, param, None)
        s.onto = None


def _forget(stack: Stack) -> None:
    for p in _stashed(stack):
        del stack._buffers[STASH + p]


def _change(host: nn.Module, stack: Stack, param: str, tensors: dict[str, Tensor]) -> float:
    """The largest change of an entry; of codes, that which rounding alone would not have made."""
    value, before = tensors[param], layers.values(host, param).detach()
    if not value.is_floating_point():
        from peftlab.quant.merging import value_of

        value, before = value_of(host, param, tensors), value_of(host, param, _held(host, stack, param, before))
    wide = torch.promote_types(value.dtype, torch.float32)
    return (value.to(wide) - before.to(wide)).abs().max().item() if value.numel() else 0.0


def _kept(stack: Stack, new: list[str]) -> list[str]:
    """What will be merged onto the frozen bits that are still known: all but what was merged for good."""
    return [n for n in stack.order if n in {*stack.merged, *new} and n not in stack.lossy]


def _refuse_nothing(rows: list, todo: list) -> None:
    moved = any(d > 0 for _, _, d in rows)
    if moved or not rows:
        return
    for path, host, s, new in todo:
        links = tuple(p for n in new for p in s.sites[n])
        for param in {site.param for site, _ in links}:
            raw = frozen(host, param)
            with torch.no_grad():
                wide = torch.promote_types(raw.dtype, torch.float32)
                if not torch.equal(effective(host, param, links, raw).to(wide), raw.to(wide)):
                    kind = host.peftlab_formats[param].kind if s.onto is not None and s.onto.how == "requantized" else raw.dtype
                    raise ValueError(f"merging {new} changes no layer: the change at {path!r} is lost in the rounding of {kind}")


def unload_ties(host: nn.Module, stack: Stack) -> list[str]:
    """Give an untied end a tensor of its own; returns the parameters that got one."""
    split = [param for param, shared in stack.untied.items() if shared is None]
    for param in split:
        old = stack.untied[param] = host._parameters[param]
        host._parameters[param] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    return split


def _merged_tensors(path: str, host: nn.Module, stack: Stack, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(parameter, value in its own dtype) with these adapters folded in; one tensor at a time."""
    links = _folded(stack, names)
    params = dict.fromkeys(s.param for s, m in links if m.has_weight())
    params |= dict.fromkeys(s.bias for s, m in links if changes_bias(s, m))
    for param in params:
        given = None if stack.onto is None else stack.onto.originals.get(param)
        raw = frozen(host, param) if given is None else given
        with torch.no_grad():
            value = effective(host, param, links, raw).to(raw.dtype)
        if not torch.isfinite(value).all():
            raise ValueError(f"merging {names} would put non-finite values into {join(path, param)!r}")
        # A method may hand out its own tensor (a trained copy), or the frozen one: the merged weight has memory of its own.
        held = {storage(t) for t in (raw, host._parameters[param], *(p for _, m in links for p in m.parameters()))}
        yield param, value.clone() if storage(value) in held else value.contiguous()


def _folded(stack: Stack, names: list[str]) -> tuple:
    """The links of these adapters that act on tensors."""
    return tuple(p for n in names for p in stack.sites[n] if p[1].unmergeable() is None and not p[1].in_place)


def _store(host: nn.Module, stack: Stack, name: str, value: Tensor) -> None:
    if STASH + name not in stack._buffers:
        raw = _slot(host, name).detach()
        # The scales of codes are kept as whole numbers: converting the model's floats must not touch them.
        stack.register_buffer(STASH + name, raw if name in host._parameters or not raw.is_floating_point() else raw.view(torch.int32), persistent=False)
    _rebind(host, stack, name, value)


def _slot(host: nn.Module, name: str) -> Tensor:
    """A parameter, or a buffer that belongs to one."""
    return host._parameters[name] if name in host._parameters else host._buffers[name]


def _fitted(value: Tensor, t: Tensor) -> Tensor:
    """A value in the shape of what it takes the place of; where codes and dense weights change places, as it is."""
    if t.dtype == torch.float32 and value.dtype == torch.int32:
        return value.view(torch.float32)
    return value.view(t.shape) if value.is_floating_point() is t.is_floating_point() else value


def _rebind(host: nn.Module, stack: Stack, param: str, value: Tensor) -> None:
    """Put other memory behind a parameter and those that share its storage, and let a backward that needs the old values notice."""
    for p in _owners(host, stack, param):
        p.data = _fitted(value, p)
        if p.ndim:
            with torch.no_grad():
                p.narrow(0, 0, 0).zero_()  # writes nothing and counts as a write


def _owners(host: nn.Module, stack: Stack, param: str) -> list[nn.Parameter]:
    """The parameter, and those tied to it by storage alone that follow it."""
    raw = _slot(host, param)
    if param in stack.untied:
        return [raw]
    tied = [o for pairs in stack.sites.values() for s, _ in pairs if s.param == param for o in s.tied]
    return list({id(p): p for p in [raw, *(h._parameters[n] for h, n in tied)]}.values())


def _restore(host: nn.Module, stack: Stack, merged: tuple, kept: dict[str, Tensor], rebound: list[str]) -> None:
    for param in _stashed(stack):
        if param not in kept:
            _rebind(host, stack, param, stack._buffers.pop(STASH + param))
    for param in rebound:
        _retie(host, stack, param)
    stack.merged = merged
    for param, value in _merged_tensors("", host, stack, _kept(stack, [])):
        for name, t in _held(host, stack, param, value).items():
            _rebind(host, stack, name, t)
    stack.refresh()


@paused_gc()
def unmerge(model: nn.Module, names: str | Iterable[str] | None = None) -> None:
    """Take merged adapters out of the tensors again; the frozen bits come back exactly."""
    chosen = which(ensure_module(model), names)
    outside_disabled(model)
    found = [(path, host, s) for path, host, s in stacks(model) if any(n in s.merged for n in chosen)]
    if not found:
        raise ValueError(f"none of {chosen} is merged")
    for path, _, s in found:
        gone = [n for n in s.lossy if n in chosen]
        if gone:
            raise ValueError(f"{gone[0]!r} was merged into {path!r} with keep=False: the base bits are gone")
        _check_order(path, s, [n for n in s.merged if n not in chosen], s.active)
    for _, host, s in found:
        _unmerge(host, s, chosen)


def _unmerge(host: nn.Module, stack: Stack, names: Iterable[str]) -> None:
    """The checked part of `unmerge` on one host."""
    if not any(n in stack.merged for n in names):
        return
    stack.merged = tuple(n for n in stack.merged if n not in names)
    left = {k: t for param, value in _merged_tensors("", host, stack, _kept(stack, [])) for k, t in _held(host, stack, param, value).items()}
    for param in _stashed(stack):
        if param in left:
            _rebind(host, stack, param, left[param])
        else:
            _rebind(host, stack, param, stack._buffers.pop(STASH + param))
            _retie(host, stack, param)
    stack.onto = stack.onto if stack.merged else None
    stack.refresh()


def _retie(host: nn.Module, stack: Stack, param: str) -> None:
    """An untied end shares its tensor again once nothing is merged into it."""
    shared = stack.untied.get(param)
    if shared is not None:
        own = host._parameters[param]
        if (shared.device, shared.dtype) != (own.device, own.dtype):  # the model was moved meanwhile, which this one did not see
            shared.data = shared.data.to(own.device, own.dtype)
        host._parameters[param], stack.untied[param] = shared, None


# ---------------------------------------------------------------- taking off


@paused_gc()
def unwrap(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Take adapters off (all by default). Without any left, objects, classes, flags, buffers and bits are those before `wrap`."""
    outside_disabled(ensure_module(model))
    _take_off(model, which(model, names), restore=True)
    return model


def _take_off(model: nn.Module, chosen: list[str], restore: bool) -> None:
    root = bare(model)
    if restore:
        gone = [(n, path) for path, _, s in stacks(root) for n in s.lossy if n in chosen]
        if gone:
            raise ValueError(
                f"{gone[0][0]!r} was merged into {gone[0][1]!r} with keep=False: the base bits are gone. "
                "merge(..., unload=True) takes adapters off and keeps the merged weights."
            )
        merged = sorted({n for _, _, s in stacks(root) for n in s.merged if n in chosen and n not in s.lossy})
        if merged:
            unmerge(root, merged)
    for _, _, s in stacks(root):
        for n in [n for n in s.order if n in chosen]:
            for site, m in s.sites[n]:
                if m.in_place:
                    site.raw_tensor.requires_grad_(False)
            s.drop(n)
    refresh_alias_free(root)
    for _, m in list(walk(root)):
        holder = m._modules.get(SHARED)
        if holder is not None:
            for n in chosen:
                holder._modules.pop(n, None)
            if not holder._modules:
                del m._modules[SHARED]
    for _, host, s in stacks(root):
        if not s.sites and not s.alias and not s.fused and SHARED not in host._modules:
            swap_out(host)
    for _, m, ledger in reversed(ledgers(root)):  # the innermost remembers the latest state
        for n in chosen:
            ledger.targets.pop(n, None)
        if not ledger.targets:
            _put_back(m, ledger, restore)
            del m.__dict__[LEDGER]


def _put_back(root: nn.Module, ledger: Ledger, restore: bool) -> None:
    if restore:
        for b, old in list(_changed_buffers(root)):
            b.data = old.data.clone()
    for path, m in walk(root):
        for n, p in m._parameters.items():
            if p is not None and join(path, n) in ledger.flags:
                p.requires_grad_(ledger.flags[join(path, n)])


# ---------------------------------------------------------------- copies of the adapter alone


def snapshot(model: nn.Module, names: str | Iterable[str] | None = None) -> dict[str, Tensor]:
    """Copies of the adapters' own tensors, by path; the base is not copied."""
    mods = adapter_modules(bare(ensure_module(model)), which(model, names))
    return {f"{path}.{k}": p.detach().clone() for _, path, _, m in mods for k, p in m.named_parameters()}


def _tensors(model: nn.Module, values: object) -> dict[str, nn.Parameter]:
    """The adapters' own tensors by path, if `values` is a snapshot that fits them."""
    there = {f"{path}.{k}": p for _, path, _, m in adapter_modules(bare(ensure_module(model))) for k, p in m.named_parameters()}
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
    there = _tensors(model, values)
    meant = {f"{path}.{k}": name for name, path, _, m in adapter_modules(bare(model)) for k, _ in m.named_parameters()}
    merged = {n for _, _, s in stacks(model) for n in s.merged} & {meant[k] for k in values}
    if merged:
        raise ValueError(f"{min(merged)!r} is merged: unmerge it before its tensors are overwritten")
    for k, v in values.items():
        there[k].copy_(v)


@torch.no_grad()
def ema_update(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * adapter, in place; touches adapter tensors only. Whole numbers have no average: they are copied."""
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        raise ValueError(f"decay={decay!r}: must lie in [0, 1]")
    there = _tensors(model, average)
    for k, a in average.items():
        new = there[k].detach()
        a.lerp_(new.to(a), 1 - decay) if a.is_floating_point() or a.is_complex() else a.copy_(new)


def view(model: nn.Module) -> nn.Module:
    """A copy of the model with adapters of its own on the same base storage."""
    root = bare(ensure_module(model))
    memo: dict[int, object] = {}
    for _, m in walk(root):
        # Tensor objects of its own on the same storage, so that merging and freezing the one leaves the other alone.
        memo |= {id(p): _twin(p) for p in m._parameters.values() if p is not None}
        if isinstance(m, layers.Quantised):  # with its codes it shares their scales
            memo |= {id(b): b.detach() for n, b in m._buffers.items() if b is not None and n in m._non_persistent_buffers_set}
    return copy.deepcopy(root, memo)


def _twin(p: nn.Parameter) -> nn.Parameter:
    """Another parameter on the same storage; a foreign kind keeps its class and what it carries (bitsandbytes' scales)."""
    if type(p) is nn.Parameter or not issubclass(type(p), nn.Parameter):
        return nn.Parameter(p.detach(), requires_grad=p.requires_grad)
    twin = torch.Tensor._make_subclass(type(p), p.detach(), p.requires_grad)
    twin.__dict__.update(p.__dict__)
    return twin
