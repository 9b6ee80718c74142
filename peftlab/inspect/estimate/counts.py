"""Counts and bytes that follow from the shapes of a request alone."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlab import __version__
from peftlab.attach.request import WrapRequest, check_method
from peftlab.core.adapters import overrides_hook
from peftlab.core.build import build_method, saved_tensors, trainable_parameters
from peftlab.core.method import Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.core.stack import SHARED_CHILD
from peftlab.core.swap import changes_bias
from peftlab.formats.file import encode
from peftlab.formats.fingerprint import fingerprint, fingerprinted_parameters, has_comparable_values
from peftlab.formats.header import config_facts, site_facts
from peftlab.inspect.estimate.optimizers import OPTIMIZERS
from peftlab.model.index import join_path, tensor_identity
from peftlab.model.packed import dense_meta
from peftlab.support.contexts import preserved_rng


@dataclass
class EstimateOptions:
    """The arguments of `estimate` that do not concern the method."""

    optimizer: str
    batch: int
    length: int | None
    inputs: object
    loss: Callable | None
    master: bool
    master_gradients: bool
    base: str | None
    double_quant: bool

    def trained(self, tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> tuple[int, int, int]:
        """(weight, gradient, optimizer) bytes of these trained tensors."""
        weights = gradients = states = 0
        for shape, dtype in tensors:
            n, width = math.prod(shape), dtype.itemsize
            low = width < 4
            weights += n * width
            gradients += n * width + (4 * n if low and self.master_gradients else 0)
            states += OPTIMIZERS[self.optimizer](shape, 4 if low and self.master else width) + (4 * n if low and self.master else 0)
        return weights, gradients, states


@dataclass
class _MethodKind:
    """One distinct method: what all its sites have in common."""

    method: Method
    trained: list[tuple[tuple[int, ...], torch.dtype]]
    held: int  # bytes in memory
    saved: dict[str, Tensor]
    prints: dict[str, dict]  # parameter it changes -> fingerprint

    @classmethod
    def of(cls, method: Method, site: Site) -> _MethodKind:
        """Fingerprints have the width of their shape, so those of meta tensors do."""
        values = has_comparable_values(site, method)
        changed = [p for p in (site.param, site.bias if changes_bias(site, method) else None) if p and site.host._parameters.get(p) is not None]
        prints = {p: fingerprint(without_values(dense_meta(site.host, p), "meta"), values) for p in changed}
        for path, m, p in fingerprinted_parameters(site.host) if site.kind == "module" else ():
            raw = dense_meta(m, p)
            prints[path] = fingerprint(without_values(raw, "meta"), values and raw.is_floating_point())
        held = sum(t.numel() * t.element_size() for t in (*method.parameters(), *method.buffers()))
        return cls(method, _shapes_of(trainable_parameters(method)), held, saved_tensors(method), prints)


def _shapes_of(tensors: Iterable[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(t.shape), t.dtype) for t in tensors]


def without_values(t: Tensor, device: str) -> Tensor:
    """A tensor of the same shape, layout and dtype without values."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


@dataclass
class AdapterFacts:
    """What follows from the shapes of a request alone."""

    label: str
    can: tuple[str, ...] = ()
    adapter_bytes: int = 0
    tensor_bytes: int = 0
    header_bytes: int = 0
    trained: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)
    in_place: set[tuple] = field(default_factory=set)  # identities

    @property
    def trainable(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.trained)

    @classmethod
    def of(cls, req: WrapRequest) -> AdapterFacts:
        """Build each distinct method once, on meta, and count; the header is written out as `save` would."""
        self = cls(req.label)
        kinds: dict[tuple, _MethodKind] = {}
        tensors: dict[str, Tensor] = {}
        base: dict[str, dict] = {}
        index: dict[int, int] = {}
        settings, sites = [], []
        note = types.SimpleNamespace(untied=())
        with preserved_rng():
            recipes = list(req.recipes("meta"))
            for site, recipe in zip(req.sites, recipes, strict=True):
                here = id(site.host) if site.kind == "module" else 0  # what surrounds a call may differ with what lies in it
                key = (id(recipe), here, site.rule.name, site.kind, site.n_out, site.n_in, site.shape, site.has_bias, site.dtype, site.param)
                if key not in kinds:
                    kinds[key] = _MethodKind.of(_method_on_meta(req, site, recipe), site)
                kind, host_path = kinds[key], req.model.path(site.host)
                self._add(site, kind, host_path, join_path(host_path, ADAPTERS_CHILD, req.name, site.key), tensors)
                if index.setdefault(id(recipe), len(settings)) == len(settings):
                    settings.append(config_facts(recipe))
                note.untied = (site.param,) if req.tie == "untie" else ()
                sites.append(site_facts(host_path, site, index[id(recipe)], note))
                for param, found in kind.prints.items():
                    key = join_path(host_path, param)
                    base[key] = found if "values" in found else base.get(key, found)
        self._add_common(recipes[0].common, req.name, tensors)
        self.can = capabilities(kind.method, any(k.startswith(f"{SHARED_CHILD}.") for k in tensors))
        self.tensor_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        entry = dict(name=req.name, settings=settings, sites=sites, method=req.label, seed=req.seed, active=True, trainable=True, asked=req.asked)
        self.header_bytes = len(encode(tensors, {"peftlab": __version__, "adapters": [entry], "base": base, "buffers": [], "included": []}))
        return self

    def _add(self, site: Site, kind: _MethodKind, host_path: str, prefix: str, tensors: dict[str, Tensor]) -> None:
        self.trained += kind.trained
        self.adapter_bytes += kind.held
        for k, t in kind.saved.items():
            tensors[f"{prefix}.{k}"] = t
        if kind.method.in_place:
            p = site.raw_tensor
            self.trained += _shapes_of([p])
            self.in_place.add(tensor_identity(p))
            tensors[join_path(host_path, site.param)] = without_values(p, "meta")

    def _add_common(self, common: nn.Module | None, name: str, tensors: dict[str, Tensor]) -> None:
        if common is None:
            return
        self.trained += _shapes_of(trainable_parameters(common))
        self.adapter_bytes += sum(t.numel() * t.element_size() for t in (*common.parameters(), *common.buffers()))
        for k, t in saved_tensors(common).items():
            tensors[join_path(SHARED_CHILD, name, k)] = t


def _method_on_meta(req: WrapRequest, site: Site, recipe) -> Method:
    """A method on meta as `wrap` would leave it."""
    method = build_method(recipe, site.seen_as("shapes"), (), "meta")
    check_method(method, site, req.label)
    dtype = req.default_dtype(site)
    return method._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def capabilities(method: Method, shares: bool = False) -> tuple[str, ...]:
    """What a built method can do and what it needs, in words: the column that helps to choose."""
    out = {
        "merges": method.defined() and not method.in_place,
        "in any order": method.additive,  # stacks commute, and may be merged in part
        "changes the call": not method.defined(),
        "packed bases": method.opaque,  # works where only the layer's call is to be had
        "in place": method.in_place,
        f"data for its start ({method.needs_data})": method.needs_data is not None,
        "schedule": overrides_hook(method, "step") or overrides_hook(method, "penalty"),
        "shared tensors": shares,
    }
    return tuple(k for k, v in out.items() if v)
