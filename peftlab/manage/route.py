"""Every row of a batch its own adapters: `with route(model, ["fr", None, "de"]):`.

A layer whose call is surrounded gets its rows sorted by what acts on them; the frozen call runs once for all of them where the
methods ask for no more than its output. A module whose weights are read runs once for each group of rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from peftlab import host as hosts
from peftlab.host import CHILD, Adapted, Link, Links, Route, Routed, Site, Stack, bare, stacks
from peftlab.method import Base, Method
from peftlab.parts import outputs
from peftlab.sites import READERS, Model, ensure_module
from peftlab.wrap import named, outside_disabled, survey


@contextlib.contextmanager
def route(model: nn.Module, names: Iterable[str | Iterable[str] | None], *, batch_dim: int = 0) -> Iterator[nn.Module]:
    """Inside the block, row i of every batch has the adapters `names[i]` (a name, several, or None) and no others.

    Outputs and gradients equal those of running the rows one by one, for every method. A batch of k * len(names) rows gives each
    entry k rows in succession, as beam search and flattened tokens have them.

    Args:
        names: one entry a row of the batch; which adapters are active outside the block does not matter.
        batch_dim: the dimension of the layers' inputs that counts the rows (1 for models with the sequence first).

    Raises:
        ValueError: for unknown names, merged adapters, adapters trained in place, and methods that cannot be told apart by row,
            among them those around a call whose module has the sequence before the batch, where they do not know the layout.
            During the block, a layer whose batch does not have that many rows raises with its path.
    """
    found, there = survey(ensure_module(model))
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"batch_dim={batch_dim!r}: the number of a dimension, counted from 0")
    wanted = _rows(names, there)
    outside_disabled(model, found)
    asked = {n for row in wanted for n in row}
    _refuse(found, asked)
    _refuse_sequence_first(bare(model), found, asked)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(wanted):
        groups.setdefault(row, []).append(i)
    chosen = Route(len(wanted), tuple((g, tuple(rows)) for g, rows in groups.items()), batch_dim, run)
    before = [(s, s.route, s.within) for _, _, s in found]
    lent = _boundaries(bare(model), found)
    try:
        for _, _, s in stacks(model):
            s.route = chosen
        for _, _, s in stacks(model):
            s.refresh()
        yield model
    finally:
        for host in lent:
            hosts.swap_out(host)
        for s, old, within in before:
            s.route, s.within = old, within
            s.made = {}
            s.refresh()


def _rows(names: object, there: list[str]) -> list[tuple[str, ...]]:
    """The adapters of each row, in stacking order."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"names={names!r}: one entry a row of the batch, each a name, a list of names, or None")
    rows = [() if row is None else tuple(named(there, row)) for row in names]
    if not rows:
        raise ValueError("names is empty: one entry a row of the batch")
    return rows


def _refuse(found: list[tuple[str, nn.Module, Stack]], wanted: set[str]) -> None:
    for path, _, s in found:
        if s.merged:
            raise ValueError(f"{s.merged[0]!r} is merged into {path!r}, where it acts on every row: unmerge it first")
        for n, pairs in s.sites.items():
            for site, m in pairs:
                if m.in_place:
                    raise ValueError(f"{n!r} is trained in place at {site.path!r}: no row is without it")
                if n in wanted and m.surrounds() and type(m).routed.__func__ is Method.routed.__func__:
                    raise ValueError(f"{m.recipe.label} at {site.path!r} changes a call as a whole: its rows cannot be told apart")


def _refuse_sequence_first(root: nn.Module, found: list[tuple[str, nn.Module, Stack]], wanted: set[str]) -> None:
    """Methods around a call take the first dimension for the batch's, unless they know the layout themselves."""
    pairs = [(host, site, m) for _, host, s in found for n, here in s.sites.items() if n in wanted for site, m in here]
    pairs = [(host, site, m) for host, site, m in pairs if m.surrounds() and not m.any_layout]
    parents = Model.of(root).parents if pairs else {}
    for host, site, m in pairs:
        above = [host]
        while above:
            top = above.pop()
            dim = _told_dim(top)
            if dim == 1:
                raise ValueError(
                    f"{m.recipe.label} at {site.path!r} takes rows from the first dimension, and its {hosts.original_class(top).__name__} has the sequence "
                    "there (batch_first=False): build the model with batch_first=True, or run the rows one by one"
                )
            above += parents.get(id(top), ()) if dim is None else ()


def _boundaries(root: nn.Module, found: list[tuple[str, nn.Module, Stack]]) -> list[nn.Module]:
    """Say which module runs once a group for the weights that are read; returns the modules that had to be made adaptable for it."""
    read = [(host, s) for _, host, s in found if s.read]
    if not read:
        return []
    parents = Model.of(root).parents
    within: dict[int, tuple[nn.Module, list[Stack]]] = {}
    for host, s in read:
        top = host
        while up := [p for p in _above(parents, top) if isinstance(p, (*READERS, nn.TransformerEncoder))]:
            top = up[0]
        sources = [s, *(h._modules[CHILD] for h, _ in s.alias.values())]
        within.setdefault(id(top), (top, []))[1].extend(t for t in sources if t.sites)
    lent = [top for top, _ in within.values() if not isinstance(top, Adapted)]
    for top, read_here in within.values():
        stack = top._modules.get(CHILD) or hosts.swap_in(top, False, ())
        stack.within = tuple(dict.fromkeys(read_here))
    return lent


def _above(parents: dict[int, list[nn.Module]], m: nn.Module) -> list[nn.Module]:
    """The modules that hold `m`, lists of modules apart."""
    return [q for p in parents.get(id(m), ()) for q in ([p] if not isinstance(p, nn.ModuleList) else _above(parents, p))]


def run(host: nn.Module, stack: Stack, routed: Routed, args: tuple, kwargs: dict):
    """The host's call with a batch whose rows have links of their own."""
    size = _batch_size(host, routed.route, args, kwargs)
    k = len(range(size // routed.route.rows))  # a number to torch.compile too, which a size need not be
    parts = [(links, _each(rows, k)) for links, rows in routed.parts]
    if len(parts) == 1 and not routed.within:
        return hosts.run_links(host, stack, parts[0][0], args, kwargs)
    if isinstance(host, nn.Embedding):
        args, kwargs = _for_each_row(size, routed.route.dim, *hosts.first_input(args, kwargs))
    if routed.within:
        call = functools.partial(_whole, host, routed, parts, size)
    elif any(links.weights for links, _ in parts):
        call = functools.partial(_sorted, host, stack, routed.route.dim, parts, size)
    else:
        call = functools.partial(hosts.call, host, ())
    return _around(host, call, parts, routed.route)(args, kwargs)


def _each(rows: tuple[int, ...], k: int) -> list[int]:
    """Rows of the batch, for entries that cover k rows each."""
    return [r * k + i for r in rows for i in range(k)]


_INPUTS = ("hidden_states", "input_ids", "inputs_embeds", "input", "x", "query", "pixel_values")


def _dim(host: nn.Module, route: Route) -> int:
    """The batch's dimension in the host's input and first output."""
    told = _told_dim(host)
    return route.dim if told is None else told


def _told_dim(host: nn.Module) -> int | None:
    """The same where one of torch's own modules says it, one of several layers by the first."""
    layer = host.layers[0] if isinstance(host, (nn.TransformerEncoder, nn.TransformerDecoder)) and len(host.layers) else host
    teller = getattr(layer, "self_attn", layer) if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) else layer
    return (0 if teller.batch_first else 1) if isinstance(teller, (nn.RNNBase, nn.MultiheadAttention)) else None


def _batch_size(host: nn.Module, route: Route, args: tuple, kwargs: dict) -> int:
    """The rows of the batch; at least one a route's entry (ids of one row, as of positions, are the same for all)."""
    named_first = [kwargs[k] for k in _INPUTS if k in kwargs]
    tensors = [t for t in [*args, *named_first, *kwargs.values()] if isinstance(t, Tensor)]
    x, dim = tensors[0] if tensors else None, _dim(host, route)
    if x is None or x.ndim <= dim:
        raise ValueError(f"a {hosts.original_class(host).__name__} was called without a batch inside route(...): its rows cannot be told apart")
    if isinstance(host, nn.Embedding) and x.ndim == 1:
        raise ValueError(
            f"an adapted embedding got ids of shape {tuple(x.shape)} inside route(...), which may be positions for all rows or one token of each: "
            "give ids a batch dimension, as in ids[None]"
        )
    size = x.shape[dim]
    if size % route.rows and not (size == 1 and isinstance(host, nn.Embedding)):
        raise ValueError(
            f"a {hosts.original_class(host).__name__} got {tuple(x.shape)} inside route(...), where dimension {dim} has no multiple of the {route.rows} "
            "rows that were named. Name one adapter a row of the batch; batch_dim= says which dimension counts them."
        )
    return route.rows if size == 1 else size


def _for_each_row(size: int, dim: int, ids: Tensor, rest: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The call of an embedding with ids for each row, also where they are the same for all."""
    return (ids.expand(*ids.shape[:dim], size, *ids.shape[dim + 1 :]), *rest), kwargs


def _whole(host: nn.Module, routed: Routed, parts: list, size: int, args: tuple, kwargs: dict):
    """Weights that are read have one value a call: the module runs once a group, and each row is taken from the run that is its own."""
    if isinstance(host, nn.modules.batchnorm._BatchNorm) and host.training and host.track_running_stats:
        raise ValueError("a batch norm in training mode mixes the rows of a batch: they cannot have different adapters")
    for value in (*args, *kwargs.values()) if len(parts) > 1 else ():
        if not _is_plain(value):
            raise ValueError(
                f"the adapted weights of this {hosts.original_class(host).__name__} are read, so that it runs once a group of rows, and it was given a "
                f"{type(value).__name__}, which every run would write to. In transformers: use_cache=False."
            )
    dim, outs = _dim(host, routed.route), []
    try:
        for i in range(len(parts)):
            for s, links in routed.within:
                s.chosen = links[i]
            outs.append(hosts.call(host, (), args, kwargs))
    finally:
        for s, _ in routed.within:
            s.chosen = None
    pick = functools.partial(_joined, rows=[rows for _, rows in parts], size=size, host=host)
    if isinstance(host, nn.RNNBase):  # the last states have the batch second whatever the layout
        return (pick([o[0] for o in outs], dim=dim), pick([o[1] for o in outs], dim=1))
    if isinstance(host, nn.MultiheadAttention):
        return (pick([o[0] for o in outs], dim=dim), pick([o[1] for o in outs], dim=0))
    return pick(outs, dim=dim)


def _is_plain(value) -> bool:
    """Whether a call cannot keep anything in this argument."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _joined(values: list, rows: list[list[int]], size: int, dim: int, host: nn.Module):
    """The same structure as every value, with each group's rows from its own."""

    def pick(found: list[Tensor]) -> Tensor:
        if found[0].ndim <= dim or found[0].shape[dim] != size:
            kind, shape = hosts.original_class(host).__name__, tuple(found[0].shape)
            raise ValueError(f"a {kind} gave {shape} inside route(...), in which the {size} rows of the batch are not seen")
        return _back([v.index_select(dim, _index(r, v)) for v, r in zip(found, rows, strict=True)], rows, dim)

    return outputs.matched(values, pick)


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def _back(pieces: list[Tensor], rows: list[list[int]], dim: int) -> Tensor:
    """Pieces of a batch in the batch's own order."""
    whole, order = torch.cat(pieces, dim), _joint(rows)
    if order == sorted(order):
        return whole
    return whole.index_select(dim, _index(sorted(range(len(order)), key=order.__getitem__), whole))


def _joint(rows: list[list[int]]) -> list[int]:
    return [r for part in rows for r in part]


def _sorted(host: nn.Module, stack: Stack, dim: int, parts: list, size: int, args: tuple, kwargs: dict) -> Tensor:
    """A surrounded layer: each group of rows runs its own methods; those share one run of the frozen layer."""
    x, rest, kwargs = hosts.first_input(args, kwargs)
    rows = [r for _, r in parts]
    order = _joint(rows)
    if order != sorted(order):
        x = x.index_select(dim, _index(order, x))
    sizes = [len(r) for r in rows]
    frozen = _Frozen(host, (x, *rest), kwargs, sizes, dim)
    outs = []
    for i, ((links, _), piece) in enumerate(zip(parts, x.split(sizes, dim), strict=True)):
        known = _Known(host, frozen, i, piece)
        below = (known, known)
        outs.append(hosts.run_links(host, stack, Links((below, *links.weights), ()) if links.weights else Links((), (below,)), (piece, *rest), kwargs))
    return _back(outs, rows, dim)


class _Frozen:
    """The frozen layer's output for each group of rows, computed for all of them when one is first asked for."""

    def __init__(self, host: nn.Module, args: tuple, kwargs: dict, sizes: list[int], dim: int):
        self.host, self.args, self.kwargs, self.sizes, self.dim, self.pieces = host, args, kwargs, sizes, dim, None

    def piece(self, group: int) -> Tensor:
        if self.pieces is None:
            self.pieces = hosts.call(self.host, (), self.args, self.kwargs).split(self.sizes, self.dim)
        return self.pieces[group]


class _Known(Link):
    """The frozen layer below a group's methods: its output is known for the very rows that the group was given."""

    def __init__(self, host: nn.Module, frozen: _Frozen, group: int, x: Tensor):
        self.host, self.frozen, self.group, self.x = host, frozen, group, x

    def __call__(self, base: Base, x: Tensor, *args, **kwargs) -> Tensor:
        return self.frozen.piece(self.group) if x is self.x else base(x, *args, **kwargs)


class _Below(Link):
    """A function in the place of what lies below a surrounding method, and the methods of each call that it goes through."""

    def __init__(self, call: Callable, acting: tuple[list[Method], ...]):
        self.call, self.acting = call, acting

    def __call__(self, base: Base, *args, **kwargs):
        return self.call(args, kwargs)


def _around(host: nn.Module, call: Callable, parts: list[tuple[Links, list[int]]], route: Route) -> Callable:
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
            call = functools.partial(_level, cls, site, _Below(call, done), [(m, torch.tensor(rows)) for _, m, rows in acting.values()])
            done = (*done, [m for _, m, _ in acting.values()])
    return call


def _level(cls: type[Method], site: Site, below: _Below, parts: list[tuple[Method, Tensor]], args: tuple, kwargs: dict):
    return cls.routed(Base(site, ((below, below),), None), parts, *args, **kwargs)
