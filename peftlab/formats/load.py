"""`load`: the adapters of a file onto a model, checked before the model is touched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlab.attach.attach import attach_methods
from peftlab.attach.request import WrapRequest, check_adapter_name, check_dtype
from peftlab.core.adapters import adapter_modules, adapter_names, refuse_inside_blocks
from peftlab.core.build import saved_tensors
from peftlab.core.method import AdapterConfig, Method
from peftlab.core.site import ADAPTERS_CHILD, frozen_values
from peftlab.core.stack import SHARED_CHILD, adapted_modules
from peftlab.formats.file import read
from peftlab.formats.fingerprint import fingerprint_difference
from peftlab.formats.header import config_facts
from peftlab.formats.rebuild import fill_from_file, keys_of_adapter, method_class, method_in_file, mismatch_text, options_in_file, sites_in_file
from peftlab.formats.reports import LoadReport
from peftlab.manage.freeze import set_trainable
from peftlab.model import layers
from peftlab.model.index import ModelIndex, ensure_module, join_path, refuse_inference_tensors
from peftlab.model.packed import is_foreign_tensor
from peftlab.model.patterns import did_you_mean
from peftlab.model.walk import named_base_modules, unwrap_parallel
from peftlab.support.contexts import paused_gc, preserved_rng
from peftlab.support.files import LoadError


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
    root = unwrap_parallel(ensure_module(model))
    refuse_inside_blocks(root)
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
        check_adapter_name(new)
    if len(set(renamed.values())) < len(renamed):
        raise ValueError(f"names={names!r} gives two adapters one name")
    for n in renamed:
        if n not in there:
            raise LoadError(f"{str(path)!r} has no adapter {n!r}; it holds {list(there)}.{did_you_mean(n, there)}")
    view = ModelIndex.of(root)
    refuse_inference_tensors(root)
    try:
        if not allow_base_mismatch:
            _check_base(root, header, [there[n] for n in renamed])
        jobs = [_load_job(view, root, header, there[old], new, tensors, dtype) for old, new in renamed.items()]
        rest = _base_tensors(root, header)
    except LoadError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
        raise LoadError(f"{str(path)!r}: its header does not describe an adapter that can be built: {e}") from e
    used = {k for job in jobs for k in job.used} | rest.keys()
    others = [keys_of_adapter(a) for n, a in there.items() if n not in renamed]
    unconsumed = sorted(k for k in tensors if k not in used and not any(owns(k) for owns in others))
    unfilled = sorted(k for job in jobs for k in job.unfilled)
    if strict and (unconsumed or unfilled):
        raise LoadError(mismatch_text(unconsumed, unfilled))
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
    params = {join_path(path, n): (m, n) for path, m in named_base_modules(root) for n, p in m._parameters.items() if p is not None}
    needed = {join_path(s["host"], p) for a in adapters for s in a["sites"] for p in (s.get("param"), s.get("bias")) if p}
    below = [f"{s['host']}." if s["host"] else "" for a in adapters for s in a["sites"] if s["kind"] == "module"]
    for key, saved in header["base"].items():
        if key not in needed and not any(key.startswith(b) for b in below):
            continue
        if key not in params:
            raise LoadError(f"the adapter was trained on {key!r}, which this model does not have.{did_you_mean(key, params)}")
        host, n = params[key]
        packed = n == "weight" and layers.is_opaque_linear(host) and not is_foreign_tensor(host._parameters[n])
        wrong = None if packed else fingerprint_difference(key, saved, frozen_values(host, n))
        if wrong:
            raise LoadError(f"this is not the base that the adapter was trained on: {wrong}. allow_base_mismatch=True loads it all the same.")


def _base_tensors(root: nn.Module, header: dict) -> dict[str, Tensor]:
    """The base's own tensors that the file replaces: changed buffers, included parameters, in-place trained ones."""
    there = {join_path(path, n): t for path, m in named_base_modules(root) for n, t in [*m._parameters.items(), *m._buffers.items()] if t is not None}
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
class _LoadJob:
    """One adapter of a file, built and checked, ready to be attached."""

    req: WrapRequest
    methods: list[Method]
    active: bool
    used: set[str]
    unfilled: list[str]
    writes: list[tuple[Tensor, Tensor]] | None  # (adapter tensor there, value) where the adapter exists already

    def commit(self, root: nn.Module, trainable: bool | None) -> None:
        if self.writes is not None:
            for _, _, stack in adapted_modules(root):
                stack.current()  # start values that are still to come are made now, and not over the file's
            with torch.no_grad():
                for t, value in self.writes:
                    t.copy_(value)
            if trainable is not None:
                set_trainable(root, self.req.name, trainable)
            return
        attach_methods(root, self.req, self.methods)
        set_trainable(root, self.req.name, trainable is not False)
        if not self.active:
            for _, _, s in adapted_modules(root):
                if self.req.name in s.active:
                    s.set_active(tuple(n for n in s.active if n != self.req.name))


def _load_job(view: ModelIndex, root: nn.Module, header: dict, entry: dict, name: str, tensors: dict, dtype) -> _LoadJob:
    cls = method_class(entry["method"])
    hypers = [options_in_file(cls, s, header["peftlab"]) for s in entry["settings"]]
    sites = sites_in_file(view, entry)
    owns = keys_of_adapter(entry)
    mine = {k: t for k, t in tensors.items() if owns(k)}
    tie = next((s.get("tie") for s in entry["sites"] if s.get("tie")), None)
    req = WrapRequest(view, cls, entry["method"], name, sites, {}, [hypers[s["settings"]] for s in entry["sites"]], entry["seed"], dtype, tie, entry.get("asked") or {})
    if name in adapter_names(root):
        return _refill(root, req, entry, mine)
    used: set[str] = set()
    unfilled: list[str] = []
    methods = []
    with preserved_rng():
        recipes = list(req.recipes("cpu"))
        for site, recipe, facts in zip(sites, recipes, entry["sites"], strict=True):
            methods.append(method_in_file(site, recipe, facts, entry["name"], mine, used, unfilled, dtype))
        common = recipes[0].common
        prefix = f"{join_path(SHARED_CHILD, entry['name'])}."
        if common is not None:
            fill_from_file(common, prefix, mine, used, unfilled, next(iter(sites)).device, dtype)
    return _LoadJob(req, methods, entry.get("active", True), used, unfilled, None)


def _refill(root: nn.Module, req: WrapRequest, entry: dict, mine: dict) -> _LoadJob:
    """Values for an adapter that is there already: same method, settings and places, or an error."""
    old = entry["name"]
    there = {(path, s.key): (s, m) for path, _, st in adapted_modules(root) for s, m in st.sites.get(req.name, ())}
    if any(req.name in st.merged for _, _, st in adapted_modules(root)):
        raise LoadError(f"the adapter {req.name!r} is merged: unmerge it before its tensors are overwritten")
    wanted = {(s["host"], s.get("key", "")): i for i, s in enumerate(entry["sites"])}
    if there.keys() != wanted.keys():
        odd = sorted(join_path(*k) for k in there.keys() ^ wanted.keys())
        raise LoadError(f"this model already has an adapter {req.name!r} at other places ({odd[0]!r} and {len(odd) - 1} more); unwrap it, or load under another name")
    used, missing, writes = set(), [], []
    for key, (_, m) in there.items():
        want = req.hypers[wanted[key]]
        have = config_facts(m.recipe)["options"]
        want = config_facts(AdapterConfig(req.cls, req.label, want, req.name, req.seed))["options"]
        if m.recipe.label != req.label or have != want:
            odd = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
            raise LoadError(
                f"this model already has an adapter {req.name!r} with other settings ({m.recipe.label}, {', '.join(odd)}); unwrap it, or load under another name"
            )
        prefix = f"{join_path(key[0], ADAPTERS_CHILD, old, key[1])}."
        for k, t in saved_tensors(m).items():
            value = mine.get(prefix + k)
            if value is None:
                missing.append(prefix + k)
            elif value.shape != t.shape:
                raise LoadError(f"{prefix + k!r} has shape {tuple(value.shape)} in the file; the adapter has {tuple(t.shape)}")
            else:
                used.add(prefix + k)
                writes.append((t, value))
    for _, m in named_base_modules(root):
        holder = m._modules.get(SHARED_CHILD)
        for k, t in holder._modules[req.name].state_dict(keep_vars=True).items() if holder is not None and req.name in holder._modules else ():
            key = join_path(SHARED_CHILD, old, k)
            if key in mine:
                used.add(key)
                writes.append((t, mine[key]))
    return _LoadJob(req, [m for _, m in there.values()], True, used, missing, writes)
