"""What happens between optimizer steps: schedules of methods that act during training, and parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlab.host import Site, Stack, bare, stacks
from peftlab.inspect.report import acts, listed, tensors_of
from peftlab.method import Method, finite, positive_int
from peftlab.sites import ensure_module
from peftlab.wrap import adapter_modules


def torch_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer itself, also inside a wrapper that holds it as `.optimizer`."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return torch_optimizer(inner)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch optimizer, got {type(optimizer).__name__}")
    return optimizer


def held(optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """id of a tensor -> the parameter group that holds it."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def ran(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step updates at all: a GradScaler leaves the decision to a fused optimizer."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is None or not bool(found_inf)


@dataclass(eq=False)
class _Driven:
    """One method that acts during training."""

    key: str  # path of its tensors in the state dict
    stack: Stack
    site: Site
    method: Method

    @property
    def tensors(self) -> list[Tensor]:
        return list(tensors_of(self.site, self.method).values())


class Schedule:
    """Drives, by hooks on an optimizer, the methods that act during training; made by `schedule`.

    `t` steps of `T` are done. `state_dict` and `load_state_dict` make a resumed run continue exactly; `remove` ends it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int):
        self.t, self.T = 0, positive_int("total_steps", total_steps, None)
        root, self.optimizer = bare(ensure_module(model)), torch_optimizer(optimizer)
        mine = held(self.optimizer)
        there = adapter_modules(root)
        own = {f"{key}.{k}": p for _, key, s, m in there for k, p in tensors_of(s, m).items() if p.requires_grad}
        if own and not any(id(p) in mine for p in own.values()):
            raise ValueError(f"the optimizer holds none of this model's adapter tensors, {listed(list(own))}: build it after wrap and load")
        here = {id(m): stack for _, _, stack in stacks(root) for pairs in stack.sites.values() for _, m in pairs}
        ours = {name for name, _, s, m in there if any(id(p) in mine for p in tensors_of(s, m).values())}
        acting = {name for name, _, _, m in there if acts(m, "step") or acts(m, "penalty")} & ours
        self.driven: dict[str, list[_Driven]] = {name: [] for name in acting}
        self.shared: dict[str, nn.Module] = {}
        for name, key, site, m in there:
            if name in acting and site is None:
                self.shared[key] = m
            elif name in acting:
                self.driven[name].append(_Driven(key, here[id(m)], site, m))
        self._check(mine)
        for d in self._all():
            d.method.scheduled = True
        self.handles = [self.optimizer.register_step_pre_hook(self._before), self.optimizer.register_step_post_hook(self._after)]

    def _check(self, mine: dict[int, dict]) -> None:
        hooks = self.optimizer._optimizer_step_post_hooks.values()
        if any(isinstance(getattr(h, "__self__", None), Schedule) for h in hooks):
            raise ValueError("this optimizer has a schedule already: its remove() first")
        for d in self._all():
            if acts(d.method, "penalty"):
                lost = [k for k, p in tensors_of(d.site, d.method).items() if p.requires_grad and id(p) not in mine]
                if lost:
                    raise ValueError(f"{d.key!r} has a penalty on {listed(lost)}, which the optimizer does not hold: it would be lost")

    def _all(self) -> Iterator[_Driven]:
        for methods in self.driven.values():
            yield from methods

    def _trained(self) -> Iterator[list[_Driven]]:
        """The methods of every adapter that acts and trains now, those that sleep included."""
        for name, methods in self.driven.items():
            on = any(name in d.stack.active and name not in d.stack.merged for d in methods)
            if on and any(p.requires_grad for d in methods for p in d.tensors):
                yield methods

    # ---- hooks
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Penalties into `.grad`; where a closure computes the gradients, after every call of it."""
        if not any(acts(d.method, "penalty") for d in self._all()):
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
                if not acts(d.method, "penalty") or not wanted:
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
        if not ran(optimizer):
            return
        self.t = min(self.t + 1, self.T)
        groups = held(optimizer)
        for methods in self._trained():
            common = next((float(groups[id(p)]["lr"]) for d in methods for p in d.tensors if id(p) in groups), 0.0)
            with torch.no_grad():
                for d in methods:
                    if acts(d.method, "step"):
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
            raise ValueError(f"the saved schedule is of other adapters: {listed(odd)} differ")
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


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    b_ratio: float | None = None,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict]:
    """Parameter groups for any torch optimizer, with every trainable parameter of the model in exactly one.

    Groups, by name: "embedding" (tensors that change an embedding, where `embedding_lr` is given), "fast" (the tensors that a method
    marks, LoRA's B, where `b_ratio` is given: LoRA+, Hayou et al. 2024, arXiv 2402.12354), "adapter", and "base" for what trains
    outside adapters. With a weight decay, tensors of fewer than two dimensions go to "<name>_no_decay".

    Args:
        lr: learning rate of all but the groups below.
        b_ratio: the fast tensors' learning rate is `b_ratio * lr`.
        embedding_lr: learning rate of embeddings' adapters, fast tensors included, and of embeddings that train outside adapters.
        weight_decay: for tensors with at least two dimensions.

    Raises:
        ValueError: for values that are no positive number (weight_decay: no negative one), for a model without trainable
            parameters, and for a group that is asked for and would be empty.
    """
    for name, value in (("lr", lr), ("b_ratio", b_ratio), ("embedding_lr", embedding_lr)):
        if (value is not None or name == "lr") and finite(name, value) <= 0:
            raise ValueError(f"{name}={value!r}: must be positive")
    if finite("weight_decay", weight_decay) < 0:
        raise ValueError(f"weight_decay={weight_decay!r}: must not be negative")
    root = bare(ensure_module(model))
    params = [p for p in root.parameters() if p.requires_grad]
    if not params:
        raise ValueError("nothing in this model trains: unfreeze(model), or load(..., trainable=True)")
    kind = _kinds(root, b_ratio is not None, embedding_lr is not None)
    rates = {"adapter": lr, "base": lr, "fast": lr * (b_ratio or 1), "embedding": embedding_lr}
    groups: dict[str, dict] = {}
    for p in params:
        what, decay = kind.get(id(p), "base"), weight_decay if p.ndim >= 2 else 0.0
        name = what if decay or not weight_decay else f"{what}_no_decay"
        group = groups.setdefault(name, {"params": [], "lr": rates[what], "weight_decay": decay, "name": name})
        group["params"].append(p)
    there = {kind.get(id(p), "base") for p in params}
    if b_ratio is not None and "fast" not in there:
        raise ValueError(f"b_ratio={b_ratio}: no trainable adapter has a tensor for it (LoRA's B has)")
    if embedding_lr is not None and "embedding" not in there:
        raise ValueError(f"embedding_lr={embedding_lr}: no embedding trains in this model")
    if weight_decay and not any(g["weight_decay"] for g in groups.values()):
        raise ValueError(f"weight_decay={weight_decay}: no trainable tensor has two dimensions, it would act on nothing")
    return list(groups.values())


def _kinds(root: nn.Module, fast: bool, embedding: bool) -> dict[int, str]:
    """id of a tensor -> the kind of group that it belongs to, "base" where it is not there."""
    kind: dict[int, str] = {}
    if embedding:
        for m in root.modules():
            if isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
                kind |= {id(p): "embedding" for p in m._parameters.values() if p is not None}
    for _, _, site, m in adapter_modules(root):
        on_embedding = embedding and site is not None and isinstance(site.host, (nn.Embedding, nn.EmbeddingBag))
        for k, p in tensors_of(site, m).items():
            kind[id(p)] = "embedding" if on_embedding else "fast" if fast and site is not None and k in m.fast else "adapter"
    return kind


__all__ = ["Schedule", "param_groups", "schedule"]
