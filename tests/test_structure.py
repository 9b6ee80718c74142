"""What each method says of its change (`Structure:`, `Trains:`), as properties over random shapes, and counts that papers print."""

from __future__ import annotations

import copy
import inspect
import math
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import canonical, own
from torch import nn

import peftlab
from peftlab import registry

few = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**20)
sides = st.integers(2, 24)
ranks = st.integers(1, 8)
wide = st.sampled_from([torch.float32, torch.float64])
every = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@st.composite
def layers(draw, kinds=("linear", "conv", "conv_transpose", "embedding")):
    """A layer of random sizes, and what it can be called with."""
    kind = draw(st.sampled_from(kinds))
    bias = draw(st.booleans())
    if kind == "linear":
        n_in, n_out = draw(sides), draw(sides)
        return nn.Linear(n_in, n_out, bias=bias), torch.randn(3, n_in)
    if kind == "embedding":
        n, dim = draw(sides), draw(sides)
        return nn.Embedding(n, dim), torch.randint(n, (2, 4))
    groups = draw(st.sampled_from([1, 2]))
    a, b, kernel = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4)), draw(st.sampled_from([(1, 1), (2, 3)]))
    make = nn.Conv2d if kind == "conv" else nn.ConvTranspose2d
    return make(a, b, kernel, groups=groups, bias=bias), torch.randn(2, a, 4, 5)


def fill_normal(module):
    with torch.no_grad():
        for t in own(module).values():
            if t.requires_grad:
                t.copy_(torch.randn_like(t))


def before_and_after(layer, method, seed=0, dtype=torch.float64, **hyper):
    """Canonical frozen weight and effective weight with every trained tensor random, and those tensors."""
    torch.manual_seed(seed)
    model = Holder(copy.deepcopy(layer).to(dtype))
    W = canonical(model.layer).detach().clone()
    peftlab.wrap(model, method, targets="layer", **hyper)
    fill_normal(model.layer)
    peftlab.merge(model)
    return W, canonical(model.layer).detach(), own(model.layer)


def rank(D, dtype):
    S = torch.linalg.svdvals(D.double())
    return int((S > S[0] * (1e-9 if dtype == torch.float64 else 1e-4)).sum()) if len(S) and S[0] > 0 else 0


# ---- low rank


@pytest.mark.parametrize(("name", "times"), [("lora", 1), ("rslora", 1), ("pissa", 2), ("olora", 2), ("adalora", 1), ("vera", 1)])
@few
@given(layer=layers(), r=ranks, seed=seeds)
def test_rank_bound(name, times, layer, r, seed):
    r = min(r, *canonical(layer[0]).shape)
    hyper = dict(init_r=r, r=r) if name == "adalora" else dict(r=r)
    W, W2, _ = before_and_after(layer[0], name, seed, **hyper)
    assert 0 < rank(W2 - W, W.dtype) <= times * r


@few
@given(n_out=sides, n_in=sides, seed=seeds, r=ranks)
def test_full_rank_is_reached(n_out, n_in, seed, r):
    """The bound is met, not merely kept: random factors of rank r change the weight by rank r."""
    r = min(r, n_out, n_in)
    W, W2, _ = before_and_after(nn.Linear(n_in, n_out), "lora", seed, r=r)
    assert rank(W2 - W, W.dtype) == r


@few
@given(layer=layers(("linear", "conv", "conv_transpose")), r=ranks, seed=seeds, data=st.data())
def test_qalora_groups(layer, r, seed, data):
    """The change is one number along each group of inputs, and its rank is bounded."""
    n_out, n_in = canonical(layer[0]).shape
    g = data.draw(st.sampled_from([k for k in range(1, n_in + 1) if n_in % k == 0]))
    r = min(r, n_out, n_in // g)
    W, W2, _ = before_and_after(layer[0], "qalora", seed, r=r, group_size=g)
    change = (W2 - W).unflatten(1, (-1, g))
    torch.testing.assert_close(change, change[..., :1].expand_as(change), rtol=0, atol=1e-9 * change.abs().max().item())
    assert 0 < rank(W2 - W, W.dtype) <= r


@few
@given(layer=layers(), r=ranks, seed=seeds, dtype=wide)
def test_dora_rows_and_rank(layer, r, seed, dtype):
    r = min(r, *canonical(layer[0]).shape)
    W, W2, t = before_and_after(layer[0], "dora", seed, dtype, r=r)
    m = t["m"].detach()
    tight = 1e-9 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(W2.norm(dim=1), m.abs(), rtol=tight, atol=tight)
    # Rows rescaled to the length of V = W + s B A give V back, whose distance from W has rank r.
    V = W2 * ((W.double() + 16 / r * (t["B"] @ t["A"]).double()).norm(dim=1) / m.double())[:, None]
    if dtype == torch.float64 and m.abs().min() > 1e-6:
        assert rank(V - W, dtype) <= r


@few
@given(layer=layers(), r=ranks, seed=seeds, both=st.booleans())
def test_lokr_rearrangement_has_rank_one(layer, r, seed, both):
    """Van Loan: the blocks of a Kronecker product, written as rows, are multiples of one another."""
    W, W2, t = before_and_after(layer[0], "lokr", seed, r=r, decompose_both=both)
    shape = {i: (t[f"w{i}"].shape if f"w{i}" in t else (len(t[f"w{i}_a"]), t[f"w{i}_b"].shape[1])) for i in (1, 2)}
    (a, p), (k, q) = shape[1], shape[2]
    assert (a * k, p * q) == tuple(W.shape)
    D = W2 - W
    assert rank(D.reshape(a, k, p, q).permute(0, 2, 1, 3).reshape(a * p, k * q), W.dtype) == 1
    limit = {i: min(*shape[i], r) if f"w{i}_a" in t else min(shape[i]) for i in (1, 2)}
    assert rank(D, W.dtype) <= limit[1] * limit[2]


# ---- orthogonal, scaling


@few
@given(blocks=st.integers(1, 4), b=st.integers(2, 6), n_out=sides, seed=seeds, dtype=wide)
def test_oft_is_a_block_diagonal_rotation(blocks, b, n_out, seed, dtype):
    """On the identity the effective weight is R' itself."""
    layer = nn.Linear(blocks * b, blocks * b, bias=False)
    nn.init.eye_(layer.weight)
    _, Rt, _ = before_and_after(layer, "oft", seed, dtype, block_size=b)
    eye, tight = torch.eye(blocks * b, dtype=dtype), 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(Rt @ Rt.T, eye, rtol=0, atol=tight)
    assert torch.linalg.det(Rt.double()).item() == pytest.approx(1, abs=100 * tight)
    inside = torch.block_diag(*[torch.ones(b, b)] * blocks).bool()
    assert (Rt[~inside] == 0).all()
    assert (Rt - eye).abs().max() > 1e-3
    W, W2, _ = before_and_after(nn.Linear(blocks * b, n_out), "oft", seed, dtype, block_size=b)
    torch.testing.assert_close(W2 @ W2.T, W @ W.T, rtol=10 * tight, atol=10 * tight)
    torch.testing.assert_close(W2.norm(dim=1), W.norm(dim=1), rtol=10 * tight, atol=10 * tight)


@few
@given(layer=layers(("linear", "conv", "conv_transpose")), seed=seeds, blocks=st.sampled_from([1, 2, 3]))
def test_oft_keeps_the_angles_between_kernels(layer, seed, blocks):
    n_in = canonical(layer[0]).shape[1]
    assume(n_in % blocks == 0 and n_in > blocks)
    W, W2, _ = before_and_after(layer[0], "oft", seed, blocks=blocks)
    torch.testing.assert_close(W2 @ W2.T, W @ W.T, rtol=1e-9, atol=1e-9)


@few
@given(layer=layers(), seed=seeds, side=st.sampled_from(["out", "in"]))
def test_ia3_ratio_is_constant(layer, seed, side):
    W, W2, t = before_and_after(layer[0], "ia3", seed, side=side)
    ratio = W2 / W
    ratio = ratio if side == "out" else ratio.T
    torch.testing.assert_close(ratio, t["l"].detach()[:, None].expand_as(ratio), rtol=1e-9, atol=1e-9)


# ---- support


@few
@given(layer=layers(), n=st.integers(1, 20), seed=seeds, select=st.sampled_from(["random", "magnitude"]), dtype=every)
def test_sparse_support(layer, n, seed, select, dtype):
    """Exactly n entries of each tensor move, those that `index` names; the rest keeps its bits in every dtype."""
    torch.manual_seed(seed)
    model = Holder(copy.deepcopy(layer[0]).to(dtype))
    frozen = {k: p.detach().clone() for k, p in model.layer.named_parameters()}
    assume(all(n <= p.numel() for p in frozen.values()))
    peftlab.wrap(model, "sparse", targets="layer", n=n, select=select)
    t = own(model.layer)
    with torch.no_grad():
        for k, v in t.items():
            if v.requires_grad:
                v.fill_(8.0)
    peftlab.merge(model)
    for k, W in frozen.items():
        index = t[f"{k}.index"]
        assert index.unique().numel() == n
        moved = (getattr(model.layer, k).detach() != W).flatten()
        assert moved.nonzero().flatten().tolist() == sorted(index.tolist())
        if select == "magnitude":
            size = W.abs().flatten()
            assert size[index.long()].min() >= size[~moved].max() if n < size.numel() else True


def test_fish_places_are_the_largest_squared_gradients():
    """Sung et al. 2021, eq. 4, on batches of one: the n entries with the largest sum of squared gradients of single examples."""
    torch.manual_seed(0)
    model = Holder(nn.Linear(6, 5)).double()
    data = list(torch.randn(7, 1, 6, dtype=torch.float64))

    def loss(model, x):
        return model(x).pow(3).sum()

    squares = {k: torch.zeros_like(p) for k, p in model.layer.named_parameters()}
    for x in data:
        for k, g in zip(squares, torch.autograd.grad(loss(model, x), list(model.layer.parameters()))):
            squares[k] += g**2
    peftlab.wrap(model, "fish", targets="layer", n=4, data=data, loss=loss)
    for k, score in squares.items():
        assert set(own(model.layer)[f"{k}.index"].tolist()) == set(score.flatten().topk(4).indices.tolist())


@few
@given(density=st.floats(0.001, 1.0), n_in=sides, n_out=sides)
def test_sparse_density(density, n_in, n_out):
    model = Holder(nn.Linear(n_in, n_out, bias=False))
    peftlab.wrap(model, "sparse", targets="layer", density=density)
    count = own(model.layer)["weight.v"].numel()
    assert 1 <= count <= n_in * n_out
    assert abs(count - density * n_in * n_out) <= 1


@few
@given(layer=layers(), n=st.integers(1, 12), seed=seeds)
def test_fourierft_spectrum(layer, n, seed):
    """The real part keeps each coefficient and its mirror image, half each, and nothing else."""
    h, w = canonical(layer[0]).shape
    n = min(n, h * w)
    W, W2, t = before_and_after(layer[0], "fourierft", seed, n=n)
    spectrum = torch.fft.fft2(W2 - W)
    places = [divmod(i, w) for i in t["places"].tolist()]
    assert len(set(places)) == n
    allowed = torch.zeros(h, w, dtype=torch.bool)
    for u, v in places:
        allowed[u, v] = allowed[-u % h, -v % w] = True
    assert allowed.sum() <= 2 * n
    scale = spectrum.abs().max().item()
    assert (spectrum[~allowed].abs() <= 1e-9 * scale).all()
    want = torch.zeros(h, w, dtype=torch.complex128)
    for (u, v), c in zip(places, t["c"].tolist()):
        want[u, v] += 150 * c / 2
        want[-u % h, -v % w] += 150 * c / 2
    torch.testing.assert_close(spectrum, want, rtol=1e-9, atol=1e-9 * scale)


@few
@given(a=sides, b=sides, n=st.integers(1, 4), seed=seeds)
def test_fourierft_places(a, b, n, seed):
    """Places depend on the shape and the seed alone: the same in two layers, other ones with another seed."""
    n = min(n, a * b)
    model = nn.Module()
    model.first, model.second = nn.Linear(a, b), nn.Linear(a, b)
    torch.manual_seed(seed)
    peftlab.wrap(model, "fourierft", targets=["first", "second"], n=n)
    assert torch.equal(own(model.first)["places"], own(model.second)["places"])
    big = Holder(nn.Linear(64, 64))
    peftlab.wrap(big, "fourierft", targets="layer", n=20)
    other = Holder(nn.Linear(64, 64))
    peftlab.wrap(other, "fourierft", targets="layer", n=20, seed=1)
    assert not torch.equal(own(big.layer)["places"], own(other.layer)["places"])


@few
@given(data=st.data(), n=st.integers(2, 20), dim=st.integers(1, 6), dtype=every)
def test_tokens_touch_their_rows_only(data, n, dim, dtype):
    ids = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    model = Holder(nn.Embedding(n, dim).to(dtype))
    table = model.layer.weight.detach().clone()
    peftlab.wrap(model, "tokens", targets="layer", ids=ids)
    every_id = torch.arange(n)
    assert torch.equal(model(every_id), table)
    with torch.no_grad():
        own(model.layer)["T"].fill_(7.0)
    rest = torch.tensor([i for i in range(n) if i not in ids], dtype=torch.long)
    for step in ("wrapped", "merged"):
        if step == "merged":
            peftlab.merge(model)
        y = model(every_id)
        assert y.dtype == dtype
        assert torch.equal(y[rest], table[rest])
        assert (y[ids] == 7).all()
    assert torch.equal(model.layer.weight[rest], table[rest])


@few
@given(layer=layers(("linear", "conv", "conv_transpose")), seed=seeds, dtype=every)
def test_bitfit_touches_no_matrix(layer, seed, dtype):
    assume(layer[0].bias is not None)
    torch.manual_seed(seed)
    model = Holder(copy.deepcopy(layer[0]).to(dtype))
    W, b = model.layer.weight.detach().clone(), model.layer.bias.detach().clone()
    peftlab.wrap(model, "bitfit", targets="layer")
    with torch.no_grad():
        own(model.layer)["bias.d"].fill_(8.0)
    peftlab.merge(model)
    assert torch.equal(model.layer.weight, W)
    torch.testing.assert_close(model.layer.bias.detach(), (b.double() + 8).to(dtype))


# ---- starts

STARTS = {
    "adalora": dict(init_r=2, r=1), "bitfit": {}, "dora": dict(r=2), "fourierft": dict(n=3), "full": {}, "ia3": {}, "l1": {}, "lokr": dict(r=1),
    "lora": dict(r=2), "oft": dict(blocks=1), "qalora": dict(r=1), "sparse": dict(n=2), "tokens": dict(ids=[1]), "vera": dict(r=2),
    "rslora": dict(r=2), "pissa": dict(r=2), "olora": dict(r=2),
    "houlsby": dict(dim=2), "pfeiffer": dict(dim=2), "parallel": dict(dim=2), "loreft": dict(r=1), "mola": dict(r=1),
}  # fmt: skip
NOT_BITS = {"dora": "m / |V| is 1 up to rounding"}


@pytest.mark.parametrize("name", STARTS)
@few
@given(layer=layers(), dtype=wide, seed=seeds)
def test_start_is_the_base(name, layer, dtype, seed):
    layer, x = layer
    x = x.to(dtype) if x.is_floating_point() else x
    torch.manual_seed(seed)
    model = Holder(copy.deepcopy(layer).to(dtype))
    want = model(x)
    try:
        peftlab.wrap(model, name, targets="layer", **STARTS[name])
    except ValueError as e:  # too small for the rank or the count, or a layer that the method refuses
        assume("layer" not in str(e))
        raise
    got = model(x)
    if name in NOT_BITS:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, want)


def test_every_method_has_a_start():
    """Those that sit at more than one layer, or start elsewhere, have tests of their own."""
    assert STARTS.keys() >= {n for n in registry.names() if registry.resolve(n)[0].defined()}


def test_lora_starts():
    """B = 0 and A random on a layer; on an embedding the other way round, so that tokens which never occur keep their vectors."""
    for init in ("kaiming", "gaussian"):
        model = nn.ModuleDict({"a": nn.Linear(300, 40), "e": nn.Embedding(50, 40)})
        peftlab.wrap(model, "lora", targets=["a", "e"], r=8, init=init)
        a, e = own(model["a"]), own(model["e"])
        assert (a["B"] == 0).all()
        assert (e["A"] == 0).all()
        std = 1 / 8 if init == "gaussian" else math.sqrt(1 / (3 * 300))
        assert a["A"].std().item() == pytest.approx(std, rel=0.1)
        assert e["B"].std().item() == pytest.approx(1, rel=0.15)


@few
@given(m=sides, n=sides, r=st.sampled_from([8, 32]), seed=seeds)
def test_vera_pair(m, n, r, seed):
    """One frozen pair, drawn from the seed alone, with unit variance; every site sees its leading rows and columns."""
    pairs = []
    for _ in range(2):
        torch.manual_seed(_ + seed)
        model = nn.Module()
        model.small, model.large = nn.Linear(n, m), nn.Linear(3 * n, 2 * m)
        peftlab.wrap(model, "vera", targets=["small", "large"], r=min(r, n, m), seed=5)
        pairs.append({k: b for k, b in model.named_buffers()})
        assert len(pairs[-1]) == 2
        assert not any(k.endswith((".A", ".B")) for k in model.state_dict())
        assert all(set(own(x)) == {"b", "d"} for x in (model.small, model.large))
    assert all(torch.equal(pairs[0][k], pairs[1][k]) for k in pairs[0])


def test_vera_site_does_not_depend_on_the_others():
    """The same change at a layer whether a larger one is adapted with it or not."""
    weights = []
    for targets in (["small"], ["small", "large"]):
        torch.manual_seed(0)
        model = nn.Module()
        model.small, model.large = nn.Linear(17, 13), nn.Linear(90, 70)
        peftlab.wrap(model, "vera", targets=targets, r=6)
        fill = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for t in own(model.small).values():
                t.copy_(torch.randn(t.shape, generator=fill))
        peftlab.merge(model)
        weights.append(model.small.weight.detach().clone())
    torch.testing.assert_close(*weights)


def test_vera_scale_at_a_site():
    """With b = d = 1, B A at a site has the variance of Kaiming's A and B: r (2 / n_in) (2 / r)."""
    torch.manual_seed(0)
    model = nn.Module()
    model.small, model.large = nn.Linear(60, 50), nn.Linear(240, 80)
    before = {k: m.weight.detach().clone() for k, m in model.named_children()}
    peftlab.wrap(model, "vera", targets=["small", "large"], r=40)
    for m in (model.small, model.large):
        for t in own(m).values():
            nn.init.ones_(t)
    peftlab.merge(model)
    for k, n_in in (("small", 60), ("large", 240)):
        delta = getattr(model, k).weight.detach() - before[k]
        assert delta.std().item() == pytest.approx(math.sqrt(4 / n_in), rel=0.15)


# ---- counts

COUNTED = STARTS | {
    "lora": dict(r=3), "lokr": dict(r=2, decompose_both=True), "ia3": dict(side="in"), "sparse": dict(density=0.03), "oft": {}, "dora": dict(r=3),
    "vera": dict(r=4), "tokens": dict(ids=[0, 1]),
}  # fmt: skip


def stated(name, site, **hyper):
    """`Trains:` of the docstring, evaluated over one site, with the helpers of the method's own file."""
    cls, fixed, _ = registry.resolve(name)
    defaults = {k: p.default for k, p in registry.keywords(cls).items()}
    helpers = {k: f for k, f in vars(sys.modules[cls.__module__]).items() if inspect.isfunction(f)}
    scope = {"min": min, "max": max, "sites": 1, **helpers, **site, **defaults, **fixed, **hyper}
    return eval(registry.entries()[name].trains, {"__builtins__": {"len": len}}, scope)


@pytest.mark.parametrize("name", sorted(COUNTED))
@settings(deadline=None, max_examples=40)
@given(layer=layers())
def test_count_is_what_the_docstring_says(name, layer):
    layer, hyper = layer[0], COUNTED[name]
    model = Holder(copy.deepcopy(layer))
    try:
        peftlab.wrap(model, name, targets="layer", **hyper)
    except ValueError as e:
        assume("layer" not in str(e))
        raise
    W = canonical(layer)
    has_bias = getattr(layer, "bias", None) is not None
    trained = {k: p for k, p in own(model.layer).items() if p.requires_grad}
    tensors = {k: p for k, p in layer.named_parameters() if k == "weight" or k == "bias"}
    if registry.resolve(name)[0].on == "tensor":
        reached = {k.split(".")[0] for k in trained}
        want = sum(stated(name, dict(shape=tuple(tensors[k].shape), numel=tensors[k].numel(), has_bias=False), **hyper) for k in reached)
    else:
        site = dict(n_out=W.shape[0], n_in=W.shape[1], shape=tuple(layer.weight.shape), numel=layer.weight.numel(), has_bias=has_bias)
        want = stated(name, site, **hyper)
    assert sum(p.numel() for p in trained.values()) == want > 0
    assert peftlab.plan(Holder(copy.deepcopy(layer)), name, targets="layer", **hyper).trainable == want
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want


def on_meta(config_of):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.RobertaModel(transformers.RobertaConfig(**config_of))


BASE = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
LARGE = dict(BASE, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


@pytest.mark.parametrize(
    ("config", "name", "hyper", "count"),
    [
        pytest.param(BASE, "lora", dict(r=8), 294_912, id="roberta-base-lora"),  # Hu et al. 2021, table 2: 0.3 M
        pytest.param(LARGE, "lora", dict(r=8), 786_432, id="roberta-large-lora"),  # 0.8 M
        pytest.param(BASE, "vera", dict(r=1024), 43_008, id="roberta-base-vera"),  # Kopiczko et al. 2023, table 2: 0.043 M
        pytest.param(LARGE, "vera", dict(r=256), 61_440, id="roberta-large-vera"),  # 0.061 M
        pytest.param(BASE, "fourierft", dict(n=1000), 24_000, id="roberta-base-fourierft"),  # Gao et al. 2024, table 2: 0.024 M
        pytest.param(LARGE, "fourierft", dict(n=1000), 48_000, id="roberta-large-fourierft"),  # 0.048 M
    ],
)
def test_counts_of_papers_on_query_and_value(config, name, hyper, count):
    model = on_meta(config)
    plan = peftlab.plan(model, name, targets=["query", "value"], **hyper)
    assert plan.trainable == count
    assert len(plan.rows) == 2 * model.config.num_hidden_layers
    peftlab.wrap(model, name, targets=["query", "value"], **hyper)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_bitfit_count_of_bert_large():
    """Ben Zaken et al. 2021, table 1: 0.08 % of BERT-large."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(**LARGE | dict(vocab_size=28996, max_position_embeddings=512, type_vocab_size=2)))
    plan = peftlab.plan(model, "bitfit")
    assert plan.trainable == 24 * (4 * 1024 + 4096 + 1024 + 2 * 1024) + 1024 + 1024
    assert round(100 * plan.trainable / plan.total, 2) == 0.08


def test_ln_tuning_count_of_bert_base():
    """Zhao et al. 2023: every normalisation layer, here 25 of width 768, and nothing else."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    plan = peftlab.plan(model, "ln_tuning")
    assert plan.trainable == 25 * 2 * 768
    assert {r.layer for r in plan.rows} == {"LayerNorm"}


def test_count_of_gpt3():
    """Hu et al. 2021, table 4: 37.7 M for rank 8 on the query and value projections of 96 layers of width 12,288."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.ModuleDict({k: nn.Linear(12288, 12288, bias=False) for k in "qkvo"}) for _ in range(96)))
    plan = peftlab.plan(model, "lora", targets=["q", "v"], r=8)
    assert plan.trainable == 96 * 2 * 8 * 2 * 12288
    assert round(plan.trainable / 1e6, 1) == 37.7
    assert plan.total == 96 * 4 * 12288**2
    assert not hasattr(model[0]["q"], "peftlab")
    peftlab.wrap(model, "lora", targets=["q", "v"], r=8)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trainable
