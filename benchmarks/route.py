"""A batch of 64 rows with one LoRA, and with eight of them row by row: forward, and forward with backward.

python benchmarks/route.py
python benchmarks/route.py --width 1024 --tokens 64 --rounds 9
"""

from __future__ import annotations

import argparse
import statistics

import torch
from _common import clock, show
from torch import nn

import peftlab

LIMIT = 1.5  # eight adapters against one


def model(width: int, layers: int, adapters: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)))
    for i in range(adapters):
        peftlab.wrap(net, "lora", r=8, targets="*", name=f"a{i}")
    return net


def names(kind: str, rows: int) -> list[str | None]:
    """The adapters of the rows: in blocks, mixed, or mixed with rows that have none."""
    mixed = [f"a{i % 8}" for i in range(rows)]
    return {"in blocks": sorted(mixed), "mixed": mixed, "mixed, a quarter without": [None if i % 4 == 3 else n for i, n in enumerate(mixed)]}[kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="processor time and one thread, for machines that are busy with other things")
    a = parser.parse_args()
    if a.cpu_time:
        torch.set_num_threads(1)
    net = model(a.width, a.layers, 8)
    for tokens in a.tokens:
        x = torch.randn(a.rows, tokens, a.width)

        def step(train: bool, x=x) -> None:
            with torch.set_grad_enabled(train):
                y = net(x)
                if train:
                    y.square().mean().backward()

        kinds = ["in blocks", "mixed", "mixed, a quarter without"]
        times: dict[tuple[str, bool], list[float]] = {}
        for i in range(a.rounds + 1):
            for train in (False, True):
                with peftlab.using(net, "a0"):
                    t = clock(lambda: step(train), a.cpu_time)  # noqa: B023 - called at once
                if i:  # the first round warms up
                    times.setdefault(("one", train), []).append(t)
                for kind in kinds:
                    with peftlab.route(net, names(kind, a.rows)):
                        t = clock(lambda: step(train), a.cpu_time)  # noqa: B023
                    if i:
                        times.setdefault((kind, train), []).append(t)
        rows = []
        for kind in kinds:
            ratios = [statistics.median(times[kind, t]) / statistics.median(times["one", t]) for t in (False, True)]
            rows.append([f"eight, {kind}", *(f"{r:.2f}" for r in ratios), f"<= {LIMIT}"])
        note = f"{'processor' if a.cpu_time else 'wall'} time, medians of {a.rounds} alternating rounds"
        show(f"{a.rows} rows of {tokens} tokens, width {a.width}: times one LoRA's", ["", "forward", "forward + backward", "target"], rows, note)


if __name__ == "__main__":
    main()
