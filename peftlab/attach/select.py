"""From patterns to the sites that are meant, and the options of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from peftlab.attach.candidates import ancestor_paths, candidate_sites, module_site
from peftlab.attach.default_targets import default_targets, refuse_head_alone
from peftlab.attach.explain import alternatives_text, explain_misses, sites_at_place
from peftlab.core.method import Method
from peftlab.core.site import Site
from peftlab.model.index import ModelIndex, join_path
from peftlab.model.patterns import Matcher, PatternError, as_list, did_you_mean, matches, show, specificity, spells_last
from peftlab.model.places import block_lists


def select_sites(model: ModelIndex, cls: type[Method], label: str, targets, exclude, chosen, of, split, layout, read) -> tuple[list[Site], dict[str, int]]:
    """The sites that the patterns mean, and how many each pattern matched."""
    split, layout = _checked_mapping("split", split), _checked_mapping("layout", layout)
    for pattern, parts in split.items():
        if not isinstance(parts, Mapping):
            raise TypeError(f"split: {show(pattern)} maps to {parts!r}; give the parts as a dict of sizes or rows")
    there = list(candidate_sites(model, cls, split, layout, as_list(read) if read is not None else []))
    return select_among(model, cls, label, there, targets, exclude, chosen, of)


def select_among(model: ModelIndex, cls: type[Method], label: str, there: list[Site], targets, exclude, chosen=None, of=None) -> tuple[list[Site], dict[str, int]]:
    """Those of the sites `there` that the patterns mean, and how many each pattern matched."""
    if of is not None and not (isinstance(of, (str, re.Pattern))):
        raise TypeError(f"of={of!r}: the path of a list of layers")
    counts: dict[str, int] = {}
    if targets is None:
        found = [s for s in default_targets(model, there, cls) if cls.fits(s)]
        refuse_head_alone(model, cls, label, there, found)
        if not found:
            raise PatternError(
                f"{label} finds nothing to sit at by default in this {type(model.root).__name__}; say targets={cls.elsewhere or '...'}"
                + alternatives_text(model, list(model.modules.values()))
            )
        counts["(default)"] = len(found)
    else:
        found = _matched_sites(model, cls, label, there, as_list(targets), counts)
    if exclude is not None:
        found = _without_excluded(model, found, there, as_list(exclude))
    if chosen is not None:
        found = _within_layers(model, found, chosen, of)
    elif of is not None:
        raise ValueError("of= says whose layers are meant: give layers= too")
    if not found:
        raise PatternError(f"nothing is left for {label}: exclude= or layers= took away every site of {counts}")
    _refuse_overlapping_parts(found, label)
    _refuse_unstated_layout(found)
    return found, counts


def _refuse_unstated_layout(found: list[Site]) -> None:
    site = next((s for s in found if s.unstated), None)
    if site is not None:
        raise ValueError(
            f"{site.path!r} has the shape {site.shape}: say layout={{{site.path!r}: ...}} with 'eoi' or 'eio' for one matrix (n_out, n_in) or (n_in, n_out) an "
            "expert, or 'flat' for one matrix whose rows are the first dimension"
        )


def _refuse_overlapping_parts(found: list[Site], label: str) -> None:
    """One adapter does not change a weight twice: as a whole and by its parts."""
    whole = {(id(s.host), s.param): s for s in found if s.kind == "matrix" and s.rows is None and s.expert is None}
    for s in found:
        if s.rows is not None and (id(s.host), s.param) in whole:
            raise PatternError(f"{label} would change {s.path!r} twice: as that, and as a part of {whole[id(s.host), s.param].path!r}. Target one of them.")


def _checked_mapping(what: str, given: object) -> dict:
    """A mapping from patterns, or an empty one."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}={given!r}: a dict from patterns")
    as_list(list(given))
    return dict(given)


def _matched_sites(model: ModelIndex, cls, label: str, there: list[Site], patterns: list, counts: dict[str, int]) -> list[Site]:
    found: dict[int, Site] = {}
    if not patterns:
        raise PatternError(f"targets is empty: {label} would sit nowhere")
    problems = []
    matcher = Matcher(patterns)
    by_path: list[list[Site]] = [[] for _ in patterns]
    for s in there:
        for i in set().union(*(matcher.of(n, s.host) for n in s.names)):
            if not s.explicit or spells_last(patterns[i]):
                by_path[i].append(s)
    for pattern, hits in zip(patterns, by_path, strict=True):
        if isinstance(pattern, str) and pattern.startswith(":"):
            hits = sites_at_place(model, pattern, there)
        fit = [s for s in hits if cls.fits(s)]
        counts[pattern if isinstance(pattern, str) else show(pattern)] = len(fit)
        if fit:
            found.update((id(s), s) for s in fit)
            continue
        problems.append((pattern, hits))
    if problems:
        raise PatternError(explain_misses(model, cls, label, there, problems, counts))
    order = {id(s): i for i, s in enumerate(there)}
    return sorted(found.values(), key=lambda s: order[id(s)])


def companion_sites(model: ModelIndex, cls: type[Method], found: list[Site], hyper: dict) -> list[Site]:
    """The modules that the method asks for besides those that were meant."""
    there = {id(s.host): s.host for s in found}
    asked = [m for m in cls.beside(model, [s.host for s in found], hyper) if id(m) not in there]
    return [module_site(model, m) for m in dict.fromkeys(asked)]


def _matching_patterns(matcher: Matcher, site: Site, model: ModelIndex) -> set[int]:
    """The numbers of the patterns that mean this site or anything it lies in."""
    paths = {a for n in site.names for a in ancestor_paths(n) if a}
    return set().union(*(matcher.of(a, model.at.get(a, site.host)) for a in paths))


def lies_under(pattern, path: str, at: Mapping[str, nn.Module], host: nn.Module) -> bool:
    """Whether a pattern means this path or anything it lies in; `at` gives the modules by path."""
    return any(matches(pattern, a, at.get(a, host)) for a in ancestor_paths(path) if a)


def _without_excluded(model: ModelIndex, found: list[Site], there: list[Site], patterns: list) -> list[Site]:
    matcher = Matcher(patterns)
    meant = {id(s): _matching_patterns(matcher, s, model) for s in there}
    used = set().union(*meant.values(), *(matcher.of(p, m) for p, m in model.at.items() if p))
    for i, pattern in enumerate(patterns):
        if i not in used:
            raise PatternError(f"exclude: {show(pattern)} matches nothing.{did_you_mean(str(pattern), [s.path for s in there])}")
    return [s for s in found if not meant[id(s)]]


def _within_layers(model: ModelIndex, found: list[Site], chosen, of: str | None) -> list[Site]:
    lists = block_lists(model)
    if of is not None:
        hits = {p: m for p, m in ((model.path(m), m) for m in model.modules.values()) if isinstance(m, (nn.ModuleList, nn.Sequential)) and matches(of, p, m)}
        if len(hits) != 1:
            there = list(lists) or [model.path(m) for m in model.modules.values() if isinstance(m, nn.ModuleList)]
            raise PatternError(f"of={of!r} matches {len(hits)} lists of layers.{did_you_mean(of, there)}")
        lists = hits
    if len(lists) != 1:
        raise PatternError(f"layers={chosen!r}: this model has {len(lists)} lists of layers ({', '.join(map(repr, lists)) or 'none'}); say which with of=")
    (root, holder), n = next(iter(lists.items())), 0
    n = len(holder._modules)
    if isinstance(chosen, (str, bytes)) or not isinstance(chosen, (int, Iterable)):
        raise TypeError(f"layers={chosen!r}: whole numbers")
    wanted = [chosen] if isinstance(chosen, int) else list(chosen)
    for i in wanted:
        if isinstance(i, bool) or not isinstance(i, int) or not -n <= i < n:
            raise ValueError(f"layers: {i!r} is not a layer of {root!r}, which has {n}")
    keys = list(holder._modules)
    prefixes = tuple(join_path(root, keys[i]) for i in wanted)
    return [s for s in found if any(s.path == p or s.path.startswith(p + ".") for p in prefixes)]


def options_by_site(model: ModelIndex, sites: list[Site], hyper: dict, overrides: Mapping | None, check) -> list[dict]:
    """The hyper-parameters of each site: the common ones, changed by the most specific override that matches."""
    given = list(_checked_mapping("overrides", overrides).items())
    used: set[int] = set()
    for pattern, changes in given:
        if not isinstance(changes, Mapping):
            raise TypeError(f"overrides: {show(pattern)} maps to {changes!r}; give a dict of options")
        check(dict(changes), f" (in overrides, {show(pattern)})")
    matcher = Matcher([pattern for pattern, _ in given])
    out = []
    for s in sites:
        wishes: dict[str, list[tuple[int, object, object]]] = {}
        meant = sorted(_matching_patterns(matcher, s, model)) if given else ()
        used.update(meant)
        for pattern, changes in (given[i] for i in meant):
            for k, v in changes.items():
                wishes.setdefault(k, []).append((specificity(pattern), pattern, v))
        mine = dict(hyper)
        for k, found in wishes.items():
            best = [w for w in found if w[0] == max(level for level, _, _ in found)]
            if any(w[2] != best[0][2] for w in best):
                raise PatternError(f"overrides: {show(best[0][1])} and {show(best[1][1])} both set {k} at {s.path!r} and neither is more specific")
            mine[k] = best[0][2]
        out.append(mine)
    for i, (pattern, _) in enumerate(given):
        if i not in used:
            raise PatternError(f"overrides: {show(pattern)} matches none of the {len(sites)} sites.{did_you_mean(str(pattern), [s.path for s in sites])}")
    return out
