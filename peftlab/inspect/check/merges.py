"""The fourth proof: merged, the model gives the same output; unmerged, the same bits."""

from __future__ import annotations

from torch import Tensor, nn

from peftlab.core.preserve import checksum_bits
from peftlab.inspect.check.outputs import floating_outputs, output_distance
from peftlab.inspect.check.trial import Subject, Trial
from peftlab.manage.merge import merge
from peftlab.manage.unmerge import unmerge
from peftlab.model import layers
from peftlab.model.packed import QuantizedModule
from peftlab.model.walk import named_base_modules


def prove_merges(t: Trial) -> None:
    """Merged, the output is the same; unmerged, the bits are."""
    able = dict.fromkeys(t.names, True)
    for s in t.subjects:
        if s.site is not None and (s.module.surrounds() or s.site.rule is layers.OPAQUE):
            able[s.row.name] = False
    names = [n for n in t.names if able[n]]
    rows = {id(s): s for s in t.subjects if able[s.row.name] and s.site is not None and not s.module.in_place}
    if not rows:
        return
    hosts = {id(s.site.host): s.site.host for s in rows.values()}
    marks = {(k, n): (checksum_bits(p), p.data_ptr()) for k, h in hosts.items() for n, p in h._parameters.items() if p is not None}
    for s in rows.values():
        s.row.merges = True
    try:
        merge(t.root, names, onto="dequantized" if any(isinstance(m, QuantizedModule) for m in t.root.modules()) else None)
    except (ValueError, RuntimeError) as e:
        for s in rows.values():
            s.row.fail("merges", str(e))
        return
    try:
        good = t.agrees(t.run())
        if not good:
            merged = _LayerOutputs(t)
    finally:
        unmerge(t.root, names)
    if not good:
        culprit = _LayerOutputs(t).first_other(merged, t.tolerance())
        for s in _blame(list(rows.values()), culprit):
            s.row.fail(
                "merges",
                "the merged model gives another output than the wrapped one: its weight is also read where the layer is "
                f"not called (then wrap(..., read={s.row.path!r}) helps), or the method's forward is not its definition",
            )
    for s in rows.values():
        host = s.site.host
        if any((checksum_bits(p), p.data_ptr()) != marks[id(host), n] for n, p in host._parameters.items() if p is not None):
            s.row.fail("merges", "unmerging does not give the frozen bits back")


class _LayerOutputs:
    """What every module of the model returns in one eval run, in the order in which they return."""

    def __init__(self, t: Trial):
        self.seen: list[tuple[nn.Module, list[Tensor]]] = []
        handles = [m.register_forward_hook(self._note) for _, m in named_base_modules(t.root)]
        try:
            t.run()
        finally:
            for h in handles:
                h.remove()

    def _note(self, m: nn.Module, _, output: object) -> None:
        self.seen.append((m, [x.detach().clone() for x in floating_outputs(output)]))

    def first_other(self, other: _LayerOutputs, tolerance: float) -> nn.Module | None:
        """The first module to return something else there, or None."""
        for (m, a), (n, b) in zip(self.seen, other.seen, strict=False):
            if m is not n:
                return None
            if output_distance(a, b) > tolerance:
                return m
        return None


def _blame(rows: list[Subject], culprit: nn.Module | None) -> list[Subject]:
    """Adapters that do nothing unmerged, if any; else those in the module that went wrong first; all of them where none is there."""
    inside = set() if culprit is None else {id(m) for m in culprit.modules()}
    return [s for s in rows if s.row.moves is False] or [s for s in rows if id(s.site.host) in inside] or rows
