"""What ties an adapter to its base: shape, dtype and sampled values of the tensors that it was trained on."""

from __future__ import annotations

import base64

import torch
from torch import Tensor, nn

from peftlab.core.ledger import sample_entries
from peftlab.core.method import Method
from peftlab.core.site import Site
from peftlab.model import layers
from peftlab.model.index import join_path
from peftlab.model.packed import is_foreign_tensor, plain_values
from peftlab.model.walk import named_base_modules


def fingerprint(t: Tensor, values: bool = True) -> dict:
    """Shape, dtype and evenly spread values (their bytes in base64) of a base tensor; zeros for a tensor on meta."""
    out = {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
    plain = plain_values(gathered(t.detach())) if values and t.numel() else None
    if plain is not None:
        found = sample_entries(plain)
        found = torch.zeros(found.shape, dtype=t.dtype, device="cpu") if found.is_meta else found.cpu().contiguous()
        out["values"] = base64.b64encode(found.view(torch.uint8).numpy().tobytes()).decode()
    return out


def has_comparable_values(site: Site, method: Method) -> bool:
    """Whether the frozen values below a method are part of what its file fits: not what it replaces, nor what nobody can read."""
    return not (method.replaces or (site.rule is layers.OPAQUE and not is_foreign_tensor(site.raw_tensor)))


def _saved_values(saved: dict) -> list[float]:
    data = bytearray(base64.b64decode(saved["values"]))
    return torch.frombuffer(data, dtype=getattr(torch, saved["dtype"])).double().tolist()


def fingerprint_difference(path: str, saved: dict, t: Tensor) -> str | None:
    """How a base tensor differs from the one an adapter was trained on, or None."""
    if list(t.shape) != saved["shape"]:
        return f"{path!r} has shape {tuple(t.shape)}, the adapter's base had {tuple(saved['shape'])}"
    there = {} if "values" not in saved or t.is_meta else fingerprint(t)
    if "values" not in there:
        return None
    kinds = {saved["dtype"], str(t.dtype).removeprefix("torch.")}
    rel = 0.0 if len(kinds) == 1 else 2**-7 if "bfloat16" in kinds else 2**-10 if "float16" in kinds else 2**-22
    for a, b in zip(_saved_values(saved), _saved_values(there), strict=True):
        if a != b and not abs(a - b) <= rel * max(abs(a), abs(b)) and not (a != a and b != b):
            return f"{path!r} holds other values ({b:.6g} where the adapter's base had {a:.6g})"
    return None


def gathered(t: Tensor) -> Tensor:
    """The full tensor behind an FSDP2 shard (a collective call on every rank)."""
    return t.full_tensor() if type(t).__name__ == "DTensor" else t


def fingerprinted_parameters(host: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(path below the host, module, name) of the first and the last parameters of a module whose call is surrounded: what is fingerprinted."""
    there = [(join_path(path, n), m, n) for path, m in named_base_modules(host) for n, p in m._parameters.items() if p is not None]
    return there if len(there) <= 4 else [*there[:2], *there[-2:]]
