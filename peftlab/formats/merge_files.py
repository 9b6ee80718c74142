"""Merging files: fold an adapter file into a folder of safetensors shards without building the model.

The shards are copied byte for byte; then each adapted tensor is read, merged by the same functions as in memory, and written over its
own bytes. At any time one base tensor, its merged value and one site's adapter tensors are in memory, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftlab.attach.request import WrapRequest
from peftlab.core.merged import merged_tensors
from peftlab.core.method import AdapterConfig, Method
from peftlab.core.site import Site
from peftlab.core.stack import SHARED_CHILD, AdapterStack
from peftlab.formats.file import read_header
from peftlab.formats.fingerprint import fingerprint_difference
from peftlab.formats.header import rows_from_json
from peftlab.formats.rebuild import fill_from_file, keys_of_adapter, method_class, method_in_file, mismatch_text, options_in_file
from peftlab.formats.shards import ADDED, TRIM, Shards, ShardTensors, choose_files, copy_folder
from peftlab.model import layers
from peftlab.model.index import ModelIndex, join_path
from peftlab.model.patterns import did_you_mean
from peftlab.support.contexts import preserved_rng
from peftlab.support.files import LoadError
from peftlab.support.progress import Progress, Tell, check_progress, reported


@dataclass
class FileMergeReport:
    """What `merge_files` wrote."""

    out: str
    adapters: list[str]
    inactive: list[str]
    rows: list[tuple[str, float]]  # (tensor, largest change)
    added: list[str]  # tensors in added.safetensors
    shards: int
    largest_bytes: int  # of the tensors that were in memory at one time
    skipped: list[str] = field(default_factory=list)  # files of the folder that were not copied

    def __repr__(self) -> str:
        changed = sum(delta > 0 for _, delta in self.rows)
        biggest = max((delta for _, delta in self.rows), default=0.0)
        lines = [f"{self.out}: {', '.join(self.adapters)} merged into {changed} of {len(self.rows)} adapted tensors "
                 f"(largest change {biggest:.3e}) in {self.shards} shards; "
                 f"the largest tensor has {self.largest_bytes:,} bytes"]  # fmt: skip
        if self.added:
            lines.append(f"not in the model, written to {ADDED}: {', '.join(self.added)}")
        if self.inactive:
            lines.append(f"inactive adapters, not merged: {', '.join(self.inactive)}")
        if self.skipped:
            lines.append(f"not copied: {', '.join(self.skipped)}")
        return "\n".join(lines)


def merge_files(
    model_dir: str | os.PathLike, adapter: str | os.PathLike, out_dir: str | os.PathLike, *, names: str | Iterable[str] | None = None,
    progress: Progress = None,
) -> FileMergeReport:  # fmt: skip
    """Write `model_dir` with the adapters of a file folded in to `out_dir`; the result equals an in-memory merge bit for bit.

    Args:
        model_dir: a folder with model.safetensors, or shards and their index; other files (configuration, tokenizer) are copied.
        adapter: a file of `peftlab.save`.
        out_dir: a new or empty folder; it appears only when everything has been written.
        names: the adapters to merge, by default the active ones.
        progress: True for a bar (drawn by tqdm), or a function that is called with (layers done, layers in all, path of the last one).

    Raises:
        ValueError (LoadError among them), TypeError, ImportError, OSError: nothing is then written.
    """
    check_progress(progress)
    model_dir, adapter, out_dir = Path(model_dir), Path(adapter), Path(out_dir)
    if not model_dir.is_dir():
        raise FileNotFoundError(f"no model folder {str(model_dir)!r}")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{str(out_dir)!r} exists and is not an empty folder")
    header = read_header(adapter)
    chosen, inactive = choose_files(header, adapter, names)
    shards = Shards(model_dir)
    with safetensors.safe_open(adapter, "pt") as file, preserved_rng(), torch.no_grad():
        job = _Job(header, chosen, shards, ShardTensors(file, header, adapter))
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".part", dir=out_dir.parent))
        try:
            skipped = copy_folder(model_dir, part)
            with reported(progress, "merge") as tell:
                rows, added = job.run(part, tell)
            if out_dir.is_dir():
                out_dir.rmdir()
            umask = os.umask(0)
            os.umask(umask)
            part.chmod(0o777 & ~umask)
            part.replace(out_dir)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return FileMergeReport(str(out_dir), [a["name"] for a in chosen], inactive, rows, added, len(shards.files), job.largest, skipped)


class _Job:
    """The adapters of a file, laid over the tensors of a folder."""

    def __init__(self, header: dict, chosen: list[dict], shards: Shards, tensors: ShardTensors):
        self.header, self.chosen, self.shards, self.tensors = header, chosen, shards, tensors
        self.others = [keys_of_adapter(a) for a in header["adapters"] if a not in chosen]
        self.largest = self.freed = 0
        self.replacing = [*header["buffers"], *header["included"]]
        hosts: dict[str, nn.Module] = {}
        for a in chosen:
            for s in a["sites"]:
                if s.get("tie") == "untie":
                    raise ValueError(f"{join_path(s['host'], s['param'])!r} was untied, so the merged model has one tensor more: merge it in memory")
                hosts.setdefault(s["host"], _stand_in(s.get("layer") or {}))
        self.hosts = hosts
        in_place = {join_path(s["host"], s.get("param") or "") for a in chosen for s in a["sites"]}
        self.replacing += [k for k in header["tensors"] if k in in_place]  # trained in place: the file holds the base tensor itself
        self.prefix = self._find_prefix()
        self._lay_out()
        self.sites: dict[str, list[tuple[str, int]]] = {path: [] for path in hosts}  # host -> (adapter, number of the site), in stacking order
        for a in chosen:
            for i, s in enumerate(a["sites"]):
                self.sites[s["host"]].append((a["name"], i))
        self.used: set[str] = set()
        self.adapters = {a["name"]: _Adapter(a, header["peftlab"], hosts, tensors, self.used) for a in chosen}

    # ---- names
    def key(self, path: str) -> str | None:
        """The shards' name of a model tensor, or None."""
        head, tail = self.prefix
        for candidate in (path, head + path, path.removeprefix(tail) if tail else path):
            if candidate in self.shards.places:
                return candidate
        return None

    def _find_prefix(self) -> tuple[str, str]:
        """(what the shards put before the model's names, what the model puts before the shards'): folders of a headless or headed twin."""
        places = self.shards.places
        wanted = [join_path(s["host"], s["param"]) for a in self.chosen for s in a["sites"] if s.get("param")]
        found: dict[tuple[str, str], int] = {("", ""): sum(w in places for w in wanted)}
        first = next((w for w in wanted if w not in places), None)
        if first is None:
            return "", ""
        for key in places:
            if key.endswith("." + first):
                head = key[: -len(first)]
                found[head, ""] = sum(head + w in places for w in wanted)
            if first.endswith("." + key):
                tail = first[: -len(key)]
                found["", tail] = sum(w.removeprefix(tail) in places for w in wanted)
        return max(found, key=found.get)

    def _lay_out(self) -> None:
        """Meta tensors in the stand-in hosts; what is missing or of another shape raises, before anything is read."""
        base = self.header["base"]
        replaced = {(s["host"], s.get("param")) for a in self.chosen if method_class(a["method"]).replaces for s in a["sites"]}
        for a in self.chosen:
            for s in a["sites"]:
                host = self.hosts[s["host"]]
                table = s["kind"] == "tensor" and s["param"] == "weight" and len(s["shape"]) == 2 and self.key(join_path(s["host"], "weight"))
                if "layer" not in s and (table or s["rule"] in ("embedding", "conv_transpose")):
                    raise ValueError(f"the file does not say how the layer {s['host']!r} is set up (padding, groups): merge it in memory")
                for param in dict.fromkeys(p for p in (s.get("param"), s.get("bias")) if p):
                    path = join_path(s["host"], param)
                    key = self.key(path)
                    if key is not None:
                        place = self.shards.places[key]
                        host._parameters[param] = nn.Parameter(torch.empty(place.shape, dtype=place.dtype, device="meta"), requires_grad=False)
                    elif (s["host"], param) in replaced and path in base:
                        dtype = getattr(torch, base[path]["dtype"])
                        host._parameters[param] = nn.Parameter(torch.empty(base[path]["shape"], dtype=dtype, device="meta"), requires_grad=False)
                    elif path in base:
                        why = " It was tied to another tensor there, which a folder stores once: merge it in memory." if s.get("tie") else ""
                        raise LoadError(f"the adapter was trained on {path!r}, which the folder does not have.{why or did_you_mean(path, self.shards.places)}")

    # ---- work
    def run(self, to: Path, tell: Tell) -> tuple[list[tuple[str, float]], list[str]]:
        """Write every changed tensor into the copy `to`; returns (tensor, largest change) rows and the names of added tensors."""
        there = {join_path(path, param) for path, host in self.hosts.items() for param in host._parameters}
        rest = [key for key in self.replacing if key not in there]
        total = len(self.hosts) + len(rest)
        done, rows, added = 0, [], {}

        def step(key: str) -> None:
            nonlocal done
            done += 1
            tell(done, total, key)

        changed = set()
        for path, host in self.hosts.items():
            originals = self._materialise(path, host)
            stack = self._stack(path, host)
            for param, value in merged_tensors(path, host, stack, list(stack.sites)):
                changed.add(join_path(path, param))
                rows.append(self._put(to, path, param, originals, value, added))
                self.largest = max(self.largest, value.numel() * value.element_size())
            for param, old in originals.items():
                if join_path(path, param) in self.replacing and join_path(path, param) not in changed:
                    rows.append(self._put(to, path, param, originals, host._parameters[param].detach(), added))
                if old is not None:
                    self.largest = max(self.largest, old.numel() * old.element_size())
            for param, p in list(host._parameters.items()):
                self.freed += p.numel() * p.element_size()
                host._parameters[param] = nn.Parameter(p.detach().to("meta"), requires_grad=False)
            stack = originals = value = old = p = None
            if self.freed > TRIM:
                self.freed = _trim()
            step(path)
        for key in rest:
            place = self.key(key)
            value = self.tensors[key]
            if place is None:
                added[key] = value
            else:
                old = self.shards.read(place)
                self.shards.write(to, place, value)
                rows.append((place, _change(old, value)))
            step(key)
        self.used.update(self.replacing)
        unconsumed = sorted(k for k in self.tensors if k not in self.used and not self._left_out(k))
        if unconsumed:
            raise LoadError(mismatch_text(unconsumed, []))
        if added:
            save_file({k: v.contiguous() for k, v in added.items()}, to / ADDED, {"format": "pt"})
        return rows, sorted(added)

    def _left_out(self, key: str) -> bool:
        """Whether a tensor belongs to an adapter that is not merged."""
        return any(owns(key) for owns in self.others)

    def _materialise(self, path: str, host: nn.Module) -> dict[str, Tensor | None]:
        """Real tensors for one host: the folder's, checked against the fingerprint, or those trained in place. Returns the folder's."""
        originals: dict[str, Tensor | None] = {}
        for param, meta in list(host._parameters.items()):
            name = join_path(path, param)
            key = self.key(name)
            old = None if key is None else self.shards.read(key)
            if old is not None and name in self.header["base"]:
                wrong = fingerprint_difference(name, self.header["base"][name], old)
                if wrong:
                    raise LoadError(f"this is not the base that the adapter was trained on: {wrong}")
            originals[param] = old
            value = self.tensors[name].to(meta.dtype) if name in self.replacing else old
            host._parameters[param] = nn.Parameter(torch.zeros(meta.shape, dtype=meta.dtype, device="cpu") if value is None else value, requires_grad=False)
        return originals

    def _stack(self, path: str, host: nn.Module) -> AdapterStack:
        """The host's adapters, built as `load` builds them."""
        stack = AdapterStack(read=False)
        for name, i in self.sites[path]:
            stack.sites.setdefault(name, []).append(self.adapters[name].method(i))
        return stack

    def _put(self, to: Path, path: str, param: str, originals: dict, value: Tensor, added: dict) -> tuple[str, float]:
        name, old = join_path(path, param), originals[param]
        if old is None:
            added[name] = value.clone()
            return name, value.float().abs().max().item() if value.numel() else 0.0
        keys = [self.key(name)]
        tied = any(s.get("tie") == "share" for a in self.chosen for s in a["sites"] if s["host"] == path and s.get("param") == param)
        if tied:  # a folder may hold both ends of a tied tensor
            place = self.shards.places[keys[0]]
            alike = [k for k, p in self.shards.places.items() if k != keys[0] and (p.dtype, p.shape) == (place.dtype, place.shape)]
            keys += [k for k in alike if torch.equal(self.shards.read(k), old)]
        for key in keys:
            self.shards.write(to, key, value)
        return keys[0], _change(old, value)


def _trim() -> int:
    """Give freed pages back to the system: glibc keeps those of tensors below 32 MiB, which would add up to the model's size."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    return 0


def _change(old: Tensor, new: Tensor) -> float:
    return (new.float() - old.float()).abs_().max().item() if old.numel() else 0.0


class _Adapter:
    """One adapter of a file: its sites on stand-in hosts, its recipes, and its methods, made one at a time."""

    def __init__(self, entry: dict, version: str, hosts: dict[str, nn.Module], tensors: ShardTensors, used: set[str]):
        self.entry, self.tensors, self.used = entry, tensors, used
        cls: type[Method] = method_class(entry["method"])
        hypers = [options_in_file(cls, s, version) for s in entry["settings"]]
        self.sites = [_site(hosts[s["host"]], s) for s in entry["sites"]]
        view = ModelIndex.of(nn.Module())
        request = WrapRequest(
            view,
            cls,
            entry["method"],
            entry["name"],
            self.sites,
            {},
            [hypers[s["settings"]] for s in entry["sites"]],
            entry["seed"],
            None,
            None,
            {},
        )
        self.recipes: list[AdapterConfig] = list(request.recipes("cpu"))
        common = self.recipes[0].common
        if common is not None:
            missing: list[str] = []
            fill_from_file(common, f"{join_path(SHARED_CHILD, entry['name'])}.", tensors, used, missing, torch.device("cpu"), None)
            if missing:
                raise LoadError(mismatch_text([], missing))

    def method(self, i: int) -> tuple[Site, Method]:
        """Site number i, whose host now has real tensors, and its method with the file's tensors."""
        missing: list[str] = []
        facts = self.entry["sites"][i]
        method = method_in_file(self.sites[i], self.recipes[i], facts, self.entry["name"], self.tensors, self.used, missing, None)
        if missing:
            raise LoadError(mismatch_text([], missing))
        object.__setattr__(method, "site", self.sites[i])  # it was built on a site without values
        method.eval()
        return self.sites[i], method


def _stand_in(facts: dict) -> nn.Module:
    """An empty module in a host's place, which knows what merging asks a layer: its groups, or its padding row."""
    module = nn.Embedding(1, 1, device="meta") if "padding_idx" in facts else nn.Module()
    module._parameters.clear()
    for k, v in facts.items():
        setattr(module, k, v)
    return module


RULES = {rule.name: rule for rule in (layers.MATRIX, layers.LINEAR, layers.CONV1D, *layers.RULES.values())}


def _site(host: nn.Module, facts: dict) -> Site:
    """A site on a stand-in host, as the header describes it."""
    if facts["rule"] not in RULES:
        raise ValueError(f"{facts['host']!r}: a layer of the kind {facts['rule']!r} has no weight on disk that could be merged into")
    return Site(
        host, join_path(facts["host"], facts.get("key", "")), facts.get("key", ""), facts["kind"], facts.get("param"), facts.get("bias"),
        RULES[facts["rule"]], rows_from_json(facts.get("rows")), rows_from_json(facts.get("bias_rows")), facts.get("expert"),
        facts.get("transposed", False), True, n_out=facts["size"][0], n_in=facts["size"][1], shape=tuple(facts["shape"]),
    )  # fmt: skip
