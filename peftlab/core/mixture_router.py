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

from peftlab.support.checkpointing import inside_reentrant_checkpoint
from peftlab.support.timeline import Timeline


class GateClassifier(nn.Module):
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
        self.gates, self.hidden, self.reading = Timeline(), Timeline(), False
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
        if g.requires_grad and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and inside_reentrant_checkpoint():
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


RoutedParts = list[tuple[GateClassifier, tuple, Tensor | None]]  # (classifier, its options, rows of the batch)

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def run_for_gates(host: nn.Module, read: Callable[[], None], run: Callable, parts: RoutedParts):
    """The run without experts that the gates are computed from, and the run with them. The gates belong to the model, so that one thread
    runs it at a time; a run that fails leaves them as they were."""
    if torch.compiler.is_compiling():
        return _run_twice(read, run, parts)
    with _LOCKS.setdefault(host, threading.RLock()):
        before = [c.state() for c, _, _ in parts]
        try:
            return _run_twice(read, run, parts)
        except BaseException:
            for (c, _, _), state in zip(parts, before, strict=True):
                c.back(state)
            raise


def _run_twice(read: Callable[[], None], run: Callable, parts: RoutedParts):
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


def lora_factors(methods: list, name: str, r: int, path: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
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
