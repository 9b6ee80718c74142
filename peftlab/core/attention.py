"""Around the attention function: while a module runs, its calls of `F.scaled_dot_product_attention` go through a method.

`attend(base, change, ...)` runs what lies below and hands every attention call inside it to `change(run, q, k, v, options)`, where
`run(q, k, v, **options)` is the attention as it would have been. That holds for whatever a model does around attention: projections, rotary
positions, caches, repeated or grouped heads, masks of every kind. `nn.MultiheadAttention` is spelled out here, because torch's own function
computes attention by hand where the weights are asked for. A module that never comes by is refused before its result is used.

Legend: B batch, H heads, L queries, S keys, D head size; q (B, H, L, D), k and v (B, H or fewer, S, D).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _is_torch_function_mode_enabled, handle_torch_function

from peftlab.model.attention import key_value_projections
from peftlab.model.walk import original_class
from peftlab.parts.prefix import to_heads

if TYPE_CHECKING:
    from peftlab.core.base import Base
    from peftlab.core.site import Site


AttentionChange = Callable[..., Tensor]


def surround_attention(base: Base, change: AttentionChange, *args, **kwargs):
    """What lies below, with `change(run, q, k, v, options)` in place of each of its attention calls.

    Raises:
        RuntimeError: when no such call was made, so that nothing was changed.
    """
    mode = AttentionMode(change)
    with mode:
        out = base(*args, **kwargs)
    if not mode.calls:
        raise RuntimeError(_unreached_text(base.path, base.site.host))
    return out


def _unreached_text(path: str, host: nn.Module) -> str:
    what = (
        f"{path!r}, a {original_class(host).__name__}, computes attention by hand: nothing in it called torch's scaled_dot_product_attention, so that a "
        "method on attention would do nothing. "
    )
    if _caps_scores(host):
        return what + (
            "It caps the scores of its attention, for which torch's function has no option: no setting of the model helps. Methods on input tokens "
            "(prompt_tuning, p_tuning) and on weights work there."
        )
    return what + (
        'Load a transformers model with attn_implementation="sdpa" (or call model.set_attn_implementation("sdpa")); in a module of your own use '
        "torch.nn.functional.scaled_dot_product_attention."
    )


def _caps_scores(host: nn.Module) -> bool:
    """Whether a module says that its scores go through a tanh before the softmax, as Gemma 2's do."""
    return any("softcap" in name and value is not None for name, value in vars(host).items())


def refuse_handwritten_attention(base: Base) -> None:
    """The same refusal where the module or its configuration already says it: before anything is built."""
    name = getattr(getattr(base.site.host, "config", None), "_attn_implementation", None)
    by_hand = isinstance(name, str) and "sdpa" not in name
    if by_hand or _caps_scores(base.site.host):
        said = f"attention is set to {name!r} at {base.path!r}. " if by_hand else ""
        raise ValueError(said + _unreached_text(base.path, base.site.host))


def pass_through(func: Callable, args: tuple, kwargs: dict):
    """A call that a mode only lets through. Dynamo cannot follow the methods of tensors that are written in Python, only their names."""
    if torch.compiler.is_compiling() and func.__name__ in _PYTHON_METHODS and isinstance(args[0], Tensor):
        return getattr(args[0], func.__name__)(*args[1:], **kwargs)
    return func(*args, **kwargs)


_PYTHON_METHODS = {name for name, f in vars(Tensor).items() if isinstance(f, types.FunctionType)}


class AttentionMode(TorchFunctionMode):
    """Hands the attention calls of one module's run to a function, and counts them."""

    def __init__(self, change: AttentionChange):
        super().__init__()
        self.change, self.calls = change, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.plain(*args, **kwargs)
        if func is attention_with_weights:
            return self.weighed(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return multi_head_attention(self.plain, self.weighed, *args, **kwargs)
        return pass_through(func, args, kwargs)

    def plain(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
        self.calls += 1
        options = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        return self.change(F.scaled_dot_product_attention, query, key, value, options)

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
        self.calls += 1
        weights: list[Tensor] = []

        def run(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            y, w = attention_with_weights(q, k, v, attn_mask, dropout_p)
            weights.append(w)
            return y

        options = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=False, scale=None, enable_gqa=False)
        y = self.change(run, q, k, v, options)
        return y, weights[0][..., -k.shape[-2] :]  # what the model's own keys get: they come last


def attention_with_weights(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Attention (B, H, L, D) with its weights (B, H, L, S), in the very steps of torch's `multi_head_attention_forward`."""
    if _is_torch_function_mode_enabled():
        return handle_torch_function(attention_with_weights, (q, k, v), q, k, v, attn_mask, dropout_p)
    B, H, _, D = q.shape
    q, k, v = (t.reshape(B * H, -1, t.shape[-1]) for t in (q * (1.0 / D) ** 0.5, k, v))
    if attn_mask is None:
        w = torch.bmm(q, k.mT)
    else:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~attn_mask, float("-inf"))
        w = torch.baddbmm(attn_mask.expand(B, H, *attn_mask.shape[-2:]).reshape(B * H, -1, k.shape[1]), q, k.mT)
    w = F.softmax(w, dim=-1)
    w = F.dropout(w, dropout_p) if dropout_p > 0 else w
    return torch.bmm(w, v).view(B, H, -1, v.shape[-1]), w.view(B, H, -1, k.shape[1])


def multi_head_attention(
    plain: Callable, weighed: Callable, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
    dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None, need_weights=True, attn_mask=None, use_separate_proj_weight=False,
    q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None, static_v=None, average_attn_weights=True, is_causal=False,
):  # fmt: skip
    """`F.multi_head_attention_forward` with the attention itself left to `plain` or, with weights, to `weighed`; sequence first."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = key_padding_mask if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    L, B, E = query.shape
    Wq, Wk, Wv = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)
    bq, bk, bv = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    if query is key and key is value and not use_separate_proj_weight:  # one product, as torch takes it
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        q, k, v = F.linear(query, Wq, bq), F.linear(key, Wk, bk), F.linear(value, Wv, bv)
    if bias_k is not None:
        k, v = torch.cat([k, bias_k.repeat(1, B, 1)]), torch.cat([v, bias_v.repeat(1, B, 1)])
    q, k, v = (t.reshape(t.shape[0], B, num_heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
    k, v = (t if s is None else s.view(B, num_heads, *s.shape[1:]) for t, s in ((k, static_k), (v, static_v)))
    if add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _join_masks(attn_mask, key_padding_mask, num_heads, key.shape[0], k.shape[2], q)
    dropout_p = dropout_p if training else 0.0
    y, w = weighed(q, k, v, mask, dropout_p) if need_weights else (plain(q, k, v, mask, dropout_p, causal), None)
    y = F.linear(y.permute(2, 0, 1, 3).reshape(L * B, E), out_proj_weight, out_proj_bias).view(L, B, -1)
    w = w.mean(1) if w is not None and average_attn_weights else w
    return (y, w) if batched else (y.squeeze(1), w if w is None else w.squeeze(0))


def _join_masks(attn_mask: Tensor | None, padding: Tensor | None, heads: int, given: int, S: int, q: Tensor) -> Tensor | None:
    """An additive mask (B or 1, H or 1, L, S); True means "not to be seen" in the two that torch's module takes."""

    def additive(m: Tensor) -> Tensor:
        return torch.zeros(m.shape, dtype=q.dtype, device=q.device).masked_fill(m, float("-inf")) if m.dtype == torch.bool else m.to(q.dtype)

    mask = None
    if attn_mask is not None:
        mask = additive(attn_mask)
        mask = mask[None, None] if mask.ndim == 2 else mask.view(-1, heads, *mask.shape[1:])
    if padding is not None:
        padding = additive(padding)[:, None, None, :]
        mask = padding.expand(-1, -1, q.shape[2], -1) if mask is None else mask + padding
    return mask if mask is None else F.pad(mask, (0, S - given))


@dataclass
class KeyValueProjections:
    """A module's own projections to keys and values, adapters on them included."""

    host: nn.Module
    found: dict[str, tuple[nn.Module, int, int]]
    sure: bool = False  # that these are the keys and values which attention gets

    @classmethod
    def of(cls, site: Site) -> KeyValueProjections:
        found = key_value_projections(site.host)
        return cls(site.host, found, sure=not found or found["k"][0] is not found["v"][0])

    def __call__(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """P (B, n, dim) -> keys (B, n, features) and values."""
        host = self.host
        if isinstance(host, nn.MultiheadAttention):
            W = host.in_proj_weight.chunk(3) if host._qkv_same_embed_dim else (None, host.k_proj_weight, host.v_proj_weight)
            b = (None, None, None) if host.in_proj_bias is None else host.in_proj_bias.chunk(3)
            return tuple(F.linear(P, W[i], b[i]) for i in (1, 2))
        (mk, k0, k1), (mv, v0, v1) = self.found["k"], self.found["v"]
        K = mk.forward(P)  # not the module's call: hooks on it wait for the model's own tokens
        V = K if mv is mk else mv.forward(P)
        return K[..., k0:k1], V[..., v0:v1]

    @torch.no_grad()
    def confirm(self, x: Tensor, v: Tensor, path: str) -> None:
        """Compare once what a fused projection of x (B, L, dim) gives as values with those of the attention call, (B, H, L, D).

        Raises:
            ValueError: where the projection has its parts in another order, interleaved by heads say.
        """
        if self.sure or torch.compiler.is_compiling() or x.ndim != 3 or v.ndim != 4 or v.shape[0] != x.shape[0] or v.shape[2] != x.shape[1]:
            return
        V = to_heads(self(x)[1], v, path)
        if not torch.allclose(V, v, rtol=1e-2, atol=1e-2 * float(v.abs().max())):
            raise ValueError(f"the fused projection of {path!r} does not have q, k and v one after the other: which of its rows make keys cannot be seen")
        self.sure = True
