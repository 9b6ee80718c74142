"""The methods of a request, with their start values; the model is not touched."""

from __future__ import annotations

import torch

from peftlab.attach.request import WrapRequest, check_method
from peftlab.core.build import build_method
from peftlab.core.method import AdapterConfig, Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.model.layers import NeedsWeight
from peftlab.support.progress import Progress, reported


def build_methods(req: WrapRequest, progress: Progress = None) -> list[Method]:
    """The methods of a request with their start values; the model is not touched."""
    out = []
    recipes = list(req.recipes("meta" if all(s.device.type == "meta" for s in req.sites) else "cpu"))
    with reported(progress, req.label) as tell:
        for site, recipe in zip(req.sites, recipes, strict=True):
            out.append(_built_method(req, site, recipe))
            tell(len(out), len(req.sites), site.path)
    return out


def _built_method(req: WrapRequest, site: Site, recipe: AdapterConfig) -> Method:
    """The method of one site."""
    stack = site.host._modules.get(ADAPTERS_CHILD)
    try:
        method = build_method(recipe, site, stack.links.weights if stack else (), "meta" if site.device.type == "meta" else "cpu")
    except NeedsWeight as e:
        raise ValueError(f"{req.label} needs the weight's values at {site.path!r}: {e}") from None
    check_method(method, site, req.label)
    if stack is not None and site.rule.name != "opaque" and any(s.rule.name == "opaque" for ps in stack.sites.values() for s, _ in ps):
        raise ValueError(f"{site.path!r} only offers a call, which an adapter there surrounds: {req.label} would have to be read")
    if stack is not None and site.rule.name == "opaque" and stack.read:
        raise ValueError(f"{site.path!r} only offers a call, and an adapter there is read: {req.label} cannot surround it")
    finish_method(method, site, req.default_dtype(site))
    return method


def finish_method(method: Method, site: Site, dtype: torch.dtype) -> None:
    """Device, dtype and mode of a new method."""
    device = site.device
    plain = [t for t in (*method._parameters.values(), *method._buffers.values()) if t is not None]
    if method._modules or any(t.device != device or (t.is_floating_point() and t.dtype != dtype) for t in plain):
        method._apply(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))
    method.__dict__["training"] = site.host.training
    for m in method._modules.values():
        m.train(site.host.training)
