"""The model, its batch and the adapters on trial; every run starts from the same state."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlab.core.adapters import adapter_modules, trained_tensors
from peftlab.core.preserve import PreservedModel
from peftlab.core.site import Site
from peftlab.core.stack import adapted_modules
from peftlab.inspect.check.outputs import floating_outputs, output_distance
from peftlab.inspect.check.report import CheckRow
from peftlab.support.text import list_names

SIZES = (0.01, 0.1, 1.0)  # of a perturbation, relative to the tensor's own size

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}  # relative to the largest output; otherwise 5e-2


@dataclass(eq=False)
class Subject:
    """A method (or shared module) whose tensors are put to the proof."""

    row: CheckRow
    key: str  # path of its tensors in the state dict
    site: Site | None
    module: nn.Module
    tensors: dict[str, Tensor]  # the parameters that train (all where the adapter is frozen)


def subjects_of(root: nn.Module) -> list[Subject]:
    active = {n for _, _, s in adapted_modules(root) for n in s.active}
    merged = sorted({n for _, _, s in adapted_modules(root) for n in s.merged})
    if not active:
        raise ValueError("nothing to check: this model has no active adapter")
    if merged:
        raise ValueError(f"{list_names(merged)} merged: unmerge(model) before the check, which merges and unmerges itself")
    there = adapter_modules(root, active)
    labels = {name: m.recipe.label for name, _, s, m in there if s is not None}
    out = []
    for name, key, site, m in there:
        tensors = {k: p for k, p in trained_tensors(site, m).items() if p.is_floating_point() or p.is_complex()}
        tensors = {k: p for k, p in tensors.items() if p.requires_grad} or tensors
        for k, p in tensors.items():
            if p.is_meta:
                raise ValueError(f"'{key}.{k}' is on the meta device: check the model once its tensors are real")
            if type(p).__name__ == "DTensor":
                raise ValueError(f"'{key}.{k}' is sharded: check the model before fully_shard")
        if site is not None or tensors:
            out.append(Subject(CheckRow(site.path if site is not None else key, labels.get(name, "-"), name), key, site, m, tensors))
    return out


class Trial:
    """The model, its batch, and what a run of it gives; every run starts from the same random state and buffers."""

    def __init__(self, root: nn.Module, args: tuple, kwargs: dict):
        self.root, self.batch, self.subjects = root, (args, kwargs), subjects_of(root)
        self.fence = PreservedModel(root)
        self.names = list(dict.fromkeys(s.row.name for s in self.subjects))
        self.notes: list[str] = []
        self.noise = 0.0  # how far two runs of the same differ
        self.before: list[Tensor] = []  # eval outputs of the model as it is
        self.after: list[Tensor] = []  # and of the perturbed one

    def start(self) -> list[Tensor]:
        self.before = self.run()
        return self.before

    def call(self, model: nn.Module, grad: bool, own_mode: bool, seed: int = 0):
        """The raw output of one forward; batch, generators and buffers are those of the beginning."""
        try:
            args, kwargs = copy.deepcopy(self.batch)  # a cache among them would be filled
        except (RuntimeError, TypeError, NotImplementedError):  # a tensor with a history, or something that cannot be copied
            args, kwargs = self.batch
        self.fence.set_modes(own_mode)
        self.fence.set_random(seed)
        torch.clear_autocast_cache()  # it would hold casts of the tensors as they were
        try:
            with torch.set_grad_enabled(grad):
                return model(*args, **kwargs)
        finally:
            self.fence.put_buffers_back()

    def run(self, model: nn.Module | None = None, grad: bool = False) -> list[Tensor]:
        """The floating outputs in eval mode."""
        found = floating_outputs(self.call(self.root if model is None else model, grad, own_mode=False))
        if not found:
            raise ValueError("the model returned no floating tensor: there is nothing to compare")
        return [t.detach().clone() for t in found]

    def gradients(self, tensors: list[Tensor], value: Callable[[object], Tensor], seed: int = 0) -> list[Tensor | None]:
        """Gradients of value(output) in the model's own mode; `.grad` is not touched."""
        for t in tensors:
            t.requires_grad_(True)
        loss = value(self.call(self.root, True, True, seed))
        if not loss.requires_grad:
            return [None] * len(tensors)
        found = list(grad_or_none(torch.autograd.grad, loss, tensors, allow_unused=True) or [None] * len(tensors))
        if any(g is None for g in found):  # reentrant checkpointing shows its tensors to backward() alone
            loss = value(self.call(self.root, True, True, seed))
            with self.fence.no_grads():
                loss.backward()
                found = [t.grad if g is None else g for t, g in zip(tensors, found, strict=True)]
        return found

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Change all tensors at random, enough for the output to show it and no more."""
        tensors = {id(t): t for s in self.subjects for t in s.tensors.values()}
        tolerance = self.tolerance()
        self.own = {k: t.data for k, t in tensors.items()}
        try:
            for size in SIZES:
                last = {k: t.data for k, t in tensors.items()}
                generator = torch.Generator().manual_seed(0)
                for k, t in tensors.items():
                    t.data = _nudged(self.own[k], size, generator)
                after = self.run()
                if self.after and not all(torch.isfinite(t).all() for t in after) and all(torch.isfinite(t).all() for t in self.after):
                    for k, t in tensors.items():
                        t.data = last[k]
                    break
                self.after = after
                if output_distance(self.before, after) > 4 * max(tolerance, self.noise):
                    break
            yield
        finally:
            for k, t in tensors.items():
                t.data = self.own[k]

    def agrees(self, other: list[Tensor]) -> bool:
        """Whether these outputs are those of the perturbed model, but for rounding; a part of what the adapters do is no rounding."""
        error, effect = output_distance(self.after, other, self.before), output_distance(self.before, self.after)
        floor = 64 * max(torch.finfo(x.dtype).eps for x in self.after)
        return error <= max(self.tolerance(), 4 * self.noise) and (error <= 0.25 * effect or error <= max(floor, 4 * self.noise))

    def tolerance(self) -> float:
        """Of outputs that are computed in two ways, relative."""
        kinds = {t.dtype for t in self.before} | {s.site.dtype for s in self.subjects if s.site is not None}
        kinds |= {t.dtype for s in self.subjects for t in s.tensors.values()}
        where = {t.device.type for t in self.before}
        kinds |= {torch.get_autocast_dtype(d) for d in where if torch.is_autocast_enabled(d)}
        loose = max(TOLERANCE.get(k, 5e-2) for k in kinds if k.is_floating_point)
        tf32 = where - {"cpu"} and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
        return max(loose, 5e-3) if tf32 and loose >= 1e-4 else loose


def grad_or_none(grad: Callable, loss: Tensor, tensors: list[Tensor], **kwargs):
    """grad(...), or None where reentrant checkpointing refuses it."""
    try:
        return grad(loss, tensors, **kwargs)
    except RuntimeError as e:
        if "heckpoint" not in str(e):
            raise
        return None


def _nudged(t: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """t plus noise of `size` times its root mean square (of `size` where it is zero)."""
    scale = t.abs().double().square().mean().sqrt().item() if t.numel() else 1.0
    kind = torch.float64 if t.dtype in (torch.float64, torch.complex128) else torch.float32
    noise = torch.randn(t.shape, generator=generator, dtype=kind, device="cpu").to(t.device)
    return (t + noise * (size * (scale or 1.0))).to(t.dtype)
