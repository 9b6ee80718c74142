"""What happens between optimizer steps: schedules of methods that act during training, and parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlab.core.adapters import adapter_modules, overrides_hook, trained_tensors
from peftlab.core.method import Method
from peftlab.core.options import positive_int
from peftlab.core.site import Site
from peftlab.core.stack import AdapterStack, adapted_modules
from peftlab.model.index import ensure_module
from peftlab.model.walk import unwrap_parallel
from peftlab.support.text import list_names
from peftlab.train.optimizers.hooks import groups_by_tensor, step_was_taken, torch_optimizer


@dataclass(eq=False)
class _DrivenMethod:
    """One method that acts during training."""

    key: str  # path of its tensors in the state dict
    stack: AdapterStack
    site: Site
    method: Method

    @property
    def tensors(self) -> list[Tensor]:
        return list(trained_tensors(self.site, self.method).values())


class Schedule:
    """Drives, by hooks on an optimizer, the methods that act during training; made by `schedule`.

    `t` steps of `T` are done. `state_dict` and `load_state_dict` make a resumed run continue exactly; `remove` ends it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int):
        self.t, self.T = 0, positive_int("total_steps", total_steps, None)
        root, self.optimizer = unwrap_parallel(ensure_module(model)), torch_optimizer(optimizer)
        mine = groups_by_tensor(self.optimizer)
        there = adapter_modules(root)
        own = {f"{key}.{k}": p for _, key, s, m in there for k, p in trained_tensors(s, m).items() if p.requires_grad}
        if own and not any(id(p) in mine for p in own.values()):
            raise ValueError(f"the optimizer holds none of this model's adapter tensors, {list_names(list(own))}: build it after wrap and load")
        here = {id(m): stack for _, _, stack in adapted_modules(root) for pairs in stack.sites.values() for _, m in pairs}
        ours = {name for name, _, s, m in there if any(id(p) in mine for p in trained_tensors(s, m).values())}
        acting = {name for name, _, _, m in there if overrides_hook(m, "step") or overrides_hook(m, "penalty")} & ours
        self.driven: dict[str, list[_DrivenMethod]] = {name: [] for name in acting}
        self.shared: dict[str, nn.Module] = {}
        for name, key, site, m in there:
            if name in acting and site is None:
                self.shared[key] = m
            elif name in acting:
                self.driven[name].append(_DrivenMethod(key, here[id(m)], site, m))
        self._check(mine)
        for d in self._all():
            d.method.scheduled = True
        self.handles = [self.optimizer.register_step_pre_hook(self._before), self.optimizer.register_step_post_hook(self._after)]

    def _check(self, mine: dict[int, dict]) -> None:
        hooks = self.optimizer._optimizer_step_post_hooks.values()
        if any(isinstance(getattr(h, "__self__", None), Schedule) for h in hooks):
            raise ValueError("this optimizer has a schedule already: its remove() first")
        for d in self._all():
            if overrides_hook(d.method, "penalty"):
                lost = [k for k, p in trained_tensors(d.site, d.method).items() if p.requires_grad and id(p) not in mine]
                if lost:
                    raise ValueError(f"{d.key!r} has a penalty on {list_names(lost)}, which the optimizer does not hold: it would be lost")

    def _all(self) -> Iterator[_DrivenMethod]:
        for methods in self.driven.values():
            yield from methods

    def _trained(self) -> Iterator[list[_DrivenMethod]]:
        """The methods of every adapter that acts and trains now, those that sleep included."""
        for name, methods in self.driven.items():
            on = any(name in d.stack.active and name not in d.stack.merged for d in methods)
            if on and any(p.requires_grad for d in methods for p in d.tensors):
                yield methods

    # ---- hooks
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Penalties into `.grad`; where a closure computes the gradients, after every call of it."""
        if not any(overrides_hook(d.method, "penalty") for d in self._all()):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_penalties()
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self._with_penalties(closure)}
        return (args[0], self._with_penalties(closure), *args[2:]), kwargs

    def _with_penalties(self, closure: Callable) -> Callable:
        def evaluate():
            loss = closure()
            penalty = self._add_penalties()
            return loss if penalty is None else loss + penalty.to(loss.device) if isinstance(loss, Tensor) else loss + float(penalty)

        return evaluate

    def _add_penalties(self) -> Tensor | None:
        """Adds the gradients of all penalties; returns their sum, without history."""
        scale, total = getattr(self.optimizer, "grad_scale", None), None
        for methods in self._trained():
            for d in methods:
                wanted = [p for p in d.tensors if p.requires_grad]
                if not overrides_hook(d.method, "penalty") or not wanted:
                    continue
                with torch.enable_grad():
                    value = d.method.penalty()
                if not value.requires_grad:
                    continue
                grads = torch.autograd.grad(value, wanted, allow_unused=True)
                with torch.no_grad():
                    for p, g in zip(wanted, grads, strict=True):
                        if g is not None:
                            g = g.to(p.dtype) if scale is None else (g * scale.to(g.device)).to(p.dtype)
                            p.grad = g.clone() if p.grad is None else p.grad.add_(g)
                    total = value.detach() if total is None else total + value.detach().to(total.device)
        return total

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not step_was_taken(optimizer):
            return
        self.t = min(self.t + 1, self.T)
        groups = groups_by_tensor(optimizer)
        for methods in self._trained():
            common = next((float(groups[id(p)]["lr"]) for d in methods for p in d.tensors if id(p) in groups), 0.0)
            with torch.no_grad():
                for d in methods:
                    if overrides_hook(d.method, "step"):
                        lr = next((float(groups[id(p)]["lr"]) for p in d.tensors if id(p) in groups), common)
                        d.method.step(self.t, self.T, lr)

    # ---- state
    def _buffers(self) -> dict[str, Tensor]:
        modules = {d.key: d.method for d in self._all()} | self.shared
        out = {}
        for key, top in modules.items():
            for path, m in top.named_modules(prefix=key):
                out |= {f"{path}.{k}": m._buffers[k] for k in sorted(m._non_persistent_buffers_set) if m._buffers[k] is not None}
        return out

    def _flags(self) -> dict[str, bool]:
        """What methods note as plain truth values (such as whether they are awake), and which in-place tensors train."""
        out = {}
        for d in self._all():
            out |= {f"{d.key}.{k}": v for k, v in vars(d.method).items() if isinstance(v, bool) and k not in ("training", "scheduled")}
            if d.method.in_place:
                out[f"{d.key}:requires_grad"] = d.site.raw_tensor.requires_grad
        return out

    def state_dict(self) -> dict:
        """Steps done and in all, and what the driven methods remember that their files do not hold (copies)."""
        buffers = {k: b.detach().clone() for k, b in self._buffers().items()}
        return {"t": self.t, "T": self.T, "buffers": buffers, "flags": self._flags()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()` of a schedule of the same adapters with the same total_steps.

        Raises:
            ValueError: where the two differ, with the names; nothing is changed then.
        """
        if state["T"] != self.T:
            raise ValueError(f"the saved schedule has total_steps={state['T']}, this one {self.T}: make it with the saved number")
        buffers, flags = self._buffers(), self._flags()
        odd = sorted((buffers.keys() ^ state["buffers"].keys()) | (flags.keys() ^ state["flags"].keys()))
        odd = odd or [k for k, b in buffers.items() if b.shape != state["buffers"][k].shape]
        if odd:
            raise ValueError(f"the saved schedule is of other adapters: {list_names(odd)} differ")
        self.t = state["t"]
        with torch.no_grad():
            for k, b in buffers.items():
                b.copy_(state["buffers"][k])
        for d in self._all():
            for k in [k for k in vars(d.method) if f"{d.key}.{k}" in flags]:
                setattr(d.method, k, state["flags"][f"{d.key}.{k}"])
            if d.method.in_place:
                d.site.raw_tensor.requires_grad_(state["flags"][f"{d.key}:requires_grad"])

    def remove(self) -> None:
        """Stop driving; methods that need a schedule will say so again."""
        for h in self.handles:
            h.remove()
        for d in self._all():
            d.method.scheduled = False

    def __repr__(self) -> str:
        return f"Schedule(step {self.t} of {self.T}, drives {', '.join(map(repr, self.driven)) or 'nothing'})"


def schedule(model: nn.Module, optimizer: torch.optim.Optimizer, *, total_steps: int) -> Schedule:
    """Let methods act during training, in an ordinary loop: hooks on the optimizer do what the methods ask for.

    Before each `optimizer.step()` the gradient of every driven method's penalty is added to `.grad` (after any clipping in the loop);
    after it, the method's `step(t, T, lr)` runs. Driven are the adapters that the optimizer holds tensors of, while they are active,
    unmerged and trainable. One `optimizer.step()` is one step, however many batches were accumulated for it; steps that a GradScaler
    skips do not count. With a closure (LBFGS) the penalties, value and gradient, are added at each of its evaluations, and the
    schedule still advances once a call.

    Args:
        total_steps: optimizer steps of the whole run. Later ones are all step `total_steps` again: what was reached is kept.

    Returns:
        Schedule: with `state_dict`, `load_state_dict`, `remove`, `t` and `T`. It does nothing where no method asks for anything.

    Raises:
        ValueError: for a total_steps below 1, an optimizer that holds none of the adapters' tensors (by name), or that has a schedule.
        TypeError: when `optimizer` is no torch optimizer.
    """
    return Schedule(model, optimizer, total_steps)
