"""The second proof: a change of an adapter's tensors changes the output."""

from __future__ import annotations

from peftlab.core.adapters import overrides_hook
from peftlab.inspect.check.outputs import output_distance, random_mixture
from peftlab.inspect.check.trial import Subject, Trial


def prove_moves(t: Trial) -> None:
    """A change of its tensors changes the output."""
    every = {id(p): p for s in t.subjects for p in s.tensors.values()}
    found = dict(zip(every, t.gradients(list(every.values()), random_mixture), strict=True))
    t.fence.put_flags_back()
    sensitive = {k for k, g in found.items() if g is not None and bool((g != 0).any())}
    whole = output_distance(t.before, t.after) > 4 * t.noise
    # Fused paths run without gradients only: what such a path ignores has a gradient all the same.
    same = whole and output_distance(t.run(grad=True), t.after, t.before) <= max(t.tolerance(), 4 * t.noise)
    for s in t.subjects:
        if not s.tensors:
            continue
        felt = any(id(p) in sensitive for p in s.tensors.values())
        s.row.moves = whole and ((same and felt) or _moves_alone(t, s))
        if not s.row.moves and felt:
            s.row.fail("moves", "a gradient, but no effect in eval without gradients, where its weight is read: wrap(..., read=[{paths}])")
        elif not s.row.moves:
            s.row.fail("moves", "a change of its tensors does not change the output of this batch in eval mode")
        elif s.row.reached is False and overrides_hook(s.module, "step"):
            s.row.reached, s.row.note = True, "gets no gradient now; its schedule decides when it trains"
            s.row.problems.pop("reached")


def _moves_alone(t: Trial, s: Subject) -> bool:
    changed = {k: p.data for k, p in s.tensors.items()}
    try:
        for p in s.tensors.values():
            p.data = t.own[id(p)]
        return output_distance(t.after, t.run()) > 4 * t.noise
    finally:
        for k, p in s.tensors.items():
            p.data = changed[k]
