"""The state-dict keys of bitsandbytes: writing them, and reading them without bitsandbytes.

<param>                                       codes: uint8 (ceil(n / 2), 1), or int8 (n_out, n_in)
<param>.absmax, <param>.quant_map             scales of the blocks (uint8 with double quantisation), values of the 16 codes
<param>.nested_absmax, .nested_quant_map      scales of the scales, values of the 256 codes
<param>.quant_state.bitsandbytes__nf4         JSON in uint8: blocksize, dtype, shape, nested_blocksize, nested_dtype, nested_offset
SCB, weight_format                            int8: scales of the rows, 0 for row-major (beside `weight`; <param>.SCB for other names)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from peftlab.quant.codebooks import BOOKS, DYNAMIC
from peftlab.quant.codes import SCALES
from peftlab.quant.packed import BLOCKSIZES, Format, Packed

STATE = "quant_state.bitsandbytes__"
WIDEST = 24  # characters of the longest repr of a number: -2.2250738585072014e-308


class FormatError(ValueError):
    """A state that does not describe a quantised tensor."""


def keys_of(param: str) -> tuple[str, str]:
    """The names of an int8 parameter's scales and of its layout."""
    return ("SCB", "weight_format") if param == "weight" else (f"{param}.SCB", f"{param}.weight_format")


def owns(param: str, key: str) -> bool:
    """Whether a key of a module's state belongs to this parameter's codes."""
    return key.startswith((f"{param}.absmax", f"{param}.quant_", f"{param}.nested_")) or key in keys_of(param)


def write(param: str, p: Packed) -> dict[str, Tensor]:
    """Everything but the codes, by key."""
    form = p.format
    if form.kind == "int8":
        scb, layout = keys_of(param)
        return {scb: p.absmax, layout: torch.tensor(0, dtype=torch.uint8, device="cpu")}
    facts = {"quant_type": form.kind, "blocksize": form.blocksize, "dtype": str(form.dtype).removeprefix("torch."), "shape": list(form.shape)}
    out = {f"{param}.absmax": p.absmax, f"{param}.quant_map": BOOKS[form.kind].to(p.absmax.device, copy=True)}
    if form.double:
        out |= {f"{param}.nested_absmax": p.nested_absmax, f"{param}.nested_quant_map": DYNAMIC.to(p.absmax.device, copy=True)}
        offset = 0.0 if p.offset.is_meta else p.offset.item()
        facts |= {"nested_blocksize": SCALES, "nested_dtype": "float32", "nested_offset": offset}
    # As many bytes whatever the offset, which json writes as repr does: torch.distributed.checkpoint loads into tensors of the sizes that it saved.
    text = (json.dumps(facts) + " " * (WIDEST - len(repr(facts.get("nested_offset", 0.0))))).encode()
    out[f"{param}.{STATE}{form.kind}"] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    return out


def kind_in(param: str, state: Mapping[str, Tensor]) -> str | None:
    """The format in which a module's state holds this parameter, None where it is dense or missing."""
    for kind in ("nf4", "fp4"):
        if f"{param}.{STATE}{kind}" in state:
            return kind
    return "int8" if keys_of(param)[0] in state else None


def read(param: str, state: Mapping[str, Tensor], compute: torch.dtype | None = None, dtype: torch.dtype | None = None) -> Packed:
    """The packed parameter of a module's state; `dtype` is that of int8 values, which the state does not tell.

    Raises FormatError with what is missing or odd.
    """
    kind = kind_in(param, state)
    if kind is None or param not in state:
        raise FormatError(f"{param} is not a quantised tensor: neither {param}.{STATE}nf4, {STATE}fp4 nor {keys_of(param)[0]} is there")
    return _read_rows(param, state, compute, dtype) if kind == "int8" else _read_blocks(param, state, kind, compute)


def _read_rows(param: str, state: Mapping[str, Tensor], compute, dtype) -> Packed:
    codes, absmax = state[param], state[keys_of(param)[0]]
    layout = state.get(keys_of(param)[1])
    if layout is not None and not layout.is_meta and int(layout) != 0:
        raise FormatError(f"{param}: weight_format {int(layout)} is a layout of old bitsandbytes versions; only rows (0) can be read")
    if codes.dtype != torch.int8 or codes.ndim < 2 or absmax.numel() != codes.shape[:-1].numel():
        raise FormatError(f"{param}: codes {codes.dtype} {tuple(codes.shape)} with {absmax.numel()} scales are no int8 rows")
    form = Format("int8", tuple(codes.shape), dtype or torch.float32, codes.shape[-1], False, compute)
    return Packed(form, codes.contiguous(), absmax.float().reshape(-1))


def _read_blocks(param: str, state: Mapping[str, Tensor], kind: str, compute) -> Packed:
    text = bytes(state[f"{param}.{STATE}{kind}"].cpu().tolist())
    try:
        facts = json.loads(text)
        shape, blocksize, dtype = tuple(facts["shape"]), facts["blocksize"], getattr(torch, facts["dtype"])
        double = "nested_blocksize" in facts
        sound = blocksize in BLOCKSIZES and facts["quant_type"] == kind and dtype.is_floating_point and all(isinstance(n, int) for n in shape)
        sound = sound and (not double or facts["nested_blocksize"] == SCALES)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise FormatError(f"{param}: its quant_state is not one that bitsandbytes writes ({type(e).__name__}: {e})") from None
    if not sound:
        raise FormatError(f"{param}: its quant_state is not one that can be read: {facts}")
    form = Format(kind, shape, dtype, blocksize, double, compute)
    codes = state[param]
    codes = (codes if codes.dtype == torch.uint8 else codes.contiguous().view(torch.uint8)).reshape(-1, 1)  # quant_storage may be wider
    found = {k: state.get(f"{param}.{k}") for k in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    missing = [k for k, t in found.items() if t is None and (double or not k.startswith("nested"))]
    if missing:
        raise FormatError(f"{param}: {', '.join(f'{param}.{k}' for k in missing)} missing")
    for name, mine in (("quant_map", BOOKS[kind]), ("nested_quant_map", DYNAMIC)):
        if found[name] is not None and not found[name].is_meta and not torch.equal(found[name].cpu().float(), mine):
            raise FormatError(f"{param}: {param}.{name} is not the code book of {kind}")
    sizes = (codes.numel(), -(-math.prod(shape) // 2)), (found["absmax"].numel(), form.blocks)
    if any(have != want for have, want in sizes) or found["absmax"].is_floating_point() is double:
        raise FormatError(f"{param}: {codes.numel()} bytes and {found['absmax'].numel()} scales ({found['absmax'].dtype}) do not make up {shape}")
    if not double:
        return Packed(form, codes.contiguous(), found["absmax"].float())
    offset = torch.tensor(float(facts["nested_offset"]), dtype=torch.float32, device=codes.device)
    return Packed(form, codes.contiguous(), found["absmax"], found["nested_absmax"].float(), offset)
