"""What `layers.py` says of each layer type, held against torch's own functions over random configurations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import Experts, OwnForward, OwnInit, Packed, Raw, ScaledEmbedding, conv1d_hf, fits, keywords, methods
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftlab
from peftlab.model import layers

TIGHT = dict(rtol=1e-11, atol=1e-11)
MATRIX_METHODS = [m for m in methods() if fits(m, "experts_eio") and fits(m, "fused")]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(m: nn.Module, x: Tensor) -> tuple[Tensor, object]:
    """The input after the layer's padding mode, and what is left for the convolution to pad."""
    nd = len(m.kernel_size)
    if m.padding_mode == "zeros":
        return x, m.padding
    if m.padding == "same":
        sides = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        both = [side for s in reversed(sides) for side in (s // 2, s - s // 2)]
    else:
        both = [side for p in reversed(m.padding) for side in (p, p)]
    return F.pad(x, both, mode=m.padding_mode), (0,) * nd


def torch_conv(m: nn.Module, kernels: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
    """The convolution by torch's functions, with any number of kernels."""
    nd = len(m.kernel_size)
    if m.transposed:
        f = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[nd - 1]
        return f(x, kernels, b, m.stride, m.padding, m.output_padding, m.groups, m.dilation)
    x, padding = padded(m, x)
    return (F.conv1d, F.conv2d, F.conv3d)[nd - 1](x, kernels, b, m.stride, padding, m.dilation, m.groups)


@st.composite
def convolutions(draw):
    """(layer, input) over dimensions, groups, kernels, strides, dilations, paddings, padding modes, transposed or not."""
    nd = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    n_in, n_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=nd, max_size=nd)))

    kernel, stride, dilation = each(1, 3), each(1, 2), each(1, 2)
    common = dict(kernel_size=kernel, dilation=dilation, groups=groups, bias=draw(st.booleans()), dtype=torch.float64)
    transposed = draw(st.booleans())
    if transposed:
        padding = tuple(draw(st.integers(0, min(1, d * (k - 1)))) for d, k in zip(dilation, kernel, strict=True))
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[nd - 1]
        m = kind(n_in, n_out, stride=stride, padding=padding, output_padding=extra, **common)
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        same = all(s == 1 for s in stride) and draw(st.booleans())
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[nd - 1]
        m = kind(n_in, n_out, stride=stride, padding="same" if same else each(0, 2), padding_mode=mode, **common)
    size = tuple(d * (k - 1) + 3 for d, k in zip(dilation, kernel, strict=True))
    batch = draw(st.sampled_from([(), (1,), (2,)]))  # torch takes convolutions without a batch dimension too
    with torch.no_grad():
        for i, p in enumerate(m.parameters()):
            p.copy_(rand(*p.shape, seed=i))
    return m, rand(*batch, n_in, *size, seed=9)


def rule_and_weight(m: nn.Module):
    rule = layers.layer_rule(m)
    return rule, rule.matrix(m, m.weight.detach())


@settings(max_examples=150)
@given(convolutions())
def test_convolution_verbs(pair):
    """matrix, raw, affine, apply, mix, plus and along: on every configuration, the same as torch with dense kernels."""
    m, x = pair
    rule, W = rule_and_weight(m)
    n_out, n_in = W.shape
    assert (n_out, n_in) == layers.matrix_shape(m, rule, m.weight)
    assert torch.equal(rule.raw(m, W, m.weight), m.weight)  # there and back
    y = m(x)
    b = m.bias
    torch.testing.assert_close(rule.affine(m, W, b, x), y, **TIGHT)
    # A low-rank change: two thin operations are one operation with the dense product.
    rows = 2
    M, B = rand(rows, n_in, seed=3), rand(n_out, rows, seed=4)
    dense = torch_conv(m, rule.raw(m, B @ M, m.weight), None, x)
    h = rule.apply(m, M, x)
    assert h.shape[-1 - len(m.kernel_size)] == m.groups * rows
    assert h.shape[-len(m.kernel_size) :] == y.shape[-len(m.kernel_size) :]
    torch.testing.assert_close(rule.mix(m, B, h), dense, **TIGHT)
    fused = rule.plus(m, W, b, x, B, h)
    if fused is not None:
        torch.testing.assert_close(fused, y + dense, **TIGHT)
    # Scaling the features of h is scaling the columns of B.
    v = rand(rows, seed=5)
    torch.testing.assert_close(rule.mix(m, B, h * rule.along(m, v, h)), torch_conv(m, rule.raw(m, B @ torch.diag(v) @ M, m.weight), None, x), **TIGHT)
    u = rand(n_out, seed=6)
    scaled = y * rule.along(m, u, y)
    for o in range(n_out):
        axis = y.ndim - 1 - len(m.kernel_size)
        torch.testing.assert_close(scaled.select(axis, o), y.select(axis, o) * u[o], **TIGHT)


@settings(max_examples=60)
@given(convolutions())
def test_canonical_rows_make_their_outputs(pair):
    """Row o of the canonical matrix is what output feature o is made with, and nothing else: clear it, and only feature o falls silent."""
    m, x = pair
    rule, W = rule_and_weight(m)
    axis = x.ndim - 1 - len(m.kernel_size)
    full = rule.affine(m, W, None, x)
    for o in range(W.shape[0]):
        cleared = W.clone()
        cleared[o] = 0
        y = torch_conv(m, rule.raw(m, cleared, m.weight), None, x)
        assert (y.select(axis, o) == 0).all()
        for other in range(W.shape[0]):
            if other != o:
                torch.testing.assert_close(y.select(axis, other), full.select(axis, other), **TIGHT)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (5, 6), (2, 3, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [lambda bias: nn.Linear(6, 4, bias=bias), lambda bias: conv1d_hf(4, 6)])
def test_linear_verbs(make, bias, shape):
    m = make(bias).double()
    rule, W = rule_and_weight(m)
    assert W.shape == (4, 6)
    assert torch.equal(rule.raw(m, W, m.weight), m.weight)
    x = rand(*shape)
    b, M, B = m.bias, rand(2, 6, seed=1), rand(4, 2, seed=2)
    torch.testing.assert_close(rule.affine(m, W, b, x), m(x), **TIGHT)
    h = rule.apply(m, M, x)
    torch.testing.assert_close(h, x @ M.T, **TIGHT)
    torch.testing.assert_close(rule.mix(m, B, h), x @ (B @ M).T, **TIGHT)
    torch.testing.assert_close(rule.plus(m, m.weight, b, x, B, h), m(x) + x @ (B @ M).T, **TIGHT)


def test_fused_sum_leaves_its_operands_alone():
    """`plus` adds in place, into a tensor that nobody else holds."""
    m = nn.Linear(6, 4).double()
    rule, W = rule_and_weight(m)
    x, B, h = rand(3, 6), rand(4, 2, seed=1), rand(3, 2, seed=2)
    kept = [t.clone() for t in (W, m.bias, x, B, h)]
    rule.plus(m, m.weight, m.bias, x, B, h)
    for t, before in zip((W, m.bias, x, B, h), kept, strict=True):
        assert torch.equal(t, before)


def test_fused_sum_has_second_derivatives():
    m = nn.Linear(3, 2).double()
    rule, W = rule_and_weight(m)

    def f(x, B, h):
        return rule.plus(m, W, m.bias, x, B, h)

    args = [rand(4, 3).requires_grad_(), rand(2, 2, seed=1).requires_grad_(), rand(4, 2, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize("padding", [None, 0, 3, -1])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_embedding_verbs(padding, shape):
    m = nn.Embedding(8, 4, padding_idx=padding).double()
    with torch.no_grad():
        m.weight.copy_(rand(8, 4))  # the padding row too, so that it shows
    rule, W = rule_and_weight(m)
    assert W.shape == (4, 8)
    ids = torch.randint(8, shape, generator=torch.Generator().manual_seed(0))
    new = rand(4, 8, seed=1)
    torch.testing.assert_close(rule.affine(m, W, None, ids), m(ids), **TIGHT)
    back = rule.raw(m, new, m.weight)
    for i in range(8):
        assert torch.equal(back[i], m.weight[i] if i == m.padding_idx else new[:, i])
    torch.testing.assert_close(rule.affine(m, new, None, ids), F.embedding(ids, back, m.padding_idx), **TIGHT)
    M, B = rand(2, 8, seed=2), rand(4, 2, seed=3)
    torch.testing.assert_close(rule.mix(m, B, rule.apply(m, M, ids)), (B @ M).T[ids], **TIGHT)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "full"])
def test_padding_row_stays_and_gets_no_gradient(method):
    model = nn.Sequential(nn.Embedding(8, 4, padding_idx=3).double())
    with torch.no_grad():
        model[0].weight[3] = 7
    peftlab.wrap(model, method, **({"r": 2} if method in ("lora", "dora") else {}))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    y = model(torch.tensor([3, 3]))
    assert (y == 7).all()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    (model(torch.tensor([3, 1])) ** 2).sum().backward()
    optimizer.step()
    assert (model(torch.tensor([3])) == 7).all()
    peftlab.merge(model)
    assert (model(torch.tensor([3])) == 7).all()


# ---------------------------------------------------------------- which layers are surrounded, and which are read


@pytest.mark.parametrize(
    ("make", "rule", "surrounded"),
    [
        (lambda: nn.Linear(4, 6), "linear", True),
        (lambda: OwnInit(4), "linear", True),
        (lambda: OwnForward(4, 6), "linear", False),
        (lambda: conv1d_hf(6, 4), "conv1d_hf", True),
        (lambda: nn.Conv2d(4, 6, 3), "conv", True),
        (lambda: nn.ConvTranspose2d(4, 6, 3), "conv_transpose", True),
        (lambda: nn.Embedding(6, 4), "embedding", True),
        (lambda: nn.Embedding(6, 4, max_norm=1.0), "embedding", False),
        (lambda: nn.Embedding(6, 4, scale_grad_by_freq=True), "embedding", False),
        (lambda: ScaledEmbedding(6, 4), "embedding", False),
        (lambda: nn.Bilinear(4, 3, 6), "bilinear", False),
        (lambda: Packed(4, 6), "opaque", True),
    ],
)
def test_only_an_unchanged_forward_is_surrounded(make, rule, surrounded):
    m = make()
    assert layers.layer_rule(m).name == rule
    assert bool(layers.layer_rule(m).call and layers.runs_registered_forward(m, type(m))) is surrounded


def test_layers_without_a_matrix_have_no_rule():
    for m in (nn.LayerNorm(4), nn.ReLU(), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2), Raw(4, 6), Experts(2, 4, 6, "eio"), nn.Sequential()):
        assert layers.layer_rule(m) is None


def test_a_linear_by_another_name_is_read():
    class Homemade(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 4, 6
            self.weight = nn.Parameter(rand(6, 4))

        def forward(self, x):
            return torch.relu(x @ self.weight.T)

    m = nn.Sequential(Homemade())
    assert layers.layer_rule(m[0]).name == "linear"
    x = rand(3, 4, seed=1)
    peftlab.wrap(m, "lora", r=2, targets="0")
    with torch.no_grad():
        m[0].peftlab.default.B.fill_(0.5)
    A, B = m[0].peftlab.default.A, m[0].peftlab.default.B
    torch.testing.assert_close(m(x), torch.relu(x @ (m[0]._parameters["weight"] + 8.0 * B @ A).T), **TIGHT)


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("method", ["lora", "ia3", "oft"])
def test_transposed_convolution_with_an_output_size(method, how):
    """The one layer with a second argument."""

    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2).double()

        def forward(self, x, size):
            return self.up(x, size) if how == "positional" else self.up(input=x, output_size=size)

    model = Up()
    peftlab.wrap(model, method, targets="up", **({"r": 2} if method == "lora" else {}))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(rand(*p.shape, seed=2) * 0.3)
    x = rand(2, 4, 3, 3)
    ys = [model(x, (side, side)) for side in (7, 8)]
    assert [tuple(y.shape[2:]) for y in ys] == [(7, 7), (8, 8)]
    peftlab.merge(model)
    for side, y in zip((7, 8), ys, strict=True):
        torch.testing.assert_close(model(x, (side, side)), y, **TIGHT)


# ---------------------------------------------------------------- parts of a parameter


def adopt(to: nn.Module, source: nn.Module) -> None:
    to.load_state_dict(source.state_dict())


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(0.2 * rand(*p.shape, seed=20 + i))
    return model


def calibration(x: Tensor) -> dict:
    return {"data": [(x,)], "loss": lambda m, b: m(*b).square().mean()}


@pytest.mark.parametrize("order", ["eio", "eoi"])
@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_experts_are_separate_adapters(method, order):
    """One 3-D parameter with an adapter an expert, against as many linears with those adapters."""
    holder = nn.Sequential(Experts(3, 4, 6, order).double())
    frozen = [W.T if order == "eio" else W for W in holder[0].up.detach()]
    x = rand(3, 5, 4)
    hyper = {k: v for k, v in keywords(method, f"experts_{order}").items() if k not in ("targets", "layout")}
    peftlab.wrap(holder, method, targets="0.up", layout={"0.up": order}, dtype=torch.float64, **calibration(x), **hyper)
    shaken(holder)
    y = holder(x)
    y.square().sum().backward()
    for e, W in enumerate(frozen):
        one = nn.Sequential(nn.Linear(4, 6, bias=False).double())
        with torch.no_grad():
            one[0].weight.copy_(W)
        peftlab.wrap(one, method, targets="0", dtype=torch.float64, **calibration(x[e]), **hyper)
        mine = holder[0].peftlab.default.get_submodule(f"up.{e}")
        adopt(one[0].peftlab.default, mine)
        z = one(x[e])
        torch.testing.assert_close(y[e], z, **TIGHT)
        z.square().sum().backward()
        for a, b in zip(mine.parameters(), one[0].peftlab.default.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, **TIGHT)


PARTS = {
    "sizes": {"q": 4, "k": 2, "v": 2},
    "heads": {"q": [0, 3, 6], "k": [1, 4, 7], "v": [2, 5]},
    "slices": {"q": slice(0, 8, 2), "v": [7, 5, 1]},  # not in order, and not all of them
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_split_is_separate_adapters(method, parts):
    """Adapters on q and v of a fused projection, against separate linears; the rows of k do not move by one bit."""
    fused = nn.Sequential(nn.Linear(6, 8).double())
    whole = copy.deepcopy(fused[0])
    rows = {"q": torch.arange(4), "k": torch.arange(4, 6), "v": torch.arange(6, 8)}
    if parts != "sizes":
        rows = {k: torch.arange(8)[v] if isinstance(v, slice) else torch.tensor(v) for k, v in PARTS[parts].items()}
    x = rand(2, 3, 6)
    hyper = {k: v for k, v in keywords(method, "fused").items() if k not in ("targets", "split")}
    peftlab.wrap(fused, method, targets=["0.q", "0.v"], split={"0": PARTS[parts]}, dtype=torch.float64, **calibration(x), **hyper)
    shaken(fused)
    y = fused(x)
    untouched = torch.ones(8, dtype=torch.bool)
    for part in ("q", "v"):
        alone = nn.Sequential(nn.Linear(6, len(rows[part])).double())
        with torch.no_grad():
            alone[0].weight.copy_(whole.weight[rows[part]])
            alone[0].bias.copy_(whole.bias[rows[part]])
        peftlab.wrap(alone, method, targets="0", dtype=torch.float64, **calibration(x), **hyper)
        adopt(alone[0].peftlab.default, fused[0].peftlab.default.get_submodule(part))
        torch.testing.assert_close(y[..., rows[part]], alone(x), **TIGHT)
        untouched[rows[part]] = False
    peftlab.merge(fused)
    assert torch.equal(fused[0].weight[untouched], whole.weight[untouched])
    assert torch.equal(fused[0].bias[untouched], whole.bias[untouched])
    assert not torch.equal(fused[0].weight, whole.weight)
    torch.testing.assert_close(fused(x), y, **TIGHT)


def test_parts_that_overlap_or_overflow_are_refused():
    for parts in ({"q": 5, "v": 5}, {"q": 4, "v": 3}, {"q": [0, 1], "v": [1, 2]}, {"q": [9]}, {"q": []}, {"q": 0, "v": 8}):
        fused = nn.Sequential(nn.Linear(6, 8))
        with pytest.raises((ValueError, IndexError)) as e:
            peftlab.wrap(fused, "lora", r=1, targets="0.q", split={"0": parts})
        assert isinstance(e.value, ValueError), f"{parts}: {e.value!r}"
        assert "q" in str(e.value) or "split" in str(e.value)
        assert type(fused[0]) is nn.Linear


@pytest.mark.parametrize("method", [m for m in MATRIX_METHODS if fits(m, "attention")])
@pytest.mark.parametrize("same", [True, False])
def test_attention_is_three_projections(method, same):
    """q, k and v of nn.MultiheadAttention have the same names whether or not they share a parameter, and give what explicit projections give."""
    dims = (8, 8, 8) if same else (8, 4, 6)
    attention = nn.MultiheadAttention(8, 2, kdim=dims[1], vdim=dims[2], batch_first=True).double()
    model = nn.Module()
    model.layer = attention
    hyper = {k: v for k, v in keywords(method, "attention").items() if k != "targets"}
    xs = [rand(2, 5, d, seed=i) for i, d in enumerate(dims)]

    def run(m, batch):
        return m.layer(*batch)[0].square().mean()

    peftlab.wrap(model, method, targets=["layer.q_proj", "layer.v_proj"], dtype=torch.float64, data=[xs], loss=run, **hyper)
    shaken(model)
    stack = attention.peftlab.default
    W = attention._parameters["in_proj_weight"].split(8) if same else [attention._parameters[f"{p}_proj_weight"] for p in "qkv"]
    b = attention._parameters["in_proj_bias"].split(8)
    W = [stack.q_proj.weight(W[0]), W[1], stack.v_proj.weight(W[2])]
    b = [stack.q_proj.bias(b[0]), b[1], stack.v_proj.bias(b[2])]
    q, k, v = (F.linear(x, w, c).unflatten(-1, (2, 4)).transpose(1, 2) for x, w, c in zip(xs, W, b, strict=True))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    wanted = F.linear(out, attention.out_proj.weight, attention.out_proj.bias)
    for need in (True, False):
        torch.testing.assert_close(attention(*xs, need_weights=need)[0], wanted, **TIGHT)
        attention.eval()
        with torch.no_grad():
            torch.testing.assert_close(attention(*xs, need_weights=need)[0], wanted, **TIGHT)
        attention.train()


# ---- layers whose weight torch computes from other parameters


def spectral(layer):
    return torch.nn.utils.parametrizations.spectral_norm(layer)


def weight_normed(layer):
    return torch.nn.utils.parametrizations.weight_norm(layer)


COMPUTED = {"weight_norm": weight_normed, "spectral_norm": spectral, "orthogonal": torch.nn.utils.parametrizations.orthogonal}


@pytest.mark.parametrize("norm", COMPUTED)
def test_a_parametrised_linear_is_surrounded(norm, tmp_path):
    """The change is added to the computed weight; what computes it stays frozen and whole."""
    torch.manual_seed(0)
    model = nn.Sequential(COMPUTED[norm](nn.Linear(6, 6))).double().eval()
    base, x = copy.deepcopy(model), torch.randn(3, 6, dtype=torch.float64)
    peftlab.wrap(model, "lora", targets="0", r=2, alpha=3, dtype=torch.float64)
    assert torch.equal(model(x), base(x))
    t = model[0].peftlab.default
    with torch.no_grad():
        t.B.normal_()
    W = base[0].weight.detach() + 1.5 * t.B @ t.A
    torch.testing.assert_close(model(x), nn.functional.linear(x, W, base[0].bias), rtol=1e-12, atol=1e-12)
    model(x).square().sum().backward()
    assert {k for k, p in model.named_parameters() if p.grad is not None} == {"0.peftlab.default.A", "0.peftlab.default.B"}
    peftlab.save(model, tmp_path / "a")
    fresh = copy.deepcopy(base)
    peftlab.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(ValueError, match="only offers a call"):
        peftlab.merge(model)
    peftlab.unwrap(model)
    assert torch.equal(model(x), base(x))
    assert type(model[0]) is type(base[0])


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_parametrised_layer_is_refused_with_the_remedy(norm):
    linear, conv = (nn.Sequential(COMPUTED[norm](layer)) for layer in (nn.Linear(6, 5), nn.Conv1d(4, 5, 3)))
    with pytest.raises(ValueError, match=r"computes its weight .*remove_parametrizations\(layer, 'weight'\) makes it a plain"):
        peftlab.wrap(linear, "dora", targets="0", r=2)
    with pytest.raises(ValueError, match=r"'0' is a layer whose weight is computed .*remove_parametrizations\(layer, 'weight'\) makes it a plain"):
        peftlab.wrap(conv, "lora", targets="0", r=2)
    for model in (linear, conv):
        torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        peftlab.wrap(model, "lora", targets="0", r=2)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_layer_with_the_older_weight_norm_is_refused_with_the_remedy():
    conv = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv1d(4, 5, 3)))
    with pytest.raises(ValueError, match="remove_weight_norm"):
        peftlab.wrap(conv, "lora", targets="0", r=2)


# ---- the fast path's output


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_output_is_no_view(method, bias):
    """FSDP2 warns of modules that return views; in-place edits of them go other ways through autograd."""
    model = nn.Sequential(nn.Linear(16, 16, bias=bias))
    peftlab.wrap(model, method, targets="0")
    assert not model(torch.randn(2, 3, 16))._is_view()
