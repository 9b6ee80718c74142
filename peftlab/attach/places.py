"""Every structural name that targets may say: those of a model's parts, and those that depend on the adapters that are there."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peftlab.core.site import ADAPTERS_CHILD
from peftlab.model import layers, places
from peftlab.model.index import ModelIndex
from peftlab.model.places import linear_layers
from peftlab.model.walk import Adapted


def adapted_layers(model: ModelIndex) -> list[nn.Module]:
    """The linear-like layers whose weight has an adapter already; where none has, those of the blocks."""
    return [m for m in model.modules.values() if isinstance(layers.layer_rule(m), layers.Linear) and _changes_weight(m)] or linear_layers(model)


def _changes_weight(m: nn.Module) -> bool:
    """Whether it holds an adapter that says something about a weight."""
    return isinstance(m, Adapted) and any(method.has_weight() for pairs in m._modules[ADAPTERS_CHILD].sites.values() for _, method in pairs)


PLACES: dict[str, Callable[[ModelIndex], list[nn.Module]]] = places.PLACES | {":adapted": adapted_layers}
