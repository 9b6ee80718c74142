"""A call of `wrap` or `plan`, checked before anything is built."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from peftlab.attach.calibrate import shows_inputs
from peftlab.attach.select import companion_sites, options_by_site, select_sites
from peftlab.attach.ties import resolve_ties
from peftlab.core.adapters import adapter_names, refuse_inside_blocks
from peftlab.core.build import note_declared_frozen
from peftlab.core.method import AdapterConfig, Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.core.stack import SHARED_CHILD, AdapterStack, SharedModules
from peftlab.model.index import ModelIndex, ensure_module, join_path, refuse_inference_tensors
from peftlab.model.layers import is_opaque_linear
from peftlab.model.packed import is_quantized
from peftlab.model.walk import named_base_modules, original_class, unwrap_parallel
from peftlab.registry import check_keywords, keywords, resolve
from peftlab.support.contexts import default_device


@dataclass
class WrapRequest:
    """A checked call of wrap or plan, before anything is built."""

    model: ModelIndex
    cls: type[Method]
    label: str
    name: str
    sites: list[Site]
    counts: dict[str, int]
    hypers: list[dict]
    seed: int
    dtype: torch.dtype | None
    tie: str | None
    asked: dict

    def recipes(self, device: str) -> Iterator[AdapterConfig]:
        """One recipe a distinct setting, shared by its sites; the shared module is built once."""
        common = self.common(device)
        later = functools.partial(self.common, "cpu") if common is not None and device == "meta" else None
        made: dict[str, AdapterConfig] = {}
        for h in self.hypers:
            key = repr(sorted(h.items(), key=str))
            if key not in made:
                made[key] = AdapterConfig(self.cls, self.label, h, self.name, self.seed, common, later)
            yield made[key]

    @property
    def shared_options(self) -> list[str]:
        """The options of what the sites share."""
        build = getattr(self.cls, "shared", None)
        return [] if build is None else [k for k, p in inspect.signature(build).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]

    def common(self, device: str, site: int = 0) -> nn.Module | None:
        """What the sites share, or None for most methods; made with the options of one of them."""
        build = getattr(self.cls, "shared", None)
        if build is None:
            return None
        sites = self.sites if device != "meta" else [s.seen_as("shapes") for s in self.sites]
        wanted = self.shared_options
        with torch.no_grad(), default_device(device):
            made = build(sites, **{k: v for k, v in self.hypers[site].items() if k in wanted})
        return made if made is None else note_declared_frozen(made)

    def refuse_shared(self) -> None:
        """What the sites share is made once: its options (the seed apart, which only draws it) must have one value."""
        defaults = {k: p.default for k, p in keywords(self.cls).items()}
        for k in [k for k in self.shared_options if k != "seed"]:
            values = [h.get(k, defaults[k]) for h in self.hypers]
            other = next((i for i, v in enumerate(values) if v is not values[0] and v != values[0]), None)
            if other is not None and any(self.common("meta", i) is not None for i in (0, other)):
                raise ValueError(
                    f"overrides: {k} would be {values[0]!r} at {self.sites[0].path!r} and {values[other]!r} at {self.sites[other].path!r}, and all sites of "
                    f"{self.label} share what is made of it: give {k} one value, or wrap the places one by one under names of their own"
                )

    def default_dtype(self, site: Site) -> torch.dtype:
        return self.dtype or torch.promote_types(torch.float32, site.dtype)


def make_request(model, method, *, targets, exclude, layers, of, name, overrides, seed, dtype, tie, split, layout, read, hyper) -> WrapRequest:
    ensure_module(model)
    model = unwrap_parallel(model)
    cls, set_by_alias, label = resolve(method)
    if "targets" in set_by_alias:  # a name that is a method at a certain place, such as linear_probe
        where = set_by_alias.pop("targets")
        targets = where if targets is None else targets
    clash = set_by_alias.keys() & hyper.keys()
    if any(set_by_alias[k] != hyper[k] for k in clash):
        raise TypeError(f"{method!r} is {label} with {set_by_alias}; {', '.join(sorted(clash))} cannot be given another value")
    hyper = set_by_alias | hyper
    if "seed" in keywords(cls):
        hyper["seed"] = seed
    check_keywords(cls, hyper)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: a whole number")
    check_dtype(dtype)
    refuse_inside_blocks(model)
    check_child_names(model)
    check_adapter_name(name)
    if name in adapter_names(model):
        raise ValueError(f"this model already has an adapter {name!r}; give another name= or unwrap(model, {name!r}) first")
    view = ModelIndex.of(model)
    refuse_inference_tensors(model)
    if not any(m._parameters or m._buffers or is_opaque_linear(m) for m in view.modules.values()):
        raise ValueError(f"this {type(model).__name__} has no parameters: there is nothing to adapt")
    sites, counts = select_sites(view, cls, label, targets, exclude, layers, of, split, layout, read)
    if cls.on != "module":
        sites = resolve_ties(view, sites, tie, label)
    sites = [*sites, *companion_sites(view, cls, sites, hyper)]
    hypers = options_by_site(view, sites, hyper, overrides, lambda h, where: check_keywords(cls, h, where))
    asked = {"targets": _as_json(targets), "exclude": _as_json(exclude), "layers": _as_json(layers), "of": of}
    req = WrapRequest(view, cls, label, name, sites, counts, hypers, seed, dtype, tie, asked)
    req.refuse_shared()
    return req


def _as_json(value):
    """Patterns as they can be written into a file's header."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in value.items()}
    if isinstance(value, Iterable):
        return [_as_json(v) for v in value]
    return str(value)


_RESERVED_NAMES = AdapterStack(read=False)


def check_adapter_name(name: object) -> None:
    """An adapter's name is one path component that no module uses for itself."""
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise ValueError(f"name={name!r}: a non-empty name without dots and slashes")
    if name in dir(_RESERVED_NAMES):
        raise ValueError(f"name={name!r} is reserved: modules have an attribute of that name")


def check_child_names(model: nn.Module) -> None:
    """The two child names that the library uses must be free."""
    for path, m in named_base_modules(model):
        for key, kind in ((ADAPTERS_CHILD, AdapterStack), (SHARED_CHILD, SharedModules)):
            if key in m._modules and type(m._modules[key]) is not kind:
                raise ValueError(f"{join_path(path, key)!r} is a {type(m._modules[key]).__name__} of the model's own, where peftlab keeps adapters: rename it")


def check_dtype(dtype: object, name: str = "dtype") -> None:
    """Raise TypeError on what is neither None nor a floating dtype; `name` is that of the argument."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{name}={dtype!r}: a floating torch dtype such as torch.bfloat16")


def check_method(method: Method, site: Site, label: str) -> None:
    """What a built method needs of its site beyond shapes."""
    layer = original_class(site.host).__name__
    if site.rule.name == "opaque" and not method.opaque:
        raise ValueError(f"{label} needs the weight of {site.path!r}, a {layer} that only offers a call")
    if site.rule.name == "opaque" and site.read_only:
        raise ValueError(f"{site.path!r} is a {layer} that only offers a call, and the module that holds it reads its weight instead: exclude it")
    if method.in_place and is_quantized(site.host, site.param):
        raise ValueError(f"{label} would train {site.path!r} in place, whose weight is quantised: codes cannot be trained")
    if method.needs_data == "inputs" and not shows_inputs(site):
        raise ValueError(f"{label} starts from the inputs of {site.path!r}, which a {layer} does not show; exclude it or choose another start")
