"""Probes that show a method the gradient of its weight, while a start is computed from data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peftlab.core.base import Base
from peftlab.core.method import Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.core.swap import attach_to_module, restore_class, show_at_tied_ends

PROBE_ADAPTER = "peftlab_probe"  # the adapter that is there while gradients are collected


class _Tap(torch.autograd.Function):
    """The weight itself; its gradient goes to the probe, and no further."""

    @staticmethod
    def forward(ctx, W: Tensor, token: Tensor, probe: GradientProbe) -> Tensor:
        ctx.probe = probe
        return W.view_as(W)

    @staticmethod
    def backward(ctx, G: Tensor):
        ctx.probe.take(G)
        return None, torch.zeros_like(ctx.probe.token), None


class GradientProbe(Method):
    """Leaves the weight as it is and shows its gradient to the method that will sit there, summed over the uses in one forward."""

    def __init__(self, site: Site, asks: Method):
        super().__init__(Base(site))
        self.token = nn.Parameter(torch.zeros((), device=site.device))
        self.__dict__.update(asks=asks, at=site, uses=0, total=None)

    def weight(self, W: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return W
        self.__dict__["uses"] += 1
        return _Tap.apply(W, self.token, self)

    def take(self, G: Tensor) -> None:
        self.__dict__.update(total=G.detach() if self.total is None else self.total + G.detach(), uses=self.uses - 1)
        if self.uses == 0:
            self.flush()

    def flush(self) -> None:
        """What came together belongs to one batch."""
        G = self.total
        self.__dict__.update(total=None, uses=0)
        if G is not None:
            with torch.no_grad():
                self.asks.observe(Base(self.at, (), self.asks.common), G)


@contextlib.contextmanager
def probed_sites(pairs: list[tuple[Site, Method]]) -> Iterator[list[GradientProbe]]:
    """Probes at these sites, above what is there; afterwards the modules are what they were."""
    by_host: dict[int, list[tuple[Site, GradientProbe]]] = {}
    for site, method in pairs:
        by_host.setdefault(id(site.host), []).append((site.seen_as("values"), GradientProbe(site, method)))
    touched = {id(h): h for ps in by_host.values() for s, _ in ps for h in (s.host, *(o for o, _ in s.tied if s.shared))}
    before = [(h, h.__class__, h._modules.get(ADAPTERS_CHILD)) for h in touched.values()]
    states = [(stack.read, dict(stack.alias)) if stack is not None else None for _, _, stack in before]
    try:
        for ps in by_host.values():
            attach_to_module(PROBE_ADAPTER, ps)
            for site, _ in ps:
                if site.shared:
                    show_at_tied_ends(site)
        yield [p for ps in by_host.values() for _, p in ps]
    finally:
        for (host, cls, stack), state in zip(before, states, strict=True):
            if host._modules.get(ADAPTERS_CHILD) is not None and PROBE_ADAPTER in host._modules[ADAPTERS_CHILD].sites:
                host._modules[ADAPTERS_CHILD].drop(PROBE_ADAPTER)
            if state is None:
                if host._modules.get(ADAPTERS_CHILD) is not None:
                    restore_class(host)
            else:
                stack.read, stack.alias = state
                host.__class__ = cls
