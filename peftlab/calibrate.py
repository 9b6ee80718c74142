"""Start values from data: run batches through the untouched model and show each site its inputs or its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .host import CHILD, Site, as_kind, follow, install, swap_out
from .method import Base, Method

KEEP_BUFFERS = 1 << 20  # entries; larger persistent buffers are watched but not copied
PROBE = "peftlab_probe"  # the adapter that is there while gradients are collected


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


def observable(site: Site) -> bool:
    """Whether the host's call shows this site's input: linear-like layers, and q, k, v of nn.MultiheadAttention."""
    if isinstance(site.host, nn.MultiheadAttention):
        return site.key in ("q_proj", "k_proj", "v_proj")
    return site.rule.pointwise and site.expert is None and (site.rule.call and not site.transposed) and not _only_read(site)


def _only_read(site: Site) -> bool:
    return site.read_only and type(site.host).__name__ == "NonDynamicallyQuantizableLinear"


def calibrate(model: nn.Module, pairs: list[tuple[Site, Method]], data: Iterable, loss: Callable | None) -> None:
    """One pass over the data in eval mode; flags, modes and hooks are put back whatever happens."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    # What a forward writes by itself: an embedding's table under max_norm, buffers that count or average.
    written = [m.weight for m in model.modules() if getattr(m, "max_norm", None) is not None and isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    before = [(t, t.detach().clone()) for t in [*written, *(b for b in model.buffers() if b.numel() <= KEEP_BUFFERS)] if not t.is_meta]
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
        with torch.no_grad():
            for t, old in before:
                if not torch.equal(t, old):
                    t.copy_(old)
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


class _Probe(Method):
    """W + D, D = 0: the gradient of D is that of the weight that the method will see, whatever lies below."""

    def __init__(self, site: Site):
        super().__init__(Base(site))
        self.D = nn.Parameter(torch.zeros((site.n_out, site.n_in) if site.kind == "matrix" else site.shape, dtype=site.dtype, device=site.device))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.D


def _gradients(model: nn.Module, pairs, data, loss) -> set[int]:
    by_host: dict[int, list] = {}
    for site, _ in pairs:
        by_host.setdefault(id(site.host), []).append((as_kind(site, Site), _Probe(site)))
    touched = {id(h): h for ps in by_host.values() for s, _ in ps for h in (s.host, *(o for o, _ in s.tied if s.shared))}
    before = [(h, h.__class__, h._modules.get(CHILD)) for h in touched.values()]
    states = [(stack.read, dict(stack.alias)) if stack is not None else None for _, _, stack in before]
    seen: set[int] = set()
    try:
        for ps in by_host.values():
            install(PROBE, ps)
            for site, _ in ps:
                if site.shared:
                    follow(site)
        tensors = [p.D for ps in by_host.values() for _, p in ps]
        where = {(id(s.host), s.key): (s, m) for s, m in pairs}
        asked = [where[id(s.host), s.key] for ps in by_host.values() for s, _ in ps]
        for batch in data:
            with torch.enable_grad():
                value = loss_of(run(model, batch)) if loss is None else loss(model, batch)
                grads = torch.autograd.grad(value, tensors, allow_unused=True)
            with torch.no_grad():
                for (site, method), g in zip(asked, grads, strict=True):
                    if g is not None:
                        method.observe_grad(Base(site, (), method.common), g)
                        seen.add(id(site))
    finally:
        for (host, cls, stack), state in zip(before, states, strict=True):
            if PROBE in host._modules[CHILD].sites:
                host._modules[CHILD].drop(PROBE)
            if state is None:
                swap_out(host)
            else:
                stack.read, stack.alias = state
                host.__class__ = cls
    return seen
