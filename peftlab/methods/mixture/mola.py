"""MoLA: a mixture of LoRAs at each layer, of which a router chooses the best few for every token.

    y = W x + s sum_i g_i(x) B_i A_i x        A_i (r, n_in), B_i (n_out, r), s = alpha / r
    p(x) = softmax(W_g x), W_g (experts, n_in); g_i = p_i / (sum of the k largest), zero for all but these

B = 0 at the start. With k = 1 the gate is p_i itself, so that the router learns. In training a load-balancing loss is added, balance times
experts * sum_i f_i P_i, f_i the share of the choices that fell on expert i and P_i the mean of p_i: `schedule` does it. More experts in higher
layers: overrides={"layers.{6..11}": dict(experts=8)} with the layers meant. The mixture merges where the gates are the same for every token:
one expert, or all of them chosen (k = experts) by a router of zeros.

Trains: experts * (r * (n_in + n_out) + n_in)
Structure: y - W x lies in the span of the k chosen B_i
Family: mixtures
Paper: Gao et al. 2024 (MoLA), arXiv 2402.08562; loss: Fedus et al. 2021 (Switch), arXiv 2101.03961, eq. 4-6
Rate: 5e-4
Differs: the load-balancing loss trains the routers alone, and its mean is taken over the forwards since the last optimizer step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.core.require_schedule import require_schedule
from peftlab.method import Base, Method, finite, positive_int
from peftlab.parts import hidden_state
from peftlab.parts.routing import load_balance, mean_over_processes, top_k


class MoLA(Method):
    additive = True
    opaque = True
    fast = ("B",)

    def __init__(self, base: Base, *, experts: int = 4, k: int = 2, r: int = 8, alpha: float = 16.0, balance: float = 0.01):
        super().__init__(base)
        self.experts, self.r = positive_int("experts", experts, None, base), positive_int("r", r, min(base.n_in, base.n_out), base)
        if positive_int("k", k, None, base) > experts:
            raise ValueError(f"k={k} at {base.path!r}: there are {experts} experts")
        self.k, self.s, self.balance = k, finite("alpha", alpha) / r, finite("balance", balance)
        if balance < 0:
            raise ValueError(f"balance={balance} at {base.path!r}: must not be negative, which would send all tokens to one expert")
        self.A = nn.Parameter((torch.rand(experts, r, base.n_in) * 2 - 1) / base.n_in**0.5)
        self.B = nn.Parameter(torch.zeros(experts, base.n_out, r))
        self.W_g = nn.Parameter(torch.randn(experts, base.n_in) * 0.02)
        self.register_buffer("slope", torch.zeros(experts, base.n_in), persistent=False)  # of the balance loss, summed over forwards
        self.register_buffer("sums", torch.zeros(2), persistent=False)  # the sum of these losses, and their number
        self.__setstate__(self.__dict__)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.balance and self.k < self.experts:
            require_schedule(self, self.W_g)

    @classmethod
    def fits(cls, site) -> bool:
        return site.rule.pointwise and not site.read_only and site.rows is None and site.key == ""

    @classmethod
    def defined(cls) -> bool:
        return False  # what it does to a token depends on the token

    def unmergeable(self) -> str | None:
        if self.experts == 1 or (self.k == self.experts and not self.W_g.any()):
            return None
        return f"changes the call, not the weight: every token is routed by itself, to {self.k} of {self.experts} experts"

    def weight(self, W: Tensor) -> Tensor:
        if (why := self.unmergeable()) is not None:
            raise ValueError(f"{type(self).__name__} at {self.site.path!r} has no weight: it {why}")
        return W + self.s / self.experts * torch.einsum("eor,eri->oi", self.B, self.A)

    def mixed(self, base: Base, x: Tensor) -> Tensor:
        """(..., n_out): what the experts add."""
        z = x.to(torch.promote_types(x.dtype, torch.float32))  # a rounded logit sends a token to another expert
        p, chosen, g = top_k(base.apply(self.W_g, z), self.k)
        if self.training and self.balance:
            loss, slope = load_balance(p, chosen, x)
            self.slope += slope.to(self.slope.dtype)
            self.sums += torch.stack([loss, torch.ones_like(loss)]).to(self.sums.dtype)
        h = base.apply(self.A.flatten(0, 1), x) * (self.s * g).to(x.dtype).repeat_interleave(self.r, -1)
        return base.mix(self.B.mT.flatten(0, 1).mT, h)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        return y + self.mixed(base, x).to(y.dtype)

    @classmethod
    def routed(cls, base: Base, parts, x: Tensor) -> Tensor:
        return hidden_state.apply_by_rows(base(x), parts, lambda m, y, rows: y + m.mixed(base, x.index_select(0, rows)).to(y.dtype))

    def penalty(self) -> Tensor:
        """The mean of the load-balancing losses since it was last asked for."""
        (total, n), slope = mean_over_processes(self.sums), mean_over_processes(self.slope)
        loss, slope = total / n.clamp_min(1), slope / n.clamp_min(1)
        self.slope.zero_()
        self.sums.zero_()
        return self.balance * (loss + ((self.W_g - self.W_g.detach()) * slope).sum())
