"""Whether code runs inside a block under activation checkpointing."""

from __future__ import annotations

import sys


def inside_reentrant_checkpoint() -> bool:
    """Whether this runs in the first, gradient-free forward of a block under reentrant activation checkpointing."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and {"run_function", "preserve_rng_state"} <= frame.f_locals.keys():
            return True
        frame = frame.f_back
    return False
