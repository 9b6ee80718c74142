"""How far a long call is: told to a function of the caller's, or drawn as a bar by tqdm, which is imported only then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Protocol

Progress = bool | Callable[[int, int | None, str], object] | None  # what the public calls take as progress=


class Tell(Protocol):
    """Is told after each step: steps done, of how many (None where nobody knows), and what the last one was."""

    def __call__(self, done: int, total: int | None, what: str) -> object: ...


def check_progress(progress: object) -> None:
    """Raise TypeError on what cannot be told, and ImportError where a bar is asked for and nothing draws one."""
    if progress is True and find_spec("tqdm") is None:
        raise ImportError("progress=True draws a bar with tqdm, which is not installed: pip install tqdm, or give a function of (done, total, path)")
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress={progress!r}: True for a bar, or a function of (done, total, path)")


@contextlib.contextmanager
def reported(progress: Progress, phase: str) -> Iterator[Tell]:
    """The one to tell about a phase of a call; its bar is closed at the end, an exception's or an interrupt's included."""
    if progress is not True:
        yield progress or _nobody
        return
    from tqdm.auto import tqdm

    with tqdm(desc=phase, dynamic_ncols=True) as bar:

        def draw(done: int, total: int | None, what: str) -> None:
            bar.total = total
            bar.set_postfix_str("" if what == phase else what, refresh=False)
            bar.update(done - bar.n)

        yield draw


def _nobody(done: int, total: int | None, what: str) -> None:
    """Nobody asked."""
