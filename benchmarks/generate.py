"""Writing text token by token: a Llama with its linear layers in nf4, beside bitsandbytes and the dense model.

The weights are random: what a token costs does not depend on them. Jobs alternate round by round; a job writes some tokens after a prompt, with a KV
cache, in eval mode without gradients.

    python benchmarks/generate.py                        # the shape of SmolLM2-135M
    python benchmarks/generate.py --hidden 2048 --layers 4 --cpu-time
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from _common import alternate, ratio, show, version
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftlab

DENSE, OURS, COMPILED, THEIRS = "dense", "peftlab", "peftlab, compile_decoding", "bitsandbytes"


def llama(hidden: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def of_bitsandbytes(dense: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with the same layers packed by bitsandbytes."""
    import bitsandbytes

    model = copy.deepcopy(dense)
    for path in peftlab.packed_weights(peftlab.quantize(copy.deepcopy(dense), "nf4")):
        old = model.get_submodule(path.removesuffix(".weight"))
        layer = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        layer.load_state_dict(old.state_dict())
        model.set_submodule(path.removesuffix(".weight"), layer.to("cpu"))
        if getattr(layer.weight, "quant_state", None) is None:
            layer.weight = layer.weight._quantize("cpu")
    return model.eval().requires_grad_(False)


def writes(model: nn.Module, tokens: int, compiled: bool = False) -> Callable[[], None]:
    ids = torch.arange(1, 9)[None]

    @torch.no_grad()
    def job() -> None:
        peftlab.compile_decoding(compiled)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    return job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--cpu-time", action="store_true", help="processor time and one thread, for machines that are busy with other things")
    a = parser.parse_args()
    if a.cpu_time:
        torch.set_num_threads(1)
    rows = []
    for name in a.dtypes:
        dense = llama(a.hidden, a.layers).to(getattr(torch, name))
        packed = peftlab.quantize(copy.deepcopy(dense), "nf4")
        jobs = {DENSE: writes(dense, a.tokens), OURS: writes(packed, a.tokens), COMPILED: writes(packed, a.tokens, True)}
        if version("bitsandbytes"):
            jobs[THEIRS] = writes(of_bitsandbytes(dense, dense.dtype), a.tokens)
        times = alternate(jobs, a.rounds, warmup=1, cpu=a.cpu_time)
        for k, found in times.items():
            rows.append([f"{name}, {k}", f"{1e3 * statistics.median(found) / a.tokens:.1f}", f"{ratio(times, k, DENSE):.2f}"])
    peftlab.compile_decoding(False)
    note = f"a prompt of 8 tokens and {a.tokens} new ones; medians of {a.rounds} rounds, {'processor' if a.cpu_time else 'wall'} time"
    show(f"Llama, {a.layers} layers of {a.hidden}", ["", "ms a token", "x dense"], rows, note)


if __name__ == "__main__":
    main()
