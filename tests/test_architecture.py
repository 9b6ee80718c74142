"""The shape of the package as code: who imports whom, how long things are, what a method file must say, and what no file may."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import public_surface
import pytest

import peftlab
from peftlab import registry

PACKAGE = Path(peftlab.__file__).parent
ROOT = PACKAGE.parent
SOURCES = {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.rglob("*.py"))}
METHODS = {p.stem: p for p in sorted((PACKAGE / "methods").glob("*/*.py")) if not p.stem.startswith("_")}
MAY_IMPORT = {"torch", "numpy", "safetensors", "einops"}  # besides Python's own library; declared in pyproject.toml
IF_THERE = {
    ("support/progress.py", "tqdm"),  # imported when it is asked for, with an error that names it where it is missing
    ("quant/kernels/triton_source.py", "triton"),  # a file that is imported for tensors on CUDA, and left alone where triton is missing
}

ASKING = ("core/", "model/", "attach/", "methods/", "parts/")
METHOD_LINES = 85
FUNCTION_LINES = 60
FILE_LINES = 400


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))


def code_lines(source: str) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    lines: set[int] = set()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type not in skipped:
            lines |= set(range(t.start[0], t.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            doc = node.body[0]
            lines -= set(range(doc.lineno, doc.end_lineno + 1))
    return len(lines)


# ---------------------------------------------------------------- imports


def typing_only(module: ast.Module) -> set[int]:
    """The ids of import nodes under `if TYPE_CHECKING`: they never run."""
    out = set()
    for node in ast.walk(module):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            out |= {id(n) for part in node.body for n in ast.walk(part)}
    return out


def imports(name: str, typing: bool = False) -> set[str]:
    """What a file of the package imports, at its top and inside functions: `peftlab.x.y` for our own, the first component for others."""
    module = tree(SOURCES[name])
    skipped = set() if typing else typing_only(module)
    here = ["peftlab", *name.removesuffix(".py").split("/")]
    if here[-1] == "__init__":
        here.pop()
        package = here
    else:
        package = here[:-1]
    found: set[str] = set()
    for node in ast.walk(module):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name if a.name.split(".")[0] == "peftlab" else a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module if node.module.split(".")[0] == "peftlab" else node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            base = [*base, *(node.module.split(".") if node.module else [])]
            for a in node.names:  # `from . import host` names a file, `from .host import Site` a thing in one
                file = "/".join([*base[1:], a.name])
                found.add(".".join([*base, a.name]) if f"{file}.py" in SOURCES or f"{file}/__init__.py" in SOURCES else ".".join(base))
    return found


# Who may import whom: a room knows those before it, and nothing of those after it.
ROOMS = (
    ("support",),
    ("parts",),
    ("model",),
    ("core",),
    ("method",),
    ("methods", "registry"),
    ("attach",),
    ("quant",),
    ("train",),
    ("manage",),
    ("formats",),
    ("inspect",),
    ("cli",),
)
FLOOR = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room of `peftlab.x.y`; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def test_rooms_know_only_those_before_them():
    for name in SOURCES:
        here = room_of("peftlab." + name.removesuffix(".py").replace("/", "."))
        if here == "__init__":
            continue
        assert here in FLOOR, f"{name}: no such room in ROOMS"
        for target in imports(name, typing=True):
            there = room_of(target) if target.startswith("peftlab") else None
            if there is not None and there != here:
                assert FLOOR[there] < FLOOR[here], f"{name} imports {target}, a room that comes later"


def test_no_private_name_crosses_files():
    for name, path in SOURCES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftlab"):
                for a in node.names:
                    assert not a.name.startswith("_") or a.name.startswith("__"), f"{name} imports {a.name} of {node.module}"


@pytest.mark.parametrize("name", SOURCES)
def test_files_hold_one_idea(name):
    lines = len(SOURCES[name].read_text(encoding="utf8").splitlines())
    assert lines <= FILE_LINES, f"{lines} lines: split it"


def test_no_core_file_names_a_method():
    """The core asks what a method overrides and declares. No file outside methods/ imports one."""
    for name in SOURCES:
        if not name.startswith("methods/"):
            assert not [t for t in imports(name) if t.startswith("peftlab.methods.")], name


def test_no_import_cycles():
    """Function-level and typing imports included; `__init__` files, which only re-export, are left out of the graph."""
    graph = {"peftlab." + n.removesuffix(".py").replace("/", "."): imports(n, typing=True) for n in SOURCES if not n.endswith("__init__.py")}
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, " -> ".join([*trail[trail.index(node) :], node])
        if node in done:
            return
        for target in sorted(graph.get(node, ())):
            if target in graph:
                visit(target, (*trail, node))
        done.add(node)

    for node in graph:
        visit(node, ())


def test_only_declared_packages_are_imported():
    for name in SOURCES:
        if name.startswith("cli/"):
            continue  # the command line may use the demo's packages
        for target in imports(name, typing=True):
            known = target.startswith("peftlab") or target in MAY_IMPORT or target in sys.stdlib_module_names
            assert known or (name, target) in IF_THERE, f"{name} imports {target}"


IMPORT_ONLY = "import peftlab"
IMPORT_ALL = "import peftlab; [getattr(peftlab, n) for n in peftlab.__all__]; peftlab.methods()"


@pytest.mark.parametrize("code", [IMPORT_ONLY, IMPORT_ALL])
def test_importing_costs_what_torch_costs(code):
    """Nothing comes in but torch, what torch itself brings, and the declared packages; the names alone bring no method file."""
    if code == IMPORT_ALL and (late := [n for n in peftlab.__all__ if not defined(n)]):
        pytest.skip(f"not there yet: {late}")
    script = f"import sys, torch; before = set(sys.modules); {code}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    new = done.stdout.split()
    top = {n.split(".")[0] for n in new}
    assert top <= {"peftlab", *MAY_IMPORT} | set(sys.stdlib_module_names), sorted(top)
    assert not [n for n in new if n.startswith("peftlab.methods.")]
    if code == IMPORT_ONLY:
        assert [n for n in new if n.startswith("peftlab")] == ["peftlab"]


# ---------------------------------------------------------------- method files


@pytest.mark.parametrize("name", METHODS)
def test_one_method_a_file(name):
    classes = [n for n in tree(METHODS[name]).body if isinstance(n, ast.ClassDef)]
    methods = [c for c in classes if any(isinstance(b, ast.Name) and b.id == "Method" for b in c.bases)]
    assert len(methods) == 1, [c.name for c in methods]
    assert [ast.unparse(b) for b in methods[0].bases] == ["Method"], "a method inherits from Method alone"
    for c in classes:
        assert all(ast.unparse(b) in ("Method", "nn.Module", "torch.autograd.Function", "Function") for b in c.bases), c.name
    assert methods[0].name.lower() == name.replace("_", ""), f"{methods[0].name} is the paper's spelling of {name}"
    cls = registry.resolve(name)[0]
    assert cls.__name__ == methods[0].name
    assert cls.defined() or cls.forward is not peftlab.Method.forward


@pytest.mark.parametrize("name", METHODS)
def test_method_files_are_short(name):
    lines = code_lines(METHODS[name].read_text(encoding="utf8"))
    assert lines <= METHOD_LINES, f"{lines} lines of code: mathematics belongs in parts/"


def test_half_of_the_method_files_are_very_short():
    counts = sorted(code_lines(p.read_text(encoding="utf8")) for p in METHODS.values())
    assert counts[len(counts) // 2] <= 45, counts


@pytest.mark.parametrize("name", METHODS)
def test_method_docstrings_say_what_the_suite_reads(name):
    doc = ast.get_docstring(tree(METHODS[name])) or ""
    head = doc.split("\n")[0]
    assert re.fullmatch(r"[\w ()+-]+: .+\.", head), f"the first line is `Name: one sentence.`, not {head!r}"
    assert re.search(r"^    \S.*=", doc, re.M), "the equation stands indented"
    entry = registry.entries()[name]
    assert entry.trains, "Trains:"
    assert entry.structure, "Structure:"
    assert entry.family, "Family:"
    assert entry.paper, "Paper:"
    assert re.search(r"arXiv \d{4}\.\d{4,5}|(18|19|20)\d\d|none", entry.paper), entry.paper
    compile(entry.trains, "Trains", "eval")
    families = {e.family for e in peftlab.methods(aliases=False)}
    near = [f for f in families if f != entry.family and f.lower() == entry.family.lower()]
    assert not near, f"family {entry.family!r} is also written {near}"


# One word for one thing, in all files.
WORDS = {
    "rank": "r", "lora_r": "r", "lora_rank": "r", "lora_alpha": "alpha", "scaling": "alpha", "scale": "alpha", "lora_dropout": "dropout", "drop": "dropout",
    "drop_p": "dropout", "p_dropout": "dropout", "num_blocks": "blocks", "n_blocks": "blocks", "nblocks": "blocks", "block_count": "blocks",
    "n_frequency": "n", "num": "n", "count": "n", "n_entries": "n", "hidden": "dim", "hidden_size": "dim", "hidden_dim": "dim", "bottleneck": "dim",
    "bottleneck_dim": "dim", "initialization": "init", "init_weights": "init", "init_lora_weights": "init", "initializer": "init", "random_seed": "seed",
    "rng": "seed", "generator": "seed", "projection_prng_key": "seed",
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_hyper_parameters(name):
    """Keyword-only, annotated, in the common vocabulary, with a default or without; and the docstring or the signature explains them."""
    cls = registry.resolve(name)[0]
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    assert [p.name for p in parameters[:2]] == ["self", "base"]
    for p in parameters[2:]:
        assert p.kind is inspect.Parameter.KEYWORD_ONLY, f"{p}: hyper-parameters are keyword-only; no *args, no **kwargs"
        assert p.annotation is not inspect.Parameter.empty, f"{p.name} has no annotation"
        assert p.name not in WORDS, f"{p.name} is called {WORDS[p.name]} in this library"
        assert re.fullmatch(r"[a-z][a-z0-9_]*", p.name), p.name
    common = {"r", "alpha", "dropout", "seed", "blocks", "n", "dim", "init"}
    doc = ast.get_docstring(tree(METHODS[name]))
    for p in parameters[2:]:
        assert p.name in common or re.search(rf"\b{p.name}\b", doc), f"the docstring does not say what {p.name} is"


def test_file_names_are_registry_names():
    assert set(registry.names()) == METHODS.keys()
    for name in METHODS:
        assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name), name
    aliases = [e.name for e in peftlab.methods() if e.alias]
    assert not set(aliases) & METHODS.keys(), "an alias hides a method"
    for e in peftlab.methods():
        known = {*registry.keywords(registry.resolve(e.name)[0]), *inspect.signature(peftlab.wrap).parameters}
        assert e.hyper.keys() <= known, f"alias {e.name} sets an option that {e.method} does not have"


# ---------------------------------------------------------------- sizes and depth


def functions(module: ast.Module):
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def body_lines(node, source: str) -> int:
    lines = source.split("\n")[node.lineno - 1 : node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return code_lines("\n".join(line[indent:] for line in lines) + "\n")


@pytest.mark.parametrize("name", SOURCES)
def test_functions_are_short(name):
    source = SOURCES[name].read_text(encoding="utf8")
    for f in functions(tree(SOURCES[name])):
        lines = body_lines(f, source)
        assert lines <= FUNCTION_LINES, f"{f.name} has {lines} lines of code"


def test_classes_are_flat():
    """No class of ours stands more than two steps below what it gets from outside."""
    bases: dict[str, list[str]] = {}
    for path in SOURCES.values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(b) for b in node.bases]

    def depth(name: str) -> int:
        return 1 + max((depth(b) for b in bases[name] if b in bases), default=0)

    for name in bases:
        assert depth(name) <= 4, name


# ---------------------------------------------------------------- the public surface


def defined(name: str) -> bool:
    """Whether the file that is to hold a public name is there."""
    where = peftlab._WHERE[name].replace(".", "/")
    return f"{where}.py" in SOURCES or f"{where}/__init__.py" in SOURCES


@pytest.mark.parametrize("name", peftlab.__all__)
def test_public_names(name):
    thing = getattr(peftlab, name)
    assert inspect.isclass(thing) or callable(thing)
    assert inspect.getdoc(thing), f"peftlab.{name} has no docstring"
    assert not inspect.ismodule(thing)


def test_the_surface_is_complete():
    assert sorted(peftlab.__all__) == list(peftlab.__all__) or sorted(peftlab.__all__, key=str.lower) == sorted(peftlab.__all__, key=str.lower)
    assert set(peftlab.__all__) <= set(peftlab._WHERE)
    assert set(peftlab.__all__) <= set(dir(peftlab))
    with pytest.raises(AttributeError, match="Did you mean 'wrap'"):
        _ = peftlab.wrapp


def test_the_surface_is_the_recorded_one():
    """Names and signatures that users write: a change is meant, noted in CHANGELOG.md, and written by `python tests/public_surface.py`."""
    assert public_surface.lines() == public_surface.SNAPSHOT.read_text().splitlines()


@pytest.mark.parametrize("name", [n for n in SOURCES if not n.endswith("__init__.py")])
def test_every_file_and_public_function_says_what_it_is(name):
    module = tree(SOURCES[name])
    assert ast.get_docstring(module), "no module docstring"
    for node in module.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            cls = getattr(importlib.import_module("peftlab." + name.removesuffix(".py").replace("/", ".")), node.name)
            assert inspect.getdoc(cls) or name.startswith("methods/"), node.name
    if name.startswith("parts/"):
        for f in module.body:
            if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"):
                assert ast.get_docstring(f), f"parts are pure functions with docstrings: {f.name}"


# ---------------------------------------------------------------- what no file may say

# Written in pieces, so that this file passes its own test.
FORBIDDEN = {
    "a path of some machine": re.compile("|".join(("/ro" + r"ot/\w", "/ho" + r"me/\w+/", "/Us" + r"ers/\w+/", "/wo" + "rk/(main|shared)", "/tm" + r"p/\w+"))),
    "an unfinished thought": re.compile("|".join(rf"\b{word}\b" for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"))),
}
CODE_ONLY = {
    "global random state": re.compile(r"torch\.manual_seed|np\.random\.(?!get_state|set_state)|(?<![.\w])random\.(random|seed|shuffle|choice)"),
    "code from data": re.compile(r"\bpickle\.loads?\(|\btorch\.load\(|(?<![.\w])(eval|exec)\("),
    "printing from a library": re.compile(r"(?<![.\w])print\("),
    "looking instead of asking": re.compile(r"\bhasattr\("),
}
HOSTS = {
    "arxiv.org", "github.com", "huggingface.co", "pytorch.org", "docs.pytorch.org", "doi.org", "openreview.net", "aclanthology.org", "pypi.org",
    "peps.python.org",
    "docs.python.org", "www.apache.org", "creativecommons.org", "img.shields.io", "keepachangelog.com", "semver.org", "localhost", "127.0.0.1",
}  # fmt: skip


def texts():
    for folder in ("peftlab", "tests", "docs", "examples", "benchmarks"):
        for p in sorted((ROOT / folder).rglob("*")):
            if p.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".json", ".ipynb", ".txt", ".cfg"} and "__pycache__" not in p.parts:
                yield p
    yield from (p for p in sorted(ROOT.glob("*")) if p.suffix in {".md", ".toml", ".yml", ".cfg"})


def test_no_file_speaks_of_one_machine():
    for p in texts():
        content = p.read_text(encoding="utf8")
        for what, pattern in FORBIDDEN.items():
            hit = pattern.search(content)
            assert not hit, f"{p.relative_to(ROOT)}: {what}: {hit.group()!r}"
        for host in re.findall(r"https?://([\w.-]+)", content):
            assert host in HOSTS or host.endswith((".github.io", ".readthedocs.io")), f"{p.relative_to(ROOT)} links to {host}, which is not in HOSTS"


@pytest.mark.parametrize("what", CODE_ONLY)
def test_the_package_does_not(what):
    for name, p in SOURCES.items():
        if name.startswith("cli/") and what == "printing from a library":
            continue
        if what == "looking instead of asking" and not name.startswith(ASKING):
            continue
        if what == "global random state" and (name.startswith("inspect/check/") or name == "core/preserve.py" or name.startswith("cli/")):
            continue  # a trial run that puts every generator back; an application, which owns them
        for number, line in enumerate(strings_removed(p), 1):
            assert not CODE_ONLY[what].search(line), f"{name}:{number}: {what}: {line.strip()}"


def strings_removed(path: Path) -> list[str]:
    """The lines of a file without comments and docstrings and other strings."""
    source = path.read_text(encoding="utf8")
    lines = [list(line) for line in source.split("\n")]
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type in kinds:
            for row in range(t.start[0], t.end[0] + 1):
                first = t.start[1] if row == t.start[0] else 0
                last = t.end[1] if row == t.end[0] else len(lines[row - 1])
                lines[row - 1][first:last] = " " * (last - first)
    return ["".join(line) for line in lines]


def test_no_method_is_named_in_the_laws():
    """The suite asks what a method overrides; a branch on a name would be an exception that nobody listed."""
    module = tree(ROOT / "tests" / "test_conformance.py")
    names = set(METHODS) | {e.name for e in peftlab.methods()}
    for node in ast.walk(module):
        if isinstance(node, ast.Compare):
            constants = [c.value for n in [node.left, *node.comparators] for c in ast.walk(n) if isinstance(c, ast.Constant)]
            assert not names & {c for c in constants if isinstance(c, str)}, ast.unparse(node)
