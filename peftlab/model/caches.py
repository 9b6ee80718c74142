"""Key-value caches and recurrent states, known by what they are and not by what an argument is called.

A cache is an object that says how many tokens it holds (`get_seq_length`, as transformers' caches do), a list or tuple of tensors for each
layer (as older models pass), or an object that keeps states (state-space models). Names only help where a value alone cannot tell: a list
of tensors may be anything, and is a cache where its argument is called so. The names are in `NAMES`, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

NAMES = frozenset({
    "cache", "past_key_values", "past_key_value", "past_kv", "past", "layer_past", "kv_cache", "cache_params", "inference_params", "mems", "state", "states",
})  # fmt: skip


class Past(NamedTuple):
    """What a cache holds before a call: whether it holds anything, and how many tokens (None where it keeps states and does not count)."""

    filled: bool
    tokens: int | None


EMPTY = Past(False, 0)


def is_cache(name: str, value: object) -> bool:
    """Whether an argument, or an entry of an output, is a cache."""
    if value is None or isinstance(value, (bool, int, float, str, nn.Module)):
        return False
    if callable(getattr(value, "get_seq_length", None)):
        return True
    if name not in NAMES:
        return False
    return isinstance(value, (tuple, list, Mapping)) or not isinstance(value, Tensor)


def find_cache(named: Mapping[str, object]) -> tuple[str, object] | None:
    """(name, cache) of the first cache among named values; None without one."""
    return next(((name, value) for name, value in named.items() if is_cache(name, value)), None)


def declares_cache(names: Iterable[str]) -> bool:
    """Whether a call with these argument names takes a cache."""
    return any(name in NAMES for name in names)


def past_of(cache: object, layer: int = 0) -> Past:
    """What a cache holds; of one that grows layer by layer, as the given layer will find it.

    Raises:
        ValueError: for a cache of which that cannot be told.
    """
    if cache is None:
        return EMPTY
    tokens = _counted_tokens(cache, layer)
    if tokens is not None:
        return Past(tokens > 0, tokens)
    filled = _has_states(cache)
    if filled is None:
        raise ValueError(
            f"a {type(cache).__name__} was passed as the cache, and how many tokens it holds cannot be told: it has no get_seq_length(), no tensors of "
            "keys and no states. Pass one of transformers' caches, or use_cache=False"
        )
    return Past(filled, None if filled else 0)


def _counted_tokens(cache: object, layer: int) -> int | None:
    """The tokens that a cache says it holds; None where it does not count them."""
    length = getattr(cache, "get_seq_length", None)
    if callable(length):
        try:
            return _whole(length(layer))
        except (ValueError, TypeError, IndexError):  # this layer keeps states
            return _counted_by_later_layer(cache, layer)
    if isinstance(offset := getattr(cache, "seqlen_offset", None), (int, Tensor)):
        return _whole(offset)
    if isinstance(cache, (tuple, list)):
        first = next((entry for entry in cache if entry is not None), None)
        keys = first[0] if isinstance(first, (tuple, list)) and first else first
        if isinstance(keys, Tensor) and keys.ndim == 4:  # (B, H, tokens, D)
            return keys.shape[-2]
        return 0 if first is None else None
    return None


def _whole(count: int | Tensor) -> int:
    return int(count) if isinstance(count, Tensor) else count


def _counted_by_later_layer(cache: object, layer: int) -> int | None:
    """Where one layer keeps states, the count of the next one that counts: layers before it may have seen the new tokens already."""
    for kept in getattr(cache, "layers", ())[layer:]:
        if callable(length := getattr(kept, "get_seq_length", None)):
            return _whole(length())
    return None


def _has_states(cache: object) -> bool | None:
    """Whether a cache that does not count tokens has seen any; None where that cannot be told."""
    layers = getattr(cache, "layers", None)
    if isinstance(layers, (tuple, list)):
        said = [answer for answer in map(_says_it_has_states, layers) if answer is not None]
        return any(said) if said or not layers else None
    said = _says_it_has_states(cache)
    if said is not None:
        return said
    states = list(_tensors_in(cache if isinstance(cache, (tuple, list, Mapping)) else vars(cache)))
    return any(bool(t.any()) for t in states) if states else None


def _says_it_has_states(kept: object) -> bool | None:
    said = getattr(kept, "has_previous_state", None)
    if isinstance(said, bool):
        return said
    return any(said.values()) if isinstance(said, Mapping) else None


def _tensors_in(kept: object) -> Iterator[Tensor]:
    """The floating tensors in nested lists, tuples and mappings."""
    if isinstance(kept, Tensor):
        if kept.is_floating_point():
            yield kept
    elif isinstance(kept, (tuple, list, Mapping)):
        for entry in kept.values() if isinstance(kept, Mapping) else kept:
            yield from _tensors_in(entry)
