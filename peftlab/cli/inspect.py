"""`peftlab inspect`: what is in an adapter file."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftlab.cli.errors import UserError, blamed
from peftlab.formats.file import read


def inspect(path: Path, tensors: bool, console: Console) -> int:
    """Print adapters, options, sites by pattern and sizes of a file whose every tensor has been checked."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with blamed("inspect"):
        header, values = read(path)
    size = {k: t.numel() * t.element_size() for k, t in values.items()}
    say = lambda text: console.print(escape(text), highlight=False, soft_wrap=True)  # noqa: E731
    say(f"{path}: {path.stat().st_size:,} bytes, format {header['format']}, written by peftlab {header['peftlab']}")
    say(f"{len(values)} tensors, all checksums right")
    for adapter in header["adapters"]:
        state = f"{'active' if adapter.get('active', True) else 'inactive'}, {'trainable' if adapter.get('trainable') else 'frozen'} when saved"
        say(f"\nadapter {adapter['name']!r}: {adapter['method']}, {len(adapter['sites'])} sites, seed {adapter['seed']}, {state}")
        for i, setting in enumerate(adapter["settings"]):
            given = ", ".join(f"{k}={v}" for k, v in setting["options"].items() if k not in setting["at_default"]) or "all options at their defaults"
            default = ", ".join(f"{k}={setting['options'][k]}" for k in setting["at_default"])
            sites = sum(1 for site in adapter["sites"] if site["settings"] == i)
            say(f"  options of {sites} sites: {given}" + (f" (default: {default})" if default else ""))
        table = Table("sites", "count", "layer rule", "shape")
        groups = Counter((re.sub(r"\d+", "#", _place(site)), site["rule"], "x".join(map(str, site["shape"]))) for site in adapter["sites"])
        for (place, rule, shape), count in groups.items():
            table.add_row(escape(place), str(count), rule, shape)
        console.print(table)
    for kind in ("buffers", "included"):
        if header[kind]:
            say(f"{kind}: {', '.join(header[kind])}")
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in values.values())
    kinds = ", ".join(f"{n} {d}" for d, n in dtypes.items())
    say(f"{sum(t.numel() for t in values.values()):,} values in {sum(size.values()):,} bytes ({kinds})")
    if tensors:
        table = Table("tensor", "dtype", "shape", "largest value")
        for key, t in sorted(values.items()):
            biggest = f"{t.abs().max().item():.4g}" if t.numel() else ""
            table.add_row(escape(key), str(t.dtype).removeprefix("torch."), "x".join(map(str, t.shape)), biggest)
        console.print(table)
    return 0


def _place(site: dict) -> str:
    return ".".join(part for part in (site["host"], site.get("key") or site.get("param") or "") if part)
