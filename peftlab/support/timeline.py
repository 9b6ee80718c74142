"""A value that changes from forward to forward, and that a recomputed forward finds as it was.

Activation checkpointing runs a block again inside backward, when the value may be another one already. The autograd node that asks
for the recomputation dates the first run by its sequence number.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

REMEMBERED = 64  # changes that a checkpointed forward may lie back


class Timeline:
    """`put` sets the value; `get` gives what it was when the forward that runs now, or runs again, ran first."""

    def __init__(self):
        self.value, self.lost = None, -1
        self.past: deque[tuple[int, object]] = deque(maxlen=REMEMBERED)  # (until when, value)
        self.again: tuple[int, object] | None = None  # set inside this backward, by a recomputation that includes the setting

    def __reduce__(self):
        return Timeline, ()  # a copy has no past, and lies in no block that would set the value back

    def put(self, value) -> None:
        if torch.compiler.is_compiling():
            self.value = value
            return
        task = torch._C._current_graph_task_id()
        if task != -1:
            self.again = (task, value)
            return
        now = torch._C._autograd._get_sequence_nr()
        if not self.past or self.past[-1][0] != now:
            if len(self.past) == REMEMBERED:
                self.lost = self.past[0][0]
            self.past.append((now, _without_history(self.value)))
        self.value = value

    def state(self) -> tuple:
        """What `back` goes back to, as if nothing had been put since."""
        return self.value, tuple(self.past), self.lost

    def back(self, state: tuple) -> None:
        self.value, past, self.lost = state
        self.past = deque(past, maxlen=REMEMBERED)

    def get(self):
        if torch.compiler.is_compiling() or (task := torch._C._current_graph_task_id()) == -1:
            return self.value
        if self.again is not None and self.again[0] == task:
            return self.again[1]
        node = torch._C._current_autograd_node()
        if node is None:
            return self.value
        moment = node._sequence_nr()
        if moment < self.lost:
            raise RuntimeError(f"more than {REMEMBERED} forwards lie between a checkpointed forward and its backward")
        return next((value for until, value in self.past if moment < until), self.value)


def _without_history(value):
    """The same value without its history: a recomputation asks for numbers, the gradient goes the way of the first run."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) and value.is_floating_point() else value
