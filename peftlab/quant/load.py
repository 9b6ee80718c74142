"""Weights from safetensors files, one tensor at a time: quantised as they are read, or taken as the codes that they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from peftlab.attach.request import check_dtype
from peftlab.attach.select import select_among
from peftlab.core.site import Site
from peftlab.model import layers
from peftlab.model.index import ModelIndex, ensure_module, join_path, tensor_identity
from peftlab.model.patterns import did_you_mean
from peftlab.model.walk import Adapted, unwrap_parallel
from peftlab.quant import format as keys
from peftlab.quant.codes import check, quantise
from peftlab.quant.modules import Packing, pack
from peftlab.quant.packed import Packed
from peftlab.quant.quantize import PackRequest, packable_places, works_on_codes
from peftlab.support.contexts import paused_gc
from peftlab.support.files import whole
from peftlab.support.progress import Progress, check_progress, reported

TURN = 1 << 23  # bytes that are read before the files are opened anew


@paused_gc()
def load_quantized(
    model: nn.Module, files: str | os.PathLike | Iterable, kind: str | None = "nf4", *, targets=None, exclude=None, blocksize: int | None = None,
    double_quant: bool | None = None, compute_dtype: torch.dtype | None = None, dtype: torch.dtype | None = None,
    rename: Callable[[str], str | None] | None = None, progress: Progress = None,
) -> nn.Module:  # fmt: skip
    """Fill a model, best one on meta, from safetensors files, packing the weights that the patterns mean while they are read.

    No more than one dense tensor is in memory beside what the model keeps, so that a checkpoint larger than memory can be prepared.
    Weights that the files hold as codes (the keys of bitsandbytes: nf4, fp4 or int8) are taken as they are, whatever `kind` says.

    Args:
        model: dense and without adapters; its parameters may be on meta, its non-persistent buffers must be real.
        files: one file, several, or a folder of them.
        kind, targets, exclude, blocksize, double_quant, compute_dtype, progress: as for `quantize`; kind=None packs nothing.
        dtype: of the floating tensors that stay dense, and of the packed ones' values (the files' by default).
        rename: the model's name of a tensor by the file's; None leaves the tensor out.

    Raises:
        PatternError, ValueError (LoadError among them), TypeError, OSError: for names or shapes that do not fit, tensors that no file has, what is
            no safetensors file, and what `quantize` refuses. The model is then unchanged.
    """
    root = unwrap_parallel(ensure_module(model))
    check_dtype(compute_dtype, "compute_dtype")
    check_dtype(dtype)
    check_progress(progress)
    if kind is not None:
        check(kind, blocksize, double_quant)
    paths = _paths(files)
    view = ModelIndex.of(root)
    odd = next((p for k, m in view.modules.items() if isinstance(m, (Packing, Adapted)) for p in view.paths[k]), None)
    if odd is not None:
        raise ValueError(f"{odd!r} is quantised or adapted already: load into a model as it was built")
    there = list(packable_places(view))
    chosen = [] if kind is None else select_among(view, PackRequest, "load_quantized", there, targets, exclude)[0]
    staged: list[tuple[str, Tensor | Packed]] = []
    with _Files() as opened:
        found = _listed(opened, paths, rename)
        job = _Job(view, opened, found, _slots(view), {(id(s.host), s.param): s for s in there}, kind, blocksize, double_quant, compute_dtype, dtype)
        job.choose(chosen)
        todo = _firsts(job.slots, found)
        with reported(progress, "load") as tell:
            for done, name in enumerate(todo, 1):
                staged.append((name, job.part(name)))
                tell(done, len(todo), name)
    for name, part in staged:
        job.commit(name, part)
    return model


class _Files(contextlib.ExitStack):
    """Files that are opened and parsed once, not for every tensor; all of them are closed at the end, an exception's or an interrupt's included.

    What was read of a file's map counts as memory until it is closed, so after some bytes they are closed, and opened again as they are needed.
    """

    def __init__(self):
        super().__init__()
        self.at: dict[str, safetensors.safe_open] = {}
        self.read = 0

    def open(self, path: str) -> safetensors.safe_open:
        if path not in self.at:
            with whole(path):
                self.at[path] = self.enter_context(safetensors.safe_open(path, "pt"))
        return self.at[path]

    def tensor(self, path: str, key: str) -> Tensor:
        """A tensor in the file's map: it keeps the map open and changes with the file, so what stays is a copy."""
        if self.read >= TURN:
            self.close()
            self.at.clear()
            self.read = 0
        t = self.open(path).get_tensor(key)
        self.read += t.nbytes
        return t


@dataclass
class _Job:
    """A checked call: what the files have, what of it stays codes, and what is to be packed."""

    view: ModelIndex
    opened: _Files
    found: dict[str, tuple[str, str]]
    slots: dict[str, tuple[nn.Module, str]]
    sites: dict[tuple[int, str], Site]
    kind: str | None
    blocksize: int | None
    double: bool | None
    compute: torch.dtype | None
    dtype: torch.dtype | None
    coded: set[str] = field(default_factory=set)  # names that the files hold as codes
    wanted: set[str] = field(default_factory=set)  # names of dense tensors that are to be packed

    def choose(self, chosen: list[Site]) -> None:
        """Find the two sets, and raise where files and model do not fit."""
        mine = {name: n for name, (m, n) in self.slots.items() if n in m._parameters}
        self.coded = {name for name, n in mine.items() if keys.kind_in(n, _state(self.found, name)) is not None}
        self.wanted = {join_path(p, s.param) for s in chosen for p in self.view.paths[id(s.host)]} - self.coded
        _compare(self.view, self.slots, self.found, self.coded)
        self._compare_shapes()
        for name in (*self.coded, *self.wanted):
            m, n = self.slots[name]
            if len(self.view.owners[tensor_identity(m._parameters[n])]) > 1:
                why, way = ("", "exclude it") if name in self.wanted else ("quantised in the file and ", "untie them first")
                raise ValueError(f"{name!r} is {why}tied to another parameter: {way}")
            if getattr(m, "max_norm", None) is not None:
                raise ValueError(f"{name!r} has max_norm: torch edits its table while it is read")

    def _compare_shapes(self) -> None:
        """Raise unless the dense tensors of the files have the model's shapes."""
        for name, (m, n) in self.slots.items():
            if name in self.found and name not in self.coded:
                path, key = self.found[name]
                shape = tuple(self.opened.open(path).get_slice(key).get_shape())
                t = m._parameters.get(n) if n in m._parameters else m._buffers[n]
                if shape != tuple(t.shape):
                    raise ValueError(f"{name!r} has shape {shape} in the file and {tuple(t.shape)} in the model")

    def read(self, name: str) -> Tensor:
        return self.opened.tensor(*self.found[name])

    def part(self, name: str) -> Tensor | Packed:
        """One tensor as the model will hold it."""
        m, n = self.slots[name]
        site = self.sites.get((id(m), n))
        flip = site is not None and isinstance(site.rule, layers.Conv1D) and works_on_codes(self.view, site)
        t = self.read(name)
        if name in self.coded:
            state = {k: (t if k == n else self.read(f)).clone() for k, f in _state(self.found, name).items()}
            p = keys.read(n, state, self.compute, self.dtype)
            _same_shape(name, p.format.shape, site, flip)
            return p
        dtype = self.dtype if self.dtype is not None and t.is_floating_point() else t.dtype
        if name not in self.wanted:
            return t.to(dtype, copy=True)
        t = t.to(dtype)
        double = self.kind != "int8" if self.double is None else self.double
        p = quantise(t.t() if flip else t, self.kind, self.blocksize, double)
        return p._replace(format=p.format._replace(compute=self.compute))

    def commit(self, name: str, part: Tensor | Packed) -> None:
        """Put it there, on the device of what was there; what is on meta gets its values on the CPU."""
        m, n = self.slots[name]
        old = m._parameters[n] if n in m._parameters else m._buffers[n]
        part = _on(part, torch.device("cpu") if old.is_meta else old.device)
        if isinstance(part, Packed):
            pack(m, n, part, works_on_codes(self.view, self.sites[id(m), n]))
        elif n in m._parameters:
            new = nn.Parameter(part, requires_grad=m._parameters[n].requires_grad and part.is_floating_point())
            for host, param in self.view.owners[tensor_identity(m._parameters[n])]:
                host._parameters[param] = new
        else:
            m._buffers[n] = part


def _on(part: Tensor | Packed, device: torch.device) -> Tensor | Packed:
    return part.to(device) if isinstance(part, Tensor) else Packed(*(t.to(device) if isinstance(t, Tensor) else t for t in part))


def _paths(files) -> list[str]:
    many = list(files) if isinstance(files, Iterable) and not isinstance(files, (str, os.PathLike)) else [files]
    odd = [f for f in many if not isinstance(f, (str, os.PathLike))]
    if odd:
        raise TypeError(f"files={odd[0]!r}: the path of a safetensors file or of a folder of them, or several")
    paths = [str(p) for f in many for p in (sorted(Path(f).glob("*.safetensors")) if Path(f).is_dir() else [Path(f)])]
    if not paths:
        raise ValueError(f"files={files!r}: no safetensors file there")
    return paths


def _listed(opened: _Files, paths: list[str], rename: Callable | None) -> dict[str, tuple[str, str]]:
    """Tensor name in the model -> (file, name in the file)."""
    out: dict[str, tuple[str, str]] = {}
    for path in paths:
        for key in opened.open(path).keys():  # noqa: SIM118 - not a dict
            name = key if rename is None else rename(key)
            if name is None:
                continue
            if name in out:
                raise ValueError(f"{name!r} is in {out[name][0]!r} and in {path!r}")
            out[name] = (path, key)
    return out


def _slots(view: ModelIndex) -> dict[str, tuple[nn.Module, str]]:
    """The model's parameters and saved buffers by every name that they have."""
    out = {}
    for path, m in view.at.items():
        saved = {n: b for n, b in m._buffers.items() if n not in m._non_persistent_buffers_set}
        out |= {join_path(path, n): (m, n) for n, t in [*m._parameters.items(), *saved.items()] if t is not None}
    return out


def _state(found: dict, name: str) -> dict[str, str]:
    """The names of everything in the files that belongs to one parameter, by their keys in its module's state."""
    path, _, n = name.rpartition(".")
    prefix = f"{path}." if path else ""
    close = (name, *(f"{name}.{k}" for k in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")))
    close += tuple(f"{name}.{keys.STATE}{kind}" for kind in ("nf4", "fp4")) + tuple(prefix + k for k in keys.keys_of(n))
    return {k.removeprefix(prefix): k for k in close if k in found}


def _firsts(slots: dict, found: dict) -> list[str]:
    """The names to read, one of each tensor: files may hold tied ones under any of their names, and under several."""
    first: dict[tuple, str] = {}
    for name, (m, n) in slots.items():
        if name in found:
            first.setdefault(tensor_identity(m._parameters[n]) if n in m._parameters else (id(m), n), name)
    return list(first.values())


def _compare(view: ModelIndex, slots: dict, found: dict, coded: set[str]) -> None:
    """Raise unless every tensor has its place and every place its tensor."""
    used = {f for name in slots if name in found for f in (_state(found, name).values() if name in coded else (name,))}
    extra = sorted(found.keys() - used)
    if extra:
        raise ValueError(f"{len(extra)} tensors of the files have no place in this model, {extra[0]!r} among them.{did_you_mean(extra[0], slots)}")
    missing = [k for k, (m, n) in slots.items() if k not in found and not _elsewhere(view, slots, found, k)]
    if missing:
        raise ValueError(f"{len(missing)} tensors of this model are in no file, {missing[0]!r} among them.{did_you_mean(missing[0], found)}")
    for m in view.modules.values():
        hollow = next((n for n, b in m._buffers.items() if b is not None and b.is_meta and n in m._non_persistent_buffers_set), None)
        if hollow is not None:
            raise ValueError(
                f"the buffer {join_path(view.path(m), hollow)!r} is on meta and never saved: build the model with real buffers "
                "(accelerate's init_empty_weights(include_buffers=False) does)"
            )


def _elsewhere(view: ModelIndex, slots: dict, found: dict, name: str) -> bool:
    """Whether the files have a tensor under another of its names: those of its module's other paths, and of parameters that are tied to it."""
    m, n = slots[name]
    owners = view.owners.get(tensor_identity(m._parameters[n]), []) if n in m._parameters else [(m, n)]
    return any(join_path(p, param) in found for host, param in owners for p in view.paths[id(host)])


def _same_shape(name: str, shape: tuple, site, flip: bool) -> None:
    if site is None:
        raise ValueError(f"{name!r} is quantised in the file and cannot be packed in this model")
    wanted = site.shape[::-1] if flip else site.shape
    if shape != wanted:
        raise ValueError(f"{name!r} has shape {shape} in the file and {wanted} in the model")
