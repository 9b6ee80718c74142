"""The one step that changes a model: methods are put at their sites, and everything else is frozen."""

from __future__ import annotations

from torch import nn

from peftlab.attach.request import WrapRequest
from peftlab.core.ledger import RECORD_ATTRIBUTE, BaseRecord, base_records
from peftlab.core.method import Method
from peftlab.core.shared_modules import keep_shared_module
from peftlab.core.site import Site
from peftlab.core.swap import FUSED_KERNELS, attach_to_module, leave_fused_kernels, show_at_tied_ends
from peftlab.model.index import ModelIndex, join_path
from peftlab.model.walk import named_base_modules


def attach_methods(model: nn.Module, req: WrapRequest, methods: list[Method]) -> None:
    """The one step that changes the model; it does not fail."""
    ledger = model.__dict__.get(RECORD_ATTRIBUTE)
    if ledger is None:
        inner = base_records(model)
        ledger = BaseRecord.of(model)
        for path, _, old in inner:  # a part was wrapped before: its flags are older than ours
            ledger.flags |= {join_path(path, k): v for k, v in old.flags.items()}
        model.__dict__[RECORD_ATTRIBUTE] = ledger
        if not inner:
            freeze_base(model)
        else:
            for path, m in named_base_modules(model):
                if not any(path == p or path.startswith(p + ".") or p == "" for p, _, _ in inner):
                    for p in m._parameters.values():
                        if p is not None:
                            p.requires_grad_(False)
    by_host: dict[int, list[tuple[Site, Method]]] = {}
    for site, method in zip(req.sites, methods, strict=True):
        by_host.setdefault(id(site.host), []).append((site, method))
    for pairs in by_host.values():
        stack = attach_to_module(req.name, pairs)
        if any(t.is_meta for _, m in pairs for t in [*m.parameters(), *m.buffers()]):
            stack.unready.add(req.name)
        for site, method in pairs:
            if method.in_place:
                site.raw_tensor.requires_grad_(True)
            if site.tied and site.shared:
                show_at_tied_ends(site)
            elif site.tied:
                stack.untied.setdefault(site.param)
    _leave_kernels_above(model, [s for s in req.sites if s.kind == "module"])
    common = methods[0].recipe.common
    if common is not None:
        if next(common.parameters(), None) is not None:  # what is trained has the adapter's precision; a constant keeps its own
            common.to(req.default_dtype(req.sites[0]))
        keep_shared_module(model, req.name, common, req.sites[0].device)
    ledger.targets[req.name] = req.asked


def _leave_kernels_above(model: nn.Module, sites: list[Site]) -> None:
    """Where a call is surrounded inside torch's encoder, its fused kernel must not run."""
    kinds = tuple(kind for kind, _, _ in FUSED_KERNELS)
    if not sites or not any(isinstance(m, kinds) for _, m in named_base_modules(model)):
        return
    parents = ModelIndex.of(model).parents
    for site in sites:
        above, todo = {}, [site.host]
        while todo:
            for p in parents.get(id(todo.pop()), ()):
                if id(p) not in above:
                    above[id(p)] = p
                    todo.append(p)
        leave_fused_kernels(site, [m for m in above.values() if isinstance(m, kinds)])


def freeze_base(model: nn.Module) -> None:
    for _, m in named_base_modules(model):
        for p in m._parameters.values():
            if p is not None:
                p.requires_grad_(False)
