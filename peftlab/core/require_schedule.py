"""A run that ends as something else than it was asked to be must not end quietly."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

SAMPLE = 16  # entries that are compared between backward passes


def require_schedule(method: nn.Module, tensor: Tensor, limit: int = 20) -> None:
    """Raise in backward once `tensor` has been stepped `limit` times while `method.scheduled` is still False.

    A step is a change of the tensor between two backward passes, so accumulated gradients are one. Hooks survive neither deepcopy nor
    pickle: methods call this again in `__setstate__`.
    """
    if not tensor.requires_grad:
        return
    owner, steps, seen = weakref.ref(method), 0, None

    def count(p: Tensor) -> None:
        nonlocal steps, seen
        alive = owner()
        if alive is None or alive.scheduled:
            return
        # The version does not see optimizers that write through `.data`; values do not see steps that leave these entries alone.
        shard = p.to_local() if type(p).__name__ == "DTensor" else p
        now = p._version, shard.detach().flatten()[:SAMPLE].clone()
        steps += seen is not None and (now[0] != seen[0] or not torch.equal(now[1], seen[1].to(now[1])))
        seen = now
        if steps >= limit:
            raise RuntimeError(
                f"{type(alive).__name__} at {alive.site.path!r} has been trained for {steps} steps without its schedule: it acts during training. "
                "Call peftlab.schedule(model, optimizer, total_steps=...) before the loop."
            )

    tensor.register_post_accumulate_grad_hook(count)
