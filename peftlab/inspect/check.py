"""Proof, with one sample batch, that every adapter of a model works; and a watch over the first steps of its training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.host import STASH, Adapted, Site, bare, cuts_gradient, saved_tensors, stacks, walk
from peftlab.inspect.report import acts, listed, repeated, report, tensors_of
from peftlab.model import layers
from peftlab.sites import ensure_module, join
from peftlab.support.table import table
from peftlab.switch import merge, unmerge, unwrap, view
from peftlab.train.schedule import held, ran, torch_optimizer
from peftlab.wrap import adapter_modules

STEPS = ("reached", "moves", "saves", "merges")

FOLLOWS = {"moves": {"reached"}, "merges": {"reached", "moves"}}  # failures that are told as another one's

SIZES = (0.01, 0.1, 1.0)  # of a perturbation, relative to the tensor's own size

TRIES = 5  # forwards in training mode until a randomly skipped layer counts as unreached

BIG = 1 << 20  # entries; larger buffers are kept aside on the CPU

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}  # relative to the largest output; otherwise 5e-2


@dataclass
class Row:
    """One adapter at one site (or one shared module). True: proved, False: failed, None: does not apply."""

    path: str
    method: str
    name: str
    reached: bool | None = None  # every tensor gets a gradient from the loss
    moves: bool | None = None  # a change of its tensors changes the output
    saves: bool | None = None  # saved and loaded into a fresh base, it is the same bit for bit
    merges: bool | None = None  # merged, the model gives the same output; unmerged, the same bits
    problems: dict[str, str] = field(default_factory=dict)  # what failed -> the remedy
    note: str = ""

    def fail(self, step: str, remedy: str) -> None:
        setattr(self, step, False)
        self.problems.setdefault(step, remedy)


@dataclass
class CheckReport:
    """What `check` found, a row an adapter and site. Printing it shows a table in which repeated layers are one line."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(r.problems for r in self.rows)

    def __repr__(self) -> str:
        groups: dict[tuple, list[Row]] = {}
        for r in self.rows:
            groups.setdefault((repeated(r.path), r.method, r.name, r.note, *(getattr(r, s) for s in STEPS)), []).append(r)
        marks = {True: "yes", False: "NO", None: "-"}
        body = []
        for key, rows in groups.items():
            path = rows[0].path if len(rows) == 1 else key[0]
            body.append((path or "(root)", len(rows), *key[1:3], *(marks[v] for v in key[4:]), key[3]))
        head = ("path", "sites", "method", "name", *STEPS, "note" if any(r.note for r in self.rows) else "")
        failed = sum(bool(r.problems) for r in self.rows)
        verdict = "all adapters pass" if self.ok else f"{failed} of {len(self.rows)} fail"
        return "\n".join([table(head, body, right=(1,)), verdict, *self.notes])


class CheckError(RuntimeError):
    """Adapters that do not work. `report` is the whole CheckReport."""

    def __init__(self, found: CheckReport):
        self.report = found
        causes: dict[tuple[str, str], list[Row]] = {}
        for r in found.rows:
            for step, remedy in r.problems.items():
                if not r.problems.keys() & FOLLOWS.get(step, set()):
                    causes.setdefault((step, remedy), []).append(r)
        meaning = {"reached": "not reached", "moves": "no effect", "saves": "not saved", "merges": "not merged"}
        lines = []
        for (step, remedy), rows in causes.items():
            names = ", ".join(f"{r.path!r} ({r.method} {r.name!r})" for r in rows)
            lines.append(f"  {meaning[step]}: {names}: {remedy.replace('{paths}', listed([r.path for r in rows], 3))}")
        failed = sum(bool(r.problems) for r in found.rows)
        super().__init__(f"{failed} of {len(found.rows)} adapters failed the check\n" + "\n".join(lines))


def check(model: nn.Module, /, *args, **kwargs) -> CheckReport:
    """Prove on one sample batch, `model(*args, **kwargs)`, that every active adapter works.

    Four proofs an adapter and site:

    * reached: each of its tensors gets a gradient from the loss, in the mode (training or eval) the model is in. The loss is the
      output's `.loss` where there is one, else the sum of squares of all floating outputs. A zero gradient counts (LoRA's A has
      one at the start), a missing one does not.
    * moves: a change of its tensors changes the output. All adapters are changed at once; an adapter whose gradient there is
      zero, or all where eval without gradients disagrees, is changed alone and the outputs compared.
    * saves: so changed, it goes through `save`, and `load` into a fresh copy of the base brings back its tensors and derived buffers
      bit for bit and the model's output, from a file that holds exactly the expected tensors.
    * merges: so changed and merged, the model gives the same output in eval mode (relative to its largest entry: 1e-9 in float64,
      1e-4 in float32, 5e-3 where TF32 may be used, 1e-2 in float16, 5e-2 in bfloat16), and unmerging gives every bit back.

    About ten forwards and two backwards, more only where something fails. Memory beyond training's: a copy of the adapters and of
    the buffers, and one of the adapted weights while they are merged. Compiled and DDP-wrapped models are looked into; run it
    before FSDP2 shards the model. Afterwards the model is as before: bits, flags, modes, `.grad`, buffers and random generators.

    Returns:
        CheckReport: `rows`, `ok`, and as its repr a table.

    Raises:
        CheckError: naming every adapter that failed and the remedy.
        ValueError: when there is nothing to check, or the model is merged, sharded or on the meta device.
    """
    root = bare(ensure_module(model))
    trial = _Trial(root, args, kwargs)
    with torch.inference_mode(False), torch.enable_grad(), trial.fence:
        trial.noise = _distance(trial.run(), trial.start())
        _reach(trial)
        with trial.perturbed():
            _move(trial)
            _save(trial)
            _merge(trial)
    found = CheckReport([s.row for s in trial.subjects], trial.notes)
    if not found.ok:
        raise CheckError(found)
    return found


@dataclass(eq=False)
class _Subject:
    """A method (or shared module) whose tensors are put to the proof."""

    row: Row
    key: str  # path of its tensors in the state dict
    site: Site | None
    module: nn.Module
    tensors: dict[str, Tensor]  # the parameters that train (all where the adapter is frozen)


def _subjects(root: nn.Module) -> list[_Subject]:
    active = {n for _, _, s in stacks(root) for n in s.active}
    merged = sorted({n for _, _, s in stacks(root) for n in s.merged})
    if not active:
        raise ValueError("nothing to check: this model has no active adapter")
    if merged:
        raise ValueError(f"{listed(merged)} merged: unmerge(model) before the check, which merges and unmerges itself")
    there = adapter_modules(root, active)
    labels = {name: m.recipe.label for name, _, s, m in there if s is not None}
    out = []
    for name, key, site, m in there:
        tensors = {k: p for k, p in tensors_of(site, m).items() if p.is_floating_point() or p.is_complex()}
        tensors = {k: p for k, p in tensors.items() if p.requires_grad} or tensors
        for k, p in tensors.items():
            if p.is_meta:
                raise ValueError(f"'{key}.{k}' is on the meta device: check the model once its tensors are real")
            if type(p).__name__ == "DTensor":
                raise ValueError(f"'{key}.{k}' is sharded: check the model before fully_shard")
        if site is not None or tensors:
            out.append(_Subject(Row(site.path if site is not None else key, labels.get(name, "-"), name), key, site, m, tensors))
    return out


class _Trial:
    """The model, its batch, and what a run of it gives; every run starts from the same random state and buffers."""

    def __init__(self, root: nn.Module, args: tuple, kwargs: dict):
        self.root, self.batch, self.subjects = root, (args, kwargs), _subjects(root)
        self.fence = _Fence(root)
        self.names = list(dict.fromkeys(s.row.name for s in self.subjects))
        self.notes: list[str] = []
        self.noise = 0.0  # how far two runs of the same differ
        self.before: list[Tensor] = []  # eval outputs of the model as it is
        self.after: list[Tensor] = []  # and of the perturbed one

    def start(self) -> list[Tensor]:
        self.before = self.run()
        return self.before

    def call(self, model: nn.Module, grad: bool, own_mode: bool, seed: int = 0):
        """The raw output of one forward; batch, generators and buffers are those of the beginning."""
        try:
            args, kwargs = copy.deepcopy(self.batch)  # a cache among them would be filled
        except (RuntimeError, TypeError, NotImplementedError):  # a tensor with a history, or something that cannot be copied
            args, kwargs = self.batch
        self.fence.set_modes(own_mode)
        self.fence.set_random(seed)
        torch.clear_autocast_cache()  # it would hold casts of the tensors as they were
        try:
            with torch.set_grad_enabled(grad):
                return model(*args, **kwargs)
        finally:
            self.fence.put_buffers_back()

    def run(self, model: nn.Module | None = None, grad: bool = False) -> list[Tensor]:
        """The floating outputs in eval mode."""
        found = _floating(self.call(self.root if model is None else model, grad, own_mode=False))
        if not found:
            raise ValueError("the model returned no floating tensor: there is nothing to compare")
        return [t.detach().clone() for t in found]

    def gradients(self, tensors: list[Tensor], value: Callable[[object], Tensor], seed: int = 0) -> list[Tensor | None]:
        """Gradients of value(output) in the model's own mode; `.grad` is not touched."""
        for t in tensors:
            t.requires_grad_(True)
        loss = value(self.call(self.root, True, True, seed))
        if not loss.requires_grad:
            return [None] * len(tensors)
        found = list(_refused(torch.autograd.grad, loss, tensors, allow_unused=True) or [None] * len(tensors))
        if any(g is None for g in found):  # reentrant checkpointing shows its tensors to backward() alone
            loss = value(self.call(self.root, True, True, seed))
            with self.fence.no_grads():
                loss.backward()
                found = [t.grad if g is None else g for t, g in zip(tensors, found, strict=True)]
        return found

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Change all tensors at random, enough for the output to show it and no more."""
        tensors = {id(t): t for s in self.subjects for t in s.tensors.values()}
        tolerance = self.tolerance()
        self.own = {k: t.data for k, t in tensors.items()}
        try:
            for size in SIZES:
                last = {k: t.data for k, t in tensors.items()}
                generator = torch.Generator().manual_seed(0)
                for k, t in tensors.items():
                    t.data = _nudged(self.own[k], size, generator)
                after = self.run()
                if self.after and not all(torch.isfinite(t).all() for t in after) and all(torch.isfinite(t).all() for t in self.after):
                    for k, t in tensors.items():
                        t.data = last[k]
                    break
                self.after = after
                if _distance(self.before, after) > 4 * max(tolerance, self.noise):
                    break
            yield
        finally:
            for k, t in tensors.items():
                t.data = self.own[k]

    def agrees(self, other: list[Tensor]) -> bool:
        """Whether these outputs are those of the perturbed model, but for rounding; a part of what the adapters do is no rounding."""
        error, effect = _distance(self.after, other, self.before), _distance(self.before, self.after)
        floor = 64 * max(torch.finfo(x.dtype).eps for x in self.after)
        return error <= max(self.tolerance(), 4 * self.noise) and (error <= 0.25 * effect or error <= max(floor, 4 * self.noise))

    def tolerance(self) -> float:
        """Of outputs that are computed in two ways, relative."""
        kinds = {t.dtype for t in self.before} | {s.site.dtype for s in self.subjects if s.site is not None}
        kinds |= {t.dtype for s in self.subjects for t in s.tensors.values()}
        where = {t.device.type for t in self.before}
        kinds |= {torch.get_autocast_dtype(d) for d in where if torch.is_autocast_enabled(d)}
        loose = max(TOLERANCE.get(k, 5e-2) for k in kinds if k.is_floating_point)
        tf32 = where - {"cpu"} and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
        return max(loose, 5e-3) if tf32 and loose >= 1e-4 else loose


class _Fence:
    """Keeps everything of a model that runs could change, and puts it back."""

    def __init__(self, root: nn.Module):
        self.root = root

    def __enter__(self) -> _Fence:
        modules = list(self.root.modules())
        self.modes = [(m, m.training) for m in modules]
        self.random_mode = any(mode for _, mode in self.modes)
        self.params = [(p, p.requires_grad, p.grad) for p in self.root.parameters()]
        self.buffers = {}
        for m in modules:
            for n, b in m._buffers.items():
                if b is None or b.is_meta:
                    self.buffers[id(m), n] = (m, b, None, None, None)
                    continue
                kept = b.detach().clone() if b.numel() <= BIG else b.detach().to("cpu", copy=True)
                self.buffers[id(m), n] = (m, b, kept, b.data, b._version)
        devices = {t.device for t in [*self.root.parameters(), *self.root.buffers()]}
        self.random = [(random.setstate, random.getstate()), (np.random.set_state, np.random.get_state())]
        self.random += [_generator(d) for d in devices | {torch.device("cpu")} if d.type != "meta"]
        return self

    def __exit__(self, *exc) -> None:
        self.set_modes(True)
        self.put_flags_back()
        self.put_buffers_back(surely=True)
        self.set_random(0)
        torch.clear_autocast_cache()
        for p, _, grad in self.params:
            p.grad = grad

    def set_modes(self, own: bool) -> None:
        """The modules' own modes, or eval. Flags, not calls: a model's train() may do more than that."""
        for m, mode in self.modes:
            m.training = mode and (own or layers.is_opaque_linear(m))  # such a layer may change for good when it runs in eval mode

    def put_flags_back(self) -> None:
        for p, flag, _ in self.params:
            p.requires_grad_(flag)

    def put_buffers_back(self, surely: bool = False) -> None:
        there = {id(m): m for m, *_ in self.buffers.values()}
        for m in there.values():
            for n in [n for n in m._buffers if (id(m), n) not in self.buffers and not n.startswith(STASH)]:
                del m._buffers[n]
        for (_, n), (m, b, kept, data, version) in self.buffers.items():
            m._buffers[n] = b
            if kept is None:
                continue
            if b.data_ptr() != data.data_ptr():
                b.data = data
            # Large whole numbers are a quantised base's codes: they are looked at, not written again after every run.
            if b.numel() <= BIG or b.is_floating_point() or b._version != version or (surely and bits(b) != bits(kept)):
                data.copy_(kept)

    def set_random(self, seed: int) -> None:
        """The generators as they were (seed 0), or those of the CPU in another state."""
        for put, state in self.random:
            put(state)
        if seed:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)

    @contextlib.contextmanager
    def no_grads(self) -> Iterator[None]:
        """For one backward(): `.grad` empty, hooks that would step an optimizer silent, both put back."""
        silenced = []
        for p, _, _ in self.params:
            hooks = getattr(p, "_post_accumulate_grad_hooks", None)
            if hooks:
                silenced.append((hooks, dict(hooks)))
                hooks.clear()
            p.grad = None
        try:
            yield
        finally:
            for hooks, kept in silenced:
                hooks.update(kept)
            for p, _, grad in self.params:
                p.grad = grad


def _generator(device: torch.device) -> tuple[Callable, Tensor]:
    """How to set a device's generator, and its state."""
    if device.type == "cpu":
        return torch.set_rng_state, torch.get_rng_state()
    module, where = torch.get_device_module(device), () if device.type == "mps" else (device,)
    return lambda state: module.set_rng_state(state, *where), module.get_rng_state(*where)


def _refused(grad: Callable, loss: Tensor, tensors: list[Tensor], **kwargs):
    """grad(...), or None where reentrant checkpointing refuses it."""
    try:
        return grad(loss, tensors, **kwargs)
    except RuntimeError as e:
        if "heckpoint" not in str(e):
            raise
        return None


def bits(t: Tensor) -> int:
    """A 64-bit sum of a tensor's bytes, weighted by their places; temporaries of a few MB."""
    raw = t.detach().contiguous().reshape(-1).view(torch.uint8)
    whole, total = len(raw) // 8 * 8, 0
    words = raw[:whole].view(torch.int64) if raw.storage_offset() % 8 == 0 else raw[:whole].clone().view(torch.int64)
    for i in range(0, len(words), BIG):
        piece = words[i : i + BIG]
        places = torch.arange(i, i + len(piece), dtype=torch.int64, device=piece.device)
        total += int((piece * (places * -7046029254386353131 + 1 | 1)).sum())
    tail = int.from_bytes(bytes(raw[whole:].tolist()), "little")
    return (total * 31 + tail) % 2**64


def _nudged(t: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """t plus noise of `size` times its root mean square (of `size` where it is zero)."""
    scale = t.abs().double().square().mean().sqrt().item() if t.numel() else 1.0
    kind = torch.float64 if t.dtype in (torch.float64, torch.complex128) else torch.float32
    noise = torch.randn(t.shape, generator=generator, dtype=kind, device="cpu").to(t.device)
    return (t + noise * (size * (scale or 1.0))).to(t.dtype)


def _floating(output: object, depth: int = 8) -> list[Tensor]:
    """All floating tensors in a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() or output.is_complex() else []
    if depth == 0 or isinstance(output, (str, bytes, nn.Module)):
        return []
    if isinstance(output, Mapping):
        inside: Iterable = output.values()
    elif isinstance(output, (list, tuple)):
        inside = output
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        inside = [getattr(output, f.name) for f in dataclasses.fields(output)]
    elif hasattr(output, "__dict__"):
        inside, depth = vars(output).values(), min(depth, 2)  # an object of its own: not all that hangs on it
    else:
        return []
    return [t for x in inside for t in _floating(x, depth - 1)]


def _loss(output: object) -> Tensor:
    """The output's `.loss`, else the sum of squares of all floating outputs."""
    given = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(given, Tensor):
        return given.sum()
    found = _floating(output)
    if not found:
        raise ValueError("the model returned no floating tensor: there is no loss to take")
    return sum(_real(t).square().sum().cpu() for t in found)


def _mixture(output: object) -> Tensor:
    """A fixed random mixture of all floating outputs: unlike a sum of squares, it sees what a normalisation would hide."""
    generator, total = torch.Generator().manual_seed(1), 0
    for t in _floating(output):
        t = torch.where(torch.isfinite(t), t, 0)
        total = total + (_real(t) * torch.randn(_real(t).shape, generator=generator, device="cpu").to(t.device)).sum().cpu()
    return total


def _real(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t if t.dtype == torch.float64 else t.float()


def _distance(a: list[Tensor], b: list[Tensor], moved: list[Tensor] | None = None) -> float:
    """Largest difference between two runs, relative to the largest entry among those that differ between a and `moved` (b).

    Entries that never differ, such as a mask's -1e9, would hide the others.
    """
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y, z in zip(a, b, b if moved is None else moved, strict=True):
        x, y, z = (_real(t) for t in (x, y, z))
        differ = (x != y) & ~(x.isnan() & y.isnan())
        if not differ.any():
            continue
        gap = (x - y).abs()[differ].max().item()
        live = ((x != z) | differ) & x.isfinite()
        scale = x[live].abs().max().item() if live.any() else 0.0
        worst = max(worst, gap / scale if scale and gap == gap else float("inf"))
    return worst


def _reach(t: _Trial) -> None:
    """Every tensor of every adapter gets a gradient."""
    todo = {id(p): p for s in t.subjects for p in s.tensors.values()}
    odd: set[int] = set()
    with _cuts(t, list(todo.values())) as cut:
        for seed in range(TRIES if t.fence.random_mode else 1):
            for key, g in zip(list(todo), t.gradients(list(todo.values()), _loss, seed), strict=True):
                if g is not None:
                    del todo[key]
                    if not torch.isfinite(g).all():
                        odd.add(key)
            if not todo:
                break
    missed = []
    for s in t.subjects:
        absent = [k for k, p in s.tensors.items() if id(p) in todo]
        s.row.reached = None if not s.tensors else not absent
        if absent:
            missed.append((s, absent))
        if any(id(p) in odd for p in s.tensors.values()):
            s.row.note = "gradient is not finite"
        wall = next((cut[id(p)] for p in s.tensors.values() if id(p) in cut), None)
        if wall is not None:
            s.row.fail("reached", f"{wall} has no backward: what lies below it gets a part of its gradient, or none. Adapt layers above it alone")
    if missed:
        reasons = _why_unreached(t, [s for s, _ in missed])
        for (s, absent), reason in zip(missed, reasons, strict=True):
            some = f"{listed(absent)} of its tensors: " if len(absent) < len(s.tensors) else ""
            s.row.fail("reached", some + reason)
    t.fence.put_flags_back()


@contextlib.contextmanager
def _cuts(t: _Trial, tensors: list[Tensor]) -> Iterator[dict[int, str]]:
    """Is filled while the model runs: tensors, by id, and the frozen layer that cuts their gradient on one way to the loss, or on all."""
    found: dict[int, str] = {}

    def look(path: str, m: nn.Module, args: tuple, y: object) -> None:
        if args and torch.is_grad_enabled() and cuts_gradient(args[0], y):
            below = _refused(torch.autograd.grad, args[0].sum(), tensors, retain_graph=True, allow_unused=True) or [None] * len(tensors)
            found.update({id(p): f"{path!r}, a {type(m).__name__}," for p, g in zip(tensors, below, strict=True) if g is not None})

    packed = [(path, m) for path, m in walk(t.root) if layers.is_opaque_linear(m) and not isinstance(m, Adapted)]  # one with an adapter raises
    handles = [m.register_forward_hook(functools.partial(look, path)) for path, m in packed]
    try:
        yield found
    finally:
        for h in handles:
            h.remove()


def _why_unreached(t: _Trial, missed: list[_Subject]) -> list[str]:
    """Whether the host ran, and whether its frozen tensor reaches the loss without it: the two tell the cases apart."""
    called: set[int] = set()
    hosts = {id(s.site.host): s.site.host for s in missed if s.site is not None}
    raw = {id(s): s.site.raw_tensor for s in missed if s.site is not None}
    raw = {k: p for k, p in raw.items() if p is not None and p.is_floating_point()}
    handles = [h.register_forward_pre_hook(lambda m, *_: called.add(id(m)) or None) for h in hosts.values()]
    try:
        read = t.gradients(list(raw.values()), _loss) if raw else []
    finally:
        for h in handles:
            h.remove()
        t.fence.put_flags_back()
    reads = {k for k, g in zip(raw, read, strict=True) if g is not None}
    out = []
    for s in missed:
        if s.site is None:
            out.append("no site of this adapter uses it")
        elif id(s.site.host) in called and id(s) in reads:
            out.append("its host is called, but the method's result does not depend on it")
        elif id(s.site.host) in called:
            out.append(
                "its host is called, but its output does not reach the loss: detached, unused, under no_grad, or under reentrant "
                "checkpointing of a block whose input requires no grad"
            )
        elif id(s) in reads:
            out.append("its host is read, not called: wrap(..., read=[{paths}])")
        else:
            out.append("its host is not used for this batch: give a batch that uses it, or wrap(..., exclude=[{paths}])")
    return out


def _move(t: _Trial) -> None:
    """A change of its tensors changes the output."""
    every = {id(p): p for s in t.subjects for p in s.tensors.values()}
    found = dict(zip(every, t.gradients(list(every.values()), _mixture), strict=True))
    t.fence.put_flags_back()
    sensitive = {k for k, g in found.items() if g is not None and bool((g != 0).any())}
    whole = _distance(t.before, t.after) > 4 * t.noise
    # Fused paths run without gradients only: what such a path ignores has a gradient all the same.
    same = whole and _distance(t.run(grad=True), t.after, t.before) <= max(t.tolerance(), 4 * t.noise)
    for s in t.subjects:
        if not s.tensors:
            continue
        felt = any(id(p) in sensitive for p in s.tensors.values())
        s.row.moves = whole and ((same and felt) or _moves_alone(t, s))
        if not s.row.moves and felt:
            s.row.fail("moves", "a gradient, but no effect in eval without gradients, where its weight is read: wrap(..., read=[{paths}])")
        elif not s.row.moves:
            s.row.fail("moves", "a change of its tensors does not change the output of this batch in eval mode")
        elif s.row.reached is False and acts(s.module, "step"):
            s.row.reached, s.row.note = True, "gets no gradient now; its schedule decides when it trains"
            s.row.problems.pop("reached")


def _moves_alone(t: _Trial, s: _Subject) -> bool:
    changed = {k: p.data for k, p in s.tensors.items()}
    try:
        for p in s.tensors.values():
            p.data = t.own[id(p)]
        return _distance(t.after, t.run()) > 4 * t.noise
    finally:
        for k, p in s.tensors.items():
            p.data = changed[k]


def _save(t: _Trial) -> None:
    """Written, and loaded into a fresh copy of the base, the adapters and the output are the same."""
    from peftlab.formats.file import read
    from peftlab.formats.native import load, save

    def fail(rows: Iterable[Row], remedy: str) -> None:
        for row in rows:
            row.fail("saves", remedy)

    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        t.notes.append("saving was not tried: one process of several writes")
        return
    rows = [s.row for s in t.subjects]
    elsewhere = report(t.root).elsewhere
    if elsewhere:
        t.notes.append(f"these train outside adapters: save(..., include=[{listed(elsewhere)}])")
    try:
        fresh = unwrap(view(t.root))
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as e:
        t.notes.append(f"saving was not tried: the model cannot be copied ({e})")
        return
    try:
        t.fence.put_flags_back()
        in_place = {id(s): bits(s.site.raw_tensor) for s in t.subjects if s.site is not None and s.module.in_place}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.safetensors"
            try:
                save(t.root, file, names=t.names, include=[re.compile(re.escape(k)) for k in elsewhere] or None)
                header, stored = read(file)
                load(fresh, file, trainable=True)
            except (ValueError, RuntimeError, TypeError, OSError) as e:
                return fail(rows, str(e))
        for row in rows:
            row.saves = True
        _compare_keys(t, header, fail)
        back = {key: m for _, key, _, m in adapter_modules(fresh)}
        hosts = {id(host): path for path, host, _ in stacks(t.root)}
        for s in t.subjects:
            if id(s) in in_place:
                key = join(hosts[id(s.site.host)], s.site.param)
                if key in stored and bits(stored[key]) != in_place[id(s)]:
                    fail([s.row], f"{key!r} is not the same in the file")
            else:
                _compare(s, back.get(s.key), fail)
        for m in fresh.modules():
            m.training = m.training and layers.is_opaque_linear(m)
        if all(r.saves for r in rows) and not t.agrees(t.run(fresh)):
            fail(rows, "every tensor comes back, but the reloaded model gives another output: something that acts is not saved")
    finally:
        t.fence.put_flags_back()
        t.fence.put_buffers_back()


def _compare_keys(t: _Trial, header: dict, fail: Callable) -> None:
    """The file holds the adapters' tensors, what the header says of the base, and nothing else."""
    expected, hosts = set(), {id(host): path for path, host, _ in stacks(t.root)}
    for _, key, site, m in adapter_modules(t.root, t.names):
        in_place = site is not None and m.in_place
        expected |= {join(hosts[id(site.host)], site.param)} if in_place else {f"{key}.{k}" for k in saved_tensors(m)}
    extra = sorted(header["tensors"].keys() - expected - {*header["buffers"], *header["included"]})
    if extra:
        fail([s.row for s in t.subjects], f"the file holds tensors that are no adapter's: {listed(extra)}")
    for key in sorted(expected - header["tensors"].keys()):
        fail([s.row for s in t.subjects if key.startswith(f"{s.key}.")] or [s.row for s in t.subjects], f"{key!r} is not in the file")


def _compare(s: _Subject, back: nn.Module | None, fail: Callable) -> None:
    """Tensors and derived buffers of a loaded method are those that were saved; what a schedule keeps is the schedule's to save."""
    if back is None:
        return fail([s.row], "it is not there after loading")
    there = dict(back.named_parameters()) | dict(back.named_buffers())
    kept = saved_tensors(s.module)
    for k, v in (dict(s.module.named_parameters()) | dict(s.module.named_buffers())).items():
        if k not in kept and acts(s.module, "step"):
            continue
        w = there.get(k)
        if w is None or w.dtype != v.dtype or w.shape != v.shape or bits(w) != bits(v):
            fail([s.row], f"{k!r} is not the same after loading")


def _merge(t: _Trial) -> None:
    """Merged, the output is the same; unmerged, the bits are."""
    able = dict.fromkeys(t.names, True)
    for s in t.subjects:
        if s.site is not None and (s.module.surrounds() or s.site.rule is layers.OPAQUE):
            able[s.row.name] = False
    names = [n for n in t.names if able[n]]
    rows = {id(s): s for s in t.subjects if able[s.row.name] and s.site is not None and not s.module.in_place}
    if not rows:
        return
    hosts = {id(s.site.host): s.site.host for s in rows.values()}
    marks = {(k, n): (bits(p), p.data_ptr()) for k, h in hosts.items() for n, p in h._parameters.items() if p is not None}
    for s in rows.values():
        s.row.merges = True
    try:
        merge(t.root, names, onto="dequantized" if any(isinstance(m, layers.Quantised) for m in t.root.modules()) else None)
    except (ValueError, RuntimeError) as e:
        for s in rows.values():
            s.row.fail("merges", str(e))
        return
    try:
        good = t.agrees(t.run())
        if not good:
            merged = _Layers(t)
    finally:
        unmerge(t.root, names)
    if not good:
        culprit = _Layers(t).first_other(merged, t.tolerance())
        for s in _blame(list(rows.values()), culprit):
            s.row.fail(
                "merges",
                "the merged model gives another output than the wrapped one: its weight is also read where the layer is "
                f"not called (then wrap(..., read={s.row.path!r}) helps), or the method's forward is not its definition",
            )
    for s in rows.values():
        host = s.site.host
        if any((bits(p), p.data_ptr()) != marks[id(host), n] for n, p in host._parameters.items() if p is not None):
            s.row.fail("merges", "unmerging does not give the frozen bits back")


class _Layers:
    """What every module of the model returns in one eval run, in the order in which they return."""

    def __init__(self, t: _Trial):
        self.seen: list[tuple[nn.Module, list[Tensor]]] = []
        handles = [m.register_forward_hook(self._note) for _, m in walk(t.root)]
        try:
            t.run()
        finally:
            for h in handles:
                h.remove()

    def _note(self, m: nn.Module, _, output: object) -> None:
        self.seen.append((m, [x.detach().clone() for x in _floating(output)]))

    def first_other(self, other: _Layers, tolerance: float) -> nn.Module | None:
        """The first module to return something else there, or None."""
        for (m, a), (n, b) in zip(self.seen, other.seen, strict=False):
            if m is not n:
                return None
            if _distance(a, b) > tolerance:
                return m
        return None


def _blame(rows: list[_Subject], culprit: nn.Module | None) -> list[_Subject]:
    """Adapters that do nothing unmerged, if any; else those in the module that went wrong first; all of them where none is there."""
    inside = set() if culprit is None else {id(m) for m in culprit.modules()}
    return [s for s in rows if s.row.moves is False] or [s for s in rows if id(s.site.host) in inside] or rows


def local(t: Tensor) -> Tensor:
    """This process's part of a shard of FSDP2, or the tensor."""
    return t.to_local() if type(t).__name__ == "DTensor" else t.detach()


def _value(t: Tensor) -> int:
    return bits(local(t) + 0)  # + 0: a zero has one sign


class Watch:
    """A hook on an optimizer that raises unless every watched tensor has moved after `steps` steps; then it removes itself."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise ValueError(f"steps={steps!r}: a whole number from 2 on (in step 1 the gradient of LoRA's A is zero)")
        self.model, self.steps, self.taken = bare(ensure_module(model)), steps, 0
        optimizer = torch_optimizer(optimizer)
        there = self._tensors()
        if not there:
            raise ValueError("no active adapter of this model trains: unfreeze(model), or load(..., trainable=True)")
        mine = held(optimizer)
        missing = [k for k, (p, _) in there.items() if id(p) not in mine]
        if missing:
            what = "is empty" if not mine else f"lacks {len(missing)} of {len(there)} adapter tensors"
            raise ValueError(f"the optimizer {what}, they would never move: {listed(missing)}. Build it after wrap and load.")
        self.still = {k: _value(p) for k, (p, _) in there.items() if local(p).numel()}
        self.handle = optimizer.register_step_post_hook(self._after)

    def _tensors(self) -> dict[str, tuple[Tensor, nn.Module]]:
        active = {n for _, _, s in stacks(self.model) for n in s.active if n not in s.merged}
        found = [(key, k, p, m) for _, key, s, m in adapter_modules(self.model, active) for k, p in tensors_of(s, m).items()]
        return {f"{key}.{k}": (p, m) for key, k, p, m in found if p.requires_grad}

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not ran(optimizer):
            return
        self.taken += 1
        there = self._tensors()
        for k in [k for k in self.still if k not in there or _value(there[k][0]) != self.still[k]]:
            del self.still[k]
        if self.taken < self.steps and self.still:
            return
        self.remove()
        # What a schedule drives may sleep for now, which shows in its having no gradient.
        stuck = [k for k in self.still if there[k][0].grad is not None or not getattr(there[k][1], "scheduled", False)]
        if stuck:
            idle = [k for k in stuck if there[k][0].grad is None]
            why = f"{len(idle)} have no gradient, check(model, batch) says why" if idle else "the learning rate or the gradient is zero"
            raise RuntimeError(f"{len(stuck)} adapter tensors have not moved in {self.taken} optimizer steps: {listed(stuck)}; {why}")

    @property
    def done(self) -> bool:
        """Whether every tensor has moved."""
        return not self.still

    def remove(self) -> None:
        """Stop watching."""
        self.handle.remove()


def watch(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10) -> Watch:
    """Raise in `optimizer.step()` if a trainable tensor of an active adapter has not changed at all after `steps` steps.

    Tensors are looked up in the model, so one whose parameter was replaced after the optimizer was built is found out too. The hook
    removes itself once all have moved. Steps that a GradScaler skips do not count.

    Args:
        steps: optimizer steps, at least 2.

    Returns:
        Watch: with `.remove()` and `.done`.

    Raises:
        ValueError: at once, where the optimizer lacks adapter tensors (all of them, when it is empty), or no adapter trains.
        RuntimeError: later, from `optimizer.step()`, naming the tensors that have not moved.
    """
    return Watch(model, optimizer, steps)
