"""Time to wrap, add, save, load and switch adapters on models with thousands of layers, beside HF peft.

The model is blocks of four Linear(32, 32); every one of them is adapted with LoRA r=8. Garbage collection is on, as in any program.

    python benchmarks/wrap_scale.py
    python benchmarks/wrap_scale.py --sizes 500 2000 --rounds 5 --no-hf
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _common import clock, console, has_peft, show
from torch import nn

import peftlab

GOALS = {"wrap": 2.0, "second adapter": 2.0, "load": 3.0, "switch": 0.1, "estimate": 1.0}  # seconds at 8,000 layers
GROWTH = 5.0  # t(8k) / t(2k)


class Block(nn.Module):
    """Four small layers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) + self.k(x) + self.v(x))


class Net(nn.Module):
    """n layers in blocks of four."""

    def __init__(self, n: int):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(n // 4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def timed(out: dict, name: str, job: Callable[[], object], cpu: bool) -> None:
    gc.collect()
    out.setdefault(name, []).append(clock(job, cpu))


def ours(n: int, out: dict, folder: Path, cpu: bool) -> None:
    """One round of everything with peftlab."""
    model, fresh, path = Net(n), Net(n), folder / "ours.safetensors"
    timed(out, "estimate", lambda: peftlab.estimate(model, "lora", targets="*"), cpu)
    timed(out, "wrap", lambda: peftlab.wrap(model, "lora", targets="*"), cpu)
    timed(out, "second adapter", lambda: peftlab.wrap(model, "lora", targets="*", name="b"), cpu)
    timed(out, "switch", lambda: peftlab.activate(model, "default"), cpu)
    timed(out, "save", lambda: peftlab.save(model, path, "default"), cpu)
    timed(out, "load", lambda: peftlab.load(fresh, path), cpu)
    timed(out, "remove all", lambda: peftlab.unwrap(model), cpu)


def theirs(n: int, out: dict, folder: Path, cpu: bool) -> None:
    """One round of everything with HF peft."""
    import peft

    config = peft.LoraConfig(r=8, target_modules=["q", "k", "v", "o"])
    model, fresh, path = Net(n), Net(n), folder / "theirs"
    held = {}
    timed(out, "wrap", lambda: held.update(m=peft.get_peft_model(model, config)), cpu)
    timed(out, "second adapter", lambda: held["m"].add_adapter("b", config), cpu)
    timed(out, "switch", lambda: held["m"].set_adapter("b"), cpu)
    timed(out, "save", lambda: held["m"].save_pretrained(path, selected_adapters=["default"]), cpu)
    timed(out, "load", lambda: peft.PeftModel.from_pretrained(fresh, path), cpu)
    timed(out, "remove all", lambda: held["m"].unload(), cpu)


def llama_70b() -> nn.Module:
    """The shapes of Llama 70B, without memory."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.o_proj = nn.Linear(8192, 8192, bias=False), nn.Linear(8192, 8192, bias=False)
            self.k_proj, self.v_proj = nn.Linear(8192, 1024, bias=False), nn.Linear(8192, 1024, bias=False)
            self.gate_proj, self.up_proj = nn.Linear(8192, 28672, bias=False), nn.Linear(8192, 28672, bias=False)
            self.down_proj = nn.Linear(28672, 8192, bias=False)
            self.norm1, self.norm2 = nn.RMSNorm(8192), nn.RMSNorm(8192)

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(32000, 8192)
            self.layers = nn.ModuleList(Layer() for _ in range(80))
            self.norm, self.lm_head = nn.RMSNorm(8192), nn.Linear(8192, 32000, bias=False)

    with torch.device("meta"):
        return Llama().bfloat16()


def giant(rounds: int, cpu: bool) -> None:
    """Plan, estimate and wrap of 69 billion parameters on meta."""
    out: dict[str, list[float]] = {}
    for _ in range(rounds):
        model = llama_70b()
        timed(out, "plan", lambda m=model: peftlab.plan(m, "lora", r=16), cpu)
        timed(out, "estimate", lambda m=model: peftlab.estimate(m, "lora", r=16), cpu)
        timed(out, "wrap", lambda m=model: peftlab.wrap(m, "lora", r=16), cpu)
    total = sum(p.numel() for k, p in model.named_parameters() if "peftlab" not in k)
    rows = [[k, f"{statistics.median(v):.3f}", "<= 1"] for k, v in out.items()]
    show(f"Llama 70B on meta ({total:,} parameters), lora r=16, seconds", ["", "peftlab", "target"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs=2, default=[2000, 8000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hf-rounds", type=int, default=1, help="HF peft takes minutes a round at 8,000 layers")
    parser.add_argument("--no-hf", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="processor time and one thread, for machines that are busy with other things")
    a = parser.parse_args()
    if a.cpu_time:
        torch.set_num_threads(1)
    small, large = a.sizes
    hf = not a.no_hf and has_peft()
    mine: dict[int, dict] = {n: {} for n in a.sizes}
    peer: dict[int, dict] = {n: {} for n in a.sizes}
    with tempfile.TemporaryDirectory() as folder:
        ours(100, {}, Path(folder), a.cpu_time)  # imports and caches
        for i in range(a.rounds):
            for n in a.sizes:
                ours(n, mine[n], Path(folder), a.cpu_time)
                if hf and i < a.hf_rounds:
                    theirs(n, peer[n], Path(folder), a.cpu_time)
    rows = []
    for what in mine[large]:
        at = [statistics.median(mine[n][what]) for n in a.sizes]
        them = [f"{statistics.median(peer[n][what]):.2f}" if what in peer[n] else "-" for n in a.sizes]
        goal = f"<= {GOALS[what]:g}" if what in GOALS and large == 8000 else ""
        rows.append([what, f"{at[0]:.3f}", f"{at[1]:.3f}", goal, f"{at[1] / at[0]:.1f}", *them])
    head = ["", f"peftlab {small:,}", f"peftlab {large:,}", "target", "growth", f"HF peft {small:,}", f"HF peft {large:,}"]
    note = f"{'processor' if a.cpu_time else 'wall'} time, median of {a.rounds} rounds (HF peft: {a.hf_rounds}); "
    note += f"linear growth is {large / small:g}, target <= {GROWTH:g}"
    show("seconds on models with thousands of Linear(32, 32)", head, rows, note)
    if not hf:
        console.print("HF peft did not take part")
    giant(a.rounds, a.cpu_time)


if __name__ == "__main__":
    main()
