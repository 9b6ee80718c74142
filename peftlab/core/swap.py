"""How a module becomes adaptable: its class is swapped for a cached subclass, whose call and parameters go through the adapters."""

from __future__ import annotations

import functools

import torch
from torch import nn

from peftlab.core.base import adapted_values, run_chain
from peftlab.core.guards import refuse_lost_gradients
from peftlab.core.method import Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.core.stack import SHARED_CHILD, AdapterStack, adapted_modules
from peftlab.model import layers
from peftlab.model.containers import hiding
from peftlab.model.packed import dense_meta, dense_parameter
from peftlab.model.walk import Adapted, original_class


def _adapted_forward(cls: type):
    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        stack = self._modules[ADAPTERS_CHILD]
        links = stack.current()
        refuse_lost_gradients(self, stack)
        if links.routed is not None:
            return links.routed.route.run(self, stack, links.routed, args, kwargs)
        return run_chain(self, stack.read, links, args, kwargs)

    return forward


def _shown_parameter(name: str) -> property:
    """A parameter as its readers see it: with the adapters' change."""

    def get(self):
        raw = self._parameters[name]
        stack = self._modules.get(ADAPTERS_CHILD)
        # FSDP2 fetches the parameter by attribute when it shards it: a sharded tensor is storage, not a weight.
        if stack is None or raw is None or type(raw).__name__ == "DTensor":
            return raw
        host, param = stack.alias.get(name, (self, name))
        stack = host._modules[ADAPTERS_CHILD]
        weights, _, routed, _ = stack.current()
        if routed is not None:
            raise RuntimeError(
                f"{name!r} of a {original_class(self).__name__} has another value for every row of the batch, and was read where the rows are not "
                "told apart. Inside route(...), call the module that holds it; run backward inside the block where it recomputes activations."
            )
        if not weights:
            return dense_parameter(self, name)
        refuse_lost_gradients(host, stack)
        try:
            if getattr(host, "max_norm", None) is None:
                return adapted_values(host, param, weights).to(dense_meta(host, param).dtype)
            # torch shortens rows in place where there is a max_norm: work on and hand out what nobody owns.
            return adapted_values(host, param, weights, host._parameters[param].clone()).to(raw.dtype).clone()
        except AttributeError as e:  # nn.Module.__getattr__ would swallow it and hand out the frozen tensor
            raise RuntimeError(f"an adapter failed while {name!r} was read: {e}") from e

    return property(get)


# torch's encoder has a kernel for eval mode that calls none of its modules. It is taken where these attributes allow it.
FUSED_KERNELS = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0), (nn.TransformerEncoder, "use_nested_tensor", False))


def _kernel_switch(name: str, off: object) -> property:
    """An attribute that keeps torch from the kernel while a method surrounds a call inside."""

    def get(self):
        fused = self._modules[ADAPTERS_CHILD].fused
        return off if any(links.calls or links.routed for links in (s.current() for s in fused)) else self.__dict__[name]

    def put(self, value):
        self.__dict__[name] = value

    return property(get, put)


def leave_fused_kernels(site: Site, above: list[nn.Module]) -> None:
    """Have torch's encoder modules that hold this host run their parts one by one while its methods act."""
    stack = site.host._modules[ADAPTERS_CHILD]
    for m in above:
        holder = m._modules.get(ADAPTERS_CHILD) or swap_class(m, False, ())
        holder.fused = tuple(dict.fromkeys((*holder.fused, stack)))


def _flat_weights() -> property:
    def get(self):
        return [getattr(self, n) if n in self._parameters else None for n in self._flat_weights_names]

    def put(self, value):  # torch hands in what it read, which is not ours to keep: copies of the module need leaves
        self.__dict__["_flat_weights"] = [self._parameters.get(n) for n in self._flat_weights_names]

    return property(get, put)


@functools.cache
def adapted_class(cls: type, seen: tuple[str, ...]) -> type:
    body = {
        "_original": cls,
        "forward": _adapted_forward(cls),
        "__reduce_ex__": lambda self, protocol: (_rebuild, (cls, seen), _plain_state(self)),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        **hiding(cls, (ADAPTERS_CHILD, SHARED_CHILD)),
        **{n: _shown_parameter(n) for n in seen},
        **{n: _kernel_switch(n, off) for kind, n, off in FUSED_KERNELS if issubclass(cls, kind)},
    }
    if issubclass(cls, nn.RNNBase) and seen:
        body["_flat_weights"] = _flat_weights()
        body["_update_flat_weights"] = lambda self: None  # they are read anew each time
    return type(cls.__name__, (Adapted, cls), body)


def _plain_state(m: nn.Module) -> dict:
    getter = getattr(super(type(m), m), "__getstate__", None)
    state = getter() if getter is not None else m.__dict__
    return dict(state if isinstance(state, dict) else m.__dict__)


def _rebuild(cls: type, seen: tuple[str, ...]) -> nn.Module:
    made = adapted_class(cls, seen)
    return made.__new__(made)


def shown_parameters(m: nn.Module) -> tuple[str, ...]:
    """The parameters that are seen through properties."""
    return tuple(k for k, v in type(m).__dict__.items() if isinstance(v, property) and k in m._parameters) if isinstance(m, Adapted) else ()


def swap_class(host: nn.Module, read: bool, seen: tuple[str, ...]) -> AdapterStack:
    """Make `host` adaptable; afterwards `host.peftlab` is its stack."""
    cls = original_class(host)
    stack = host._modules.get(ADAPTERS_CHILD)
    if stack is None:
        stack = AdapterStack(read)
        stack.training = host.training
        host._modules[ADAPTERS_CHILD] = stack
    stack.read = stack.read or read
    host.__class__ = adapted_class(cls, tuple(sorted({*shown_parameters(host), *(seen if stack.read else ())})))
    return stack


def attach_to_module(name: str, pairs: list[tuple[Site, Method]]) -> AdapterStack:
    """Put the methods of one adapter into the module that they share."""
    host = pairs[0][0].host
    stack = swap_class(host, any(s.read_only for s, _ in pairs), changed_parameters(pairs))
    if stack.read:  # an adapter of an earlier call may have been seen through the call until now
        swap_class(host, True, changed_parameters([p for ps in stack.sites.values() for p in ps]))
    stack.add(name, pairs)
    return stack


def show_at_tied_ends(site: Site) -> None:
    """The other ends of a tied tensor show what the adapted end shows."""
    for host, param in site.tied:
        stack = swap_class(host, True, (param,))
        stack.alias.setdefault(param, (site.host, site.param))


def runs_functionally(host: nn.Module) -> bool:
    """Whether the module's call can be run functionally with any of its tensors changed."""
    rule, stack = layers.layer_rule(host), host._modules.get(ADAPTERS_CHILD)
    known = rule is not None and rule.call and rule is not layers.OPAQUE and set(host._parameters) <= {"weight", "bias"}
    return known and layers.runs_registered_forward(host, original_class(host)) and not (stack is not None and stack.read)


def changed_parameters(pairs: list[tuple[Site, Method]]) -> tuple[str, ...]:
    """The parameters that these methods change."""
    out = [s.param for s, m in pairs if s.param is not None and m.has_weight() and not m.in_place]
    return (*out, *(s.bias for s, m in pairs if m.has_bias() and s.has_bias))


def changes_bias(site: Site, method: Method) -> bool:
    """Whether this very method does anything to the bias (an option may leave it alone)."""
    if not (method.has_bias() and site.has_bias):
        return False
    b = torch.zeros(site.n_out, device="meta")
    with torch.no_grad():
        try:
            return method.bias(b) is not b
        except RuntimeError:  # a real tensor met the meta one: it was computed with
            return True


def restore_class(host: nn.Module) -> None:
    cls = original_class(host)
    host.__class__ = cls
    del host._modules[ADAPTERS_CHILD]
    if isinstance(host, nn.RNNBase):
        host.__dict__["_flat_weights"] = [host._parameters.get(n) for n in host._flat_weights_names]


def forget_unused_ties(root: nn.Module) -> None:
    """Forget aliases and fused kernels whose adapted end has no adapters left."""
    for _, _, s in adapted_modules(root):
        s.alias = {k: (h, p) for k, (h, p) in s.alias.items() if isinstance(h, Adapted) and h._modules[ADAPTERS_CHILD].sites}
        s.fused = tuple(t for t in s.fused if any(m.surrounds() for pairs in t.sites.values() for _, m in pairs))
