"""Starts that are found with the codes (LoftQ, QPiSSA) against the papers' alternation in float64; and QA-LoRA's groups, which offsets can take up."""

# ruff: noqa: PT018

from __future__ import annotations

import copy

import numpy as np
import pytest
import quant_oracle
import torch
from cases import CASES, Experts, Net, OwnForward, conv1d_hf
from safetensors.torch import save_file
from torch import Tensor, nn

import peftlab
from peftlab.model import packed
from peftlab.quant.quantize import packed_weights
from peftlab.support.files import LoadError

KINDS = ("nf4", "fp4", "int8")
INITS = ("loftq", "qpissa")


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 56, bias=False), nn.Linear(56, 10)).to(dtype)


def dense(m, param="weight"):
    return packed.dense_parameter(m, param).detach().clone()


def added(m, name="default"):
    """s B A of a linear layer."""
    a = m.peftlab.get_submodule(name)
    return (a.s * a.B @ a.A).detach()


def rounded(model, kind, path="0", **how):
    """What plain quantisation makes of a weight."""
    return dense(peftlab.quantize(copy.deepcopy(model), kind, **how).get_submodule(path))


def stir(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    return model


def trace(model):
    """What a call that raises must leave: objects, classes, flags and bits."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bits = [(k, id(t), t.requires_grad, t.is_meta or t.detach().flatten().view(torch.uint8).tolist()) for k, t in tensors]
    return [(k, id(m), type(m)) for k, m in model.named_modules()], bits


# ---------------------------------------------------------------- the papers' alternation, slow and in float64


def by_hand(W: Tensor, kind: str) -> Tensor:
    """W (float64) rounded to the nearest values of its blocks of 64 or, for int8, of its rows; without double quantisation."""
    if kind == "int8":
        top = W.abs().amax(1, keepdim=True)
        return (W / top * 127).round() * top / 127
    values = torch.tensor(quant_oracle.nf4_values() if kind == "nf4" else quant_oracle.fp4_values(), dtype=torch.float64)
    flat, out = W.flatten(), torch.empty(W.numel(), dtype=torch.float64)
    for block in quant_oracle.blocks(W.numel(), 64):
        x = flat[block.start : block.stop]
        top = x.abs().max()
        out[block.start : block.stop] = top * values[(x[:, None] / top - values).abs().argmin(1)]
    return out.view(W.shape)


def best(E: Tensor, r: int) -> Tensor:
    """The rank-r matrix nearest to E, one singular triplet at a time."""
    U, S, Vh = np.linalg.svd(E.numpy())
    return torch.tensor(sum(S[k] * np.outer(U[:, k], Vh[k]) for k in range(r)))


def turns(W: Tensor, kind: str, r: int, init: str, iters: int) -> list[tuple[Tensor, Tensor]]:
    """(Q, D) after each turn: Li et al. 2023, algorithm 1, or Meng et al. 2024, QPiSSA, where the two steps change places."""
    out, Q, D = [], torch.zeros_like(W), torch.zeros_like(W)
    for _ in range(iters):
        if init == "loftq":
            Q = by_hand(W - D, kind)
            D = best(W - Q, r)
        else:
            D = best(W - Q, r)
            Q = by_hand(W - D, kind)
        out.append((Q, D))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", INITS)
def test_one_turn_is_the_papers(kind, init):
    model = mlp()
    W = model[0].weight.detach().double()
    ((Q, D),) = turns(W, kind, 6, init, 1)
    peftlab.wrap_quantized(model, kind, init=init, iters=1, r=6, double_quant=None if kind == "int8" else False)
    mine = added(model[0]).double()
    torch.testing.assert_close(mine, D, rtol=0, atol=2e-5)
    torch.testing.assert_close(dense(model[0]).double(), Q if init == "loftq" else by_hand(W - mine, kind), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", INITS)
def test_several_turns_reach_the_papers_error_and_keep_the_best(kind, init):
    """An entry near the border of two codes may fall to the other side in float32, and so other turns follow: they are compared by their error."""
    W = mlp()[0].weight.detach().double()
    found = turns(W, kind, 6, init, 9)
    errors = [(W - Q - D).norm().item() for Q, D in found]
    last = float("inf")
    for iters in (1, 2, 5, 9):
        model = peftlab.wrap_quantized(mlp(), kind, init=init, iters=iters, r=6, double_quant=None if kind == "int8" else False)
        left = (W - dense(model[0]) - added(model[0])).norm().item()
        assert left == pytest.approx(min(errors[:iters]), rel=0.03)
        assert left <= last
        assert model[0].peftlab.default.start_error == pytest.approx(left, rel=1e-4)
        last = left


@pytest.mark.parametrize("kind", KINDS)
def test_more_turns_never_make_it_worse(kind):
    """In the papers' alternation they do, where the rank is large beside the matrix: its last turn is not its best."""
    torch.manual_seed(1)
    base = nn.Linear(24, 16)
    W = base.weight.detach().double()
    errors = [(W - Q - D).norm().item() for Q, D in turns(W, kind, 8, "loftq", 12)]
    assert errors[-1] > 1.2 * min(errors)
    found = []
    for iters in (1, 2, 4, 8, 12):
        model = peftlab.wrap_quantized(Net(copy.deepcopy(base)), kind, iters=iters, r=8, targets="layer")
        found.append(model.layer.peftlab.default.start_error)
        assert found[-1] == pytest.approx((W - dense(model.layer) - added(model.layer)).norm().item(), rel=1e-4)
    assert found == sorted(found, reverse=True) and found[-1] < errors[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("iters", [1, 4])
def test_loftq_is_nearer_than_rounding(kind, double, iters):
    if kind == "int8" and double:
        return
    how = {} if kind == "int8" else dict(double_quant=double)
    base = mlp()
    model = peftlab.wrap_quantized(mlp(), kind, iters=iters, r=4, **how)
    for path in ("0", "2"):
        W = base.get_submodule(path).weight
        m = model.get_submodule(path)
        assert (W - dense(m) - added(m)).norm() < 0.97 * (W - rounded(base, kind, path, **how)).norm()
    assert list(packed_weights(model)) == ["0.weight", "2.weight"] and model[3].weight.is_floating_point()


def test_one_turn_of_loftq_leaves_the_codes_of_quantize(tmp_path):
    """So such an adapter fits every base that was quantised alike; the codes of more turns, and those of qpissa, are their own."""
    plain = peftlab.quantize(mlp(), "nf4", targets=["0", "2"])
    for how, same in ((dict(iters=1), True), (dict(iters=3), False), (dict(init="qpissa", iters=1), False)):
        model = stir(peftlab.wrap_quantized(mlp(), "nf4", r=4, **how))
        assert all(torch.equal(dense(model[i]), dense(plain[i])) is same for i in (0, 2))
        peftlab.save(model, tmp_path / "a.safetensors")
        other = copy.deepcopy(plain)
        if same:
            peftlab.load(other, tmp_path / "a.safetensors")
            x = torch.randn(3, 48)
            assert torch.equal(other(x), model(x))
        else:
            with pytest.raises(LoadError, match="other values"):
                peftlab.load(other, tmp_path / "a.safetensors")


# ---------------------------------------------------------------- the scale


@pytest.mark.parametrize("init", INITS)
def test_the_scale_is_divided_out(init):
    """HF leaves it in, so that its start is the nearest one only where alpha = r: see test_reference."""
    first = peftlab.wrap_quantized(mlp(), "nf4", init=init, r=4, alpha=4.0)
    for how in (dict(alpha=32.0), dict(alpha=1.0), dict(alpha=8.0, rank_stabilized=True)):
        model = peftlab.wrap_quantized(mlp(), "nf4", init=init, r=4, **how)
        torch.testing.assert_close(added(model[0]), added(first[0]), rtol=0, atol=2e-5)
        assert model[0].peftlab.default.start_error == pytest.approx(first[0].peftlab.default.start_error, rel=1e-3)


def test_overrides_give_sites_their_own_rank():
    model = peftlab.wrap_quantized(mlp(), "nf4", r=2, overrides={"2": dict(r=20, alpha=5.0)})
    assert model[0].peftlab.default.A.shape == (2, 48) and model[2].peftlab.default.A.shape == (20, 40)
    W = mlp()[2].weight
    assert (W - dense(model[2]) - added(model[2])).norm() < 0.5 * (W - rounded(mlp(), "nf4", "2")).norm()


# ---------------------------------------------------------------- layers


def padded():
    torch.manual_seed(0)
    return nn.Embedding(40, 24, padding_idx=3)


FUSED = {"targets": ["layer.q", "layer.v"], "split": {"layer": {"q": 24, "k": 12, "v": 12}}}
LAYERS = {
    "conv1d_hf": (lambda: conv1d_hf(24, 40), lambda: torch.randn(2, 40), {"targets": "layer"}, "weight"),
    "embedding": (padded, lambda: torch.tensor([[0, 3, 39, 7]]), {"targets": "layer"}, "weight"),
    "own_forward": (lambda: OwnForward(40, 24), lambda: torch.randn(2, 40), {"targets": "layer"}, "weight"),
    "experts": (lambda: Experts(3, 24, 40, "eio"), lambda: torch.randn(3, 5, 24), CASES["experts_eio"].wrap, "up"),
    "experts_oi": (lambda: Experts(3, 24, 40, "eoi"), lambda: torch.randn(3, 5, 24), CASES["experts_eoi"].wrap, "up"),
    "fused": (lambda: nn.Linear(24, 48), lambda: torch.randn(2, 24), FUSED, "weight"),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_other_layers(layer, init):
    """The merged weight is near the dense one, and it is what the wrapped layer computes with."""
    make, inputs, how, param = LAYERS[layer]
    torch.manual_seed(0)
    base = Net(make())
    x = inputs()
    model = peftlab.wrap_quantized(copy.deepcopy(base), "nf4", init=init, r=6, **how)
    place = f"layer.{param}" if param == "up" else "layer"
    plain = peftlab.quantize(copy.deepcopy(base), "nf4", targets=place)
    W = base.layer._parameters[param].detach()
    far = (W - dense(plain.layer, param)).norm()
    y = model(x)
    with peftlab.disabled(model):
        alone = model(x)
    peftlab.merge(model, onto="dequantized")
    merged = model.layer._parameters[param].detach()
    assert (W - merged).norm() < 0.9 * far
    twin = copy.deepcopy(base)
    twin.layer._parameters[param] = nn.Parameter(merged)
    torch.testing.assert_close(y, twin(x), rtol=1e-4, atol=1e-4)
    assert (y - base(x)).norm() < (alone - base(x)).norm()
    if layer == "embedding":  # its padding row is the codes' own, whatever the adapter does
        peftlab.unmerge(model)
        with torch.no_grad():
            assert torch.equal(model(torch.tensor([3])), alone[:, 1])


@pytest.mark.parametrize("init", INITS)
def test_bfloat16(init):
    """Values of the codes are rounded to the weight's dtype, factors to the adapter's; the error counts both."""
    model = peftlab.wrap_quantized(mlp(torch.bfloat16), "int8", init=init, r=6, dtype=torch.bfloat16)
    a = model[0].peftlab.default
    assert a.A.dtype == torch.bfloat16 and dense(model[0]).dtype == torch.bfloat16
    W = mlp(torch.bfloat16)[0].weight.double()
    left = (W - dense(model[0]).double() - a.s * a.B.double() @ a.A.double()).norm().item()
    assert a.start_error == pytest.approx(left, rel=1e-4)
    assert model(torch.randn(3, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ---------------------------------------------------------------- life


@pytest.fixture(params=INITS)
def trained(request):
    """(dense model, the wrapped one after a few steps, inputs)."""
    base = mlp()
    model = peftlab.wrap_quantized(mlp(), "nf4", init=request.param, r=4)
    x, goal = torch.randn(16, 48), torch.randn(16, 10)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (model(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)  # no factor starts at zero
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    return base, model, x


def test_without_the_adapter_the_codes_alone_are_left(trained):
    base, model, x = trained
    codes = {k: copy.deepcopy(t) for k, t in packed_weights(model).items()}
    y = model(x)
    with peftlab.disabled(model):
        alone = model(x)
    assert not torch.allclose(alone, y) and torch.equal(model(x), y)
    peftlab.unwrap(model)
    assert torch.equal(model(x), alone)
    assert all(torch.equal(a, b) for k in codes for a, b in zip(codes[k][1:], packed_weights(model)[k][1:], strict=True) if a is not None)
    assert not torch.equal(dense(model[0]), base[0].weight)


def test_merging_and_back(trained):
    base, model, x = trained
    y, before = model(x), trace(model)[1]
    for onto in (base, dict(base.named_parameters())):
        with pytest.raises(ValueError, match="'0' started from what these codes lack .* added twice: onto='dequantized'"):
            peftlab.merge(model, onto=onto)
    assert trace(model)[1] == before
    peftlab.merge(model, onto="dequantized")
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    peftlab.unmerge(model)
    assert torch.equal(model(x), y) and [t[3] for t in trace(model)[1]] == [t[3] for t in before]


def test_the_base_and_the_adapter_come_back_from_two_files(trained, tmp_path):
    """The codes as a checkpoint, the adapter as a file: no dense weights are needed again."""
    base, model, x = trained
    y = model(x)
    peftlab.save(model, tmp_path / "adapter.safetensors")
    save_file({k: t.contiguous() for k, t in model.state_dict().items() if ".peftlab." not in k}, tmp_path / "base.safetensors")
    with torch.device("meta"):
        fresh = mlp()
    peftlab.load_quantized(fresh, tmp_path / "base.safetensors", None)
    peftlab.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(x), y)
    with pytest.raises(ValueError, match="added twice"):
        peftlab.merge(fresh, onto=base)
    with pytest.raises(LoadError, match="other values"):
        peftlab.load(mlp(), tmp_path / "adapter.safetensors")
    again = peftlab.wrap_quantized(mlp(), "nf4", init=fresh[0].peftlab.default.recipe.hyper["init"], r=4)
    peftlab.load(again, tmp_path / "adapter.safetensors")  # the same dense weights give the same codes
    assert torch.equal(again(x), y)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), y)


def test_a_second_adapter_and_switching(trained):
    _, model, x = trained
    y = model(x)
    peftlab.wrap(model, "lora", r=2, name="more")
    assert torch.equal(model(x), y)
    peftlab.activate(model, "more")
    with peftlab.disabled(model):
        alone = model(x)
    torch.testing.assert_close(model(x), alone)
    peftlab.activate(model, "default")
    assert torch.equal(model(x), y)
    routed = torch.cat([y[:8], alone[8:]])
    with peftlab.route(model, ["default"] * 8 + [None] * 8):
        torch.testing.assert_close(model(x), routed, rtol=1e-5, atol=1e-5)


def test_on_top_of_another_adapter():
    model = peftlab.wrap(mlp(), "ia3", name="below", targets="0")
    stir(model)
    peftlab.wrap_quantized(model, "nf4", r=4, name="above")
    fresh = peftlab.wrap_quantized(mlp(), "nf4", r=4, name="above")
    assert torch.equal(dense(model[0]), dense(fresh[0])) and torch.equal(added(model[0], "above"), added(fresh[0], "above"))
    assert [p.requires_grad for k, p in model.named_parameters() if ".peftlab." not in k] == [False] * 5
    peftlab.unwrap(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, False, True, True]


def test_the_same_call_gives_the_same_bits():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = peftlab.wrap_quantized(mlp(), "nf4", r=4)
    torch.set_rng_state(state)
    torch.manual_seed(9)
    two = peftlab.wrap_quantized(mlp(), "nf4", r=4)
    torch.manual_seed(9)
    wanted = (mlp(), torch.get_rng_state())[1]
    torch.manual_seed(9)
    peftlab.wrap_quantized(mlp(), "nf4", r=4)
    assert torch.equal(torch.get_rng_state(), wanted)
    for (k, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), k


def test_the_other_layers_are_quantised_afterwards():
    model = peftlab.wrap_quantized(mlp(), "nf4", r=4, targets="0")
    x = torch.randn(3, 48)
    assert list(packed_weights(model)) == ["0.weight"]
    peftlab.quantize(model, "fp4", exclude=[*packed_weights(model)])
    assert list(packed_weights(model)) == ["0.weight", "2.weight"] and torch.isfinite(model(x)).all()
    fresh = peftlab.wrap_quantized(peftlab.quantize(mlp(), "fp4", targets="2"), "nf4", r=4, targets="0")
    assert torch.equal(fresh(x), model(x))


def test_plan_and_report_know_the_start():
    planned = peftlab.plan(mlp(), "lora", init="loftq", r=4)
    model = peftlab.wrap_quantized(mlp(), "nf4", r=4)
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "start error" in repr(peftlab.report(model))
    assert peftlab.check(model, torch.randn(3, 48)).ok


# ---------------------------------------------------------------- refusals


def tied():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    return model


def on_meta():
    with torch.device("meta"):
        return mlp()


def infinite():
    model = mlp()
    model[2].weight.data[0, 0] = float("inf")
    return model


REFUSALS = {
    "init": (mlp, dict(init="loftqq"), ValueError, "'loftqq'.*'loftq', 'qpissa'.*Did you mean 'loftq'"),
    "init of lora": (mlp, dict(init="pissa"), ValueError, "'loftq', 'qpissa'"),
    "iters": (mlp, dict(iters=0), ValueError, "iters=0"),
    "iters, a bool": (mlp, dict(iters=True), ValueError, "iters=True"),
    "kind": (mlp, dict(kind="nf3"), ValueError, "'nf3'.*Did you mean 'nf4'"),
    "blocksize": (mlp, dict(blocksize=63), ValueError, "blocksize=63.*64"),
    "int8 has rows": (mlp, dict(kind="int8", blocksize=64), ValueError, "int8 has one scale a row"),
    "compute_dtype": (mlp, dict(compute_dtype="bf16"), TypeError, "bf16"),
    "progress": (mlp, dict(progress=3), TypeError, "progress=3"),
    "targets": (mlp, dict(targets="layr"), ValueError, "layr"),
    "alpha": (mlp, dict(alpha=-2.0), ValueError, r"-0.25 is not positive \(at '0'\)"),
    "alpha 0": (mlp, dict(alpha=0.0), ValueError, "not positive"),
    "r": (mlp, dict(r=41), ValueError, "r=41 at '0': at most 40"),
    "an option": (mlp, dict(rank=4), TypeError, "rank"),
    "another start by override": (mlp, dict(overrides={"2": dict(init="kaiming")}), ValueError, "init='kaiming' at '2'.*wrap that one by itself"),
    "no codes": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(8, 8)), dict(targets=["0", "1"], r=2), ValueError, "'0'.*Conv1d.*exclude it"),
    "codes already": (lambda: peftlab.quantize(mlp(), "nf4", targets="2"), {}, ValueError, "'2'.*quantised already"),
    "tied": (tied, dict(targets="1", r=2), ValueError, r"'1'.*tied.*exclude it"),
    "meta": (on_meta, {}, ValueError, "'0.weight' is on the meta device"),
    "infinite": (infinite, {}, ValueError, "'2'.*not finite"),
    "the name": (lambda: peftlab.wrap(mlp(), "lora"), {}, ValueError, "already has an adapter 'default'"),
    "merged": (lambda: (m := peftlab.wrap(mlp(), "ia3", name="a"), stir(m), peftlab.merge(m))[0], {}, ValueError, "has 'a' merged into it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_what_is_wrong_and_change_nothing(case):
    make, how, error, words = REFUSALS[case]
    model = make()
    before = trace(model)
    with pytest.raises(error, match=words):
        peftlab.wrap_quantized(model, **how)
    assert trace(model) == before


@pytest.mark.parametrize("init", INITS)
def test_wrap_says_where_this_start_is_made(init):
    for model in (mlp(), peftlab.quantize(mlp(), "nf4"), on_meta()):
        before = trace(model)
        with pytest.raises(ValueError, match="peftlab.wrap_quantized"):
            peftlab.wrap(model, "lora", init=init)
        assert trace(model) == before


def test_an_interrupt_leaves_every_layer_whole():
    """What was done has its adapter, and the rest is as it was: the model computes about what it did."""

    def stop(done, total, path):
        assert (done, total, path) == (1, 2, "0")
        raise KeyboardInterrupt

    base, model = mlp(), mlp()
    with pytest.raises(KeyboardInterrupt):
        peftlab.wrap_quantized(model, "int8", init="qpissa", r=4, progress=stop)
    assert list(packed_weights(model)) == ["0.weight"] and torch.equal(model[2].weight, base[2].weight)
    x = torch.randn(5, 48)
    assert (model(x) - base(x)).norm() < 0.02 * base(x).norm()
    peftlab.unwrap(model)
    assert (model(x) - base(x)).norm() > 0.2 * base(x).norm(), "the codes alone lack the principal part"


# ---------------------------------------------------------------- QA-LoRA


def grouped(n_in=24, n_out=6, g=4, r=3, **how):
    torch.manual_seed(0)
    model = Net(nn.Linear(n_in, n_out).double())
    return stir(peftlab.wrap(model, "qalora", targets="layer", group_size=g, r=r, **how))


def test_offsets_of_groups_take_the_change_up_and_the_codes_stay():
    """Algorithm 1, merge_with_quantization, by hand: an asymmetric 4-bit quantiser of groups, whose offsets alone move."""
    model = grouped()
    W = model.layer._parameters["weight"].detach().unflatten(1, (-1, 4))
    offset = W.amin(-1, keepdim=True)
    step = (W.amax(-1, keepdim=True) - offset) / 15
    codes = ((W - offset) / step).round()
    with torch.no_grad():
        model.layer._parameters["weight"].copy_((step * codes + offset).flatten(1))
        a = model.layer.peftlab.default
        moved = offset + (a.s * a.B @ a.A)[..., None]
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(model(x), nn.functional.linear(x, (step * codes + moved).flatten(1), model.layer.bias), rtol=1e-12, atol=1e-12)


def test_groups_of_one_are_lora():
    model = grouped(g=1, r=2, alpha=3.0)
    twin = peftlab.wrap(Net(copy.deepcopy(grouped(g=1, r=2).layer)), "lora", targets="layer", r=2, alpha=3.0, name="twin")
    peftlab.unwrap(twin, "default")
    own, other = model.layer.peftlab.default, twin.layer.peftlab.twin
    with torch.no_grad():
        other.A.copy_(own.A)
        other.B.copy_(own.B)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n_in", "r", "g"), [(4096, 8, 32), (576, 8, 32), (100, 8, 10), (24, 8, 3), (7, 2, 1), (13, 13, 1)])
def test_the_usual_group(n_in, r, g):
    """As large as in the paper, where that divides the inputs and leaves r groups."""
    model = peftlab.wrap(Net(nn.Linear(n_in, 16)), "qalora", targets="layer", r=r)
    assert model.layer.peftlab.default.A.shape == (r, n_in // g)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(group_size=5, r=2), r"group_size=5 at 'layer' does not divide the 24 inputs; the nearest that do: \[4, 6\]"),
        (dict(group_size=32, r=2), r"group_size=32 at 'layer' does not divide the 24 inputs; the nearest that do: \[12, 24\]"),
        (dict(group_size=0, r=2), "group_size=0"),
        (dict(group_size=2.0, r=2), "group_size=2.0 is not a whole number"),
        (dict(group_size=8, r=4), "r=4 at 'layer': at most 3, the number of groups of 8 inputs"),
        (dict(group_size=2, r=7), "r=7 at 'layer': at most 6"),
        (dict(group_size=2, r=2, dropout=1.5), "dropout=1.5"),
    ],
)
def test_wrong_groups_name_the_right_ones(how, words):
    model = Net(nn.Linear(24, 6))
    before = trace(model)
    with pytest.raises(ValueError, match=words):
        peftlab.wrap(model, "qalora", targets="layer", **how)
    assert trace(model) == before


def test_requantised_codes_cannot_take_the_change_up():
    """nf4 has no offsets: what it holds of a merged change is what its values happen to show, and the report says how little that is."""
    torch.manual_seed(0)
    model = Net(nn.Linear(64, 64))
    peftlab.quantize(model, "nf4", targets="layer")
    stir(peftlab.wrap(model, "qalora", targets="layer", group_size=8, r=2, alpha=0.02))
    report = peftlab.merge(model, onto="requantized")
    assert report.errors[0][3] > 0.5, report
