"""`rescale`: the option alpha of adapters times a factor."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from peftlab.core.adapters import adapter_modules, refuse_inside_blocks, select_adapters
from peftlab.core.build import build_method
from peftlab.core.options import finite
from peftlab.core.stack import adapted_modules
from peftlab.model.index import ensure_module
from peftlab.model.walk import unwrap_parallel
from peftlab.registry import keywords


def rescale(model: nn.Module, factor: float, names: str | Iterable[str] | None = None) -> None:
    """Multiply the option `alpha` of adapters (all by default), and with it their change; compiled models are not compiled again.

    Raises:
        ValueError: for methods without `alpha`, for merged adapters, and where the factor is not a finite number.
    """
    found = [(n, m) for n, _, site, m in adapter_modules(unwrap_parallel(ensure_module(model)), select_adapters(model, names)) if site is not None]
    refuse_inside_blocks(model)
    finite("factor", factor)
    for n, m in found:
        if "alpha" not in keywords(type(m)) or not isinstance(m.__dict__.get("s"), Tensor):
            raise ValueError(f"{n!r} cannot be rescaled: {m.recipe.label} at {m.site.path!r} has no alpha")
    merged = {n for _, _, s in adapted_modules(model) for n in s.merged} & {n for n, _ in found}
    if merged:
        raise ValueError(f"{min(merged)!r} is merged: unmerge it before it is rescaled")
    scales: dict[int, Tensor] = {}
    for _, m in found:
        recipe = m.recipe
        if id(recipe) not in scales:
            alpha = recipe.hyper.get("alpha", keywords(recipe.cls)["alpha"].default)
            recipe.hyper = {**recipe.hyper, "alpha": alpha * factor}
            scales[id(recipe)] = build_method(recipe, m.site.seen_as("shapes"), (), "meta").s  # as a model that loads the file will have it
        m.s.copy_(scales[id(recipe)])
