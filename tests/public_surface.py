"""What `import peftlab` offers, with signatures: `python tests/public_surface.py` writes the snapshot that a test compares with.

A change of the snapshot is a change for users: it belongs in CHANGELOG.md.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import peftlab

SNAPSHOT = Path(__file__).parent / "public_surface.txt"


def signature_of(thing: object) -> str:
    """Parameters with defaults; annotations are left out, which differ between versions of Python."""
    parameters = inspect.signature(thing).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters if p.name != "self"]
    return str(inspect.Signature(plain))


def lines() -> list[str]:
    """One line for every public name, and one for every public attribute of a public class."""
    out = []
    for name in sorted(peftlab.__all__):
        thing = getattr(peftlab, name)
        if not inspect.isclass(thing):
            out.append(f"{name}{signature_of(thing)}")
            continue
        bases = ", ".join(b.__name__ for b in thing.__mro__[1:-1])
        out.append(f"class {name}({bases})")
        own = {n: inspect.getattr_static(thing, n) for n in dir(thing) if not n.startswith("_") and any(n in vars(c) for c in _ours(thing))}
        for attribute, value in sorted(own.items()):
            function = getattr(value, "__func__", value)
            out.append(f"  {attribute}{signature_of(function) if inspect.isfunction(function) else ''}")
    return out


def _ours(cls: type) -> list[type]:
    return [c for c in cls.__mro__ if c.__module__.startswith("peftlab")]


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(lines()) + "\n")
