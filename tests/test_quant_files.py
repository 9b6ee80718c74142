"""Packed models in other people's files: transformers' folders and torch.distributed.checkpoint, in one process and in two (rows 21, 22, 24)."""

# ruff: noqa: PT018 - some cases run outside pytest

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import test_distributed as pair
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_quant_distributed import adapted
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel as DDP

import peftlab
from peftlab.quant import format as keys
from peftlab.quant import packed_weights

KINDS = {"nf4": dict(kind="nf4"), "nf4, plain scales": dict(kind="nf4", double_quant=False), "fp4": dict(kind="fp4"), "int8": dict(kind="int8")}
IDS = torch.arange(8)[None]


def llama(tie: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    tokens = dict(bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32, **tokens)).eval()


MODELS = {"llama": lambda: llama(False), "llama, tied": lambda: llama(True), "gpt2": gpt2}


def language_model(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def pack(net: nn.Module, how: dict) -> nn.Module:
    return peftlab.quantize(net, targets=["*.h.*"] if type(net).__name__.startswith("GPT2") else None, **how)


def logits(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(IDS).logits


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_of_save_pretrained_comes_back(name, kind, shard, tmp_path):
    net = pack(language_model(name), KINDS[kind])
    y, state = logits(net), net.state_dict()
    net.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB")
    saved = {k: t for f in files for k, t in load_file(f).items()}
    tied = {"lm_head.weight"} if name != "llama" else set()
    assert saved.keys() == state.keys() - tied
    assert all(torch.equal(t, state[k]) and t.dtype == state[k].dtype for k, t in saved.items())
    fresh = language_model(name, seed=1)
    peftlab.load_quantized(fresh, tmp_path, None)
    assert torch.equal(logits(fresh), y) and packed_weights(fresh).keys() == packed_weights(net).keys()
    assert (fresh.lm_head.weight is fresh.get_input_embeddings().weight) == bool(tied)
    again = pack(language_model(name, seed=1), KINDS[kind])
    assert not torch.equal(logits(again), y)
    found = again.load_state_dict(saved, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) == tied
    assert torch.equal(logits(again), y)
    assert torch.equal(again.generate(IDS, max_new_tokens=4, do_sample=False), net.generate(IDS, max_new_tokens=4, do_sample=False))


def test_an_empty_model_is_filled_from_such_a_folder(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    net = pack(language_model("llama, tied"), KINDS["nf4"])
    net.save_pretrained(tmp_path)
    with accelerate.init_empty_weights(include_buffers=False):
        hollow = language_model("llama, tied")
    peftlab.load_quantized(hollow, tmp_path, None)
    hollow.tie_weights()
    assert torch.equal(logits(hollow.eval()), logits(net))
    with torch.device("meta"):
        hollow = language_model("llama, tied")
    with pytest.raises(ValueError, match="never saved: build the model with real buffers"):
        peftlab.load_quantized(hollow, tmp_path, None)
    assert all(p.is_meta for p in hollow.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_transformers_reads_it_with_bitsandbytes_where_the_config_says_so(kind, name, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    net = pack(language_model(name), KINDS[kind])
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32")
    net.config.quantization_config = transformers.BitsAndBytesConfig(**(four if kind == "nf4" else dict(load_in_8bit=True)))
    net.save_pretrained(tmp_path)
    there = type(net).from_pretrained(tmp_path, device_map="cpu").train()  # in eval mode, bitsandbytes multiplies in bfloat16 on some CPUs
    assert isinstance(there.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt)
    torch.testing.assert_close(logits(there), logits(net), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- torch.distributed.checkpoint


def net_of(kind: str, with_adapter: bool, scale: float) -> nn.Module:
    net = pair.Net(dim=16)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    net = peftlab.quantize(net, targets="layers.*", **KINDS[kind])
    if not with_adapter:
        return net
    net = peftlab.wrap(net, "lora", r=2, targets="layers.*")
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * scale)
    return net


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("helper", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_distributed_checkpoint_in_one_process(kind, helper, with_adapter, tmp_path):
    net, other = net_of(kind, with_adapter, 1.0), net_of(kind, with_adapter, -3.21)  # other values: other scales, and another mean of them
    x, _ = pair.batch(0)
    assert not torch.equal(other(x), net(x))
    get = get_model_state_dict if helper else nn.Module.state_dict
    put = set_model_state_dict if helper else nn.Module.load_state_dict
    assert get(net).keys() == net.state_dict().keys()
    dcp.save(get(net), checkpoint_id=tmp_path / "c")
    state = get(other)
    dcp.load(state, checkpoint_id=tmp_path / "c")
    found = put(other, state)
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(other(x), net(x))
    assert {k: t.tolist() for k, t in other.state_dict().items()} == {k: t.tolist() for k, t in net.state_dict().items()}


def test_the_facts_of_a_packed_weight_take_as_many_bytes_whatever_they_are():
    found = {}
    for scale in (1e-30, 1.0, 0.1, -2e7):
        for bias in (0.0, 1.0):
            layer = nn.Linear(8, 8)
            with torch.no_grad():
                layer.weight.mul_(scale).add_(bias)
            state = peftlab.quantize(layer, targets="*").state_dict()
            facts = bytes(state[f"weight.{keys.STATE}nf4"].tolist())
            assert json.loads(facts)["nested_blocksize"] == 256
            found[scale, bias] = len(facts)
    assert len(set(found.values())) == 1, found


def test_an_unfinished_load_of_a_checkpoint_is_noticed(tmp_path):
    """`dcp.load` fills tensors that the model shares; a state that lacks its scales is refused when it is put back."""
    net, other = net_of("nf4", False, 1.0), net_of("nf4", False, 2.0)
    dcp.save(net.state_dict(), checkpoint_id=tmp_path / "c")
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "c")
    del state["layers.0.qkv.weight.absmax"]
    with pytest.raises(RuntimeError, match=r"layers\.0\.qkv\.'weight': weight\.absmax missing"):
        other.load_state_dict(state)


# ---------------------------------------------------------------- ... in two


def case_ddp(rank: int, tmp: Path) -> None:
    for kind in ("nf4", "int8"):
        net = DDP(adapted(kind))
        x, _ = pair.batch(rank)
        dcp.save(get_model_state_dict(net), checkpoint_id=tmp / f"ddp {kind}")
        other = DDP(adapted(kind, scale=-3.0))
        state = get_model_state_dict(other.module)
        dcp.load(state, checkpoint_id=tmp / f"ddp {kind}")
        set_model_state_dict(other.module, state)  # torch puts DDP's prefix before the parameters' keys alone, not before the scales'
        assert torch.equal(other(x), net(x))
        dcp.save(net.state_dict(), checkpoint_id=tmp / f"ddp {kind} by itself")
        other = DDP(adapted(kind, scale=-3.0))
        state = other.state_dict()
        dcp.load(state, checkpoint_id=tmp / f"ddp {kind} by itself")
        other.load_state_dict(state)
        assert torch.equal(other(x), net(x))
        if rank == 0:  # and in one process, without DDP
            alone = adapted(kind, scale=2.0)
            state = alone.state_dict()
            dcp.load(state, checkpoint_id=tmp / f"ddp {kind}", no_dist=True)
            alone.load_state_dict(state)
            assert torch.equal(alone(x), net.module(x))
        dist.barrier()


def sharded(net: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def case_fsdp2(rank: int, tmp: Path) -> None:
    for kind in ("nf4", "int8"):
        whole = adapted(kind)
        x, _ = pair.batch(rank)
        y = whole(x).detach()
        net, other = sharded(adapted(kind)), sharded(adapted(kind, scale=-3.0))
        for options in (None, StateDictOptions(full_state_dict=True)):
            place = tmp / f"fsdp2 {kind} {options is None}"
            dcp.save(get_model_state_dict(net, options=options), checkpoint_id=place)
            state = get_model_state_dict(other, options=options)
            dcp.load(state, checkpoint_id=place)
            set_model_state_dict(other, state, options=options)
            torch.testing.assert_close(other(x).detach(), y)
            other = sharded(adapted(kind, scale=-3.0))
        if rank == 0:
            alone = adapted(kind, scale=2.0)
            state = alone.state_dict()
            dcp.load(state, checkpoint_id=tmp / f"fsdp2 {kind} True", no_dist=True)
            alone.load_state_dict(state)
            assert torch.equal(alone(x).detach(), y)
        dist.barrier()


@pair.pytestmark
def test_distributed_checkpoint_of_ddp(tmp_path):
    pair.two("ddp", tmp_path, file=__file__)


@pair.pytestmark
@pair.needs_cpu_fsdp2
def test_distributed_checkpoint_of_fsdp2(tmp_path):
    pair.two("fsdp2", tmp_path, file=__file__)


if __name__ == "__main__":
    pair.main(*sys.argv[1:], cases=globals())
