"""Checks of options, with the value, the limit and the place in the message."""

from __future__ import annotations

import math

from peftlab.core.base import Base


def positive_int(name: str, value: object, limit: int | None, base: Base | None = None) -> int:
    """`value` if it is a whole number in 1..limit, else a ValueError that says where."""
    where = f" at {base.path!r}" if base is not None and base.path else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not a whole number{where}")
    if value < 1:
        raise ValueError(f"{name}={value}{where}: must be at least 1")
    if limit is not None and value > limit:
        raise ValueError(f"{name}={value}{where}: at most {limit} (the smaller side of the matrix)")
    return value


def unit_interval(name: str, value: object) -> float:
    """`value` if 0 <= value < 1 (a dropout probability), else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must lie in [0, 1)")
    return float(value)


def finite(name: str, value: object) -> float:
    """`value` if it is a finite number, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: must be a finite number")
    return float(value)
