"""Where a method sits when nothing is said: found from the structure of the model."""

from __future__ import annotations

from torch import nn

from peftlab.attach.explain import alternatives_text, sites_at_place
from peftlab.core.method import Method
from peftlab.core.site import Site
from peftlab.model import layers
from peftlab.model.index import ModelIndex
from peftlab.model.patterns import PatternError
from peftlab.model.places import output_head

NARROW = 8  # a linear layer whose smaller side is below this is a gate, a router or a regressor, not a place for a weight method


def default_targets(model: ModelIndex, there: list[Site], cls: type[Method]) -> list[Site]:
    """For weight methods, every linear-like layer but the output head; where a model has none, its convolutions and recurrent weights.

    Layers with a side below `NARROW` (gates, routers) are left out where wider ones remain. A method that fits only embeddings takes
    these, a method on any tensor takes all it fits, and one on a call says its place itself.
    """
    if cls.place is not None:
        return sites_at_place(model, cls.place, there)
    if cls.on != "matrix":
        return there
    usable = [s for s in there if cls.fits(s) and not s.explicit]
    linear = [s for s in usable if isinstance(s.rule, layers.Linear) or _is_of_attention(s)]
    rest = [s for s in usable if isinstance(s.rule, layers.Conv) or isinstance(s.host, (nn.RNNBase, nn.RNNCellBase))]
    heads = output_head(model)
    for pool in (linear, rest):
        kept = [s for s in pool if s.host not in heads]
        kept = [s for s in kept if min(s.n_out, s.n_in) >= NARROW] or kept
        if kept:
            return kept
    return linear + rest or [s for s in usable if isinstance(s.rule, layers.Embedding)]


def refuse_head_alone(model: ModelIndex, cls: type[Method], label: str, there: list[Site], found: list[Site]) -> None:
    """A default that is the output head means the model's only layer, not the only one that the method fits."""
    heads = output_head(model) if cls.on == "matrix" and cls.place is None and len({id(s.host) for s in found}) == 1 else []
    if not found or found[0].host not in heads:
        return
    others = [s for s in there if not s.explicit and s.host not in heads and _is_layer_like(s) and not cls.fits(s)]
    if others:
        why = "the weight is read there without the layer being called" if all(s.read_only for s in others) else "as their kind or shape says"
        raise PatternError(
            f"{label} fits the output head {found[0].path!r} alone, and none of the {len(others)} other layers ({others[0].path!r} and so on): {why}. "
            "Say targets=':head' if that is meant." + alternatives_text(model, [s.host for s in others])
        )


def _is_layer_like(s: Site) -> bool:
    """A linear-like layer, a convolution or a recurrent weight."""
    return isinstance(s.rule, (layers.Linear, layers.Conv)) or _is_of_attention(s) or isinstance(s.host, (nn.RNNBase, nn.RNNCellBase))


def _is_of_attention(s: Site) -> bool:
    return isinstance(s.host, nn.MultiheadAttention) and not s.explicit
