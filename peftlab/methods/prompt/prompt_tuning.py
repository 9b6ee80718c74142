"""Prompt tuning: trained vectors among the embedded tokens.

    x' = [P; E(x)]        P (n, d)

The stack that owns the token embedding runs on the longer sequence and gives back the tokens' own outputs, so that nothing above it notices.
at: "start" | "end" (of each row) | a place among the row's tokens (negative: from its end) | an ascending list of n places. Where virtual
tokens stand behind a token of a causal model (causal, by default as the stack's attention says), that token's output is the last one's, which
predicts what follows. init: vocab (random rows of the table) | text and labels (from token ids=) | normal (of deviation std) | uniform.
keep=True leaves the virtual tokens in front of an encoder's output, where its decoder sees them; n=0 at a decoder adds none there.

Trains: n * prompt_embedding(site).embedding_dim
Structure: the tokens' embeddings are unchanged
Family: prompt
Paper: Lester et al. 2021, arXiv 2104.08691, sec. 2
Rate: 3e-2
Differs: a class label of several tokens starts from their mean; rows of the vocabulary are drawn from all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftlab.core.virtual_tokens import VirtualTokens, prompt_embedding
from peftlab.method import Base, Method, finite
from peftlab.parts.starts import prompt_start
from peftlab.parts.token_slots import Place, check_place


class PromptTuning(Method):
    on = "module"
    place = ":stack"
    neutral = False

    def __init__(
        self, base: Base, *, n: int = 20, at: Place = "start", init: str = "vocab", ids: Sequence | None = None, std: float = 0.02,
        causal: bool | None = None, keep: bool = False,
    ):  # fmt: skip
        super().__init__(base)
        self.stack = VirtualTokens.of(base, n, check_place(at, n, base.path), causal, keep)
        std, self.P = finite("std", std), None
        if not self.stack.holds or n == 0:
            return
        table = prompt_embedding(base.site)
        self.P = nn.Parameter(torch.zeros(n, table.embedding_dim))
        if not base.meta:
            self.P.copy_(prompt_start(init, n, table.embedding_dim, self.stack.look, table.num_embeddings, ids, std, base.path))

    @classmethod
    def beside(cls, model, hosts, hyper) -> list[nn.Module]:
        return VirtualTokens.beside(hosts)

    @classmethod
    def fits(cls, site) -> bool:
        return VirtualTokens.fits(site)

    def prompt(self) -> Tensor | None:
        """(n, d), what goes in."""
        return self.P

    def forward(self, base: Base, *args, **kwargs):
        return self.stack(base, self.prompt, args, kwargs)

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        return VirtualTokens.routed(base, [(m.stack, m.prompt, rows) for m, rows in parts], args, kwargs)
