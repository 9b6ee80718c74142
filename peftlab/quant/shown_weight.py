"""What a layer that works on codes shows as its weight."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from peftlab.model.packed import dense_meta, dense_parameter, is_quantized


class NamedRaw:
    """Has every name: stands for what lies below a packed parameter in the keys of a state dict, for those who look keys up in the module."""

    def __getattr__(self, name: str) -> NamedRaw:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class Shown(Tensor):
    """What a layer that works on codes shows as its weight: shape, dtype and device of the dense one. An operation on it decodes; none may write to it.

    Models ask a layer's weight for its dtype, and cast activations to it: that must neither be the codes' dtype nor cost a decoding.
    """

    at: tuple[nn.Module, str]
    views: tuple[Callable[[Tensor], Tensor], ...]  # what was taken of it: values are decoded when something is computed

    @staticmethod
    def __new__(cls, m: nn.Module, param: str, views: tuple[Callable[[Tensor], Tensor], ...] = ()) -> Shown:
        dense = _through(views, dense_meta(m, param))
        self = Tensor._make_wrapper_subclass(cls, dense.shape, dense.stride(), dense.storage_offset(), dtype=dense.dtype, device=m._parameters[param].device)
        self.at, self.views = (m, param), views
        return self

    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f == Tensor.data.__set__ or (f in (Tensor.requires_grad.__set__, Tensor.requires_grad_) and any((*args[1:], *kwargs.values(), len(args) == 1))):
            raise _unwritable(getattr(f, "__self__", f).__name__)  # no operators: torch would let them pass, and nothing would change
        if f in (Tensor.__repr__, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__deepcopy__, Tensor.__reduce_ex__):
            return f(_dense(args[0]), *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return f(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (found := f.decompose(*args, **kwargs)) is not NotImplemented:  # in inference mode even `to` comes here whole, which may be a view or a copy
            return found
        if f._schema.is_mutable and any(isinstance(t, cls) for t in tree_leaves((args[0], kwargs))):
            raise _unwritable(f)
        if _is_view(f) and isinstance(args[0], cls):
            return args[0]._viewed(lambda W: f(W, *args[1:], **kwargs))
        args, kwargs = tree_map(lambda t: _dense(t) if isinstance(t, cls) else t, (args, kwargs))
        return f(*args, **kwargs)

    def _viewed(self, view: Callable[[Tensor], Tensor | list[Tensor]]) -> Shown | list[Shown]:
        found = view(_through(self.views, dense_meta(*self.at)))
        if isinstance(found, Tensor):
            return Shown(*self.at, (*self.views, view))
        return [Shown(*self.at, (*self.views, view, operator.itemgetter(i))) for i in range(len(found))]


def _through(views: Iterable[Callable[[Tensor], Tensor]], W: Tensor) -> Tensor:
    return functools.reduce(lambda t, view: view(t), views, W)


def _dense(t: Shown) -> Tensor:
    return _through(t.views, dense_parameter(*t.at))


def _is_view(f) -> bool:
    """Whether what an operator gives shares memory with its first argument, unchanged."""
    alias = f._schema.arguments[0].alias_info if f._schema.arguments else None
    return alias is not None and not alias.is_write


def _unwritable(what: object) -> RuntimeError:
    return RuntimeError(f"{what}: the weight of a quantised layer cannot be written to; peftlab.dequantize makes it dense")


def is_storage(m: nn.Module, param: str) -> bool:
    """Whether the parameter is handed out as it is: dense, absent, or sharded by FSDP2, which fetches it by attribute."""
    raw = m._parameters[param]
    return raw is None or type(raw).__name__ == "DTensor" or not is_quantized(m, param)


def _show(m: nn.Module) -> Tensor:
    if is_storage(m, "weight"):
        return m._parameters["weight"]
    return dense_parameter(m, "weight") if torch.compiler.is_compiling() else Shown(m, "weight")


SHOWN = property(_show)
