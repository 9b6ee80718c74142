"""From patterns to sites: which parameters and modules of a model a method will sit at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlab.host import CHILD, Site, original_class, runs_whole, walk
from peftlab.method import Method
from peftlab.model import layers
from peftlab.model.blocks import widths
from peftlab.model.patterns import Matcher, PatternError, as_list, did_you_mean, matches, show, specificity, spells_last
from peftlab.model.places import PLACES, blocks, head
from peftlab.registry import names as registered
from peftlab.registry import resolve


@dataclass
class Model:
    """One walk over a model: its modules with all their paths, their parents, and which storages are shared."""

    root: nn.Module
    paths: dict[int, list[str]] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    parents: dict[int, list[nn.Module]] = field(default_factory=dict)
    owners: dict[tuple, list[tuple[nn.Module, str]]] = field(default_factory=dict)  # identity of a tensor -> (module, parameter)
    at: dict[str, nn.Module] = field(default_factory=dict)  # path -> module

    @classmethod
    def of(cls, root: nn.Module) -> Model:
        self = cls(root)
        for path, m in walk(root, duplicates=True):
            self.at[path] = m
            known = id(m) in self.paths
            self.paths.setdefault(id(m), []).append(path)
            self.modules[id(m)] = m
            if path:
                self.parents.setdefault(id(m), []).append(self.at[path.rpartition(".")[0]])
            if not known:
                for name, p in m._parameters.items():
                    if isinstance(p, nn.parameter.UninitializedParameter):
                        raise ValueError(f"{path!r} is a {type(m).__name__} whose shape is not known yet: run one batch through the model first")
                    if p is not None:
                        self.owners.setdefault(identity(p), []).append((m, name))
        return self

    def path(self, m: nn.Module) -> str:
        return self.paths[id(m)][0]

    def place(self, name: str) -> list[nn.Module]:
        """The modules of a structural name."""
        return PLACES[name](self)


def storage(t: Tensor) -> int:
    """An identity of the memory behind a tensor, real or meta."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(t)


def identity(t: Tensor) -> tuple:
    """The same for two tensors that are views of the same entries in the same order; parts of one flat buffer differ."""
    memory = storage(t)
    return (memory,) if memory == id(t) else (memory, t.storage_offset(), tuple(t.shape), t.stride())


def extent(t: Tensor) -> tuple[int, int]:
    """The first entry of its memory that a tensor uses, and one past the last."""
    return t.storage_offset(), t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1


def join(*parts: str) -> str:
    return ".".join(p for p in parts if p)


# ---------------------------------------------------------------- what there is


def candidates(model: Model, cls: type[Method], split: Mapping, layout: Mapping, read: list) -> Iterable[Site]:
    """Every place where a method of this kind could sit, whether or not it fits there."""
    used = Counter()
    for key, m in model.modules.items():
        paths = model.paths[key]
        if cls.on == "module":
            uncalled = any(isinstance(p, UNCALLING) for p in model.parents.get(key, ()))
            if not uncalled and original_class(m).forward is not nn.Module.forward:  # as a list of modules has none
                yield _called(model, m)
        elif cls.on == "tensor":
            yield from _tensors(m, paths, _is_read(model, m, read, used))
        else:
            yield from _matrices(m, paths, split, layout, _is_read(model, m, read, used), used)
    for what, given in (("split", split), ("layout", layout), ("read", dict.fromkeys(read))):
        if given and cls.on != "matrix" and what != "read":
            raise ValueError(f"{what}={given!r} says something about matrices, and {cls.__name__} acts on {'whole tensors' if cls.on == 'tensor' else 'calls'}")
        for pattern in given:
            if not used[what, show(pattern)]:
                raise PatternError(f"{what}: {show(pattern)} {_why_unused(model, pattern, what)}")


def _why_unused(model: Model, pattern, what: str) -> str:
    hit = next((m for p, m in model.at.items() if p and matches(pattern, p, m)), None)
    if what == "layout" and hit is not None:
        return f"is a {original_class(hit).__name__}: only raw parameters with two or three dimensions have a layout to state"
    return f"matches nothing.{did_you_mean(str(pattern), [p for ps in model.paths.values() for p in ps if p])}"


def _called(model: Model, m: nn.Module) -> Site:
    """A module whose call is surrounded."""
    paths, (n_in, n_out) = model.paths[id(m)], widths(m)
    whole = m is model.root and len(model.modules) > 1  # "*" means what is in a model, not the model
    rule = layers.rule_of(m) or layers.MATRIX
    return Site(m, paths[0], kind="module", param=None, rule=rule, names=tuple(paths), explicit=whole, n_out=n_out, n_in=n_in)


def _tensors(m: nn.Module, paths: list[str], read_only: bool) -> Iterable[Site]:
    ancestors = tuple(a for path in paths for a in _ancestors(path))
    read_only = read_only or not runs_whole(m)
    for name in m._parameters:
        p = layers.outline(m, name)
        if p is not None and p.is_floating_point() and not layers.foreign(p):
            own = tuple(join(path, name) for path in paths)
            yield Site(m, own[0], name, "tensor", name, names=own + ancestors, shape=tuple(p.shape), read_only=read_only)


def _is_read(model: Model, m: nn.Module, read: list, used: Counter) -> bool:
    """Whether this module's weight is read without the module being called, by a parent we know or as the caller says."""
    wanted = [p for p in read if any(matches(p, path, m) for path in model.paths[id(m)])]
    used.update(("read", show(p)) for p in wanted)
    return bool(wanted) or _reads_children(model, m)


def _ancestors(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _matrices(m: nn.Module, paths: list[str], split: Mapping, layout: Mapping, read_only: bool, used: Counter) -> Iterable[Site]:
    cls = original_class(m)
    rule = layers.rule_of(m)
    covered: set[str] = set()
    if rule is not None:
        covered |= {"weight", "bias"}
        bias = rule.bias if rule.bias and m._parameters.get(rule.bias) is not None else None
        surround = rule.call and layers.surrounds(m, cls) and not read_only
        raw = layers.outline(m, rule.weight)
        n_out, n_in = layers.features(m, rule, raw)
        shape = tuple(raw.shape) if raw is not None and rule is not layers.OPAQUE else (n_out, n_in)
        names = tuple(paths) + tuple(join(p, "weight") for p in paths)
        whole = Site(m, paths[0], "", "matrix", "weight", bias, rule, n_out=n_out, n_in=n_in, shape=shape, names=names, read_only=not surround)
        whole.explicit = any(matches(pattern, p, m) for pattern in split for p in paths)  # its parts are meant, unless it is called by its name
        yield whole
        taken: set[int] = set()
        for pattern, parts in split.items():
            if any(matches(pattern, p, m) for p in paths):
                used["split", show(pattern)] += 1
                yield from _slices(whole, paths, parts, pattern, taken)
    if issubclass(cls, nn.MultiheadAttention):
        covered |= {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
        yield from _attention(m, paths)
    if issubclass(cls, (nn.RNNBase, nn.RNNCellBase)):
        covered |= {n for n in m._parameters if n.startswith("weight")}
        for name in [n for n in m._parameters if n.startswith("weight")]:
            bias = name.replace("weight", "bias")
            bias = bias if m._parameters.get(bias) is not None else None
            names = tuple(join(p, name) for p in paths) + tuple(paths)
            yield _raw(m, join(paths[0], name), name, bias, names)
    for name in m._parameters:
        p = layers.outline(m, name)
        if p is None or name in covered or p.ndim < 2 or not p.is_floating_point() or layers.foreign(p):
            continue
        yield from _raw_parameter(m, paths, name, p, layout, used)


def _raw(m: nn.Module, path: str, name: str, bias: str | None, names: tuple[str, ...], **more) -> Site:
    p = layers.outline(m, name)
    n_out, n_in = layers.features(m, layers.MATRIX, p)
    facts = dict(n_out=n_out, n_in=n_in, shape=tuple(p.shape), read_only=True) | more
    return Site(m, path, path.rpartition(".")[2] if "." in path else path, "matrix", name, bias, layers.MATRIX, names=names, **facts)


def _raw_parameter(m: nn.Module, paths: list[str], name: str, p: Tensor, layout: Mapping, used: Counter) -> Iterable[Site]:
    """A parameter that belongs to no known layer: a matrix as it is, or one matrix an expert, orientation stated by `layout`."""
    own = [join(path, name) for path in paths]
    order = None
    for pattern, value in layout.items():
        if any(matches(pattern, q, m) for q in own):
            used["layout", show(pattern)] += 1
            order = value
    if order is None and p.ndim == 3 and isinstance(getattr(m, "is_transposed", None), bool):
        order = "eio" if m.is_transposed else "eoi"
    allowed = {2: ("oi", "io"), 3: ("eoi", "eio", "flat")}.get(p.ndim, ())
    if order is not None and order not in allowed:
        raise ValueError(f"layout {order!r} of {own[0]!r} with {p.ndim} dimensions: one of {', '.join(map(repr, allowed)) or 'none'}")
    flip = order in ("io", "eio")
    if order in (None, "flat") or p.ndim == 2:
        n_out, n_in = (p.shape[1], p.shape[0]) if flip else layers.features(m, layers.MATRIX, p)
        yield Site(
            m,
            own[0],
            name,
            "matrix",
            name,
            None,
            layers.MATRIX,
            transposed=flip,
            names=tuple(own),
            explicit=True,
            unstated=order is None and p.ndim == 3,
            n_out=n_out,
            n_in=n_in,
            shape=tuple(p.shape),
            read_only=True,
        )
        return
    n_out, n_in = (p.shape[2], p.shape[1]) if flip else (p.shape[1], p.shape[2])
    for e in range(p.shape[0]):
        names = tuple(f"{q}.{e}" for q in own) + tuple(own)
        yield Site(
            m,
            f"{own[0]}.{e}",
            f"{name}.{e}",
            "matrix",
            name,
            None,
            layers.MATRIX,
            expert=e,
            transposed=flip,
            names=names,
            explicit=True,
            n_out=n_out,
            n_in=n_in,
            shape=tuple(p.shape[1:]),
            read_only=True,
        )


def _attention(m: nn.MultiheadAttention, paths: list[str]) -> Iterable[Site]:
    """q, k and v of nn.MultiheadAttention one by one, under the same names whether or not they share one parameter."""
    e = m.embed_dim
    bias = "in_proj_bias" if m._parameters.get("in_proj_bias") is not None else None
    for i, part in enumerate("qkv"):
        key = f"{part}_proj"
        param, rows = ("in_proj_weight", slice(i * e, (i + 1) * e)) if m._qkv_same_embed_dim else (f"{key}_weight", None)
        n_in = layers.outline(m, param).shape[1]
        names = tuple(join(p, key) for p in paths) + tuple(paths) + (() if m._qkv_same_embed_dim else tuple(join(p, param) for p in paths))
        part_of_bias = slice(i * e, (i + 1) * e)  # one tensor of 3 e entries either way
        yield Site(
            m,
            join(paths[0], key),
            key,
            "matrix",
            param,
            bias,
            layers.MATRIX,
            rows,
            part_of_bias,
            names=names,
            n_out=e,
            n_in=n_in,
            shape=(e, n_in),
            read_only=True,
        )
    if m._qkv_same_embed_dim:
        names = tuple(join(p, "in_proj_weight") for p in paths)
        yield Site(
            m,
            join(paths[0], "in_proj_weight"),
            "in_proj_weight",
            "matrix",
            "in_proj_weight",
            bias,
            layers.MATRIX,
            names=names,
            explicit=True,
            n_out=3 * e,
            n_in=e,
            shape=(3 * e, e),
            read_only=True,
        )


def _reads_children(model: Model, m: nn.Module) -> bool:
    """Whether a parent reads this module's weight without calling it: attention's out_proj, the encoder layer's fused path."""
    return any(isinstance(p, READERS) for p in model.parents.get(id(m), ()))


# torch's own modules that read a child's weight: attention its out_proj, the encoder layer's fused path all of its children.
UNCALLING = (nn.MultiheadAttention, *filter(None, [getattr(nn, "LinearCrossEntropyLoss", None)]))  # they call none of their children
READERS = (*UNCALLING, nn.TransformerEncoderLayer)


def _slices(whole: Site, paths: list[str], parts: Mapping, pattern, taken: set[int]) -> Iterable[Site]:
    """The named row blocks of a fused projection; sizes in order, or explicit rows (for interleaved heads). `taken` gains their rows."""
    start = 0
    for name, size in parts.items():
        where = f"split {show(pattern)}: {name!r} = {size!r}"
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"{where}: a part has a non-empty name without dots")
        if isinstance(size, int) and not isinstance(size, bool):
            rows, picked = slice(start, start + size), list(range(start, start + size))
            start += size
        else:
            rows = _picked(whole.n_out, size, where)
            picked = rows.tolist()
        bad = not picked or len(set(picked)) < len(picked) or max(picked) >= whole.n_out or not taken.isdisjoint(picked)
        if bad:
            raise ValueError(f"{where} does not fit beside the others in the {whole.n_out} rows of {whole.path!r}")
        taken |= set(picked)
        names = tuple(join(p, name) for p in paths)
        facts = {"n_out": len(picked), "n_in": whole.n_in, "shape": (len(picked), whole.n_in), "read_only": whole.read_only}
        yield Site(whole.host, join(paths[0], name), name, "matrix", whole.param, whole.bias, whole.rule, rows, names=names, **facts)
    if all(isinstance(s, int) for s in parts.values()) and start != whole.n_out:
        raise ValueError(f"split {show(pattern)}: the sizes sum to {start}, but {whole.path!r} has {whole.n_out} rows")


def _picked(n: int, rows: object, where: str) -> Tensor:
    """Explicit rows (indices, a mask, a slice, a range) as indices into n rows."""
    try:
        index = rows if isinstance(rows, slice) else rows.cpu() if isinstance(rows, Tensor) else torch.as_tensor(list(rows), device="cpu")
        if isinstance(index, Tensor) and index.dtype != torch.bool and bool((index < 0).any()):
            raise IndexError(rows)
        return torch.arange(n, device="cpu")[index].reshape(-1)
    except (TypeError, ValueError, IndexError, RuntimeError):
        raise ValueError(f"{where}: give a size, or rows among 0..{n - 1}") from None


# ---------------------------------------------------------------- which of it


def select(model: Model, cls: type[Method], label: str, targets, exclude, chosen, of, split, layout, read) -> tuple[list[Site], dict[str, int]]:
    """The sites that the patterns mean, and how many each pattern matched."""
    split, layout = _mapping("split", split), _mapping("layout", layout)
    for pattern, parts in split.items():
        if not isinstance(parts, Mapping):
            raise TypeError(f"split: {show(pattern)} maps to {parts!r}; give the parts as a dict of sizes or rows")
    there = list(candidates(model, cls, split, layout, as_list(read) if read is not None else []))
    return select_from(model, cls, label, there, targets, exclude, chosen, of)


def select_from(model: Model, cls: type[Method], label: str, there: list[Site], targets, exclude, chosen=None, of=None) -> tuple[list[Site], dict[str, int]]:
    """Those of the sites `there` that the patterns mean, and how many each pattern matched."""
    if of is not None and not (isinstance(of, (str, re.Pattern))):
        raise TypeError(f"of={of!r}: the path of a list of layers")
    counts: dict[str, int] = {}
    if targets is None:
        found = [s for s in default_targets(model, there, cls) if cls.fits(s)]
        _refuse_head_alone(model, cls, label, there, found)
        if not found:
            raise PatternError(
                f"{label} finds nothing to sit at by default in this {type(model.root).__name__}; say targets={cls.elsewhere or '...'}"
                + _alternatives(model, list(model.modules.values()))
            )
        counts["(default)"] = len(found)
    else:
        found = _matched(model, cls, label, there, as_list(targets), counts)
    if exclude is not None:
        found = _without(model, found, there, as_list(exclude))
    if chosen is not None:
        found = _in_layers(model, found, chosen, of)
    elif of is not None:
        raise ValueError("of= says whose layers are meant: give layers= too")
    if not found:
        raise PatternError(f"nothing is left for {label}: exclude= or layers= took away every site of {counts}")
    _refuse_overlap(found, label)
    _refuse_unstated(found)
    return found, counts


def _refuse_unstated(found: list[Site]) -> None:
    site = next((s for s in found if s.unstated), None)
    if site is not None:
        raise ValueError(
            f"{site.path!r} has the shape {site.shape}: say layout={{{site.path!r}: ...}} with 'eoi' or 'eio' for one matrix (n_out, n_in) or (n_in, n_out) an "
            "expert, or 'flat' for one matrix whose rows are the first dimension"
        )


def _refuse_overlap(found: list[Site], label: str) -> None:
    """One adapter does not change a weight twice: as a whole and by its parts."""
    whole = {(id(s.host), s.param): s for s in found if s.kind == "matrix" and s.rows is None and s.expert is None}
    for s in found:
        if s.rows is not None and (id(s.host), s.param) in whole:
            raise PatternError(f"{label} would change {s.path!r} twice: as that, and as a part of {whole[id(s.host), s.param].path!r}. Target one of them.")


def _mapping(what: str, given: object) -> dict:
    """A mapping from patterns, or an empty one."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}={given!r}: a dict from patterns")
    as_list(list(given))
    return dict(given)


def _matched(model: Model, cls, label: str, there: list[Site], patterns: list, counts: dict[str, int]) -> list[Site]:
    found: dict[int, Site] = {}
    if not patterns:
        raise PatternError(f"targets is empty: {label} would sit nowhere")
    problems = []
    matcher = Matcher(patterns)
    by_path: list[list[Site]] = [[] for _ in patterns]
    for s in there:
        for i in set().union(*(matcher.of(n, s.host) for n in s.names)):
            if not s.explicit or spells_last(patterns[i]):
                by_path[i].append(s)
    for pattern, hits in zip(patterns, by_path, strict=True):
        if isinstance(pattern, str) and pattern.startswith(":"):
            hits = _structural(model, pattern, there)
        fit = [s for s in hits if cls.fits(s)]
        counts[pattern if isinstance(pattern, str) else show(pattern)] = len(fit)
        if fit:
            found.update((id(s), s) for s in fit)
            continue
        problems.append((pattern, hits))
    if problems:
        raise PatternError(_explain(model, cls, label, there, problems, counts))
    order = {id(s): i for i, s in enumerate(there)}
    return sorted(found.values(), key=lambda s: order[id(s)])


def beside(model: Model, cls: type[Method], found: list[Site], hyper: dict) -> list[Site]:
    """The modules that the method asks for besides those that were meant."""
    there = {id(s.host): s.host for s in found}
    asked = [m for m in cls.beside(model, [s.host for s in found], hyper) if id(m) not in there]
    return [_called(model, m) for m in dict.fromkeys(asked)]


def _structural(model: Model, pattern: str, there: list[Site]) -> list[Site]:
    """Sites named by their part in the model instead of by a path, such as `:head`."""
    if pattern not in PLACES:
        raise PatternError(f"{pattern!r}: the structural names are {', '.join(map(repr, PLACES))}.{did_you_mean(pattern, PLACES)}")
    hosts = {id(m) for m in PLACES[pattern](model)}
    return [s for s in there if id(s.host) in hosts]


def _explain(model: Model, cls, label: str, there: list[Site], problems: list, counts: dict[str, int]) -> str:
    lines = []
    fitting = [n for s in there if cls.fits(s) for n in s.names[:1]]
    for pattern, hits in problems:
        if hits:
            kinds = sorted({type(s.host).__name__ for s in hits})
            lines.append(
                f"{show(pattern)} only meets {', '.join(kinds)} ({hits[0].path!r} and so on), which {label} does not fit." + _alternatives(model, [s.host for s in hits])
            )
            continue
        inside = [p for p, m in model.at.items() if p and matches(pattern, p, m)]
        if inside:
            below = [n for n in fitting if n.startswith(inside[0] + ".")]
            cure = layers.computed(model.at[inside[0]])
            if cure:
                lines.append(f"{show(pattern)} is a layer whose weight is computed from other parameters, which {label} does not fit; {cure} makes it a plain one.")
                continue
            hint = f" Below it there are {len(below)} that {label} fits, such as {below[0]!r}: use a glob." if below else did_you_mean(str(pattern), fitting)
            lines.append(
                f"{show(pattern)} is a {original_class(model.at[inside[0]]).__name__}, which {label} does not fit.{hint}"
                + _alternatives(model, [model.at[p] for p in inside])
            )
        elif cls.on == "module" and (owners := _owners_of(model, pattern)):
            lines.append(f"{show(pattern)} names a parameter, and {label} surrounds modules." + _alternatives(model, owners))
        else:
            lines.append(f"{show(pattern)} matches nothing.{did_you_mean(str(pattern), fitting)}")
    rest = {k: v for k, v in counts.items() if v}
    return " ".join(lines) + (f" The other patterns matched: {rest}." if rest else "")


def _owners_of(model: Model, pattern) -> list[nn.Module]:
    """The modules whose parameters a pattern names."""
    return [m for path, m in model.at.items() if any(matches(pattern, join(path, name), m) for name in m._parameters)]


def fitting_methods(model: Model, hosts: list[nn.Module]) -> list[str]:
    """The registry's methods that can sit at one of these modules."""
    there = {on: [] for on in ("matrix", "tensor", "module")}
    found = []
    for name in registered():
        cls = resolve(name)[0]
        there[cls.on] = there[cls.on] or list(candidates(model, cls, {}, {}, []))
        places = there[cls.on] if cls.place is None else _structural(model, cls.place, there[cls.on])
        if any(s.host in hosts and cls.fits(s) for s in places):
            found.append(name)
    return found


def _alternatives(model: Model, hosts: list[nn.Module]) -> str:
    names = fitting_methods(model, hosts)
    return f" Methods that fit there: {', '.join(names)}." if names else ""


def _meant(matcher: Matcher, site: Site, model: Model) -> set[int]:
    """The numbers of the patterns that mean this site or anything it lies in."""
    paths = {a for n in site.names for a in _ancestors(n) if a}
    return set().union(*(matcher.of(a, model.at.get(a, site.host)) for a in paths))


def under(pattern, path: str, at: Mapping[str, nn.Module], host: nn.Module) -> bool:
    """Whether a pattern means this path or anything it lies in; `at` gives the modules by path."""
    return any(matches(pattern, a, at.get(a, host)) for a in _ancestors(path) if a)


def _without(model: Model, found: list[Site], there: list[Site], patterns: list) -> list[Site]:
    matcher = Matcher(patterns)
    meant = {id(s): _meant(matcher, s, model) for s in there}
    used = set().union(*meant.values(), *(matcher.of(p, m) for p, m in model.at.items() if p))
    for i, pattern in enumerate(patterns):
        if i not in used:
            raise PatternError(f"exclude: {show(pattern)} matches nothing.{did_you_mean(str(pattern), [s.path for s in there])}")
    return [s for s in found if not meant[id(s)]]


def _in_layers(model: Model, found: list[Site], chosen, of: str | None) -> list[Site]:
    lists = blocks(model)
    if of is not None:
        hits = {p: m for p, m in ((model.path(m), m) for m in model.modules.values()) if isinstance(m, (nn.ModuleList, nn.Sequential)) and matches(of, p, m)}
        if len(hits) != 1:
            there = list(lists) or [model.path(m) for m in model.modules.values() if isinstance(m, nn.ModuleList)]
            raise PatternError(f"of={of!r} matches {len(hits)} lists of layers.{did_you_mean(of, there)}")
        lists = hits
    if len(lists) != 1:
        raise PatternError(f"layers={chosen!r}: this model has {len(lists)} lists of layers ({', '.join(map(repr, lists)) or 'none'}); say which with of=")
    (root, holder), n = next(iter(lists.items())), 0
    n = len(holder._modules)
    if isinstance(chosen, (str, bytes)) or not isinstance(chosen, (int, Iterable)):
        raise TypeError(f"layers={chosen!r}: whole numbers")
    wanted = [chosen] if isinstance(chosen, int) else list(chosen)
    for i in wanted:
        if isinstance(i, bool) or not isinstance(i, int) or not -n <= i < n:
            raise ValueError(f"layers: {i!r} is not a layer of {root!r}, which has {n}")
    keys = list(holder._modules)
    prefixes = tuple(join(root, keys[i]) for i in wanted)
    return [s for s in found if any(s.path == p or s.path.startswith(p + ".") for p in prefixes)]


NARROW = 8  # a linear layer whose smaller side is below this is a gate, a router or a regressor, not a place for a weight method


def default_targets(model: Model, there: list[Site], cls: type[Method]) -> list[Site]:
    """For weight methods, every linear-like layer but the output head; where a model has none, its convolutions and recurrent weights.

    Layers with a side below `NARROW` (gates, routers) are left out where wider ones remain. A method that fits only embeddings takes
    these, a method on any tensor takes all it fits, and one on a call says its place itself.
    """
    if cls.place is not None:
        return _structural(model, cls.place, there)
    if cls.on != "matrix":
        return there
    usable = [s for s in there if cls.fits(s) and not s.explicit]
    linear = [s for s in usable if isinstance(s.rule, layers.Linear) or _of_attention(s)]
    rest = [s for s in usable if isinstance(s.rule, layers.Conv) or isinstance(s.host, (nn.RNNBase, nn.RNNCellBase))]
    heads = head(model)
    for pool in (linear, rest):
        kept = [s for s in pool if s.host not in heads]
        kept = [s for s in kept if min(s.n_out, s.n_in) >= NARROW] or kept
        if kept:
            return kept
    return linear + rest or [s for s in usable if isinstance(s.rule, layers.Embedding)]


def _refuse_head_alone(model: Model, cls: type[Method], label: str, there: list[Site], found: list[Site]) -> None:
    """A default that is the output head means the model's only layer, not the only one that the method fits."""
    heads = head(model) if cls.on == "matrix" and cls.place is None and len({id(s.host) for s in found}) == 1 else []
    if not found or found[0].host not in heads:
        return
    others = [s for s in there if not s.explicit and s.host not in heads and _layerlike(s) and not cls.fits(s)]
    if others:
        why = "the weight is read there without the layer being called" if all(s.read_only for s in others) else "as their kind or shape says"
        raise PatternError(
            f"{label} fits the output head {found[0].path!r} alone, and none of the {len(others)} other layers ({others[0].path!r} and so on): {why}. "
            "Say targets=':head' if that is meant." + _alternatives(model, [s.host for s in others])
        )


def _layerlike(s: Site) -> bool:
    """A linear-like layer, a convolution or a recurrent weight."""
    return isinstance(s.rule, (layers.Linear, layers.Conv)) or _of_attention(s) or isinstance(s.host, (nn.RNNBase, nn.RNNCellBase))


def _of_attention(s: Site) -> bool:
    return isinstance(s.host, nn.MultiheadAttention) and not s.explicit


# ---------------------------------------------------------------- per-site settings, ties


def settings(model: Model, sites: list[Site], hyper: dict, overrides: Mapping | None, check) -> list[dict]:
    """The hyper-parameters of each site: the common ones, changed by the most specific override that matches."""
    given = list(_mapping("overrides", overrides).items())
    used: set[int] = set()
    for pattern, changes in given:
        if not isinstance(changes, Mapping):
            raise TypeError(f"overrides: {show(pattern)} maps to {changes!r}; give a dict of options")
        check(dict(changes), f" (in overrides, {show(pattern)})")
    matcher = Matcher([pattern for pattern, _ in given])
    out = []
    for s in sites:
        wishes: dict[str, list[tuple[int, object, object]]] = {}
        meant = sorted(_meant(matcher, s, model)) if given else ()
        used.update(meant)
        for pattern, changes in (given[i] for i in meant):
            for k, v in changes.items():
                wishes.setdefault(k, []).append((specificity(pattern), pattern, v))
        mine = dict(hyper)
        for k, found in wishes.items():
            best = [w for w in found if w[0] == max(level for level, _, _ in found)]
            if any(w[2] != best[0][2] for w in best):
                raise PatternError(f"overrides: {show(best[0][1])} and {show(best[1][1])} both set {k} at {s.path!r} and neither is more specific")
            mine[k] = best[0][2]
        out.append(mine)
    for i, (pattern, _) in enumerate(given):
        if i not in used:
            raise PatternError(f"overrides: {show(pattern)} matches none of the {len(sites)} sites.{did_you_mean(str(pattern), [s.path for s in sites])}")
    return out


def resolve_ties(model: Model, sites: list[Site], tie: str | None, label: str) -> list[Site]:
    """Tied tensors, found by their memory, need an explicit choice; `share` adapts every owner alike, `untie` only the one targeted."""
    if tie not in (None, "share", "untie"):
        raise ValueError(f"tie={tie!r}: one of 'share', 'untie'")
    out: dict[object, Site] = {}
    for s in sites:
        p = s.raw_tensor
        others = [o for o in model.owners.get(identity(p), ()) if o[0] is not s.host or o[1] != s.param] if p is not None else []
        key: object = id(s)
        if others:
            if tie is None:
                raise ValueError(
                    f"{join(model.path(s.host), s.param)!r} and {join(model.path(others[0][0]), others[0][1])!r} are one tensor (tied): {label} at {s.path!r} "
                    "would act on one end only. Say tie='share' (both ends see the change) or tie='untie' (only this end), or exclude it."
                )
            s.tied, s.shared = tuple(others), tie == "share"
            s.read_only = s.read_only or tie == "share" or any(h is s.host for h, _ in others)
            if tie == "share":
                key = (identity(p), s.key if s.rows is not None or s.expert is not None else None)
        if key not in out or _adapted(s.host, s.param):  # where an earlier adapter sits, the next one joins it
            out[key] = s
    for s in out.values():
        _refuse_other_end(model, s, label)
    _refuse_common_memory(model, list(out.values()), tie)
    return list(out.values())


def _adapted(host: nn.Module, param: str | None) -> bool:
    stack = host._modules.get(CHILD)
    return stack is not None and any(s.param == param for pairs in stack.sites.values() for s, _ in pairs)


def _refuse_other_end(model: Model, site: Site, label: str) -> None:
    """Adapters that change one tensor sit at one end of it, each above the last; or each end has a tensor of its own."""
    for host, param in site.tied:
        if not _adapted(host, param) or (not site.shared and param in host._modules[CHILD].untied):
            continue
        raise ValueError(
            f"{join(model.path(host), param)!r}, the other end of the tied tensor at {site.path!r}, has an adapter: {label} must sit at that end too. "
            "Target it there, or unwrap the other one first."
        )


def _refuse_common_memory(model: Model, sites: Collection[Site], tie: str | None) -> None:
    """A tensor that overlaps another without being the same cannot be changed for both."""
    mine = {identity(s.raw_tensor): s for s in sites if s.raw_tensor is not None}
    memories = {key[0] for key in mine}
    places: dict[int, list[tuple[int, int, tuple]]] = {}
    for key, owners in model.owners.items():
        if len(key) > 1 and key[0] in memories:
            host, param = owners[0]
            places.setdefault(key[0], []).append((*extent(host._parameters[param]), key))
    for found in places.values() if tie != "untie" else ():
        end, last = -1, ()
        for start, stop, key in sorted(found):
            if start < end and (key in mine or last in mine):
                ours, other = (key, last) if key in mine else (last, key)
                host, param = model.owners[other][0]
                raise ValueError(
                    f"{mine[ours].path!r} and {join(model.path(host), param)!r} share some of their memory but are not the same tensor: "
                    "say tie='untie' (only the one that is targeted changes), or exclude it"
                )
            if stop > end:
                end, last = stop, key


def ensure_module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return model


def refuse_inference_tensors(model: nn.Module) -> None:
    """Nothing can be trained through a tensor of torch's inference mode, and writes to it cannot be seen."""
    for path, m in walk(model):
        for n, t in [*m._parameters.items(), *m._buffers.items()]:
            if t is not None and t.is_inference():
                raise ValueError(f"{join(path, n)!r} was made inside torch.inference_mode(), so nothing can be trained through it: make the model outside")
