"""`watch`: every adapter tensor moves in the first steps of training, or an error says which does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.core.adapters import adapter_modules, trained_tensors
from peftlab.core.preserve import checksum_bits
from peftlab.core.stack import adapted_modules
from peftlab.model.index import ensure_module
from peftlab.model.walk import unwrap_parallel
from peftlab.support.text import list_names
from peftlab.train.optimizers.hooks import groups_by_tensor, step_was_taken, torch_optimizer


def local_tensor(t: Tensor) -> Tensor:
    """This process's part of a shard of FSDP2, or the tensor."""
    return t.to_local() if type(t).__name__ == "DTensor" else t.detach()


def _value(t: Tensor) -> int:
    return checksum_bits(local_tensor(t) + 0)  # + 0: a zero has one sign


class Watch:
    """A hook on an optimizer that raises unless every watched tensor has moved after `steps` steps; then it removes itself."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise ValueError(f"steps={steps!r}: a whole number from 2 on (in step 1 the gradient of LoRA's A is zero)")
        self.model, self.steps, self.taken = unwrap_parallel(ensure_module(model)), steps, 0
        optimizer = torch_optimizer(optimizer)
        there = self._tensors()
        if not there:
            raise ValueError("no active adapter of this model trains: unfreeze(model), or load(..., trainable=True)")
        mine = groups_by_tensor(optimizer)
        missing = [k for k, (p, _) in there.items() if id(p) not in mine]
        if missing:
            what = "is empty" if not mine else f"lacks {len(missing)} of {len(there)} adapter tensors"
            raise ValueError(f"the optimizer {what}, they would never move: {list_names(missing)}. Build it after wrap and load.")
        self.still = {k: _value(p) for k, (p, _) in there.items() if local_tensor(p).numel()}
        self.handle = optimizer.register_step_post_hook(self._after)

    def _tensors(self) -> dict[str, tuple[Tensor, nn.Module]]:
        active = {n for _, _, s in adapted_modules(self.model) for n in s.active if n not in s.merged}
        found = [(key, k, p, m) for _, key, s, m in adapter_modules(self.model, active) for k, p in trained_tensors(s, m).items()]
        return {f"{key}.{k}": (p, m) for key, k, p, m in found if p.requires_grad}

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not step_was_taken(optimizer):
            return
        self.taken += 1
        there = self._tensors()
        for k in [k for k in self.still if k not in there or _value(there[k][0]) != self.still[k]]:
            del self.still[k]
        if self.taken < self.steps and self.still:
            return
        self.remove()
        # What a schedule drives may sleep for now, which shows in its having no gradient.
        stuck = [k for k in self.still if there[k][0].grad is not None or not getattr(there[k][1], "scheduled", False)]
        if stuck:
            idle = [k for k in stuck if there[k][0].grad is None]
            why = f"{len(idle)} have no gradient, check(model, batch) says why" if idle else "the learning rate or the gradient is zero"
            raise RuntimeError(f"{len(stuck)} adapter tensors have not moved in {self.taken} optimizer steps: {list_names(stuck)}; {why}")

    @property
    def done(self) -> bool:
        """Whether every tensor has moved."""
        return not self.still

    def remove(self) -> None:
        """Stop watching."""
        self.handle.remove()


def watch(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10) -> Watch:
    """Raise in `optimizer.step()` if a trainable tensor of an active adapter has not changed at all after `steps` steps.

    Tensors are looked up in the model, so one whose parameter was replaced after the optimizer was built is found out too. The hook
    removes itself once all have moved. Steps that a GradScaler skips do not count.

    Args:
        steps: optimizer steps, at least 2.

    Returns:
        Watch: with `.remove()` and `.done`.

    Raises:
        ValueError: at once, where the optimizer lacks adapter tensors (all of them, when it is empty), or no adapter trains.
        RuntimeError: later, from `optimizer.step()`, naming the tensors that have not moved.
    """
    return Watch(model, optimizer, steps)
