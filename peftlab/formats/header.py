"""What a saved file says: the adapters with their settings and sites, the base's fingerprints, and the tensors by path."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from peftlab.core.build import saved_tensors
from peftlab.core.ledger import base_records, changed_buffers
from peftlab.core.method import AdapterConfig
from peftlab.core.site import ADAPTERS_CHILD, Site, frozen_parameter, frozen_values
from peftlab.core.stack import SHARED_CHILD, adapted_modules
from peftlab.core.swap import changes_bias
from peftlab.formats.fingerprint import fingerprint, fingerprinted_parameters, gathered, has_comparable_values
from peftlab.model.index import join_path, tensor_identity
from peftlab.model.patterns import did_you_mean, matches, show
from peftlab.model.walk import named_base_modules
from peftlab.registry import keywords


def describe_adapters(root: nn.Module, chosen: list[str], include: list) -> tuple[dict, dict[str, Tensor], dict[str, str | None]]:
    """(header, tensors by path, adapter that owns each) of what a save would write."""
    from peftlab import __version__

    tensors: dict[str, Tensor] = {}
    owner: dict[str, str | None] = {}

    def put(key: str, t: Tensor, name: str | None, shape=None) -> None:
        t = gathered(t)
        if t.numel() == 0 or (shape is not None and tuple(t.shape) != tuple(shape)):
            raise ValueError(f"{key!r} has shape {tuple(t.shape)} instead of {shape}: an empty or partial shard; gather the model before saving")
        tensors[key], owner[key] = t, name

    base: dict[str, dict] = {}
    adapters = {n: {"name": n, "settings": [], "sites": []} for n in chosen}
    hyper_index: dict[tuple[str, int], int] = {}
    for host_path, host, stack in adapted_modules(root):
        stack.current()  # start values that are still to come are made now
        for name in [n for n in stack.order if n in chosen]:
            for site, method in stack.sites[name]:
                prefix = join_path(host_path, ADAPTERS_CHILD, name, site.key)
                for k, t in saved_tensors(method).items():
                    put(f"{prefix}.{k}", t, name, method.shapes.get(k))
                if method.in_place:
                    put(join_path(host_path, site.param), host._parameters[site.param], name)
                entry, recipe = adapters[name], method.recipe
                index = hyper_index.setdefault((name, id(recipe)), len(entry["settings"]))
                if index == len(entry["settings"]):
                    entry["settings"].append(config_facts(recipe))
                    entry |= {"method": recipe.label, "seed": recipe.seed}
                trainable = any(p.requires_grad for p in method.parameters()) or method.in_place
                entry["active"] = name in stack.active
                entry["trainable"] = entry.get("trainable", False) or trainable
                entry["sites"].append(site_facts(host_path, site, index, stack))
                values = has_comparable_values(site, method)
                for path, m, param in fingerprinted_parameters(host) if site.kind == "module" else ():
                    key = join_path(host_path, path)
                    if key not in base:
                        raw = frozen_values(m, param)
                        base[key] = fingerprint(raw, values and raw.is_floating_point())
                for param in dict.fromkeys(p for p in (site.param, site.bias if changes_bias(site, method) else None) if p):
                    key = join_path(host_path, param)
                    if param not in host._parameters:
                        continue  # a layer that computes its weight: nothing to compare with
                    if key not in base or (values and "values" not in base[key]):
                        base[key] = fingerprint(frozen_values(host, param), values)
    for path, m in named_base_modules(root):
        holder = m._modules.get(SHARED_CHILD)
        for name in chosen if holder is not None else ():
            for k, t in holder._modules[name].state_dict(keep_vars=True).items() if name in holder._modules else ():
                put(join_path(path, SHARED_CHILD, name, k), t, name)
    for _, _, ledger in base_records(root):
        for n in chosen:
            adapters[n]["asked"] = ledger.targets.get(n) or adapters[n].get("asked")
    buffers = _changed_buffers_by_path(root)
    for key, t in buffers.items():
        put(key, t, None)
    included = _included_parameters(root, include, set(tensors), {tensor_identity(t) for t in tensors.values()})
    for key, t in included.items():
        put(key, t, None)
    header = {"peftlab": __version__, "adapters": list(adapters.values()), "base": base, "buffers": list(buffers), "included": list(included)}
    return header, tensors, owner


def config_facts(recipe: AdapterConfig) -> dict:
    defaults = {k: p.default for k, p in keywords(recipe.cls).items()}
    values = {**defaults, **recipe.hyper}
    try:
        plain = json.loads(json.dumps(values, default=list))
    except (TypeError, ValueError) as e:
        raise ValueError(f"the options of {recipe.label} cannot be written to a file: {values} ({e})") from None
    return {"options": plain, "at_default": [k for k in values if k not in recipe.hyper or recipe.hyper[k] == defaults.get(k)]}


def _rows_as_json(rows) -> object:
    return None if rows is None else {"from": rows.start, "to": rows.stop} if isinstance(rows, slice) else rows.tolist()


def rows_from_json(rows) -> slice | Tensor | None:
    return None if rows is None else slice(rows["from"], rows["to"]) if isinstance(rows, dict) else torch.tensor(rows, device="cpu")


def site_facts(host_path: str, s: Site, settings: int, stack) -> dict:
    tie = None if not s.tied else "share" if s.shared else "untie"
    facts = {
        "host": host_path, "key": s.key, "kind": s.kind, "param": s.param, "bias": s.bias, "rule": s.rule.name, "rows": _rows_as_json(s.rows),
        "bias_rows": _rows_as_json(s.bias_rows), "expert": s.expert, "transposed": s.transposed, "read": s.read_only, "size": [s.n_out, s.n_in],
        "shape": list(s.shape), "settings": settings, "tie": tie,
    }  # fmt: skip
    kinds = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)  # what merging files without the model must know of a layer
    layer = {k: getattr(s.host, k, None) for k in ("padding_idx", "groups")} if isinstance(s.host, kinds) else {}
    facts["layer"] = {k: v for k, v in layer.items() if isinstance(v, int)}
    return {k: v for k, v in facts.items() if k == "host" or not (v is None or v is False or v == "")}


def _changed_buffers_by_path(root: nn.Module) -> dict[str, Tensor]:
    """Persistent base buffers that changed since wrap."""
    changed = {id(b) for b, _ in changed_buffers(root)}
    known, found = base_records(root), {}
    for path, m in named_base_modules(root):
        for n, b in m._buffers.items():
            key = join_path(path, n)
            shapes = [ledger.buffers[key].shape for path_, _, ledger in known if not path_ and key in ledger.buffers]
            if b is not None and shapes and b.shape != shapes[0]:
                raise ValueError(f"{key!r} has shape {tuple(b.shape)} instead of {tuple(shapes[0])}: an empty or partial shard; gather the model before saving")
            if b is not None and (id(b) in changed or _was_written(known, key, b)):
                found[key] = b
    return found


def _was_written(known: list, key: str, t: Tensor) -> bool:
    return any(ledger.moved(key.removeprefix(f"{path}.") if path else key, t) for path, _, ledger in known)


def _included_parameters(root: nn.Module, patterns: list, taken: set[str], stored: set[int]) -> dict[str, Tensor]:
    """Base parameters to be saved whole; one that trains or has been trained and that nobody saves raises."""
    found: dict[str, Tensor] = {}
    known, hit = base_records(root), set()
    every = [(join_path(path, n), path, n, m) for path, m in named_base_modules(root) for n, p in m._parameters.items() if p is not None]
    for key, path, n, m in every:
        p = m._parameters[n]
        for pattern in patterns:
            if matches(pattern, key, m) or matches(pattern, path, m):
                found[key] = p
                hit.add(show(pattern))
        if key in taken or key in found or tensor_identity(p) in stored:  # the other end of a tied tensor that is saved
            continue
        state = "is trainable" if p.requires_grad else "was changed after wrap" if _was_written(known, key, frozen_parameter(m, n)) else ""
        if state:
            raise ValueError(
                f"the base parameter {key!r} {state} but belongs to no adapter: it would be missing from the file. "
                f"Use wrap(model, 'full', targets={key!r}, name=...) to train a copy, or save(..., include={key!r}) to write it whole."
            )
    for pattern in patterns:
        if show(pattern) not in hit:
            raise ValueError(f"include: {show(pattern)} matches nothing.{did_you_mean(str(pattern), [k for k, *_ in every] + [path for _, path, *_ in every])}")
    return found
