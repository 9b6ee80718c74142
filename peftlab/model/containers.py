"""Containers that iterate over their children keep showing their own children alone when one of them becomes a host."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection

import torch
from torch import nn

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def hiding(cls: type, names: Collection[str]) -> dict[str, Callable]:
    """What an adapted subclass of `cls` overrides so that children of these names are no elements of a container, and none that its own
    forward comes by when it goes through its children."""

    def named_children(self):
        unseen = names if torch.compiler.is_compiling() or _by_forward(self) else ()
        return ((n, c) for n, c in cls.named_children(self) if n not in unseen)

    if not issubclass(cls, CONTAINERS):
        return {"named_children": named_children}

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


def _by_forward(m: nn.Module) -> bool:
    """Whether the module's own forward asks, directly or through `children` or a comprehension; moving and switching modes do not."""
    frame = sys._getframe(2)
    for _ in range(3):
        if frame is None:
            return False
        if frame.f_code.co_name == "forward" and frame.f_locals.get("self") is m:
            return True
        frame = frame.f_back
    return False
