"""Predicted against measured memory: what `peftlab.estimate` says and what a real training step allocates.

Every case runs in a process of its own: build, wrap, one step to make the optimizer's state, then one step whose allocations
are recorded by torch's profiler. "activations" is what is alive after the forward, "peak" the most that was alive at once, both as
the CPU allocator saw it. "RSS" is what the operating system saw: the growth of the process's peak resident memory over the same step, with
everything that stays.

    python benchmarks/estimate.py            # all cases
    python benchmarks/estimate.py --case 3   # one of them, as JSON
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _common import GPT, console, show, version
from torch import nn
from torch.utils._pytree import tree_leaves

import peftlab
from peftlab.inspect.estimate.report import Estimate


def gpt(dtype: torch.dtype = torch.float32, dropout: float = 0.0, tied: bool = True) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model = GPT(6, 256, 4000, dropout=dropout).to(dtype)
    if not tied:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model, torch.randint(0, 4000, (4, 256))


def llama(checkpointing: bool = False) -> tuple[nn.Module, object]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=4000, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, use_cache=False)
    model = LlamaForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    ids = torch.randint(0, 4000, (4, 256))
    return model, dict(input_ids=ids, labels=ids)


def bert() -> tuple[nn.Module, object]:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(vocab_size=4000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8))
    return model, dict(input_ids=torch.randint(0, 4000, (8, 128)), labels=torch.zeros(8, dtype=torch.long))


def convnet() -> tuple[nn.Module, object]:
    def block(i: int, o: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1, stride=2), nn.BatchNorm2d(o), nn.ReLU())

    model = nn.Sequential(block(3, 64), block(64, 128), block(128, 256), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    return model, torch.randn(16, 3, 64, 64)


def encoder() -> tuple[nn.Module, object]:
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(256, 10)), torch.randn(8, 128, 256)


FULL = dict(in_place=True)
CASES: list[tuple[str, Callable[[], tuple[nn.Module, object]], str, dict]] = [
    ("GPT float32", gpt, "lora", dict(r=8)),
    ("GPT float32", gpt, "lora", dict(r=8, dropout=0.1)),
    ("GPT float32", gpt, "dora", dict(r=8)),
    ("GPT float32", gpt, "ia3", {}),
    ("GPT float32", gpt, "bitfit", {}),
    ("GPT float32", gpt, "oft", {}),
    ("GPT float32, dropout 0.1", lambda: gpt(dropout=0.1), "lora", {}),
    ("GPT bfloat16", lambda: gpt(torch.bfloat16), "lora", {}),
    ("GPT untied, trained whole", lambda: gpt(tied=False), "full", FULL),
    ("Llama (transformers)", llama, "lora", {}),
    ("Llama (transformers), checkpointing", lambda: llama(True), "lora", {}),
    ("BERT classifier (transformers)", bert, "lora", {}),
    ("BERT classifier (transformers)", bert, "vera", {}),
    ("convolutions and BatchNorm", convnet, "lora", {}),
    ("convolutions, trained whole", convnet, "full", FULL),
    ("nn.TransformerEncoder", encoder, "lora", {}),
]


def forward(model: nn.Module, batch) -> tuple[object, torch.Tensor]:
    """The output, which a training loop holds on to, and the loss that `estimate` assumes where none is given."""
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    if hasattr(out, "loss") and out.loss is not None:
        return out, out.loss
    return out, F.cross_entropy(out.flatten(0, -2), batch.flatten()) if not batch.is_floating_point() else out.mean()


def resident(field: str) -> int:
    """A field of the process's memory status in bytes, 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith(field)), 0)
    except OSError:
        return 0


def measure(i: int) -> dict:
    """One case, predicted and measured, in bytes."""
    name, build, method, options = CASES[i]
    if "transformers" in name:
        importlib.import_module("transformers.models.auto.modeling_auto")
    warm = nn.Linear(512, 512)  # what torch starts once is not the model's
    warm(torch.ones(512, 512)).sum().backward()
    torch.optim.AdamW(warm.parameters()).step()
    del warm
    gc.collect()
    before = resident("VmRSS")
    model, batch = build()
    peftlab.wrap(model, method, **options).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        out, loss = forward(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del out, loss
    grown = resident("VmHWM") - before
    stays = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}.values())
    stays += sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    fed = sum(t.nbytes for t in {id(t): t for t in tree_leaves(batch) if isinstance(t, torch.Tensor)}.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        held = forward(model, batch)
        with torch.profiler.record_function("forward is over"):
            pass
        held[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    now = peak = kept = 0
    for e in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if e.name() == "[memory]":
            now += e.nbytes()
            peak = max(peak, now)
        elif e.name() == "forward is over":
            kept = now
    said = peftlab.estimate(build()[0], method, inputs=batch, **options)
    return dict(
        predicted=[said.activation_bytes, said.peak_bytes], measured=[kept + fed, stays + fed + peak], resident=grown, note=said.note,
        static=[said.static_bytes, stays],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int)
    chosen = parser.parse_args().case
    if chosen is not None:
        print(json.dumps(measure(chosen)))
        return
    rows, worst = [], [0.0, 0.0]
    for i, (name, _, method, options) in enumerate(CASES):
        if "transformers" in name and version("transformers") is None:
            console.print(f"transformers is not installed: {name} is left out")
            continue
        done = subprocess.run([sys.executable, __file__, "--case", str(i)], capture_output=True, text=True)
        if done.returncode:
            console.print(done.stderr[-2000:])
            raise SystemExit(f"case {i} ({name}, {method}) failed")
        r = json.loads(done.stdout.splitlines()[-1])
        label = " ".join([method, *(f"{k}={v}" for k, v in options.items())])
        if r["note"]:
            rows.append([name, label, r["note"]])
            continue
        assert r["static"][0] == r["static"][1], f"{name}, {method}: {r['static'][0]} bytes of weights and optimizer predicted, {r['static'][1]} there"
        cells: list[object] = [name, label]
        for j in (0, 1):
            said, seen = r["predicted"][j], r["measured"][j]
            error = said / seen - 1
            worst[j] = max(worst[j], abs(error))
            cells += [f"{said / 2**20:.2f}", f"{seen / 2**20:.2f}", f"{error:+.1%}"]
        cells.append(f"{r['resident'] / 2**20:.1f}")
        rows.append(cells)
    head = ["model", "method", "activations", "measured", "error", "peak", "measured", "error", "RSS"]
    note = f"MiB; AdamW. Largest error: activations {worst[0]:.1%} (stated {Estimate.ACTIVATION_ERROR:.0%}), "
    note += f"peak {worst[1]:.1%} (stated {Estimate.PEAK_ERROR:.0%})"
    show("estimate: predicted and measured memory of a training step", head, rows, note)
    if worst[0] > Estimate.ACTIVATION_ERROR or worst[1] > Estimate.PEAK_ERROR:
        raise SystemExit("the stated error is exceeded")


if __name__ == "__main__":
    main()
