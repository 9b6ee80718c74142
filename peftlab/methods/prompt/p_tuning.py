"""P-tuning: trained vectors among the embedded tokens, made by a network while they are trained.

    x' = [f(P); E(x)]        P (n, d);  mlp: f = W3 relu(W2 relu(W1 P)), W1 (dim, d), W2 (dim, dim), W3 (d, dim), with biases
                             lstm: f = W2 relu(W1 bilstm(P)), W1 (2 dim, 2 dim), W2 (d, 2 dim), with biases;  none: f(P) = P

at says where they stand: "start" | "end" | a place among the row's tokens | an ascending list of n places, so that a template may have them
between its tokens. depth and dropout are the LSTM's; P starts normal with deviation std. causal and keep are as in prompt_tuning.
`peftlab.drop_reparametrization` keeps f's output alone.

Trains: n * prompt_embedding(site).embedding_dim + network_size(net, prompt_embedding(site).embedding_dim, dim or prompt_embedding(site).embedding_dim, depth)
Structure: the tokens' embeddings are unchanged
Family: prompt
Paper: Liu et al. 2021, arXiv 2103.10385
Rate: 5e-3
Differs: the authors' second layer of the LSTM's head takes (2 dim, 2 dim) too; anchor words are plain tokens of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.core.virtual_tokens import VirtualTokens, prompt_embedding
from peftlab.method import Base, Method, finite, positive_int, unit_interval
from peftlab.parts.prompt_network import PromptNetwork, network_size  # noqa: F401 - the docstring's formula
from peftlab.parts.token_slots import Place, check_place


class PTuning(Method):
    on = "module"
    place = ":stack"
    neutral = False

    def __init__(
        self, base: Base, *, n: int = 20, net: str = "mlp", dim: int | None = None, depth: int = 2, dropout: float = 0.0, std: float = 1.0,
        at: Place = "start", causal: bool | None = None, keep: bool = False,
    ):  # fmt: skip
        super().__init__(base)
        self.stack = VirtualTokens.of(base, n, check_place(at, n, base.path), causal, keep)
        self.P = self.f = None
        if not self.stack.holds or n == 0:
            return
        d = prompt_embedding(base.site).embedding_dim
        self.P = nn.Parameter(torch.randn(n, d) * finite("std", std))
        self.f = PromptNetwork(net, d, positive_int("dim", d if dim is None else dim, None), positive_int("depth", depth, None), unit_interval("dropout", dropout))

    @classmethod
    def beside(cls, model, hosts, hyper) -> list[nn.Module]:
        return VirtualTokens.beside(hosts)

    @classmethod
    def fits(cls, site) -> bool:
        return VirtualTokens.fits(site)

    def prompt(self) -> Tensor | None:
        """(n, d), what the network makes of P."""
        return None if self.P is None else self.f(self.P)

    def without_network(self) -> tuple[dict, dict[str, Tensor]]:
        """The keyword that says so, and the tensors that such a method has."""
        return {"net": "none"}, {} if self.P is None else {"P": self.prompt()}

    def forward(self, base: Base, *args, **kwargs):
        return self.stack(base, self.prompt, args, kwargs)

    @classmethod
    def routed(cls, base: Base, parts, *args, **kwargs):
        return VirtualTokens.routed(base, [(m.stack, m.prompt, rows) for m, rows in parts], args, kwargs)
