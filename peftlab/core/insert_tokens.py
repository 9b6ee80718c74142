"""One run of a stack with virtual tokens among its tokens: masks, positions and labels lengthened, the output cut back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _is_torch_function_mode_enabled, handle_torch_function

from peftlab.core.attention import pass_through
from peftlab.core.base import Base
from peftlab.model.arguments import CACHE_POSITIONS, ENCODER_MASK, ENCODER_STATES, TokenArguments, marks_padding, past_in, token_role
from peftlab.model.caches import Past, declares_cache, find_cache, is_cache
from peftlab.model.walk import named_base_modules
from peftlab.parts import hidden_state
from peftlab.parts.token_slots import Place, TokenSlots, mask_around_cache

IGNORED_LABEL = -100  # the label that torch's cross entropy passes over


@dataclass
class InsertedTokens:
    """The part of a method that says how many tokens it inserts."""

    n: int


def _virtual_tokens_below(base: Base) -> int:
    """The slots of virtual tokens that what lies below puts into a cache: the caller of this method does not count them."""
    levels = [below for _, m in base.below for below in getattr(m, "acting", [[m]])]
    return sum(max((s.n for m in level if isinstance(s := getattr(m, "stack", None), InsertedTokens)), default=0) for level in levels)


def past_of_caller(base: Base, past: Past) -> int:
    """The tokens in a cache that the caller of this method counts."""
    if not past.filled:
        return 0
    if past.tokens is None:
        raise ValueError(f"the positions of tokens at {base.path!r} go on from those in a cache that does not count: pass position ids, or use_cache=False")
    return past.tokens - _virtual_tokens_below(base)


class EmbeddingRows(TorchFunctionMode):
    """Puts virtual rows into what the token embedding looks up, for stacks that take ids alone."""

    def __init__(self, put: Callable[[Tensor], Tensor]):
        super().__init__()
        self.put, self.calls = put, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is embedding_output:
            self.calls += 1
            return self.put(*args)
        return pass_through(func, args, kwargs or {})


def embedding_output(y: Tensor) -> Tensor:
    """What a token embedding gave; the stacks that insert virtual tokens replace rows of it."""
    return handle_torch_function(embedding_output, (y,), y) if _is_torch_function_mode_enabled() else y


@dataclass
class VirtualPrompt:
    """What goes in: P() gives (n, d), or (B, n, d) with lengths (B,) where rows have fewer, their ends at the end."""

    P: Callable[[], Tensor]  # not called where a cache holds it
    n: int
    at: Place = "start"
    causal: bool = False  # a token's output is that of the last virtual token behind it
    keep: bool = False  # the output keeps the virtual tokens, in front
    lengths: Tensor | None = None

    @property
    def there(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.arange(self.n, device=self.lengths.device)[None] >= self.n - self.lengths[:, None]


def insert_virtual_tokens(base: Base, inputs: TokenArguments, table: nn.Module, prompt: VirtualPrompt, args: tuple, kwargs: dict):
    """What lies below, called with virtual tokens among its tokens; its output without them."""
    named = _lengthen_cross_mask(inputs.named(args, kwargs))
    ids, embeds = named.get(inputs.tokens), named.get(inputs.embeddings) if inputs.embeddings else None
    x = ids if ids is not None else embeds
    past = past_in(named)
    if past.filled and past.tokens is not None:
        past = Past(True, past.tokens - _virtual_tokens_below(base))
    if prompt.n == 0:
        return base(**named)
    if isinstance(named.get(inputs.mask), Mapping):
        raise ValueError(f"{inputs.mask} comes as several masks, which cannot be lengthened by {prompt.n} virtual tokens: give one entry a token{_STATIC_CACHE_ADVICE}")
    if prompt.lengths is not None:
        named = _spell_out_mask(inputs, prompt, named, x, past)
    if past.filled:
        return base(**_arguments_after_cache(prompt, named, past, x.shape[1]))
    _refuse_hidden_cache(base, inputs, named, x.shape[1])
    slots = TokenSlots(prompt.at, prompt.n, x, _real_tokens(inputs, named, x))
    named |= _lengthened_arguments(inputs, prompt, slots, named, x)
    P = prompt.P()
    P = P if P.ndim == 3 else P[None]
    if embeds is None and inputs.embeddings:
        embeds = table(ids)
    if embeds is not None:
        named[inputs.embeddings], named[inputs.tokens] = slots.put(embeds, P.to(embeds.dtype)), None
        out = base(**named)
    else:
        named[inputs.tokens] = slots.put(ids, _filler_ids(ids, table, prompt.n))
        mode = EmbeddingRows(lambda y: slots.put(embedding_output(slots.take(y)), P.to(y.dtype)))
        with mode:
            out = base(**named)
        if not mode.calls:
            raise RuntimeError(f"{base.path!r} did not call its token embedding, so that virtual tokens have no place to enter (is it read instead?)")
    return out if prompt.keep else _without_virtual_tokens(out, slots, prompt.causal, base.site.host)


def _refuse_hidden_cache(base: Base, inputs: TokenArguments, named: dict, L: int) -> None:
    """A call that goes on from earlier tokens without a cache to be seen: virtual tokens would be inserted a second time."""
    if find_cache(named) is not None or not declares_cache(inputs.order):
        return
    mask, positions = (named.get(name) if name else None for name in (inputs.mask, inputs.positions))
    goes_on = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > L
    if not goes_on and L == 1 and isinstance(positions, Tensor) and not torch.compiler.is_compiling():
        goes_on = positions.numel() > 0 and bool((positions > 0).all())
    if goes_on:
        raise ValueError(
            f"{base.path!r} was called with {L} tokens that follow earlier ones, and none of its arguments ({', '.join(sorted(named))}) is known as a cache: "
            "whether its virtual tokens are in it cannot be told. Pass the cache under its name, or all tokens with use_cache=False"
        )


def _real_tokens(inputs: TokenArguments, named: dict, x: Tensor) -> Tensor | None:
    """Which tokens (B, L) are not padding, as the mask says; None without one."""
    mask = named.get(inputs.mask) if inputs.mask else None
    if mask is None or mask.ndim != 2 or mask.shape[1] != x.shape[1] or mask.shape[0] not in (1, x.shape[0]):
        return None
    if mask.is_floating_point() and not torch.compiler.is_compiling() and bool((mask < 0).any()):
        raise ValueError(f"{inputs.mask} holds numbers to be added: give ones for tokens and zeros for padding, which can be lengthened")
    mask = mask.expand(x.shape[0], -1)
    return mask == 0 if marks_padding(inputs.mask) else mask != 0


def _filler_ids(ids: Tensor, table: nn.Embedding, n: int) -> Tensor:
    """Ids for the slots of virtual tokens, whose rows are replaced: not the padding, nor an end of the table, which models take for it unsaid."""
    middle = table.num_embeddings // 2
    return torch.full((1, n), middle - (middle == table.padding_idx), dtype=ids.dtype, device=ids.device)


def _lengthen_cross_mask(named: dict) -> dict:
    """A decoder sees virtual tokens that stand in front of its encoder's output."""
    states, mask = named.get(ENCODER_STATES), named.get(ENCODER_MASK)
    if states is not None and mask is not None and mask.ndim == 2 and states.shape[1] > mask.shape[1]:
        named = named | {ENCODER_MASK: mask_around_cache(mask, mask.new_ones(1, states.shape[1] - mask.shape[1]))}
    return named


def _lengthened_arguments(inputs: TokenArguments, prompt: VirtualPrompt, slots: TokenSlots, named: dict, x: Tensor) -> dict:
    """The other arguments of the tokens' length, as the longer sequence needs them."""
    B, L = x.shape[:2]
    out = {}
    for name, t in named.items():
        role = token_role(name)
        if not isinstance(t, Tensor) or name in (inputs.tokens, inputs.embeddings) or "encoder" in name:
            continue
        if name == CACHE_POSITIONS:
            out[name] = torch.cat([t[:1] + torch.arange(prompt.n, device=t.device), t + prompt.n])
        elif role == "positions" and t.ndim == 2:
            out[name] = slots.positions(t, prompt.lengths)
        elif t.ndim >= 2 and t.shape[1] == L and t.shape[0] in (1, B) and t.ndim == 2 and role:
            value = {"types": 0, "labels": IGNORED_LABEL, "mask": 0 if marks_padding(name) else 1}[role]
            fill = torch.full((1, prompt.n), value, dtype=t.dtype, device=t.device)
            if role == "mask" and prompt.there is not None:
                fill = prompt.there.logical_not() if marks_padding(name) else prompt.there
            out[name] = slots.put(t.expand(B, -1), fill)
        elif role or (t.ndim >= 2 and tuple(t.shape[:2]) == (B, L)):
            raise ValueError(_unfit_text(name, t, prompt.n) + f", ({B}, {L}), or none{_STATIC_CACHE_ADVICE if t.ndim == 4 else ''}")
    return out


def _unfit_text(name: str, t: Tensor, n: int) -> str:
    return f"{name} of shape {tuple(t.shape)} cannot be lengthened by {n} virtual tokens: give one entry a token"


_STATIC_CACHE_ADVICE = '. Such masks are made for a static cache: take the dynamic one, generate(..., cache_implementation="dynamic")'


def _spell_out_mask(inputs: TokenArguments, prompt: VirtualPrompt, named: dict, x: Tensor, past: Past) -> dict:
    """Where rows differ, nothing can be left to the model: the mask and the positions are spelled out."""
    B, L = x.shape[:2]
    if past.tokens is None:
        raise ValueError("rows have different numbers of virtual tokens, and the cache does not count its tokens: give all rows as many, or use_cache=False")
    before, named = past.tokens - prompt.n if past.filled else 0, dict(named)
    if named.get(inputs.mask) is None:
        named[inputs.mask] = torch.full((B, before + L), 0 if marks_padding(inputs.mask) else 1, device=x.device)
    if inputs.positions is not None and named.get(inputs.positions) is None:
        named[inputs.positions] = torch.arange(L, device=x.device)[None] + before
    return named


def _arguments_after_cache(prompt: VirtualPrompt, named: dict, past: Past, L: int) -> dict:
    """The arguments of a call whose virtual tokens are in the cache."""
    lengths = prompt.n if prompt.lengths is None else prompt.lengths[:, None]
    there = prompt.there
    out = dict(named)
    for name, t in named.items():
        if isinstance(t, Tensor) and name == CACHE_POSITIONS:
            out[name] = t + prompt.n
        elif isinstance(t, Tensor) and token_role(name) == "positions":
            out[name] = t + lengths
        elif isinstance(t, Tensor) and token_role(name) == "mask":
            if t.ndim != 2:
                raise ValueError(_unfit_text(name, t, prompt.n) + (_STATIC_CACHE_ADVICE if t.ndim == 4 else ""))
            if past.tokens is not None and t.shape[1] + prompt.n != past.tokens + L:
                raise ValueError(
                    f"{name} has {t.shape[1]} entries for {L} new tokens and a cache of {past.tokens}, {prompt.n} of them virtual: the cache was filled "
                    "without these, or was cut back by generation that guesses ahead, which knows nothing of virtual tokens"
                )
            out[name] = mask_around_cache(t, t.new_ones(1, prompt.n) if there is None else there)
    return out


def _without_virtual_tokens(out, slots: TokenSlots, causal: bool, host: nn.Module, name: str = ""):
    """The same output without the virtual tokens' rows."""
    if isinstance(out, Tensor):
        if "attentions" in name and out.ndim == 4 and out.shape[2] == slots.n + slots.L:  # (B, H, queries, keys)
            out = slots.take(out.transpose(1, 2)).transpose(1, 2)
            own = out.shape[3] == slots.n + slots.L and "cross" not in name
            return slots.take(out.movedim(3, 1)).movedim(1, 3) if own else out
        if _features_first(out, slots, host):
            return slots.take(out.mT, causal).mT
        return slots.take(out, causal) if out.ndim > 1 and tuple(out.shape[:2]) == (slots.B, slots.n + slots.L) else out
    if isinstance(out, Mapping):
        for k in out:
            if isinstance(out[k], (Tensor, tuple, list)) and not is_cache(k, out[k]):
                out[k] = _without_virtual_tokens(out[k], slots, causal, host, k)
        if out.get("pooler_output") is not None and isinstance(getattr(host, "pooler", None), nn.Module):
            out["pooler_output"] = host.pooler(out["last_hidden_state"])  # it looked at a virtual token
        return out
    if type(out) in (tuple, list):
        return type(out)(_without_virtual_tokens(t, slots, causal, host, name) for t in out)
    if hidden_state.is_namedtuple(out):
        return out._replace(**{k: _without_virtual_tokens(t, slots, causal, host, k) for k, t in out._asdict().items() if not is_cache(k, t)})
    if dataclasses.is_dataclass(out):
        inside = {f.name: getattr(out, f.name) for f in dataclasses.fields(out) if f.init}
        return dataclasses.replace(out, **{k: _without_virtual_tokens(t, slots, causal, host, k) for k, t in inside.items() if not is_cache(k, t)})
    return out


def _features_first(out: Tensor, slots: TokenSlots, host: nn.Module) -> bool:
    """Whether it is (B, features, n + L): sure where the host has a tensor of so many features, and none with a side of n + L."""
    length = slots.n + slots.L
    if out.ndim != 3 or out.shape[0] != slots.B or out.shape[1] == length or out.shape[2] != length:
        return False
    sides = {side for _, m in named_base_modules(host) for p in m._parameters.values() if p is not None for side in p.shape}
    return out.shape[1] in sides and length not in sides
