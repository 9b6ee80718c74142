"""Routers of mixtures: gates of tokens over experts, and how evenly they share the tokens out.

Legend: T tokens, E experts, k of them chosen for a token; logits, p, g (..., E) with p = softmax(logits) and g the gates.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.support.recall import Recall, checkpointed


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(p, chosen, g): g are the k largest of p, scaled to a sum of one (a single one keeps its size, through which its gradient flows)."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    if k == p.shape[-1]:
        return p, torch.ones_like(p), p
    chosen = torch.zeros_like(p).scatter(-1, p.topk(k, -1).indices, 1.0)
    g = p * chosen
    return p, chosen, g if k == 1 else g / g.sum(-1, keepdim=True)


@torch.no_grad()
def balance(p: Tensor, chosen: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(L, dL/dW) of the load-balancing loss L = E sum_i f_i P_i and of the router W (E, n) that gave p = softmax(W x).

    f_i is the share of the choices that fell on expert i, P_i the mean of p_i: Fedus et al. 2021 (Switch), arXiv 2101.03961, eq. 4-6. f has no
    gradient. x (..., n) is taken as it is: the loss trains the router, not what lies below.
    """
    p, chosen, x = p.flatten(0, -2), chosen.flatten(0, -2), x.flatten(0, -2)
    f = chosen.sum(0) / chosen.sum()
    slope = p.shape[-1] / len(p) * p * (f - p @ f[:, None])
    return p.shape[-1] * (f * p.mean(0)).sum(), (slope.to(x.dtype).mT @ x).to(p.dtype)


def over_processes(t: Tensor) -> Tensor:
    """The mean over the processes of a distributed run; t itself in any other."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        t = t.clone()
        torch.distributed.all_reduce(t)
        t /= torch.distributed.get_world_size()
    return t


class Classifier(nn.Module):
    """What the sites of an X-LoRA share: the layers from a hidden state to logits (L, E), and the gates of the forward that runs.

    hidden (B, T, d) -> gates (B, T, L, E): linear layers with ReLU between them, `depth` in all and `dim` wide inside.
    """

    def __init__(self, d: int, dim: int, depth: int, sites: list[str], layerwise: bool, experts: int, owner: str, seed: int, how: tuple):
        super().__init__()
        layers = len(sites) if layerwise else 1
        widths = [d, *[dim] * (depth - 1), layers * experts]
        g = torch.Generator("cpu").manual_seed(seed)
        for i, (n, m) in enumerate(itertools.pairwise(widths)):
            W = (torch.rand(m, n, generator=g, device="cpu", dtype=torch.float32) * 2 - 1) / n**0.5
            self.register_parameter(f"W{i}", nn.Parameter(W))
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(m)))
        self.depth, self.layers, self.how = depth, layers, how  # (k, softmax, temperature), as forward takes them
        self.gates, self.hidden, self.reading = Recall(), Recall(), False
        self.owner, self.index = owner, {path: i if layerwise else 0 for i, path in enumerate(sites)}  # the path of the module that runs twice; whose gates

    def forward(self, h: Tensor, k: int | None, softmax: bool, temperature: float) -> Tensor:
        W = self._parameters
        z = h.to(torch.promote_types(h.dtype, torch.float32))
        for i in range(self.depth):
            z = F.linear(F.relu(z) if i else z, W[f"W{i}"].to(z.dtype), W[f"b{i}"].to(z.dtype))
        g = z.unflatten(-1, (self.layers, -1)) / temperature
        g = g.softmax(-1) if softmax else g
        return g if k is None else g * torch.zeros_like(g).scatter(-1, g.topk(k, -1).indices, 1.0)

    def read(self, h: Tensor) -> None:
        """Keep the last hidden state of the run that the gates are computed from."""
        if self.reading:
            self.hidden.value = h.detach()

    def set(self, g: Tensor | None, rows: Tensor | None) -> None:
        """The gates from now on (None: no expert acts), of all rows of the batch or of some."""
        old = self.gates.get()
        if rows is not None:
            if g is None:
                g = old if old is None or len(old) <= int(rows.max()) else old.index_fill(0, rows.to(old.device), 0.0)
            else:
                old, at = torch.zeros_like(g) if old is None or old.shape != g.shape else old, rows.to(g.device)
                g = old.index_copy(0, at, g[at])
        self.gates.put(g)

    def state(self) -> tuple:
        """What a forward changes: `back` undoes it."""
        return self.reading, self.hidden.value, self.gates.state()

    def back(self, state: tuple) -> None:
        self.reading, self.hidden.value, gates = state
        self.gates.back(gates)

    def of(self, path: str, x: Tensor) -> Tensor | None:
        """(B, T, E): the gates of the expert site at `path` for its input x; None while there are none."""
        g = self.gates.get()
        if g is None or (self.reading and g.shape[:2] != x.shape[:-1]):
            return None
        if g.requires_grad and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and checkpointed():
            raise RuntimeError(
                f"{path!r} runs under reentrant activation checkpointing, which would cut its router off: use checkpoint(..., use_reentrant=False), "
                'in transformers gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        if g.shape[:2] != x.shape[:-1]:
            raise ValueError(
                f"{path!r} was called with {tuple(x.shape)}, where the gates are for {tuple(g.shape[:2])} tokens. What is no token of the model's input "
                "(llama_adapter's virtual keys and values among it) has no gates: exclude this layer."
            )
        return g[:, :, self.index[path]]


def classifier_size(d: int, dim: int, depth: int, layers: int, experts: int) -> int:
    """The entries of such a classifier."""
    widths = [d, *[dim] * (depth - 1), layers * experts]
    return sum((n + 1) * m for n, m in itertools.pairwise(widths))


Parts = list[tuple[Classifier, tuple, Tensor | None]]  # (classifier, its options, rows of the batch)
_TURNS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def twice(host: nn.Module, read: Callable[[], None], run: Callable, parts: Parts):
    """The run without experts that the gates are computed from, and the run with them. The gates belong to the model, so that one thread
    runs it at a time; a run that fails leaves them as they were."""
    if torch.compiler.is_compiling():
        return _twice(read, run, parts)
    with _TURNS.setdefault(host, threading.RLock()):
        before = [c.state() for c, _, _ in parts]
        try:
            return _twice(read, run, parts)
        except BaseException:
            for (c, _, _), state in zip(parts, before, strict=True):
                c.back(state)
            raise


def _twice(read: Callable[[], None], run: Callable, parts: Parts):
    before = [c.reading for c, _, _ in parts]  # rows that stack two mixtures run this inside itself
    for c, _, rows in parts:
        c.set(None, rows)
        c.reading = True
    with torch.no_grad():
        read()
    for (c, how, rows), old in zip(parts, before, strict=True):
        c.reading = old
        c.set(c(c.hidden.value, *how), rows)
    out = run()
    for c, _, rows in parts:
        c.set(None, rows)
        if not c.reading:  # else the mixture that runs this inside itself asks for it
            c.hidden.value = None
    return out


def factors(methods: list, name: str, r: int, path: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, n_in), B (n_out, r) with its scale, of a trained LoRA in float64; zeros where there is none, in the shapes of those given."""
    A, B = torch.zeros_like(A, dtype=torch.float64), torch.zeros_like(B, dtype=torch.float64)
    for m in methods:
        found = getattr(m, "factors", None)
        if found is None or getattr(m, "d", None) is not None:
            raise ValueError(f"{name!r} at {path!r} is a {type(m).__name__} that is not just two factors: X-LoRA mixes LoRAs without biases")
        B1, A1 = (t.detach().to(A) for t in found())
        if len(A1) > r:
            raise ValueError(f"{name!r} has rank {len(A1)} at {path!r}, more than r={r}")
        A[: len(A1)], B[:, : len(A1)] = A1, B1 * getattr(m, "s", 1.0)
    return A, B
