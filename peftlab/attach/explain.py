"""Why patterns met nothing that a method fits, and what would fit there."""

from __future__ import annotations

from torch import nn

from peftlab.attach.candidates import candidate_sites
from peftlab.attach.places import PLACES
from peftlab.core.site import Site
from peftlab.model import layers
from peftlab.model.index import ModelIndex, join_path
from peftlab.model.patterns import PatternError, did_you_mean, matches, show
from peftlab.model.walk import original_class
from peftlab.registry import names as registered
from peftlab.registry import resolve


def sites_at_place(model: ModelIndex, pattern: str, there: list[Site]) -> list[Site]:
    """Sites named by their part in the model instead of by a path, such as `:head`."""
    if pattern not in PLACES:
        raise PatternError(f"{pattern!r}: the structural names are {', '.join(map(repr, PLACES))}.{did_you_mean(pattern, PLACES)}")
    hosts = {id(m) for m in PLACES[pattern](model)}
    return [s for s in there if id(s.host) in hosts]


def explain_misses(model: ModelIndex, cls, label: str, there: list[Site], problems: list, counts: dict[str, int]) -> str:
    lines = []
    fitting = [n for s in there if cls.fits(s) for n in s.names[:1]]
    for pattern, hits in problems:
        if hits:
            kinds = sorted({type(s.host).__name__ for s in hits})
            lines.append(
                f"{show(pattern)} only meets {', '.join(kinds)} ({hits[0].path!r} and so on), which {label} does not fit."
                + alternatives_text(model, [s.host for s in hits])
            )
            continue
        inside = [p for p, m in model.at.items() if p and matches(pattern, p, m)]
        if inside:
            below = [n for n in fitting if n.startswith(inside[0] + ".")]
            cure = layers.how_to_make_plain(model.at[inside[0]])
            if cure:
                lines.append(f"{show(pattern)} is a layer whose weight is computed from other parameters, which {label} does not fit; {cure} makes it a plain one.")
                continue
            hint = f" Below it there are {len(below)} that {label} fits, such as {below[0]!r}: use a glob." if below else did_you_mean(str(pattern), fitting)
            lines.append(
                f"{show(pattern)} is a {original_class(model.at[inside[0]]).__name__}, which {label} does not fit.{hint}"
                + alternatives_text(model, [model.at[p] for p in inside])
            )
        elif cls.on == "module" and (owners := _parameter_owners(model, pattern)):
            lines.append(f"{show(pattern)} names a parameter, and {label} surrounds modules." + alternatives_text(model, owners))
        else:
            lines.append(f"{show(pattern)} matches nothing.{did_you_mean(str(pattern), fitting)}")
    rest = {k: v for k, v in counts.items() if v}
    return " ".join(lines) + (f" The other patterns matched: {rest}." if rest else "")


def _parameter_owners(model: ModelIndex, pattern) -> list[nn.Module]:
    """The modules whose parameters a pattern names."""
    return [m for path, m in model.at.items() if any(matches(pattern, join_path(path, name), m) for name in m._parameters)]


def fitting_methods(model: ModelIndex, hosts: list[nn.Module]) -> list[str]:
    """The registry's methods that can sit at one of these modules."""
    there = {on: [] for on in ("matrix", "tensor", "module")}
    found = []
    for name in registered():
        cls = resolve(name)[0]
        there[cls.on] = there[cls.on] or list(candidate_sites(model, cls, {}, {}, []))
        places = there[cls.on] if cls.place is None else sites_at_place(model, cls.place, there[cls.on])
        if any(s.host in hosts and cls.fits(s) for s in places):
            found.append(name)
    return found


def alternatives_text(model: ModelIndex, hosts: list[nn.Module]) -> str:
    names = fitting_methods(model, hosts)
    return f" Methods that fit there: {', '.join(names)}." if names else ""
