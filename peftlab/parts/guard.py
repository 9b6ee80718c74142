"""A run that ends as something else than it was asked to be must not end quietly."""

from __future__ import annotations

import weakref

from torch import Tensor, nn


def demand_schedule(method: nn.Module, tensor: Tensor, limit: int = 20) -> None:
    """Raise in backward once `tensor` has had `limit` gradients while `method.scheduled` is still False.

    Hooks survive neither deepcopy nor pickle: methods call this again in `__setstate__`.
    """
    if not tensor.requires_grad:
        return
    owner, passes = weakref.ref(method), 0

    def count(_: Tensor) -> None:
        nonlocal passes
        alive = owner()
        passes += 1
        if alive is not None and not alive.scheduled and passes >= limit:
            raise RuntimeError(
                f"{type(alive).__name__} at {alive.site.path!r} has been trained for {passes} steps without its schedule: it acts during training. "
                "Call peftlab.schedule(model, optimizer, total_steps=...) before the loop."
            )

    tensor.register_post_accumulate_grad_hook(count)
