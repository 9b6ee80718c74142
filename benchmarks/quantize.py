"""Quantised layers beside bitsandbytes and the dense layer, on the CPU or on CUDA: quantise, decode, forward and backward, one token, memory.

All jobs of a table alternate round by round, and a ratio is the median over the rounds of neighbours in time. Values are compared bit by bit
before anything is timed. Transient memory is what torch's allocator hands out at one moment of a call, beyond the inputs and the result.
On CUDA a job is many calls and one wait for the device, the same work on the CPU and with PyTorch's own operations stands beside it, and
decoding is also given as a share of the bandwidth with which the device copies a tensor of the result's size.

    python benchmarks/quantize.py                        # 4096 x 4096, 512 tokens
    python benchmarks/quantize.py --size 2048 --cpu-time
    python benchmarks/quantize.py --compiled             # with the kernels of peftlab.compile_decoding
    python benchmarks/quantize.py --device cuda
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator

import torch
from _common import alternate, console, ratio, show, version
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import peftlab
from peftlab.quant.codes import dequantise, quantise
from peftlab.quant.kernels import cpu as compiled
from peftlab.quant.kernels import triton as kernels

OURS, THEIRS, DENSE, PLAIN = "peftlab", "bitsandbytes", "dense", "peftlab without Triton"
CALLS = 20  # of a job on CUDA, between two waits for the device


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
    reuse = {OURS: lambda: dequantise(mine, memory)}
    if version("bitsandbytes"):
        from bitsandbytes import functional as B

        theirs = B.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type=kind)
        if W.is_cuda:
            equal = (theirs[0] == mine.codes).double().mean()
            console.print(f"{kind} {W.dtype}: {100 * float(equal):.4f} % of the bytes of codes are those of bitsandbytes on CUDA")
        else:
            assert torch.equal(theirs[0], mine.codes)
            assert torch.equal(theirs[1].absmax, mine.absmax)
            assert torch.equal(B.dequantize_4bit(*theirs), dequantise(mine))
        pack[THEIRS] = lambda: B.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type=kind)
        unpack[THEIRS] = lambda: B.dequantize_4bit(*theirs)
        reuse[THEIRS] = (lambda: B.dequantize_4bit(*theirs, out=memory)) if W.is_cuda else unpack[THEIRS]  # the CPU path always takes new memory
    return pack, unpack, reuse


def layers(size: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, nn.Module]:
    """The same frozen linear layer, packed and dense."""
    torch.manual_seed(0)
    dense = nn.Linear(size, size, dtype=dtype).requires_grad_(False)
    twin = nn.Linear(size, size, dtype=dtype).requires_grad_(False)
    twin.load_state_dict(dense.state_dict())
    out: dict[str, nn.Module] = {OURS: peftlab.quantize(twin.to(device), targets="*")}
    if version("bitsandbytes"):
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(size, size, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        layer.load_state_dict({"weight": dense.weight, "bias": dense.bias})
        layer = layer.to(device)
        if getattr(layer.weight, "quant_state", None) is None:
            layer.weight = layer.weight._quantize(device)
        out[THEIRS] = layer.requires_grad_(False)
    return out | {DENSE: dense.to(device)}


def trains(layer: nn.Module, tokens: int, size: int, dtype: torch.dtype, device: str = "cpu") -> Callable[[], None]:
    """Forward and the backward to the input."""
    x, upstream = torch.randn(tokens, size, dtype=dtype, device=device, requires_grad=True), torch.randn(tokens, size, dtype=dtype, device=device)

    def step() -> None:
        layer(x).backward(upstream)
        x.grad = None

    return step


def decodes(layer: nn.Module, size: int, dtype: torch.dtype, device: str = "cpu", tokens: int = 1) -> Callable[[], None]:
    """A token, or a few, without gradients."""
    x = torch.randn(tokens, size, dtype=dtype, device=device)

    def step() -> None:
        with torch.no_grad():
            layer(x)

    return step


def off(there: dict[str, nn.Module], size: int, dtype: torch.dtype) -> list[str]:
    """How far the products of one token are from that of the decoded weight in float64, relative to it."""
    x, mine = torch.randn(1, size, dtype=dtype), there[OURS]
    wanted = nn.functional.linear(x.double(), mine.weight.double(), mine.bias.double())
    with torch.no_grad():
        return [f"{float((there[k](x).double() - wanted).norm() / wanted.norm()):.1e}" if k in there else "-" for k in (OURS, THEIRS)]


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
    rows, errors = [], []
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
        errors.append([f"one token {short}", *off(there, size, dtype)])
        there = {k: m.eval() for k, m in there.items()}  # bitsandbytes lays its codes out anew then, where it has a kernel for that
        rows.append(row(f"one token {short}, eval mode", {k: decodes(m, size, dtype) for k, m in there.items()}, rounds, cpu, "bnb 1, dense 5"))
        errors.append([f"one token {short}, eval mode", *off(there, size, dtype)])
    head = ["", "peftlab ms", "bnb ms", "dense ms", "x bnb", "x dense", "at most", "peftlab MiB", "bnb MiB"]
    note = f"double quantisation, blocks of 64; {tokens} tokens; medians of {rounds} rounds, {'processor' if cpu else 'wall'} time; "
    note += f"{'with' if compiled._on else 'without'} compile_decoding; the dense weight "
    note += f"takes {size * size * 4 / 2**20:.0f} MiB in float32; values equal bit for bit"
    show(f"nf4 and fp4, {size} x {size}", head, rows, note)
    show("relative error", ["", OURS, THEIRS], errors, "against the product with the decoded weight in float64")


# ---------------------------------------------------------------- on CUDA


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """PyTorch's own operations, on CUDA too."""
    before, kernels.serves = kernels.serves, lambda *tensors: False
    try:
        yield
    finally:
        kernels.serves = before


def plain(f: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with without_kernels():
            return f()

    return call


def waiting(f: Callable[[], object]) -> Callable[[], None]:
    """Many calls and one wait for the device."""

    def job() -> None:
        for _ in range(CALLS):
            f()
        torch.cuda.synchronize()

    return job


def cuda_transient(f: Callable[[], object]) -> int:
    """The most bytes on the device that one call holds at once, its result included."""
    f()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(like: Tensor, rounds: int) -> float:
    """Bytes a second, read and written, of a copy from one tensor of this kind to another."""
    other = torch.empty_like(like)
    seconds = statistics.median(alternate({"copy": waiting(lambda: other.copy_(like))}, rounds)["copy"]) / CALLS
    return 2 * like.numel() * like.element_size() / seconds


def cuda_row(name: str, jobs: dict[str, Callable], on_cpu: Callable, rounds: int, goal: str, share: Callable[[float], float] | None = None) -> list[object]:
    """Medians of one call, our ratios to the others, and the transient memory; `share` makes a share of the copy bandwidth of our seconds."""
    jobs = jobs | {PLAIN: plain(jobs[OURS])}
    times = {k: [t / CALLS for t in found] for k, found in alternate({k: waiting(f) for k, f in jobs.items()}, rounds).items()}
    cpu = statistics.median(alternate({OURS: on_cpu}, 3, warmup=1)[OURS])
    ours = statistics.median(times[OURS])

    def ms(key: str) -> str:
        return f"{1e3 * statistics.median(times[key]):.3f}" if key in times else "-"

    def against(key: str) -> str:
        return f"{ratio(times, OURS, key):.2f}" if key in times else "-"

    memory = [f"{cuda_transient(jobs[k]) / 2**20:.1f}" if k in jobs else "-" for k in (OURS, THEIRS)]
    part = "-" if share is None else f"{100 * share(ours):.0f} %"
    return [name, ms(OURS), ms(THEIRS), ms(DENSE), ms(PLAIN), f"{1e3 * cpu:.1f}", against(THEIRS), against(DENSE), f"{cpu / ours:.0f}", part, goal, *memory]


def cuda_codes(W: Tensor, kind: str, rounds: int, bandwidth: float) -> list[list[object]]:
    """The rows of quantising and decoding; W is on the CPU."""
    there, memory, short = W.cuda(), torch.zeros_like(W), str(W.dtype).removeprefix("torch.")
    here, same = quantise(W, kind, 64, False), quantise(there, kind, 64, False)
    assert kernels.serves(there)
    assert torch.equal(same.codes.cpu(), here.codes)
    assert torch.equal(same.absmax.cpu(), here.absmax)
    assert torch.equal(dequantise(same).cpu(), dequantise(here))
    double = quantise(W, kind, 64, True)
    moved = double.nbytes + W.numel() * W.element_size()

    def share(seconds: float) -> float:
        return moved / seconds / bandwidth

    pack, unpack, reuse = codes_jobs(there, kind)
    decode = f"decode {kind} {short}"
    return [
        cuda_row(f"quantise {kind} {short}", pack, lambda: quantise(W, kind, 64, True), rounds, "bnb 1"),
        cuda_row(decode, unpack, lambda: dequantise(double), rounds, "bnb 1, copy 90 %", share),
        cuda_row(f"{decode}, into reused memory", reuse, lambda: dequantise(double, memory), rounds, "bnb 1, copy 90 %", share),
    ]


def cuda_layers(size: int, tokens: int, rounds: int, dtype: torch.dtype) -> list[list[object]]:
    """The rows of the layers."""
    short = str(dtype).removeprefix("torch.")
    here, there = layers(size, dtype)[OURS], layers(size, dtype, "cuda")
    jobs = {k: trains(m, tokens, size, dtype, "cuda") for k, m in there.items()}
    rows = [cuda_row(f"forward + backward {short}", jobs, trains(here, tokens, size, dtype), rounds, "bnb 1")]
    for n in (1, 8, 64):
        jobs = {k: decodes(m, size, dtype, "cuda", n) for k, m in there.items()}
        rows.append(cuda_row(f"{n} tokens {short}" if n > 1 else f"one token {short}", jobs, decodes(here, size, dtype, tokens=n), rounds, "bnb 1"))
    return rows


def run_cuda(size: int, tokens: int, rounds: int, dtypes: list[torch.dtype]) -> None:
    """The table of a GPU; says so where there is none."""
    if not torch.cuda.is_available():
        console.print("no GPU: torch.cuda.is_available() is False, so that nothing was measured")
        return
    has_bitsandbytes()
    rows, speeds = [], []
    for dtype in dtypes:
        torch.manual_seed(0)
        W = (0.02 * torch.randn(size, size)).to(dtype)
        bandwidth = copy_bandwidth(W.cuda(), rounds)
        speeds.append(f"{bandwidth / 1e9:.0f} GB/s ({str(dtype).removeprefix('torch.')})")
        for kind in ("nf4", "fp4"):
            rows += cuda_codes(W, kind, rounds, bandwidth)
        rows += cuda_layers(size, tokens, rounds, dtype)
    head = ["", "peftlab ms", "bnb ms", "dense ms", "no Triton ms", "CPU ms", "x bnb", "x dense", "CPU / GPU", "of copy", "at most", "peftlab MiB", "bnb MiB"]
    note = f"{torch.cuda.get_device_name()}, triton {version('triton')}, bitsandbytes {version('bitsandbytes')}; copying: {', '.join(speeds)}; "
    note += f"double quantisation, blocks of 64; {tokens} tokens; medians of {rounds} rounds of {CALLS} calls; codes, scales and values equal "
    note += "those of the CPU bit for bit"
    show(f"nf4 and fp4, {size} x {size}, CUDA", head, rows, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--compiled", action="store_true", help="on the CPU, with the kernels of peftlab.compile_decoding")
    parser.add_argument("--cpu-time", action="store_true", help="processor time and one thread, for machines that are busy with other things")
    a = parser.parse_args()
    if a.cpu_time:
        torch.set_num_threads(1)
    if a.compiled:
        peftlab.compile_decoding()
    dtypes = [getattr(torch, d) for d in a.dtypes]
    if a.device == "cuda":
        run_cuda(a.size, a.tokens, a.rounds, dtypes)
    else:
        run(a.size, a.tokens, a.rounds, a.cpu_time, dtypes)


if __name__ == "__main__":
    main()
