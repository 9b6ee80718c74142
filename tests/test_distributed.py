"""Two processes over gloo: DDP and FSDP2 train like one process, and what they save is what the bare model saves (rows 12, 22, 23).

`two` runs one `case_*` function of this file in two processes that meet at a file below `tmp_path`; a case asserts for itself.
Many methods share one pair of processes, because starting torch twice costs more than the training.
"""

# ruff: noqa: PT017, PT018 - the cases run outside pytest

from __future__ import annotations

import copy
import os
import subprocess
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import anywhere
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import peftlab
from peftlab.formats.file import read
from peftlab.registry import keywords, resolve

# torch 2.6 calls record_event on CPU streams, which they do not have: FSDP2 runs on gloo from 2.7 on.
needs_cpu_fsdp2 = pytest.mark.skipif(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 7), reason="FSDP2 on the CPU needs torch 2.7")
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

SMALL = {"r": 2, "init_r": 3, "n": 4, "density": 0.3, "ids": [1, 3], "n_tokens": 2, "dim": 2}


def small(method: str) -> dict:
    known = keywords(resolve(method)[0])
    return {k: v for k, v in SMALL.items() if k in known}


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(torch.tanh(self.qkv(self.norm(x))))))


class Net(nn.Module):
    def __init__(self, dim=8, ckpt=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, dim)
        self.layers = nn.ModuleList([Block(dim) for _ in range(2)])
        self.pooler = nn.Linear(dim, dim)  # sentence models have one that a loss may never touch
        self.head = nn.Linear(dim, 4)
        self.ckpt = ckpt

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x) if self.ckpt is None else checkpoint(layer, x, use_reentrant=self.ckpt)
        return self.head(x.mean(1))


def batch(rank: int):
    g = torch.Generator().manual_seed(10 + rank)
    return torch.randint(0, 12, (4, 5), generator=g), torch.randint(0, 4, (4,), generator=g)


def loss_of(model, ranks):
    x, y = (torch.cat(t) for t in zip(*[batch(r) for r in ranks], strict=True))
    return F.cross_entropy(model(x), y)


def stir(model, scale=0.3):
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=gen, dtype=torch.float64).mul(scale).to(p.dtype))
    return model


def placed(method: str) -> bool:
    """Whether the method finds a place in `Net` by itself."""
    try:
        peftlab.plan(Net(), method, exclude=["pooler", "head"], **small(method))
    except ValueError:
        return False
    return True


METHODS = [e.name for e in peftlab.methods(aliases=False) if e.name in anywhere() and placed(e.name)]


# ---------------------------------------------------------------- two processes


def two(case: str, tmp_path: Path, *args: str, limit: float = 240, file: str = __file__) -> list[str]:
    """Run `case_<case>` (several are joined by +) in two processes; their output, or an assertion with both tracebacks."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, file, case, str(tmp_path)]
    running = [subprocess.Popen([*command, str(r), *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    out = []
    try:
        for p in running:
            out.append(p.communicate(timeout=limit)[0])
    finally:
        for p in running:
            p.kill()
    assert all(p.returncode == 0 for p in running), "\n---- other process ----\n".join(out)
    return out


def main(case: str, tmp: str, rank: str, *args: str, cases: dict | None = None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp}/rendezvous", rank=int(rank), world_size=2, timeout=timedelta(seconds=120))
    try:
        for name in case.split("+"):
            (cases or globals())[f"case_{name}"](int(rank), Path(tmp), *args)
            dist.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    # Every assertion has held on both ranks. gloo's threads sometimes abort the interpreter while it shuts down
    # ("terminate called without an active exception"), which says nothing about what was tested: leave without that.
    sys.stdout.flush()
    os._exit(0)


def everywhere_equal(t: torch.Tensor) -> bool:
    other = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(other, t.detach().contiguous())
    return torch.equal(*other)


# ---------------------------------------------------------------- row 23: DDP without find_unused_parameters


def prepared(method, ckpt=None, exclude=("pooler", "head")):
    """An adapter that acts, a head that trains, and one adapter that neither acts nor trains."""
    model = Net(ckpt=ckpt)
    peftlab.wrap(model, method, exclude=list(exclude), **small(method))
    peftlab.wrap(model, "full", targets="head.*", name="head")
    peftlab.wrap(model, "lora", r=2, exclude="pooler", name="idle")
    peftlab.activate(model, ["default", "head"])
    peftlab.train_only(model, "default", "head")
    return model


def case_ddp(rank, tmp, *methods):
    for method in methods:
        for ckpt in (None, False):
            model = prepared(method, ckpt)
            alone = copy.deepcopy(model)
            training = {k for k, p in model.named_parameters() if p.requires_grad}
            assert training and not any(".idle." in k or "peftlab" not in k for k in training), method  # exactly the active set
            wrapped = DDP(model, find_unused_parameters=False)
            optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, alone)]
            for _ in range(3):
                for opt, loss in zip(optimizers, (lambda: loss_of(wrapped, [rank]), lambda: loss_of(alone, [0, 1])), strict=True):
                    opt.zero_grad()
                    loss().backward()
                for (k, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
                    if p.requires_grad:  # the mean over ranks is the gradient of the whole batch
                        assert p.grad is not None, (method, k)
                        assert (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max().clamp_min(1e-3), (method, ckpt, k)
                for opt in optimizers:
                    opt.step()
            for k, p in model.named_parameters():
                assert everywhere_equal(p), (method, k)
            assert {k for k, p in model.named_parameters() if p.requires_grad} == training


HALVES = pytest.mark.parametrize("part", [0, 1])


@HALVES
def test_promise_23_ddp_trains_every_method_with_a_head_and_an_idle_adapter(part, tmp_path):
    """peft#899, #905, trl#480: no unused parameters, with and without checkpointing, gradients those of one process."""
    two("ddp" if part else "ddp+ddp_reentrant", tmp_path, *METHODS[part::2])


def case_ddp_reentrant(rank, tmp, *_):
    """Reentrant checkpointing of frozen inputs says what is wrong, under DDP too."""
    model = prepared("lora", ckpt=True)
    wrapped = DDP(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss_of(wrapped, [rank]).backward()
        except RuntimeError as e:
            assert "layers.0" in str(e) and "checkpoint" in str(e), e
        else:
            raise AssertionError("adapters under reentrant checkpointing of frozen inputs learned nothing, and nobody said so")


# ---------------------------------------------------------------- row 12: the same bytes


def case_same_bytes(rank, tmp):
    model = stir(peftlab.wrap(Net(), "lora", r=2, exclude=["pooler", "head"]))
    peftlab.wrap(model, "vera", r=4, targets="up", name="shared")
    peftlab.wrap(model, "full", targets="head.*", name="head")
    if rank == 0:
        # this process writes alone here: the bare file of a model in one process
        from peftlab.formats.file import write
        from peftlab.formats.header import describe_adapters as describe

        header, tensors, _ = describe(model, ["default", "shared", "head"], [])
        write(tmp / "bare.safetensors", tensors, header)
    dist.barrier()
    want = (tmp / "bare.safetensors").read_bytes()
    wrappings = {
        "ddp": lambda: DDP(model), "compiled ddp": lambda: torch.compile(DDP(model)), "ddp of compiled": lambda: DDP(torch.compile(model)),
    }  # fmt: skip
    for kind, build in wrappings.items():
        path = tmp / f"{kind}.safetensors"
        peftlab.save(build(), path)
        dist.barrier()
        assert path.read_bytes() == want, kind
        fresh = DDP(stir(peftlab.wrap(Net(), "bitfit", name="other"))) if kind == "ddp" else torch.compile(Net())
        report = peftlab.load(fresh, tmp / "bare.safetensors")
        assert report.tensors == len(read(tmp / "bare.safetensors")[1])
        x = batch(0)[0]
        if kind != "ddp":
            assert torch.equal(fresh._orig_mod(x), model(x))


def test_promise_12_ddp_and_compiled_models_save_the_bytes_of_the_bare_one(tmp_path):
    """Soup#351: 4x and 8x H100, a dead adapter."""
    two("same_bytes", tmp_path)


# ---------------------------------------------------------------- FSDP2


def fully_sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gradients(model):
    grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in grads.items()}


FSDP_METHODS = [m for m in METHODS if resolve(m)[0].defined()]


def case_fsdp2(rank, tmp, *methods):
    for method in methods:
        model = Net().double()
        peftlab.wrap(model, method, exclude=["pooler", "head"], **small(method))
        peftlab.wrap(model, "full", targets="head.*", name="head")
        stir(model)
        alone = copy.deepcopy(model)
        path = tmp / f"{method}.safetensors"
        if rank == 0:
            from peftlab.formats.file import write
            from peftlab.formats.header import describe_adapters as describe

            header, tensors, _ = describe(alone, ["default", "head"], [])
            write(tmp / f"{method}-bare.safetensors", tensors, header)
        fully_sharded(model)
        peftlab.save(model, path)  # a collective call; one rank writes
        dist.barrier()
        assert path.read_bytes() == (tmp / f"{method}-bare.safetensors").read_bytes(), method
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (model, alone)]
        for _ in range(2):
            for opt, loss in zip(optimizers, (lambda: loss_of(model, [rank]), lambda: loss_of(alone, [0, 1])), strict=True):
                opt.zero_grad()
                loss().backward()
            sharded, plain = gradients(model), gradients(alone)
            assert sharded.keys() == plain.keys() and len(plain) >= 3, (method, plain.keys() ^ sharded.keys())
            for k, g in plain.items():
                assert (sharded[k] - g).abs().max() <= 1e-10 * g.abs().max().clamp_min(1e-3), (method, k)
            for opt in optimizers:
                opt.step()
        peftlab.save(model, path)
        dist.barrier()
        fresh = Net().double()
        peftlab.load(fresh, path)
        x = batch(0)[0]
        assert (fresh(x) - alone(x)).abs().max() < 1e-9, method
        assert (model(x) - alone(x)).abs().max() < 1e-9, method


@HALVES
@needs_cpu_fsdp2
def test_promise_22_fsdp2_trains_like_one_process_and_saves_the_same_bytes(part, tmp_path):
    two("fsdp2", tmp_path, *FSDP_METHODS[part::2])


STARTS = {"eva": {}, "corda": {}, "lora": dict(init="corda_kpm"), "lora_ga": {}, "fish": dict(n=5)}


def case_calibrate(rank, tmp):
    """Starts from data: each process sees its share of the batches, one more than the other; all get what one process makes of all."""
    shares = [[batch(i) for i in (0, 1, 2)], [batch(i) for i in (3, 4)]]

    def starts(name, options, data):
        where = dict(targets="layers.*.weight") if name == "fish" else dict(targets=["qkv", "up"], r=2)
        model = peftlab.wrap(Net().double(), name, data=data, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), **where, **options)
        return {k: t for k, t in model.state_dict().items() if "peftlab" in k}

    group, alone = dist.is_initialized, lambda: False
    for name, options in STARTS.items():
        mine = starts(name, options, shares[rank])
        dist.is_initialized = alone
        try:
            one = starts(name, options, shares[0] + shares[1])
        finally:
            dist.is_initialized = group
        assert mine.keys() == one.keys()
        assert sum(t.any().item() for t in mine.values()) > 0
        for k, t in mine.items():
            torch.testing.assert_close(t, one[k], rtol=1e-8, atol=1e-10, msg=f"{name} {k}")
            assert everywhere_equal(t), (name, k)


def test_starts_from_data_are_the_same_on_two_processes(tmp_path):
    two("calibrate", tmp_path)


def case_slices(rank, tmp):
    """accelerate#4206: every rank's slice is in the file, not only rank 0's."""
    model = fully_sharded(peftlab.wrap(Net(), "lora", r=4, exclude=["pooler", "head"]))
    rows = {}
    with torch.no_grad():
        for k, p in model.named_parameters():
            if "peftlab" in k:
                p.to_local().fill_(float(rank + 1))
                rows[k] = p.to_local().shape[0]
    peftlab.save(model, tmp / "s.safetensors")
    dist.barrier()
    _, tensors = read(tmp / "s.safetensors")
    assert tensors.keys() == rows.keys() and len(rows) == 12
    for k, t in tensors.items():
        mine = t[: rows[k]] if rank == 0 else t[t.shape[0] - rows[k] :]
        assert mine.numel() and (mine == rank + 1).all(), k
        assert set(t.unique().tolist()) == {1.0, 2.0}, k
    fresh = Net()
    peftlab.load(fresh, tmp / "s.safetensors")
    assert all(torch.equal(p, tensors[k]) for k, p in fresh.named_parameters() if "peftlab" in k)


def case_fsdp1(rank, tmp):
    """FSDP1 keeps flat shards: what it can be asked for whole is saved, and a shard is refused."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = stir(peftlab.wrap(Net(), "lora", r=4, exclude=["pooler", "head"]))
    x = batch(0)[0]
    want = model(x)
    values = {k: p.detach().clone() for k, p in model.named_parameters() if "peftlab" in k}
    wrapped = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert torch.allclose(wrapped(x), want, atol=1e-6)
    path = tmp / "f.safetensors"
    try:
        peftlab.save(wrapped, path)
    except ValueError as e:
        assert "shard" in str(e) and "peftlab.default" in str(e), e
    else:
        dist.barrier()
        assert all(torch.equal(t, values[k]) for k, t in read(path)[1].items())
    dist.barrier()
    with FSDP.summon_full_params(wrapped):
        peftlab.save(wrapped, path)
    dist.barrier()
    tensors = read(path)[1]
    assert tensors.keys() == values.keys() and all(torch.equal(t, values[k]) for k, t in tensors.items())


@needs_cpu_fsdp2
def test_promise_22_every_ranks_slice_is_in_the_file_and_fsdp1_is_whole_or_refused(tmp_path):
    two("slices+fsdp1", tmp_path)


@pytest.mark.parametrize("damage", ["empty", "partial", "flat"])
def test_promise_22_an_empty_or_partial_tensor_raises(damage, tmp_path):
    """peft#2450, DeepSpeed#7669: ZeRO-3 writes torch.Size([0])."""
    model = stir(peftlab.wrap(Net(), "lora", r=2, exclude=["pooler", "head"]))
    peftlab.save(model, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    p = model.layers[1].up.peftlab.default.B
    p.data = {"empty": torch.empty(0), "partial": p.data[:8], "flat": p.data.flatten()}[damage]
    with pytest.raises(ValueError, match=r"layers\.1\.up\.peftlab\.default\.B.*shard"):
        peftlab.save(model, tmp_path / "good.safetensors")
    assert (tmp_path / "good.safetensors").read_bytes() == good  # the earlier file is as it was


@pytest.mark.parametrize("place", ["buffer", "included"])
def test_promise_22_an_emptied_base_tensor_raises_too(place, tmp_path):
    model = Net()
    model.register_buffer("stats", torch.zeros(4))
    peftlab.wrap(model, "lora", r=2, exclude=["pooler", "head"])
    if place == "buffer":
        model.stats += 1
        model.stats.data = torch.empty(0)
    else:
        model.head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="stats" if place == "buffer" else r"head\.weight"):
        peftlab.save(model, tmp_path / "x.safetensors", include=None if place == "buffer" else "head.weight")


if __name__ == "__main__":
    main(*sys.argv[1:])
