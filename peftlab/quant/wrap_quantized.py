"""Adapters that start from what rounding loses: the codes of a layer and the factors of its LoRA are found together.

    W ~ Q + s B A        Q = decode(quantise(W - s B A)),  s B A = the best rank-r part of W - Q

Both equations in turn are LoftQ, from A = B = 0 (Q comes first), and QPiSSA, from Q = 0 (B A does).

Papers: LoftQ, Li et al. 2023, arXiv 2310.08659, algorithm 1; QPiSSA, Meng et al. 2024, arXiv 2404.02948, sec. 4.
Legend: W a parameter in its raw layout; Q what its codes stand for, D = s B A in the same layout; A (r, n_in), B (n_out, r).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftlab.attach.attach import attach_methods
from peftlab.attach.build import build_methods
from peftlab.attach.request import WrapRequest, check_dtype, make_request
from peftlab.core.ledger import base_records
from peftlab.core.method import Method
from peftlab.core.options import positive_int
from peftlab.core.site import Site
from peftlab.model.index import ensure_module, join_path
from peftlab.model.patterns import did_you_mean
from peftlab.model.walk import unwrap_parallel
from peftlab.parts import lowrank
from peftlab.quant.codes import check, dequantise, quantise
from peftlab.quant.modules import pack
from peftlab.quant.packed import Packed
from peftlab.quant.quantize import note_quantized, packable_places, refuse_unpackable, whole_tensor, works_on_codes
from peftlab.support.contexts import paused_gc, preserved_rng
from peftlab.support.progress import Progress, check_progress, reported

Pairs = list[tuple[Site, Method]]  # the sites at one parameter, each with its LoRA


@paused_gc()
def wrap_quantized(
    model: nn.Module, kind: str = "nf4", *, init: str = "loftq", iters: int = 5, targets=None, exclude=None, layers=None, of: str | None = None,
    name: str = "default", overrides: Mapping | None = None, seed: int = 0, dtype: torch.dtype | None = None, split: Mapping | None = None,
    layout: Mapping | None = None, read=None, blocksize: int | None = None, double_quant: bool | None = None,
    compute_dtype: torch.dtype | None = None, progress: Progress = None, **hyper,
) -> nn.Module:  # fmt: skip
    """Quantise layers and put a LoRA at each that starts from what the codes lose of its weight; returns the same model.

    The adapted layers begin near their dense weights instead of at the rounded ones, and without the adapter they hold the codes alone: with
    init="qpissa" these stand for W less its principal part. Layers that get no adapter stay dense: call `quantize` for them.

    Args:
        model: a dense model; as for `wrap`, it is changed in place.
        kind, blocksize, double_quant, compute_dtype: as for `quantize`.
        init: "loftq": the codes are those of W, then the factors take up what they lose, in turn. "qpissa": the factors are the principal part
            of W, then the codes those of the rest, in turn.
        iters: how often both are found; of all turns the one with the smallest error is kept. "loftq" with iters=1 leaves the codes that
            `quantize` makes, so that the adapter then fits every model that was quantised alike.
        targets, exclude, layers, of, name, overrides, seed, dtype, split, layout, read, progress, **hyper: as for `wrap` with "lora".

    Beside the model there are some float32 copies of one layer's weight at a time. An interrupt leaves every layer whole: up to there quantised
    with the adapter at it, and as it was after that.

    Raises:
        PatternError, ValueError, TypeError, ImportError: for what `wrap` and `quantize` refuse, and layers that cannot be quantised. The model is
            then unchanged.
    """
    check(kind, blocksize, double_quant)
    check_dtype(compute_dtype, "compute_dtype")
    check_progress(progress)
    positive_int("iters", iters, None)
    if init not in lowrank.CODED:
        raise ValueError(f"init={init!r}: one of {', '.join(map(repr, lowrank.CODED))}.{did_you_mean(str(init), lowrank.CODED)}")
    root = unwrap_parallel(ensure_module(model))
    # A tied tensor is refused like all that cannot be quantised; nothing else asks for `tie`.
    ask = functools.partial(
        make_request, root, "lora", targets=targets, exclude=exclude, layers=layers, of=of, name=name, overrides=overrides, seed=seed, dtype=dtype,
        tie="untie", split=split, layout=layout, read=read, hyper={"init": init, **hyper},
    )  # fmt: skip
    req = ask()
    groups = _groups(req)
    with preserved_rng():
        methods = build_methods(req)
    _check(req, methods, init)
    by_site = {id(s): m for s, m in zip(req.sites, methods, strict=True)}
    double = kind != "int8" if double_quant is None else double_quant
    known = base_records(root)
    done: dict[str, Method] = {}
    try:
        with reported(progress, init) as tell:
            for count, (place, sites) in enumerate(groups, 1):
                pairs = [(s, by_site[id(s)]) for s in sites]
                called = works_on_codes(req.model, place)
                code = functools.partial(_coded, kind=kind, blocksize=blocksize, double=double, flip=called and place.rule.name == "conv1d_hf")
                p = alternate(place.host._parameters[place.param].detach(), pairs, code, init, iters)
                with whole_tensor(place.host):
                    pack(place.host, place.param, p._replace(format=p.format._replace(compute=compute_dtype)), called)
                    note_quantized(known, req.model, place)
                done |= {s.path: m for s, m in pairs}
                tell(count, len(groups), place.path)
    finally:
        if done:
            again = ask()  # packing has changed the rules of the layers
            there = [s for s in again.sites if s.path in done]
            attach_methods(root, replace(again, sites=there), [done[s.path] for s in there])
    return model


def _groups(req: WrapRequest) -> list[tuple[Site, list[Site]]]:
    """What is to be packed, each with the sites at it; raises where something cannot be."""
    there = {(id(p.host), p.param): p for p in packable_places(req.model)}
    found: dict[tuple, tuple[Site, list[Site]]] = {}
    for s in req.sites:
        key = id(s.host), s.param
        if key not in there:
            raise ValueError(f"{s.path!r} ({type(s.host).__name__}) has no weight that can be quantised: exclude it")
        if key not in found:
            found[key] = there[key], []
            refuse_unpackable(req.model, there[key])
            if s.raw_tensor.is_meta:
                raise ValueError(f"{join_path(req.model.path(s.host), s.param)!r} is on the meta device: it has no values to start from")
        found[key][1].append(s)
    return list(found.values())


def _check(req: WrapRequest, methods: list[Method], init: str) -> None:
    """What these starts need of the options."""
    for s, m, hyper in zip(req.sites, methods, req.hypers, strict=True):
        if hyper["init"] != init:
            raise ValueError(f"init={hyper['init']!r} at {s.path!r}: here every site starts with init={init!r}; wrap that one by itself")
        try:
            lowrank.positive_scale(float(m.s))
        except ValueError as e:
            raise ValueError(f"{e} (at {s.path!r})") from None


def _coded(X: Tensor, W: Tensor, *, kind: str, blocksize: int | None, double: bool, flip: bool) -> tuple[Packed, Tensor]:
    """The codes of X, and the values that a layer of W's dtype has from them; `flip`: the codes are those of the transpose."""
    p = quantise(X.t() if flip else X, kind, blocksize, double, dtype=W.dtype)
    Q = dequantise(p).to(X.dtype)
    return p, Q.t() if flip else Q


class Turn(NamedTuple):
    """What one turn of the alternation found."""

    error: float  # |W - Q - D|_F
    packed: Packed
    factors: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def alternate(W: Tensor, pairs: Pairs, code: Callable[[Tensor, Tensor], tuple[Packed, Tensor]], init: str, iters: int) -> Packed:
    """The codes of the best of `iters` turns; the methods then hold the factors of that turn, and its error as `start_error`.

    The factors are rounded to the adapter's dtype before anything is computed from them, as Q is to that of W.
    """
    wide = lowrank.working(W)
    Q, best = torch.zeros_like(wide), None
    D = torch.zeros_like(wide)
    for _ in range(iters):
        if init == "qpissa":
            D = _absorb(wide - Q, pairs)
        p, Q = code(wide - D, W)
        if init == "loftq":
            D = _absorb(wide - Q, pairs)
        error = lowrank.frobenius((wide - Q - D).flatten(1))
        if best is None or error < best.error:
            best = Turn(error, p, [(m.A.clone(), m.B.clone()) for _, m in pairs])
    for (_, m), (A, B) in zip(pairs, best.factors, strict=True):
        m.A.copy_(A)
        m.B.copy_(B)
        m.start_error, m.needs_data = best.error, None
    return best.packed


def _absorb(E: Tensor, pairs: Pairs) -> Tensor:
    """Gives every LoRA the best rank-r part of its own piece of E (raw layout), and returns what all of them then add, in that layout."""
    D = torch.zeros_like(E)
    for site, m in pairs:
        A, B, _ = lowrank.principal(site.get(site.part(E)), m.r, float(m.s))
        m.A.copy_(A)
        m.B.copy_(B)
        piece = site.part(D)
        piece.copy_(site.put(piece, site.get(piece) + float(m.s) * m.B.to(E.dtype) @ m.A.to(E.dtype)))
    return D
