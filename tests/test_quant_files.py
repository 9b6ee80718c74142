"""Packed models in other people's files: transformers' folders and torch.distributed.checkpoint, in one process and in two (rows 21, 22, 24)."""

# ruff: noqa: PT018 - some cases run outside pytest

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import safetensors
import test_distributed as pair
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from test_quant_distributed import adapted
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel as DDP

import peftlab
from peftlab.quant import format as keys
from peftlab.quant import load
from peftlab.quant.codes import dequantise, quantise
from peftlab.quant.quantize import packed_weights

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


# ---------------------------------------------------------------- how files are read


class Opened:
    """Counts what is opened, and what of it is open."""

    def __init__(self, monkeypatch):
        self.count = self.now = 0
        real = safetensors.safe_open

        class Counting:
            def __init__(own, *args):
                own.file = real(*args)
                self.count += 1

            def __enter__(own):
                self.now += 1
                return own.file.__enter__()

            def __exit__(own, *args):
                self.now -= 1
                return own.file.__exit__(*args)

        monkeypatch.setattr(safetensors, "safe_open", Counting)


def small(n: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(n)))


def in_two_files(state: dict, folder: Path) -> Path:
    """A folder with every other tensor of a state in each of two files."""
    folder.mkdir()
    for i in range(2):
        save_file({k: state[k].contiguous() for k in list(state)[i::2]}, folder / f"{i}.safetensors")
    return folder


@pytest.mark.parametrize("coded", [True, False])
def test_each_file_is_opened_once_however_many_tensors_it_holds(coded, tmp_path, monkeypatch):
    for n in (3, 12):
        net = small(n)
        state = (peftlab.quantize(net, targets="*") if coded else net).state_dict()
        folder = in_two_files(state, tmp_path / str(n))
        with monkeypatch.context() as m:
            opened = Opened(m)
            fresh = peftlab.load_quantized(small(n), folder, None if coded else "nf4", targets=None if coded else "*")
        assert (opened.count, opened.now) == (2, 0)
        assert len(packed_weights(fresh)) == n


def test_files_are_opened_anew_after_so_many_bytes(tmp_path, monkeypatch):
    """What was read of a map counts as memory until it is closed, so that a file larger than memory must not stay open."""
    net = small(8)
    folder = in_two_files(net.state_dict(), tmp_path / "a")
    monkeypatch.setattr(load, "TURN", 1000)
    opened = Opened(monkeypatch)
    fresh = peftlab.load_quantized(small(8), folder, None)
    assert opened.now == 0 and 2 < opened.count <= 2 * 3  # 2304 bytes
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("where", ["a tensor that does not fit", "progress", "an interrupt"])
def test_files_are_closed_and_the_model_is_as_it_was_after_a_failure(where, tmp_path, monkeypatch):
    def stop(done, total, name):
        if done == 3:
            raise KeyboardInterrupt if where == "an interrupt" else RuntimeError("enough")

    folder = in_two_files(small(4).state_dict() | ({"9.weight": torch.zeros(1)} if where == "a tensor that does not fit" else {}), tmp_path / "a")
    fresh = small(4)
    before = {k: t.clone() for k, t in fresh.state_dict().items()}
    opened = Opened(monkeypatch)
    with pytest.raises((RuntimeError, ValueError, KeyboardInterrupt)):
        peftlab.load_quantized(fresh, folder, targets="*", progress=stop)
    assert opened.count == 2 and opened.now == 0
    after = fresh.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(t, before[k]) for k, t in after.items())


@pytest.mark.parametrize("coded", [True, False])
def test_a_loaded_model_does_not_change_with_its_file(coded, tmp_path):
    net = small(2)
    state = (peftlab.quantize(net, targets="*") if coded else net).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    fresh = peftlab.load_quantized(small(2), tmp_path / "a.safetensors", None)
    size = (tmp_path / "a.safetensors").stat().st_size
    with open(tmp_path / "a.safetensors", "r+b") as f:  # in place, so that a map of it would show it
        f.write(b"\xff" * size)
    again = fresh.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(t, state[k]) for k, t in again.items())


def test_a_tensor_may_lie_under_any_of_its_names(tmp_path):
    def tied():
        net = nn.ModuleDict({"embed": nn.Embedding(12, 16), "head": nn.Linear(16, 12, bias=False)})
        net["head"].weight = net["embed"].weight
        return net

    def twice():
        layer = nn.Linear(16, 16, bias=False)
        return nn.ModuleDict({"a": layer, "b": layer})

    W = torch.randn(12, 16)
    save_file({"head.weight": W}, tmp_path / "tied")
    net = peftlab.load_quantized(tied(), tmp_path / "tied", None)
    assert torch.equal(net["embed"].weight, W) and net["head"].weight is net["embed"].weight
    for name in "ab":
        W = torch.randn(16, 16)
        save_file({f"{name}.weight": W}, tmp_path / name)
        assert torch.equal(peftlab.load_quantized(twice(), tmp_path / name, None)["a"].weight, W)
        net = peftlab.load_quantized(twice(), tmp_path / name, targets="*")
        assert len(packed_weights(net)) == 1
        assert torch.equal(peftlab.dequantize(net)["b"].weight, dequantise(quantise(W, "nf4")))


def test_codes_have_no_place_in_a_tied_parameter(tmp_path):
    save_file(peftlab.quantize(nn.ModuleDict({"head": nn.Linear(16, 12, bias=False)}), targets="head").state_dict(), tmp_path / "a")
    net = nn.ModuleDict({"embed": nn.Embedding(12, 16), "head": nn.Linear(16, 12, bias=False)})
    net["head"].weight = net["embed"].weight
    with pytest.raises(ValueError, match=r"'head\.weight' is quantised in the file and tied to another parameter: untie"):
        peftlab.load_quantized(net, tmp_path / "a", None)
    assert not packed_weights(net)


def test_what_is_no_file_is_named(tmp_path):
    for odd, said in ((3, "files=3"), (None, "files=None"), ([tmp_path, 3.5], r"files=3\.5"), (b"a", "files=97")):
        with pytest.raises(TypeError, match=f"^{said}: the path of a safetensors file"):
            peftlab.load_quantized(small(1), odd)
    good = tmp_path / "good.safetensors"
    save_file(small(1).state_dict(), good)
    whole = good.read_bytes()
    for content in (b"", b"hello, this is text", b"\xff" * 64, whole[:-1], whole[:20], whole + b"x"):
        (tmp_path / "bad.safetensors").write_bytes(content)
        for files in (tmp_path / "bad.safetensors", [good, str(tmp_path / "bad.safetensors")]):
            with pytest.raises(peftlab.LoadError, match=r"bad\.safetensors' is not a whole safetensors file: "):
                peftlab.load_quantized(small(1), files, targets="*")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        peftlab.load_quantized(small(1), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no safetensors file there"):
        peftlab.load_quantized(small(1), [])


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
    with pytest.raises(RuntimeError, match=r"layers\.0\.qkv\.weight: weight\.absmax missing"):
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
