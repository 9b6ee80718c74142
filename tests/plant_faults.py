"""Does the suite see anything? Plants one fault after another into a copy of the package and says which law objects.

    python tests/plant_faults.py                 # all faults, a table at the end (some minutes)
    python tests/plant_faults.py scale groups    # those whose names contain one of the words

A fault is a piece of source text and what replaces it; a text that is no longer there (or there twice) is reported as stale. A fault that no law
catches means that a law is missing. The table in tests/README.md is the output of this script.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    old: str
    new: str
    look: str = ""  # where it could show: part of the tests' names (which law objects is not said)

    @property
    def where(self) -> str:
        """The pairs (method, case) that are run: a method's own file is looked at through that method."""
        if self.look:
            return self.look
        name = Path(self.file).stem
        return f"([{name}-linear or [{name}-conv2d_groups)" if self.file.startswith("methods/") else "([lora-linear or [ia3-linear)"


FAULTS = [
    # ---- in a method
    Fault(
        "scale forgotten in LoRA's fast path", "methods/lora.py",
        "base.plus(x, B, self.s * base.apply(A, z))",
        "base.plus(x, B, base.apply(A, z))",
    ),
    Fault("scale twice in LoRA's definition", "methods/lora.py", "return W + self.s * B @ A", "return W + self.s**2 * B @ A"),
    Fault("gradient cut: B detached in the fast path", "methods/lora.py", "base.plus(x, B, self.s", "base.plus(x, B.detach() + 0 * B, self.s"),
    Fault("x rebound: the frozen path gets the dropped input", "methods/lora.py", "y = base.plus(x, B,", "y = base.plus(z, B,"),
    Fault(
        "DoRA's norm along the wrong axis", "parts/lowrank.py",
        "torch.linalg.vector_norm(W, dim=1).square()",
        "torch.linalg.vector_norm(W, dim=0)[: len(W)].sum().square().expand(len(W))",
        "dora-linear",
    ),
    Fault(
        "DoRA's norm kept from an earlier step", "methods/dora.py",
        "norm = lowrank.row_norms(W, self.A, self.B, self.s)",
        "norm = self.__dict__.setdefault('norm', lowrank.row_norms(W, self.A, self.B, self.s))",
    ),
    Fault("IA3 forgets the bias in its definition", "methods/ia3.py", "return self.l * b if", "return b if"),
    Fault(
        "OFT rotates the wrong way in its fast path", "methods/oft.py",
        "base(rotate_blocks(x, self.rotation()))",
        "base(rotate_blocks(x, self.rotation().mT))",
    ),
    Fault(
        "VeRA's projections drawn from the global generator", "methods/vera.py",
        'generator=torch.Generator("cpu").manual_seed(seed), ',
        "",
        "vera-linear or another_process",
    ),
    Fault(
        "a sparse support drawn from the global generator", "parts/masks.py",
        'generator=torch.Generator("cpu").manual_seed(seed), ',
        "",
        "fourierft-linear or another_process",
    ),
    Fault(
        "Full forgets what lies below it", "methods/full.py",
        "C if W is origin else C + (W - origin)",
        "C",
        "full-linear or lora-full-linear or ia3-full-linear",
    ),
    Fault(
        "a vector that never trains", "methods/vera.py",
        "self.b = nn.Parameter(torch.zeros(base.n_out))",
        "self.b = nn.Parameter(torch.zeros(base.n_out))\n        self.unused = nn.Parameter(torch.zeros(base.n_out))",
    ),
    # ---- in what layer types say
    Fault(
        "stride lost in a convolution's low-rank product", "layers.py",
        "return self.affine(m, M.repeat(m.groups, 1) if m.groups > 1 else M, None, x)",
        "from unittest import mock\n        with mock.patch.object(m, 'stride', (1,) * len(m.stride)):\n            "
        "return self.affine(m, M.repeat(m.groups, 1) "
        "if m.groups > 1 else M, None, x)",
        "lora-conv2d_groups",
    ),
    Fault(
        "groups ignored in the canonical matrix", "layers.py",
        "W = raw.reshape(g, raw.shape[0] // g, raw.shape[1], k)\n        return W.transpose(1, 2)",
        "W = raw.reshape(raw.shape[0] // g, g, raw.shape[1], k).transpose(0, 1)\n        return W.transpose(1, 2)",
        "lora-conv_transpose2d",
    ),
    Fault(
        "a transposed delta on transposed convolutions", "layers.py",
        "out = W.reshape(g, rows, before.shape[0] // g, k).transpose(1, 2)",
        "out = W.reshape(g, before.shape[0] // g, rows, k)",
        "lora-conv_transpose2d",
    ),
    Fault(
        "the padding row trains", "layers.py",
        "pad = m.padding_idx if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) else None",
        "pad = None",
        "full-embedding_padding or lora-embedding_padding",
    ),
    Fault(
        "the padding row of the output is not put back", "layers.py",
        "return torch.where((x == m.padding_idx)[..., None], row.to(y.dtype), y)",
        "return y",
        "lora-embedding_padding",
    ),
    # ---- in attaching
    Fault(
        "double out_proj: a layer that is read is surrounded too", "host.py",
        "return call(self, links.calls, args, kwargs) if links.calls else cls.forward",
        "return call(self, links.weights + links.calls, args, kwargs) if links else cls.forward",
        "lora-attention or lora-linear_own_forward",
    ),
    Fault(
        "out_proj of attention is surrounded, which nobody calls", "sites.py",
        "READERS = (nn.MultiheadAttention, ",
        "READERS = (",
        "lora-attention",
    ),
    Fault("a recurrent layer computes with its cached weights", "host.py", "if issubclass(cls, nn.RNNBase) and seen:", "if False:", "lora-lstm"),
    Fault(
        "the wrong expert", "host.py",
        "piece = pieces[site.expert]\n",
        "piece = pieces[site.expert - 1]\n",
        "lora-experts_one or lora-experts_eio",
    ),
    Fault(
        "the bias of other rows", "host.py",
        "rows = site.bias_part\n            W = method.bias(W) if rows is None else _with_rows(W, rows, method.bias(W[rows]))",
        "rows = site.bias_part\n            W = method.bias(W) if rows is None else _with_rows(W, rows, method.bias(W.flip(0)[rows]))",
        "ia3-fused",
    ),
    Fault("the tied end does not follow", "host.py", "stack.alias.setdefault(param, (site.host, site.param))", "pass", "lora-tied_share"),
    Fault(
        "the stack runs in reverse order", "host.py",
        "acting = [p for n in self.active if n not in self.merged",
        "acting = [p for n in reversed(self.active) if n not in self.merged",
        "ia3-lora-linear",
    ),
    Fault("the global generator is moved", "host.py", "torch.default_generator.set_state(self.state)", "pass"),
    Fault(
        "start values from Python's hash", "host.py",
        '    for byte in f"{seed}\\0{name}\\0{path}".encode():',
        '    h ^= abs(hash(path))\n    for byte in f"{seed}\\0{name}\\0{path}".encode():',
        "lora-linear or another_process",
    ),
    Fault(
        "start values that depend on the order of wrapping", "wrap.py",
        "def finish(method: Method, site: Site, dtype: torch.dtype) -> None:",
        "def finish(method: Method, site: Site, dtype: torch.dtype) -> None:\n    with torch.no_grad():\n        for p in method.parameters():\n            "
        "p.mul_(1 + 0.1 * len(stacks(site.host)))\n    _finish(method, site, dtype)\n\n\ndef _finish(method: Method, site: Site, dtype: torch.dtype) -> None:",
    ),
    Fault(
        "the base is not frozen", "wrap.py",
        "def freeze_base(model: nn.Module) -> None:",
        "def freeze_base(model: nn.Module) -> None:\n    return\n\n\ndef _freeze_base(model: nn.Module) -> None:",
    ),
    Fault(
        "the active set is not captured for checkpoint recomputation", "host.py",
        "return self._acted_at(node._sequence_nr())",
        "return self.links",
    ),
    Fault(
        "reentrant checkpointing loses gradients silently", "host.py",
        "        refuse_lost_gradients(self, stack)\n        if stack.read:",
        "        if stack.read:",
    ),
    Fault(
        "a copy keeps the original's class only", "host.py",
        "    made = adapted_class(cls, seen)\n    return made.__new__(made)",
        "    return cls.__new__(cls)",
    ),
    # ---- in switching and merging
    Fault(
        "disabled keeps what methods did to the bias", "host.py",
        "NOTHING if self.silent else self._links()",
        "Links(tuple(p for p in self._links().weights if p[1].has_bias()), ()) if self.silent else self._links()",
        "ia3-linear",
    ),
    Fault(
        "merge forgets the bias", "switch.py",
        "    params |= dict.fromkeys(s.bias for s, m in links if",
        "    {} | dict.fromkeys(s.bias for s, m in links if",
        "ia3-linear",
    ),
    Fault(
        "unmerge by subtraction", "switch.py",
        "            _rebind(host, stack, param, stack._buffers.pop(STASH + param))\n            _retie",
        "            change = host._parameters[param].data - stack._buffers.pop(STASH + param)\n            _rebind(host, stack, param, "
        "host._parameters[param].data - change)\n            _retie",
        "lora-linear or thousand_cycles",
    ),
    Fault(
        "merged in reverse order", "switch.py",
        "return [n for n in stack.order if n in {*stack.merged, *new} and n not in stack.lossy]",
        "return [n for n in reversed(stack.order) if n in {*stack.merged, *new} and n not in stack.lossy]",
        "ia3-lora-linear",
    ),
    Fault("unwrap leaves everything frozen", "switch.py", "p.requires_grad_(ledger.flags[join(path, n)])", "p.requires_grad_(False)"),
    Fault("unwrap leaves BatchNorm's statistics", "switch.py", "            b.data = old.data.clone()", "            pass", "full-batch_norm"),
    # ---- in precisions
    Fault(
        "a layer that is read sees the adapter's precision", "host.py",
        "value = effective(host, param, weights).to(raw.dtype)",
        "value = effective(host, param, weights)",
        "lora-linear_own_forward",
    ),
    Fault(
        "the adapter takes the base's precision", "wrap.py",
        "return self.dtype or torch.promote_types(torch.float32, site.dtype)",
        "return self.dtype or site.dtype",
    ),
    # ---- in files
    Fault(
        "keys chosen by substring on save", "io/native.py",
        "for k, t in saved_tensors(method).items():\n",
        "for k, t in ((k, t) for k, t in saved_tensors(method).items() if not any(c in prefix + k for c in ('weight', 'bias'))):\n",
        "lora-linear or keys_come_from_structure",
    ),
    Fault(
        "fingerprint skipped", "io/native.py",
        '        if wrong:\n            raise LoadError(f"this is not the base',
        '        if False:\n            raise LoadError(f"this is not the base',
    ),
    Fault("checksums skipped", "io/file.py", "or checksum(t) != crc", ""),
    Fault("the header's checksum skipped", "io/file.py", "if meta.get(CRC) != ", "if False and meta.get(CRC) != "),
    Fault(
        "loaded into half precision", "io/native.py",
        "dtype if dtype and value.is_floating_point() else value.dtype",
        "dtype if dtype and value.is_floating_point() else torch.float32 if value.is_floating_point() else value.dtype",
    ),
    # ---- in counts
    Fault("a wrong formula in a docstring", "methods/lokr.py", "Trains: size(", "Trains: 1 + size("),
    Fault(
        "plan forgets what sites share", "wrap.py",
        "sum(r.trainable for r in rows) + extra",
        "max(0, sum(r.trainable for r in rows) + extra - len(rows))",
        "lora-two",
    ),
]  # fmt: skip


def narrow(cases: Path, fault: Fault) -> None:
    """Leave only the layers that are looked at in the copied zoo: collecting the whole matrix takes longer than running a part of it."""
    source = cases.read_text(encoding="utf8")
    mark = "\n# ---------------------------------------------------------------- the one row"
    assert source.count(mark) == 1
    kept = {*re.findall(r"-(\w+)", fault.where), "linear", "conv2d_groups", "embedding"}
    cases.write_text(source.replace(mark, f"\nCASES = {{k: c for k, c in CASES.items() if k in {kept!r}}}\n{mark}"), encoding="utf8")


def run(fault: Fault) -> tuple[str, float]:
    """(the test that objected, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("peftlab", "tests"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        narrow(Path(folder, "tests", "cases.py"), fault)
        path = Path(folder, "peftlab", fault.file)
        source = path.read_text(encoding="utf8")
        if source.count(fault.old) != 1:
            return f"STALE: the text is there {source.count(fault.old)} times", 0.0
        path.write_text(source.replace(fault.old, fault.new), encoding="utf8")
        begun = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", "slow or not slow", "-k", fault.where]
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([*command, "tests/test_conformance.py"], cwd=folder, env=env, capture_output=True, text=True, check=False)
        took = time.monotonic() - begun
    if done.returncode == 0:
        return "NOT CAUGHT", took
    hit = re.search(r"^(?:FAILED|ERROR) \S*?(?:::test_)?([^:\s]+?)(?: - |$)", done.stdout, re.M)
    return (hit.group(1) if hit else f"the suite does not start: {done.stdout[-300:]}"), took


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)
    words = sys.argv[1:]
    chosen = [f for f in FAULTS if not words or any(w in f.what for w in words)]
    print("| fault | where | caught by |\n|---|---|---|")
    missed = 0
    for f in chosen:
        verdict, _ = run(f)
        missed += verdict.startswith(("NOT", "STALE"))
        print(f"| {f.what} | `{f.file}` | {verdict if verdict.startswith(('NOT', 'STALE')) else f'`{verdict}`'} |")
    return missed


if __name__ == "__main__":
    sys.exit(main())
