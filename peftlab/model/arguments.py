"""What the arguments of a model's call mean, by one table of the names that models give them, and by their values where these tell.

A model that is called with something of the tokens' length that this table does not know is not guessed at: who must lengthen or read the
arguments (virtual tokens, edits at chosen tokens) asks here and raises with the name of the argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from peftlab.model.caches import EMPTY, Past, find_cache, past_of

IDS = "input_ids"
EMBEDDINGS = "inputs_embeds"
CACHE_POSITIONS = "cache_position"  # where in a cache the new tokens go, as transformers before 5 says it
ENCODER_STATES, ENCODER_MASK = "encoder_hidden_states", "encoder_attention_mask"
REAL_TOKENS = ("attention_mask",)  # true, or zero where added to scores, at tokens
PADDING = ("src_key_padding_mask", "key_padding_mask")  # true at padding

# Words in the name of an argument that has one entry for each token -> what it says of them.
ROLES = (
    (("mask",), "mask"),
    (("pos",), "positions"),
    (("type", "segment"), "types"),
    (("label", "target"), "labels"),
)
NOT_OF_THE_TOKENS = ("encoder", "past", "cache", "embed")  # names with one of these words speak of something else


def token_role(name: str) -> str:
    """What an argument of the tokens' length says of them ("mask", "positions", "types", "labels"), by its name; "" for any other."""
    for words, role in ROLES:
        if any(word in name for word in words) and not any(word in name for word in NOT_OF_THE_TOKENS):
            return role
    return ""


def marks_padding(name: str) -> bool:
    """Whether a mask of this name is true at padding, as torch's are, and not at tokens."""
    return "padding" in name


def named_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def past_in(named: Mapping[str, object], layer: int = 0) -> Past:
    """What the cache among a call's arguments holds already."""
    found = find_cache(named)
    return EMPTY if found is None else past_of(found[1], layer)


@dataclass(frozen=True)
class TokenArguments:
    """The names under which a module that owns a token embedding takes its tokens and what is said of them."""

    order: tuple[str, ...]
    tokens: str
    embeddings: str | None
    positions: str | None
    mask: str | None

    @classmethod
    def of(cls, forward) -> TokenArguments:
        """From the signature of the module's own forward."""
        parameters = inspect.signature(forward).parameters.values()
        order = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))[1:]
        first = {role: next((n for n in order if token_role(n) == role), None) for role in ("positions", "mask")}
        return cls(order, IDS if IDS in order else next(iter(order), ""), EMBEDDINGS if EMBEDDINGS in order else None, **first)

    def named(self, args: tuple, kwargs: dict) -> dict:
        """A call's arguments by name."""
        return dict(zip(self.order, args, strict=False)) | kwargs

    def given(self, named: Mapping) -> Tensor:
        """The tokens of a call: ids (B, L), or embeddings (B, L, d)."""
        ids = named.get(self.tokens)
        return ids if ids is not None else named[self.embeddings]


def shown_real_tokens(named: Mapping) -> tuple[Tensor, bool] | None:
    """(mask, whether it is true at padding) of the first argument that shows which tokens are real; None without one."""
    return next(((named[k], k in PADDING) for k in REAL_TOKENS + PADDING if isinstance(named.get(k), Tensor)), None)
