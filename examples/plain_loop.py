"""peftlab in a plain PyTorch loop, on a hand-written module that no library knows.

A small network learns (a + b) mod 11 from all pairs; then it is frozen and LoRA makes it say (a - b) mod 11. The adapter is checked,
saved, loaded into a fresh base and merged. Needs nothing beyond peftlab; runs in seconds:

    python examples/plain_loop.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import peftlab

N = 11


class Block(nn.Module):
    """A residual layer, with names of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Calculator(nn.Module):
    """Two numbers below N in, logits over N results out."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.first, self.second = nn.Embedding(N, width), nn.Embedding(N, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.answer = nn.Linear(width, N)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.answer(self.blocks(self.first(pairs[:, 0]) + self.second(pairs[:, 1])))


def train(model: nn.Module, pairs: Tensor, target: Tensor, lr: float, steps: int) -> None:
    """Ordinary training of whatever requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = peftlab.schedule(model, optimizer, total_steps=steps)  # only some methods need it; it never hurts
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(pairs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    schedule.remove()


@torch.no_grad()
def accuracy(model: nn.Module, pairs: Tensor, target: Tensor) -> float:
    """Share of right answers."""
    return (model(pairs).argmax(1) == target).float().mean().item()


def main() -> None:
    """Train a base, adapt it, and use the adapter in every way."""
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(N), torch.arange(N))
    plus, minus = pairs.sum(1) % N, (pairs[:, 0] - pairs[:, 1]) % N

    model = Calculator()
    train(model, pairs, plus, lr=3e-3, steps=150)
    base = copy.deepcopy(model)
    print(f"base: a + b {accuracy(model, pairs, plus):.0%}, a - b {accuracy(model, pairs, minus):.0%}")

    print(peftlab.plan(model, "lora", r=8, targets=["up", "down"]))
    peftlab.wrap(model, "lora", r=8, targets=["up", "down"])
    peftlab.check(model, pairs)  # raises unless every adapter is reached, acts, saves, reloads and merges
    train(model, pairs, minus, lr=1e-2, steps=300)
    print(f"adapted: a - b {accuracy(model, pairs, minus):.0%}")
    with peftlab.disabled(model):
        print(f"disabled: a + b {accuracy(model, pairs, plus):.0%}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "minus.safetensors"
        print(peftlab.save(model, file))
        fresh = copy.deepcopy(base)
        peftlab.load(fresh, file)
    print(f"reloaded: a - b {accuracy(fresh, pairs, minus):.0%}, outputs equal: {torch.equal(fresh(pairs), model(pairs))}")
    peftlab.merge(fresh, unload=True)
    print(f"merged into a plain {type(fresh.blocks[0].up).__name__}: a - b {accuracy(fresh, pairs, minus):.0%}")


if __name__ == "__main__":
    main()
