"""Virtual tokens at the stack that owns the token embedding: in at its input, out at its output.

Whatever the model does above the stack (heads, labels, losses, generation) never notices: its tensors have the caller's length. Masks,
position ids, token types and labels that enter the stack are lengthened with it; a cache holds the virtual tokens like any others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlab.core.base import Base
from peftlab.core.insert_tokens import InsertedTokens, VirtualPrompt, embedding_output, insert_virtual_tokens
from peftlab.model.arguments import ENCODER_STATES, TokenArguments
from peftlab.model.caches import find_cache
from peftlab.model.tokens import attends_to_encoder, token_arguments, token_embedding
from peftlab.model.walk import named_base_modules, original_class
from peftlab.parts import hidden_state
from peftlab.parts.prefix import pad_together
from peftlab.parts.token_slots import Place, numbers_of_rows


def prompt_embedding(site) -> nn.Embedding | None:
    """The token embedding of a stack; a zero-width one for an embedding that is surrounded beside it."""
    return nn.Embedding(0, 0) if isinstance(site.host, nn.Embedding) else token_embedding(site.host)


@dataclass
class VirtualTokens(InsertedTokens):
    """What a method on input tokens keeps of its place: the stack, or the token embedding beside it, and how virtual tokens go in."""

    at: Place
    causal: bool
    keep: bool
    inputs: TokenArguments | None
    table: nn.Embedding

    @classmethod
    def of(cls, base: Base, n: int, at: Place, causal: bool | None, keep: bool) -> VirtualTokens:
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
            causal = any(getattr(m, "is_causal", False) is True for _, m in named_base_modules(host))
        inputs = token_arguments(host)
        if keep and causal and not attends_to_encoder(host, inputs):
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
        return [token_embedding(h) for h in hosts if not isinstance(h, nn.Embedding) and token_arguments(h).embeddings is None]

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
            return embedding_output(base(*args, **kwargs))
        return insert_virtual_tokens(base, self.inputs, self.table, VirtualPrompt(P, self.n, self.at, self.causal, self.keep), args, kwargs)

    def pads(self, host: nn.Module) -> bool:
        """Whether rows may stand behind slots that are masked: where their positions can be given, or the model says that it weighs distances alone."""
        if self.inputs.mask is None or self.inputs.positions is not None:
            return self.inputs.mask is not None
        inside = [(path.rpartition(".")[2].lower(), m) for path, m in named_base_modules(host)]
        by_distance = any("relative" in name or "alibi" in name for name in [*(name for name, _ in inside), *dir(original_class(host))])
        return by_distance and not any(isinstance(m, nn.Embedding) and "relative" not in name and ("pos" in name or "wpe" in name) for name, m in inside)

    @staticmethod
    def routed(base: Base, parts: list[tuple[VirtualTokens, Callable[[], Tensor], Tensor]], args: tuple, kwargs: dict):
        """The same where rows have prompts of their own, or none: the shorter ones padded and masked, or one run for each length."""
        first = parts[0][0]
        if not first.holds:
            return embedding_output(base(*args, **kwargs))
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
        return hidden_state.join_rows([out for out, _ in runs], [rows for _, rows in runs], len(x))

    def with_rows(self, base: Base, parts: list, x: Tensor, named: dict, padded: bool = False):
        """One run whose rows have prompts of their own; padded: of different lengths."""

        def P() -> Tensor:
            made = [make() if s.n else self.nothing() for s, make, _ in parts]
            return pad_together(made, [rows for *_, rows in parts], len(x))[0]

        lengths = numbers_of_rows([(s.n, rows) for s, _, rows in parts], len(x), x.device) if padded else None
        prompt = VirtualPrompt(P, max(s.n for s, *_ in parts), self.at, self.causal, self.keep, lengths)
        return insert_virtual_tokens(base, self.inputs, self.table, prompt, (), named)
