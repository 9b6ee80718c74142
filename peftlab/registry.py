"""The registry: one file in `methods/` is one method, and its docstring says what there is to know about it."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass, field

from peftlab.core.method import Method
from peftlab.model.patterns import did_you_mean

package = importlib.import_module(f"{__package__}.methods")  # not `from . import`: the package's public name `methods` is a function


@dataclass(frozen=True)
class Entry:
    """What the registry says of one name."""

    name: str
    method: str  # file name; differs from `name` for an alias
    summary: str
    family: str = ""
    paper: str = ""
    trains: str = ""
    structure: str = ""
    rate: float | None = None  # Adam's learning rate to begin with, found on validation data
    hyper: dict = field(default_factory=dict)  # keywords that an alias sets

    @property
    def alias(self) -> bool:
        return self.name != self.method


@functools.cache
def families() -> dict[str, str]:
    """The folder that each method's file lies in, by file name."""
    found: dict[str, str] = {}
    for folder in pkgutil.iter_modules(package.__path__):
        if folder.ispkg:
            inside = pkgutil.iter_modules([f"{path}/{folder.name}" for path in package.__path__])
            found |= {m.name: folder.name for m in inside if not m.name.startswith("_")}
    return found


def names() -> tuple[str, ...]:
    """The methods, by file name, without aliases."""
    return tuple(sorted(families()))


def _sections(doc: str) -> dict[str, str]:
    found = re.findall(r"^(Trains|Structure|Family|Paper|Rate|Aliases|Differs):\s*(.*(?:\n(?![A-Z]\w+:).+)*)", doc, re.M)
    return {k: " ".join(v.split()) for k, v in found}


def _doc(name: str) -> str:
    # The docstring is read without importing the file, so that listing the registry stays cheap.
    for finder in package.__path__:
        with open(f"{finder}/{families()[name]}/{name}.py", encoding="utf8") as f:
            return ast.get_docstring(ast.parse(f.read())) or ""
    raise FileNotFoundError(name)


def _rates(name: str, section: str) -> dict[str, float]:
    """Learning rates by name: the method's own comes first, then those of aliases that need another (`1e-3; alias = 1e-2`)."""
    parts = [part.rpartition("=") for part in section.split(";") if part.strip()]
    return {alias.strip() or name: float(value) for alias, _, value in parts}


@functools.cache
def entries() -> dict[str, Entry]:
    """Every name that `wrap` understands, aliases included."""
    found: dict[str, Entry] = {}
    for name in names():
        doc = _doc(name)
        sec = _sections(doc)
        common = dict(family=sec.get("Family", ""), paper=sec.get("Paper", ""), trains=sec.get("Trains", ""), structure=sec.get("Structure", ""))
        rates = _rates(name, sec.get("Rate", ""))
        found[name] = Entry(name, name, doc.split("\n")[0], **common, rate=rates.get(name))
        for part in filter(None, (p.strip() for p in sec.get("Aliases", "").split(";"))):
            alias, call = (s.strip() for s in part.rstrip(".").split("=", 1))
            hyper = {k.arg: ast.literal_eval(k.value) for k in ast.parse(call, mode="eval").body.keywords}
            settings = ", ".join(f"{k}={v!r}" for k, v in hyper.items())
            found[alias] = Entry(alias, name, f"{name} with {settings}", **common, rate=rates.get(alias, rates.get(name)), hyper=hyper)
    return found


def methods(family: str | None = None, aliases: bool = True) -> list[Entry]:
    """The registry as rows, filterable by family; aliases are names of the literature that are settings of another method."""
    there = sorted({e.family for e in entries().values()} - {""})
    if family is not None and family not in there:
        raise ValueError(f"there is no family {family!r}.{did_you_mean(str(family), there)} There are: {', '.join(there)}.")
    return [e for _, e in sorted(entries().items()) if (family is None or e.family == family) and (aliases or not e.alias)]


def resolve(method: str | type[Method]) -> tuple[type[Method], dict, str]:
    """A registry name or a Method subclass -> (class, keywords the name sets, name to record)."""
    if isinstance(method, type) and issubclass(method, Method):
        if not (method.defined() or method.forward is not Method.forward):
            raise TypeError(f"{method.__name__} overrides neither weight, bias nor forward: it changes nothing")
        module = importlib.import_module(method.__module__)
        registered = module.__name__.startswith(f"{package.__name__}.")
        return method, {}, module.__name__.rsplit(".", 1)[-1] if registered else f"{method.__module__}:{method.__qualname__}"
    if not isinstance(method, str):
        raise TypeError(f"a method is a name of the registry or a subclass of peftlab.Method, not {method!r}")
    entry = entries().get(method)
    if entry is None:
        raise ValueError(f"there is no method {method!r}.{did_you_mean(method, entries())}")
    module = importlib.import_module(f"{package.__name__}.{families()[entry.method]}.{entry.method}")
    cls = next(c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == module.__name__)
    return cls, dict(entry.hyper), entry.method


def keywords(cls: type[Method]) -> dict[str, inspect.Parameter]:
    """The hyper-parameters of a method: its keyword-only arguments."""
    return {k: p for k, p in inspect.signature(cls.__init__).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_keywords(cls: type[Method], hyper: dict, where: str = "") -> None:
    """Unknown and missing hyper-parameters raise with the nearest right name."""
    known = keywords(cls)
    for k in hyper:
        if k not in known:
            raise TypeError(f"{cls.__name__} has no option {k!r}{where}.{did_you_mean(k, known)} It has: {', '.join(known) or 'none'}.")
    for k, v in hyper.items():
        if known[k].annotation in (bool, "bool") and not isinstance(v, bool):
            raise TypeError(f"{k}={v!r}{where}: True or False")
    missing = [k for k, p in known.items() if p.default is inspect.Parameter.empty and k not in hyper]
    if missing and not where:
        raise TypeError(f"{cls.__name__} needs {', '.join(missing)}")
