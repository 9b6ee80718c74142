"""The third proof: saved and loaded into a fresh base, the adapters are the same."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from peftlab.core.adapters import adapter_modules, overrides_hook
from peftlab.core.build import saved_tensors
from peftlab.core.preserve import checksum_bits
from peftlab.core.stack import adapted_modules
from peftlab.inspect.check.report import CheckRow
from peftlab.inspect.check.trial import Subject, Trial
from peftlab.inspect.report import report
from peftlab.manage.copies import shared_base_copy
from peftlab.manage.unwrap import unwrap
from peftlab.model import layers
from peftlab.model.index import join_path
from peftlab.support.text import list_names


def prove_saves(t: Trial) -> None:
    """Written, and loaded into a fresh copy of the base, the adapters and the output are the same."""
    from peftlab.formats.file import read
    from peftlab.formats.load import load
    from peftlab.formats.save import save

    def fail(rows: Iterable[CheckRow], remedy: str) -> None:
        for row in rows:
            row.fail("saves", remedy)

    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        t.notes.append("saving was not tried: one process of several writes")
        return
    rows = [s.row for s in t.subjects]
    elsewhere = report(t.root).elsewhere
    if elsewhere:
        t.notes.append(f"these train outside adapters: save(..., include=[{list_names(elsewhere)}])")
    try:
        fresh = unwrap(shared_base_copy(t.root))
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as e:
        t.notes.append(f"saving was not tried: the model cannot be copied ({e})")
        return
    try:
        t.fence.put_flags_back()
        in_place = {id(s): checksum_bits(s.site.raw_tensor) for s in t.subjects if s.site is not None and s.module.in_place}
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
        hosts = {id(host): path for path, host, _ in adapted_modules(t.root)}
        for s in t.subjects:
            if id(s) in in_place:
                key = join_path(hosts[id(s.site.host)], s.site.param)
                if key in stored and checksum_bits(stored[key]) != in_place[id(s)]:
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


def _compare_keys(t: Trial, header: dict, fail: Callable) -> None:
    """The file holds the adapters' tensors, what the header says of the base, and nothing else."""
    expected, hosts = set(), {id(host): path for path, host, _ in adapted_modules(t.root)}
    for _, key, site, m in adapter_modules(t.root, t.names):
        in_place = site is not None and m.in_place
        expected |= {join_path(hosts[id(site.host)], site.param)} if in_place else {f"{key}.{k}" for k in saved_tensors(m)}
    extra = sorted(header["tensors"].keys() - expected - {*header["buffers"], *header["included"]})
    if extra:
        fail([s.row for s in t.subjects], f"the file holds tensors that are no adapter's: {list_names(extra)}")
    for key in sorted(expected - header["tensors"].keys()):
        fail([s.row for s in t.subjects if key.startswith(f"{s.key}.")] or [s.row for s in t.subjects], f"{key!r} is not in the file")


def _compare(s: Subject, back: nn.Module | None, fail: Callable) -> None:
    """Tensors and derived buffers of a loaded method are those that were saved; what a schedule keeps is the schedule's to save."""
    if back is None:
        return fail([s.row], "it is not there after loading")
    there = dict(back.named_parameters()) | dict(back.named_buffers())
    kept = saved_tensors(s.module)
    for k, v in (dict(s.module.named_parameters()) | dict(s.module.named_buffers())).items():
        if k not in kept and overrides_hook(s.module, "step"):
            continue
        w = there.get(k)
        if w is None or w.dtype != v.dtype or w.shape != v.shape or checksum_bits(w) != checksum_bits(v):
            fail([s.row], f"{k!r} is not the same after loading")
