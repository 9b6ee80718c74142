"""What the root of a model remembers of its state before the first wrap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlab.model.index import join_path
from peftlab.model.packed import inner_tensors
from peftlab.model.walk import named_base_modules

RECORD_ATTRIBUTE = "_peftlab_ledger"

SAMPLES = 16  # entries of a base tensor that a ledger and a fingerprint remember


@dataclass
class BaseRecord:
    """What the root of a model remembers of its state before the first wrap, so that unwrap and save can tell what changed."""

    flags: dict[str, bool] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)  # small persistent buffers, whole
    marks: dict[str, tuple[int, Tensor | None]] = field(default_factory=dict)  # (version, samples) of parameters, (version, None) of large buffers
    targets: dict[str, dict] = field(default_factory=dict)  # adapter -> what the caller asked for

    @classmethod
    def of(cls, model: nn.Module) -> BaseRecord:
        """A new ledger of an untouched model."""
        self = cls()
        for path, m in named_base_modules(model):
            for n, p in m._parameters.items():
                if p is not None:
                    key = join_path(path, n)
                    self.flags[key] = p.requires_grad
                    self.mark(key, p, sample_entries)
            for n, b in m._buffers.items():
                if b is not None and n not in m._non_persistent_buffers_set and not b.is_meta:
                    if b.numel() <= KEEP_BUFFERS:
                        self.buffers[join_path(path, n)] = b.detach().clone()
                    else:
                        self.mark(join_path(path, n), b, lambda _: None)
        return self

    def mark(self, key: str, t: Tensor, look: Callable[[Tensor], Tensor | None]) -> None:
        if not t.is_meta and type(t).__name__ != "DTensor":
            self.marks[key] = (t._version, look(t))

    def moved(self, key: str, t: Tensor) -> bool:
        """Whether a marked tensor was written to and holds other values than before wrap."""
        if key not in self.marks or t.is_meta or type(t).__name__ == "DTensor":
            return False
        version, before = self.marks[key]
        if t._version == version:
            return False
        if before is None:  # a large buffer may change where no sample is taken
            return True
        now = sample_entries(t)
        return now.shape != before.shape or (now.dtype == before.dtype and not torch.equal(now, before.to(now.device)))


@functools.lru_cache(512)
def _sample_positions(numel: int) -> Tensor:
    return torch.linspace(0, max(numel - 1, 0), min(SAMPLES, numel), dtype=torch.float64, device="cpu").round().long()


def sample_entries(t: Tensor) -> Tensor:
    """Evenly spread entries of a tensor, (<= SAMPLES,); of a foreign one, of the first tensor that it wraps."""
    t = inner_tensors(t.detach())[0]
    flat = t.view(-1) if t.is_contiguous() else t.reshape(-1)
    positions = _sample_positions if type(flat) is Tensor else _sample_positions.__wrapped__  # what is made of fake tensors must not be cached
    return flat[positions(flat.shape[0]).to(t.device)]


def base_records(model: nn.Module) -> list[tuple[str, nn.Module, BaseRecord]]:
    return [(path, m, m.__dict__[RECORD_ATTRIBUTE]) for path, m in named_base_modules(model) if RECORD_ATTRIBUTE in m.__dict__]


def remembered_buffers(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(buffer, its value before wrap) of the base's persistent buffers, such as BatchNorm statistics."""
    for _, m, ledger in base_records(model):
        there = {join_path(path, n): b for path, sub in named_base_modules(m) for n, b in sub._buffers.items() if b is not None}
        for path, old in ledger.buffers.items():
            b = there.get(path)
            if b is not None and b.shape == old.shape:
                ledger.buffers[path] = old.to(b.device, b.dtype)
                yield b, ledger.buffers[path]


def changed_buffers(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Those that have changed since."""
    return ((b, old) for b, old in remembered_buffers(model) if not torch.equal(b, old))


KEEP_BUFFERS = 1 << 20  # entries; larger persistent buffers are watched but not copied
