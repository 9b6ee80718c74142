"""Quantised layers beside bitsandbytes' compiled CPU path and the dense layer: quantise, decode, forward and backward, one token, memory.

All jobs of a table alternate round by round, and a ratio is the median over the rounds of neighbours in time. Values are compared bit by bit
before anything is timed. Transient memory is what torch's allocator hands out at one moment of a call, beyond the inputs and the result.

    python benchmarks/quantize.py                        # 4096 x 4096, 512 tokens
    python benchmarks/quantize.py --size 2048 --cpu-time
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from _common import alternate, console, ratio, show, version
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import peftlab
from peftlab.quant.codes import dequantise, quantise

OURS, THEIRS, DENSE = "peftlab", "bitsandbytes", "dense"


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes can take part; says so where it cannot."""
    if version("bitsandbytes") is None:
        console.print("bitsandbytes is not installed: its column is left out (pip install 'peftlab\\[bench]')")
        return False
    return True


def transient(f: Callable[[], object]) -> int:
    """The most bytes that one call holds at once, its result included."""
    f()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        out = f()  # noqa: F841 - stays alive until the end of the block
    now = top = 0
    for event in sorted((e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def codes_jobs(W: Tensor, kind: str) -> tuple[dict, dict, dict]:
    """(quantise, decode, decode into memory that is there) jobs by library, compared before they are timed."""
    mine, memory = quantise(W, kind, 64, True), torch.zeros_like(W)
    pack, unpack = {OURS: lambda: quantise(W, kind, 64, True)}, {OURS: lambda: dequantise(mine)}
    if version("bitsandbytes"):
        from bitsandbytes import functional as B

        theirs = B.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type=kind)
        assert torch.equal(theirs[0], mine.codes)
        assert torch.equal(theirs[1].absmax, mine.absmax)
        assert torch.equal(B.dequantize_4bit(*theirs), dequantise(mine))
        pack[THEIRS] = lambda: B.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type=kind)
        unpack[THEIRS] = lambda: B.dequantize_4bit(*theirs)
    return pack, unpack, unpack | {OURS: lambda: dequantise(mine, memory)}  # bitsandbytes' CPU path always takes new memory


def layers(size: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same frozen linear layer, packed and dense."""
    torch.manual_seed(0)
    dense = nn.Linear(size, size, dtype=dtype).requires_grad_(False)
    twin = nn.Linear(size, size, dtype=dtype).requires_grad_(False)
    twin.load_state_dict(dense.state_dict())
    out: dict[str, nn.Module] = {OURS: peftlab.quantize(twin, targets="*")}
    if version("bitsandbytes"):
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(size, size, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        layer.load_state_dict({"weight": dense.weight, "bias": dense.bias})
        layer = layer.to("cpu")
        if getattr(layer.weight, "quant_state", None) is None:
            layer.weight = layer.weight._quantize("cpu")
        out[THEIRS] = layer.requires_grad_(False)
    return out | {DENSE: dense}


def trains(layer: nn.Module, tokens: int, size: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and the backward to the input."""
    x, upstream = torch.randn(tokens, size, dtype=dtype, requires_grad=True), torch.randn(tokens, size, dtype=dtype)

    def step() -> None:
        layer(x).backward(upstream)
        x.grad = None

    return step


def decodes(layer: nn.Module, size: int, dtype: torch.dtype) -> Callable[[], None]:
    """One token without gradients."""
    x = torch.randn(1, size, dtype=dtype)

    def step() -> None:
        with torch.no_grad():
            layer(x)

    return step


def row(name: str, jobs: dict[str, Callable], rounds: int, cpu: bool, goal: str) -> list[object]:
    """Medians of the jobs, our ratios to the others, and the transient memory of ours."""
    times = alternate(jobs, rounds, cpu=cpu)

    def ms(key: str) -> str:
        return f"{1e3 * statistics.median(times[key]):.1f}" if key in times else "-"

    def against(key: str) -> str:
        return f"{ratio(times, OURS, key):.2f}" if key in times else "-"

    memory = {k: f"{transient(jobs[k]) / 2**20:.1f}" if k in jobs else "-" for k in (OURS, THEIRS)}
    return [name, ms(OURS), ms(THEIRS), ms(DENSE), against(THEIRS), against(DENSE), goal, memory[OURS], memory[THEIRS]]


def run(size: int, tokens: int, rounds: int, cpu: bool, dtypes: list[torch.dtype]) -> None:
    """One table."""
    has_bitsandbytes()
    rows = []
    for dtype in dtypes:
        short = str(dtype).removeprefix("torch.")
        torch.manual_seed(0)
        W = (0.02 * torch.randn(size, size)).to(dtype)
        for kind in ("nf4", "fp4"):
            pack, unpack, reuse = codes_jobs(W, kind)
            rows.append(row(f"quantise {kind} {short}", pack, max(3, rounds // 3), cpu, "bnb 1"))
            rows.append(row(f"decode {kind} {short}", unpack, rounds, cpu, "bnb 1"))
            rows.append(row(f"decode {kind} {short}, peftlab into reused memory", reuse, rounds, cpu, ""))
        there = layers(size, dtype)
        rows.append(row(f"forward + backward {short}", {k: trains(m, tokens, size, dtype) for k, m in there.items()}, rounds, cpu, "bnb 1, dense 1.35"))
        rows.append(row(f"one token {short}", {k: decodes(m, size, dtype) for k, m in there.items()}, rounds, cpu, "bnb 1, dense 5"))
    head = ["", "peftlab ms", "bnb ms", "dense ms", "x bnb", "x dense", "at most", "peftlab MiB", "bnb MiB"]
    note = f"double quantisation, blocks of 64; {tokens} tokens; medians of {rounds} rounds, {'processor' if cpu else 'wall'} time; the dense weight "
    note += f"takes {size * size * 4 / 2**20:.0f} MiB in float32; values equal bit for bit"
    show(f"nf4 and fp4, {size} x {size}", head, rows, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--cpu-time", action="store_true", help="processor time and one thread, for machines that are busy with other things")
    a = parser.parse_args()
    if a.cpu_time:
        torch.set_num_threads(1)
    run(a.size, a.tokens, a.rounds, a.cpu_time, [getattr(torch, d) for d in a.dtypes])


if __name__ == "__main__":
    main()
