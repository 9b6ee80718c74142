"""Every place of a model where a method of some kind could sit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from peftlab.core.method import Method
from peftlab.core.site import Site
from peftlab.core.swap import runs_functionally
from peftlab.model import layers
from peftlab.model.blocks import module_widths
from peftlab.model.index import ModelIndex, join_path
from peftlab.model.packed import dense_meta, is_foreign_tensor
from peftlab.model.patterns import PatternError, did_you_mean, matches, show
from peftlab.model.readers import UNCALLING, parent_reads_weight
from peftlab.model.walk import original_class


def candidate_sites(model: ModelIndex, cls: type[Method], split: Mapping, layout: Mapping, read: list) -> Iterable[Site]:
    """Every place where a method of this kind could sit, whether or not it fits there."""
    used = Counter()
    for key, m in model.modules.items():
        paths = model.paths[key]
        if cls.on == "module":
            uncalled = any(isinstance(p, UNCALLING) for p in model.parents.get(key, ()))
            if not uncalled and original_class(m).forward is not nn.Module.forward:  # as a list of modules has none
                yield module_site(model, m)
        elif cls.on == "tensor":
            yield from _tensor_sites(m, paths, _is_read(model, m, read, used))
        else:
            yield from _matrix_sites(m, paths, split, layout, _is_read(model, m, read, used), used)
    for what, given in (("split", split), ("layout", layout), ("read", dict.fromkeys(read))):
        if given and cls.on != "matrix" and what != "read":
            raise ValueError(f"{what}={given!r} says something about matrices, and {cls.__name__} acts on {'whole tensors' if cls.on == 'tensor' else 'calls'}")
        for pattern in given:
            if not used[what, show(pattern)]:
                raise PatternError(f"{what}: {show(pattern)} {_why_unused(model, pattern, what)}")


def _why_unused(model: ModelIndex, pattern, what: str) -> str:
    hit = next((m for p, m in model.at.items() if p and matches(pattern, p, m)), None)
    if what == "layout" and hit is not None:
        return f"is a {original_class(hit).__name__}: only raw parameters with two or three dimensions have a layout to state"
    return f"matches nothing.{did_you_mean(str(pattern), [p for ps in model.paths.values() for p in ps if p])}"


def module_site(model: ModelIndex, m: nn.Module) -> Site:
    """A module whose call is surrounded."""
    paths, (n_in, n_out) = model.paths[id(m)], module_widths(m)
    whole = m is model.root and len(model.modules) > 1  # "*" means what is in a model, not the model
    rule = layers.layer_rule(m) or layers.MATRIX
    return Site(m, paths[0], kind="module", param=None, rule=rule, names=tuple(paths), explicit=whole, n_out=n_out, n_in=n_in)


def _tensor_sites(m: nn.Module, paths: list[str], read_only: bool) -> Iterable[Site]:
    ancestors = tuple(a for path in paths for a in ancestor_paths(path))
    read_only = read_only or not runs_functionally(m)
    for name in m._parameters:
        p = dense_meta(m, name)
        if p is not None and p.is_floating_point() and not is_foreign_tensor(p):
            own = tuple(join_path(path, name) for path in paths)
            yield Site(m, own[0], name, "tensor", name, names=own + ancestors, shape=tuple(p.shape), read_only=read_only)


def _is_read(model: ModelIndex, m: nn.Module, read: list, used: Counter) -> bool:
    """Whether this module's weight is read without the module being called, by a parent we know or as the caller says."""
    wanted = [p for p in read if any(matches(p, path, m) for path in model.paths[id(m)])]
    used.update(("read", show(p)) for p in wanted)
    return bool(wanted) or parent_reads_weight(model, m)


def ancestor_paths(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _matrix_sites(m: nn.Module, paths: list[str], split: Mapping, layout: Mapping, read_only: bool, used: Counter) -> Iterable[Site]:
    cls = original_class(m)
    rule = layers.layer_rule(m)
    covered: set[str] = set()
    if rule is not None:
        covered |= {"weight", "bias"}
        bias = rule.bias if rule.bias and m._parameters.get(rule.bias) is not None else None
        surround = rule.call and layers.runs_registered_forward(m, cls) and not read_only
        raw = dense_meta(m, rule.weight)
        n_out, n_in = layers.matrix_shape(m, rule, raw)
        shape = tuple(raw.shape) if raw is not None and rule is not layers.OPAQUE else (n_out, n_in)
        names = tuple(paths) + tuple(join_path(p, "weight") for p in paths)
        whole = Site(m, paths[0], "", "matrix", "weight", bias, rule, n_out=n_out, n_in=n_in, shape=shape, names=names, read_only=not surround)
        whole.explicit = any(matches(pattern, p, m) for pattern in split for p in paths)  # its parts are meant, unless it is called by its name
        yield whole
        taken: set[int] = set()
        for pattern, parts in split.items():
            if any(matches(pattern, p, m) for p in paths):
                used["split", show(pattern)] += 1
                yield from _slice_sites(whole, paths, parts, pattern, taken)
    if issubclass(cls, nn.MultiheadAttention):
        covered |= {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
        yield from _attention_sites(m, paths)
    if issubclass(cls, (nn.RNNBase, nn.RNNCellBase)):
        covered |= {n for n in m._parameters if n.startswith("weight")}
        for name in [n for n in m._parameters if n.startswith("weight")]:
            bias = name.replace("weight", "bias")
            bias = bias if m._parameters.get(bias) is not None else None
            names = tuple(join_path(p, name) for p in paths) + tuple(paths)
            yield _raw_site(m, join_path(paths[0], name), name, bias, names)
    for name in m._parameters:
        p = dense_meta(m, name)
        if p is None or name in covered or p.ndim < 2 or not p.is_floating_point() or is_foreign_tensor(p):
            continue
        yield from _raw_parameter_sites(m, paths, name, p, layout, used)


def _raw_site(m: nn.Module, path: str, name: str, bias: str | None, names: tuple[str, ...], **more) -> Site:
    p = dense_meta(m, name)
    n_out, n_in = layers.matrix_shape(m, layers.MATRIX, p)
    facts = dict(n_out=n_out, n_in=n_in, shape=tuple(p.shape), read_only=True) | more
    return Site(m, path, path.rpartition(".")[2] if "." in path else path, "matrix", name, bias, layers.MATRIX, names=names, **facts)


def _raw_parameter_sites(m: nn.Module, paths: list[str], name: str, p: Tensor, layout: Mapping, used: Counter) -> Iterable[Site]:
    """A parameter that belongs to no known layer: a matrix as it is, or one matrix an expert, orientation stated by `layout`."""
    own = [join_path(path, name) for path in paths]
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
        n_out, n_in = (p.shape[1], p.shape[0]) if flip else layers.matrix_shape(m, layers.MATRIX, p)
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


def _attention_sites(m: nn.MultiheadAttention, paths: list[str]) -> Iterable[Site]:
    """q, k and v of nn.MultiheadAttention one by one, under the same names whether or not they share one parameter."""
    e = m.embed_dim
    bias = "in_proj_bias" if m._parameters.get("in_proj_bias") is not None else None
    for i, part in enumerate("qkv"):
        key = f"{part}_proj"
        param, rows = ("in_proj_weight", slice(i * e, (i + 1) * e)) if m._qkv_same_embed_dim else (f"{key}_weight", None)
        n_in = dense_meta(m, param).shape[1]
        names = tuple(join_path(p, key) for p in paths) + tuple(paths) + (() if m._qkv_same_embed_dim else tuple(join_path(p, param) for p in paths))
        part_of_bias = slice(i * e, (i + 1) * e)  # one tensor of 3 e entries either way
        yield Site(
            m,
            join_path(paths[0], key),
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
        names = tuple(join_path(p, "in_proj_weight") for p in paths)
        yield Site(
            m,
            join_path(paths[0], "in_proj_weight"),
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


def _slice_sites(whole: Site, paths: list[str], parts: Mapping, pattern, taken: set[int]) -> Iterable[Site]:
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
            rows = _picked_rows(whole.n_out, size, where)
            picked = rows.tolist()
        bad = not picked or len(set(picked)) < len(picked) or max(picked) >= whole.n_out or not taken.isdisjoint(picked)
        if bad:
            raise ValueError(f"{where} does not fit beside the others in the {whole.n_out} rows of {whole.path!r}")
        taken |= set(picked)
        names = tuple(join_path(p, name) for p in paths)
        facts = {"n_out": len(picked), "n_in": whole.n_in, "shape": (len(picked), whole.n_in), "read_only": whole.read_only}
        yield Site(whole.host, join_path(paths[0], name), name, "matrix", whole.param, whole.bias, whole.rule, rows, names=names, **facts)
    if all(isinstance(s, int) for s in parts.values()) and start != whole.n_out:
        raise ValueError(f"split {show(pattern)}: the sizes sum to {start}, but {whole.path!r} has {whole.n_out} rows")


def _picked_rows(n: int, rows: object, where: str) -> Tensor:
    """Explicit rows (indices, a mask, a slice, a range) as indices into n rows."""
    try:
        index = rows if isinstance(rows, slice) else rows.cpu() if isinstance(rows, Tensor) else torch.as_tensor(list(rows), device="cpu")
        if isinstance(index, Tensor) and index.dtype != torch.bool and bool((index < 0).any()):
            raise IndexError(rows)
        return torch.arange(n, device="cpu")[index].reshape(-1)
    except (TypeError, ValueError, IndexError, RuntimeError):
        raise ValueError(f"{where}: give a size, or rows among 0..{n - 1}") from None
