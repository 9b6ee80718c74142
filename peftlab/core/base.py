"""What a method sees below it (`Base`), and how the methods that act are run on a weight or around a call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from peftlab.core.chain import ActiveChain, StandIn
from peftlab.core.site import ADAPTERS_CHILD, Site, with_rows
from peftlab.model import layers
from peftlab.model.packed import dense_parameter, is_quantized
from peftlab.model.walk import original_class


class Base:
    """What lies below a method at its site: the frozen module with every earlier method applied.

    Shapes: n_out output features, n_in input features (kernel positions included), x whatever the layer is called with.
    """

    __slots__ = ("below", "common", "site")

    def __init__(self, site: Site, below: tuple = (), common: nn.Module | None = None):
        self.site, self.below, self.common = site, below, common

    # ---- facts
    @property
    def n_out(self) -> int:
        return self.site.n_out

    @property
    def n_in(self) -> int:
        return self.site.n_in

    @property
    def shape(self) -> tuple[int, ...]:
        """Raw shape of the parameter (of its part, for a slice)."""
        return self.site.shape

    @property
    def ndim(self) -> int:
        return len(self.site.shape)

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def has_bias(self) -> bool:
        return self.site.has_bias

    @property
    def pointwise(self) -> bool:
        return self.site.rule.pointwise

    @property
    def neighbours(self) -> dict[str, list[nn.Module]]:
        """The adapters that sit at the host already, by name."""
        stack = self.site.host._modules.get(ADAPTERS_CHILD)
        return {} if stack is None else {name: [m for _, m in pairs] for name, pairs in stack.sites.items()}

    @property
    def acting(self) -> frozenset[str]:
        """Those of them that are active or merged."""
        stack = self.site.host._modules.get(ADAPTERS_CHILD)
        return frozenset() if stack is None else frozenset((*stack.active, *stack.merged))

    @property
    def is_norm(self) -> bool:
        """Whether the host is a normalisation layer."""
        return layers.is_norm(self.site.host)

    @property
    def adds(self) -> bool:
        """Whether the host is called with a residual, adds it and normalises."""
        return layers.adds_residual(self.site.host)

    @property
    def dtype(self) -> torch.dtype:
        return self.site.dtype

    @property
    def device(self) -> torch.device:
        return self.site.device

    @property
    def meta(self) -> bool:
        """True while only shapes are wanted (plan, estimate, load): values must not be looked at."""
        return self.device.type == "meta"

    # ---- tensors
    @property
    def weight(self) -> Tensor:
        """The effective weight of what lies below, (n_out, n_in)."""
        site = self.site
        stand_in = site.stand_in_weight()
        return site.get(site.part(adapted_values(site.host, site.param, self.below))) if stand_in is None else stand_in

    @property
    def frozen(self) -> Tensor:
        """The frozen weight itself (n_out, n_in), without what lies below: what tensors that are derived and not saved may be made of."""
        return self.site.frozen_weight()

    @property
    def bias(self) -> Tensor | None:
        site = self.site
        if not site.has_bias:
            return None
        stand_in = site.stand_in_bias()
        if stand_in is not None:
            return stand_in
        b, rows = adapted_values(site.host, site.bias, self.below), site.bias_part
        return b if rows is None else b[rows]

    # ---- operations
    def __call__(self, *args, **kwargs):
        return call_through(self.site.host, self.below, args, kwargs)

    def affine(self, W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
        """The layer's own operation with weight W (n_out, n_in) and bias b (n_out,)."""
        return self.site.rule.affine(self.site.host, W, b, x)

    def apply(self, M: Tensor, x: Tensor) -> Tensor:
        """The layer's own operation with M (rows, n_in) in place of its weight, without bias."""
        return self.site.rule.apply(self.site.host, M, x)

    def mix(self, B: Tensor, h: Tensor) -> Tensor:
        """B (n_out, rows) over the features of h."""
        return self.site.rule.mix(self.site.host, B, h)

    def plus(self, x: Tensor, B: Tensor, h: Tensor) -> Tensor:
        """self(x) + mix(B, h), in place where the output of the call below is known to be fresh."""
        site = self.site
        # Forward hooks of the frozen call do not exist (it is the class's forward), so the functional form is the same call.
        if not self.below and not layers.is_autocasting(x.device):
            W = site.host._parameters.get(site.param)
            if W is not None and site.rows is None and (W.dtype == x.dtype or is_quantized(site.host, site.param)):
                y = site.rule.plus(site.host, W, self.bias, x, B, h)
                if y is not None:
                    return y
        y = self(x)
        return y + self.mix(B, h).to(y.dtype)

    def scale(self, v: Tensor, y: Tensor) -> Tensor:
        """v (features,) times the feature axis of y."""
        return y * self.site.rule.along(self.site.host, v, y)

    def shift(self, b: Tensor, y: Tensor) -> Tensor:
        """b (features,) added on the feature axis of y."""
        return y + self.site.rule.along(self.site.host, b, y)


def adapted_values(host: nn.Module, param: str, links: tuple, raw: Tensor | None = None) -> Tensor:
    """One parameter as the given links leave it, in its raw layout (dtype promoted, not yet cast back)."""
    W = dense_parameter(host, param) if raw is None else raw
    pieces = None  # the experts of a 3-D parameter, while consecutive links work on single ones
    for site, method in links:
        if site.param == param and method.has_weight():
            if site.expert is not None:
                pieces = list(W.unbind(0)) if pieces is None else pieces
                piece = pieces[site.expert]
                pieces[site.expert] = site.put(piece, method.weight(site.get(piece)))
                continue
            if pieces is not None:
                W, pieces = _stack_experts(pieces), None
            W = site.put(W, method.weight(site.get(W)))
        elif site.bias == param and site.expert is None and method.has_bias():
            rows = site.bias_part
            W = method.bias(W) if rows is None else with_rows(W, rows, method.bias(W[rows]))
    return W if pieces is None else _stack_experts(pieces)


def _stack_experts(pieces: list[Tensor]) -> Tensor:
    dtype = functools.reduce(torch.promote_types, {p.dtype for p in pieces})
    return torch.stack([p.to(dtype) for p in pieces])


def call_through(host: nn.Module, links: tuple, args: tuple, kwargs: dict):
    """Run the host with these links; the last one is outermost."""
    if not links:
        y = type(host)._original.forward(host, *args, **kwargs)
        if args and torch.is_grad_enabled() and not torch.compiler.is_compiling() and layers.is_opaque_linear(host) and cuts_gradient(args[0], y):
            raise RuntimeError(
                f"a {original_class(host).__name__} has no backward: through its frozen call no gradient reaches what lies below. Adapt layers above it "
                "alone, run what is below under torch.no_grad(), or use a layer whose call is differentiable."
            )
        return y
    site, method = links[-1]
    if method.on == "module":
        return method(Base(site, links[:-1], method.common), *args, **kwargs)
    x, rest, kwargs = split_first_input(args, kwargs)
    if method.surrounds():
        return method(Base(site, links[:-1], method.common), x, *rest, **kwargs)
    if rest or kwargs or any(s.dense for s, _ in links):
        return _call_definition(host, links, x, rest, kwargs)
    if site.rows is not None:
        return _call_by_parts(host, links, x)
    return method(Base(site, links[:-1], method.common), x)


def cuts_gradient(x, y) -> bool:
    """Whether an output has no way back to the input, which asks for a gradient."""
    if not (isinstance(x, Tensor) and x.requires_grad and isinstance(y, Tensor) and y.is_floating_point()):
        return False
    goal, todo, seen = x.grad_fn, [y.grad_fn], set()  # a bias that trains makes the output ask for a gradient, too
    while todo:
        node = todo.pop()
        if node is None or node in seen or node.name().endswith("WarnNotImplemented"):  # torch's own node for operators without a backward
            continue
        if node is goal or (goal is None and getattr(node, "variable", None) is x):
            return False
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
    return True


class _FusedPart(StandIn):
    """Some output features of what lies below; for the input `x` its whole output `y` is known."""

    def __init__(self, host: nn.Module, part: slice | Tensor, x: Tensor, y: Tensor):
        self.host, self.part, self.x, self.y = host, part, x, y

    def __call__(self, base: Base, x: Tensor) -> Tensor:
        y = self.y if x is self.x else base(x)
        return y[..., self.part] if isinstance(self.part, slice) else y.index_select(-1, self.part.to(y.device))


def _adapter_name(method: nn.Module) -> str | None:
    """The adapter that a method belongs to; None for the probes of a calibration."""
    recipe = method.__dict__.get("recipe")
    return None if recipe is None else recipe.name


def _call_by_parts(host: nn.Module, links: tuple, x: Tensor) -> Tensor:
    """The parts of a fused projection that the uppermost adapter changes, each by its own fast path on its own output features."""
    first, name = len(links), _adapter_name(links[-1][1])
    while first and links[first - 1][0].rows is not None and _adapter_name(links[first - 1][1]) == name:
        first -= 1
    below, acting = links[:first], links[first:]
    y = call_through(host, below, (x,), {})
    done = []
    for site, method in acting:
        under = _FusedPart(host, site.rows, x, y)
        done.append((site.rows, method(Base(site, (*below, (under, under)), method.common), x)))
    if any(isinstance(rows, Tensor) for rows, _ in done):
        every = [torch.arange(y.shape[-1])[rows] if isinstance(rows, slice) else rows for rows, _ in done]
        return y.index_copy(-1, torch.cat(every).to(y.device), torch.cat([part for _, part in done], -1))
    pieces, at = [], 0
    for rows, part in sorted(done, key=lambda d: d[0].start):
        pieces += [y[..., at : rows.start], part]
        at = rows.stop
    return torch.cat([*pieces, y[..., at:]], -1)


def split_first_input(args: tuple, kwargs: dict) -> tuple:
    """The layer's input, however it was passed, and what else was."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    for name in ("input", "x"):
        if name in kwargs:
            return kwargs.pop(name), (), kwargs
    raise TypeError("an adapted layer was called without input")


def _call_definition(host: nn.Module, links: tuple, x: Tensor, rest: tuple, kwargs: dict) -> Tensor:
    """The layer's operation on the effective tensors: what every fast path equals."""
    rule = layers.layer_rule(host)
    W = rule.matrix(host, adapted_values(host, rule.weight, links))
    b = host._parameters.get(rule.bias) if rule.bias else None
    b = b if b is None else adapted_values(host, rule.bias, links)
    return rule.affine(host, W, b, x, *rest, **kwargs)


def run_chain(host: nn.Module, read: bool, links: ActiveChain, args: tuple, kwargs: dict):
    """The host's call with these links acting; read: its weights are seen by whoever reads them, and the call takes no part in it."""
    if read or not links.weights:
        return call_through(host, links.calls, args, kwargs)
    y = call_through(host, links.weights + links.calls, args, kwargs)
    rule = links.weights[-1][0].rule
    return rule.finish(host, y, split_first_input(args, kwargs)[0]) if rule.name == "embedding" and not links.calls else y
