"""quantize and dequantize: from patterns to packed modules, layer by layer; a call that raises changes nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peftlab.attach.request import check_dtype
from peftlab.attach.select import select_among
from peftlab.core.adapters import refuse_inside_blocks
from peftlab.core.ledger import BaseRecord, base_records, sample_entries
from peftlab.core.method import Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.model import layers
from peftlab.model.index import ModelIndex, ensure_module, join_path, tensor_identity
from peftlab.model.packed import dense_meta, dense_parameter, is_foreign_tensor, is_quantized
from peftlab.model.patterns import PatternError
from peftlab.model.readers import parent_reads_weight
from peftlab.model.walk import Adapted, original_class, unwrap_parallel
from peftlab.quant.codes import check, quantise
from peftlab.quant.modules import PACKED, Packing, become, pack, packed, unpack
from peftlab.quant.packed import Packed
from peftlab.support.contexts import paused_gc
from peftlab.support.progress import Progress, check_progress, reported


class PackRequest(Method):
    """Stands for the quantiser in the question where weights are."""

    @classmethod
    def fits(cls, site: Site) -> bool:
        return True


def packable_places(model: ModelIndex) -> Iterator[Site]:
    """Every parameter that can be packed, or is: weights of linear layers and embeddings, and raw matrices, which only a pattern of their own means."""
    for key, m in model.modules.items():
        paths, rule = model.paths[key], layers.layer_rule(m)
        if isinstance(rule, (layers.Linear, layers.Embedding)) and rule is not layers.OPAQUE:
            W = dense_meta(m, "weight")
            n_out, n_in = layers.matrix_shape(m, rule, W)
            names = (*paths, *(join_path(p, "weight") for p in paths))
            yield Site(m, paths[0], rule=rule, n_out=n_out, n_in=n_in, shape=tuple(W.shape), names=names)
        if rule is not None or isinstance(m, nn.RNNBase):
            continue  # an RNN hands its parameters to one kernel
        for name in m._parameters:
            W = dense_meta(m, name)
            if W is not None and W.is_floating_point() and W.ndim in (2, 3) and not is_foreign_tensor(W):
                own = tuple(join_path(p, name) for p in paths)
                yield Site(m, own[0], name, param=name, names=own, explicit=True, shape=tuple(W.shape), n_out=W.shape[-2], n_in=W.shape[-1])


def works_on_codes(model: ModelIndex, site: Site) -> bool:
    """Whether the layer's call is known, so that it can do with codes; otherwise the module reads decoded values."""
    m = site.host
    rule = layers._registered(original_class(m))
    known = site.param == "weight" and rule is not None and rule[1] in PACKED and set(m._parameters) <= {"weight", "bias"}
    return known and layers.runs_registered_forward(m, original_class(m)) and not parent_reads_weight(model, m)


@paused_gc()
def quantize(
    model: nn.Module, kind: str = "nf4", *, targets=None, exclude=None, blocksize: int | None = None, double_quant: bool | None = None,
    compute_dtype: torch.dtype | None = None, progress: Progress = None,
) -> nn.Module:  # fmt: skip
    """Replace weights of `model` by 4-bit or 8-bit codes, in place and one after the other, and return the same model.

    Args:
        model: any module. Adapters that are there already stay and act on the packed weights; their start values do not change.
        kind: "nf4", "fp4" (blocks of `blocksize` entries share a scale) or "int8" (rows do).
        targets, exclude: patterns; by default every linear layer but the output head. Embeddings, and 3-D and 2-D parameters of modules that
            are no known layer (experts), are packed where a pattern names them.
        blocksize: 32, 64 (the default), 128, 256, 512, 1024, 2048 or 4096 entries; nf4 and fp4 only.
        double_quant: pack the scales too (the default for nf4 and fp4): 0.516 instead of 0.5625 bytes an entry with blocks of 64.
        compute_dtype: in which the layers form their products; by default in their input's dtype.
        progress: True for a bar (drawn by tqdm), or a function that is called as progress(done, total, path) after each weight.

    An interrupt, or an exception of `progress`, leaves every weight whole: quantised up to there, and as it was after that. Then
    `dequantize(model)` makes the model dense again, and exclude=[*packed_weights(model)] goes on with the others.

    Raises:
        PatternError, ValueError, TypeError, ImportError: for unknown kinds and patterns, weights that are quantised already, tied, sharded, not
            finite or trained in place, and models with merged adapters. The model is then unchanged.
    """
    check(kind, blocksize, double_quant)
    check_dtype(compute_dtype, "compute_dtype")
    check_progress(progress)
    root = unwrap_parallel(ensure_module(model))
    refuse_inside_blocks(root)
    view = ModelIndex.of(root)
    sites = _chosen_layers(view, targets, exclude)
    for site in sites:
        refuse_unpackable(view, site)
    double = kind != "int8" if double_quant is None else double_quant
    known = base_records(root)
    with reported(progress, "quantize") as tell:
        for done, site in enumerate(sites, 1):
            m, called = site.host, works_on_codes(view, site)
            W = m._parameters[site.param].detach()
            p = quantise(W.t() if isinstance(site.rule, layers.Conv1D) and called else W, kind, blocksize, double)
            del W  # no dense weight outlives its turn
            with whole_tensor(m):
                pack(m, site.param, p._replace(format=p.format._replace(compute=compute_dtype)), called)
                note_quantized(known, view, site)
            tell(done, len(sites), site.path)
    return model


def _chosen_layers(view: ModelIndex, targets, exclude) -> list[Site]:
    """The sites that the patterns mean; where there are none, a word about layers that another library has packed."""
    try:
        return select_among(view, PackRequest, "quantize", list(packable_places(view)), targets, exclude)[0]
    except PatternError as e:
        packed = [m for m in view.modules.values() if layers.is_opaque_linear(m)]
        if not packed:
            raise
        first = f"{view.path(packed[0])!r} ({original_class(packed[0]).__name__})"
        raise PatternError(f"{e} {len(packed)} layers, {first} the first of them, only offer a call: another library has packed their weights.") from None


@contextlib.contextmanager
def whole_tensor(m: nn.Module) -> Iterator[None]:
    """Puts a module back where an interrupt meets it half changed."""
    kept = m.__class__, dict(m.__dict__), dict(m._parameters), dict(m._buffers), set(m._non_persistent_buffers_set)
    try:
        yield
    except BaseException:
        for there, before in zip((m.__dict__, m._parameters, m._buffers, m._non_persistent_buffers_set), kept[1:], strict=True):
            there.clear()
            there.update(before)
        m.__class__ = kept[0]
        become(m, original_class(m))
        raise


def refuse_unpackable(model: ModelIndex, site: Site) -> None:
    """Raise where this parameter cannot be packed."""
    m, param = site.host, site.param
    where, W = f"{site.path!r} ({original_class(m).__name__})", m._parameters[param]
    if is_quantized(m, param):
        raise ValueError(
            f"{where} is quantised already ({m.peftlab_formats[param].kind}): dequantize first, or exclude it; "
            "exclude=[*peftlab.packed_weights(model)] goes on with the others"
        )
    if type(W).__name__ == "DTensor":
        raise ValueError(f"{where} is sharded: quantize before fully_shard")
    others = [o for o in model.owners[tensor_identity(W)] if o[0] is not m or o[1] != param]
    if others:
        raise ValueError(f"{where} is one tensor with {join_path(model.path(others[0][0]), others[0][1])!r} (tied): exclude it, or untie the two first")
    if getattr(m, "max_norm", None) is not None:
        raise ValueError(f"{where} has max_norm: torch edits its table while it is read")
    if W.numel() == 0 or not torch.promote_types(W.dtype, torch.float32).is_floating_point:
        raise ValueError(f"{where} has no floating entries: {W.dtype} {tuple(W.shape)}")
    if isinstance(m, Adapted):
        _refuse_adapted(m, param, where)
    if not W.is_meta and not all(math.isfinite(v) and abs(v) <= torch.finfo(torch.float32).max for v in map(float, torch.aminmax(W.detach()))):
        raise ValueError(f"{where} has entries that are not finite in float32: they have no code")


def _refuse_adapted(m: nn.Module, param: str, where: str) -> None:
    stack = m._modules[ADAPTERS_CHILD]
    if stack.merged:
        raise ValueError(f"{where} has {stack.merged[0]!r} merged into it: unmerge it first")
    if stack.read:
        raise ValueError(f"{where} has an adapter that is read instead of called: quantize before wrap")
    if any(method.in_place and site.param == param for pairs in stack.sites.values() for site, method in pairs):
        raise ValueError(f"{where} is trained in place: codes cannot be trained")


def note_quantized(known: list[tuple[str, nn.Module, BaseRecord]], view: ModelIndex, site: Site) -> None:
    """What the ledgers of a model (which to find takes a walk) remember of the parameter is that of the packed one, whose flag is off."""
    p = site.host._parameters[site.param]
    for path, _, ledger in known:
        for own in view.paths[id(site.host)]:
            key = join_path(own, site.param)
            key = key.removeprefix(f"{path}.") if path else key
            if key in ledger.flags:
                ledger.flags[key] = False
                ledger.mark(key, p, sample_entries)


@paused_gc()
def dequantize(model: nn.Module, *, targets=None, exclude=None, progress: Progress = None) -> nn.Module:
    """Put the values of the codes in their place, in place (all packed weights by default), and return the same model.

    The dense weights have the dtype that was quantised and do not require grad. `progress` as for `quantize`; after an interrupt every weight
    is whole, and another call goes on.

    Raises:
        PatternError, ValueError, TypeError, ImportError: when nothing is quantised, or adapters are merged. The model is then unchanged.
    """
    check_progress(progress)
    root = unwrap_parallel(ensure_module(model))
    refuse_inside_blocks(root)
    view = ModelIndex.of(root)
    there = [s for s in packable_places(view) if is_quantized(s.host, s.param)]
    if not there:
        raise ValueError(f"nothing in this {type(model).__name__} is quantised")
    sites = there
    if targets is not None or exclude is not None:
        sites, _ = select_among(view, PackRequest, "dequantize", there, [s.path for s in there] if targets is None else targets, exclude)
    for site in sites:
        if type(site.host._parameters[site.param]).__name__ == "DTensor":
            raise ValueError(f"{site.path!r} is sharded: dequantize before fully_shard")
        if isinstance(site.host, Adapted):
            _refuse_adapted(site.host, site.param, repr(site.path)) if site.host._modules[ADAPTERS_CHILD].merged else None
    known = base_records(root)
    with reported(progress, "dequantize") as tell:
        for done, site in enumerate(sites, 1):
            W = dense_parameter(site.host, site.param).contiguous()
            with whole_tensor(site.host):
                unpack(site.host, site.param, W)
                note_quantized(known, view, site)
            tell(done, len(sites), site.path)
    return model


def packed_weights(model: nn.Module) -> dict[str, Packed]:
    """What is quantised in a model: packed tensors by the path of their parameter."""
    view = ModelIndex.of(unwrap_parallel(ensure_module(model)))
    return {join_path(view.path(m), k): packed(m, k) for m in view.modules.values() if isinstance(m, Packing) for k in m.peftlab_formats if is_quantized(m, k)}


def nbytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values())
