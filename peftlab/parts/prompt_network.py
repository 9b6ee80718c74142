"""The networks that make virtual tokens while they are trained."""

from __future__ import annotations

from torch import Tensor, nn

NETWORKS = ("mlp", "lstm", "none")


class PromptNetwork(nn.Module):
    """E (n, d) -> (n, d)."""

    def __init__(self, kind: str, d: int, dim: int, layers: int, dropout: float):
        super().__init__()
        if kind not in NETWORKS:
            raise ValueError(f"net={kind!r}: one of {', '.join(NETWORKS)}")
        self.lstm = self.head = None
        if kind == "mlp":
            self.head = nn.Sequential(nn.Linear(d, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, d))
        elif kind == "lstm":
            self.lstm = nn.LSTM(d, dim, num_layers=layers, dropout=dropout if layers > 1 else 0.0, bidirectional=True, batch_first=True)
            self.head = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, d))

    def forward(self, E: Tensor) -> Tensor:
        h = E if self.lstm is None else self.lstm(E[None])[0][0]
        return h if self.head is None else self.head(h)


def network_size(kind: str, d: int, dim: int, layers: int) -> int:
    """How many numbers the network trains."""
    if kind == "none" or d == 0:
        return 0
    if kind == "mlp":
        return dim * (d + 1) + dim * (dim + 1) + d * (dim + 1)
    lstm = sum(2 * 4 * dim * ((d if i == 0 else 2 * dim) + dim + 2) for i in range(layers))
    return lstm + 2 * dim * (2 * dim + 1) + d * (2 * dim + 1)
