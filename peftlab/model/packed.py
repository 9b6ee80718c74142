"""Parameters whose values are packed: our own codes, and the wrappers of other libraries around theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class QuantizedModule:
    """Marks the classes that `quantize` makes: some parameters hold codes, and `packed` tells what these stand for."""

    _packed_rule: Any = None  # the LayerRule of a layer whose call works on the codes; the others are read
    _packed_flip = False  # the codes are those of the transposed parameter
    peftlab_formats: dict  # parameter -> facts: shape and dtype of the dense tensor, ...

    def peftlab_dense(self, param: str, kept: dict[str, Tensor]) -> Tensor:
        """The values of a parameter in its raw layout; `kept` has tensors by name that take the place of the module's own."""
        raise NotImplementedError

    def peftlab_stored(self, param: str, value: Tensor, onto: Any) -> dict[str, Tensor]:
        """The tensors that hold a merged value, by name: the value itself, or codes and scales, as `onto` says."""
        raise NotImplementedError


def is_quantized(m: nn.Module, param: str | None) -> bool:
    """Whether this parameter is packed (it is not while adapters are merged onto its dense form)."""
    return isinstance(m, QuantizedModule) and param in m.peftlab_formats and not m._parameters[param].is_floating_point()


def dense_parameter(m: nn.Module, param: str) -> Tensor:
    """A parameter in its raw layout: itself, or what its codes stand for."""
    return m.peftlab_dense(param, {}) if is_quantized(m, param) else m._parameters[param]


def dense_meta(m: nn.Module, param: str) -> Tensor | None:
    """A tensor of the shape and dtype of `values`, without them where the parameter is packed."""
    if not is_quantized(m, param):
        return m._parameters.get(param)
    form = m.peftlab_formats[param]
    W = torch.empty(form.shape, dtype=form.out, device="meta")
    return W.t() if m._packed_flip else W


def is_foreign_tensor(t: Tensor | None) -> bool:
    """Whether a tensor is another library's wrapper around packed ones (torchao, quanto, torch's semi-structured sparsity).

    It has the shape and dtype of a dense tensor, and a linear takes it, but most operations on it raise.
    """
    if t is None or type(t) in (Tensor, nn.Parameter):
        return False
    if type(t).__name__ == "DTensor":
        return is_foreign_tensor(t._local_tensor)
    return is_traceable_wrapper_subclass(t)


def inner_tensors(t: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's values: itself, or what a foreign one wraps."""
    return [u for name in t.__tensor_flatten__()[0] for u in inner_tensors(getattr(t, name))] if is_foreign_tensor(t) else [t]


def plain_values(t: Tensor) -> Tensor | None:
    """A plain tensor of the same values; None where a foreign one does not give them."""
    if not is_foreign_tensor(t):
        return t
    try:
        return t.dequantize()
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
