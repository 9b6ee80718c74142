"""From a method and patterns to an adapted model: plan, build, calibrate, attach. A call that raises changes nothing."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlab import host as hosts
from peftlab.attach.calibrate import KEEP_BUFFERS, calibrate, observable
from peftlab.host import CHILD, SHARED, Recipe, Shape, Site, Stack, as_kind, bare, fenced_rng, paused_gc, saved_tensors, stacks, walk
from peftlab.method import Method
from peftlab.model.containers import CONTAINERS
from peftlab.model.layers import NeedsWeight, contents, holds_codes, is_opaque_linear, outline
from peftlab.model.patterns import PatternError, as_list, did_you_mean, show
from peftlab.registry import check_keywords, keywords, resolve
from peftlab.sites import Model, beside, ensure_module, join, refuse_inference_tensors, resolve_ties, select, settings, under
from peftlab.support.progress import Progress, check_progress, told
from peftlab.support.table import table

LEDGER = "_peftlab_ledger"

SAMPLES = 16  # entries of a base tensor that a ledger and a fingerprint remember


@dataclass
class Ledger:
    """What the root of a model remembers of its state before the first wrap, so that unwrap and save can tell what changed."""

    flags: dict[str, bool] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)  # small persistent buffers, whole
    marks: dict[str, tuple[int, Tensor | None]] = field(default_factory=dict)  # (version, samples) of parameters, (version, None) of large buffers
    targets: dict[str, dict] = field(default_factory=dict)  # adapter -> what the caller asked for

    @classmethod
    def of(cls, model: nn.Module) -> Ledger:
        """A new ledger of an untouched model."""
        self = cls()
        for path, m in walk(model):
            for n, p in m._parameters.items():
                if p is not None:
                    key = join(path, n)
                    self.flags[key] = p.requires_grad
                    self.mark(key, p, samples)
            for n, b in m._buffers.items():
                if b is not None and n not in m._non_persistent_buffers_set and not b.is_meta:
                    if b.numel() <= KEEP_BUFFERS:
                        self.buffers[join(path, n)] = b.detach().clone()
                    else:
                        self.mark(join(path, n), b, lambda _: None)
        return self

    def mark(self, key: str, t: Tensor, look: Callable[[Tensor], Tensor | None]) -> None:
        if not t.is_meta and type(t).__name__ != "DTensor":
            self.marks[key] = (t._version, look(t))

    def moved(self, key: str, t: Tensor) -> bool:
        """Whether a marked tensor was written to and holds other values than before wrap."""
        if key not in self.marks or t.is_meta or type(t).__name__ == "DTensor":
            return False
        version, before = self.marks[key]
        if t._version == version:
            return False
        if before is None:  # a large buffer may change where no sample is taken
            return True
        now = samples(t)
        return now.shape != before.shape or (now.dtype == before.dtype and not torch.equal(now, before.to(now.device)))


@functools.lru_cache(512)
def _positions(numel: int) -> Tensor:
    return torch.linspace(0, max(numel - 1, 0), min(SAMPLES, numel), dtype=torch.float64, device="cpu").round().long()


def samples(t: Tensor) -> Tensor:
    """Evenly spread entries of a tensor, (<= SAMPLES,); of a foreign one, of the first tensor that it wraps."""
    t = contents(t.detach())[0]
    flat = t.view(-1) if t.is_contiguous() else t.reshape(-1)
    positions = _positions if type(flat) is Tensor else _positions.__wrapped__  # what is made of fake tensors must not be cached
    return flat[positions(flat.shape[0]).to(t.device)]


def ledgers(model: nn.Module) -> list[tuple[str, nn.Module, Ledger]]:
    return [(path, m, m.__dict__[LEDGER]) for path, m in walk(model) if LEDGER in m.__dict__]


@dataclass
class Row:
    """One site of a plan."""

    path: str
    layer: str
    shape: tuple[int, ...]
    trainable: int
    bytes: int
    options: dict
    mode: str  # call | read


@dataclass
class Plan:
    """What `wrap` would do: rows, matches per pattern, exact counts. Printing it shows a table."""

    method: str
    name: str
    rows: list[Row]
    counts: dict[str, int]
    trainable: int
    total: int
    file_bytes: int
    given: tuple[str, ...] = ()  # the options that the caller set: what the table shows

    def __repr__(self) -> str:
        keys = sorted({k for r in self.rows for k in r.options})
        body = [(re.sub(r"\d+", "#", r.path), r.layer, r.shape, tuple(sorted(r.options.items(), key=str)), r.trainable, r.mode) for r in self.rows]
        groups: dict[tuple, list[Row]] = {}
        for key, row in zip(body, self.rows, strict=True):
            groups.setdefault(key, []).append(row)
        lines = []
        for rows in groups.values():
            r = rows[0]
            path = r.path if len(rows) == 1 else re.sub(r"\d+", "#", r.path)
            opts = " ".join(f"{k}={r.options[k]}" for k in keys if k in r.options and (k in self.given or k in ("r", "alpha")))
            lines.append((path or "(root)", r.layer, "x".join(map(str, r.shape)), len(rows), opts, r.mode, f"{sum(x.trainable for x in rows):,}"))
        head = ("site", "layer", "shape", "sites", "options", "mode", "trainable")
        share = 100 * self.trainable / self.total if self.total else 0.0
        found = ", ".join(f"{k!r}: {v}" for k, v in self.counts.items())
        return (
            f"{self.method} as {self.name!r} on {len(self.rows)} sites ({found})\n{table(head, lines, right=(3, 6))}\n"
            f"trainable {self.trainable:,} of {self.total:,} ({share:.3f} %), file {self.file_bytes:,} bytes + header"
        )


@dataclass
class _Request:
    """A checked call of wrap or plan, before anything is built."""

    model: Model
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

    def recipes(self, device: str) -> Iterator[Recipe]:
        """One recipe a distinct setting, shared by its sites; the shared module is built once."""
        common = self.common(device)
        later = functools.partial(self.common, "cpu") if common is not None and device == "meta" else None
        made: dict[str, Recipe] = {}
        for h in self.hypers:
            key = repr(sorted(h.items(), key=str))
            if key not in made:
                made[key] = Recipe(self.cls, self.label, h, self.name, self.seed, common, later)
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
        sites = self.sites if device != "meta" else [as_kind(s, Shape) for s in self.sites]
        wanted = self.shared_options
        with torch.no_grad(), hosts.on_device(device):
            made = build(sites, **{k: v for k, v in self.hypers[site].items() if k in wanted})
        return made if made is None else hosts.note_declared(made)

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


def _request(model, method, *, targets, exclude, layers, of, name, overrides, seed, dtype, tie, split, layout, read, hyper) -> _Request:
    ensure_module(model)
    model = bare(model)
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
    outside_disabled(model)
    check_children(model)
    check_name(name)
    if name in names(model):
        raise ValueError(f"this model already has an adapter {name!r}; give another name= or unwrap(model, {name!r}) first")
    view = Model.of(model)
    refuse_inference_tensors(model)
    if not any(m._parameters or m._buffers or is_opaque_linear(m) for m in view.modules.values()):
        raise ValueError(f"this {type(model).__name__} has no parameters: there is nothing to adapt")
    sites, counts = select(view, cls, label, targets, exclude, layers, of, split, layout, read)
    if cls.on != "module":
        sites = resolve_ties(view, sites, tie, label)
    sites = [*sites, *beside(view, cls, sites, hyper)]
    hypers = settings(view, sites, hyper, overrides, lambda h, where: check_keywords(cls, h, where))
    asked = {"targets": _plain(targets), "exclude": _plain(exclude), "layers": _plain(layers), "of": of}
    req = _Request(view, cls, label, name, sites, counts, hypers, seed, dtype, tie, asked)
    req.refuse_shared()
    return req


def _plain(value):
    """Patterns as they can be written into a file's header."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    return str(value)


_PROBE = Stack(read=False)


def check_name(name: object) -> None:
    """An adapter's name is one path component that no module uses for itself."""
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise ValueError(f"name={name!r}: a non-empty name without dots and slashes")
    if name in dir(_PROBE):
        raise ValueError(f"name={name!r} is reserved: modules have an attribute of that name")


def check_children(model: nn.Module) -> None:
    """The two child names that the library uses must be free."""
    for path, m in walk(model):
        for key, kind in ((CHILD, Stack), (SHARED, hosts.Shared)):
            if key in m._modules and type(m._modules[key]) is not kind:
                raise ValueError(f"{join(path, key)!r} is a {type(m._modules[key]).__name__} of the model's own, where peftlab keeps adapters: rename it")


def check_dtype(dtype: object, name: str = "dtype") -> None:
    """Raise TypeError on what is neither None nor a floating dtype; `name` is that of the argument."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{name}={dtype!r}: a floating torch dtype such as torch.bfloat16")


def outside_disabled(model: nn.Module, found: list | None = None) -> None:
    """Inside `disabled` the frozen tensors are in the adapted ones' place, inside `route` every row has its own: nothing may be changed or saved there."""
    for _, _, s in stacks(model) if found is None else found:
        if s.silent:
            raise ValueError(
                "inside `with disabled(model)` adapters cannot be changed or saved: leave the block first (a copy that was made inside "
                "has no block to leave: it stays a reference without adapters)"
            )
        if s.route is not None:
            raise ValueError("inside `with route(model, ...)` adapters cannot be changed or saved: leave the block first")


def names(model: nn.Module) -> list[str]:
    """The adapters of a model, in stacking order."""
    return survey(model)[1]


def survey(model: nn.Module) -> tuple[list[tuple[str, nn.Module, Stack]], list[str]]:
    """What `stacks` and `names` say, in one walk."""
    found, asked, there = [], {}, {}
    for path, m in walk(model):
        if LEDGER in m.__dict__:
            asked.update(dict.fromkeys(m.__dict__[LEDGER].targets))
        stack = m._modules.get(CHILD)
        if type(stack) is Stack:
            found.append((path, m, stack))
            there.update(stack.sites)
    return found, list(dict.fromkeys([*asked, *there]))


@paused_gc()
def plan(
    model: nn.Module, method: str | type[Method], *, targets=None, exclude=None, layers=None, of: str | None = None, name: str = "default",
    overrides: Mapping | None = None, data=None, loss=None, seed: int = 0, dtype: torch.dtype | None = None, tie: str | None = None,
    split: Mapping | None = None, layout: Mapping | None = None, read=None, **hyper,
) -> Plan:  # fmt: skip
    """What `wrap` with the same arguments would do; changes nothing and works on meta models."""
    req = _request(model, method, targets=targets, exclude=exclude, layers=layers, of=of, name=name, overrides=overrides, seed=seed, dtype=dtype,
                   tie=tie, split=split, layout=layout, read=read, hyper=hyper)  # fmt: skip
    return plan_of(req)


def plan_of(req: _Request) -> Plan:
    counted: dict[tuple, tuple[int, int]] = {}
    rows = []
    defaults = {k: p.default for k, p in keywords(req.cls).items()}
    with fenced_rng():
        recipes = list(req.recipes("meta"))
        for site, recipe in zip(req.sites, recipes, strict=True):
            key = (
                id(recipe),
                id(site.host) if site.kind == "module" else 0,
                site.rule.name,
                site.kind,
                site.n_out,
                site.n_in,
                site.shape,
                site.has_bias,
                site.dtype,
            )
            if key not in counted:
                method = recipe.build(as_kind(site, Shape), (), "meta")
                check_method(method, site, req.label)
                counted[key] = _count(method, site, req.default_dtype(site))
            n, size = counted[key]
            shape = site.shape if site.kind == "tensor" else (site.n_out, site.n_in)
            rows.append(Row(site.path, hosts.original_class(site.host).__name__, shape, n, size, {**defaults, **recipe.hyper}, "read" if site.read_only else "call"))
    shared = sum(b.numel() * b.element_size() for b in saved_tensors(recipes[0].common).values()) if recipes[0].common else 0
    extra = sum(p.numel() for p in hosts.trainable_parameters(recipes[0].common)) if recipes[0].common else 0
    given = tuple(sorted({k for h in req.hypers for k in h}))
    total = sum(outline(m, n).numel() for (m, n), *_ in req.model.owners.values())
    return Plan(req.label, req.name, rows, req.counts, sum(r.trainable for r in rows) + extra, total, sum(r.bytes for r in rows) + shared, given)


def _count(method: Method, site: Site, dtype: torch.dtype) -> tuple[int, int]:
    """(trainable entries, file bytes) of one method, floating tensors counted in the adapter's dtype."""
    if method.in_place:
        p = site.raw_tensor
        return p.numel(), p.numel() * p.element_size()
    width = torch.empty(0, dtype=dtype).element_size()
    size = sum(t.numel() * (width if t.is_floating_point() else t.element_size()) for t in saved_tensors(method).values())
    return sum(p.numel() for p in hosts.trainable_parameters(method)), size


@paused_gc()
@torch.inference_mode(False)  # what trains cannot be made inside it
def wrap(
    model: nn.Module, method: str | type[Method], *, targets=None, exclude=None, layers=None, of: str | None = None, name: str = "default",
    overrides: Mapping | None = None, data: Iterable | None = None, loss: Callable | None = None, seed: int = 0, dtype: torch.dtype | None = None,
    tie: str | None = None, split: Mapping | None = None, layout: Mapping | None = None, read=None, progress: Progress = None, **hyper,
) -> nn.Module:  # fmt: skip
    """Attach a method to the places of `model` that the patterns mean, freeze everything else, and return the same model.

    Args:
        model: any module; it is changed in place, and stays the same object of the same class.
        method: a name of the registry (`peftlab.methods()`) or a subclass of `peftlab.Method`.
        targets, exclude: patterns (see `peftlab.patterns`); by default the method's structural rule.
        layers, of: indices of the blocks to stay in, and the list they index (needed where a model has several).
        name: the adapter's name; methods stack in the order of their wrapping.
        overrides: pattern -> options, for sites that differ; the most specific pattern wins.
        data, loss: batches for starts that are computed from data, and `loss(model, batch)` where the model returns none. In a process
            group every process calls `wrap` with its share of the batches, and all get the start of all of them.
        seed: start values depend on it, the adapter's name and the site's path alone; the global generators are not touched.
        dtype: of the adapter's tensors; float32 by default (float64 on a float64 base).
        tie: "share" or "untie", needed where a targeted tensor is tied to another.
        split: pattern -> {part: rows} names row blocks of fused projections, which targets can then mean.
        layout: pattern -> "oi" | "io" | "eoi" | "eio" states the orientation of raw 2-D and 3-D parameters.
        read: patterns of layers whose weight is read without their being called.
        progress: True for bars (drawn by tqdm), or a function that is called as progress(done, total, path) after each site's start, for
            starts that take long; and as progress(batches, of how many or None, "data") after each batch, before the starts that are
            computed from data.
        **hyper: the method's own options.

    Raises:
        PatternError, ValueError, TypeError: with the value, the limit and the nearest right name; the model is then unchanged.
    """
    req = _request(model, method, targets=targets, exclude=exclude, layers=layers, of=of, name=name, overrides=overrides, seed=seed, dtype=dtype,
                   tie=tie, split=split, layout=layout, read=read, hyper=hyper)  # fmt: skip
    if loss is not None and not callable(loss):
        raise TypeError(f"loss={loss!r}: a function of (model, batch)")
    check_progress(progress)
    if data is not None and not isinstance(data, Iterable):
        raise TypeError(f"data={data!r}: an iterable of batches")
    with fenced_rng():
        methods = build(req, progress)
        if any(m.needs_data == "codes" for m in methods):
            raise ValueError(f"this start of {req.label} is found while the base is quantised: peftlab.wrap_quantized(model, kind, init=...) does both")
        if any(m.needs_data for m in methods):
            if data is None:
                raise ValueError(f"{req.label} computes its start from data: give data=, an iterable of batches")
            _calibrate(bare(model), list(zip(req.sites, methods, strict=True)), data, loss, progress)
    attach(bare(model), req, methods)
    return model


class _Loss:
    """The caller's loss where its gradients are asked for: one number, which must depend on the weights in some batch."""

    def __init__(self, loss: Callable):
        self.loss, self.values, self.depends = loss, 0, False

    def __call__(self, model: nn.Module, batch) -> Tensor:
        value = self.loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise TypeError(f"loss= returned {what}: one number, as the floating tensor that its gradient is taken of")
        self.values, self.depends = self.values + 1, self.depends or value.grad_fn is not None
        return value


def _calibrate(model: nn.Module, pairs: list[tuple[Site, Method]], data: Iterable, loss: Callable | None, progress: Progress) -> None:
    """`calibrate`, which says so where the loss has no gradient."""
    if loss is None or not any(m.needs_data == "gradients" for _, m in pairs):
        calibrate(model, pairs, data, loss, progress)
        return
    watched = _Loss(loss)
    try:
        calibrate(model, pairs, data, watched, progress)
    except ValueError as e:
        if watched.values and not watched.depends:
            raise ValueError("nothing that loss= returned depends on the weights: was it detached, or computed under torch.no_grad()?") from e
        raise


def build(req: _Request, progress: Progress = None) -> list[Method]:
    """The methods of a request with their start values; the model is not touched."""
    out = []
    recipes = list(req.recipes("meta" if all(s.device.type == "meta" for s in req.sites) else "cpu"))
    with told(progress, req.label) as tell:
        for site, recipe in zip(req.sites, recipes, strict=True):
            out.append(_built(req, site, recipe))
            tell(len(out), len(req.sites), site.path)
    return out


def _built(req: _Request, site: Site, recipe: Recipe) -> Method:
    """The method of one site."""
    stack = site.host._modules.get(CHILD)
    try:
        method = recipe.build(site, stack.links.weights if stack else (), "meta" if site.device.type == "meta" else "cpu")
    except NeedsWeight as e:
        raise ValueError(f"{req.label} needs the weight's values at {site.path!r}: {e}") from None
    check_method(method, site, req.label)
    if stack is not None and site.rule.name != "opaque" and any(s.rule.name == "opaque" for ps in stack.sites.values() for s, _ in ps):
        raise ValueError(f"{site.path!r} only offers a call, which an adapter there surrounds: {req.label} would have to be read")
    if stack is not None and site.rule.name == "opaque" and stack.read:
        raise ValueError(f"{site.path!r} only offers a call, and an adapter there is read: {req.label} cannot surround it")
    finish(method, site, req.default_dtype(site))
    return method


def check_method(method: Method, site: Site, label: str) -> None:
    """What a built method needs of its site beyond shapes."""
    layer = hosts.original_class(site.host).__name__
    if site.rule.name == "opaque" and not method.opaque:
        raise ValueError(f"{label} needs the weight of {site.path!r}, a {layer} that only offers a call")
    if site.rule.name == "opaque" and site.read_only:
        raise ValueError(f"{site.path!r} is a {layer} that only offers a call, and the module that holds it reads its weight instead: exclude it")
    if method.in_place and holds_codes(site.host, site.param):
        raise ValueError(f"{label} would train {site.path!r} in place, whose weight is quantised: codes cannot be trained")
    if method.needs_data == "inputs" and not observable(site):
        raise ValueError(f"{label} starts from the inputs of {site.path!r}, which a {layer} does not show; exclude it or choose another start")


def finish(method: Method, site: Site, dtype: torch.dtype) -> None:
    """Device, dtype and mode of a new method."""
    device = site.device
    plain = [t for t in (*method._parameters.values(), *method._buffers.values()) if t is not None]
    if method._modules or any(t.device != device or (t.is_floating_point() and t.dtype != dtype) for t in plain):
        method._apply(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))
    method.__dict__["training"] = site.host.training
    for m in method._modules.values():
        m.train(site.host.training)


def attach(model: nn.Module, req: _Request, methods: list[Method]) -> None:
    """The one step that changes the model; it does not fail."""
    ledger = model.__dict__.get(LEDGER)
    if ledger is None:
        inner = ledgers(model)
        ledger = Ledger.of(model)
        for path, _, old in inner:  # a part was wrapped before: its flags are older than ours
            ledger.flags |= {join(path, k): v for k, v in old.flags.items()}
        model.__dict__[LEDGER] = ledger
        if not inner:
            freeze_base(model)
        else:
            for path, m in walk(model):
                if not any(path == p or path.startswith(p + ".") or p == "" for p, _, _ in inner):
                    for p in m._parameters.values():
                        if p is not None:
                            p.requires_grad_(False)
    by_host: dict[int, list[tuple[Site, Method]]] = {}
    for site, method in zip(req.sites, methods, strict=True):
        by_host.setdefault(id(site.host), []).append((site, method))
    for pairs in by_host.values():
        stack = hosts.install(req.name, pairs)
        if any(t.is_meta for _, m in pairs for t in [*m.parameters(), *m.buffers()]):
            stack.unready.add(req.name)
        for site, method in pairs:
            if method.in_place:
                site.raw_tensor.requires_grad_(True)
            if site.tied and site.shared:
                hosts.follow(site)
            elif site.tied:
                stack.untied.setdefault(site.param)
    _unfuse(model, [s for s in req.sites if s.kind == "module"])
    common = methods[0].recipe.common
    if common is not None:
        if next(common.parameters(), None) is not None:  # what is trained has the adapter's precision; a constant keeps its own
            common.to(req.default_dtype(req.sites[0]))
        share(model, req.name, common, req.sites[0].device)
    ledger.targets[req.name] = req.asked


def _unfuse(model: nn.Module, sites: list[Site]) -> None:
    """Where a call is surrounded inside torch's encoder, its fused kernel must not run."""
    kinds = tuple(kind for kind, _, _ in hosts.FUSED)
    if not sites or not any(isinstance(m, kinds) for _, m in walk(model)):
        return
    parents = Model.of(model).parents
    for site in sites:
        above, todo = {}, [site.host]
        while todo:
            for p in parents.get(id(todo.pop()), ()):
                if id(p) not in above:
                    above[id(p)] = p
                    todo.append(p)
        hosts.unfuse(site, [m for m in above.values() if isinstance(m, kinds)])


def share(model: nn.Module, name: str, common: nn.Module, device: torch.device) -> None:
    """Keep an adapter's shared module once, at the root."""
    if isinstance(model, CONTAINERS):  # its class hides the child from those who iterate over it
        hosts.swap_in(model, False, ())
    holder = model._modules.get(SHARED)
    if holder is None:
        holder = model._modules[SHARED] = hosts.Shared()
        holder.training = model.training
    holder._modules[name] = common.to(device)


def freeze_base(model: nn.Module) -> None:
    for _, m in walk(model):
        for p in m._parameters.values():
            if p is not None:
                p.requires_grad_(False)


def adapter_modules(model: nn.Module, wanted: Iterable[str] | None = None) -> list[tuple[str, str, Site | None, nn.Module]]:
    """(adapter, path, site, module) of every method and shared module; paths are those of the saved tensors."""
    out = []
    for path, _, stack in stacks(model):
        stack.current()  # start values that are still to come are made now
        for name, pairs in stack.sites.items():
            if wanted is None or name in wanted:
                out += [(name, join(path, CHILD, name, s.key), s, m) for s, m in pairs]
    for path, m in walk(model):
        holder = m._modules.get(SHARED)
        for name, common in (holder._modules if holder is not None else {}).items():
            if wanted is None or name in wanted:
                out.append((name, join(path, SHARED, name), None, common))
    return out


def place(name: str, path: str, site: Site) -> str:
    """The site's path in the model whose tensors lie at `path`; `site.path` is that in the (part of the) model that was wrapped."""
    return join(path.removesuffix(join(CHILD, name, site.key)).rstrip("."), site.key)


def which(model: nn.Module, wanted: str | Iterable[str] | None) -> list[str]:
    """Adapter names as a list, in stacking order; unknown ones raise with the nearest right name."""
    return named(names(ensure_module(model)), wanted)


def named(there: list[str], wanted: str | Iterable[str] | None) -> list[str]:
    """Those of the names `there` that are wanted (None: all); unknown ones raise with the nearest right name."""
    if wanted is None:
        return there
    asked = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Iterable) else [wanted]
    for n in asked:
        if not isinstance(n, str):
            raise TypeError(f"adapters are named by a string or a list of strings, not {wanted!r}")
        if n not in there:
            raise ValueError(f"there is no adapter {n!r}; this model has {there or 'none'}.{did_you_mean(n, there)}")
    return [n for n in there if n in asked]


def set_trainable(model: nn.Module, wanted: str | Iterable[str] | None, flag: bool, targets=None) -> None:
    found = adapter_modules(model, which(model, wanted))
    if targets is not None:
        patterns, kept = as_list(targets), []
        at = dict(walk(model))
        for pattern in patterns:
            mine = [f for f in found if f[2] is not None and under(pattern, place(*f[:3]), at, f[2].host)]
            if not mine:
                there = [place(*f[:3]) for f in found if f[2] is not None]
                raise PatternError(f"{show(pattern)} matches none of the {len(there)} sites.{did_you_mean(str(pattern), there)}")
            kept += mine
        found = kept
    for _, _, site, m in found:
        for p in hosts.trainable_parameters(m):
            p.requires_grad_(flag)
        if site is not None and m.in_place:
            site.raw_tensor.requires_grad_(flag)


def freeze(model: nn.Module, *names: str, targets=None) -> None:
    """Stop training these adapters (all without names), only at the sites that `targets` means if it is given."""
    set_trainable(model, names or None, False, targets)


def unfreeze(model: nn.Module, *names: str, targets=None) -> None:
    """Train these adapters (all without names), only at the sites that `targets` means if it is given."""
    set_trainable(model, names or None, True, targets)


def train_only(model: nn.Module, *names: str) -> None:
    """Train these adapters and no others."""
    which(model, names)
    set_trainable(model, None, False)
    set_trainable(model, names, True)


__all__ = ["Plan", "Stack", "freeze", "plan", "train_only", "unfreeze", "wrap"]
