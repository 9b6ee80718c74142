"""AdaLoRA: a low-rank change in SVD form, whose ranks are given during training to the sites that need them.

    W' = W + s P diag(E) Q        P (n_out, init_r), E (init_r,) = 0, Q (init_r, n_in), s = alpha / init_r

`schedule` drives it: after every step the importance of each triplet (P_i, E_i, Q_i) is updated (a mean over steps
with beta1, its uncertainty with beta2), and every delta_t steps the least
important entries of E over all sites become zero, so that their number falls from the sum of init_r to the sum of r along a cubic curve.
The first tinit and the last tfinal steps are left out (below 1: a share of all steps; from 1 on: a number of steps); in the last
tfinal the choice is frozen. The regulariser orth (|P^T P - I|^2 + |Q Q^T - I|^2) is added to the gradient by `schedule` too.

Trains: init_r * (n_in + n_out + 1)
Structure: rank(W' - W) <= init_r; in the end at most the sum of r entries of E are nonzero over all sites
Family: low rank
Paper: Zhang et al. 2023, arXiv 2303.10512, eq. 3 (form), 4 (regulariser), 7-11 (importance), app. A (budget)
Rate: 2e-3
Differs: reaches its budget exactly. P and Q start with columns and rows of unit length in expectation, where the regulariser wants them;
    the authors' code draws every entry with standard deviation 0.02. The regulariser is the paper's, squared; the code averages
    unsquared norms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.core.require_schedule import require_schedule
from peftlab.method import Base, Method, finite, positive_int, unit_interval
from peftlab.parts import budget, masks


class Allocator(nn.Module):
    """Waits until every site has reported its importance of step t, then shares out the budget; keeps nothing between steps."""

    def __init__(self, sites: int):
        super().__init__()
        self.sites, self.waiting, self.t = sites, [], 0

    def report(self, method: AdaLoRA, t: int, T: int) -> None:
        if self.waiting and t != self.t:
            raise RuntimeError(f"AdaLoRA: {len(self.waiting)} of {self.sites} sites were stepped at step {self.t}; drive them all")
        self.waiting.append(method)
        self.t = t
        if len(self.waiting) == self.sites:
            methods, self.waiting = self.waiting, []
            self.share(methods, t, T)

    @staticmethod
    def share(methods: list[AdaLoRA], t: int, T: int) -> None:
        first, end = methods[0], sum(m.r for m in methods)
        now = budget.at(t, T, sum(m.init_r for m in methods), end, first.tinit, first.tfinal, first.delta_t)
        if now is None:
            return
        if now != end or sum(int(m.kept.sum()) for m in methods) != end:  # at the end the choice is made once
            scores = [m.importance().to(first.E.device) for m in methods]
            for m, kept in zip(methods, masks.split_budget(scores, now), strict=True):
                m.kept.copy_(kept)
        for m in methods:
            m.E.mul_(m.kept)


class AdaLoRA(Method):
    additive = True
    opaque = True

    def __init__(
        self, base: Base, *, r: int = 8, init_r: int = 12, alpha: float = 16.0, dropout: float = 0.0, tinit: float = 0.1, tfinal: float = 0.3,
        delta_t: int = 10, beta1: float = 0.85, beta2: float = 0.85, orth: float = 0.1,
    ):  # fmt: skip
        super().__init__(base)
        self.init_r = positive_int("init_r", init_r, min(base.n_in, base.n_out), base)
        self.r = positive_int("r", r, None, base)
        if r > init_r:
            raise ValueError(f"r={r} at {base.path!r}: the rank falls from init_r={init_r}, which is smaller")
        self.s, self.drop = finite("alpha", alpha) / init_r, nn.Dropout(unit_interval("dropout", dropout))
        self.tinit, self.tfinal = budget.duration("tinit", tinit), budget.duration("tfinal", tfinal)
        self.delta_t = positive_int("delta_t", delta_t, None, base)
        self.beta1, self.beta2, self.orth = unit_interval("beta1", beta1), unit_interval("beta2", beta2), finite("orth", orth)
        self.P = nn.Parameter(torch.randn(base.n_out, init_r) / base.n_out**0.5)
        self.E = nn.Parameter(torch.zeros(init_r))
        self.Q = nn.Parameter(torch.randn(init_r, base.n_in) / base.n_in**0.5)
        self.register_buffer("kept", torch.ones(init_r, dtype=torch.bool), persistent=False)
        for k in "PEQ":  # running mean of the sensitivity |w dL/dw|, and of its deviation from that mean
            self.register_buffer(f"mean_{k}", torch.zeros_like(getattr(self, k)), persistent=False)
            self.register_buffer(f"spread_{k}", torch.zeros_like(getattr(self, k)), persistent=False)
        require_schedule(self, self.E)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        require_schedule(self, self.E)

    @classmethod
    def shared(cls, sites) -> nn.Module:
        return Allocator(len(sites))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.s * (self.P * self.E) @ self.Q

    def forward(self, base: Base, x: Tensor) -> Tensor:
        z = self.drop(x) if x.is_floating_point() else x
        return base.plus(x, self.P * (self.s * self.E), base.apply(self.Q, z))

    def penalty(self) -> Tensor:
        eye = torch.eye(self.init_r, dtype=self.E.dtype, device=self.E.device)
        return self.orth * ((self.P.mT @ self.P - eye).square().sum() + (self.Q @ self.Q.mT - eye).square().sum())

    def importance(self) -> Tensor:
        """(init_r,): of E_i, plus the means over its column of P and its row of Q."""
        p, e, q = (getattr(self, f"mean_{k}") * getattr(self, f"spread_{k}") for k in "PEQ")
        return e + p.mean(0) + q.mean(1)

    @torch.no_grad()
    def step(self, t: int, T: int, lr: float) -> None:
        for k in "PEQ":
            w, mean, spread = getattr(self, k), getattr(self, f"mean_{k}"), getattr(self, f"spread_{k}")
            if w.grad is not None:
                now = (w * w.grad).abs()
                mean.lerp_(now, 1 - self.beta1)
                spread.lerp_((now - mean).abs(), 1 - self.beta2)
        self.common.report(self, t, T)
