"""Refusals of forwards that would train nothing."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from peftlab.core.stack import AdapterStack


def refuse_lost_gradients(host: nn.Module, stack: AdapterStack) -> None:
    """Reentrant checkpointing of a block none of whose inputs requires grad cuts its adapters off: say so instead of training nothing."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not host.training or not any(stack.links[:3]):
        return
    frame = sys._getframe(1)
    while frame is not None:
        seen = frame.f_locals if frame.f_code.co_name == "forward" else {}
        if "run_function" in seen and "preserve_rng_state" in seen:  # CheckpointFunction.forward
            inputs = seen.get("args", ())
            if any(isinstance(a, Tensor) and a.requires_grad for a in inputs):
                return
            names = [s.path for n in stack.active for s, m in stack.sites[n] if any(p.requires_grad for p in m.parameters())]
            if names:
                raise RuntimeError(
                    f"the adapters at {', '.join(map(repr, names))} would get no gradient: they run under reentrant activation checkpointing "
                    "and no input of the checkpointed block requires grad. Use checkpoint(..., use_reentrant=False), or make the block's "
                    "input require grad (x.requires_grad_(), or in transformers model.enable_input_require_grads())."
                )
            return
        frame = frame.f_back
