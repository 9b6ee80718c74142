"""What is asked of any torch optimizer: itself behind wrappers, its groups by tensor, whether a step was taken."""

from __future__ import annotations

import torch


def torch_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer itself, also inside a wrapper that holds it as `.optimizer`."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return torch_optimizer(inner)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch optimizer, got {type(optimizer).__name__}")
    return optimizer


def groups_by_tensor(optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """id of a tensor -> the parameter group that holds it."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def step_was_taken(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step updates at all: a GradScaler leaves the decision to a fused optimizer."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is None or not bool(found_inf)
