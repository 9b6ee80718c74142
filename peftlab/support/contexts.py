"""Contexts that leave generators, default dtypes, devices and the garbage collector as they found them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch


def default_device(device: str) -> contextlib.AbstractContextManager:
    """Makes `device` the default; nothing where it is so already, since the mode costs every torch call inside it."""
    return contextlib.nullcontext() if torch.get_default_device().type == device else torch.device(device)


class preserved_rng:  # noqa: N801 - a context manager used like a function
    """Leaves the global CPU generator and the default dtype as it found them."""

    def __enter__(self):
        self.state, self.dtype = torch.default_generator.get_state(), torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)

    def __exit__(self, *exc):
        torch.default_generator.set_state(self.state)
        torch.set_default_dtype(self.dtype)


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Thousands of new modules would have the cyclic collector walk the whole heap again and again: half of the time of a wrap."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
