"""Lists of names in messages."""

from __future__ import annotations

import re
from collections.abc import Sequence


def list_names(names: Sequence[str], limit: int = 20) -> str:
    """Names for a message, the first of them where there are many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def without_numbers(path: str) -> str:
    """A path with its numbered components as #, the same for all blocks of a stack."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", path)
