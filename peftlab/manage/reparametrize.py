"""What happens to prefixes and prompts besides training: the network that made them goes, a text's keys and values come."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peftlab.attach.build import finish_method
from peftlab.core.adapters import refuse_inside_blocks, select_adapters
from peftlab.core.attention import AttentionMode
from peftlab.core.build import build_method
from peftlab.core.method import AdapterConfig, Method
from peftlab.core.site import Site
from peftlab.core.stack import SHARED_CHILD, adapted_modules
from peftlab.manage.switch import disabled
from peftlab.model.index import ensure_module
from peftlab.model.patterns import did_you_mean
from peftlab.model.walk import named_base_modules, unwrap_parallel
from peftlab.parts.prefix import to_features
from peftlab.support.batches import call_with_batch
from peftlab.support.contexts import preserved_rng


def drop_reparametrization(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Keep what the networks of these adapters (all that have one) make, and take the networks away; returns the model.

    The adapters are then those of the same method without a network (`net=False`, `net="none"`), in files too: smaller, with equal outputs.
    An optimizer that held the old tensors must be made anew.

    Raises:
        ValueError: for adapters that have no network; the model is then unchanged.
    """
    refuse_inside_blocks(ensure_module(model))
    root = unwrap_parallel(model)
    chosen = select_adapters(root, names)
    found = [(stack, name, stack.sites[name]) for _, _, stack in adapted_modules(root) for name in stack.order if name in chosen]
    able = {name for _, name, pairs in found for _, m in pairs if _own_tensors(m) is not None}
    unable = [n for n in chosen if n not in able]
    if not able or (names is not None and unable):
        raise ValueError(f"{unable or chosen} have no network that makes their tensors, or none any more")
    recipes: dict[int, AdapterConfig] = {}
    with torch.no_grad(), preserved_rng():
        new = [(stack, name, [(s, _plain_method(s, m, recipes)) for s, m in pairs]) for stack, name, pairs in found if name in able]
    for stack, name, pairs in new:
        acting, order = stack.active, list(stack.sites)
        stack.add(name, pairs)
        stack.sites = {n: stack.sites[n] for n in order}
        stack.set_active(acting)
    for _, m in list(named_base_modules(root)):
        holder = m._modules.get(SHARED_CHILD)
        for name in able if holder is not None else ():
            holder._modules.pop(name, None)
        if holder is not None and not holder._modules:
            del m._modules[SHARED_CHILD]
    return model


def _own_tensors(m: Method) -> tuple[dict, dict[str, Tensor]] | None:
    """What the method says of itself without a network; None where it has none."""
    tell = getattr(m, "without_network", None)
    if tell is None:
        return None
    hyper, tensors = tell()
    defaults = {k: m.recipe.hyper.get(k) for k in hyper}
    return None if defaults == hyper else (hyper, tensors)


def _plain_method(site: Site, m: Method, recipes: dict[int, AdapterConfig]) -> Method:
    hyper, tensors = m.without_network()
    old = m.recipe
    if id(old) not in recipes:
        recipes[id(old)] = AdapterConfig(old.cls, old.label, {**old.hyper, **hyper}, old.name, old.seed)
    fresh = build_method(recipes[id(old)], site)
    some = next(m.parameters(), None)
    finish_method(fresh, site, torch.float32 if some is None else some.dtype)
    for name, value in tensors.items():
        getattr(fresh, name).copy_(value).requires_grad_(any(p.requires_grad for p in m.parameters()))
    fresh.train(m.training)
    return fresh


def prefix_from(model: nn.Module, batch, name: str = "default", source: str | None = None) -> nn.Module:
    """Start a prefix from a text: run the base on `batch` and keep, at each site, its attention's first n keys and values.

    Args:
        batch: what the model is called with (a mapping is keywords, a tuple positions); its first row counts, at least n tokens.
        name: the adapter, without a network.
        source: path of one attention module whose keys and values all sites take; by default each takes its own.

    Raises:
        ValueError: for an adapter that is no plain prefix, too short a text, or another layer of other widths; the model is then unchanged.
    """
    ensure_module(model)
    (name,) = select_adapters(model, name)
    pairs = [(s, m) for _, _, stack in adapted_modules(model) for s, m in stack.sites.get(name, ()) if getattr(m, "K", None) is not None]
    if not pairs:
        raise ValueError(f"{name!r} holds no keys and values of its own: prefix_tuning with net=False does (or drop_reparametrization it first)")
    at = dict(named_base_modules(unwrap_parallel(model)))
    if source is not None and source not in at:
        raise ValueError(f"source={source!r} is no module of this model.{did_you_mean(source, list(at))}")
    hosts = {id(s.host): s.host for s, _ in pairs} if source is None else {id(at[source]): at[source]}
    seen = _recorded_keys(model, batch, list(hosts.values()))
    new = []
    for s, m in pairs:
        k, v = seen[id(s.host if source is None else at[source])]
        for t, mine in ((k, m.K), (v, m.V)):
            rows = to_features(t, mine.shape[1])
            if rows is None or rows.shape[0] < mine.shape[0]:
                raise ValueError(f"{s.path!r} needs {tuple(mine.shape)}, but attention gave {tuple(t.shape)}: take a longer text, or another source")
            new.append((mine, rows[: mine.shape[0]]))
    with torch.no_grad():
        for mine, rows in new:
            mine.copy_(rows)
    return model


def _recorded_keys(model: nn.Module, batch, hosts: list[nn.Module]) -> dict[int, tuple[Tensor, Tensor]]:
    """The keys and values that each module's first attention call got, as the base computes them."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    modes: list[AttentionMode] = []

    def enter(m, *_):
        def change(run, q, k, v, options):
            seen.setdefault(id(m), (k.detach(), v.detach()))
            return run(q, k, v, **options)

        modes.append(AttentionMode(change))
        modes[-1].__enter__()

    def leave(*_):
        modes.pop().__exit__(None, None, None)

    handles = [h for m in hosts for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave, always_call=True))]
    trained = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with torch.no_grad(), disabled(model):
            call_with_batch(model, batch)
    finally:
        for h in handles:
            h.remove()
        for m in trained:
            m.training = True
    if len(seen) < len(hosts):
        raise ValueError(f"{len(hosts) - len(seen)} of {len(hosts)} modules made no attention call on this batch")
    return seen
