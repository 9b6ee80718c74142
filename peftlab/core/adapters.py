"""The adapters of a model: their names, modules and tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from peftlab.core.ledger import RECORD_ATTRIBUTE
from peftlab.core.method import Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.core.stack import SHARED_CHILD, AdapterStack, adapted_modules
from peftlab.model.index import ensure_module, join_path
from peftlab.model.patterns import did_you_mean
from peftlab.model.walk import named_base_modules


def refuse_inside_blocks(model: nn.Module, found: list | None = None) -> None:
    """Inside `disabled` the frozen tensors are in the adapted ones' place, inside `route` every row has its own: nothing may be changed or saved there."""
    for _, _, s in adapted_modules(model) if found is None else found:
        if s.silent:
            raise ValueError(
                "inside `with disabled(model)` adapters cannot be changed or saved: leave the block first (a copy that was made inside "
                "has no block to leave: it stays a reference without adapters)"
            )
        if s.route is not None:
            raise ValueError("inside `with route(model, ...)` adapters cannot be changed or saved: leave the block first")


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of a model, in stacking order."""
    return adapted_modules_and_names(model)[1]


def adapted_modules_and_names(model: nn.Module) -> tuple[list[tuple[str, nn.Module, AdapterStack]], list[str]]:
    """What `stacks` and `names` say, in one walk."""
    found, asked, there = [], {}, {}
    for path, m in named_base_modules(model):
        if RECORD_ATTRIBUTE in m.__dict__:
            asked.update(dict.fromkeys(m.__dict__[RECORD_ATTRIBUTE].targets))
        stack = m._modules.get(ADAPTERS_CHILD)
        if type(stack) is AdapterStack:
            found.append((path, m, stack))
            there.update(stack.sites)
    return found, list(dict.fromkeys([*asked, *there]))


def adapter_modules(model: nn.Module, wanted: Iterable[str] | None = None) -> list[tuple[str, str, Site | None, nn.Module]]:
    """(adapter, path, site, module) of every method and shared module; paths are those of the saved tensors."""
    out = []
    for path, _, stack in adapted_modules(model):
        stack.current()  # start values that are still to come are made now
        for name, pairs in stack.sites.items():
            if wanted is None or name in wanted:
                out += [(name, join_path(path, ADAPTERS_CHILD, name, s.key), s, m) for s, m in pairs]
    for path, m in named_base_modules(model):
        holder = m._modules.get(SHARED_CHILD)
        for name, common in (holder._modules if holder is not None else {}).items():
            if wanted is None or name in wanted:
                out.append((name, join_path(path, SHARED_CHILD, name), None, common))
    return out


def site_path(name: str, path: str, site: Site) -> str:
    """The site's path in the model whose tensors lie at `path`; `site.path` is that in the (part of the) model that was wrapped."""
    return join_path(path.removesuffix(join_path(ADAPTERS_CHILD, name, site.key)).rstrip("."), site.key)


def select_adapters(model: nn.Module, wanted: str | Iterable[str] | None) -> list[str]:
    """Adapter names as a list, in stacking order; unknown ones raise with the nearest right name."""
    return match_names(adapter_names(ensure_module(model)), wanted)


def match_names(there: list[str], wanted: str | Iterable[str] | None) -> list[str]:
    """Those of the names `there` that are wanted (None: all); unknown ones raise with the nearest right name."""
    if wanted is None:
        return there
    asked = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Iterable) else [wanted]
    for n in asked:
        if not isinstance(n, str):
            raise TypeError(f"adapters are named by a string or a list of strings, not {wanted!r}")
        if n not in there:
            raise ValueError(f"there is no adapter {n!r}; this model has {there or 'none'}.{did_you_mean(n, there)}")
    return [n for n in there if n in asked]


def trained_tensors(site: Site | None, m: nn.Module) -> dict[str, Tensor]:
    """The parameters of an adapter's module by name; an in-place method's is the base tensor that it trains."""
    if site is not None and m.in_place:
        return {site.param: site.raw_tensor}
    return dict(m.named_parameters())


def overrides_hook(m: nn.Module, hook: str) -> bool:
    """Whether this method gives one of the optional hooks of the protocol, such as "step" or "penalty"."""
    return isinstance(m, Method) and getattr(type(m), hook, None) is not getattr(Method, hook, None)
