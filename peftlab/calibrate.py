"""Start values from data: run batches through the untouched model and show each site its inputs or its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .host import Site
from .method import Base, Method


def run(model: nn.Module, batch):
    """The model's call with one batch: a mapping is keywords, a tuple or list positions, anything else the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def loss_of(output) -> Tensor:
    """The loss that a model returned: `.loss`, ["loss"], or a scalar."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    found = output if found is None else found
    if isinstance(found, (tuple, list)):
        found = found[0]
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise ValueError("the model returned no loss; give loss=, a function of (model, batch)")
    return found


def calibrate(model: nn.Module, pairs: list[tuple[Site, Method]], data: Iterable, loss: Callable | None) -> None:
    """One pass over the data in eval mode; flags, modes and hooks are put back whatever happens."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    kind = next(m.needs_data for _, m in pairs if m.needs_data)
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        seen = (_inputs if kind == "inputs" else _gradients)(model, pairs, data, loss)
    finally:
        for m, mode in modes:
            m.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
    missed = [s.path for s, _ in pairs if id(s) not in seen]
    if missed:
        raise ValueError(f"no batch of data= reached {len(missed)} of {len(pairs)} sites, {missed[0]!r} among them: their start cannot be computed")
    with torch.no_grad():
        for site, method in pairs:
            method.calibrated(Base(site, (), method.common))


def _inputs(model: nn.Module, pairs, data, loss) -> set[int]:
    seen: set[int] = set()

    def hook_for(site: Site, method: Method):
        def hook(_, args, kwargs):
            part = "qkv".find(site.key[0]) if site.key in ("q_proj", "k_proj", "v_proj") else 0
            x = args[part] if len(args) > part else kwargs.get(("query", "key", "value")[part], kwargs.get("input", kwargs.get("x")))
            if isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == site.n_in:
                method.observe(Base(site, (), method.common), x.detach().reshape(-1, site.n_in).float())
                seen.add(id(site))

        return hook

    handles = [s.host.register_forward_pre_hook(hook_for(s, m), with_kwargs=True) for s, m in pairs]
    try:
        with torch.no_grad():
            for batch in data:
                run(model, batch) if loss is None else loss(model, batch)
    finally:
        for h in handles:
            h.remove()
    return seen


def _gradients(model: nn.Module, pairs, data, loss) -> set[int]:
    tensors = [s.raw_tensor for s, _ in pairs]
    for t in tensors:
        t.requires_grad_(True)
    seen: set[int] = set()
    for batch in data:
        with torch.enable_grad():
            value = loss_of(run(model, batch)) if loss is None else loss(model, batch)
            grads = torch.autograd.grad(value, tensors, allow_unused=True)
        with torch.no_grad():
            for (site, method), g in zip(pairs, grads, strict=True):
                if g is not None:
                    method.observe_grad(Base(site, (), method.common), site.get(site.part(g)))
                    seen.add(id(site))
    return seen
