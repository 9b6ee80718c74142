"""Walking over a model: every module with its path, without wrappers and without what the library added."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


class OwnModule(nn.Module):
    """Marks the modules that the library adds to a model: they are no part of the base."""


class Adapted:
    """Marks the classes that peftlab made; goes in front of a module's own class, as FSDP2's FSDPModule does."""

    _original: type


def original_class(m: nn.Module) -> type:
    """The class that a module had before it was adapted."""
    return type(m)._original if isinstance(m, Adapted) else type(m)


_WRAPPED_CHILDREN = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

_WRAPPERS = {"OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "CheckpointWrapper"}


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DDP's, FSDP1's and the checkpoint wrapper's wrapping modules."""
    while type(model).__name__ in _WRAPPERS and type(model).__module__.startswith("torch."):
        model = next(model._modules[k] for k in _WRAPPED_CHILDREN if k in model._modules)
    return model


def named_base_modules(model: nn.Module, duplicates: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of everything below `model`, without peftlab's own modules and wrappers' path components."""
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        path, m = todo.pop()
        m = unwrap_parallel(m)
        if id(m) in seen and not duplicates:
            continue
        seen.add(id(m))
        yield path, m
        if m._modules:
            prefix = f"{path}." if path else ""
            todo += [(prefix + n, c) for n, c in reversed(m._modules.items()) if c is not None and not isinstance(c, OwnModule)]
