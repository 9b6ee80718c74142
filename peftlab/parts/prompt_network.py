"""The networks that make virtual tokens while they are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NETWORKS = ("mlp", "lstm", "none")


class BiLSTM(nn.Module):
    """nn.LSTM in both directions over (1, n, d), under its names; by torch's function, which can be compiled where the module cannot."""

    def __init__(self, d: int, dim: int, depth: int, dropout: float):
        super().__init__()
        self.dim, self.depth, self.dropout = dim, depth, dropout if depth > 1 else 0.0
        for i in range(depth):
            for direction in ("", "_reverse"):
                sizes = {"weight_ih": (4 * dim, 2 * dim if i else d), "weight_hh": (4 * dim, dim), "bias_ih": (4 * dim,), "bias_hh": (4 * dim,)}
                for name, size in sizes.items():
                    self.register_parameter(f"{name}_l{i}{direction}", nn.Parameter((torch.rand(size) * 2 - 1) * dim**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(2 * self.depth, x.shape[0], self.dim)
        return torch.lstm(x, (h, h), list(self._parameters.values()), True, self.depth, self.dropout, self.training, True, True)[0]


class PromptNetwork(nn.Module):
    """E (n, d) -> (n, d)."""

    def __init__(self, kind: str, d: int, dim: int, depth: int, dropout: float):
        super().__init__()
        if kind not in NETWORKS:
            raise ValueError(f"net={kind!r}: one of {', '.join(NETWORKS)}")
        self.lstm = self.head = None
        if kind == "mlp":
            self.head = nn.Sequential(nn.Linear(d, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, d))
        elif kind == "lstm":
            self.lstm = BiLSTM(d, dim, depth, dropout)
            self.head = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, d))

    def forward(self, E: Tensor) -> Tensor:
        h = E if self.lstm is None else self.lstm(E[None])[0]
        return h if self.head is None else self.head(h)


def network_size(kind: str, d: int, dim: int, depth: int) -> int:
    """How many numbers the network trains."""
    if kind == "none" or d == 0:
        return 0
    if kind == "mlp":
        return dim * (d + 1) + dim * (dim + 1) + d * (dim + 1)
    lstm = sum(2 * 4 * dim * ((2 * dim if i else d) + dim + 2) for i in range(depth))
    return lstm + 2 * dim * (2 * dim + 1) + d * (2 * dim + 1)
