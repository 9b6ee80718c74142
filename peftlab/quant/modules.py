"""Modules with packed weights: the class of a module is changed in place, as attaching does, and the codes take the weight's place.

A layer whose call is known works on the codes; any other module sees the decoded values when it reads its parameter. The scales are
buffers that only ever change device: `.half()`, `.to(dtype)` and the like leave the decoded values what they were.
"""

from __future__ import annotations

import contextvars
import copyreg
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.core.swap import adapted_class, shown_parameters
from peftlab.model import layers
from peftlab.model.packed import QuantizedModule, dense_parameter, is_quantized
from peftlab.model.walk import Adapted, original_class
from peftlab.quant import format as keys
from peftlab.quant import products as ops
from peftlab.quant.codes import entries, quantise
from peftlab.quant.packed import Packed
from peftlab.quant.shown_weight import SHOWN, NamedRaw, is_storage

SCALES = ("absmax", "nested_absmax", "nested_offset")  # suffixes of the buffers, in the order of Packed


def activation(x: Tensor) -> torch.dtype:
    """The dtype of what a linear layer makes of x: autocast's, or that of x."""
    return torch.get_autocast_dtype(x.device.type) if layers.is_autocasting(x.device) else x.dtype


def product(m: nn.Module, x: Tensor, b: Tensor | None) -> Tensor:
    """The frozen product of a packed linear-like layer."""
    if not x.is_floating_point():
        raise TypeError(f"{type(m).__name__} with {m.peftlab_formats['weight'].kind} codes got an input of {x.dtype}: a floating dtype")
    p, kind = packed(m, "weight"), activation(x)
    dtype = p.format.compute or kind
    return ops.product(x.to(dtype), None if b is None else b.to(dtype), p).to(kind)


class PackedLinear(layers.Linear):
    """A linear layer on codes; while adapters are merged its weight is dense, and then this is the plain rule."""

    def affine(self, m, W, b, x):
        dtype = m.peftlab_formats["weight"].compute
        return super().affine(m, W, b, x) if dtype is None else super().affine(m, W, b, x.to(dtype)).to(activation(x))

    def plus(self, m, W, b, x, B, h):
        if not is_quantized(m, "weight"):
            return super().plus(m, W, b, x, B, h)
        return self._added(product(m, x.reshape(-1, x.shape[-1]), b), x, B, h)


class PackedConv1D(PackedLinear):
    """The transposed linear of GPT-2 in transformers; its codes are those of the canonical matrix (n_out, n_in)."""

    name = "conv1d_hf"
    matrix, raw = layers.Conv1D.matrix, layers.Conv1D.raw


class PackedEmbedding(layers.Embedding):
    def row(self, m, i):
        return lookup(m, torch.tensor(i, device=m._parameters["weight"].device)) if is_quantized(m, "weight") else super().row(m, i)


def lookup(m: nn.Module, index: Tensor) -> Tensor:
    """Decoded rows of a packed table, (*index.shape, dim); no other row is decoded."""
    p = packed(m, "weight")
    rows, dim = p.format.shape
    F.embedding(index, p.absmax[:1, None].expand(rows, 1))  # raises on what is no row, where torch does
    at = index.long()[..., None] * dim + torch.arange(dim, device=index.device)
    return entries(p, at).to(p.format.dtype).to(p.format.out)


LINEAR, CONV1D, EMBEDDING = PackedLinear(), PackedConv1D(), PackedEmbedding()

PACKED = {layers.LINEAR: LINEAR, layers.CONV1D: CONV1D, layers.RULES[nn.Embedding]: EMBEDDING}


def _linear(self, x: Tensor) -> Tensor:
    if self._shows and is_quantized(self, "weight"):
        return product(self, x, self.bias)
    return self._packed_rule.affine(self, self._packed_rule.matrix(self, self.weight), self.bias, x)  # merged, or read through an adapter


def _embedding(self, index: Tensor) -> Tensor:
    if self._shows and is_quantized(self, "weight"):
        return lookup(self, index)
    return F.embedding(index, self.weight, self.padding_idx)


class Packing(QuantizedModule):
    """What a packed module does differently from the class it was."""

    _dense_class: type
    _shows: bool  # the layer works on codes, and no adapter is read through its weight
    peftlab_below = NamedRaw()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._shows = getattr(cls, "weight", None) is SHOWN

    def _fqn_modifiers(self) -> dict[str, str]:
        """Where torch.distributed.checkpoint's state-dict helpers find a key of this module instead of at the parameter."""
        return dict.fromkeys((*self.peftlab_formats, *keys.keys_of("weight")), "peftlab_below")

    def peftlab_dense(self, param: str, kept: dict[str, Tensor]) -> Tensor:
        p = packed(self, param, kept)
        W = ops.dense(p).to(p.format.out)
        return W.t() if self._packed_flip else W

    def peftlab_stored(self, param: str, value: Tensor, onto) -> dict[str, Tensor]:
        if onto is None or onto.how != "requantized" or param not in self.peftlab_formats:
            return {param: value}
        form = self.peftlab_formats[param]
        p = quantise(value.t() if self._packed_flip else value, form.kind, None if form.kind == "int8" else form.blocksize, form.double, form.dtype)
        return {param: p.codes} | {f"{param}_{s}": t for s, t in zip(SCALES, p[2:], strict=True) if t is not None}

    def extra_repr(self) -> str:
        kinds = sorted({f.kind for param, f in self.peftlab_formats.items() if is_quantized(self, param)})
        return ", ".join(filter(None, [super().extra_repr(), *kinds]))

    def _apply(self, fn, recurse=True):
        """Scales go where the module goes, and keep their precision: as whole numbers, conversions of floats pass them by."""
        with torch.no_grad():
            for param, form in self.peftlab_formats.items():
                probe = fn(torch.empty(0, dtype=form.out, device=self._parameters[param].device))
                if isinstance(probe, Tensor) and probe.is_floating_point():
                    self.peftlab_formats = {**self.peftlab_formats, param: form._replace(cast=None if probe.dtype == form.dtype else probe.dtype)}
        found = [k for k in scale_names(self) if self._buffers[k].dtype == torch.float32]
        for k in found:
            self._buffers[k] = self._buffers[k].view(torch.int32)
        try:
            return super()._apply(fn, recurse)
        finally:
            for k in found:
                self._buffers[k] = self._buffers[k].view(torch.float32)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for param in self.peftlab_formats:
            if is_quantized(self, param):
                for k, t in keys.write(param, packed(self, param)).items():
                    destination[prefix + k] = t if keep_vars else t.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        refused: set[str] = set()
        for param in self.peftlab_formats:
            state = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
            mine = {k: t for k, t in state.items() if k == param or keys.owns(param, k)}
            for k in mine.keys() - {param}:
                del state_dict[prefix + k]
            try:
                self._load_codes(param, mine, state_dict, prefix, bool(local_metadata.get("assign_to_params_buffers")))
            except keys.FormatError as e:
                error_msgs.append(f"{prefix}{e}")
                state_dict.pop(prefix + param, None)
                refused.add(prefix + param)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys[:] = [k for k in missing_keys if k not in refused]  # they were there

    def _load_codes(self, param: str, mine: dict[str, Tensor], state_dict: dict, prefix: str, assign: bool) -> None:
        form = self.peftlab_formats[param]
        dense = not is_quantized(self, param)
        if not mine or (dense and mine.keys() == {param}):
            return
        if dense:
            raise keys.FormatError(f"{param} has adapters merged onto its dense form: unmerge before codes are loaded")
        if keys.kind_in(param, mine) is None and param in mine and mine[param].is_floating_point():
            raise keys.FormatError(f"{param} is quantised ({form.kind}) and the state holds it dense: quantise after loading, or load_quantized")
        found = keys.read(param, mine, form.compute, form.dtype)
        if found.format.kind != form.kind or found.format.shape != form.shape:
            there, here = (f"{f.kind} {f.shape}" for f in (found.format, form))
            raise keys.FormatError(f"{param} is {there} in the state and {here} in the module")
        state_dict[prefix + param] = found.codes
        for suffix, t in zip(SCALES, found[2:], strict=True):
            old = self._buffers.get(f"{param}_{suffix}")
            if t is None:
                self._buffers.pop(f"{param}_{suffix}", None)
            elif assign or old is None or old.shape != t.shape or old.dtype != t.dtype:
                hold(self, f"{param}_{suffix}", t if assign else t.to(self._parameters[param].device, copy=True))
            else:
                with torch.no_grad():
                    old.copy_(t)
        self.peftlab_formats = {**self.peftlab_formats, param: found.format._replace(cast=form.cast)}


class Kept(type):
    """The type of classes that are made anew, from the class they pack, when they are unpickled."""


copyreg.pickle(Kept, lambda cls: (packing_class, (cls._dense_class, cls._packed_rule is not None, cls._read)))


@functools.cache
def packing_class(cls: type, called: bool, read: tuple[str, ...]) -> type:
    """The subclass of a module class whose weight is packed. called: the layer's call works on the codes; read: parameters seen decoded."""
    body = {
        "_dense_class": cls, "_packed_rule": None, "_read": read, "__module__": cls.__module__, "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__, **{n: _decoded(n) for n in read},
    }  # fmt: skip
    if called:
        body["_packed_rule"] = PACKED[layers._registered(cls)[1]]
        body["_packed_flip"] = body["_packed_rule"] is CONV1D
        body["weight"] = SHOWN
        body["forward"] = functools.wraps(cls.forward)(_embedding if issubclass(cls, nn.Embedding) else _linear)
    else:
        body["forward"] = _holding(cls.forward)
    meta = Kept if type(cls) is type else type("Kept", (Kept, type(cls)), {})
    if meta is not Kept:
        copyreg.pickle(meta, copyreg.dispatch_table[Kept])
    return meta(cls.__name__, (Packing, cls), body)


_held: contextvars.ContextVar[dict | None] = contextvars.ContextVar("peftlab_decoded", default=None)


def _holding(forward):
    """A call during which a parameter that is read several times (expert by expert) is decoded once."""

    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        token = _held.set({})
        try:
            return forward(self, *args, **kwargs)
        finally:
            _held.reset(token)

    return call


def _decoded(name: str) -> property:
    def get(self):
        raw = self._parameters[name]
        if is_storage(self, name):
            return raw
        held = None if torch.compiler.is_compiling() else _held.get()
        if held is None:
            return dense_parameter(self, name)
        key = id(self), name, raw.data_ptr()
        if key not in held:
            held[key] = dense_parameter(self, name)
        return held[key]

    return property(get)


def packed(m: nn.Module, param: str, kept: dict[str, Tensor] | None = None) -> Packed:
    """The packed tensor that a module holds; `kept` has tensors by name that take the place of its own."""
    kept = kept or {}
    found = [kept.get(f"{param}_{s}", m._buffers.get(f"{param}_{s}")) for s in SCALES]
    found = [t if t is None or t.dtype != torch.int32 else t.view(torch.float32) for t in found]
    codes = kept.get(param, m._parameters[param])
    codes = codes.full_tensor() if type(codes).__name__ == "DTensor" else codes  # FSDP2's shards, gathered: a collective call
    return Packed(m.peftlab_formats[param], codes, *found)


def scale_names(m: nn.Module, param: str | None = None) -> list[str]:
    """The buffers that hold a packed module's scales."""
    params = m.peftlab_formats if param is None else (param,)
    return [f"{p}_{s}" for p in params for s in SCALES if m._buffers.get(f"{p}_{s}") is not None]


def hold(m: nn.Module, name: str, t: Tensor) -> None:
    """A buffer that is saved under other keys than its own."""
    m._buffers[name] = t
    m._non_persistent_buffers_set.add(name)


def pack(m: nn.Module, param: str, p: Packed, called: bool) -> None:
    """Put codes in a parameter's place. The parameter object is a new one: the dense one's memory is its other holders' affair."""
    m._parameters[param] = nn.Parameter(p.codes, requires_grad=False)
    for suffix, t in zip(SCALES, p[2:], strict=True):
        if t is not None:
            hold(m, f"{param}_{suffix}", t)
    m.peftlab_formats = {**getattr(m, "peftlab_formats", {}), param: p.format}
    cls = original_class(m)
    read = cls._read if issubclass(cls, Packing) else ()
    dense = cls._dense_class if issubclass(cls, Packing) else cls
    become(m, packing_class(dense, called, read if called else tuple(sorted({*read, param}))))


def unpack(m: nn.Module, param: str, W: Tensor | None, requires_grad: bool = False) -> None:
    """Put a dense tensor in the codes' place (None: a dense one is there already); with the last one, the class is the module's own again."""
    if W is not None:
        m._parameters[param] = nn.Parameter(W, requires_grad=requires_grad)
    for name in scale_names(m, param):
        del m._buffers[name]
        m._non_persistent_buffers_set.discard(name)
    left = {k: f for k, f in m.peftlab_formats.items() if k != param}
    cls = original_class(m)
    if left:
        m.peftlab_formats = left
        become(m, packing_class(cls._dense_class, False, tuple(n for n in cls._read if n in left)))
    else:
        del m.peftlab_formats
        become(m, cls._dense_class)


def become(m: nn.Module, cls: type) -> None:
    """Make a module one of this class; adapters that are there stay, and learn what layer they sit at."""
    m.__class__ = adapted_class(cls, shown_parameters(m)) if isinstance(m, Adapted) else cls
    rule = layers.layer_rule(m)
    stack = m._modules.get("peftlab")
    for pairs in stack.sites.values() if isinstance(m, Adapted) else ():
        for site, _ in pairs:
            if site.kind == "matrix" and site.param == "weight" and rule is not None:
                site.rule = rule
