"""Start values of virtual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STARTS = ("vocab", "normal", "uniform", "text", "labels")


def prompt_start(init: str, n: int, d: int, look: Callable[[Tensor], Tensor], rows: int, ids: Sequence | None, std: float, path: str) -> Tensor:
    """(n, d): rows of the vocabulary, random numbers, or the tokens of a text or of class labels.

    look: ids -> what the token embedding gives for them; rows: how many ids there are; ids: of a text (repeated or cut to n), or one list a
    label, whose tokens are averaged (the rest are rows of the vocabulary).
    """
    if init not in STARTS:
        raise ValueError(f"init={init!r} at {path!r}: one of {', '.join(STARTS)}")
    if init in ("text", "labels"):
        given = [[i] if isinstance(i, int) else list(i) for i in ids or ()]
        flat = [i for label in given for i in label]
        if not flat or not all(given) or not all(isinstance(i, int) and 0 <= i < rows for i in flat):
            raise ValueError(f"ids={ids!r} at {path!r}: init={init!r} needs token ids from 0 to {rows - 1}, of a text or a list for each label")
        if init == "labels" and len(given) > n:
            raise ValueError(f"{len(given)} labels at {path!r}, but only n={n} virtual tokens")
        means = torch.stack([look(torch.tensor(label)).mean(0) for label in given])
        if init == "text":
            return means.repeat(-(-n // len(means)), 1)[:n]
        return torch.cat([means, look(torch.randint(rows, (n - len(means),)))])
    if ids is not None:
        raise ValueError(f"ids= at {path!r} is for init='text' or init='labels', not for {init!r}")
    if init == "vocab":
        return look(torch.randint(rows, (n,)))
    return torch.randn(n, d) * std if init == "normal" else torch.rand(n, d) - 0.5
