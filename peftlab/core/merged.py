"""The tensors of a module while adapters are merged into them: what is stored, what is kept, and how it comes back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peftlab.core.base import adapted_values
from peftlab.core.site import STASH_PREFIX, frozen_values
from peftlab.core.stack import AdapterStack
from peftlab.core.swap import changes_bias
from peftlab.model.index import join_path, storage_id
from peftlab.model.packed import QuantizedModule


def stashed_parameters(stack: AdapterStack) -> list[str]:
    return [n.removeprefix(STASH_PREFIX) for n in stack._buffers if n.startswith(STASH_PREFIX)]


def held_tensors(host: nn.Module, stack: AdapterStack, param: str, value: Tensor) -> dict[str, Tensor]:
    """The tensors that hold a merged value, by name: where a quantised base is merged onto itself, codes and scales."""
    return host.peftlab_stored(param, value, stack.onto) if isinstance(host, QuantizedModule) else {param: value}


def drop_stash(stack: AdapterStack) -> None:
    for p in stashed_parameters(stack):
        del stack._buffers[STASH_PREFIX + p]


def names_to_fold(stack: AdapterStack, new: list[str]) -> list[str]:
    """What will be merged onto the frozen bits that are still known: all but what was merged for good."""
    return [n for n in stack.order if n in {*stack.merged, *new} and n not in stack.lossy]


def unload_ties(host: nn.Module, stack: AdapterStack) -> list[str]:
    """Give an untied end a tensor of its own; returns the parameters that got one."""
    split = [param for param, shared in stack.untied.items() if shared is None]
    for param in split:
        old = stack.untied[param] = host._parameters[param]
        host._parameters[param] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    return split


def merged_tensors(path: str, host: nn.Module, stack: AdapterStack, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(parameter, value in its own dtype) with these adapters folded in; one tensor at a time."""
    links = mergeable_pairs(stack, names)
    params = dict.fromkeys(s.param for s, m in links if m.has_weight())
    params |= dict.fromkeys(s.bias for s, m in links if changes_bias(s, m))
    for param in params:
        given = None if stack.onto is None else stack.onto.originals.get(param)
        raw = frozen_values(host, param) if given is None else given
        with torch.no_grad():
            value = adapted_values(host, param, links, raw).to(raw.dtype)
        if not torch.isfinite(value).all():
            raise ValueError(f"merging {names} would put non-finite values into {join_path(path, param)!r}")
        # A method may hand out its own tensor (a trained copy), or the frozen one: the merged weight has memory of its own.
        held = {storage_id(t) for t in (raw, host._parameters[param], *(p for _, m in links for p in m.parameters()))}
        yield param, value.clone() if storage_id(value) in held else value.contiguous()


def mergeable_pairs(stack: AdapterStack, names: list[str]) -> tuple:
    """The links of these adapters that act on tensors."""
    return tuple(p for n in names for p in stack.sites[n] if p[1].unmergeable() is None and not p[1].in_place)


def stash_and_rebind(host: nn.Module, stack: AdapterStack, name: str, value: Tensor) -> None:
    if STASH_PREFIX + name not in stack._buffers:
        raw = _tensor_named(host, name).detach()
        # The scales of codes are kept as whole numbers: converting the model's floats must not touch them.
        stack.register_buffer(STASH_PREFIX + name, raw if name in host._parameters or not raw.is_floating_point() else raw.view(torch.int32), persistent=False)
    rebind_storage(host, stack, name, value)


def _tensor_named(host: nn.Module, name: str) -> Tensor:
    """A parameter, or a buffer that belongs to one."""
    return host._parameters[name] if name in host._parameters else host._buffers[name]


def fit_shape(value: Tensor, t: Tensor) -> Tensor:
    """A value in the shape of what it takes the place of; where codes and dense weights change places, as it is."""
    if t.dtype == torch.float32 and value.dtype == torch.int32:
        return value.view(torch.float32)
    return value.view(t.shape) if value.is_floating_point() is t.is_floating_point() else value


def rebind_storage(host: nn.Module, stack: AdapterStack, param: str, value: Tensor) -> None:
    """Put other memory behind a parameter and those that share its storage, and let a backward that needs the old values notice."""
    for p in storage_owners(host, stack, param):
        p.data = fit_shape(value, p)
        if p.ndim:
            with torch.no_grad():
                p.narrow(0, 0, 0).zero_()  # writes nothing and counts as a write


def storage_owners(host: nn.Module, stack: AdapterStack, param: str) -> list[nn.Parameter]:
    """The parameter, and those tied to it by storage alone that follow it."""
    raw = _tensor_named(host, param)
    if param in stack.untied:
        return [raw]
    tied = [o for pairs in stack.sites.values() for s, _ in pairs if s.param == param for o in s.tied]
    return list({id(p): p for p in [raw, *(h._parameters[n] for h, n in tied)]}.values())


def restore_tie(host: nn.Module, stack: AdapterStack, param: str) -> None:
    """An untied end shares its tensor again once nothing is merged into it."""
    shared = stack.untied.get(param)
    if shared is not None:
        own = host._parameters[param]
        if (shared.device, shared.dtype) != (own.device, own.dtype):  # the model was moved meanwhile, which this one did not see
            shared.data = shared.data.to(own.device, own.dtype)
        host._parameters[param], stack.untied[param] = shared, None
