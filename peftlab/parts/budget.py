"""Numbers of things as functions of the training step."""

from __future__ import annotations

import math


def duration(name: str, value: float) -> float:
    """`value` if it is a share of all steps (below 1) or a whole number of steps."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < 1 or (1 <= value < math.inf and value == int(value))):
        raise ValueError(f"{name}={value!r}: a share of all steps in [0, 1), or a whole number of steps")
    return value


def steps(value: float, T: int) -> int:
    """A duration as a number of steps, T in all."""
    return round(value * T) if value < 1 else int(value)


def cubic(t: int, T: int, start: int, end: int, ti: int, tf: int) -> int:
    """From `start` (until step ti) to `end` (from step T - tf on), falling as a cube: Zhang et al. 2023, arXiv 2303.10512, app. A."""
    if t <= ti:
        return start
    if t >= T - tf:
        return end
    return end + math.ceil((start - end) * (1 - (t - ti) / (T - ti - tf)) ** 3)


def at(t: int, T: int, start: int, end: int, tinit: float, tfinal: float, every: int) -> int | None:
    """The budget that is to be met at step t, or None where nothing is to be done.

    tinit, tfinal: durations at both ends without a new choice; `every`: steps between choices in the middle. Only the last phase has `end`.
    """
    ti, tf = steps(tinit, T), steps(tfinal, T)
    if ti + tf >= T:
        raise ValueError(f"tinit={tinit} and tfinal={tfinal} leave none of the {T} steps for the allocation")
    if t < T - tf and (t <= ti or (t - ti) % every):
        return None
    return cubic(t, T, start, end, ti, tf)
