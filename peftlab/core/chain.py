"""What acts at one module: pairs of a site and its method, on the weights and around the call, for all rows or for some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class ActiveChain(NamedTuple):
    """The (site, method) pairs that act now: on the weights, in stacking order, and around the call.

    Inside `route` the rows of a batch have links of their own: then `routed` says which, and the first two are empty.
    """

    weights: tuple
    calls: tuple
    routed: RoutedChains | None = None
    merged: tuple[str, ...] = ()  # what the tensors hold meanwhile


@dataclass(frozen=True, eq=False)
class Route:
    """Which adapters act on which rows of a batch: row indices by adapter names; `dim` is the batch's dimension."""

    rows: int
    groups: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    dim: int
    run: Callable  # (host, stack, routed, args, kwargs) -> the host's output


class RoutedChains(NamedTuple):
    """A route as one module sees it: the links of each group of rows, and the stacks that are read while the module runs."""

    route: Route
    parts: tuple[tuple[ActiveChain, tuple[int, ...]], ...]
    within: tuple[tuple[nn.Module, tuple[ActiveChain, ...]], ...]


EMPTY_CHAIN = ActiveChain((), ())


class StandIn:
    """What stands in a chain of links where a site and its method would, and is neither."""

    on, common = "module", None
    param = bias = expert = rows = None
    dense = False
    host: nn.Module

    def has_weight(self) -> bool:
        return False

    has_bias = has_weight
