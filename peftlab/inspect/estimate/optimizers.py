"""How many bytes the state of an optimizer takes."""

from __future__ import annotations

import math
from collections.abc import Callable


def _adafactor(shape: tuple[int, ...], width: int) -> int:
    # One mean a row and one a column of a matrix; a vector keeps every entry.
    n = math.prod(shape)
    return 4 + (width * (n // shape[-1] + n // shape[-2]) if len(shape) > 1 else width * n)


def _adamw8bit(shape: tuple[int, ...], width: int) -> int:
    # Two states of one byte and a float32 scale for each block of 256; small tensors keep float32 states.
    n = math.prod(shape)
    return 2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n


OPTIMIZERS: dict[str, Callable[[tuple[int, ...], int], int]] = {  # (shape of a tensor, bytes of a state entry) -> bytes of its state
    "sgd": lambda shape, width: 0,
    "sgd+momentum": lambda shape, width: width * math.prod(shape),
    "adam": lambda shape, width: 4 + 2 * width * math.prod(shape),  # torch keeps the step count of every tensor in a float32 tensor
    "adamw": lambda shape, width: 4 + 2 * width * math.prod(shape),
    "adagrad": lambda shape, width: 4 + width * math.prod(shape),
    "lion": lambda shape, width: width * math.prod(shape),
    "adafactor": _adafactor,
    "adamw8bit": _adamw8bit,
}
