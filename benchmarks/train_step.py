"""What a training step costs with each method, relative to the frozen layers alone, beside HF peft.

A step is a forward of four Linear layers in a row and the backward of all of it: the gradient of the input (the layers below need it)
and, for adapters, the gradients of their own tensors. The frozen step has the first half of that alone. Every method alternates with the
frozen step, round by round, and its ratio is the median over the rounds. Forward and backward only: no optimizer, no loss.

    python benchmarks/train_step.py                              # width 768, 512 tokens; then width 1024, 64 tokens
    python benchmarks/train_step.py --width 768 --tokens 512 --only lora dora
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from _common import alternate, console, has_peft, ratio, show
from torch import Tensor, nn

import peftlab

DEPTH = 4
OPTIONS: dict[str, dict] = {"lora": dict(r=8), "dora": dict(r=8), "full": dict(targets="*"), "sparse": dict(targets="*")}
TARGETS = {"lora": 1.12, "dora": 1.3}  # of the frozen step at width 768 and 512 tokens


def stack(width: int) -> nn.Sequential:
    """Frozen layers in training mode, the same values each time."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(DEPTH))).requires_grad_(False).train()


def stepper(model: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Forward and backward as a call without arguments; it leaves no gradients behind."""
    params = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        model(x).backward(upstream)
        x.grad = None
        for p in params:
            p.grad = None

    return step


def stir(model: nn.Module) -> nn.Module:
    """Move the trained tensors away from their start, as training would: a zero costs as much, but an exact start may take a shorter way."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=1e-3)
    return model


def ours(width: int) -> dict[str, Callable[[], nn.Module]]:
    """The methods of the registry by name."""

    def make(name: str) -> Callable[[], nn.Module]:
        return lambda: stir(peftlab.wrap(stack(width), name, **{"targets": "*", **OPTIONS.get(name, {})}))

    return {e.name: make(e.name) for e in peftlab.methods(aliases=False)}


def theirs(width: int) -> dict[str, Callable[[], nn.Module]]:
    """HF peft's methods, by the name of ours."""
    import peft

    where = dict(target_modules=[str(i) for i in range(DEPTH)])
    configs = {
        "lora": lambda: peft.LoraConfig(r=8, **where),
        "dora": lambda: peft.LoraConfig(r=8, use_dora=True, **where),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], **where),
        "vera": lambda: peft.VeraConfig(**where),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=32, **where),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, **where),
        "lokr": lambda: peft.LoKrConfig(r=8, **where),
        "loha": lambda: peft.LoHaConfig(r=8, **where),
        "hra": lambda: peft.HRAConfig(r=8, **where),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=1000, **where),
        "adalora": lambda: peft.AdaLoraConfig(init_r=12, target_r=8, total_step=100, **where),
    }

    def make(name: str) -> Callable[[], nn.Module]:
        return lambda: stir(peft.get_peft_model(stack(width), configs[name]()).train())

    return {k: make(k) for k in configs}


def run(width: int, tokens: int, rounds: int, only: list[str] | None, cpu: bool) -> None:
    """One table."""
    torch.manual_seed(1)
    x = torch.randn(4, tokens // 4, width, requires_grad=True)
    upstream = torch.randn(4, tokens // 4, width)
    frozen = stepper(stack(width), x, upstream)
    jobs = [(k, "peftlab", make) for k, make in ours(width).items()]
    if has_peft():
        jobs += [(k, "HF peft", make) for k, make in theirs(width).items()]
    found: dict[str, dict[str, tuple[float, int]]] = {}
    base: list[float] = []
    left_out = []
    for name, library, make in jobs:
        if only and name not in only:
            continue
        try:
            model = make()
            step = stepper(model, x, upstream)
            step()
        except Exception as e:  # a method that does not fit a Linear, or needs data or options
            left_out.append(f"{library} {name}: {str(e).splitlines()[0][:110] if str(e) else type(e).__name__}")
            continue
        times = alternate({"frozen": frozen, name: step}, rounds, cpu=cpu)
        base += times["frozen"]
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found.setdefault(name, {})[library] = (ratio(times, name, "frozen"), count)
    lora = found.get("lora", {}).get("peftlab", (float("nan"), 0))[0]
    rows = []
    for name, by in sorted(found.items(), key=lambda kv: min(r for r, _ in kv[1].values())):
        mine, peer = by.get("peftlab"), by.get("HF peft")
        goal = TARGETS.get(name) if (width, tokens) == (768, 512) else None
        rows.append(
            [
                name,
                f"{mine[0]:.2f}" if mine else "-",
                f"<= {goal}" if goal else "",
                f"{mine[0] / lora:.2f}" if mine else "-",
                f"{peer[0]:.2f}" if peer else "-",
                f"{mine[1]:,}" if mine else "-",
                f"{peer[1]:,}" if peer else "-",
            ]
        )
    head = ["method", "peftlab x frozen", "target", "peftlab x its lora", "HF peft x frozen", "trains", "HF trains"]
    note = f"frozen step: {1e3 * statistics.median(base):.1f} ms (median), {rounds} rounds, {'processor' if cpu else 'wall'} time"
    show(f"training step, {DEPTH} x Linear({width}, {width}), {tokens} tokens, float32", head, rows, note)
    for line in left_out:
        console.print(f"left out: {line}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--cpu-time", action="store_true", help="processor time and one thread, for machines that are busy with other things")
    a = parser.parse_args()
    if a.cpu_time:
        torch.set_num_threads(1)
    shapes = [(a.width or 768, a.tokens or 512)] if a.width or a.tokens else [(768, 512), (1024, 64)]
    for width, tokens in shapes:
        run(width, tokens, a.rounds, a.only, a.cpu_time)


if __name__ == "__main__":
    main()
