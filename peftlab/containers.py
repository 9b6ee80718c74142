"""Containers that iterate over their children keep showing their own children alone when one of them becomes a host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection

from torch import nn

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def hiding(cls: type, names: Collection[str]) -> dict[str, Callable]:
    """What an adapted subclass of the container `cls` overrides so that children of these names are no elements; empty for other classes."""
    if not issubclass(cls, CONTAINERS):
        return {}

    def own(self) -> dict[str, nn.Module]:
        return {n: c for n, c in self._modules.items() if n not in names}

    shown: dict[str, Callable] = {"__len__": lambda self: len(own(self))}
    if issubclass(cls, nn.ModuleDict):
        shown |= {"__iter__": lambda self: iter(own(self)), "__contains__": lambda self, key: key in own(self)}
        return shown | {n: (lambda self, n=n: getattr(own(self), n)()) for n in ("keys", "values", "items")}

    def part(self, index):
        if not isinstance(index, slice):
            return list(own(self).values())[index]
        items = list(own(self).items())[index]
        return nn.Sequential(OrderedDict(items)) if issubclass(cls, nn.Sequential) else nn.ModuleList(c for _, c in items)

    return shown | {"__iter__": lambda self: iter(own(self).values()), "__getitem__": part}
