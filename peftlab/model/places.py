"""The parts of a model that have a name in the literature, found from its structure: `:head`, `:norms`, `:embeddings`, `:blocks`.

Everything here answers with modules; which of them a method fits is for the patterns to say.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peftlab.model import layers
from peftlab.model.attention import runs_attention
from peftlab.model.blocks import closing_norm, feedforward_module, sublayer_ends
from peftlab.model.index import ModelIndex
from peftlab.model.layers import is_norm
from peftlab.model.tokens import token_models
from peftlab.model.walk import OwnModule, original_class


def block_lists(model: ModelIndex) -> dict[str, nn.Module]:
    """The repeated stacks of a model: lists of at least two children of one class, outermost first."""
    found = {}
    for key, m in model.modules.items():
        children = [c for c in m._modules.values() if c is not None and not isinstance(c, OwnModule)]
        if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(children) > 1 and len({original_class(c) for c in children}) == 1 and any(c._modules for c in children):
            path = model.paths[key][0]
            if not any(path.startswith(p + ".") or p == "" for p in found):
                found[path] = m
    return found


def output_head(model: ModelIndex) -> list[nn.Module]:
    """The output head: the last linear-like layer outside the repeated blocks, if it comes after them (in a model without blocks,
    the last of several). Empty where there is none."""
    order = {k: i for i, k in enumerate(model.modules)}
    every = [m for m in model.modules.values() if _is_layer(m)]
    lists = list(block_lists(model))

    def within(m: nn.Module) -> bool:
        return any(p == "" or path.startswith(p + ".") for path in model.paths[id(m)] for p in lists)

    last = max((order[id(m)] for m in every if within(m)), default=-1)
    after = [m for m in every if not within(m) and order[id(m)] > last]
    return after[-1:] if len(every) > 1 else []


def _is_layer(m: nn.Module) -> bool:
    rule = layers.layer_rule(m)
    return isinstance(rule, (layers.Linear, layers.Conv)) or isinstance(m, (nn.RNNBase, nn.RNNCellBase))


def norm_layers(model: ModelIndex) -> list[nn.Module]:
    return [m for m in model.modules.values() if is_norm(m)]


def embedding_layers(model: ModelIndex) -> list[nn.Module]:
    return [m for m in model.modules.values() if isinstance(m, nn.Embedding)]


def all_blocks(model: ModelIndex) -> list[nn.Module]:
    """The children of all repeated stacks."""
    return [c for holder in block_lists(model).values() for c in holder._modules.values() if c is not None and not isinstance(c, OwnModule)]


def attention_modules(model: ModelIndex) -> list[nn.Module]:
    """The modules that run attention themselves."""
    return [m for m in model.modules.values() if runs_attention(m)]


def patch_blocks(model: ModelIndex) -> list[nn.Module]:
    """The blocks that work on patches or frames: those below no token embedding, whose masks and positions count tokens."""
    owners = token_models(model)
    return [b for b in all_blocks(model) if not any(b is m for owner in owners for m in owner.modules())]


def sublayer_outputs(model: ModelIndex) -> list[nn.Module]:
    """What gives the output of each attention and feed-forward sub-layer of each block, before the residual sum; without blocks, the linear layers."""
    return [end for b in all_blocks(model) for end in sublayer_ends(b)] or linear_layers(model)


def feedforward_outputs(model: ModelIndex) -> list[nn.Module]:
    """The same of the feed-forward sub-layers alone."""
    return [found[-1] for b in all_blocks(model) if (found := sublayer_ends(b))]


def feedforward_norms(model: ModelIndex) -> list[nn.Module]:
    """The normalisation after each feed-forward sub-layer's residual sum; where a block has none there, the block; without blocks, the linear layers."""
    return [closing_norm(b, found[-1]) or b for b in all_blocks(model) if (found := sublayer_ends(b))] or linear_layers(model)


def feedforward_modules(model: ModelIndex) -> list[nn.Module]:
    """The modules that are called with the input of a feed-forward sub-layer; without blocks, the linear layers."""
    there = all_blocks(model)
    return [m for b in there if (m := feedforward_module(b)) is not None] if there else linear_layers(model)


def linear_layers(model: ModelIndex) -> list[nn.Module]:
    """The linear-like layers of the blocks (of a model without blocks: all but the head)."""
    there = all_blocks(model)
    inside = {id(m) for b in there for m in b.modules()}
    every = [m for m in model.modules.values() if isinstance(layers.layer_rule(m), layers.Linear)]
    heads = output_head(model)
    return [m for m in every if id(m) in inside] if there else [m for m in every if m not in heads] or every


def trunk(model: ModelIndex) -> list[nn.Module]:
    """The module that runs the one list of blocks, and the last thing of width d in it: the norm after the blocks, or the last block."""
    lists = block_lists(model)
    if len(lists) != 1:
        return []
    path, holder = next(iter(lists.items()))
    owner = model.at[path.rpartition(".")[0]]
    last = all_blocks(model)[-1]
    after = list(owner._modules.values())
    after = after[after.index(holder) + 1 :] if holder in after else []
    return [owner, next((m for m in after if is_norm(m)), last)]


PLACES: dict[str, Callable[[ModelIndex], list[nn.Module]]] = {
    ":head": output_head,
    ":norms": norm_layers,
    ":embeddings": embedding_layers,
    ":blocks": all_blocks,
    ":attention": attention_modules,
    ":patch-blocks": patch_blocks,
    ":stack": token_models,  # the owner of the token embedding
    ":sublayers": sublayer_outputs,
    ":feedforward-outputs": feedforward_outputs,
    ":feedforward-norms": feedforward_norms,
    ":feedforwards": feedforward_modules,
    ":linears": linear_layers,
    ":trunk": trunk,
}
