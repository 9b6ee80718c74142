"""A quantised base in two processes over gloo: DDP sends codes and scales, FSDP2 shards them, and both train as one process does (rows 21, 24)."""

# ruff: noqa: PT018 - the cases run outside pytest

from __future__ import annotations

import copy
import sys
from pathlib import Path

import test_distributed as pair
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import peftlab
from peftlab.quant.codes import dequantise
from peftlab.quant.quantize import packed_weights

pytestmark = pair.pytestmark
KINDS = ("nf4", "int8")


def model(kind, scale=1.0):
    net = pair.Net(dim=16)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return peftlab.quantize(net, kind, targets="layers.*")


def adapted(kind, method="lora", scale=1.0):
    return pair.stir(peftlab.wrap(model(kind, scale), method, targets="layers.*", **pair.small(method)))


def gradients(net, ranks):
    for p in net.parameters():
        p.grad = None
    pair.loss_of(net, ranks).backward()
    return {k: p.grad for k, p in net.named_parameters() if p.requires_grad}


def case_ddp(rank: int, tmp: Path) -> None:
    for kind in KINDS:
        wanted = {k: dequantise(p) for k, p in packed_weights(model(kind)).items()}
        net = adapted(kind, scale=1.0 if rank == 0 else -3.0)  # the other process starts elsewhere
        ddp = DDP(net)
        for k, p in packed_weights(net).items():
            assert torch.equal(dequantise(p), wanted[k]), k
        for p in ddp.parameters():
            p.grad = None
        pair.loss_of(ddp, [rank]).backward()
        alone = gradients(adapted(kind), [0, 1])
        for k, p in net.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, alone[k], rtol=1e-5, atol=1e-7)


def case_fsdp2(rank: int, tmp: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for kind in KINDS:
        for method in ("lora", "dora"):
            net = adapted(kind, method)
            alone = gradients(copy.deepcopy(net), [0, 1])
            x, _ = pair.batch(rank)
            y = copy.deepcopy(net)(x).detach()
            for layer in net.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(net, mesh=mesh)
            assert all(type(p).__name__ == "DTensor" for p in net.parameters())
            torch.testing.assert_close(net(x), y)
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
            pair.loss_of(net, [rank]).backward()
            for k, p in net.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(p.grad.full_tensor(), alone[k], rtol=1e-5, atol=1e-7)
                else:
                    assert p.grad is None
            optimizer.step()
            assert not torch.equal(net(x), y)
            peftlab.save(net, tmp / "a.safetensors")
            dist.barrier()
            fresh = model(kind)
            peftlab.load(fresh, tmp / "a.safetensors")
            torch.testing.assert_close(fresh(x), net(x).detach())
            dist.barrier()


def test_ddp(tmp_path):
    two("ddp", tmp_path)


@pair.needs_cpu_fsdp2
def test_fsdp2(tmp_path):
    two("fsdp2", tmp_path)


def two(case: str, tmp_path: Path) -> None:
    pair.two(case, tmp_path, file=__file__)


if __name__ == "__main__":
    pair.main(*sys.argv[1:], cases=globals())
