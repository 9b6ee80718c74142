"""The parts of a model that have a name in the literature, found from its structure: `:head`, `:norms`, `:embeddings`, `:blocks`.

Everything here answers with modules; which of them a method fits is for the patterns to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from peftlab.attend import attends
from peftlab.host import CHILD, Adapted, Stack, original_class
from peftlab.model import layers
from peftlab.model.blocks import closing_norm, ends, feedforward
from peftlab.model.layers import is_norm
from peftlab.virtual import stacks

if TYPE_CHECKING:
    from peftlab.sites import Model


def blocks(model: Model) -> dict[str, nn.Module]:
    """The repeated stacks of a model: lists of at least two children of one class, outermost first."""
    found = {}
    for key, m in model.modules.items():
        children = [c for c in m._modules.values() if c is not None and not isinstance(c, Stack)]
        if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(children) > 1 and len({original_class(c) for c in children}) == 1 and any(c._modules for c in children):
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


def attention(model: Model) -> list[nn.Module]:
    """The modules that run attention themselves."""
    return [m for m in model.modules.values() if attends(m)]


def patch_blocks(model: Model) -> list[nn.Module]:
    """The blocks that work on patches or frames: those below no token embedding, whose masks and positions count tokens."""
    owners = stacks(model)
    return [b for b in every_block(model) if not any(b is m for owner in owners for m in owner.modules())]


PLACES: dict[str, Callable[[Model], list[nn.Module]]] = {":head": head, ":norms": norms, ":embeddings": embeddings, ":blocks": every_block}

PLACES[":attention"] = attention

PLACES[":patch-blocks"] = patch_blocks

PLACES[":stack"] = stacks  # the owner of the token embedding


def sublayers(model: Model) -> list[nn.Module]:
    """What gives the output of each attention and feed-forward sub-layer of each block, before the residual sum; without blocks, the linear layers."""
    return [end for b in every_block(model) for end in ends(b)] or linears(model)


def feedforward_outputs(model: Model) -> list[nn.Module]:
    """The same of the feed-forward sub-layers alone."""
    return [found[-1] for b in every_block(model) if (found := ends(b))]


def feedforward_norms(model: Model) -> list[nn.Module]:
    """The normalisation after each feed-forward sub-layer's residual sum; where a block has none there, the block; without blocks, the linear layers."""
    return [closing_norm(b, found[-1]) or b for b in every_block(model) if (found := ends(b))] or linears(model)


def feedforwards(model: Model) -> list[nn.Module]:
    """The modules that are called with the input of a feed-forward sub-layer; without blocks, the linear layers."""
    there = every_block(model)
    return [m for b in there if (m := feedforward(b)) is not None] if there else linears(model)


def linears(model: Model) -> list[nn.Module]:
    """The linear-like layers of the blocks (of a model without blocks: all but the head)."""
    there = every_block(model)
    inside = {id(m) for b in there for m in b.modules()}
    every = [m for m in model.modules.values() if isinstance(layers.rule_of(m), layers.Linear)]
    heads = head(model)
    return [m for m in every if id(m) in inside] if there else [m for m in every if m not in heads] or every


PLACES[":sublayers"] = sublayers

PLACES[":feedforward-outputs"] = feedforward_outputs

PLACES[":feedforward-norms"] = feedforward_norms

PLACES[":feedforwards"] = feedforwards

PLACES[":linears"] = linears


def adapted(model: Model) -> list[nn.Module]:
    """The linear-like layers whose weight has an adapter already; where none has, those of the blocks."""
    return [m for m in model.modules.values() if isinstance(layers.rule_of(m), layers.Linear) and _weighed(m)] or linears(model)


def _weighed(m: nn.Module) -> bool:
    """Whether it holds an adapter that says something about a weight."""
    return isinstance(m, Adapted) and any(method.has_weight() for pairs in m._modules[CHILD].sites.values() for _, method in pairs)


def trunk(model: Model) -> list[nn.Module]:
    """The module that runs the one list of blocks, and the last thing of width d in it: the norm after the blocks, or the last block."""
    lists = blocks(model)
    if len(lists) != 1:
        return []
    path, holder = next(iter(lists.items()))
    owner = model.at[path.rpartition(".")[0]]
    last = every_block(model)[-1]
    after = list(owner._modules.values())
    after = after[after.index(holder) + 1 :] if holder in after else []
    return [owner, next((m for m in after if is_norm(m)), last)]


PLACES[":adapted"] = adapted

PLACES[":trunk"] = trunk
