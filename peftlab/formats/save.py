"""`save`: adapters, and whatever else was trained or changed, in one file."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import nn

from peftlab.core.adapters import refuse_inside_blocks, select_adapters
from peftlab.formats.file import encode, on_disk, write
from peftlab.formats.header import describe_adapters
from peftlab.formats.reports import SaveReport
from peftlab.model.index import ensure_module
from peftlab.model.patterns import as_list
from peftlab.model.walk import unwrap_parallel


def save(model: nn.Module, path: str | os.PathLike, names: str | Iterable[str] | None = None, include=None) -> SaveReport:
    """Write adapters, and whatever else was trained or changed since `wrap`, into one safetensors file.

    Args:
        names: the adapters to write (all by default).
        include: patterns of base parameters to write whole.

    Raises:
        ValueError: when a base parameter trains but is neither an adapter's nor included, or a tensor is an empty or partial shard.
    """
    root = unwrap_parallel(ensure_module(model))
    refuse_inside_blocks(root)
    chosen = select_adapters(root, names)
    if not chosen:
        why = "this model has no adapters" if names is None else f"names={names!r} means no adapter"
        raise ValueError(f"{why}: there is nothing to save")
    header, tensors, owner = describe_adapters(root, chosen, as_list(include) if include is not None else [])
    unreal = next((k for k, t in tensors.items() if t.is_meta), None)
    if unreal is not None:
        raise ValueError(f"{unreal!r} is on the meta device: it has no values to save")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return SaveReport(str(path), 0, 0, {}, {})  # every rank took part in gathering; one writes
    total, head = write(path, tensors, header)
    size = {k: t.numel() * t.element_size() for k, t in tensors.items()}
    by = {n: sum(size[k] for k, o in owner.items() if o == n) for n in chosen}
    return SaveReport(str(path), total, head, by, {k: size[k] for k, o in owner.items() if o is None})


def file_bytes(model: nn.Module, names: str | Iterable[str] | None = None) -> int:
    """The exact size of the file that `save` would write; works on meta models."""
    root = unwrap_parallel(ensure_module(model))
    header, tensors, _ = describe_adapters(root, select_adapters(root, names), [])
    return len(encode({k: on_disk(t) for k, t in tensors.items()}, header)) + sum(t.numel() * t.element_size() for t in tensors.values())
