"""What `check` returns or raises, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftlab.support.table import table
from peftlab.support.text import list_names, without_numbers

STEPS = ("reached", "moves", "saves", "merges")

FOLLOWS = {"moves": {"reached"}, "merges": {"reached", "moves"}}  # failures that are told as another one's


@dataclass
class CheckRow:
    """One adapter at one site (or one shared module). True: proved, False: failed, None: does not apply."""

    path: str
    method: str
    name: str
    reached: bool | None = None  # every tensor gets a gradient from the loss
    moves: bool | None = None  # a change of its tensors changes the output
    saves: bool | None = None  # saved and loaded into a fresh base, it is the same bit for bit
    merges: bool | None = None  # merged, the model gives the same output; unmerged, the same bits
    problems: dict[str, str] = field(default_factory=dict)  # what failed -> the remedy
    note: str = ""

    def fail(self, step: str, remedy: str) -> None:
        setattr(self, step, False)
        self.problems.setdefault(step, remedy)


@dataclass
class CheckReport:
    """What `check` found, a row an adapter and site. Printing it shows a table in which repeated layers are one line."""

    rows: list[CheckRow]
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(r.problems for r in self.rows)

    def __repr__(self) -> str:
        groups: dict[tuple, list[CheckRow]] = {}
        for r in self.rows:
            groups.setdefault((without_numbers(r.path), r.method, r.name, r.note, *(getattr(r, s) for s in STEPS)), []).append(r)
        marks = {True: "yes", False: "NO", None: "-"}
        body = []
        for key, rows in groups.items():
            path = rows[0].path if len(rows) == 1 else key[0]
            body.append((path or "(root)", len(rows), *key[1:3], *(marks[v] for v in key[4:]), key[3]))
        head = ("path", "sites", "method", "name", *STEPS, "note" if any(r.note for r in self.rows) else "")
        failed = sum(bool(r.problems) for r in self.rows)
        verdict = "all adapters pass" if self.ok else f"{failed} of {len(self.rows)} fail"
        return "\n".join([table(head, body, right=(1,)), verdict, *self.notes])


class CheckError(RuntimeError):
    """Adapters that do not work. `report` is the whole CheckReport."""

    def __init__(self, found: CheckReport):
        self.report = found
        causes: dict[tuple[str, str], list[CheckRow]] = {}
        for r in found.rows:
            for step, remedy in r.problems.items():
                if not r.problems.keys() & FOLLOWS.get(step, set()):
                    causes.setdefault((step, remedy), []).append(r)
        meaning = {"reached": "not reached", "moves": "no effect", "saves": "not saved", "merges": "not merged"}
        lines = []
        for (step, remedy), rows in causes.items():
            names = ", ".join(f"{r.path!r} ({r.method} {r.name!r})" for r in rows)
            lines.append(f"  {meaning[step]}: {names}: {remedy.replace('{paths}', list_names([r.path for r in rows], 3))}")
        failed = sum(bool(r.problems) for r in found.rows)
        super().__init__(f"{failed} of {len(found.rows)} adapters failed the check\n" + "\n".join(lines))
