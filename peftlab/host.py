"""How a method lives inside a module: class swap, the stack of adapters, and the two ways of being seen (call and read).

Attaching changes a module's class to a cached subclass of it and adds one child, `peftlab`. The object, its path, its
`isinstance`, its tensors and its `state_dict` keys stay what they were.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftlab.method import Base, Method
from peftlab.model import layers
from peftlab.model.containers import hiding
from peftlab.model.layers import Rule

CHILD = "peftlab"  # the one child module that an adapted module gains
STASH = "stash_"  # prefix of the buffers that keep a merged module's frozen bits


@dataclass(eq=False)
class Site:
    """One place where a method can sit: a parameter of a module (or a part of it), or a module's call.

    `rows` picks output features of a fused matrix, `expert` one matrix of a 3-D parameter, `transposed` says that the raw
    matrix is (n_in, n_out). `key` is the path below `host.peftlab.<adapter>` ("" for a layer's own weight).
    """

    host: nn.Module
    path: str
    key: str = ""
    kind: str = "matrix"  # matrix | tensor | module
    param: str | None = "weight"
    bias: str | None = None
    rule: Rule = layers.MATRIX
    rows: slice | Tensor | None = None
    bias_rows: slice | Tensor | None = None  # where the bias's part differs from the weight's (None: as `rows`)
    expert: int | None = None
    transposed: bool = False
    read_only: bool = False  # the parent reads the weight without calling the host
    names: tuple[str, ...] = ()  # every path that a pattern may use for it
    explicit: bool = False  # only a pattern that spells its last component means it
    unstated: bool = False  # a parameter with three dimensions of which nobody said which is which
    n_out: int = 0
    n_in: int = 0
    shape: tuple[int, ...] = ()
    tied: tuple = field(default=(), repr=False)  # (host, parameter) pairs that share the storage
    shared: bool = False  # ... and that are to see the same change

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dense(self) -> bool:
        """Whether only the definition serves: one tensor of several, or a part of a layer that does not act on features alone."""
        return self.kind == "tensor" or (not (self.rule.pointwise and self.rule.call) if self.rows is not None else self.key != "")

    @property
    def has_bias(self) -> bool:
        return self.bias is not None and self.host._parameters.get(self.bias) is not None

    @property
    def bias_part(self) -> slice | Tensor | None:
        return self.rows if self.bias_rows is None else self.bias_rows

    @property
    def raw_tensor(self) -> Tensor | None:
        return None if self.param is None else self.host._parameters.get(self.param)

    @property
    def dtype(self) -> torch.dtype:
        W = layers.outline(self.host, self.param)
        if self.kind == "module":
            W = next((p for p in self.host.parameters() if p.is_floating_point()), None)
        return W.dtype if W is not None and W.is_floating_point() else torch.float32

    @property
    def device(self) -> torch.device:
        W = self.raw_tensor
        if W is None:
            W = next(self.host.parameters(), None)
        if W is None:
            W = next(self.host.buffers(), None)
        return torch.device("cpu") if W is None else W.device

    # ---- raw <-> canonical
    def part(self, raw: Tensor) -> Tensor:
        return raw if self.expert is None else raw[self.expert]

    def get(self, piece: Tensor) -> Tensor:
        """Raw piece -> what the method calls W."""
        if self.kind != "matrix":
            return piece
        W = piece.t() if self.transposed else self.rule.matrix(self.host, piece)
        return W if self.rows is None else W[self.rows]

    def put(self, piece: Tensor, W: Tensor) -> Tensor:
        """W back into (a new tensor of) the raw layout."""
        if self.kind != "matrix":
            return layers.keep_padding(self.host, W, piece) if self.param == "weight" else W
        if self.rows is not None:
            whole = piece.t() if self.transposed else self.rule.matrix(self.host, piece)
            W = _with_rows(whole, self.rows, W)
        return W.t() if self.transposed else self.rule.raw(self.host, W, piece)

    # ---- what Base needs
    def origin(self) -> Tensor:
        """The frozen tensor itself, canonical, whatever lies below and whatever is merged."""
        return self.get(self.part(frozen(self.host, self.param)))

    def read(self, links: tuple) -> Tensor:
        if self.rule is layers.OPAQUE:
            return self.rule.matrix(self.host, None)
        return self.get(self.part(effective(self.host, self.param, links)))

    def read_bias(self, links: tuple) -> Tensor | None:
        if not self.has_bias:
            return None
        b = effective(self.host, self.bias, links)
        rows = self.bias_part
        return b if rows is None else b[rows]

    def run(self, links: tuple, args: tuple, kwargs: dict):
        return call(self.host, links, args, kwargs)


def _with_rows(whole: Tensor, rows: slice | Tensor, part: Tensor) -> Tensor:
    dtype = torch.promote_types(whole.dtype, part.dtype)
    whole, part = whole.to(dtype), part.to(dtype)
    if isinstance(rows, slice):
        return torch.cat([whole[: rows.start], part, whole[rows.stop :]])
    return whole.index_copy(0, rows.to(whole.device), part)


class Links(NamedTuple):
    """The (site, method) pairs that act now: on the weights, in stacking order, and around the call.

    Inside `route` the rows of a batch have links of their own: then `routed` says which, and the first two are empty.
    """

    weights: tuple
    calls: tuple
    routed: Routed | None = None
    merged: tuple[str, ...] = ()  # what the tensors hold meanwhile


@dataclass(frozen=True, eq=False)
class Route:
    """Which adapters act on which rows of a batch: row indices by adapter names; `dim` is the batch's dimension."""

    rows: int
    groups: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    dim: int
    run: Callable  # (host, stack, routed, args, kwargs) -> the host's output


class Routed(NamedTuple):
    """A route as one module sees it: the links of each group of rows, and the stacks that are read while the module runs."""

    route: Route
    parts: tuple[tuple[Links, tuple[int, ...]], ...]
    within: tuple[tuple[Stack, tuple[Links, ...]], ...]


NOTHING = Links((), ())
REMEMBERED = 256  # switches that a checkpointed forward may lie back


class Stack(nn.Module):
    """The adapters of one module, in stacking order; lives at `<host>.peftlab`."""

    # Its state is plain data and its submodules go through `_modules`: nn.Module's search for parameters in every value that is
    # set would add up over thousands of hosts.
    __setattr__ = object.__setattr__

    sites: dict[str, list[tuple[Site, Method]]]
    active: tuple[str, ...]
    merged: tuple[str, ...]
    links: Links
    lossy: tuple[str, ...]  # merged with keep=False: the tensors hold them for good
    silent: bool  # inside `disabled`
    read: bool  # weights are seen through properties instead of through the call
    made: dict[tuple, Links]  # links by what is active and merged
    history: deque[tuple[int, Links]]  # what acted until when, for forwards that backward will run again
    lost: int  # until when it is forgotten what acted
    alias: dict[str, tuple[nn.Module, str]]  # tied parameters that follow another host's adapters
    onto: object  # what adapters are merged onto where the base is quantised
    untied: dict[str, nn.Parameter | None]  # tied parameters of which this end alone is adapted; what it shared, while it has its own
    unready: set[str]  # adapters built on meta whose start values are still to come
    fused: tuple[Stack, ...]  # stacks whose calls torch's fused kernel of this module would leave out
    route: Route | None  # inside `route`
    within: tuple[Stack, ...]  # inside `route`: the stacks whose weights are read while this module runs
    chosen: Links | None  # inside `route`: what acts on the rows that are being computed, for weights that are read

    def __init__(self, read: bool):
        super().__init__()
        self.sites, self.active, self.merged, self.lossy = {}, (), (), ()
        self.links, self.made, self.history, self.lost = NOTHING, {}, deque(maxlen=REMEMBERED), 0
        self.silent, self.read = False, read
        self.alias, self.untied, self.unready, self.onto = {}, {}, set(), None
        self.fused, self.route, self.within, self.chosen = (), None, (), None

    def __getstate__(self) -> dict:
        """A copy made inside `disabled` is a reference without adapters, for good; inside `route` rows have adapters of a batch that it will not see."""
        if self.route is not None:
            raise ValueError("inside `with route(model, ...)` a model cannot be copied or pickled: the copy would never leave the block. Copy it before.")
        return self.__dict__

    # ---- adapters
    def add(self, name: str, pairs: list[tuple[Site, Method]]) -> None:
        self.sites[name] = pairs
        self.made = {}
        for site, method in pairs:
            method.__dict__.update(site=site, shapes={k: tuple(t.shape) for k, t in saved_tensors(method).items()})
            if site.key == "":
                self._modules[name] = method
                continue
            node = self
            *parents, last = [name, *site.key.split(".")]
            for part in parents:
                node = node._modules.setdefault(part, nn.Module())
                node.training = self.training
            node._modules[last] = method
        self.set_active((*self.active, name))

    def drop(self, name: str) -> None:
        del self.sites[name]
        self.made = {}
        self._modules.pop(name, None)
        self.unready.discard(name)
        self.merged = tuple(n for n in self.merged if n != name)
        self.lossy = tuple(n for n in self.lossy if n != name)
        self.set_active(tuple(n for n in self.active if n != name))
        self.history.clear()
        self.made = {}

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(self.sites)

    def set_active(self, names: tuple[str, ...]) -> None:
        self.active = tuple(n for n in self.sites if n in names)
        self.refresh()

    def refresh(self) -> None:
        """Recompute what acts now; remember what acted before, for checkpointed forwards that backward will run again."""
        key = () if self.silent else (self.active, self.merged, self.route)
        links = self.made.get(key)
        if links is None:
            links = self.made[key] = NOTHING if self.silent else self._links(self.active) if self.route is None else self._routed(self.route)
        if links is not self.links:
            self._remember(torch._C._autograd._get_sequence_nr(), links)
            self.links = links

    def _links(self, names: tuple[str, ...]) -> Links:
        acting = [p for n in self.sites if n in names and n not in self.merged for p in self.sites[n]]
        weights = tuple(p for p in acting if not p[1].surrounds() and not p[1].in_place)
        return Links(weights, tuple(p for p in acting if p[1].surrounds()), None, self.merged) if acting or self.merged else NOTHING

    def _routed(self, route: Route) -> Links:
        every = [self._links(names) for names, _ in route.groups]
        within = tuple((s, tuple(s._links(names) for names, _ in route.groups)) for s in self.within)
        same = [next(i for i in range(len(every)) if every[i] == links and all(g[i] == g[j] for _, g in within)) for j, links in enumerate(every)]
        first = sorted(set(same))
        if not any(any(links[:2]) for links in every) and not within:
            return every[0]
        parts = tuple((every[i], tuple(r for j, (_, rows) in enumerate(route.groups) if same[j] == i for r in rows)) for i in first)
        return Links((), (), Routed(route, parts, tuple((s, tuple(g[i] for i in first)) for s, g in within)))

    def _remember(self, now: int, new: Links) -> None:
        since = self.history[-1][0] if self.history else -1
        if now == since:  # nothing was recorded for backward since the last switch, so what acted meanwhile is not needed
            if self.history[-1][1] is new:
                self.history.pop()
            return
        if len(self.history) == REMEMBERED:
            self.lost = self.history[0][0]
        self.history.append((now, self.links))

    def current(self) -> Links:
        if self.chosen is not None:
            return self.chosen
        if torch.compiler.is_compiling():
            return self.links
        if self.unready:
            self.materialise()
        # Inside backward a checkpointed block runs again: it must see the adapters of its first run, which the autograd node
        # that asks for it dates by its sequence number.
        if self.history and torch._C._current_graph_task_id() != -1:
            node = torch._C._current_autograd_node()
            if node is not None:
                return self._acted_at(node._sequence_nr())
        return self.links

    def _acted_at(self, moment: int) -> Links:
        if moment < self.lost:
            raise RuntimeError(f"adapters were switched more than {REMEMBERED} times between a checkpointed forward and its backward")
        links = next((links for until, links in self.history if moment < until), self.links)
        if links.merged != (() if self.silent else self.merged):
            raise RuntimeError("adapters were merged or unmerged between a checkpointed forward and its backward: its tensors are no longer there")
        return links

    def forward(self, x, *args, **kwargs):
        return x  # for hosts that call all their children in turn, as nn.Sequential does

    # ---- meta -> real
    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.unready:
            self.materialise(weights_known=False)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.unready:
            self.materialise()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if any(k.startswith(f"{prefix}{n}.") for n in self.unready for k in state_dict):
            self.materialise()  # before the caller's values come over the start values, not after
        super()._load_from_state_dict(state_dict, prefix, *args)

    def materialise(self, weights_known: bool = True) -> None:
        """Give adapters that were built on meta their start values once their tensors are real (`to_empty`, `assign=True`)."""
        for name in sorted(self.unready):
            done = [method.recipe.fill(site, method, weights_known) for site, method in self.sites[name]]
            if all(done):
                self.unready.discard(name)

    def extra_repr(self) -> str:
        return f"active={list(self.active)}, merged={list(self.merged)}, {'read' if self.read else 'call'}"


@dataclass(eq=False)
class Recipe:
    """What made an adapter's method: enough to make its start values again, and to write them into a file's header."""

    cls: type[Method]
    label: str  # registry name, or module:class
    hyper: dict
    name: str
    seed: int
    common: nn.Module | None = None
    make_common: Callable[[], nn.Module] | None = None  # while `common` was built on meta

    def build(self, site: Site, below: tuple = (), device: str = "cpu") -> Method:
        """The method with its start values, drawn on CPU from (seed, adapter, path): the same on every process and device."""
        with torch.no_grad(), on_device(device):
            if device != "meta":
                torch.default_generator.manual_seed(site_seed(self.seed, self.name, site.path))
            method = self.cls(Base(site, below, self.common), **self.hyper)
        if isinstance(method.__dict__.get("s"), float):
            # A tensor can be changed (`rescale`) without compiling again; a float64 of no dimensions promotes nothing.
            method.__dict__["s"] = torch.tensor(method.s, dtype=torch.float64, device="cpu")
        method.__dict__.update(recipe=self, site=site)
        note_declared(method)
        return method

    def fill(self, site: Site, method: Method, weights_known: bool) -> bool:
        """Write the start values into a method whose tensors were on meta; False while they cannot be known yet."""
        if site.device.type == "meta" or not self.fill_common(site.device, weights_known):
            return False
        if not weights_known and any(t.is_meta for t in [*method.parameters(), *method.buffers()]):
            return False
        with fenced_rng():
            try:
                fresh = self.build(site if weights_known else as_kind(site, Blind))
            except layers.NeedsWeight:
                return False
        fill_tensors(method, fresh, site.device)
        return True

    def fill_common(self, device: torch.device, weights_known: bool) -> bool:
        """The same for what the sites share."""
        if self.common is None or self.make_common is None:
            return True
        if not weights_known and any(t.is_meta for t in [*self.common.parameters(), *self.common.buffers()]):
            return False
        with fenced_rng():
            fill_tensors(self.common, self.make_common(), device)
        self.make_common = None
        return True


def note_declared(module: nn.Module) -> nn.Module:
    """Remember which of a new module's parameters its author declared as frozen (`requires_grad=False`): nothing may unfreeze them."""
    module.__dict__["declared_frozen"] = frozenset(k for k, p in module.named_parameters() if not p.requires_grad)
    return module


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a method, or of what its sites share, that may be trained."""
    return [p for k, p in module.named_parameters() if k not in module.__dict__.get("declared_frozen", ())]


@torch.no_grad()
def fill_tensors(old: nn.Module, new: nn.Module, device: torch.device) -> None:
    """Copy values into tensors that are there; give those still on meta real ones."""
    values = dict(new.named_parameters()) | dict(new.named_buffers())
    for path, m in old.named_modules():
        for table in (m._parameters, m._buffers):
            for k, t in table.items():
                if t is None:
                    continue
                value = values[f"{path}.{k}" if path else k]
                if not t.is_meta:
                    t.copy_(value)
                    continue
                value = value.detach().to(device, t.dtype)
                table[k] = nn.Parameter(value, requires_grad=t.requires_grad) if table is m._parameters else value


class Blind(Site):
    """A site whose weight is not to be looked at yet."""

    def read(self, links):
        raise layers.NeedsWeight(self.path)

    read_bias = read

    def origin(self):
        raise layers.NeedsWeight(self.path)


class Shape(Site):
    """A site of which only shapes are wanted: its tensors are on meta."""

    @property
    def device(self):
        return torch.device("meta")

    def read(self, links):
        if self.rule is layers.OPAQUE:
            return self.rule.matrix(self.host, None)
        size = (self.n_out, self.n_in) if self.kind == "matrix" else self.shape
        return torch.empty(size, dtype=self.dtype, device="meta")

    def read_bias(self, links):
        return torch.empty(self.n_out, dtype=self.dtype, device="meta") if self.has_bias else None

    def origin(self):
        return self.read(())


def on_device(device: str) -> contextlib.AbstractContextManager:
    """Makes `device` the default; nothing where it is so already, since the mode costs every torch call inside it."""
    return contextlib.nullcontext() if torch.get_default_device().type == device else torch.device(device)


def saved_tensors(m: nn.Module) -> dict[str, Tensor]:
    """What of a method or shared module is written to a file: parameters and persistent buffers."""
    if m._modules:
        return m.state_dict(keep_vars=True)
    kept = {k: b for k, b in m._buffers.items() if k not in m._non_persistent_buffers_set}
    return {k: t for k, t in (m._parameters | kept).items() if t is not None}


def as_kind(site: Site, kind: type[Site]) -> Site:
    """The same site seen as another kind of site."""
    return kind(**{f.name: getattr(site, f.name) for f in fields(site)})


class fenced_rng:  # noqa: N801 - a context manager used like a function
    """Leaves the global CPU generator and the default dtype as it found them."""

    def __enter__(self):
        self.state, self.dtype = torch.default_generator.get_state(), torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)

    def __exit__(self, *exc):
        torch.default_generator.set_state(self.state)
        torch.set_default_dtype(self.dtype)


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Thousands of new modules would have the cyclic collector walk the whole heap again and again: half of the time of a wrap."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def site_seed(seed: int, name: str, path: str) -> int:
    """A stable 63-bit seed (FNV-1a); Python's own hash differs between processes."""
    h = 0xCBF29CE484222325
    for byte in f"{seed}\0{name}\0{path}".encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h >> 1


# ---------------------------------------------------------------- effective tensors


def pristine(host: nn.Module, param: str) -> Tensor:
    """The frozen tensor, also while adapters are merged into the parameter."""
    stack = host._modules.get(CHILD)
    kept = None if stack is None else stack._buffers.get(STASH + param)
    return host._parameters[param] if kept is None else kept


def frozen(host: nn.Module, param: str) -> Tensor:
    """The values of the frozen tensor in its raw layout: `pristine`, or what its codes stand for."""
    raw = pristine(host, param)
    if raw.is_floating_point() or not isinstance(host, layers.Quantised):
        return raw
    stack = host._modules.get(CHILD)
    return host.peftlab_dense(param, {} if stack is None else {k.removeprefix(STASH): t for k, t in stack._buffers.items() if k.startswith(STASH)})


def effective(host: nn.Module, param: str, links: tuple, raw: Tensor | None = None) -> Tensor:
    """One parameter as the given links leave it, in its raw layout (dtype promoted, not yet cast back)."""
    W = layers.values(host, param) if raw is None else raw
    pieces = None  # the experts of a 3-D parameter, while consecutive links work on single ones
    for site, method in links:
        if site.param == param and method.has_weight():
            if site.expert is not None:
                pieces = list(W.unbind(0)) if pieces is None else pieces
                piece = pieces[site.expert]
                pieces[site.expert] = site.put(piece, method.weight(site.get(piece)))
                continue
            if pieces is not None:
                W, pieces = _stacked(pieces), None
            W = site.put(W, method.weight(site.get(W)))
        elif site.bias == param and site.expert is None and method.has_bias():
            rows = site.bias_part
            W = method.bias(W) if rows is None else _with_rows(W, rows, method.bias(W[rows]))
    return W if pieces is None else _stacked(pieces)


def _stacked(pieces: list[Tensor]) -> Tensor:
    dtype = functools.reduce(torch.promote_types, {p.dtype for p in pieces})
    return torch.stack([p.to(dtype) for p in pieces])


# ---------------------------------------------------------------- the call


def call(host: nn.Module, links: tuple, args: tuple, kwargs: dict):
    """Run the host with these links; the last one is outermost."""
    if not links:
        y = type(host)._original.forward(host, *args, **kwargs)
        if args and torch.is_grad_enabled() and not torch.compiler.is_compiling() and layers.is_opaque_linear(host) and cuts_gradient(args[0], y):
            raise RuntimeError(
                f"a {original_class(host).__name__} has no backward: through its frozen call no gradient reaches what lies below. Adapt layers above it "
                "alone, run what is below under torch.no_grad(), or use a layer whose call is differentiable."
            )
        return y
    site, method = links[-1]
    if method.on == "module":
        return method(Base(site, links[:-1], method.common), *args, **kwargs)
    x, rest, kwargs = first_input(args, kwargs)
    if method.surrounds():
        return method(Base(site, links[:-1], method.common), x, *rest, **kwargs)
    if rest or kwargs or any(s.dense for s, _ in links):
        return _defined(host, links, x, rest, kwargs)
    if site.rows is not None:
        return _by_parts(host, links, x)
    return method(Base(site, links[:-1], method.common), x)


def cuts_gradient(x, y) -> bool:
    """Whether an output has no way back to the input, which asks for a gradient."""
    if not (isinstance(x, Tensor) and x.requires_grad and isinstance(y, Tensor) and y.is_floating_point()):
        return False
    goal, todo, seen = x.grad_fn, [y.grad_fn], set()  # a bias that trains makes the output ask for a gradient, too
    while todo:
        node = todo.pop()
        if node is None or node in seen or node.name().endswith("WarnNotImplemented"):  # torch's own node for operators without a backward
            continue
        if node is goal or (goal is None and getattr(node, "variable", None) is x):
            return False
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
    return True


class Link:
    """What stands in a chain of links where a site and its method would, and is neither."""

    on, common = "module", None
    param = bias = expert = rows = None
    dense = False
    host: nn.Module

    def run(self, links: tuple, args: tuple, kwargs: dict):
        return call(self.host, links, args, kwargs)

    def has_weight(self) -> bool:
        return False

    has_bias = has_weight


class _Part(Link):
    """Some output features of what lies below; for the input `x` its whole output `y` is known."""

    def __init__(self, host: nn.Module, part: slice | Tensor, x: Tensor, y: Tensor):
        self.host, self.part, self.x, self.y = host, part, x, y

    def __call__(self, base: Base, x: Tensor) -> Tensor:
        y = self.y if x is self.x else base(x)
        return y[..., self.part] if isinstance(self.part, slice) else y.index_select(-1, self.part.to(y.device))


def _adapter(method: Method) -> str | None:
    """The adapter that a method belongs to; None for the probes of a calibration."""
    recipe = method.__dict__.get("recipe")
    return None if recipe is None else recipe.name


def _by_parts(host: nn.Module, links: tuple, x: Tensor) -> Tensor:
    """The parts of a fused projection that the uppermost adapter changes, each by its own fast path on its own output features."""
    first, name = len(links), _adapter(links[-1][1])
    while first and links[first - 1][0].rows is not None and _adapter(links[first - 1][1]) == name:
        first -= 1
    below, acting = links[:first], links[first:]
    y = call(host, below, (x,), {})
    done = []
    for site, method in acting:
        under = _Part(host, site.rows, x, y)
        done.append((site.rows, method(Base(site, (*below, (under, under)), method.common), x)))
    if any(isinstance(rows, Tensor) for rows, _ in done):
        every = [torch.arange(y.shape[-1])[rows] if isinstance(rows, slice) else rows for rows, _ in done]
        return y.index_copy(-1, torch.cat(every).to(y.device), torch.cat([part for _, part in done], -1))
    pieces, at = [], 0
    for rows, part in sorted(done, key=lambda d: d[0].start):
        pieces += [y[..., at : rows.start], part]
        at = rows.stop
    return torch.cat([*pieces, y[..., at:]], -1)


def first_input(args: tuple, kwargs: dict) -> tuple:
    """The layer's input, however it was passed, and what else was."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    for name in ("input", "x"):
        if name in kwargs:
            return kwargs.pop(name), (), kwargs
    raise TypeError("an adapted layer was called without input")


def _defined(host: nn.Module, links: tuple, x: Tensor, rest: tuple, kwargs: dict) -> Tensor:
    """The layer's operation on the effective tensors: what every fast path equals."""
    rule = layers.rule_of(host)
    W = rule.matrix(host, effective(host, rule.weight, links))
    b = host._parameters.get(rule.bias) if rule.bias else None
    b = b if b is None else effective(host, rule.bias, links)
    return rule.affine(host, W, b, x, *rest, **kwargs)


class Adapted:
    """Marks the classes that peftlab made; goes in front of a module's own class, as FSDP2's FSDPModule does."""

    _original: type


def _forward_of(cls: type):
    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        stack = self._modules[CHILD]
        links = stack.current()
        refuse_lost_gradients(self, stack)
        if links.routed is not None:
            return links.routed.route.run(self, stack, links.routed, args, kwargs)
        return run_links(self, stack, links, args, kwargs)

    return forward


def run_links(host: nn.Module, stack: Stack, links: Links, args: tuple, kwargs: dict):
    """The host's call with these links acting."""
    if stack.read or not links.weights:
        return call(host, links.calls, args, kwargs)
    y = call(host, links.weights + links.calls, args, kwargs)
    rule = links.weights[-1][0].rule
    return rule.finish(host, y, first_input(args, kwargs)[0]) if rule.name == "embedding" and not links.calls else y


def _seen(name: str) -> property:
    """A parameter as its readers see it: with the adapters' change."""

    def get(self):
        raw = self._parameters[name]
        stack = self._modules.get(CHILD)
        # FSDP2 fetches the parameter by attribute when it shards it: a sharded tensor is storage, not a weight.
        if stack is None or raw is None or type(raw).__name__ == "DTensor":
            return raw
        host, param = stack.alias.get(name, (self, name))
        stack = host._modules[CHILD]
        weights, _, routed, _ = stack.current()
        if routed is not None:
            raise RuntimeError(
                f"{name!r} of a {original_class(self).__name__} has another value for every row of the batch, and was read where the rows are not "
                "told apart. Inside route(...), call the module that holds it; run backward inside the block where it recomputes activations."
            )
        if not weights:
            return layers.values(self, name)
        refuse_lost_gradients(host, stack)
        try:
            if getattr(host, "max_norm", None) is None:
                return effective(host, param, weights).to(layers.outline(host, param).dtype)
            # torch shortens rows in place where there is a max_norm: work on and hand out what nobody owns.
            return effective(host, param, weights, host._parameters[param].clone()).to(raw.dtype).clone()
        except AttributeError as e:  # nn.Module.__getattr__ would swallow it and hand out the frozen tensor
            raise RuntimeError(f"an adapter failed while {name!r} was read: {e}") from e

    return property(get)


# torch's encoder has a kernel for eval mode that calls none of its modules. It is taken where these attributes allow it.
FUSED = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0), (nn.TransformerEncoder, "use_nested_tensor", False))


def _unfused(name: str, off: object) -> property:
    """An attribute that keeps torch from the kernel while a method surrounds a call inside."""

    def get(self):
        fused = self._modules[CHILD].fused
        return off if any(links.calls or links.routed for links in (s.current() for s in fused)) else self.__dict__[name]

    def put(self, value):
        self.__dict__[name] = value

    return property(get, put)


def unfuse(site: Site, above: list[nn.Module]) -> None:
    """Have torch's encoder modules that hold this host run their parts one by one while its methods act."""
    stack = site.host._modules[CHILD]
    for m in above:
        holder = m._modules.get(CHILD) or swap_in(m, False, ())
        holder.fused = tuple(dict.fromkeys((*holder.fused, stack)))


def _flat_weights() -> property:
    def get(self):
        return [getattr(self, n) if n in self._parameters else None for n in self._flat_weights_names]

    def put(self, value):  # torch hands in what it read, which is not ours to keep: copies of the module need leaves
        self.__dict__["_flat_weights"] = [self._parameters.get(n) for n in self._flat_weights_names]

    return property(get, put)


@functools.cache
def adapted_class(cls: type, seen: tuple[str, ...]) -> type:
    body = {
        "_original": cls,
        "forward": _forward_of(cls),
        "__reduce_ex__": lambda self, protocol: (_rebuild, (cls, seen), _state(self)),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        **hiding(cls, (CHILD, SHARED)),
        **{n: _seen(n) for n in seen},
        **{n: _unfused(n, off) for kind, n, off in FUSED if issubclass(cls, kind)},
    }
    if issubclass(cls, nn.RNNBase) and seen:
        body["_flat_weights"] = _flat_weights()
        body["_update_flat_weights"] = lambda self: None  # they are read anew each time
    return type(cls.__name__, (Adapted, cls), body)


def _state(m: nn.Module) -> dict:
    getter = getattr(super(type(m), m), "__getstate__", None)
    state = getter() if getter is not None else m.__dict__
    return dict(state if isinstance(state, dict) else m.__dict__)


def _rebuild(cls: type, seen: tuple[str, ...]) -> nn.Module:
    made = adapted_class(cls, seen)
    return made.__new__(made)


def original_class(m: nn.Module) -> type:
    return type(m)._original if isinstance(m, Adapted) else type(m)


def seen_of(m: nn.Module) -> tuple[str, ...]:
    """The parameters that are seen through properties."""
    return tuple(k for k, v in type(m).__dict__.items() if isinstance(v, property) and k in m._parameters) if isinstance(m, Adapted) else ()


def swap_in(host: nn.Module, read: bool, seen: tuple[str, ...]) -> Stack:
    """Make `host` adaptable; afterwards `host.peftlab` is its stack."""
    cls = original_class(host)
    stack = host._modules.get(CHILD)
    if stack is None:
        stack = Stack(read)
        stack.training = host.training
        host._modules[CHILD] = stack
    stack.read = stack.read or read
    host.__class__ = adapted_class(cls, tuple(sorted({*seen_of(host), *(seen if stack.read else ())})))
    return stack


def install(name: str, pairs: list[tuple[Site, Method]]) -> Stack:
    """Put the methods of one adapter into the module that they share."""
    host = pairs[0][0].host
    stack = swap_in(host, any(s.read_only for s, _ in pairs), seen_by(pairs))
    if stack.read:  # an adapter of an earlier call may have been seen through the call until now
        swap_in(host, True, seen_by([p for ps in stack.sites.values() for p in ps]))
    stack.add(name, pairs)
    return stack


def follow(site: Site) -> None:
    """The other ends of a tied tensor show what the adapted end shows."""
    for host, param in site.tied:
        stack = swap_in(host, True, (param,))
        stack.alias.setdefault(param, (site.host, site.param))


def runs_whole(host: nn.Module) -> bool:
    """Whether the module's call can be run functionally with any of its tensors changed."""
    rule, stack = layers.rule_of(host), host._modules.get(CHILD)
    known = rule is not None and rule.call and rule is not layers.OPAQUE and set(host._parameters) <= {"weight", "bias"}
    return known and layers.surrounds(host, original_class(host)) and not (stack is not None and stack.read)


def seen_by(pairs: list[tuple[Site, Method]]) -> tuple[str, ...]:
    """The parameters that these methods change."""
    out = [s.param for s, m in pairs if s.param is not None and m.has_weight() and not m.in_place]
    return (*out, *(s.bias for s, m in pairs if m.has_bias() and s.has_bias))


def changes_bias(site: Site, method: Method) -> bool:
    """Whether this very method does anything to the bias (an option may leave it alone)."""
    if not (method.has_bias() and site.has_bias):
        return False
    b = torch.zeros(site.n_out, device="meta")
    with torch.no_grad():
        try:
            return method.bias(b) is not b
        except RuntimeError:  # a real tensor met the meta one: it was computed with
            return True


def swap_out(host: nn.Module) -> None:
    cls = original_class(host)
    host.__class__ = cls
    del host._modules[CHILD]
    if isinstance(host, nn.RNNBase):
        host.__dict__["_flat_weights"] = [host._parameters.get(n) for n in host._flat_weights_names]


def refuse_lost_gradients(host: nn.Module, stack: Stack) -> None:
    """Reentrant checkpointing of a block none of whose inputs requires grad cuts its adapters off: say so instead of training nothing."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not host.training or not any(stack.links[:3]):
        return
    frame = sys._getframe(1)
    while frame is not None:
        seen = frame.f_locals if frame.f_code.co_name == "forward" else {}
        if "run_function" in seen and "preserve_rng_state" in seen:  # CheckpointFunction.forward
            inputs = seen.get("args", ())
            if any(isinstance(a, Tensor) and a.requires_grad for a in inputs):
                return
            names = [s.path for n in stack.active for s, m in stack.sites[n] if any(p.requires_grad for p in m.parameters())]
            if names:
                raise RuntimeError(
                    f"the adapters at {', '.join(map(repr, names))} would get no gradient: they run under reentrant activation checkpointing "
                    "and no input of the checkpointed block requires grad. Use checkpoint(..., use_reentrant=False), or make the block's "
                    "input require grad (x.requires_grad_(), or in transformers model.enable_input_require_grads())."
                )
            return
        frame = frame.f_back


def stacks(model: nn.Module) -> list[tuple[str, nn.Module, Stack]]:
    """Every adapted module below `model` as (path, host, stack), each once; wrappers' own path components are left out."""
    return [(path, m, m._modules[CHILD]) for path, m in walk(model) if isinstance(m, Adapted)]


_TRANSPARENT = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPERS = {"OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "CheckpointWrapper"}


def bare(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DDP's, FSDP1's and the checkpoint wrapper's wrapping modules."""
    while type(model).__name__ in _WRAPPERS and type(model).__module__.startswith("torch."):
        model = next(model._modules[k] for k in _TRANSPARENT if k in model._modules)
    return model


def walk(model: nn.Module, duplicates: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of everything below `model`, without peftlab's own modules and wrappers' path components."""
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        path, m = todo.pop()
        m = bare(m)
        if id(m) in seen and not duplicates:
            continue
        seen.add(id(m))
        yield path, m
        if m._modules:
            prefix = f"{path}." if path else ""
            todo += [(prefix + n, c) for n, c in reversed(m._modules.items()) if c is not None and type(c) is not Stack and type(c) is not Shared]


SHARED = "peftlab_shared"  # child of the model's root that holds what all sites of an adapter share


class Shared(nn.Module):
    """The holder of shared modules at `<root>.peftlab_shared`."""

    def forward(self, x, *args, **kwargs):
        return x  # for roots that call all their children in turn, as nn.Sequential does


def refresh_alias_free(root: nn.Module) -> None:
    """Forget aliases and fused kernels whose adapted end has no adapters left."""
    for _, _, s in stacks(root):
        s.alias = {k: (h, p) for k, (h, p) in s.alias.items() if isinstance(h, Adapted) and h._modules[CHILD].sites}
        s.fused = tuple(t for t in s.fused if any(m.surrounds() for pairs in t.sites.values() for _, m in pairs))
