"""N users' prefixes in one batch: one frozen model serves everybody, each row of a batch with the keys and values of its own user.

A small transformer learns to continue sequences that go up by some step (mod 13), which it has to see from the first two numbers. Then it is
frozen, and each user gets a prefix that stands for a step, so that one number is enough. The prefixes have different lengths, are saved in one
file, loaded into a fresh model, and run together: the same numbers as one by one, from one pass. Needs nothing beyond peftlab; runs in seconds:

    python examples/users_prefixes.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlab

N, LENGTH = 13, 8
USERS = {"ann": (2, 4), "bob": (5, 3), "eve": (11, 6)}  # name: (step, virtual positions)


class Attention(nn.Module):
    """Causal attention through torch's function, which is all that a prefix needs."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward part, normalised first."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(dim), nn.LayerNorm(dim), Attention(dim, heads)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Model(nn.Module):
    """Numbers in, the next ones out."""

    def __init__(self, dim: int = 64, heads: int = 4):
        super().__init__()
        self.numbers, self.places = nn.Embedding(N, dim), nn.Embedding(LENGTH, dim)
        self.blocks, self.answer = nn.Sequential(*(Block(dim, heads) for _ in range(2))), nn.Linear(dim, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.blocks(self.numbers(x) + self.places(torch.arange(x.shape[1]))))


def sequences(rows: int, step: Tensor) -> Tensor:
    return (torch.randint(N, (rows, 1)) + step.view(-1, 1) * torch.arange(LENGTH)) % N


def train(model: nn.Module, batch, first: int, lr: float, steps: int) -> float:
    """The loss of every number from position `first` on."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        x = batch()
        loss = F.cross_entropy(model(x)[:, first - 1 : -1].flatten(0, 1), x[:, first:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def continued(model: nn.Module, x: Tensor) -> Tensor:
    """Greedy, up to the full length."""
    while x.shape[1] < LENGTH:
        x = torch.cat([x, model(x)[:, -1:].argmax(-1)], 1)
    return x


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    loss = train(model, lambda: sequences(128, torch.randint(1, N, (128,))), first=2, lr=3e-3, steps=400)
    print(f"the base continues what it has seen two numbers of: loss {loss:.3f}")
    fresh = copy.deepcopy(model)

    for user, (step, n) in USERS.items():
        peftlab.wrap(model, "p_tuning_v2", name=user, n=n, std=0.1)
        peftlab.train_only(model, user)
        with peftlab.using(model, user):
            loss = train(model, lambda step=step: sequences(64, torch.full((64,), step)), first=1, lr=3e-2, steps=150)
        print(f"{user}: {n} virtual positions stand for steps of {step}: loss {loss:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "users.safetensors")
        peftlab.save(model, path)
        peftlab.load(fresh, path)

    rows, start = ["eve", "ann", None, "bob", "ann"], torch.tensor([[3], [3], [3], [0], [1]])
    with peftlab.route(fresh, rows):
        together = continued(fresh, start)
    for i, (user, numbers) in enumerate(zip(rows, together, strict=True)):
        with peftlab.using(fresh, user):
            alone = continued(fresh, start[i : i + 1])[0]
        assert torch.equal(alone, numbers)
        wanted = (start[i] + USERS[user][0] * torch.arange(LENGTH)) % N if user else None
        right = "" if wanted is None else " as wanted" if torch.equal(numbers, wanted) else f" wanted {wanted.tolist()}"
        print(f"{user or 'nobody':>7}: {' '.join(map(str, numbers.tolist()))}{right}")
    print("one pass for all of them gives what each gets alone")


if __name__ == "__main__":
    main()
