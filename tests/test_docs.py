"""What the documentation says is so: generated parts are fresh, the README's commands and examples are those that run."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text("utf8"), re.S)


def test_generated_parts_are_fresh(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "docs" / "generate.py"), run_name="__main__")
    assert done.value.code == 0, capsys.readouterr().out


def test_ci_runs_exactly_the_readmes_test_command():
    commands = [c.strip() for c in blocks(ROOT / "README.md", "bash")]
    test = [c for c in commands if "pytest" in c]
    assert len(test) == 1
    assert f"\n{test[0]}\n" in (ROOT / ".ci" / "run").read_text("utf8")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_python_examples_run(path, tmp_path, monkeypatch):
    """The python blocks of a page run from top to bottom in one namespace."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict = {}
    for code in blocks(path, "python"):
        exec(compile(code, str(path.name), "exec"), space)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_links_between_pages_exist(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text("utf8")):
        assert (path.parent / target).exists(), target
