"""What training would cost: counts and bytes from shapes, activations and peak from one training step run without data.

Counts, file, gradient and optimizer bytes are exact. The step runs on a copy of the model whose tensors have shapes but no
memory (torch's fake tensors), and every tensor it would allocate is counted from birth to release; the model itself is not
touched. What a kernel takes for itself, and what the allocator rounds up, is not seen: `Estimate.ACTIVATION_ERROR` and
`Estimate.PEAK_ERROR` state how far that was off in benchmarks/estimate.py.

A 4-bit base (`base="nf4"` or "fp4") costs n / 2 bytes of codes and one scale for each block of 64; the scales take n / 64 bytes and 4
for each 256 of them with double quantisation (0.516 bytes an entry), 4 n / 64 bytes without (0.5625). An 8-bit base (`base="int8"`)
costs n bytes of codes and 4 for each row.
"""

from __future__ import annotations

import copy
import inspect
import math
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from peftlab import __version__
from peftlab.attach.calibrate import loss_of, run
from peftlab.formats.file import encode
from peftlab.formats.native import _settings, _site_facts, compares, fingerprint, surrounded
from peftlab.host import CHILD, SHARED, Shape, Site, as_kind, bare, changes_bias, fenced_rng, paused_gc, saved_tensors, stacks, trainable_parameters, walk
from peftlab.inspect.report import acts
from peftlab.method import Method
from peftlab.model import layers
from peftlab.model.patterns import PatternError, did_you_mean
from peftlab.quant.api import works_on_codes
from peftlab.quant.codes import DECODE, FORMATS, TILE, WIDE
from peftlab.quant.codes import outline as packed_outline
from peftlab.registry import resolve
from peftlab.sites import default_targets, ensure_module, identity, join
from peftlab.support.table import table
from peftlab.wrap import _Request, _request, attach, build, check_method


def _adafactor(shape: tuple[int, ...], width: int) -> int:
    # One mean a row and one a column of a matrix; a vector keeps every entry.
    n = math.prod(shape)
    return 4 + (width * (n // shape[-1] + n // shape[-2]) if len(shape) > 1 else width * n)


def _adamw8bit(shape: tuple[int, ...], width: int) -> int:
    # Two states of one byte and a float32 scale for each block of 256; small tensors keep float32 states.
    n = math.prod(shape)
    return 2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n


OPTIMIZERS: dict[str, Callable[[tuple[int, ...], int], int]] = {  # (shape of a tensor, bytes of a state entry) -> bytes of its state
    "sgd": lambda shape, width: 0,
    "sgd+momentum": lambda shape, width: width * math.prod(shape),
    "adam": lambda shape, width: 4 + 2 * width * math.prod(shape),  # torch keeps the step count of every tensor in a float32 tensor
    "adamw": lambda shape, width: 4 + 2 * width * math.prod(shape),
    "adagrad": lambda shape, width: 4 + width * math.prod(shape),
    "lion": lambda shape, width: width * math.prod(shape),
    "adafactor": _adafactor,
    "adamw8bit": _adamw8bit,
}


@dataclass
class Estimate:
    """The cost of one method on one model; every figure in bytes unless it says entries. Printing it shows a table.

    `base_bytes`, `adapter_bytes`, `gradient_bytes`, `optimizer_bytes` and `file_bytes` are exact; `file_bytes` is the whole file that
    `save` writes while nothing but the adapter has changed, `tensor_bytes` its tensors. `activation_bytes` is what one forward leaves
    for backward (inputs and outputs included), `step_bytes` the most that activations, gradients and temporaries take together at one
    moment of a step, `peak_bytes` that and everything that stays. These three are None where `note` says why.
    """

    ACTIVATION_ERROR = 0.10  # relative; the worst case of benchmarks/estimate.py is below it
    PEAK_ERROR = 0.15

    method: str
    can: tuple[str, ...]  # see `capabilities`
    sites: int
    trainable: int  # entries
    total: int  # entries of the base, tied tensors once
    base_bytes: int
    adapter_bytes: int
    tensor_bytes: int
    file_bytes: int
    trained_bytes: int  # of the trained tensors themselves, wherever they lie
    gradient_bytes: int
    optimizer_bytes: int  # states and, with master=True, the float32 copies
    optimizer: str
    activation_bytes: int | None = None
    step_bytes: int | None = None
    peak_bytes: int | None = None
    note: str = ""

    @property
    def bytes_per_trained(self) -> float:
        """Bytes of weight, gradient and optimizer for each trained entry."""
        return (self.trained_bytes + self.gradient_bytes + self.optimizer_bytes) / self.trainable if self.trainable else 0.0

    @property
    def static_bytes(self) -> int:
        """What stays allocated between two steps."""
        return self.base_bytes + self.adapter_bytes + self.optimizer_bytes

    def __repr__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        rows = [
            ("base", f"{self.base_bytes:,}", human(self.base_bytes), f"{self.total:,} entries"),
            ("adapter", f"{self.adapter_bytes:,}", human(self.adapter_bytes), f"{self.trainable:,} trainable ({share:.3f} %)"),
            ("gradients", f"{self.gradient_bytes:,}", human(self.gradient_bytes), ""),
            ("optimizer", f"{self.optimizer_bytes:,}", human(self.optimizer_bytes), self.optimizer),
            ("file", f"{self.file_bytes:,}", human(self.file_bytes), f"{self.tensor_bytes:,} of tensors"),
        ]
        if self.activation_bytes is not None:
            rows[4:4] = [
                ("activations", f"{self.activation_bytes:,}", human(self.activation_bytes), f"within {self.ACTIVATION_ERROR:.0%}"),
                ("largest of a step", f"{self.step_bytes:,}", human(self.step_bytes), "activations, gradients, temporaries"),
                ("peak", f"{self.peak_bytes:,}", human(self.peak_bytes), f"within {self.PEAK_ERROR:.0%}"),
            ]
        text = f"{self.method} on {self.sites} sites ({', '.join(self.can)})\n{table(('', 'bytes', '', ''), rows, right=(1, 2))}"
        return f"{text}\n{self.note}" if self.note else text


@dataclass
class Comparison(Sequence):
    """Estimates of several methods on one model; `refused` says why a method cannot be had. Printing it shows one table."""

    rows: list[Estimate]
    refused: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, i):
        return self.rows[i]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        head = ("method", "sites", "trainable", "%", "file", "gradients", "optimizer", "activations", "peak", "can")
        body = [
            (
                e.method, e.sites, f"{e.trainable:,}", f"{100 * e.trainable / max(e.total, 1):.3f}", human(e.file_bytes), human(e.gradient_bytes),
                human(e.optimizer_bytes), human(e.activation_bytes), human(e.peak_bytes), ", ".join(e.can),
            )
            for e in self.rows
        ]  # fmt: skip
        notes = dict.fromkeys(e.note for e in self.rows if e.note)
        return "\n".join([table(head, body, right=range(1, 9)), *(f"{m}: {why}" for m, why in self.refused.items()), *notes])


def human(n: int | None) -> str:
    """Bytes with a binary unit, "-" for None."""
    if n is None:
        return "-"
    power = min(max(n, 1).bit_length() - 1, 49) // 10
    return f"{n / 1024**power:.{0 if power == 0 else 2}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def capabilities(method: Method, shares: bool = False) -> tuple[str, ...]:
    """What a built method can do and what it needs, in words: the column that helps to choose."""
    out = {
        "merges": method.defined() and not method.in_place,
        "in any order": method.additive,  # stacks commute, and may be merged in part
        "changes the call": not method.defined(),
        "packed bases": method.opaque,  # works where only the layer's call is to be had
        "in place": method.in_place,
        f"data for its start ({method.needs_data})": method.needs_data is not None,
        "schedule": acts(method, "step") or acts(method, "penalty"),
        "shared tensors": shares,
    }
    return tuple(k for k, v in out.items() if v)


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
    want = _Want(optimizer, batch, length, inputs, loss, master, master if master_gradients is None else master_gradients, base, double_quant)
    if isinstance(method, (str, type)):
        return _estimate(model, method, want, where, hyper)
    found = Comparison([])
    for entry in method:
        what, own = entry if isinstance(entry, tuple) else (entry, {})
        shown = what if isinstance(what, str) else resolve(what)[2]
        resolve(what)  # an unknown name is a slip, not a method that does not fit
        given = {**where, **{k: v for k, v in own.items() if k in where}}
        options = {**hyper, **{k: v for k, v in own.items() if k not in where}}
        try:
            found.rows.append(_estimate(model, what, want, given, options))
        except (PatternError, ValueError, TypeError) as e:
            found.refused[shown] = str(e)
    if not found.rows:
        raise ValueError("; ".join(f"{k}: {v}" for k, v in found.refused.items()) or "method is an empty list")
    return found


@dataclass
class _Want:
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


def _estimate(model: nn.Module, method, want: _Want, where: dict, hyper: dict) -> Estimate:
    req = _request(bare(model), method, hyper=hyper, **where)
    facts = _Facts.of(req)
    frozen, largest = _base_bytes(req, facts, want)
    total, base_bytes = _held(bare(model))
    weights, gradients, states = want.trained(facts.trained)
    out = Estimate(
        facts.label, facts.can, len(req.sites), facts.trainable, total, base_bytes - frozen, facts.adapter_bytes, facts.tensor_bytes,
        facts.tensor_bytes + facts.header_bytes, weights, gradients, states, want.optimizer,
    )  # fmt: skip
    if want.inputs is None and want.length is None:
        out.note = "activation and peak memory: give length= (and batch=), or inputs="
        return out
    try:
        out.activation_bytes, step = _one_step(bare(model), method, want, where, hyper)
    except _Unknown as e:
        out.note = f"activation and peak memory are not known: {e}"
        return out
    extra = gradients - sum(math.prod(s) * d.itemsize for s, d in facts.trained)  # float32 gradients beside the step's own
    # AdamW forms one temporary of every trained tensor at once on an accelerator, of one tensor after the other on a CPU.
    sizes = [math.prod(s) * d.itemsize for s, d in facts.trained]
    update = gradients - extra + (2 * max(sizes, default=0) if _device(model).type == "cpu" else sum(sizes))
    out.step_bytes = max(step + largest, update)
    out.peak_bytes = out.static_bytes + extra + out.step_bytes
    return out


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _held(model: nn.Module) -> tuple[int, int]:
    """(entries of the base's parameters, bytes of everything the model holds), tied tensors once."""
    seen: dict[tuple, int] = {}
    for t in (*model.parameters(), *model.buffers()):
        seen.setdefault(identity(t), sum(u.numel() * u.element_size() for u in layers.contents(t)))
    own = {identity(p): layers.outline(m, n).numel() for _, m in walk(model) for n, p in m._parameters.items() if p is not None}
    return sum(own.values()), sum(seen.values())


def _base_bytes(req: _Request, facts: _Facts, want: _Want) -> tuple[int, int]:
    """(bytes that quantising the frozen linear weights saves, the largest tile of these weights that is decoded for a product)."""
    if want.base is None:
        return 0, 0
    saved = largest = 0
    done = set(facts.in_place)
    whole = [Site(m, p[0], rule=rule) for m, p in ((m, req.model.paths[k]) for k, m in req.model.modules.items()) if (rule := layers.rule_of(m))]
    for site in default_targets(req.model, [s for s in whole if s.rule is not layers.OPAQUE], _Linears):
        W = site.raw_tensor
        if identity(W) in done or not W.is_floating_point():
            continue
        done.add(identity(W))
        size = W.numel() * W.element_size()
        flip = isinstance(site.rule, layers.Conv1D) and works_on_codes(req.model, site)  # int8 has a scale for each row of the canonical matrix
        saved += size - packed_outline(tuple(W.shape[::-1] if flip else W.shape), W.dtype, want.base, None, want.double_quant).nbytes
        decoded = 0 if W.dtype == torch.float32 else 4 * min(W.numel(), DECODE)  # before it is rounded
        largest = max(largest, min(W.numel(), WIDE if W.is_cuda else TILE) * W.element_size() + decoded)
    return saved, largest


class _Linears(Method):
    """Stands for the quantiser in the question where linear weights are."""

    @classmethod
    def fits(cls, site) -> bool:
        return isinstance(site.rule, layers.Linear)


@dataclass
class _Kind:
    """One distinct method: what all its sites have in common."""

    method: Method
    trained: list[tuple[tuple[int, ...], torch.dtype]]
    held: int  # bytes in memory
    saved: dict[str, Tensor]
    prints: dict[str, dict]  # parameter it changes -> fingerprint

    @classmethod
    def of(cls, method: Method, site: Site) -> _Kind:
        """Fingerprints have the width of their shape, so those of meta tensors do."""
        values = compares(site, method)
        changed = [p for p in (site.param, site.bias if changes_bias(site, method) else None) if p and site.host._parameters.get(p) is not None]
        prints = {p: fingerprint(_shaped(layers.outline(site.host, p), "meta"), values) for p in changed}
        for path, m, p in surrounded(site.host) if site.kind == "module" else ():
            raw = layers.outline(m, p)
            prints[path] = fingerprint(_shaped(raw, "meta"), values and raw.is_floating_point())
        held = sum(t.numel() * t.element_size() for t in (*method.parameters(), *method.buffers()))
        return cls(method, _shapes(trainable_parameters(method)), held, saved_tensors(method), prints)


def _shapes(tensors: Iterable[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(t.shape), t.dtype) for t in tensors]


def _shaped(t: Tensor, device: str) -> Tensor:
    """A tensor of the same shape, layout and dtype without values."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


@dataclass
class _Facts:
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
    def of(cls, req: _Request) -> _Facts:
        """Build each distinct method once, on meta, and count; the header is written out as `save` would."""
        self = cls(req.label)
        kinds: dict[tuple, _Kind] = {}
        tensors: dict[str, Tensor] = {}
        base: dict[str, dict] = {}
        index: dict[int, int] = {}
        settings, sites = [], []
        note = types.SimpleNamespace(untied=())
        with fenced_rng():
            recipes = list(req.recipes("meta"))
            for site, recipe in zip(req.sites, recipes, strict=True):
                here = id(site.host) if site.kind == "module" else 0  # what surrounds a call may differ with what lies in it
                key = (id(recipe), here, site.rule.name, site.kind, site.n_out, site.n_in, site.shape, site.has_bias, site.dtype, site.param)
                if key not in kinds:
                    kinds[key] = _Kind.of(_built(req, site, recipe), site)
                kind, host_path = kinds[key], req.model.path(site.host)
                self._add(site, kind, host_path, join(host_path, CHILD, req.name, site.key), tensors)
                if index.setdefault(id(recipe), len(settings)) == len(settings):
                    settings.append(_settings(recipe))
                note.untied = (site.param,) if req.tie == "untie" else ()
                sites.append(_site_facts(host_path, site, index[id(recipe)], note))
                for param, found in kind.prints.items():
                    key = join(host_path, param)
                    base[key] = found if "values" in found else base.get(key, found)
        self._add_common(recipes[0].common, req.name, tensors)
        self.can = capabilities(kind.method, any(k.startswith(f"{SHARED}.") for k in tensors))
        self.tensor_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        entry = dict(name=req.name, settings=settings, sites=sites, method=req.label, seed=req.seed, active=True, trainable=True, asked=req.asked)
        self.header_bytes = len(encode(tensors, {"peftlab": __version__, "adapters": [entry], "base": base, "buffers": [], "included": []}))
        return self

    def _add(self, site: Site, kind: _Kind, host_path: str, prefix: str, tensors: dict[str, Tensor]) -> None:
        self.trained += kind.trained
        self.adapter_bytes += kind.held
        for k, t in kind.saved.items():
            tensors[f"{prefix}.{k}"] = t
        if kind.method.in_place:
            p = site.raw_tensor
            self.trained += _shapes([p])
            self.in_place.add(identity(p))
            tensors[join(host_path, site.param)] = _shaped(p, "meta")

    def _add_common(self, common: nn.Module | None, name: str, tensors: dict[str, Tensor]) -> None:
        if common is None:
            return
        self.trained += _shapes(trainable_parameters(common))
        self.adapter_bytes += sum(t.numel() * t.element_size() for t in (*common.parameters(), *common.buffers()))
        for k, t in saved_tensors(common).items():
            tensors[join(SHARED, name, k)] = t


def _built(req: _Request, site: Site, recipe) -> Method:
    """A method on meta as `wrap` would leave it."""
    method = recipe.build(as_kind(site, Shape), (), "meta")
    check_method(method, site, req.label)
    dtype = req.default_dtype(site)
    return method._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


class _Unknown(Exception):
    """Why a step cannot be run on shapes alone."""


class _Live(TorchDispatchMode):
    """Counts the bytes of every storage that is born inside, until it is released."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.meet(t)
        return out

    def meet(self, t: Tensor) -> None:
        s = t.untyped_storage()
        key, n = s._cdata, s.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += n
            self.peak = max(self.peak, self.now)
            weakref.finalize(s, self.release, key, n)

    def release(self, key: int, n: int) -> None:
        self.alive.discard(key)
        self.now -= n

    def know(self, t: Tensor) -> None:
        """Leave out a tensor that was there before the step."""
        self.alive.add(t.untyped_storage()._cdata)


def _one_step(model: nn.Module, method, want: _Want, where: dict, hyper: dict) -> tuple[int, int]:
    """(bytes alive after a forward, the most bytes alive at once) of one training step, beyond weights and optimizer."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        twin = _twin(model)
    except Exception as e:  # copying runs code of the model's own
        raise _Unknown(f"the model cannot be copied ({_said(e)})") from e
    req = _request(twin, method, hyper=hyper, **where)
    with fenced_rng():
        attach(twin, req, build(req))
        twin.train()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
                _embody(twin)
                return _run(twin, tree_map(lambda t: _shaped(t, "cpu") if isinstance(t, Tensor) else t, _batch(model, want)), want)
        except _Unknown:
            raise
        except Exception as e:  # a forward that looks at values, an operation without a shape rule, a batch that does not fit
            raise _Unknown(f"this model's step cannot run on shapes alone ({_said(e)})") from e


def _said(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"


def _run(twin: nn.Module, batch, want: _Want) -> tuple[int, int]:
    live = _Live()
    for t in (*twin.parameters(), *twin.buffers()):
        live.know(t)
    for t in tree_leaves(batch):
        if isinstance(t, Tensor):
            live.meet(t)
    with live:
        out = None if want.loss else run(twin, batch)
        loss = want.loss(twin, batch) if want.loss else _loss(twin, out)
        kept = live.now
        if not loss.requires_grad:
            raise _Unknown("no adapter is reached from the loss")
        loss.backward()
    return kept, live.peak


def _loss(model: nn.Module, out) -> Tensor:
    try:
        return loss_of(out)
    except ValueError:
        pass
    first = next((t for t in tree_leaves(dict(out) if isinstance(out, Mapping) else out) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if first is None:
        raise _Unknown("the model returns no floating tensor; give loss=")
    words = _embedding(model)
    if first.ndim > 1 and words is not None and first.shape[-1] == words.num_embeddings:
        return F.cross_entropy(first.flatten(0, -2), torch.zeros(first.shape[:-1].numel(), dtype=torch.long, device=first.device))
    return first.mean()


def _embedding(model: nn.Module) -> nn.Embedding | None:
    """The token embedding: the largest vocabulary."""
    return max((m for m in model.modules() if isinstance(m, nn.Embedding)), key=lambda m: m.num_embeddings, default=None)


def _batch(model: nn.Module, want: _Want):
    """The batch that was given, or token numbers for a model with a token embedding."""
    if want.inputs is not None:
        return dict(want.inputs) if isinstance(want.inputs, Mapping) else want.inputs
    if _embedding(model) is None:
        raise _Unknown("this model has no token embedding to make a batch for; give inputs=")
    ids = torch.zeros(want.batch, want.length, dtype=torch.long, device="meta")
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        return ids
    return {"input_ids": ids, "labels": ids} if "labels" in takes and _predicts_tokens(model) else {"input_ids": ids}


def _predicts_tokens(model: nn.Module) -> bool:
    """Whether labels have one entry a token: some layer outside the embedding has as many outputs as there are words."""
    words = _embedding(model).num_embeddings
    return any(getattr(m, "out_features", None) == words for m in model.modules())


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the model with tensors on meta and without the hooks, which are the user's."""
    memo = {}
    for m in model.modules():
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None:
                new = _shaped(t, "meta")
                memo[id(t)] = nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
    twin = copy.deepcopy(model, memo)
    for m in twin.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(m, kind).clear()
    return twin


def _embody(twin: nn.Module) -> None:
    """Put fake CPU tensors in place of the meta ones: kernels are chosen by device, and attention's choice decides what is kept."""
    new: dict[int, Tensor] = {}
    for m in twin.modules():
        for held in (m._parameters, m._buffers):
            for k, t in held.items():
                if t is None:
                    continue
                if id(t) not in new:
                    like = _shaped(t, "cpu")
                    new[id(t)] = nn.Parameter(like, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else like
                held[k] = new[id(t)]
        if isinstance(m, nn.RNNBase):
            m.__dict__["_flat_weights"] = [m._parameters.get(n) for n in m._flat_weights_names]
    for _, _, stack in stacks(twin):
        stack.unready.clear()  # start values are of no interest
        for pairs in stack.sites.values():
            for _, method in pairs:
                method.scheduled = True
