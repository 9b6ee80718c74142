"""The parts of a model that have a name in the literature, found from its structure: `:head`, `:norms`, `:embeddings`, `:blocks`.

Everything here answers with modules; which of them a method fits is for the patterns to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from . import layers
from .host import Stack, original_class

if TYPE_CHECKING:
    from .sites import Model

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def is_norm(m: nn.Module) -> bool:
    """A normalisation layer: torch's, or a module of that name whose parameters are all vectors (RMSNorm of one's own)."""
    vectors = [p.ndim == 1 for p in m._parameters.values() if p is not None]
    return isinstance(m, NORMS) or (bool(vectors) and all(vectors) and original_class(m).__name__.lower().endswith("norm"))


def blocks(model: Model) -> dict[str, nn.Module]:
    """The repeated stacks of a model: lists of at least two children of one class, outermost first."""
    found = {}
    for key, m in model.modules.items():
        children = [c for c in m._modules.values() if c is not None and not isinstance(c, Stack)]
        if (
            isinstance(m, (nn.ModuleList, nn.Sequential))
            and len(children) > 1
            and len({original_class(c) for c in children}) == 1
            and any(c._modules for c in children)
        ):
            path = model.paths[key][0]
            if not any(path.startswith(p + ".") or p == "" for p in found):
                found[path] = m
    return found


def head(model: Model) -> list[nn.Module]:
    """The output head: the last linear-like layer outside the repeated blocks, if it comes after them (in a model without blocks,
    the last of several). Empty where there is none."""
    order = {k: i for i, k in enumerate(model.modules)}
    every = [m for m in model.modules.values() if _is_layer(m)]
    lists = list(blocks(model))

    def within(m: nn.Module) -> bool:
        return any(p == "" or path.startswith(p + ".") for path in model.paths[id(m)] for p in lists)

    last = max((order[id(m)] for m in every if within(m)), default=-1)
    after = [m for m in every if not within(m) and order[id(m)] > last]
    return after[-1:] if len(every) > 1 else []


def _is_layer(m: nn.Module) -> bool:
    rule = layers.rule_of(m)
    return isinstance(rule, (layers.Linear, layers.Conv)) or isinstance(m, (nn.RNNBase, nn.RNNCellBase))


def norms(model: Model) -> list[nn.Module]:
    return [m for m in model.modules.values() if is_norm(m)]


def embeddings(model: Model) -> list[nn.Module]:
    return [m for m in model.modules.values() if isinstance(m, nn.Embedding)]


def every_block(model: Model) -> list[nn.Module]:
    """The children of all repeated stacks."""
    return [c for holder in blocks(model).values() for c in holder._modules.values() if c is not None and not isinstance(c, Stack)]


PLACES: dict[str, Callable[[Model], list[nn.Module]]] = {":head": head, ":norms": norms, ":embeddings": embeddings, ":blocks": every_block}
