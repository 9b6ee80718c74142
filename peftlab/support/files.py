"""Reading files that may not be what they claim."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import safetensors


class LoadError(ValueError):
    """A file that cannot be used as it is, or not with this model."""


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[None]:
    """LoadError where what the block reads is no safetensors file, or a damaged one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError, UnicodeDecodeError) as e:
        raise LoadError(f"{str(path)!r} is not a whole safetensors file: {e}") from None
