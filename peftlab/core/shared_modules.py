"""Where an adapter keeps what all its sites share."""

from __future__ import annotations

import torch
from torch import nn

from peftlab.core.stack import SHARED_CHILD, SharedModules
from peftlab.core.swap import swap_class
from peftlab.model.containers import CONTAINERS


def keep_shared_module(model: nn.Module, name: str, common: nn.Module, device: torch.device) -> None:
    """Keep an adapter's shared module once, at the root."""
    if isinstance(model, CONTAINERS):  # its class hides the child from those who iterate over it
        swap_class(model, False, ())
    holder = model._modules.get(SHARED_CHILD)
    if holder is None:
        holder = model._modules[SHARED_CHILD] = SharedModules()
        holder.training = model.training
    holder._modules[name] = common.to(device)
