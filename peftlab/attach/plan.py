"""`plan`: what `wrap` would do, counted on shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from peftlab.attach.request import WrapRequest, check_method, make_request
from peftlab.core.build import build_method, saved_tensors, trainable_parameters
from peftlab.core.method import Method
from peftlab.core.site import Site
from peftlab.model.packed import dense_meta
from peftlab.model.walk import original_class
from peftlab.registry import keywords
from peftlab.support.contexts import paused_gc, preserved_rng
from peftlab.support.table import table


@dataclass
class PlanRow:
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
    rows: list[PlanRow]
    counts: dict[str, int]
    trainable: int
    total: int
    file_bytes: int
    given: tuple[str, ...] = ()  # the options that the caller set: what the table shows

    def __repr__(self) -> str:
        keys = sorted({k for r in self.rows for k in r.options})
        body = [(re.sub(r"\d+", "#", r.path), r.layer, r.shape, tuple(sorted(r.options.items(), key=str)), r.trainable, r.mode) for r in self.rows]
        groups: dict[tuple, list[PlanRow]] = {}
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


@paused_gc()
def plan(
    model: nn.Module, method: str | type[Method], *, targets=None, exclude=None, layers=None, of: str | None = None, name: str = "default",
    overrides: Mapping | None = None, data=None, loss=None, seed: int = 0, dtype: torch.dtype | None = None, tie: str | None = None,
    split: Mapping | None = None, layout: Mapping | None = None, read=None, **hyper,
) -> Plan:  # fmt: skip
    """What `wrap` with the same arguments would do; changes nothing and works on meta models."""
    req = make_request(model, method, targets=targets, exclude=exclude, layers=layers, of=of, name=name, overrides=overrides, seed=seed, dtype=dtype,
                   tie=tie, split=split, layout=layout, read=read, hyper=hyper)  # fmt: skip
    return plan_of(req)


def plan_of(req: WrapRequest) -> Plan:
    counted: dict[tuple, tuple[int, int]] = {}
    rows = []
    defaults = {k: p.default for k, p in keywords(req.cls).items()}
    with preserved_rng():
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
                method = build_method(recipe, site.seen_as("shapes"), (), "meta")
                check_method(method, site, req.label)
                counted[key] = _count_tensors(method, site, req.default_dtype(site))
            n, size = counted[key]
            shape = site.shape if site.kind == "tensor" else (site.n_out, site.n_in)
            rows.append(PlanRow(site.path, original_class(site.host).__name__, shape, n, size, {**defaults, **recipe.hyper}, "read" if site.read_only else "call"))
    shared = sum(b.numel() * b.element_size() for b in saved_tensors(recipes[0].common).values()) if recipes[0].common else 0
    extra = sum(p.numel() for p in trainable_parameters(recipes[0].common)) if recipes[0].common else 0
    given = tuple(sorted({k for h in req.hypers for k in h}))
    total = sum(dense_meta(m, n).numel() for (m, n), *_ in req.model.owners.values())
    return Plan(req.label, req.name, rows, req.counts, sum(r.trainable for r in rows) + extra, total, sum(r.bytes for r in rows) + shared, given)


def _count_tensors(method: Method, site: Site, dtype: torch.dtype) -> tuple[int, int]:
    """(trainable entries, file bytes) of one method, floating tensors counted in the adapter's dtype."""
    if method.in_place:
        p = site.raw_tensor
        return p.numel(), p.numel() * p.element_size()
    width = torch.empty(0, dtype=dtype).element_size()
    size = sum(t.numel() * (width if t.is_floating_point() else t.element_size()) for t in saved_tensors(method).values())
    return sum(p.numel() for p in trainable_parameters(method)), size
