"""What is attached to a model right now: one row a method, exact counts, and why a slower path is taken where one is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlab.core.adapters import adapter_modules, overrides_hook, site_path, trained_tensors
from peftlab.core.ledger import base_records
from peftlab.core.method import Method
from peftlab.core.site import Site
from peftlab.core.stack import AdapterStack, adapted_modules
from peftlab.model import layers
from peftlab.model.index import ModelIndex, ensure_module
from peftlab.model.packed import QuantizedModule, dense_meta
from peftlab.model.patterns import matches
from peftlab.model.walk import original_class, unwrap_parallel
from peftlab.support.table import table
from peftlab.support.text import list_names, without_numbers


@dataclass(frozen=True)
class ReportRow:
    """One method at one site, or one module that the sites of an adapter share (`mode` is "shared").

    `used` says whether the last backward reached it: None while no adapter of the model holds a gradient. `grad_norm` is the
    2-norm over its tensors' `.grad`, None without any and for FSDP2's shards. `parameters` counts entries, `trainable` is True
    where any of its tensors requires grad.
    """

    path: str
    method: str
    name: str
    r: int | None
    scale: float | None
    dtype: torch.dtype | None
    device: torch.device | None
    active: bool
    merged: bool
    trainable: bool
    parameters: int
    used: bool | None
    grad_norm: float | None
    mode: str  # "call" | "read" | "in place" | "shared", and why where it is not the fast one
    pattern: str  # the target pattern that meant it
    note: str = ""


class Report(list[ReportRow]):
    """Rows of `report`, with the model's totals in parameter entries. Printing it shows a table in which repeated layers are one line."""

    def __init__(self, rows: Iterable[ReportRow], trainable: int, total: int, elsewhere: Iterable[str] = ()):
        super().__init__(rows)
        self.parameters = sum(r.parameters for r in self)  # entries that adapters hold
        self.trainable = trainable  # entries of the model that require grad, adapters or not
        self.total = total  # entries of the model, adapters included
        self.elsewhere = list(elsewhere)  # tensors that train and are no adapter's

    def __repr__(self) -> str:
        if not self:
            return f"no adapters; {self._totals()}"
        groups: dict[tuple, list[ReportRow]] = {}
        for r in self:
            state = (r.active, r.merged, r.trainable, r.used, r.mode)
            groups.setdefault((without_numbers(r.path), r.method, r.name, r.r, r.scale, r.dtype, str(r.device), *state), []).append(r)
        lines = [_report_line(rows) for rows in groups.values()]
        keep = [i for i in range(len(HEAD)) if i < 4 or any(line[i] not in ("", "-") for line in lines)]
        right = [j for j, i in enumerate(keep) if HEAD[i] in ("sites", "r", "scale", "parameters", "grad norm")]
        return f"{table([HEAD[i] for i in keep], [[line[i] for i in keep] for line in lines], right)}\n{self._totals()}"

    def _totals(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        text = f"trainable {self.trainable:,} of {self.total:,} ({share:.3f} %)"
        return f"{text}; outside adapters: {list_names(self.elsewhere, 3)}" if self.elsewhere else text


HEAD = ("path", "sites", "method", "name", "r", "scale", "dtype", "device", "state", "parameters", "used", "grad norm", "mode", "note")


def _report_line(rows: list[ReportRow]) -> tuple[str, ...]:
    r = rows[0]
    path = r.path if len(rows) == 1 else without_numbers(r.path)
    state = "merged" if r.merged else "active" if r.active else "off"
    state += ", frozen" if r.parameters and not r.trainable else ""
    norms = [x.grad_norm for x in rows if x.grad_norm is not None]
    span = "-" if not norms else f"{min(norms):.3g}" if min(norms) == max(norms) else f"{min(norms):.3g} to {max(norms):.3g}"
    notes = list(dict.fromkeys(x.note for x in rows if x.note))
    note = "" if not notes else notes[0] if len(notes) == 1 else f"{notes[0]} (and {len(notes) - 1} others)"
    size = ("-" if r.r is None else str(r.r), "-" if r.scale is None else f"{r.scale:.4g}")
    kind = ("-" if r.dtype is None else str(r.dtype).removeprefix("torch."), str(r.device or "-"))
    facts = (*size, *kind, state, f"{sum(x.parameters for x in rows):,}")
    return (path or "(root)", str(len(rows)), r.method, r.name, *facts, {None: "-", True: "yes", False: "no"}[r.used], span, r.mode, note)


def report(model: nn.Module) -> Report:
    """What is attached to `model`: where, which method, in which state, with how many parameters.

    Reads only; works on compiled, DDP- and FSDP-wrapped models, before, during and after training.

    Returns:
        Report: a list of `Row` in the model's order, a site's methods in stacking order, shared modules last. Its `.trainable` and
        `.total` are direct counts over `model.parameters()`, a packed weight with the entries that it stands for;
        `.elsewhere` names what trains without being an adapter's.

    Raises:
        TypeError: when `model` is not a module.
    """
    root = unwrap_parallel(ensure_module(model))
    named = dict(root.named_parameters())
    own: set[int] = set()
    here = {id(m): stack for _, _, stack in adapted_modules(root) for pairs in stack.sites.values() for _, m in pairs}
    view = ModelIndex.of(root) if here else None
    asked = {n: a.get("targets") for _, _, ledger in base_records(root) for n, a in ledger.targets.items()}
    there = adapter_modules(root)
    any_grad = any(t.grad is not None for _, _, s, m in there for t in trained_tensors(s, m).values())
    labels = {name: m.recipe.label for name, _, s, m in there if s is not None}
    active = {n for stack in here.values() for n in stack.active}
    rows = []
    for name, path, site, m in there:
        found = trained_tensors(site, m)
        own |= {id(t) for t in found.values()}
        facts = _method_facts(m, found, any_grad)
        if site is not None:
            stack = here[id(m)]
            where = dict(mode=mode_of(view, stack, site, m), pattern=_base_elsewhere(asked.get(name), site), note=_site_note(m))
            rows.append(ReportRow(site_path(name, path, site), m.recipe.label, name, active=name in stack.active, merged=name in stack.merged, **facts, **where))
        elif facts["dtype"] is not None:
            where = dict(mode="shared", pattern="", note=_shared_module_note(m))
            rows.append(ReportRow(path, labels.get(name, "-"), name, active=name in active, merged=False, **facts, **where))
    params = list(named.values())
    elsewhere = [k for k, p in named.items() if p.requires_grad and id(p) not in own]
    packed = [(m, n) for m in root.modules() if isinstance(m, QuantizedModule) for n in m.peftlab_formats]
    total = sum(p.numel() for p in params) + sum(dense_meta(m, n).numel() - m._parameters[n].numel() for m, n in packed)
    return Report(rows, sum(p.numel() for p in params if p.requires_grad), total, elsewhere)


def _method_facts(m: nn.Module, found: dict[str, Tensor], any_grad: bool) -> dict:
    some = next(iter(found.values()), None)
    some = next(m.buffers(), None) if some is None else some
    grads = [p.grad for p in found.values() if p.grad is not None]
    trainable = any(p.requires_grad for p in found.values())
    sharded = any(type(g).__name__ == "DTensor" for g in grads)  # its norm would be a collective call
    norm = torch.stack([torch.linalg.vector_norm(g.detach().float()).cpu() for g in grads]).norm().item() if grads and not sharded else None
    used = bool(grads) if any_grad and trainable else None
    kind = {"dtype": getattr(some, "dtype", None), "device": getattr(some, "device", None)}
    kind |= {"r": getattr(m, "r", None), "scale": float(m.s) if hasattr(m, "s") else None}
    return kind | dict(trainable=trainable, parameters=sum(p.numel() for p in found.values()), used=used, grad_norm=norm)


def _base_elsewhere(targets, site: Site) -> str:
    """The pattern of the call that meant this site; those that a file's header cannot hold are known by their spelling alone."""
    if targets is None:
        return "(default)"
    patterns = targets if isinstance(targets, list) else [targets]
    hits = [p for p in patterns if isinstance(p, str) and any(matches(p, n, site.host) for n in site.names)]
    return (hits or patterns)[0] if hits or len(patterns) == 1 else ""


def _site_note(m: Method) -> str:
    out = []
    if getattr(m, "start_error", None) is not None:
        floor = getattr(m, "start_floor", None)
        out.append(f"start error {m.start_error:.3g}" + ("" if floor is None else f" (at least {floor:.3g})"))
    if (overrides_hook(m, "step") or overrides_hook(m, "penalty")) and not m.scheduled:
        out.append("not scheduled")
    if any(t.is_meta for t in m.state_dict(keep_vars=True).values()):
        out.append("start values still to come")
    return "; ".join(out)


def _shared_module_note(m: nn.Module) -> str:
    fixed = sum(b.numel() for b in m.buffers())
    return f"{fixed:,} fixed entries" if fixed else ""


def mode_of(view: ModelIndex, stack: AdapterStack, site: Site, m: Method) -> str:
    """How the site's change is seen: "call" on the fast path, else the way and in brackets the reason."""
    if m.in_place:
        return "in place"
    if m.surrounds():
        return "call"
    if stack.read:
        return f"read ({_why_read(view, site)})"
    if site.dense or any(s.dense for s, _ in stack.links.weights):
        part = site.kind == "matrix" and site.dense
        return f"call (dense: {'a part of the weight is adapted' if part else 'a tensor is adapted as it is, here or beside it'})"
    return "call" if type(m).forward is not Method.forward else "call (dense: the method is its definition alone)"


def _why_read(view: ModelIndex, site: Site) -> str:
    host = site.host
    cls = original_class(host)
    if isinstance(host, nn.MultiheadAttention):
        return "attention never calls its projections"
    if isinstance(host, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent weights are read"
    for parent in view.parents.get(id(host), ()):
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            return f"{original_class(parent).__name__} reads its weight"
    if site.tied:
        return "tied to another parameter"
    if site.kind == "tensor":
        return "the method takes one tensor"
    if site.rule.name == "matrix":
        return "a raw parameter"
    if not layers.runs_registered_forward(host, cls):
        return f"{cls.__name__} has a forward or settings of its own"
    return "asked for by read=" if site.read_only else "another adapter here is read"
