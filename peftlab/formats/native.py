"""peftlab's own format: save, load, and the fingerprint that ties an adapter to its base."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlab import host as hosts
from peftlab.formats.file import LoadError, encode, on_disk, read, write
from peftlab.host import CHILD, SHARED, Recipe, Shape, Site, as_kind, bare, changes_bias, fenced_rng, frozen, paused_gc, pristine, saved_tensors, stacks, walk
from peftlab.method import Method
from peftlab.model import layers
from peftlab.model.blocks import widths
from peftlab.model.patterns import as_list, did_you_mean, matches, nearest, show
from peftlab.registry import entries, keywords, resolve
from peftlab.sites import Model, ensure_module, identity, join, refuse_inference_tensors
from peftlab.switch import _changed_buffers
from peftlab.wrap import _Request, adapter_modules, attach, check_dtype, check_name, finish, ledgers, names, outside_disabled, samples, set_trainable, which


@dataclass
class SaveReport:
    """Bytes of a saved file: by adapter, of other things that were trained or changed, and of the header."""

    path: str
    bytes: int
    header_bytes: int
    adapters: dict[str, int]
    other: dict[str, int]

    def __repr__(self) -> str:
        parts = [f"{n}: {b:,}" for n, b in self.adapters.items()] + [f"{n}: {b:,}" for n, b in self.other.items()]
        return f"{self.path}: {self.bytes:,} bytes ({', '.join(parts)}, header: {self.header_bytes:,})"


@dataclass
class LoadReport:
    """What a load did."""

    path: str
    adapters: list[str]
    trainable: bool
    tensors: int
    unconsumed: list[str] = field(default_factory=list)
    unfilled: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)  # base tensors that were overwritten: heads, statistics

    def __repr__(self) -> str:
        state = "trainable" if self.trainable else "frozen"
        more = [f"{len(v)} {k}" for k, v in (("unconsumed", self.unconsumed), ("unfilled", self.unfilled)) if v]
        return f"{self.path}: adapters {self.adapters}, {self.tensors} tensors, {state}" + "".join(f", {m}" for m in more)


def fingerprint(t: Tensor, values: bool = True) -> dict:
    """Shape, dtype and evenly spread values (their bytes in base64) of a base tensor; zeros for a tensor on meta."""
    out = {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
    plain = layers.unwrapped(_whole(t.detach())) if values and t.numel() else None
    if plain is not None:
        found = samples(plain)
        found = torch.zeros(found.shape, dtype=t.dtype, device="cpu") if found.is_meta else found.cpu().contiguous()
        out["values"] = base64.b64encode(found.view(torch.uint8).numpy().tobytes()).decode()
    return out


def compares(site: Site, method: Method) -> bool:
    """Whether the frozen values below a method are part of what its file fits: not what it replaces, nor what nobody can read."""
    return not (method.replaces or (site.rule is layers.OPAQUE and not layers.foreign(site.raw_tensor)))


def _values(saved: dict) -> list[float]:
    data = bytearray(base64.b64decode(saved["values"]))
    return torch.frombuffer(data, dtype=getattr(torch, saved["dtype"])).double().tolist()


def _differs(path: str, saved: dict, t: Tensor) -> str | None:
    """How a base tensor differs from the one an adapter was trained on, or None."""
    if list(t.shape) != saved["shape"]:
        return f"{path!r} has shape {tuple(t.shape)}, the adapter's base had {tuple(saved['shape'])}"
    there = {} if "values" not in saved or t.is_meta else fingerprint(t)
    if "values" not in there:
        return None
    kinds = {saved["dtype"], str(t.dtype).removeprefix("torch.")}
    rel = 0.0 if len(kinds) == 1 else 2**-7 if "bfloat16" in kinds else 2**-10 if "float16" in kinds else 2**-22
    for a, b in zip(_values(saved), _values(there), strict=True):
        if a != b and not abs(a - b) <= rel * max(abs(a), abs(b)) and not (a != a and b != b):
            return f"{path!r} holds other values ({b:.6g} where the adapter's base had {a:.6g})"
    return None


def _whole(t: Tensor) -> Tensor:
    """The full tensor behind an FSDP2 shard (a collective call on every rank)."""
    return t.full_tensor() if type(t).__name__ == "DTensor" else t


def save(model: nn.Module, path: str | os.PathLike, names: str | Iterable[str] | None = None, include=None) -> SaveReport:
    """Write adapters, and whatever else was trained or changed since `wrap`, into one safetensors file.

    Args:
        names: the adapters to write (all by default).
        include: patterns of base parameters to write whole.

    Raises:
        ValueError: when a base parameter trains but is neither an adapter's nor included, or a tensor is an empty or partial shard.
    """
    root = bare(ensure_module(model))
    outside_disabled(root)
    chosen = which(root, names)
    if not chosen:
        why = "this model has no adapters" if names is None else f"names={names!r} means no adapter"
        raise ValueError(f"{why}: there is nothing to save")
    header, tensors, owner = describe(root, chosen, as_list(include) if include is not None else [])
    unreal = next((k for k, t in tensors.items() if t.is_meta), None)
    if unreal is not None:
        raise ValueError(f"{unreal!r} is on the meta device: it has no values to save")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return SaveReport(str(path), 0, 0, {}, {})  # every rank took part in gathering; one writes
    total, head = write(path, tensors, header)
    size = {k: t.numel() * t.element_size() for k, t in tensors.items()}
    by = {n: sum(size[k] for k, o in owner.items() if o == n) for n in chosen}
    return SaveReport(str(path), total, head, by, {k: size[k] for k, o in owner.items() if o is None})


def file_bytes(model: nn.Module, names: str | Iterable[str] | None = None) -> int:
    """The exact size of the file that `save` would write; works on meta models."""
    root = bare(ensure_module(model))
    header, tensors, _ = describe(root, which(root, names), [])
    return len(encode({k: on_disk(t) for k, t in tensors.items()}, header)) + sum(t.numel() * t.element_size() for t in tensors.values())


def describe(root: nn.Module, chosen: list[str], include: list) -> tuple[dict, dict[str, Tensor], dict[str, str | None]]:
    """(header, tensors by path, adapter that owns each) of what a save would write."""
    from peftlab import __version__

    tensors: dict[str, Tensor] = {}
    owner: dict[str, str | None] = {}

    def put(key: str, t: Tensor, name: str | None, shape=None) -> None:
        t = _whole(t)
        if t.numel() == 0 or (shape is not None and tuple(t.shape) != tuple(shape)):
            raise ValueError(f"{key!r} has shape {tuple(t.shape)} instead of {shape}: an empty or partial shard; gather the model before saving")
        tensors[key], owner[key] = t, name

    base: dict[str, dict] = {}
    adapters = {n: {"name": n, "settings": [], "sites": []} for n in chosen}
    hyper_index: dict[tuple[str, int], int] = {}
    for host_path, host, stack in stacks(root):
        stack.current()  # start values that are still to come are made now
        for name in [n for n in stack.order if n in chosen]:
            for site, method in stack.sites[name]:
                prefix = join(host_path, CHILD, name, site.key)
                for k, t in saved_tensors(method).items():
                    put(f"{prefix}.{k}", t, name, method.shapes.get(k))
                if method.in_place:
                    put(join(host_path, site.param), host._parameters[site.param], name)
                entry, recipe = adapters[name], method.recipe
                index = hyper_index.setdefault((name, id(recipe)), len(entry["settings"]))
                if index == len(entry["settings"]):
                    entry["settings"].append(_settings(recipe))
                    entry |= {"method": recipe.label, "seed": recipe.seed}
                trainable = any(p.requires_grad for p in method.parameters()) or method.in_place
                entry["active"] = name in stack.active
                entry["trainable"] = entry.get("trainable", False) or trainable
                entry["sites"].append(_site_facts(host_path, site, index, stack))
                values = compares(site, method)
                for path, m, param in surrounded(host) if site.kind == "module" else ():
                    key = join(host_path, path)
                    if key not in base:
                        raw = frozen(m, param)
                        base[key] = fingerprint(raw, values and raw.is_floating_point())
                for param in dict.fromkeys(p for p in (site.param, site.bias if changes_bias(site, method) else None) if p):
                    key = join(host_path, param)
                    if param not in host._parameters:
                        continue  # a layer that computes its weight: nothing to compare with
                    if key not in base or (values and "values" not in base[key]):
                        base[key] = fingerprint(frozen(host, param), values)
    for path, m in walk(root):
        holder = m._modules.get(SHARED)
        for name in chosen if holder is not None else ():
            for k, t in holder._modules[name].state_dict(keep_vars=True).items() if name in holder._modules else ():
                put(join(path, SHARED, name, k), t, name)
    for _, _, ledger in ledgers(root):
        for n in chosen:
            adapters[n]["asked"] = ledger.targets.get(n) or adapters[n].get("asked")
    buffers = _buffers(root)
    for key, t in buffers.items():
        put(key, t, None)
    included = _included(root, include, set(tensors), {identity(t) for t in tensors.values()})
    for key, t in included.items():
        put(key, t, None)
    header = {"peftlab": __version__, "adapters": list(adapters.values()), "base": base, "buffers": list(buffers), "included": list(included)}
    return header, tensors, owner


def surrounded(host: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(path below the host, module, name) of the first and the last parameters of a module whose call is surrounded: what is fingerprinted."""
    there = [(join(path, n), m, n) for path, m in walk(host) for n, p in m._parameters.items() if p is not None]
    return there if len(there) <= 4 else [*there[:2], *there[-2:]]


def _settings(recipe: Recipe) -> dict:
    defaults = {k: p.default for k, p in keywords(recipe.cls).items()}
    values = {**defaults, **recipe.hyper}
    try:
        plain = json.loads(json.dumps(values, default=list))
    except (TypeError, ValueError) as e:
        raise ValueError(f"the options of {recipe.label} cannot be written to a file: {values} ({e})") from None
    return {"options": plain, "at_default": [k for k in values if k not in recipe.hyper or recipe.hyper[k] == defaults.get(k)]}


def _rows(rows) -> object:
    return None if rows is None else {"from": rows.start, "to": rows.stop} if isinstance(rows, slice) else rows.tolist()


def _rows_back(rows) -> slice | Tensor | None:
    return None if rows is None else slice(rows["from"], rows["to"]) if isinstance(rows, dict) else torch.tensor(rows, device="cpu")


def _site_facts(host_path: str, s: Site, settings: int, stack) -> dict:
    tie = None if not s.tied else "share" if s.shared else "untie"
    facts = {
        "host": host_path, "key": s.key, "kind": s.kind, "param": s.param, "bias": s.bias, "rule": s.rule.name, "rows": _rows(s.rows),
        "bias_rows": _rows(s.bias_rows), "expert": s.expert, "transposed": s.transposed, "read": s.read_only, "size": [s.n_out, s.n_in],
        "shape": list(s.shape), "settings": settings, "tie": tie,
    }  # fmt: skip
    kinds = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)  # what merging files without the model must know of a layer
    layer = {k: getattr(s.host, k, None) for k in ("padding_idx", "groups")} if isinstance(s.host, kinds) else {}
    facts["layer"] = {k: v for k, v in layer.items() if isinstance(v, int)}
    return {k: v for k, v in facts.items() if k == "host" or not (v is None or v is False or v == "")}


def _buffers(root: nn.Module) -> dict[str, Tensor]:
    """Persistent base buffers that changed since wrap."""
    changed = {id(b) for b, _ in _changed_buffers(root)}
    known, found = ledgers(root), {}
    for path, m in walk(root):
        for n, b in m._buffers.items():
            key = join(path, n)
            shapes = [ledger.buffers[key].shape for path_, _, ledger in known if not path_ and key in ledger.buffers]
            if b is not None and shapes and b.shape != shapes[0]:
                raise ValueError(f"{key!r} has shape {tuple(b.shape)} instead of {tuple(shapes[0])}: an empty or partial shard; gather the model before saving")
            if b is not None and (id(b) in changed or _moved(known, key, b)):
                found[key] = b
    return found


def _moved(known: list, key: str, t: Tensor) -> bool:
    return any(ledger.moved(key.removeprefix(f"{path}.") if path else key, t) for path, _, ledger in known)


def _included(root: nn.Module, patterns: list, taken: set[str], stored: set[int]) -> dict[str, Tensor]:
    """Base parameters to be saved whole; one that trains or has been trained and that nobody saves raises."""
    found: dict[str, Tensor] = {}
    known, hit = ledgers(root), set()
    every = [(join(path, n), path, n, m) for path, m in walk(root) for n, p in m._parameters.items() if p is not None]
    for key, path, n, m in every:
        p = m._parameters[n]
        for pattern in patterns:
            if matches(pattern, key, m) or matches(pattern, path, m):
                found[key] = p
                hit.add(show(pattern))
        if key in taken or key in found or identity(p) in stored:  # the other end of a tied tensor that is saved
            continue
        state = "is trainable" if p.requires_grad else "was changed after wrap" if _moved(known, key, pristine(m, n)) else ""
        if state:
            raise ValueError(
                f"the base parameter {key!r} {state} but belongs to no adapter: it would be missing from the file. "
                f"Use wrap(model, 'full', targets={key!r}, name=...) to train a copy, or save(..., include={key!r}) to write it whole."
            )
    for pattern in patterns:
        if show(pattern) not in hit:
            raise ValueError(f"include: {show(pattern)} matches nothing.{did_you_mean(str(pattern), [k for k, *_ in every] + [path for _, path, *_ in every])}")
    return found


@paused_gc()
@torch.inference_mode(False)  # what trains cannot be made inside it
def load(
    model: nn.Module, path: str | os.PathLike, names: str | Iterable[str] | Mapping[str, str] | None = None, *, trainable: bool | None = None,
    strict: bool = True, allow_base_mismatch: bool = False, dtype: torch.dtype | None = None,
) -> LoadReport:  # fmt: skip
    """Attach the adapters of a file to a model (or fill adapters of the same name and settings that are there already, in place).

    Args:
        names: which adapters of the file (all by default); a mapping renames them.
        trainable: whether the loaded adapters train; by default new ones do and those that are there already stay as they are.
        strict: raise when a tensor of the file is not used or an adapter tensor is not in the file.
        allow_base_mismatch: load although the base is not the one the adapter was trained on.
        dtype: of the adapter's tensors; by default the file's.

    Raises:
        LoadError: with both name lists, counts and the nearest names; the model is then unchanged.
    """
    root = bare(ensure_module(model))
    outside_disabled(root)
    check_dtype(dtype)
    for what, flag in (("trainable", trainable), ("strict", strict), ("allow_base_mismatch", allow_base_mismatch)):
        if not isinstance(flag, bool) and not (what == "trainable" and flag is None):
            raise TypeError(f"{what}={flag!r}: True or False")
    header, tensors = read(path)
    there = {a["name"]: a for a in header["adapters"]}
    if names is not None and not isinstance(names, (str, Iterable)):
        raise TypeError(f"names={names!r}: a name, several, or a dict that renames them")
    if isinstance(names, Mapping):
        renamed = dict(names)
    else:
        asked = there if names is None else [names] if isinstance(names, str) else list(names)
        if not all(isinstance(n, str) for n in asked):
            raise TypeError(f"names={names!r}: adapters are named by strings")
        renamed = {n: n for n in asked}
    if not renamed:
        raise ValueError(f"names={names!r} means no adapter; {str(path)!r} holds {list(there)}")
    for new in renamed.values():
        check_name(new)
    if len(set(renamed.values())) < len(renamed):
        raise ValueError(f"names={names!r} gives two adapters one name")
    for n in renamed:
        if n not in there:
            raise LoadError(f"{str(path)!r} has no adapter {n!r}; it holds {list(there)}.{did_you_mean(n, there)}")
    view = Model.of(root)
    refuse_inference_tensors(root)
    try:
        if not allow_base_mismatch:
            _check_base(root, header, [there[n] for n in renamed])
        jobs = [_job(view, root, header, there[old], new, tensors, dtype) for old, new in renamed.items()]
        rest = _base_tensors(root, header)
    except LoadError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
        raise LoadError(f"{str(path)!r}: its header does not describe an adapter that can be built: {e}") from e
    used = {k for job in jobs for k in job.used} | rest.keys()
    others = [_owns(a) for n, a in there.items() if n not in renamed]
    unconsumed = sorted(k for k in tensors if k not in used and not any(owns(k) for owns in others))
    unfilled = sorted(k for job in jobs for k in job.unfilled)
    if strict and (unconsumed or unfilled):
        raise LoadError(_mismatch(unconsumed, unfilled))
    unreal = next((site.path for job in jobs for site in job.req.sites if site.device.type == "meta"), None)
    if unreal is not None:
        raise LoadError(f"{unreal!r} is on the meta device, where a file's values would be lost: give the model its tensors first, then load")
    # Only now, with everything checked, is the model touched.
    report = LoadReport(str(path), list(renamed.values()), False, len(used), unconsumed, unfilled)
    for job in jobs:
        job.commit(root, trainable)
    report.trainable = any(p.requires_grad for _, _, _, m in adapter_modules(root, report.adapters) for p in m.parameters())
    with torch.no_grad():
        for key, t in rest.items():
            t.copy_(tensors[key])
            report.replaced.append(key)
    return report


def _check_base(root: nn.Module, header: dict, adapters: list[dict]) -> None:
    params = {join(path, n): (m, n) for path, m in walk(root) for n, p in m._parameters.items() if p is not None}
    needed = {join(s["host"], p) for a in adapters for s in a["sites"] for p in (s.get("param"), s.get("bias")) if p}
    below = [f"{s['host']}." if s["host"] else "" for a in adapters for s in a["sites"] if s["kind"] == "module"]
    for key, saved in header["base"].items():
        if key not in needed and not any(key.startswith(b) for b in below):
            continue
        if key not in params:
            raise LoadError(f"the adapter was trained on {key!r}, which this model does not have.{did_you_mean(key, params)}")
        host, n = params[key]
        packed = n == "weight" and layers.is_opaque_linear(host) and not layers.foreign(host._parameters[n])
        wrong = None if packed else _differs(key, saved, frozen(host, n))
        if wrong:
            raise LoadError(f"this is not the base that the adapter was trained on: {wrong}. allow_base_mismatch=True loads it all the same.")


def _base_tensors(root: nn.Module, header: dict) -> dict[str, Tensor]:
    """The base's own tensors that the file replaces: changed buffers, included parameters, in-place trained ones."""
    there = {join(path, n): t for path, m in walk(root) for n, t in [*m._parameters.items(), *m._buffers.items()] if t is not None}
    wanted = [*header["buffers"], *header["included"], *(k for k in header["tensors"] if k in there and k not in header["buffers"])]
    out = {}
    for key in dict.fromkeys(wanted):
        if key not in there:
            raise LoadError(f"the file replaces {key!r}, which this model does not have.{did_you_mean(key, there)}")
        if list(there[key].shape) != header["tensors"][key][1]:
            raise LoadError(f"{key!r} has shape {tuple(there[key].shape)} here and {tuple(header['tensors'][key][1])} in the file")
        out[key] = there[key]
    return out


@dataclass
class _Job:
    """One adapter of a file, built and checked, ready to be attached."""

    req: _Request
    methods: list[Method]
    active: bool
    used: set[str]
    unfilled: list[str]
    writes: list[tuple[Tensor, Tensor]] | None  # (adapter tensor there, value) where the adapter exists already

    def commit(self, root: nn.Module, trainable: bool | None) -> None:
        if self.writes is not None:
            for _, _, stack in stacks(root):
                stack.current()  # start values that are still to come are made now, and not over the file's
            with torch.no_grad():
                for t, value in self.writes:
                    t.copy_(value)
            if trainable is not None:
                set_trainable(root, self.req.name, trainable)
            return
        attach(root, self.req, self.methods)
        set_trainable(root, self.req.name, trainable is not False)
        if not self.active:
            for _, _, s in stacks(root):
                if self.req.name in s.active:
                    s.set_active(tuple(n for n in s.active if n != self.req.name))


def _job(view: Model, root: nn.Module, header: dict, entry: dict, name: str, tensors: dict, dtype) -> _Job:
    cls = _class_of(entry["method"])
    hypers = [_options(cls, s, header["peftlab"]) for s in entry["settings"]]
    sites = _sites(view, entry)
    owns = _owns(entry)
    mine = {k: t for k, t in tensors.items() if owns(k)}
    tie = next((s.get("tie") for s in entry["sites"] if s.get("tie")), None)
    req = _Request(view, cls, entry["method"], name, sites, {}, [hypers[s["settings"]] for s in entry["sites"]], entry["seed"], dtype, tie, entry.get("asked") or {})
    if name in names(root):
        return _refill(root, req, entry, mine)
    used: set[str] = set()
    unfilled: list[str] = []
    methods = []
    with fenced_rng():
        recipes = list(req.recipes("cpu"))
        for site, recipe, facts in zip(sites, recipes, entry["sites"], strict=True):
            methods.append(_filled(site, recipe, facts, entry["name"], mine, used, unfilled, dtype))
        common = recipes[0].common
        prefix = f"{join(SHARED, entry['name'])}."
        if common is not None:
            _fill(common, prefix, mine, used, unfilled, next(iter(sites)).device, dtype)
    return _Job(req, methods, entry.get("active", True), used, unfilled, None)


def _owns(entry: dict) -> Callable[[str], bool]:
    """Whether a tensor is this adapter's, by the structure of its path: below one of its sites, or below its shared module."""
    prefixes = {join(s["host"], CHILD, entry["name"], s.get("key", "")) for s in entry["sites"]} | {join(SHARED, entry["name"])}

    def owns(key: str) -> bool:
        while key:
            if key in prefixes:
                return True
            key = key.rpartition(".")[0]
        return False

    return owns


def _mismatch(unconsumed: list[str], unfilled: list[str]) -> str:
    out = ["the file does not fit the adapter."]
    for what, keys, other in (("in the file but not used", unconsumed, unfilled), ("in the adapter but not in the file", unfilled, unconsumed)):
        if keys:
            close = [f"{k!r} (nearest: {', '.join(map(repr, nearest(k, other, 1))) or 'none'})" for k in keys[:5]]
            out.append(f"{len(keys)} {what}: {', '.join(close)}{' ...' if len(keys) > 5 else ''}.")
    return " ".join(out)


def _class_of(label: str) -> type[Method]:
    if ":" not in label:
        if label not in entries():
            raise LoadError(f"the file needs the method {label!r}, which this version does not have.{did_you_mean(label, entries())}")
        return resolve(label)[0]
    todo, seen = [Method], set()
    while todo:
        for c in todo.pop().__subclasses__():
            if f"{c.__module__}:{c.__qualname__}" == label:
                return c
            if c not in seen:
                seen.add(c)
                todo.append(c)
    raise LoadError(f"the file needs the class {label!r}; import it before loading (files never cause code to be imported)")


def _options(cls: type[Method], settings: dict, version: str) -> dict:
    known = keywords(cls)
    out = {}
    for k, v in settings["options"].items():
        if k in known:
            out[k] = v
        elif k not in settings["at_default"]:
            raise LoadError(f"{cls.__name__} has no option {k!r} (here {v!r}), which peftlab {version} wrote.{did_you_mean(k, known)}")
    return {k: v for k, v in out.items() if k not in settings["at_default"] or known[k].default != v}


def _sites(view: Model, entry: dict) -> list[Site]:
    by_path = {p: m for k, m in view.modules.items() for p in view.paths[k]}
    out = []
    for s in entry["sites"]:
        m = by_path.get(s["host"])
        if m is None:
            raise LoadError(f"the adapter {entry['name']!r} sits at {s['host']!r}, which this model does not have.{did_you_mean(s['host'], by_path)}")
        param = s.get("param")
        raw = layers.outline(m, param) if param else None
        rule = layers.rule_of(m) if s["rule"] != "matrix" else layers.MATRIX
        if param and (rule is None or (raw is None and rule is not layers.OPAQUE)):
            raise LoadError(f"{join(s['host'], param)!r}, which the adapter changes, is not in this model; a {type(m).__name__} is there")
        site = Site(
            m, join(s["host"], s.get("key", "")), s.get("key", ""), s["kind"], param, s.get("bias"), rule or layers.MATRIX, _rows_back(s.get("rows")),
            _rows_back(s.get("bias_rows")), s.get("expert"), s.get("transposed", False), s.get("read", False), n_out=s["size"][0], n_in=s["size"][1],
            shape=tuple(s["shape"]),
        )  # fmt: skip
        _check_size(site, raw)
        if s["kind"] == "matrix" and s["rule"] != "matrix" and not layers.surrounds(m, hosts.original_class(m)):
            site.read_only = True
        if s.get("tie"):
            site.shared = s["tie"] == "share"
            site.tied = tuple(o for o in view.owners.get(identity(m._parameters[param]), ()) if o[0] is not m or o[1] != param)
        out.append(site)
    return out


def _check_size(site: Site, raw: Tensor | None) -> None:
    if site.kind == "module":
        there, wanted = widths(site.host)[::-1], (site.n_out, site.n_in)
    elif site.kind == "tensor":
        there, wanted = tuple(raw.shape), site.shape
    elif site.rule is layers.OPAQUE:
        there, wanted = layers.features(site.host, site.rule, raw), (site.n_out, site.n_in)
    else:
        probe = Site(**{**vars(site), "rows": None})
        there = tuple(probe.get(probe.part(torch.empty(raw.shape, device="meta"))).shape)
        wanted = (site.n_out, site.n_in) if site.rows is None else (there[0], site.n_in)
    if there != wanted:
        raise LoadError(f"{site.path!r} has size {there} in this model and {wanted} in the file")


def _filled(site: Site, recipe: Recipe, facts: dict, name: str, mine: dict, used: set, unfilled: list, dtype) -> Method:
    """The method with the file's tensors in it; start values are computed only where the file does not give them."""
    prefix = f"{join(facts['host'], CHILD, name, site.key)}."
    method = recipe.build(as_kind(site, Shape), (), "meta")
    missing: list[str] = []
    device = torch.device("cpu") if site.device.type == "meta" else site.device
    _fill(method, prefix, mine, used, missing, device, dtype)
    if any(t.is_meta for t in [*method.parameters(), *method.buffers()]):
        fresh = recipe.build(site)
        finish(fresh, site, dtype or torch.promote_types(torch.float32, site.dtype))
        _fill(fresh, prefix, mine, used, [], device, dtype)
        method = fresh
    unfilled += missing
    method.training = site.host.training
    return method


def _fill(module: nn.Module, prefix: str, mine: dict, used: set, missing: list, device, dtype) -> None:
    for sub_path, m in module.named_modules():
        for table, is_param in ((m._parameters, True), (m._buffers, False)):
            for k, t in table.items():
                if t is None or (not is_param and k in m._non_persistent_buffers_set):
                    continue
                key = prefix + join(sub_path, k)
                value = mine.get(key)
                if value is None:
                    missing.append(key)
                    continue
                if value.shape != t.shape:
                    raise LoadError(f"{key!r} has shape {tuple(value.shape)} in the file; the adapter needs {tuple(t.shape)}")
                used.add(key)
                # A copy of its own: the reader's memory is aligned otherwise, which changes the last bits of vectorised sums.
                value = value.to(device, dtype if dtype and value.is_floating_point() else value.dtype, copy=True)
                table[k] = nn.Parameter(value, requires_grad=t.requires_grad) if is_param else value


def _refill(root: nn.Module, req: _Request, entry: dict, mine: dict) -> _Job:
    """Values for an adapter that is there already: same method, settings and places, or an error."""
    old = entry["name"]
    there = {(path, s.key): (s, m) for path, _, st in stacks(root) for s, m in st.sites.get(req.name, ())}
    if any(req.name in st.merged for _, _, st in stacks(root)):
        raise LoadError(f"the adapter {req.name!r} is merged: unmerge it before its tensors are overwritten")
    wanted = {(s["host"], s.get("key", "")): i for i, s in enumerate(entry["sites"])}
    if there.keys() != wanted.keys():
        odd = sorted(join(*k) for k in there.keys() ^ wanted.keys())
        raise LoadError(f"this model already has an adapter {req.name!r} at other places ({odd[0]!r} and {len(odd) - 1} more); unwrap it, or load under another name")
    used, missing, writes = set(), [], []
    for key, (_, m) in there.items():
        want = req.hypers[wanted[key]]
        have = _settings(m.recipe)["options"]
        want = _settings(Recipe(req.cls, req.label, want, req.name, req.seed))["options"]
        if m.recipe.label != req.label or have != want:
            odd = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
            raise LoadError(
                f"this model already has an adapter {req.name!r} with other settings ({m.recipe.label}, {', '.join(odd)}); unwrap it, or load under another name"
            )
        prefix = f"{join(key[0], CHILD, old, key[1])}."
        for k, t in saved_tensors(m).items():
            value = mine.get(prefix + k)
            if value is None:
                missing.append(prefix + k)
            elif value.shape != t.shape:
                raise LoadError(f"{prefix + k!r} has shape {tuple(value.shape)} in the file; the adapter has {tuple(t.shape)}")
            else:
                used.add(prefix + k)
                writes.append((t, value))
    for _, m in walk(root):
        holder = m._modules.get(SHARED)
        for k, t in holder._modules[req.name].state_dict(keep_vars=True).items() if holder is not None and req.name in holder._modules else ():
            key = join(SHARED, old, k)
            if key in mine:
                used.add(key)
                writes.append((t, mine[key]))
    return _Job(req, [m for _, m in there.values()], True, used, missing, writes)


__all__ = ["LoadError", "LoadReport", "SaveReport", "fingerprint", "load", "save"]
