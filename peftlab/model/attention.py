"""Which modules run attention, which of their children make the keys and values, and how wide these are."""

from __future__ import annotations

import re

from torch import nn

from peftlab.model import layers
from peftlab.model.packed import dense_meta
from peftlab.model.walk import named_base_modules, original_class

_NOISE_WORDS = {"proj", "projection", "lin", "linear", "layer", "to", "w", "c", "attn", "att", "attention", "fc", "dense", "self", "in", "states", "head", "heads"}

_ROLE_WORDS = {"q": "q", "query": "q", "queries": "q", "k": "k", "key": "k", "keys": "k", "v": "v", "value": "v", "values": "v", "wq": "q", "wk": "k", "wv": "v"}

_FUSED_WORDS = {"qkv": "qkv", "wqkv": "qkv", "querykeyvalue": "qkv", "kv": "kv", "keyvalue": "kv", "wkv": "kv"}


def _projection_role(name: str) -> str:
    """What a projection's name says it makes: q, k, v, kv, qkv, or nothing."""
    words = [w for w in re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) if w and w not in _NOISE_WORDS]
    whole = "".join(words)
    return _FUSED_WORDS.get(whole) or _ROLE_WORDS.get(whole) or ""


def key_value_projections(host: nn.Module) -> dict[str, tuple[nn.Module, int, int]]:
    """Which child makes the keys ("k") and the values ("v"), and between which of its output features; empty where that cannot be seen.

    Told by the literature's names (q, k, v, query, key, value, qkv ...), or, in a module that calls itself attention, by the widths
    of a fused projection and the one that follows it. Fused ones are in the order q, k, v.
    """
    linears = {n: (m, layers.matrix_shape(m, layers.layer_rule(m), dense_meta(m, "weight"))) for n, m in _linear_children(host)}
    roles = {_projection_role(n): (m, n_out) for n, (m, (n_out, _)) in linears.items() if _projection_role(n)}
    if {"q", "k", "v"} <= roles.keys():
        return {r: (roles[r][0], 0, roles[r][1]) for r in "kv"}
    fused, width = None, 0
    if {"q", "kv"} <= roles.keys():
        (fused, n_out), width = roles["kv"], roles["kv"][1] // 2
    elif "qkv" in roles:
        fused, n_out = roles["qkv"]
        after = [n_in for n, (m, (_, n_in)) in linears.items() if m is not fused and n_in < n_out]
        width = (n_out - after[0]) // 2 if after else n_out // 3
    elif "att" in original_class(host).__name__.lower() and len(linears) == 2:
        (fused, (n_out, _)), (_, (_, n_in)) = linears.values()
        width = (n_out - n_in) // 2
    if fused is None or width <= 0:
        return {}
    return {"k": (fused, n_out - 2 * width, n_out - width), "v": (fused, n_out - width, n_out)}


def _linear_children(host: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in host._modules.items() if m is not None and isinstance(layers.layer_rule(m), layers.Linear)]


def _mentions_attention(cls: type) -> bool:
    """Whether code of this very class mentions torch's attention function."""
    codes = [f.__code__ for f in vars(cls).values() if callable(f) and getattr(f, "__code__", None) is not None]
    return any("scaled_dot_product_attention" in c.co_names for c in codes)


def runs_attention(host: nn.Module) -> bool:
    """Whether a module is seen to run attention itself."""
    return isinstance(host, nn.MultiheadAttention) or bool(key_value_projections(host)) or _mentions_attention(original_class(host))


def key_value_widths(host: nn.Module, width: int | None = None) -> tuple[int, int]:
    """(features of a key, features of a value), all heads together: as said, or as seen; (0, 0) where there is no attention or none is seen."""
    if width is not None and runs_attention(host):
        return width, width
    if isinstance(host, nn.MultiheadAttention):
        return host.embed_dim, host.embed_dim
    found = key_value_projections(host)
    return tuple(found[r][2] - found[r][1] for r in "kv") if found else (0, 0)


def is_attention_block(host: nn.Module) -> bool:
    """Whether a module holds attention and more, and no list of modules that do."""
    if isinstance(host, nn.MultiheadAttention):
        return False
    lists = [m for _, m in named_base_modules(host) if isinstance(m, (nn.ModuleList, nn.Sequential))]
    return any(runs_attention(m) for _, m in named_base_modules(host)) and not any(runs_attention(m) for held in lists for _, m in named_base_modules(held))


def token_dimension(host: nn.Module) -> int:
    """The dimension of a block's input that counts its tokens: 1, or 0 around torch's attention with the sequence first."""
    return 0 if any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in host.modules()) else 1


def projection_input_width(host: nn.Module) -> int:
    """Features of what the module's key and value projections take; 0 where they cannot be seen or take different ones."""
    if isinstance(host, nn.MultiheadAttention):
        return host.kdim if host.kdim == host.vdim else 0
    found = {layers.matrix_shape(m, layers.layer_rule(m), dense_meta(m, "weight"))[1] for m, _, _ in key_value_projections(host).values()}
    return found.pop() if len(found) == 1 else 0
