"""Everything of a model that trial runs could change, kept and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.core.site import STASH_PREFIX
from peftlab.model import layers

LARGE_BUFFER = 1 << 20  # entries; larger buffers are kept aside on the CPU


class PreservedModel:
    """Keeps everything of a model that runs could change, and puts it back."""

    def __init__(self, root: nn.Module):
        self.root = root

    def __enter__(self) -> PreservedModel:
        modules = list(self.root.modules())
        self.modes = [(m, m.training) for m in modules]
        self.random_mode = any(mode for _, mode in self.modes)
        self.params = [(p, p.requires_grad, p.grad) for p in self.root.parameters()]
        self.buffers = {}
        for m in modules:
            for n, b in m._buffers.items():
                if b is None or b.is_meta:
                    self.buffers[id(m), n] = (m, b, None, None, None)
                    continue
                kept = b.detach().clone() if b.numel() <= LARGE_BUFFER else b.detach().to("cpu", copy=True)
                self.buffers[id(m), n] = (m, b, kept, b.data, b._version)
        devices = {t.device for t in [*self.root.parameters(), *self.root.buffers()]}
        self.random = [(random.setstate, random.getstate()), (np.random.set_state, np.random.get_state())]
        self.random += [_device_generator(d) for d in devices | {torch.device("cpu")} if d.type != "meta"]
        return self

    def __exit__(self, *exc) -> None:
        self.set_modes(True)
        self.put_flags_back()
        self.put_buffers_back(surely=True)
        self.set_random(0)
        torch.clear_autocast_cache()
        for p, _, grad in self.params:
            p.grad = grad

    def set_modes(self, own: bool) -> None:
        """The modules' own modes, or eval. Flags, not calls: a model's train() may do more than that."""
        for m, mode in self.modes:
            m.training = mode and (own or layers.is_opaque_linear(m))  # such a layer may change for good when it runs in eval mode

    def put_flags_back(self) -> None:
        for p, flag, _ in self.params:
            p.requires_grad_(flag)

    def put_buffers_back(self, surely: bool = False) -> None:
        there = {id(m): m for m, *_ in self.buffers.values()}
        for m in there.values():
            for n in [n for n in m._buffers if (id(m), n) not in self.buffers and not n.startswith(STASH_PREFIX)]:
                del m._buffers[n]
        for (_, n), (m, b, kept, data, version) in self.buffers.items():
            m._buffers[n] = b
            if kept is None:
                continue
            if b.data_ptr() != data.data_ptr():
                b.data = data
            # Large whole numbers are a quantised base's codes: they are looked at, not written again after every run.
            if b.numel() <= LARGE_BUFFER or b.is_floating_point() or b._version != version or (surely and checksum_bits(b) != checksum_bits(kept)):
                data.copy_(kept)

    def set_random(self, seed: int) -> None:
        """The generators as they were (seed 0), or those of the CPU in another state."""
        for put, state in self.random:
            put(state)
        if seed:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)

    @contextlib.contextmanager
    def no_grads(self) -> Iterator[None]:
        """For one backward(): `.grad` empty, hooks that would step an optimizer silent, both put back."""
        silenced = []
        for p, _, _ in self.params:
            hooks = getattr(p, "_post_accumulate_grad_hooks", None)
            if hooks:
                silenced.append((hooks, dict(hooks)))
                hooks.clear()
            p.grad = None
        try:
            yield
        finally:
            for hooks, kept in silenced:
                hooks.update(kept)
            for p, _, grad in self.params:
                p.grad = grad


def _device_generator(device: torch.device) -> tuple[Callable, Tensor]:
    """How to set a device's generator, and its state."""
    if device.type == "cpu":
        return torch.set_rng_state, torch.get_rng_state()
    module, where = torch.get_device_module(device), () if device.type == "mps" else (device,)
    return lambda state: module.set_rng_state(state, *where), module.get_rng_state(*where)


def checksum_bits(t: Tensor) -> int:
    """A 64-bit sum of a tensor's bytes, weighted by their places; temporaries of a few MB."""
    raw = t.detach().contiguous().reshape(-1).view(torch.uint8)
    whole, total = len(raw) // 8 * 8, 0
    words = raw[:whole].view(torch.int64) if raw.storage_offset() % 8 == 0 else raw[:whole].clone().view(torch.int64)
    for i in range(0, len(words), LARGE_BUFFER):
        piece = words[i : i + LARGE_BUFFER]
        places = torch.arange(i, i + len(piece), dtype=torch.int64, device=piece.device)
        total += int((piece * (places * -7046029254386353131 + 1 | 1)).sum())
    tail = int.from_bytes(bytes(raw[whole:].tolist()), "little")
    return (total * 31 + tail) % 2**64
