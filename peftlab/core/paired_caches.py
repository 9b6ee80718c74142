"""Key-value caches that go together: where a model runs twice for one output, each of the runs has a cache of its own.

The second cache is kept by the first, under a name, and follows whatever generation does to it: reordered for beams, cut back, repeated.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from peftlab.model.arguments import named_arguments
from peftlab.model.caches import find_cache, past_of

PAIRED = "peftlab_twins"  # name -> cache, in the attributes of the first one

FOLLOWED = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


def two_runs_with_caches(call: Callable, host: nn.Module, args: tuple, kwargs: dict, name: str) -> tuple[Callable[[], None], Callable]:
    """The first and the second run of one call of `host`, each with a cache of its own where there is one; the second gives the output."""
    given = named_arguments(host, args, kwargs)
    found = find_cache(given)
    other = None if found is None else given | {found[0]: paired_cache(found[1], name)}
    made = []

    def first() -> None:
        made.append(_made_cache(call(*args, **kwargs) if other is None else call(**other)))

    def second():
        out = call(*args, **kwargs)
        cache = _made_cache(out)
        if found is None and cache is not None and not torch.compiler.is_compiling():  # the runs have made them
            pair_caches(cache, made[0], name)
        return out

    return first, second


def _made_cache(out: object) -> object | None:
    """The cache in a model's output."""
    if dataclasses.is_dataclass(out):
        out = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    found = find_cache(out) if isinstance(out, Mapping) else None
    return None if found is None else found[1]


def paired_cache(cache: object, name: str) -> object:
    """The cache that goes with this one under a name, made as a copy of it while it is empty.

    Raises:
        ValueError: for a cache of another kind, and one that was filled, or cut, without its twin.
    """
    if getattr(cache, "__dict__", None) is None:
        raise ValueError(f"{name!r} runs the model twice, and a {type(cache).__name__} is no cache that can be copied for it: use_cache=False")
    there, held = past_of(cache), vars(cache).get(PAIRED, {}).get(name)
    if held is None and not there.filled:
        held = copy.deepcopy(cache)
        if vars(held).pop(PAIRED, None) is not None:
            held.__class__ = type(cache).__base__
        pair_caches(cache, held, name)
    if held is None or past_of(held) != there:
        seen = 0 if held is None else past_of(held).tokens
        raise ValueError(
            f"{name!r} runs the model twice, and of the {there.tokens} tokens in the cache one run has seen {seen}: start with an empty one, or use_cache=False"
        )
    return held


def pair_caches(cache: object, other: object, name: str) -> None:
    """Let the other cache follow this one under a name."""
    if PAIRED not in vars(cache):
        cache.__class__ = _leading_class(type(cache))
        setattr(cache, PAIRED, {})
    getattr(cache, PAIRED)[name] = other


@functools.cache
def _leading_class(cls: type) -> type:
    """The subclass of a cache class whose changes reach the twins."""
    body = {name: _passed_on_method(cls, name) for name in FOLLOWED if name in dir(cls)}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, **body})


def _passed_on_method(cls: type, name: str):
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        out = method(self, *args, **kwargs)
        for other in getattr(self, PAIRED).values():
            getattr(other, name)(*args, **kwargs)
        return out

    return call
