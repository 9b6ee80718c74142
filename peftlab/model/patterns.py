"""One matcher for targets, exclusions, overrides, freezing and parameter groups.

A plain name matches whole trailing path components (`q_proj`, `self_attn.q_proj`); `*`, `?`, `[..]` and `{a,b}` glob over the
whole path; a compiled `re.Pattern` is full-matched; a callable gets `(path, module)`; a list is a union.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

Pattern = str | re.Pattern | Callable[[str, nn.Module], bool]


class PatternError(ValueError):
    """A pattern that means nothing in this model."""


def is_pattern(p: object) -> bool:
    return isinstance(p, (str, re.Pattern)) or (callable(p) and not isinstance(p, (type, nn.Module)))


def as_list(patterns: object) -> list[Pattern]:
    """One pattern or a collection of them, as a list."""
    every = [patterns] if isinstance(patterns, (str, re.Pattern)) or not isinstance(patterns, (list, tuple, set, frozenset, dict)) else list(patterns)
    for p in every:
        if not is_pattern(p):
            raise TypeError(f"a pattern is a name, a glob, a compiled regular expression, a callable or a list of these, not {p!r}")
    return every


def is_glob(pattern: Pattern) -> bool:
    return isinstance(pattern, str) and any(c in pattern for c in "*?[{")


def is_plain(pattern: Pattern) -> bool:
    return isinstance(pattern, str) and not is_glob(pattern)


def spells_last(pattern: Pattern) -> bool:
    """Whether the pattern spells out the last path component, so that it can mean a raw parameter."""
    if not is_glob(pattern):
        return True
    return any(re.search(r"\w", re.sub(r"\[[^]]*\]", "", alt.rsplit(".", 1)[-1])) for alt in braces(pattern))


def braces(pattern: str) -> list[str]:
    """`a.{b,c}` -> [`a.b`, `a.c`], nested braces included."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [p for alt in found.group(1).split(",") for p in braces(f"{head}{alt}{tail}")]


@functools.lru_cache(4096)
def _compiled(pattern: str) -> re.Pattern:
    if is_glob(pattern):
        return re.compile("|".join(fnmatch.translate(p) for p in braces(pattern)))
    return re.compile(rf"(?:.*\.)?{re.escape(pattern)}\Z", re.S)


def matches(pattern: Pattern, path: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        return _compiled(pattern).match(path) is not None
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    return bool(pattern(path, module))


class Matcher:
    """Many patterns asked about many paths: plain names are looked up by trailing components, the others are tried one by one."""

    def __init__(self, patterns: Sequence[Pattern]):
        self.plain: dict[str, list[int]] = {}
        self.rest: list[tuple[int, Pattern]] = []
        for i, p in enumerate(patterns):
            if is_plain(p):
                self.plain.setdefault(p, []).append(i)
            else:
                self.rest.append((i, p))

    def of(self, path: str, module: nn.Module) -> set[int]:
        """The numbers of the patterns that match."""
        found = {i for i, p in self.rest if matches(p, path, module)}
        tail = path
        while self.plain:
            found.update(self.plain.get(tail, ()))
            _, dot, tail = tail.partition(".")
            if not dot:
                break
        return found


def specificity(pattern: Pattern) -> int:
    """How much of a path a pattern spells out: its literal characters. A callable or a regular expression counts least."""
    if not isinstance(pattern, str):
        return 0
    return min(len(re.sub(r"\[[^]]*\]|[*?]", "", p)) for p in braces(pattern))


def show(pattern: Pattern) -> str:
    if isinstance(pattern, re.Pattern):
        return f"re.compile({pattern.pattern!r})"
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))


def nearest(wanted: str, there: Iterable[str], n: int = 3) -> list[str]:
    """The n names most like the wanted one, one for each last component."""
    depth = wanted.count(".") + 1
    kinds: dict[str, str] = {}
    for name in there:
        kinds.setdefault(name.rsplit(".", 1)[-1] if depth == 1 else ".".join(name.split(".")[-depth:]), name)
    return sorted(kinds.values(), key=lambda s: -_ratio(wanted, s, depth))[:n]


def _ratio(wanted: str, name: str, depth: int) -> float:
    wanted, name = wanted.lower(), name.lower()
    tail = ".".join(name.split(".")[-depth:])
    return max(difflib.SequenceMatcher(None, wanted, s, autojunk=False).ratio() for s in {name, tail})


def did_you_mean(wanted: str, there: Iterable[str]) -> str:
    """` Did you mean ...?` with the nearest names, or nothing where there are none."""
    close = nearest(str(wanted), there)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""
