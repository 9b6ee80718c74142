"""The adapters of one module, in stacking order, and what of them acts now."""

from __future__ import annotations

from collections import deque

import torch
from torch import nn

from peftlab.core.build import fill_method, saved_tensors
from peftlab.core.chain import EMPTY_CHAIN, ActiveChain, Route, RoutedChains
from peftlab.core.method import Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.model.walk import Adapted, OwnModule, named_base_modules

REMEMBERED = 256  # switches that a checkpointed forward may lie back


class AdapterStack(OwnModule):
    """The adapters of one module, in stacking order; lives at `<host>.peftlab`."""

    # Its state is plain data and its submodules go through `_modules`: nn.Module's search for parameters in every value that is
    # set would add up over thousands of hosts.
    __setattr__ = object.__setattr__

    sites: dict[str, list[tuple[Site, Method]]]
    active: tuple[str, ...]
    merged: tuple[str, ...]
    links: ActiveChain
    lossy: tuple[str, ...]  # merged with keep=False: the tensors hold them for good
    silent: bool  # inside `disabled`
    read: bool  # weights are seen through properties instead of through the call
    made: dict[tuple, ActiveChain]  # links by what is active and merged
    history: deque[tuple[int, ActiveChain]]  # what acted until when, for forwards that backward will run again
    lost: int  # until when it is forgotten what acted
    alias: dict[str, tuple[nn.Module, str]]  # tied parameters that follow another host's adapters
    onto: object  # what adapters are merged onto where the base is quantised
    untied: dict[str, nn.Parameter | None]  # tied parameters of which this end alone is adapted; what it shared, while it has its own
    unready: set[str]  # adapters built on meta whose start values are still to come
    fused: tuple[AdapterStack, ...]  # stacks whose calls torch's fused kernel of this module would leave out
    route: Route | None  # inside `route`
    within: tuple[AdapterStack, ...]  # inside `route`: the stacks whose weights are read while this module runs
    chosen: ActiveChain | None  # inside `route`: what acts on the rows that are being computed, for weights that are read

    def __init__(self, read: bool):
        super().__init__()
        self.sites, self.active, self.merged, self.lossy = {}, (), (), ()
        self.links, self.made, self.history, self.lost = EMPTY_CHAIN, {}, deque(maxlen=REMEMBERED), 0
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
            links = self.made[key] = EMPTY_CHAIN if self.silent else self._links(self.active) if self.route is None else self._routed(self.route)
        if links is not self.links:
            self._remember(torch._C._autograd._get_sequence_nr(), links)
            self.links = links

    def _links(self, names: tuple[str, ...]) -> ActiveChain:
        acting = [p for n in self.sites if n in names and n not in self.merged for p in self.sites[n]]
        weights = tuple(p for p in acting if not p[1].surrounds() and not p[1].in_place)
        return ActiveChain(weights, tuple(p for p in acting if p[1].surrounds()), None, self.merged) if acting or self.merged else EMPTY_CHAIN

    def _routed(self, route: Route) -> ActiveChain:
        every = [self._links(names) for names, _ in route.groups]
        within = tuple((s, tuple(s._links(names) for names, _ in route.groups)) for s in self.within)
        same = [next(i for i in range(len(every)) if every[i] == links and all(g[i] == g[j] for _, g in within)) for j, links in enumerate(every)]
        first = sorted(set(same))
        if not any(any(links[:2]) for links in every) and not within:
            return every[0]
        parts = tuple((every[i], tuple(r for j, (_, rows) in enumerate(route.groups) if same[j] == i for r in rows)) for i in first)
        return ActiveChain((), (), RoutedChains(route, parts, tuple((s, tuple(g[i] for i in first)) for s, g in within)))

    def _remember(self, now: int, new: ActiveChain) -> None:
        since = self.history[-1][0] if self.history else -1
        if now == since:  # nothing was recorded for backward since the last switch, so what acted meanwhile is not needed
            if self.history[-1][1] is new:
                self.history.pop()
            return
        if len(self.history) == REMEMBERED:
            self.lost = self.history[0][0]
        self.history.append((now, self.links))

    def current(self) -> ActiveChain:
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

    def _acted_at(self, moment: int) -> ActiveChain:
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
            done = [fill_method(method.recipe, site, method, weights_known) for site, method in self.sites[name]]
            if all(done):
                self.unready.discard(name)

    def extra_repr(self) -> str:
        return f"active={list(self.active)}, merged={list(self.merged)}, {'read' if self.read else 'call'}"


def adapted_modules(model: nn.Module) -> list[tuple[str, nn.Module, AdapterStack]]:
    """Every adapted module below `model` as (path, host, stack), each once; wrappers' own path components are left out."""
    return [(path, m, m._modules[ADAPTERS_CHILD]) for path, m in named_base_modules(model) if isinstance(m, Adapted)]


SHARED_CHILD = "peftlab_shared"  # child of the model's root that holds what all sites of an adapter share


class SharedModules(OwnModule):
    """The holder of shared modules at `<root>.peftlab_shared`."""

    def forward(self, x, *args, **kwargs):
        return x  # for roots that call all their children in turn, as nn.Sequential does
