"""Start values from data: run batches through the untouched model and show each site its inputs or its gradients.

A method whose `needs_data` is "inputs" or "gradients" gets `observe(base, value)` for every batch that reaches it: the inputs (rows,
n_in), or the gradient of its weight. It keeps what it needs in `seen`, None before the first; `pool(states)` makes `seen` of what
several processes kept, and `calibrated(base)` the start values of `seen`. One dense gradient exists at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftlab.host import CHILD, Site, as_kind, follow, install, swap_out
from peftlab.method import Base, Method
from peftlab.model.layers import is_opaque_linear
from peftlab.support.progress import Progress, told

KEEP_BUFFERS = 1 << 20  # entries; larger persistent buffers are watched but not copied

PROBE = "peftlab_probe"  # the adapter that is there while gradients are collected


def run(model: nn.Module, batch):
    """The model's call with one batch: a mapping is keywords, a tuple or list positions, anything else the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def loss_of(output) -> Tensor:
    """The loss that a model returned: `.loss`, ["loss"], or a scalar."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    found = output if found is None else found
    if isinstance(found, (tuple, list)):
        found = found[0]
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise ValueError("the model returned no loss; give loss=, a function of (model, batch)")
    return found


def observable(site: Site) -> bool:
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
        _pass(model, pairs, data, loss, progress)
    finally:
        for m, mode in modes:
            m.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
        with torch.no_grad():
            for t, old in before:
                if not torch.equal(t, old):
                    t.copy_(old)
    _pool(pairs)
    missed = [s.path for s, m in pairs if m.seen is None]
    if missed:
        raise ValueError(f"no batch of data= reached {len(missed)} of {len(pairs)} sites, {missed[0]!r} among them: their start cannot be computed")
    with torch.no_grad(), told(progress, "starts from data") as tell:
        for i, (site, method) in enumerate(pairs):
            method.calibrated(Base(site, _below(site), method.common))
            tell(i + 1, len(pairs), site.path)


def _below(site: Site) -> tuple:
    stack = site.host._modules.get(CHILD)
    return () if stack is None else stack.links.weights


def _pass(model: nn.Module, pairs, data: Iterable, loss: Callable | None, progress: Progress) -> None:
    asked = [(s, m) for s, m in pairs if m.needs_data == "gradients"]
    total = len(data) if isinstance(data, Sized) else None
    with contextlib.ExitStack() as undo, torch.set_grad_enabled(bool(asked)), told(progress, "data") as tell:
        for s, m in pairs:
            if m.needs_data == "inputs":
                undo.callback(s.host.register_forward_pre_hook(_shows_inputs(s, m), with_kwargs=True).remove)
        probes = undo.enter_context(_probed(asked)) if asked else []
        for i, batch in enumerate(data):
            if not asked:
                run(model, batch) if loss is None else loss(model, batch)
            else:
                value = loss_of(run(model, batch)) if loss is None else loss(model, batch)
                if value.requires_grad:
                    torch.autograd.grad(value, [p.token for p in probes], allow_unused=True)
                del value
                for p in probes:
                    p.flush()
            tell(i + 1, total, "data")


def _shows_inputs(site: Site, method: Method) -> Callable:
    def hook(_, args, kwargs):
        part = "qkv".find(site.key[0]) if site.key in ("q_proj", "k_proj", "v_proj") else 0
        x = args[part] if len(args) > part else kwargs.get(("query", "key", "value")[part], kwargs.get("input", kwargs.get("x")))
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == site.n_in:
            with torch.no_grad():
                method.observe(Base(site, (), method.common), x.detach().reshape(-1, site.n_in))

    return hook


def _pool(pairs: list[tuple[Site, Method]]) -> None:
    """What every process kept, put together; one site's at a time."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for site, method in pairs:
        states: list = [None] * dist.get_world_size()
        dist.all_gather_object(states, _moved(method.seen, torch.device("cpu")))
        method.pool([_moved(s, site.device) for s in states if s is not None])


def _moved(state, device: torch.device):
    """A tensor, or a NamedTuple with tensors in it, on a device."""
    if isinstance(state, Tensor):
        return state.to(device)
    return type(state)(*(_moved(v, device) for v in state)) if isinstance(state, tuple) else state


class _Tap(torch.autograd.Function):
    """The weight itself; its gradient goes to the probe, and no further."""

    @staticmethod
    def forward(ctx, W: Tensor, token: Tensor, probe: _Probe) -> Tensor:
        ctx.probe = probe
        return W.view_as(W)

    @staticmethod
    def backward(ctx, G: Tensor):
        ctx.probe.take(G)
        return None, torch.zeros_like(ctx.probe.token), None


class _Probe(Method):
    """Leaves the weight as it is and shows its gradient to the method that will sit there, summed over the uses in one forward."""

    def __init__(self, site: Site, asks: Method):
        super().__init__(Base(site))
        self.token = nn.Parameter(torch.zeros((), device=site.device))
        self.__dict__.update(asks=asks, at=site, uses=0, total=None)

    def weight(self, W: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return W
        self.__dict__["uses"] += 1
        return _Tap.apply(W, self.token, self)

    def take(self, G: Tensor) -> None:
        self.__dict__.update(total=G.detach() if self.total is None else self.total + G.detach(), uses=self.uses - 1)
        if self.uses == 0:
            self.flush()

    def flush(self) -> None:
        """What came together belongs to one batch."""
        G = self.total
        self.__dict__.update(total=None, uses=0)
        if G is not None:
            with torch.no_grad():
                self.asks.observe(Base(self.at, (), self.asks.common), G)


@contextlib.contextmanager
def _probed(pairs: list[tuple[Site, Method]]) -> Iterator[list[_Probe]]:
    """Probes at these sites, above what is there; afterwards the modules are what they were."""
    by_host: dict[int, list[tuple[Site, _Probe]]] = {}
    for site, method in pairs:
        by_host.setdefault(id(site.host), []).append((as_kind(site, Site), _Probe(site, method)))
    touched = {id(h): h for ps in by_host.values() for s, _ in ps for h in (s.host, *(o for o, _ in s.tied if s.shared))}
    before = [(h, h.__class__, h._modules.get(CHILD)) for h in touched.values()]
    states = [(stack.read, dict(stack.alias)) if stack is not None else None for _, _, stack in before]
    try:
        for ps in by_host.values():
            install(PROBE, ps)
            for site, _ in ps:
                if site.shared:
                    follow(site)
        yield [p for ps in by_host.values() for _, p in ps]
    finally:
        for (host, cls, stack), state in zip(before, states, strict=True):
            if host._modules.get(CHILD) is not None and PROBE in host._modules[CHILD].sites:
                host._modules[CHILD].drop(PROBE)
            if state is None:
                if host._modules.get(CHILD) is not None:
                    swap_out(host)
            else:
                stack.read, stack.alias = state
                host.__class__ = cls
