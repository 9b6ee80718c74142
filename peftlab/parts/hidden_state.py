"""What modules take and give: the hidden state in tuples, dicts and model outputs, the tensors among arguments, rows of a batch."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping

from torch import Tensor, nn


def hidden_state_of(out: object) -> Tensor:
    """The hidden state in what a module returned: its first floating tensor with at least two dimensions."""
    found = _first_hidden(out)
    if found is None:
        raise TypeError(f"no hidden state in what the module returned, a {type(out).__name__}: a floating tensor, or a tuple or mapping with one, is needed")
    return found


def _is_hidden(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2


def _first_hidden(out: object) -> Tensor | None:
    if _is_hidden(out):
        return out
    inside = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else ()
    if dataclasses.is_dataclass(out) and not isinstance(out, (Mapping, type)):
        inside = [getattr(out, f.name) for f in dataclasses.fields(out)]
    return next((x for x in inside if _is_hidden(x)), None)


def replace_hidden_state(out: object, h: Tensor) -> object:
    """The same kind of thing with h in place of the hidden state."""
    old = hidden_state_of(out)
    if out is old:
        return h
    if isinstance(out, Mapping):
        return type(out)(**{k: h if v is old else v for k, v in out.items()})
    if isinstance(out, (tuple, list)):
        values = [h if v is old else v for v in out]
        return type(out)(*values) if is_namedtuple(out) else type(out)(values)
    return dataclasses.replace(out, **{f.name: h for f in dataclasses.fields(out) if getattr(out, f.name) is old})


def is_namedtuple(out: object) -> bool:
    """Whether it is a named tuple, whose constructor takes its entries one by one."""
    return isinstance(out, tuple) and getattr(out, "_fields", None) is not None


def edit_hidden_state(out: object, f: Callable[[Tensor], Tensor]) -> object:
    """The same kind of thing with f(h) in place of the hidden state h."""
    return replace_hidden_state(out, f(hidden_state_of(out)))


def hidden_candidates(args: tuple, kwargs: dict) -> list[Tensor]:
    """The floating tensors among a call's arguments that could be hidden states, in order."""
    return [x for x in (*args, *kwargs.values()) if _is_hidden(x)]


def declared_tensors(host: nn.Module, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """The same by name, in the order in which the host declares them; those without a name of their own are numbered."""
    order = {n: i for i, n in enumerate(inspect.signature(host.forward).parameters)}
    names = list(order)
    found = {names[i] if i < len(names) else f"argument {i}": x for i, x in enumerate(args)} | kwargs
    return {n: found[n] for n in sorted(found, key=lambda n: order.get(n, len(order))) if _is_hidden(found[n])}


INPUT_NAMES = ("hidden_states", "hidden_state", "hidden", "x", "h", "input", "inputs", "src", "tgt", "query")  # what the one that is worked on is called


def hidden_input(host: nn.Module, args: tuple, kwargs: dict, width: int, path: str) -> Tensor:
    """The hidden state among a call's arguments: the only one of that width, else the one whose name says so; a ValueError where neither does."""
    fits = [x for x in hidden_candidates(args, kwargs) if x.shape[-1] == width]
    if fits and all(x is fits[0] for x in fits):
        return fits[0]
    named = {n: x for n, x in declared_tensors(host, args, kwargs).items() if x.shape[-1] == width and "mask" not in n}
    chosen = next((n for n in INPUT_NAMES if n in named), next(iter(named)) if len(named) == 1 else None)
    if chosen is not None:
        return named[chosen]
    if fits:
        raise ValueError(
            f"which argument of {path!r} is its input cannot be seen: {', '.join(map(repr, named or ['masks']))} have {width} features; call it 'x' or "
            "'hidden_states' in the module's forward, or sit at another module with targets="
        )
    sizes = [tuple(x.shape) for x in hidden_candidates(args, kwargs)]
    raise ValueError(f"{path!r} was called without an input of {width} features, as its layers take ({sizes}): sit at another module with targets=")


def replace_argument(args: tuple, kwargs: dict, old: Tensor, new: Tensor) -> tuple[tuple, dict]:
    """The call's arguments with `new` wherever `old` was."""
    return tuple(new if x is old else x for x in args), {k: new if x is old else x for k, x in kwargs.items()}


def apply_by_rows(h: Tensor, parts: list, f: Callable) -> Tensor:
    """h with f(method, h[rows], rows) in the place of the rows of each part (method, rows); differentiable."""
    for method, rows in parts:
        at = rows.to(h.device)
        h = h.index_copy(0, at, f(method, h.index_select(0, at), at).to(h.dtype))
    return h


def map_matching(values: list, f: Callable[[list[Tensor]], Tensor]) -> object:
    """The structure that several outputs have in common, with f of the tensors that stand at one place of it; other things as in the first."""
    one = values[0]
    if isinstance(one, Tensor):
        return f(values)
    if isinstance(one, Mapping):
        return type(one)(**{k: map_matching([v[k] for v in values], f) for k in one})
    if isinstance(one, (tuple, list)):
        found = [map_matching(list(v), f) for v in zip(*values, strict=True)]
        return type(one)(*found) if is_namedtuple(one) else type(one)(found)
    return one


def join_rows(values: list, rows: list, size: int, tokens: int = 1) -> object:
    """The same structure as every value, with the given rows from each; `tokens` is the dimension that counts tokens, 1 or 0, rows are the other."""
    d = 1 - tokens

    def pick(found: list[Tensor]) -> Tensor:
        out = found[0]
        if out.ndim <= d or out.shape[d] != size:
            return out
        for v, r in zip(found[1:], rows[1:], strict=True):
            out = out.index_copy(d, r.to(out.device), v.index_select(d, r.to(v.device)))
        return out

    return map_matching(values, pick)
