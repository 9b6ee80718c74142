"""Every row of a batch its own adapters: `with route(model, ["fr", None, "de"]):`.

A layer whose call is surrounded gets its rows sorted by what acts on them; the frozen call runs once for all of them where the
methods ask for no more than its output. A module whose weights are read runs once for each group of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

from peftlab.core.adapters import adapted_modules_and_names, match_names, refuse_inside_blocks
from peftlab.core.chain import Route
from peftlab.core.method import Method
from peftlab.core.rows import own_batch_dimension, run_routed
from peftlab.core.site import ADAPTERS_CHILD
from peftlab.core.stack import AdapterStack, adapted_modules
from peftlab.core.swap import restore_class, swap_class
from peftlab.model.index import ModelIndex, ensure_module
from peftlab.model.readers import READERS
from peftlab.model.walk import Adapted, original_class, unwrap_parallel


@contextlib.contextmanager
def route(model: nn.Module, names: Iterable[str | Iterable[str] | None], *, batch_dim: int = 0) -> Iterator[nn.Module]:
    """Inside the block, row i of every batch has the adapters `names[i]` (a name, several, or None) and no others.

    Outputs and gradients equal those of running the rows one by one, for every method. A batch of k * len(names) rows gives each
    entry k rows in succession, as beam search and flattened tokens have them.

    Args:
        names: one entry a row of the batch; which adapters are active outside the block does not matter.
        batch_dim: the dimension of the layers' inputs that counts the rows (1 for models with the sequence first).

    Raises:
        ValueError: for unknown names, merged adapters, adapters trained in place, and methods that cannot be told apart by row,
            among them those around a call whose module has the sequence before the batch, where they do not know the layout.
            During the block, a layer whose batch does not have that many rows raises with its path.
    """
    found, there = adapted_modules_and_names(ensure_module(model))
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"batch_dim={batch_dim!r}: the number of a dimension, counted from 0")
    wanted = _adapters_by_row(names, there)
    refuse_inside_blocks(model, found)
    asked = {n for row in wanted for n in row}
    _refuse_unroutable(found, asked)
    _refuse_sequence_first(unwrap_parallel(model), found, asked)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(wanted):
        groups.setdefault(row, []).append(i)
    chosen = Route(len(wanted), tuple((g, tuple(rows)) for g, rows in groups.items()), batch_dim, run_routed)
    before = [(s, s.route, s.within) for _, _, s in found]
    lent = _mark_boundaries(unwrap_parallel(model), found)
    try:
        for _, _, s in adapted_modules(model):
            s.route = chosen
        for _, _, s in adapted_modules(model):
            s.refresh()
        yield model
    finally:
        for host in lent:
            restore_class(host)
        for s, old, within in before:
            s.route, s.within = old, within
            s.made = {}
            s.refresh()


def _adapters_by_row(names: object, there: list[str]) -> list[tuple[str, ...]]:
    """The adapters of each row, in stacking order."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"names={names!r}: one entry a row of the batch, each a name, a list of names, or None")
    rows = [() if row is None else tuple(match_names(there, row)) for row in names]
    if not rows:
        raise ValueError("names is empty: one entry a row of the batch")
    return rows


def _refuse_unroutable(found: list[tuple[str, nn.Module, AdapterStack]], wanted: set[str]) -> None:
    for path, _, s in found:
        if s.merged:
            raise ValueError(f"{s.merged[0]!r} is merged into {path!r}, where it acts on every row: unmerge it first")
        for n, pairs in s.sites.items():
            for site, m in pairs:
                if m.in_place:
                    raise ValueError(f"{n!r} is trained in place at {site.path!r}: no row is without it")
                if n in wanted and m.surrounds() and type(m).routed.__func__ is Method.routed.__func__:
                    raise ValueError(f"{m.recipe.label} at {site.path!r} changes a call as a whole: its rows cannot be told apart")


def _refuse_sequence_first(root: nn.Module, found: list[tuple[str, nn.Module, AdapterStack]], wanted: set[str]) -> None:
    """Methods around a call take the first dimension for the batch's, unless they know the layout themselves."""
    pairs = [(host, site, m) for _, host, s in found for n, here in s.sites.items() if n in wanted for site, m in here]
    pairs = [(host, site, m) for host, site, m in pairs if m.surrounds() and not m.any_layout]
    parents = ModelIndex.of(root).parents if pairs else {}
    for host, site, m in pairs:
        above = [host]
        while above:
            top = above.pop()
            dim = own_batch_dimension(top)
            if dim == 1:
                raise ValueError(
                    f"{m.recipe.label} at {site.path!r} takes rows from the first dimension, and its {original_class(top).__name__} has the sequence "
                    "there (batch_first=False): build the model with batch_first=True, or run the rows one by one"
                )
            above += parents.get(id(top), ()) if dim is None else ()


def _mark_boundaries(root: nn.Module, found: list[tuple[str, nn.Module, AdapterStack]]) -> list[nn.Module]:
    """Say which module runs once a group for the weights that are read; returns the modules that had to be made adaptable for it."""
    read = [(host, s) for _, host, s in found if s.read]
    if not read:
        return []
    parents = ModelIndex.of(root).parents
    within: dict[int, tuple[nn.Module, list[AdapterStack]]] = {}
    for host, s in read:
        top = host
        while up := [p for p in _parents_above(parents, top) if isinstance(p, (*READERS, nn.TransformerEncoder))]:
            top = up[0]
        sources = [s, *(h._modules[ADAPTERS_CHILD] for h, _ in s.alias.values())]
        within.setdefault(id(top), (top, []))[1].extend(t for t in sources if t.sites)
    lent = [top for top, _ in within.values() if not isinstance(top, Adapted)]
    for top, read_here in within.values():
        stack = top._modules.get(ADAPTERS_CHILD) or swap_class(top, False, ())
        stack.within = tuple(dict.fromkeys(read_here))
    return lent


def _parents_above(parents: dict[int, list[nn.Module]], m: nn.Module) -> list[nn.Module]:
    """The modules that hold `m`, lists of modules apart."""
    return [q for p in parents.get(id(m), ()) for q in ([p] if not isinstance(p, nn.ModuleList) else _parents_above(parents, p))]
