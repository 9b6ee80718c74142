"""Start values from data: run batches through the untouched model and show each site its inputs or its gradients.

A method whose `needs_data` is "inputs" or "gradients" gets `observe(base, value)` for every batch that reaches it: the inputs (rows,
n_in), or the gradient of its weight. It keeps what it needs in `seen`, None before the first; `pool(states)` makes `seen` of what
several processes kept, and `calibrated(base)` the start values of `seen`. One dense gradient exists at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sized

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftlab.attach.probes import probed_sites
from peftlab.core.base import Base
from peftlab.core.ledger import KEEP_BUFFERS
from peftlab.core.method import Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.model.layers import is_opaque_linear
from peftlab.support.batches import call_with_batch, loss_in_output
from peftlab.support.progress import Progress, reported


def shows_inputs(site: Site) -> bool:
    """Whether the host's call shows this site's input: linear-like layers, and q, k, v of nn.MultiheadAttention."""
    if isinstance(site.host, nn.MultiheadAttention):
        return site.key in ("q_proj", "k_proj", "v_proj")
    return site.rule.pointwise and site.expert is None and (site.rule.call and not site.transposed) and not _only_read(site)


def _only_read(site: Site) -> bool:
    return site.read_only and type(site.host).__name__ == "NonDynamicallyQuantizableLinear"


def calibrate(model: nn.Module, pairs: list[tuple[Site, Method]], data: Iterable, loss: Callable | None, progress: Progress = None) -> None:
    """One pass over the data in eval mode; flags, modes and hooks are put back whatever happens.

    In a process group every process calls this with its share of the batches, and all get the start of all the batches.
    """
    pairs = [(s, m) for s, m in pairs if m.needs_data]
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    # What a forward writes by itself: an embedding's table under max_norm, buffers that count or average.
    written = [m.weight for m in model.modules() if getattr(m, "max_norm", None) is not None and isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    before = [(t, t.detach().clone()) for t in [*written, *(b for b in model.buffers() if b.numel() <= KEEP_BUFFERS)] if not t.is_meta]
    try:
        model.eval()
        for m, mode in modes:
            if is_opaque_linear(m):  # one may lay its codes out for inference, for good, when it runs in eval mode (bitsandbytes on a CPU)
                m.training = mode
        for p, _ in flags:
            p.requires_grad_(False)
        _pass_over_data(model, pairs, data, loss, progress)
    finally:
        for m, mode in modes:
            m.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
        with torch.no_grad():
            for t, old in before:
                if not torch.equal(t, old):
                    t.copy_(old)
    _pool_processes(pairs)
    missed = [s.path for s, m in pairs if m.seen is None]
    if missed:
        raise ValueError(f"no batch of data= reached {len(missed)} of {len(pairs)} sites, {missed[0]!r} among them: their start cannot be computed")
    with torch.no_grad(), reported(progress, "starts from data") as tell:
        for i, (site, method) in enumerate(pairs):
            method.calibrated(Base(site, _pairs_below(site), method.common))
            tell(i + 1, len(pairs), site.path)


def _pairs_below(site: Site) -> tuple:
    stack = site.host._modules.get(ADAPTERS_CHILD)
    return () if stack is None else stack.links.weights


def _pass_over_data(model: nn.Module, pairs, data: Iterable, loss: Callable | None, progress: Progress) -> None:
    asked = [(s, m) for s, m in pairs if m.needs_data == "gradients"]
    total = len(data) if isinstance(data, Sized) else None
    with contextlib.ExitStack() as undo, torch.set_grad_enabled(bool(asked)), reported(progress, "data") as tell:
        for s, m in pairs:
            if m.needs_data == "inputs":
                undo.callback(s.host.register_forward_pre_hook(_input_hook(s, m), with_kwargs=True).remove)
        probes = undo.enter_context(probed_sites(asked)) if asked else []
        for i, batch in enumerate(data):
            if not asked:
                call_with_batch(model, batch) if loss is None else loss(model, batch)
            else:
                value = loss_in_output(call_with_batch(model, batch)) if loss is None else loss(model, batch)
                if value.requires_grad:
                    torch.autograd.grad(value, [p.token for p in probes], allow_unused=True)
                del value
                for p in probes:
                    p.flush()
            tell(i + 1, total, "data")


def _input_hook(site: Site, method: Method) -> Callable:
    def hook(_, args, kwargs):
        part = "qkv".find(site.key[0]) if site.key in ("q_proj", "k_proj", "v_proj") else 0
        x = args[part] if len(args) > part else kwargs.get(("query", "key", "value")[part], kwargs.get("input", kwargs.get("x")))
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == site.n_in:
            with torch.no_grad():
                method.observe(Base(site, (), method.common), x.detach().reshape(-1, site.n_in))

    return hook


def _pool_processes(pairs: list[tuple[Site, Method]]) -> None:
    """What every process kept, put together; one site's at a time."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for site, method in pairs:
        states: list = [None] * dist.get_world_size()
        dist.all_gather_object(states, _to_device(method.seen, torch.device("cpu")))
        method.pool([_to_device(s, site.device) for s in states if s is not None])


def _to_device(state, device: torch.device):
    """A tensor, or a NamedTuple with tensors in it, on a device."""
    if isinstance(state, Tensor):
        return state.to(device)
    return type(state)(*(_to_device(v, device) for v in state)) if isinstance(state, tuple) else state
