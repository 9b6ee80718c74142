"""From the header of a file back to sites, options and methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftlab.attach.build import finish_method
from peftlab.core.build import build_method
from peftlab.core.method import AdapterConfig, Method
from peftlab.core.site import ADAPTERS_CHILD, Site
from peftlab.core.stack import SHARED_CHILD
from peftlab.formats.header import rows_from_json
from peftlab.model import layers
from peftlab.model.blocks import module_widths
from peftlab.model.index import ModelIndex, join_path, tensor_identity
from peftlab.model.packed import dense_meta
from peftlab.model.patterns import did_you_mean, nearest
from peftlab.model.walk import original_class
from peftlab.registry import entries, keywords, resolve
from peftlab.support.files import LoadError


def keys_of_adapter(entry: dict) -> Callable[[str], bool]:
    """Whether a tensor is this adapter's, by the structure of its path: below one of its sites, or below its shared module."""
    prefixes = {join_path(s["host"], ADAPTERS_CHILD, entry["name"], s.get("key", "")) for s in entry["sites"]} | {join_path(SHARED_CHILD, entry["name"])}

    def owns(key: str) -> bool:
        while key:
            if key in prefixes:
                return True
            key = key.rpartition(".")[0]
        return False

    return owns


def mismatch_text(unconsumed: list[str], unfilled: list[str]) -> str:
    out = ["the file does not fit the adapter."]
    for what, keys, other in (("in the file but not used", unconsumed, unfilled), ("in the adapter but not in the file", unfilled, unconsumed)):
        if keys:
            close = [f"{k!r} (nearest: {', '.join(map(repr, nearest(k, other, 1))) or 'none'})" for k in keys[:5]]
            out.append(f"{len(keys)} {what}: {', '.join(close)}{' ...' if len(keys) > 5 else ''}.")
    return " ".join(out)


def method_class(label: str) -> type[Method]:
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


def options_in_file(cls: type[Method], settings: dict, version: str) -> dict:
    known = keywords(cls)
    out = {}
    for k, v in settings["options"].items():
        if k in known:
            out[k] = v
        elif k not in settings["at_default"]:
            raise LoadError(f"{cls.__name__} has no option {k!r} (here {v!r}), which peftlab {version} wrote.{did_you_mean(k, known)}")
    return {k: v for k, v in out.items() if k not in settings["at_default"] or known[k].default != v}


def sites_in_file(view: ModelIndex, entry: dict) -> list[Site]:
    by_path = {p: m for k, m in view.modules.items() for p in view.paths[k]}
    out = []
    for s in entry["sites"]:
        m = by_path.get(s["host"])
        if m is None:
            raise LoadError(f"the adapter {entry['name']!r} sits at {s['host']!r}, which this model does not have.{did_you_mean(s['host'], by_path)}")
        param = s.get("param")
        raw = dense_meta(m, param) if param else None
        rule = layers.layer_rule(m) if s["rule"] != "matrix" else layers.MATRIX
        if param and (rule is None or (raw is None and rule is not layers.OPAQUE)):
            raise LoadError(f"{join_path(s['host'], param)!r}, which the adapter changes, is not in this model; a {type(m).__name__} is there")
        site = Site(
            m, join_path(s["host"], s.get("key", "")), s.get("key", ""), s["kind"], param, s.get("bias"), rule or layers.MATRIX, rows_from_json(s.get("rows")),
            rows_from_json(s.get("bias_rows")), s.get("expert"), s.get("transposed", False), s.get("read", False), n_out=s["size"][0], n_in=s["size"][1],
            shape=tuple(s["shape"]),
        )  # fmt: skip
        _check_size(site, raw)
        if s["kind"] == "matrix" and s["rule"] != "matrix" and not layers.runs_registered_forward(m, original_class(m)):
            site.read_only = True
        if s.get("tie"):
            site.shared = s["tie"] == "share"
            site.tied = tuple(o for o in view.owners.get(tensor_identity(m._parameters[param]), ()) if o[0] is not m or o[1] != param)
        out.append(site)
    return out


def _check_size(site: Site, raw: Tensor | None) -> None:
    if site.kind == "module":
        there, wanted = module_widths(site.host)[::-1], (site.n_out, site.n_in)
    elif site.kind == "tensor":
        there, wanted = tuple(raw.shape), site.shape
    elif site.rule is layers.OPAQUE:
        there, wanted = layers.matrix_shape(site.host, site.rule, raw), (site.n_out, site.n_in)
    else:
        probe = Site(**{**vars(site), "rows": None})
        there = tuple(probe.get(probe.part(torch.empty(raw.shape, device="meta"))).shape)
        wanted = (site.n_out, site.n_in) if site.rows is None else (there[0], site.n_in)
    if there != wanted:
        raise LoadError(f"{site.path!r} has size {there} in this model and {wanted} in the file")


def method_in_file(site: Site, recipe: AdapterConfig, facts: dict, name: str, mine: dict, used: set, unfilled: list, dtype) -> Method:
    """The method with the file's tensors in it; start values are computed only where the file does not give them."""
    prefix = f"{join_path(facts['host'], ADAPTERS_CHILD, name, site.key)}."
    method = build_method(recipe, site.seen_as("shapes"), (), "meta")
    missing: list[str] = []
    device = torch.device("cpu") if site.device.type == "meta" else site.device
    fill_from_file(method, prefix, mine, used, missing, device, dtype)
    if any(t.is_meta for t in [*method.parameters(), *method.buffers()]):
        fresh = build_method(recipe, site)
        finish_method(fresh, site, dtype or torch.promote_types(torch.float32, site.dtype))
        fill_from_file(fresh, prefix, mine, used, [], device, dtype)
        method = fresh
    unfilled += missing
    method.training = site.host.training
    return method


def fill_from_file(module: nn.Module, prefix: str, mine: dict, used: set, missing: list, device, dtype) -> None:
    for sub_path, m in module.named_modules():
        for table, is_param in ((m._parameters, True), (m._buffers, False)):
            for k, t in table.items():
                if t is None or (not is_param and k in m._non_persistent_buffers_set):
                    continue
                key = prefix + join_path(sub_path, k)
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
