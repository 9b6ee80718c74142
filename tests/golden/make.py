"""Writes the golden files: `python tests/golden/make.py NAME ...` (all that are missing without a name).

A golden file is an adapter as some version of the library saved it. It is written once and never again: what `tests/test_golden.py` asks is that
today's library reads it to the same bits. The base models and inputs are made by arithmetic, so that they are the same everywhere.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
OUTPUTS = HERE / "outputs.json"
MORE_CASES = (  # one for each way of being attached, with lora; the methods have a case of their own each
    "linear_own_forward", "conv1d_hf", "conv2d_groups", "conv_transpose2d", "embedding_padding", "embedding_scaled", "bilinear", "attention", "attention_whole",
    "attention_kv_dims", "lstm", "gru_cell", "experts_eio", "experts_one", "fused", "fused_heads", "raw_io", "opaque", "encoder", "tied_share", "tied_untie",
    "two", "linear_nf4", "conv1d_hf_nf4", "embedding_fp4", "experts_nf4", "linear_int8",
)  # fmt: skip


def wave(shape: tuple[int, ...], name: str, size: float = 1.0) -> Tensor:
    """A tensor (shape) of float64 values in [-size, size] that depend on the name alone."""
    n = torch.Size(shape).numel()
    return (size * torch.sin(torch.arange(n, dtype=torch.float64) * 0.9 + zlib.crc32(name.encode()) % 1000)).reshape(shape)


@torch.no_grad()
def fill(module: nn.Module, size: float) -> None:
    """Give every floating parameter values by its name."""
    for name, p in module.named_parameters():
        if p.is_floating_point():
            p.copy_(wave(tuple(p.shape), name, size))


def base(case: str) -> nn.Module:
    """The model of a case of the zoo with golden values."""
    import cases

    import peftlab

    model = cases.build(case)
    if case in cases.PACKED:
        model = peftlab.dequantize(model)
    fill(model, 0.5)
    if case in cases.PACKED:
        place = next(n for n, m in model.named_modules() if n) if case != "experts_nf4" else "layer.up"
        model = peftlab.quantize(model, cases.KINDS[case], targets=place)
    return model.eval()


def inputs(case: str) -> tuple[Tensor, ...]:
    import cases

    return tuple(wave(tuple(t.shape), f"input {i}") if t.is_floating_point() else t for i, t in enumerate(cases.inputs(case)))


def wanted() -> dict[str, tuple[str, str]]:
    """File name -> (method, case)."""
    import cases

    found = {f"{m}--{cases.quick(m)[0]}": (m, cases.quick(m)[0]) for m in cases.methods()}
    return found | {f"lora--{c}": ("lora", c) for c in MORE_CASES}


def output(model: nn.Module, case: str) -> list[float]:
    """The first eight entries of what the model gives, in float64."""
    with torch.no_grad():
        return model(*inputs(case)).double().flatten()[:8].tolist()


def make(name: str, method: str, case: str) -> list[float]:
    import cases

    import peftlab

    model = base(case)
    data = {"data": [inputs(case)], "loss": cases.loss_of}
    peftlab.wrap(model, method, **cases.keywords(method, case), **data, dtype=torch.float64)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad:
                p.add_(wave(tuple(p.shape), key, 0.3))
    model.eval()
    peftlab.save(model, HERE / f"{name}.safetensors")
    return output(model, case)


def main() -> None:
    known = json.loads(OUTPUTS.read_text()) if OUTPUTS.exists() else {}
    there = wanted()
    for name in sys.argv[1:] or [n for n in there if n not in known]:
        known[name] = make(name, *there[name])
        print(name)
    OUTPUTS.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")


if __name__ == "__main__":
    main()
