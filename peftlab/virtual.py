"""Virtual tokens at the stack that owns the token embedding: in at its input, out at its output.

Whatever the model does above the stack (heads, labels, losses, generation) never notices: its tensors have the caller's length. Masks,
position ids, token types and labels that enter the stack are lengthened with it; a cache holds the virtual tokens like any others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _is_torch_function_mode_enabled, handle_torch_function

from peftlab.attend import attends, passed_on
from peftlab.host import original_class, walk
from peftlab.model.arguments import CACHE_POSITIONS, ENCODER_MASK, ENCODER_STATES, TokenArguments, marks_padding, past_in, token_role
from peftlab.model.caches import Past, declares_cache, find_cache, is_cache
from peftlab.parts import outputs
from peftlab.parts.prefix import together
from peftlab.parts.slots import Place, Slots, around_cache

if TYPE_CHECKING:
    from peftlab.method import Base
    from peftlab.sites import Model

IGNORED = -100  # the label that torch's cross entropy passes over

# ---------------------------------------------------------------- which module it is


def token_embedding(host: nn.Module) -> nn.Embedding | None:
    """The embedding of token ids below a module: the one that it names itself, else the one with the most rows that is not called otherwise."""
    teller = getattr(host, "get_input_embeddings", None)
    try:
        own = teller() if teller is not None else None
    except (NotImplementedError, AttributeError):
        own = None
    if isinstance(own, nn.Embedding):
        return own
    found = [m for path, m in walk(host) if isinstance(m, nn.Embedding) and not _other_table(path)]
    return max(found, key=lambda m: m.num_embeddings, default=None)


def _other_table(path: str) -> bool:
    name = path.rpartition(".")[2].lower()
    return any(word in name for word in ("pos", "type", "segment", "bias", "wpe"))


def stacks(model: Model) -> list[nn.Module]:
    """The modules that own a token embedding and the attention above it; of two that lie in one another, the inner one."""
    attention = [p for m in model.modules.values() if attends(m) for p in model.paths[id(m)]]
    found: dict[str, nn.Module] = {}
    for m in model.modules.values():
        for path in model.paths[id(m)] if isinstance(m, nn.Embedding) and not _other_table(model.path(m)) else ():
            above = path
            while above:
                above = above.rpartition(".")[0]
                if any(_within(p, above) for p in attention):
                    if token_embedding(model.at[above]) is m:
                        found[above] = model.at[above]
                    break
    inner = [m for p, m in found.items() if not any(q != p and _within(q, p) for q in found)]
    return list({id(m): m for m in inner}.values())


def _within(path: str, top: str) -> bool:
    return top == "" or path.startswith(top + ".")


def stacks_above(model: Model, hosts: list[nn.Module]) -> list[nn.Module]:
    """The stacks in which these modules lie."""
    below = [p for h in hosts for p in model.paths[id(h)]]
    return [m for m in stacks(model) if any(_within(p, top) for top in model.paths[id(m)] for p in below)]


# ---------------------------------------------------------------- what it is called with


def _arguments(host: nn.Module) -> TokenArguments:
    """The names of what a stack is called with."""
    return TokenArguments.of(original_class(host).forward)


def refuse_without_positions(base: Base) -> None:
    """For a method that moves positions."""
    if _arguments(base.site.host).positions is None:
        raise ValueError(f"shift=True: {base.path!r}, a {original_class(base.site.host).__name__}, takes no position ids that could be moved")


def _slots_below(base: Base) -> int:
    """The slots of virtual tokens that what lies below puts into a cache: the caller of this method does not count them."""
    levels = [below for _, m in base.below for below in getattr(m, "acting", [[m]])]
    return sum(max((s.n for m in level if isinstance(s := getattr(m, "stack", None), Surround)), default=0) for level in levels)


def _callers_past(base: Base, past: Past) -> int:
    """The tokens in a cache that the caller of this method counts."""
    if not past.filled:
        return 0
    if past.tokens is None:
        raise ValueError(f"the positions of tokens at {base.path!r} go on from those in a cache that does not count: pass position ids, or use_cache=False")
    return past.tokens - _slots_below(base)


def shifted(base: Base, by: int | list[tuple[int, Tensor]], args: tuple, kwargs: dict):
    """What lies below, with the real tokens' positions moved, by so many or by so many for each group of rows."""
    inputs = _arguments(base.site.host)
    named = inputs.named(args, kwargs)
    x = inputs.given(named)
    given = named.get(inputs.positions)
    if given is None:
        given = torch.arange(x.shape[1], device=x.device)[None] + _callers_past(base, past_in(named))
    if not isinstance(by, int):
        by = _of_rows(by, x.shape[0], x.device)[:, None]
    return base(**named | {inputs.positions: given + by})


def _of_rows(parts: list[tuple[int, Tensor]], B: int, device) -> Tensor:
    """(B,): the number that belongs to each row, zero for the others."""
    out = torch.zeros(B, dtype=torch.long, device=device)
    for value, rows in parts:
        out = out.index_fill(0, rows.to(device), value)
    return out


# ---------------------------------------------------------------- in and out


class Rows(TorchFunctionMode):
    """Puts virtual rows into what the token embedding looks up, for stacks that take ids alone."""

    def __init__(self, put: Callable[[Tensor], Tensor]):
        super().__init__()
        self.put, self.calls = put, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is looked_up:
            self.calls += 1
            return self.put(*args)
        return passed_on(func, args, kwargs or {})


def looked_up(y: Tensor) -> Tensor:
    """What a token embedding gave; the stacks that insert virtual tokens replace rows of it."""
    return handle_torch_function(looked_up, (y,), y) if _is_torch_function_mode_enabled() else y


@dataclass
class Prompt:
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


def inserted(base: Base, inputs: TokenArguments, table: nn.Module, prompt: Prompt, args: tuple, kwargs: dict):
    """What lies below, called with virtual tokens among its tokens; its output without them."""
    named = _cross(inputs.named(args, kwargs))
    ids, embeds = named.get(inputs.tokens), named.get(inputs.embeddings) if inputs.embeddings else None
    x = ids if ids is not None else embeds
    past = past_in(named)
    if past.filled and past.tokens is not None:
        past = Past(True, past.tokens - _slots_below(base))
    if prompt.n == 0:
        return base(**named)
    if isinstance(named.get(inputs.mask), Mapping):
        raise ValueError(f"{inputs.mask} comes as several masks, which cannot be lengthened by {prompt.n} virtual tokens: give one entry a token{_STATIC}")
    if prompt.lengths is not None:
        named = _said(inputs, prompt, named, x, past)
    if past.filled:
        return base(**_after(prompt, named, past, x.shape[1]))
    _refuse_hidden_cache(base, inputs, named, x.shape[1])
    slots = Slots(prompt.at, prompt.n, x, _real(inputs, named, x))
    named |= _lengthened(inputs, prompt, slots, named, x)
    P = prompt.P()
    P = P if P.ndim == 3 else P[None]
    if embeds is None and inputs.embeddings:
        embeds = table(ids)
    if embeds is not None:
        named[inputs.embeddings], named[inputs.tokens] = slots.put(embeds, P.to(embeds.dtype)), None
        out = base(**named)
    else:
        named[inputs.tokens] = slots.put(ids, _filler(ids, table, prompt.n))
        mode = Rows(lambda y: slots.put(looked_up(slots.take(y)), P.to(y.dtype)))
        with mode:
            out = base(**named)
        if not mode.calls:
            raise RuntimeError(f"{base.path!r} did not call its token embedding, so that virtual tokens have no place to enter (is it read instead?)")
    return out if prompt.keep else _trimmed(out, slots, prompt.causal, base.site.host)


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


def _real(inputs: TokenArguments, named: dict, x: Tensor) -> Tensor | None:
    """Which tokens (B, L) are not padding, as the mask says; None without one."""
    mask = named.get(inputs.mask) if inputs.mask else None
    if mask is None or mask.ndim != 2 or mask.shape[1] != x.shape[1] or mask.shape[0] not in (1, x.shape[0]):
        return None
    if mask.is_floating_point() and not torch.compiler.is_compiling() and bool((mask < 0).any()):
        raise ValueError(f"{inputs.mask} holds numbers to be added: give ones for tokens and zeros for padding, which can be lengthened")
    mask = mask.expand(x.shape[0], -1)
    return mask == 0 if marks_padding(inputs.mask) else mask != 0


def _filler(ids: Tensor, table: nn.Embedding, n: int) -> Tensor:
    """Ids for the slots of virtual tokens, whose rows are replaced: not the padding, nor an end of the table, which models take for it unsaid."""
    middle = table.num_embeddings // 2
    return torch.full((1, n), middle - (middle == table.padding_idx), dtype=ids.dtype, device=ids.device)


def _cross(named: dict) -> dict:
    """A decoder sees virtual tokens that stand in front of its encoder's output."""
    states, mask = named.get(ENCODER_STATES), named.get(ENCODER_MASK)
    if states is not None and mask is not None and mask.ndim == 2 and states.shape[1] > mask.shape[1]:
        named = named | {ENCODER_MASK: around_cache(mask, mask.new_ones(1, states.shape[1] - mask.shape[1]))}
    return named


def _lengthened(inputs: TokenArguments, prompt: Prompt, slots: Slots, named: dict, x: Tensor) -> dict:
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
            value = {"types": 0, "labels": IGNORED, "mask": 0 if marks_padding(name) else 1}[role]
            fill = torch.full((1, prompt.n), value, dtype=t.dtype, device=t.device)
            if role == "mask" and prompt.there is not None:
                fill = prompt.there.logical_not() if marks_padding(name) else prompt.there
            out[name] = slots.put(t.expand(B, -1), fill)
        elif role or (t.ndim >= 2 and tuple(t.shape[:2]) == (B, L)):
            raise ValueError(_unfit(name, t, prompt.n) + f", ({B}, {L}), or none{_STATIC if t.ndim == 4 else ''}")
    return out


def _unfit(name: str, t: Tensor, n: int) -> str:
    return f"{name} of shape {tuple(t.shape)} cannot be lengthened by {n} virtual tokens: give one entry a token"


_STATIC = '. Such masks are made for a static cache: take the dynamic one, generate(..., cache_implementation="dynamic")'


def _said(inputs: TokenArguments, prompt: Prompt, named: dict, x: Tensor, past: Past) -> dict:
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


def _after(prompt: Prompt, named: dict, past: Past, L: int) -> dict:
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
                raise ValueError(_unfit(name, t, prompt.n) + (_STATIC if t.ndim == 4 else ""))
            if past.tokens is not None and t.shape[1] + prompt.n != past.tokens + L:
                raise ValueError(
                    f"{name} has {t.shape[1]} entries for {L} new tokens and a cache of {past.tokens}, {prompt.n} of them virtual: the cache was filled "
                    "without these, or was cut back by generation that guesses ahead, which knows nothing of virtual tokens"
                )
            out[name] = around_cache(t, t.new_ones(1, prompt.n) if there is None else there)
    return out


def _trimmed(out, slots: Slots, causal: bool, host: nn.Module, name: str = ""):
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
                out[k] = _trimmed(out[k], slots, causal, host, k)
        if out.get("pooler_output") is not None and isinstance(getattr(host, "pooler", None), nn.Module):
            out["pooler_output"] = host.pooler(out["last_hidden_state"])  # it looked at a virtual token
        return out
    if type(out) in (tuple, list):
        return type(out)(_trimmed(t, slots, causal, host, name) for t in out)
    if outputs.is_named(out):
        return out._replace(**{k: _trimmed(t, slots, causal, host, k) for k, t in out._asdict().items() if not is_cache(k, t)})
    if dataclasses.is_dataclass(out):
        inside = {f.name: getattr(out, f.name) for f in dataclasses.fields(out) if f.init}
        return dataclasses.replace(out, **{k: _trimmed(t, slots, causal, host, k) for k, t in inside.items() if not is_cache(k, t)})
    return out


def _features_first(out: Tensor, slots: Slots, host: nn.Module) -> bool:
    """Whether it is (B, features, n + L): sure where the host has a tensor of so many features, and none with a side of n + L."""
    length = slots.n + slots.L
    if out.ndim != 3 or out.shape[0] != slots.B or out.shape[1] == length or out.shape[2] != length:
        return False
    sides = {side for _, m in walk(host) for p in m._parameters.values() if p is not None for side in p.shape}
    return out.shape[1] in sides and length not in sides


def embedding(site) -> nn.Embedding | None:
    """The token embedding of a stack; a zero-width one for an embedding that is surrounded beside it."""
    return nn.Embedding(0, 0) if isinstance(site.host, nn.Embedding) else token_embedding(site.host)


def _looks_at_an_encoder(host: nn.Module, inputs: TokenArguments) -> bool:
    """Whether a stack has attention to an encoder's output; some name the argument and have none."""
    names = [path.rpartition(".")[2].lower() for path, m in walk(host) if attends(m)]
    return ENCODER_STATES in inputs.order and any("cross" in name or "enc" in name for name in names)


@dataclass
class Surround:
    """What a method on input tokens keeps of its place: the stack, or the token embedding beside it, and how virtual tokens go in."""

    n: int
    at: Place
    causal: bool
    keep: bool
    inputs: TokenArguments | None
    table: nn.Embedding

    @classmethod
    def of(cls, base: Base, n: int, at: Place, causal: bool | None, keep: bool) -> Surround:
        host = base.site.host
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n={n!r} at {base.path!r}: a whole number of virtual tokens")
        if causal is not None and not isinstance(causal, bool):
            raise ValueError(f"causal={causal!r} at {base.path!r}: True, False, or None for what the stack's attention says")
        if keep and at != "start":
            raise ValueError(f"keep=True at {base.path!r}: virtual tokens that stay must be at the start, not at {at!r}")
        if isinstance(host, nn.Embedding):
            return cls(n, at, False, keep, None, host)
        if causal is None:
            causal = any(getattr(m, "is_causal", False) is True for _, m in walk(host))
        inputs = _arguments(host)
        if keep and causal and not _looks_at_an_encoder(host, inputs):
            raise ValueError(
                f"keep=True at {base.path!r}: an encoder's virtual tokens can stay, where its decoder looks at them; this is a causal stack without an "
                "encoder, whose output must be as long as the caller's tokens: leave keep out"
            )
        keep = keep and not causal  # a decoder's own are seen by nobody above it
        if n == 0 and ENCODER_STATES not in inputs.order:
            raise ValueError(f"n=0 at {base.path!r}: only a decoder, which can see its encoder's virtual tokens, has none of its own")
        return cls(n, at, causal, keep, inputs, token_embedding(host))

    @property
    def holds(self) -> bool:
        return self.inputs is not None

    @staticmethod
    def beside(hosts: list[nn.Module]) -> list[nn.Module]:
        """Stacks that take ids alone are helped by their token embedding."""
        return [token_embedding(h) for h in hosts if not isinstance(h, nn.Embedding) and _arguments(h).embeddings is None]

    @staticmethod
    def fits(site) -> bool:
        return site.kind == "module" and not isinstance(site.host, nn.Embedding) and token_embedding(site.host) is not None

    def look(self, ids: Tensor) -> Tensor:
        """What the frozen table gives for ids."""
        return original_class(self.table).forward(self.table, ids.to(next(self.table.parameters()).device)).detach()

    def nothing(self) -> Tensor:
        """(0, d), in what the table gives."""
        return self.look(torch.zeros(0, dtype=torch.long))

    def __call__(self, base: Base, P: Callable[[], Tensor], args: tuple, kwargs: dict):
        if not self.holds:
            return looked_up(base(*args, **kwargs))
        return inserted(base, self.inputs, self.table, Prompt(P, self.n, self.at, self.causal, self.keep), args, kwargs)

    def pads(self, host: nn.Module) -> bool:
        """Whether rows may stand behind slots that are masked: where their positions can be given, or the model says that it weighs distances alone."""
        if self.inputs.mask is None or self.inputs.positions is not None:
            return self.inputs.mask is not None
        inside = [(path.rpartition(".")[2].lower(), m) for path, m in walk(host)]
        by_distance = any("relative" in name or "alibi" in name for name in [*(name for name, _ in inside), *dir(original_class(host))])
        return by_distance and not any(isinstance(m, nn.Embedding) and "relative" not in name and ("pos" in name or "wpe" in name) for name, m in inside)

    @staticmethod
    def routed(base: Base, parts: list[tuple[Surround, Callable[[], Tensor], Tensor]], args: tuple, kwargs: dict):
        """The same where rows have prompts of their own, or none: the shorter ones padded and masked, or one run for each length."""
        first = parts[0][0]
        if not first.holds:
            return looked_up(base(*args, **kwargs))
        named = first.inputs.named(args, kwargs)
        x = first.inputs.given(named)
        kinds: dict[tuple, list] = {}
        for part in parts:
            kinds.setdefault((part[0].n, str(part[0].at), part[0].causal, part[0].keep), []).append(part)
        rest = torch.ones(len(x), dtype=torch.bool)
        for *_, rows in parts:
            rest[rows.cpu()] = False
        if len(kinds) == 1 and not rest.any():
            return first.with_rows(base, parts, x, named)
        if all(s.at == "start" and not s.keep for s, *_ in parts) and first.pads(base.site.host):
            return first.with_rows(base, parts, x, named, padded=True)
        if any(s.keep for s, *_ in parts) or find_cache(named) is not None or named.get("use_cache"):
            raise ValueError(
                f"rows at {base.path!r} have different numbers of virtual tokens, kept or in a cache: that works at the start alone, with a mask, and where "
                "the stack takes position ids or weighs distances alone. Give all rows as many, or use_cache=False (and keep=False)"
            )
        if "use_cache" in first.inputs.order:
            named = named | {"use_cache": False}  # every run would fill one of its own
        runs = [(p[0][0].with_rows(base, p, x, named), torch.cat([rows for *_, rows in p])) for p in kinds.values()]
        runs += [(base(**named), rest.nonzero()[:, 0])] if rest.any() else []
        return outputs.joined([out for out, _ in runs], [rows for _, rows in runs], len(x))

    def with_rows(self, base: Base, parts: list, x: Tensor, named: dict, padded: bool = False):
        """One run whose rows have prompts of their own; padded: of different lengths."""

        def P() -> Tensor:
            made = [make() if s.n else self.nothing() for s, make, _ in parts]
            return together(made, [rows for *_, rows in parts], len(x))[0]

        lengths = _of_rows([(s.n, rows) for s, _, rows in parts], len(x), x.device) if padded else None
        prompt = Prompt(P, max(s.n for s, *_ in parts), self.at, self.causal, self.keep, lengths)
        return inserted(base, self.inputs, self.table, prompt, (), named)
