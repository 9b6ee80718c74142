"""`unwrap`: adapters come off, and the model is what it was before."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftlab.core.adapters import refuse_inside_blocks, select_adapters
from peftlab.core.ledger import RECORD_ATTRIBUTE, BaseRecord, base_records, changed_buffers
from peftlab.core.stack import SHARED_CHILD, adapted_modules
from peftlab.core.swap import forget_unused_ties, restore_class
from peftlab.manage.unmerge import unmerge
from peftlab.model.index import ensure_module, join_path
from peftlab.model.walk import named_base_modules, unwrap_parallel
from peftlab.support.contexts import paused_gc


@paused_gc()
def unwrap(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Take adapters off (all by default). Without any left, objects, classes, flags, buffers and bits are those before `wrap`."""
    refuse_inside_blocks(ensure_module(model))
    take_off(model, select_adapters(model, names), restore=True)
    return model


def take_off(model: nn.Module, chosen: list[str], restore: bool) -> None:
    root = unwrap_parallel(model)
    if restore:
        gone = [(n, path) for path, _, s in adapted_modules(root) for n in s.lossy if n in chosen]
        if gone:
            raise ValueError(
                f"{gone[0][0]!r} was merged into {gone[0][1]!r} with keep=False: the base bits are gone. "
                "merge(..., unload=True) takes adapters off and keeps the merged weights."
            )
        merged = sorted({n for _, _, s in adapted_modules(root) for n in s.merged if n in chosen and n not in s.lossy})
        if merged:
            unmerge(root, merged)
    for _, _, s in adapted_modules(root):
        for n in [n for n in s.order if n in chosen]:
            for site, m in s.sites[n]:
                if m.in_place:
                    site.raw_tensor.requires_grad_(False)
            s.drop(n)
    forget_unused_ties(root)
    for _, m in list(named_base_modules(root)):
        holder = m._modules.get(SHARED_CHILD)
        if holder is not None:
            for n in chosen:
                holder._modules.pop(n, None)
            if not holder._modules:
                del m._modules[SHARED_CHILD]
    for _, host, s in adapted_modules(root):
        if not s.sites and not s.alias and not s.fused and SHARED_CHILD not in host._modules:
            restore_class(host)
    for _, m, ledger in reversed(base_records(root)):  # the innermost remembers the latest state
        for n in chosen:
            ledger.targets.pop(n, None)
        if not ledger.targets:
            _put_base_back(m, ledger, restore)
            del m.__dict__[RECORD_ATTRIBUTE]


def _put_base_back(root: nn.Module, ledger: BaseRecord, restore: bool) -> None:
    if restore:
        for b, old in list(changed_buffers(root)):
            b.data = old.data.clone()
    for path, m in named_base_modules(root):
        for n, p in m._parameters.items():
            if p is not None and join_path(path, n) in ledger.flags:
                p.requires_grad_(ledger.flags[join_path(path, n)])
