"""What the benchmarks share: what machine this is, fair timing, and the models they time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

console = Console(width=int(os.environ.get("COLUMNS", "140")), highlight=False)


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_peft() -> bool:
    """Whether HF peft can take part; says so where it cannot."""
    if version("peft") is None:
        console.print("HF peft is not installed: its rows are left out (pip install 'peftlab\\[bench]')")
        return False
    return True


def machine() -> str:
    """Versions and threads, for the head of a table."""
    found = [f"python {platform.python_version()}", f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", f"{os.cpu_count()} cores"]
    found += [f"{p} {v}" for p in ("peftlab", "peft", "transformers") if (v := version(p))]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return ", ".join(found) + load


def show(title: str, head: list[str], rows: list[list[object]], note: str = "") -> None:
    """Print a table; every column but the first is right-aligned."""
    table = Table(title=title, title_justify="left", caption=f"{machine()}{chr(10) if note else ''}{note}", caption_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(str(c) for c in row))
    console.print(table)


def clock(f: Callable[[], object], cpu: bool = False) -> float:
    """Seconds of one call: wall, or the processor's (less disturbed by other programs; fair with one thread only)."""
    now = time.process_time if cpu else time.perf_counter
    start = now()
    f()
    return now() - start


def alternate(jobs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, cpu: bool = False) -> dict[str, list[float]]:
    """Seconds of every job in every round. All jobs run in each round, in turns forwards and backwards, so that drift meets all alike."""
    for _ in range(warmup):
        for job in jobs.values():
            job()
    out: dict[str, list[float]] = {k: [] for k in jobs}
    names = list(jobs)
    for i in range(rounds):
        for k in names if i % 2 == 0 else reversed(names):
            out[k].append(clock(jobs[k], cpu))
    return out


def ratio(times: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Median of the per-round ratios: each round compares two runs that were neighbours in time."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


class Attention(nn.Module):
    """Causal self-attention with four separate projections."""

    def __init__(self, h: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(h, h) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, h = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, h))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, h: int, heads: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(h), nn.LayerNorm(h), Attention(h, heads)
        self.up, self.down, self.dropout = nn.Linear(h, 4 * h), nn.Linear(4 * h, h), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Layers (12 h^2 + 13 h entries each) between an embedding and its transpose (V h entries)."""

    def __init__(self, layers: int, h: int, words: int, heads: int = 4, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(words, h)
        self.layers = nn.ModuleList(Layer(h, heads, dropout) for _ in range(layers))
        self.head = nn.Linear(h, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
