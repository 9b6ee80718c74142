"""How the methods of one adapter are made: start values from (seed, adapter, path), on meta or on a device, now or once weights are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.core.base import Base
from peftlab.core.method import AdapterConfig, Method
from peftlab.core.site import Site
from peftlab.model import layers
from peftlab.support.contexts import default_device, preserved_rng


def build_method(config: AdapterConfig, site: Site, below: tuple = (), device: str = "cpu") -> Method:
    """The method with its start values, drawn on CPU from (seed, adapter, path): the same on every process and device."""
    with torch.no_grad(), default_device(device):
        if device != "meta":
            torch.default_generator.manual_seed(site_seed(config.seed, config.name, site.path))
        method = config.cls(Base(site, below, config.common), **config.hyper)
    if isinstance(method.__dict__.get("s"), float):
        # A tensor can be changed (`rescale`) without compiling again; a float64 of no dimensions promotes nothing.
        method.__dict__["s"] = torch.tensor(method.s, dtype=torch.float64, device="cpu")
    method.__dict__.update(recipe=config, site=site)
    note_declared_frozen(method)
    return method


def fill_method(config: AdapterConfig, site: Site, method: Method, weights_known: bool) -> bool:
    """Write the start values into a method whose tensors were on meta; False while they cannot be known yet."""
    if site.device.type == "meta" or not fill_shared(config, site.device, weights_known):
        return False
    if not weights_known and any(t.is_meta for t in [*method.parameters(), *method.buffers()]):
        return False
    with preserved_rng():
        try:
            fresh = build_method(config, site if weights_known else site.seen_as("unknown"))
        except layers.NeedsWeight:
            return False
    fill_tensors(method, fresh, site.device)
    return True


def fill_shared(config: AdapterConfig, device: torch.device, weights_known: bool) -> bool:
    """The same for what the sites share."""
    if config.common is None or config.make_common is None:
        return True
    if not weights_known and any(t.is_meta for t in [*config.common.parameters(), *config.common.buffers()]):
        return False
    with preserved_rng():
        fill_tensors(config.common, config.make_common(), device)
    config.make_common = None
    return True


def note_declared_frozen(module: nn.Module) -> nn.Module:
    """Remember which of a new module's parameters its author declared as frozen (`requires_grad=False`): nothing may unfreeze them."""
    module.__dict__["declared_frozen"] = frozenset(k for k, p in module.named_parameters() if not p.requires_grad)
    return module


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a method, or of what its sites share, that may be trained."""
    return [p for k, p in module.named_parameters() if k not in module.__dict__.get("declared_frozen", ())]


@torch.no_grad()
def fill_tensors(old: nn.Module, new: nn.Module, device: torch.device) -> None:
    """Copy values into tensors that are there; give those still on meta real ones."""
    values = dict(new.named_parameters()) | dict(new.named_buffers())
    for path, m in old.named_modules():
        for table in (m._parameters, m._buffers):
            for k, t in table.items():
                if t is None:
                    continue
                value = values[f"{path}.{k}" if path else k]
                if not t.is_meta:
                    t.copy_(value)
                    continue
                value = value.detach().to(device, t.dtype)
                table[k] = nn.Parameter(value, requires_grad=t.requires_grad) if table is m._parameters else value


def saved_tensors(m: nn.Module) -> dict[str, Tensor]:
    """What of a method or shared module is written to a file: parameters and persistent buffers."""
    if m._modules:
        return m.state_dict(keep_vars=True)
    kept = {k: b for k, b in m._buffers.items() if k not in m._non_persistent_buffers_set}
    return {k: t for k, t in (m._parameters | kept).items() if t is not None}


def site_seed(seed: int, name: str, path: str) -> int:
    """A stable 63-bit seed (FNV-1a); Python's own hash differs between processes."""
    h = 0xCBF29CE484222325
    for byte in f"{seed}\0{name}\0{path}".encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h >> 1
