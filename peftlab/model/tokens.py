"""The modules that own a token embedding, and what they are called with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from peftlab.model.arguments import ENCODER_STATES, TokenArguments
from peftlab.model.attention import runs_attention
from peftlab.model.walk import named_base_modules, original_class

if TYPE_CHECKING:
    from peftlab.model.index import ModelIndex


def token_embedding(host: nn.Module) -> nn.Embedding | None:
    """The embedding of token ids below a module: the one that it names itself, else the one with the most rows that is not called otherwise."""
    teller = getattr(host, "get_input_embeddings", None)
    try:
        own = teller() if teller is not None else None
    except (NotImplementedError, AttributeError):
        own = None
    if isinstance(own, nn.Embedding):
        return own
    found = [m for path, m in named_base_modules(host) if isinstance(m, nn.Embedding) and not _is_other_table(path)]
    return max(found, key=lambda m: m.num_embeddings, default=None)


def _is_other_table(path: str) -> bool:
    name = path.rpartition(".")[2].lower()
    return any(word in name for word in ("pos", "type", "segment", "bias", "wpe"))


def token_models(model: ModelIndex) -> list[nn.Module]:
    """The modules that own a token embedding and the attention above it; of two that lie in one another, the inner one."""
    attention = [p for m in model.modules.values() if runs_attention(m) for p in model.paths[id(m)]]
    found: dict[str, nn.Module] = {}
    for m in model.modules.values():
        for path in model.paths[id(m)] if isinstance(m, nn.Embedding) and not _is_other_table(model.path(m)) else ():
            above = path
            while above:
                above = above.rpartition(".")[0]
                if any(_lies_within(p, above) for p in attention):
                    if token_embedding(model.at[above]) is m:
                        found[above] = model.at[above]
                    break
    inner = [m for p, m in found.items() if not any(q != p and _lies_within(q, p) for q in found)]
    return list({id(m): m for m in inner}.values())


def _lies_within(path: str, top: str) -> bool:
    return top == "" or path.startswith(top + ".")


def token_models_above(model: ModelIndex, hosts: list[nn.Module]) -> list[nn.Module]:
    """The stacks in which these modules lie."""
    below = [p for h in hosts for p in model.paths[id(h)]]
    return [m for m in token_models(model) if any(_lies_within(p, top) for top in model.paths[id(m)] for p in below)]


def token_arguments(host: nn.Module) -> TokenArguments:
    """The names of what a stack is called with."""
    return TokenArguments.of(original_class(host).forward)


def attends_to_encoder(host: nn.Module, inputs: TokenArguments) -> bool:
    """Whether a stack has attention to an encoder's output; some name the argument and have none."""
    names = [path.rpartition(".")[2].lower() for path, m in named_base_modules(host) if runs_attention(m)]
    return ENCODER_STATES in inputs.order and any("cross" in name or "enc" in name for name in names)
