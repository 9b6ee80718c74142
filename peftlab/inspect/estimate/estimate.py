"""inspect.estimate.estimate"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from peftlab.attach.default_targets import default_targets
from peftlab.attach.request import WrapRequest, make_request
from peftlab.core.method import Method
from peftlab.core.site import Site
from peftlab.inspect.estimate.counts import AdapterFacts, EstimateOptions
from peftlab.inspect.estimate.one_step import StepUnknown, bytes_of_one_step
from peftlab.inspect.estimate.optimizers import OPTIMIZERS
from peftlab.inspect.estimate.report import Comparison, Estimate
from peftlab.model import layers
from peftlab.model.index import ensure_module, tensor_identity
from peftlab.model.packed import dense_meta, inner_tensors
from peftlab.model.patterns import PatternError, did_you_mean
from peftlab.model.walk import named_base_modules, unwrap_parallel
from peftlab.quant.codes import DECODE, TILE, WIDE
from peftlab.quant.codes import outline as packed_outline
from peftlab.quant.packed import FORMATS
from peftlab.quant.quantize import works_on_codes
from peftlab.registry import resolve
from peftlab.support.contexts import paused_gc


@paused_gc()
def estimate(
    model: nn.Module, method: str | type[Method] | Iterable, *, optimizer: str = "adamw", batch: int = 1, length: int | None = None, inputs=None,
    master: bool = False, master_gradients: bool | None = None, base: str | None = None, double_quant: bool = True, targets=None, exclude=None,
    layers=None, of: str | None = None, name: str = "default", overrides: Mapping | None = None, data=None, loss: Callable | None = None, seed: int = 0,
    dtype: torch.dtype | None = None, tie: str | None = None, split: Mapping | None = None, layout: Mapping | None = None, read=None, **hyper,
) -> Estimate | Comparison:  # fmt: skip
    """Memory and file sizes of training `method` on `model`; changes nothing, and works on meta models.

    Args:
        model, targets, exclude, layers, of, name, overrides, seed, dtype, tie, split, layout, read, **hyper: as for `wrap`.
        method: a name or class, or several to compare: names, classes or (name, options) pairs. One that this model or these options
            do not fit is listed with the reason.
        optimizer: one of `OPTIMIZERS`; as torch allocates its state, except adamw8bit (bitsandbytes) and lion.
        batch, length: rows and tokens of a synthetic batch, for models with a token embedding. Without `length` or `inputs`, activation and
            peak memory are left out.
        inputs: one batch instead: a mapping (keywords), a tuple or list (positions) or a tensor; meta tensors do.
        loss: `loss(model, batch)`. By default the loss that the model returns, else the cross-entropy of its logits where its last
            dimension is the vocabulary's, else the mean of its first output.
        master: trained tensors of lower precision have a float32 copy and float32 optimizer states (mixed precision training).
        master_gradients: such tensors also have a float32 gradient that accumulates; by default as `master`.
        base: "nf4", "fp4" or "int8" counts the frozen linear weights (but the head) as if quantised so, in blocks of 64; `double_quant` packs the
            scales of nf4 and fp4 too.
        data: taken for the sake of the same call as `wrap`, and not looked at.

    Raises:
        PatternError, ValueError, TypeError: as `wrap` does.
    """
    ensure_module(model)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r}: one of {', '.join(OPTIMIZERS)}")
    if base is not None and not (isinstance(base, str) and base in FORMATS):
        hint = did_you_mean(base, FORMATS) if isinstance(base, str) else ""
        raise ValueError(f"base={base!r}: None or one of {', '.join(map(repr, FORMATS))}.{hint}")
    for what, value in (("batch", batch), ("length", length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{what}={value!r}: a whole number of at least 1")
    where = dict(
        targets=targets, exclude=exclude, layers=layers, of=of, name=name, overrides=overrides, seed=seed, dtype=dtype, tie=tie, split=split,
        layout=layout, read=read,
    )  # fmt: skip
    want = EstimateOptions(optimizer, batch, length, inputs, loss, master, master if master_gradients is None else master_gradients, base, double_quant)
    if isinstance(method, (str, type)):
        return _estimate_one(model, method, want, where, hyper)
    found = Comparison([])
    for entry in method:
        what, own = entry if isinstance(entry, tuple) else (entry, {})
        shown = what if isinstance(what, str) else resolve(what)[2]
        resolve(what)  # an unknown name is a slip, not a method that does not fit
        given = {**where, **{k: v for k, v in own.items() if k in where}}
        options = {**hyper, **{k: v for k, v in own.items() if k not in where}}
        try:
            found.rows.append(_estimate_one(model, what, want, given, options))
        except (PatternError, ValueError, TypeError) as e:
            found.refused[shown] = str(e)
    if not found.rows:
        raise ValueError("; ".join(f"{k}: {v}" for k, v in found.refused.items()) or "method is an empty list")
    return found


def _estimate_one(model: nn.Module, method, want: EstimateOptions, where: dict, hyper: dict) -> Estimate:
    req = make_request(unwrap_parallel(model), method, hyper=hyper, **where)
    facts = AdapterFacts.of(req)
    frozen, largest = _saved_by_quantizing(req, facts, want)
    total, base_bytes = _held_bytes(unwrap_parallel(model))
    weights, gradients, states = want.trained(facts.trained)
    out = Estimate(
        facts.label, facts.can, len(req.sites), facts.trainable, total, base_bytes - frozen, facts.adapter_bytes, facts.tensor_bytes,
        facts.tensor_bytes + facts.header_bytes, weights, gradients, states, want.optimizer,
    )  # fmt: skip
    if want.inputs is None and want.length is None:
        out.note = "activation and peak memory: give length= (and batch=), or inputs="
        return out
    try:
        out.activation_bytes, step = bytes_of_one_step(unwrap_parallel(model), method, want, where, hyper)
    except StepUnknown as e:
        out.note = f"activation and peak memory are not known: {e}"
        return out
    extra = gradients - sum(math.prod(s) * d.itemsize for s, d in facts.trained)  # float32 gradients beside the step's own
    # AdamW forms one temporary of every trained tensor at once on an accelerator, of one tensor after the other on a CPU.
    sizes = [math.prod(s) * d.itemsize for s, d in facts.trained]
    update = gradients - extra + (2 * max(sizes, default=0) if _model_device(model).type == "cpu" else sum(sizes))
    out.step_bytes = max(step + largest, update)
    out.peak_bytes = out.static_bytes + extra + out.step_bytes
    return out


def _model_device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _held_bytes(model: nn.Module) -> tuple[int, int]:
    """(entries of the base's parameters, bytes of everything the model holds), tied tensors once."""
    seen: dict[tuple, int] = {}
    for t in (*model.parameters(), *model.buffers()):
        seen.setdefault(tensor_identity(t), sum(u.numel() * u.element_size() for u in inner_tensors(t)))
    own = {tensor_identity(p): dense_meta(m, n).numel() for _, m in named_base_modules(model) for n, p in m._parameters.items() if p is not None}
    return sum(own.values()), sum(seen.values())


def _saved_by_quantizing(req: WrapRequest, facts: AdapterFacts, want: EstimateOptions) -> tuple[int, int]:
    """(bytes that quantising the frozen linear weights saves, the largest tile of these weights that is decoded for a product)."""
    if want.base is None:
        return 0, 0
    saved = largest = 0
    done = set(facts.in_place)
    whole = [Site(m, p[0], rule=rule) for m, p in ((m, req.model.paths[k]) for k, m in req.model.modules.items()) if (rule := layers.layer_rule(m))]
    for site in default_targets(req.model, [s for s in whole if s.rule is not layers.OPAQUE], _LinearPlaces):
        W = site.raw_tensor
        if tensor_identity(W) in done or not W.is_floating_point():
            continue
        done.add(tensor_identity(W))
        size = W.numel() * W.element_size()
        flip = isinstance(site.rule, layers.Conv1D) and works_on_codes(req.model, site)  # int8 has a scale for each row of the canonical matrix
        saved += size - packed_outline(tuple(W.shape[::-1] if flip else W.shape), W.dtype, want.base, None, want.double_quant).nbytes
        decoded = 0 if W.dtype == torch.float32 else 4 * min(W.numel(), DECODE)  # before it is rounded
        largest = max(largest, min(W.numel(), WIDE if W.is_cuda else TILE) * W.element_size() + decoded)
    return saved, largest


class _LinearPlaces(Method):
    """Stands for the quantiser in the question where linear weights are."""

    @classmethod
    def fits(cls, site) -> bool:
        return isinstance(site.rule, layers.Linear)
