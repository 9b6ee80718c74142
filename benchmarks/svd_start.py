"""The start of PiSSA: randomised against exact singular vectors, time and error, beside HF peft.

The error is |W - s B A| over that of the best rank-r matrix (Eckart-Young), so 1 is exact. Two spectra: a Gaussian matrix, whose values hardly
fall (the hardest case), and values that fall as k^-1/2, as those of trained weights do.

    python benchmarks/svd_start.py --width 2048 --r 16 --cpu-time
"""

from __future__ import annotations

import argparse
import statistics

import torch
from _common import clock, console, has_peft, show
from torch import Tensor, nn

import peftlab
from peftlab.parts import lowrank


def matrices(n: int) -> dict[str, Tensor]:
    """Weights of both spectra."""
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(n, n, generator=g) / n**0.5
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=g)).Q for _ in range(2))
    return {"Gaussian": flat, "falling as k^-1/2": (U / torch.arange(1, n + 1) ** 0.5) @ V.mT}


def layer(W: Tensor) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    made[0].weight.data.copy_(W)
    return made


def ours(W: Tensor, init: str, r: int, cpu: bool) -> tuple[float, Tensor]:
    """(seconds, the part of W that went into the factors)."""
    model = layer(W)
    lowrank._made.clear()  # what was decomposed before is remembered
    seconds = clock(lambda: peftlab.wrap(model, "lora", targets="*", r=r, init=init), cpu)
    method = model[0].peftlab.default
    return seconds, (method.s * method.B @ method.A).detach()


def theirs(W: Tensor, init: str, r: int, cpu: bool) -> tuple[float, Tensor]:
    """The same of HF peft."""
    import peft

    model, held = layer(W), {}
    config = peft.LoraConfig(r=r, target_modules=["0"], init_lora_weights=init)
    seconds = clock(lambda: held.update(m=peft.get_peft_model(model, config)), cpu)
    lora = held["m"].base_model.model[0]
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    return seconds, (lora.scaling["default"] * B @ A).detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="of the randomised ones; the exact ones run once")
    parser.add_argument("--cpu-time", action="store_true", help="processor time and one thread, for machines that are busy with other things")
    a = parser.parse_args()
    if a.cpu_time:
        torch.set_num_threads(1)
    ways = {"peftlab pissa": (ours, "pissa"), "peftlab pissa_exact": (ours, "pissa_exact")}
    if has_peft():
        ways |= {"HF peft pissa": (theirs, "pissa"), "HF peft pissa_niter_4": (theirs, "pissa_niter_4"), "HF peft pissa_niter_16": (theirs, "pissa_niter_16")}
    rows = []
    for make, init in ways.values():
        make(torch.randn(64, 64), init, 4, a.cpu_time)  # imports
    for spectrum, W in matrices(a.width).items():
        best = torch.linalg.svdvals(W.double())[a.r :].norm().item()
        found: dict[str, list[tuple[float, float]]] = {k: [] for k in ways}
        for i in range(a.rounds):
            for k, (make, init) in ways.items():
                if i and k in ("peftlab pissa_exact", "HF peft pissa"):
                    continue
                seconds, part = make(W, init, a.r, a.cpu_time)
                found[k].append((seconds, (W.double() - part.double()).norm().item() / best))
        for k, runs in found.items():
            rows.append([k, spectrum, f"{statistics.median(s for s, _ in runs):.3f}", f"{statistics.median(e for _, e in runs):.6f}"])
    show(
        f"PiSSA's start, {a.width} x {a.width}, r={a.r}",
        ["start", "singular values", "seconds", "error x best"],
        rows,
        f"medians of {a.rounds} rounds, {'processor' if a.cpu_time else 'wall'} time",
    )
    console.print("seconds are of the whole wrap")


if __name__ == "__main__":
    main()
