"""One module's call where the rows of a batch have adapters of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftlab.core.base import Base, call_through, run_chain, split_first_input
from peftlab.core.chain import ActiveChain, Route, RoutedChains, StandIn
from peftlab.core.method import Method
from peftlab.core.site import Site
from peftlab.core.stack import AdapterStack
from peftlab.model.walk import original_class
from peftlab.parts import hidden_state


def run_routed(host: nn.Module, stack: AdapterStack, routed: RoutedChains, args: tuple, kwargs: dict):
    """The host's call with a batch whose rows have links of their own."""
    size = _batch_size(host, routed.route, args, kwargs)
    k = len(range(size // routed.route.rows))  # a number to torch.compile too, which a size need not be
    parts = [(links, _rows_of_batch(rows, k)) for links, rows in routed.parts]
    if len(parts) == 1 and not routed.within:
        return run_chain(host, stack.read, parts[0][0], args, kwargs)
    if isinstance(host, nn.Embedding):
        args, kwargs = _for_each_row(size, routed.route.dim, *split_first_input(args, kwargs))
    if routed.within:
        call = functools.partial(_run_once_per_group, host, routed, parts, size)
    elif any(links.weights for links, _ in parts):
        call = functools.partial(_run_grouped, host, stack, routed.route.dim, parts, size)
    else:
        call = functools.partial(call_through, host, ())
    return _surrounding_calls(host, call, parts, routed.route)(args, kwargs)


def _rows_of_batch(rows: tuple[int, ...], k: int) -> list[int]:
    """Rows of the batch, for entries that cover k rows each."""
    return [r * k + i for r in rows for i in range(k)]


_INPUT_NAMES = ("hidden_states", "input_ids", "inputs_embeds", "input", "x", "query", "pixel_values")


def batch_dimension(host: nn.Module, route: Route) -> int:
    """The batch's dimension in the host's input and first output."""
    told = own_batch_dimension(host)
    return route.dim if told is None else told


def own_batch_dimension(host: nn.Module) -> int | None:
    """The same where one of torch's own modules says it, one of several layers by the first."""
    layer = host.layers[0] if isinstance(host, (nn.TransformerEncoder, nn.TransformerDecoder)) and len(host.layers) else host
    teller = getattr(layer, "self_attn", layer) if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) else layer
    return (0 if teller.batch_first else 1) if isinstance(teller, (nn.RNNBase, nn.MultiheadAttention)) else None


def _batch_size(host: nn.Module, route: Route, args: tuple, kwargs: dict) -> int:
    """The rows of the batch; at least one a route's entry (ids of one row, as of positions, are the same for all)."""
    named_first = [kwargs[k] for k in _INPUT_NAMES if k in kwargs]
    tensors = [t for t in [*args, *named_first, *kwargs.values()] if isinstance(t, Tensor)]
    x, dim = tensors[0] if tensors else None, batch_dimension(host, route)
    if x is None or x.ndim <= dim:
        raise ValueError(f"a {original_class(host).__name__} was called without a batch inside route(...): its rows cannot be told apart")
    if isinstance(host, nn.Embedding) and x.ndim == 1:
        raise ValueError(
            f"an adapted embedding got ids of shape {tuple(x.shape)} inside route(...), which may be positions for all rows or one token of each: "
            "give ids a batch dimension, as in ids[None]"
        )
    size = x.shape[dim]
    if size % route.rows and not (size == 1 and isinstance(host, nn.Embedding)):
        raise ValueError(
            f"a {original_class(host).__name__} got {tuple(x.shape)} inside route(...), where dimension {dim} has no multiple of the {route.rows} "
            "rows that were named. Name one adapter a row of the batch; batch_dim= says which dimension counts them."
        )
    return route.rows if size == 1 else size


def _for_each_row(size: int, dim: int, ids: Tensor, rest: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The call of an embedding with ids for each row, also where they are the same for all."""
    return (ids.expand(*ids.shape[:dim], size, *ids.shape[dim + 1 :]), *rest), kwargs


def _run_once_per_group(host: nn.Module, routed: RoutedChains, parts: list, size: int, args: tuple, kwargs: dict):
    """Weights that are read have one value a call: the module runs once a group, and each row is taken from the run that is its own."""
    if isinstance(host, nn.modules.batchnorm._BatchNorm) and host.training and host.track_running_stats:
        raise ValueError("a batch norm in training mode mixes the rows of a batch: they cannot have different adapters")
    for value in (*args, *kwargs.values()) if len(parts) > 1 else ():
        if not _keeps_nothing(value):
            raise ValueError(
                f"the adapted weights of this {original_class(host).__name__} are read, so that it runs once a group of rows, and it was given a "
                f"{type(value).__name__}, which every run would write to. In transformers: use_cache=False."
            )
    dim, outs = batch_dimension(host, routed.route), []
    try:
        for i in range(len(parts)):
            for s, links in routed.within:
                s.chosen = links[i]
            outs.append(call_through(host, (), args, kwargs))
    finally:
        for s, _ in routed.within:
            s.chosen = None
    pick = functools.partial(_joined_groups, rows=[rows for _, rows in parts], size=size, host=host)
    if isinstance(host, nn.RNNBase):  # the last states have the batch second whatever the layout
        return (pick([o[0] for o in outs], dim=dim), pick([o[1] for o in outs], dim=1))
    if isinstance(host, nn.MultiheadAttention):
        return (pick([o[0] for o in outs], dim=dim), pick([o[1] for o in outs], dim=0))
    return pick(outs, dim=dim)


def _keeps_nothing(value) -> bool:
    """Whether a call cannot keep anything in this argument."""
    if isinstance(value, (tuple, list)):
        return all(_keeps_nothing(v) for v in value)
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _joined_groups(values: list, rows: list[list[int]], size: int, dim: int, host: nn.Module):
    """The same structure as every value, with each group's rows from its own."""

    def pick(found: list[Tensor]) -> Tensor:
        if found[0].ndim <= dim or found[0].shape[dim] != size:
            kind, shape = original_class(host).__name__, tuple(found[0].shape)
            raise ValueError(f"a {kind} gave {shape} inside route(...), in which the {size} rows of the batch are not seen")
        return _in_batch_order([v.index_select(dim, _index_tensor(r, v)) for v, r in zip(found, rows, strict=True)], rows, dim)

    return hidden_state.map_matching(values, pick)


def _index_tensor(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def _in_batch_order(pieces: list[Tensor], rows: list[list[int]], dim: int) -> Tensor:
    """Pieces of a batch in the batch's own order."""
    whole, order = torch.cat(pieces, dim), _joint_rows(rows)
    if order == sorted(order):
        return whole
    return whole.index_select(dim, _index_tensor(sorted(range(len(order)), key=order.__getitem__), whole))


def _joint_rows(rows: list[list[int]]) -> list[int]:
    return [r for part in rows for r in part]


def _run_grouped(host: nn.Module, stack: AdapterStack, dim: int, parts: list, size: int, args: tuple, kwargs: dict) -> Tensor:
    """A surrounded layer: each group of rows runs its own methods; those share one run of the frozen layer."""
    x, rest, kwargs = split_first_input(args, kwargs)
    rows = [r for _, r in parts]
    order = _joint_rows(rows)
    if order != sorted(order):
        x = x.index_select(dim, _index_tensor(order, x))
    sizes = [len(r) for r in rows]
    frozen = _FrozenOutput(host, (x, *rest), kwargs, sizes, dim)
    outs = []
    for i, ((links, _), piece) in enumerate(zip(parts, x.split(sizes, dim), strict=True)):
        known = _KnownOutput(host, frozen, i, piece)
        below = (known, known)
        outs.append(run_chain(host, stack.read, ActiveChain((below, *links.weights), ()) if links.weights else ActiveChain((), (below,)), (piece, *rest), kwargs))
    return _in_batch_order(outs, rows, dim)


class _FrozenOutput:
    """The frozen layer's output for each group of rows, computed for all of them when one is first asked for."""

    def __init__(self, host: nn.Module, args: tuple, kwargs: dict, sizes: list[int], dim: int):
        self.host, self.args, self.kwargs, self.sizes, self.dim, self.pieces = host, args, kwargs, sizes, dim, None

    def piece(self, group: int) -> Tensor:
        if self.pieces is None:
            self.pieces = call_through(self.host, (), self.args, self.kwargs).split(self.sizes, self.dim)
        return self.pieces[group]


class _KnownOutput(StandIn):
    """The frozen layer below a group's methods: its output is known for the very rows that the group was given."""

    def __init__(self, host: nn.Module, frozen: _FrozenOutput, group: int, x: Tensor):
        self.host, self.frozen, self.group, self.x = host, frozen, group, x

    def __call__(self, base: Base, x: Tensor, *args, **kwargs) -> Tensor:
        return self.frozen.piece(self.group) if x is self.x else base(x, *args, **kwargs)


class _CallBelow(StandIn):
    """A function in the place of what lies below a surrounding method, and the methods of each call that it goes through."""

    def __init__(self, call: Callable, acting: tuple[list[Method], ...]):
        self.call, self.acting = call, acting

    def __call__(self, base: Base, *args, **kwargs):
        return self.call(args, kwargs)


def _surrounding_calls(host: nn.Module, call: Callable, parts: list[tuple[ActiveChain, list[int]]], route: Route) -> Callable:
    """The calls that surround the host, outermost last: at each depth those of one class run together, since their rows are disjoint."""
    done: tuple[list[Method], ...] = ()
    for depth in range(max(len(links.calls) for links, _ in parts)):
        if route.dim:
            raise ValueError(f"batch_dim={route.dim}: methods that surround a call have the batch first")
        level: dict[type, dict[int, tuple[Site, Method, list[int]]]] = {}
        for links, rows in parts:
            if len(links.calls) > depth:
                site, m = links.calls[depth]
                level.setdefault(type(m), {}).setdefault(id(m), (site, m, []))[2].extend(rows)
        for cls, acting in level.items():
            site = next(iter(acting.values()))[0]
            call = functools.partial(_call_level, cls, site, _CallBelow(call, done), [(m, torch.tensor(rows)) for _, m, rows in acting.values()])
            done = (*done, [m for _, m, _ in acting.values()])
    return call


def _call_level(cls: type[Method], site: Site, below: _CallBelow, parts: list[tuple[Method, Tensor]], args: tuple, kwargs: dict):
    return cls.routed(Base(site, ((below, below),), None), parts, *args, **kwargs)
