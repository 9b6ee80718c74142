"""Mixtures of LoRAs: a trained one with top-k token routing, and a router over frozen ones."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import pickle

import pytest
import tiny
import torch
from cases import Transformer
from oracles import CALLS
from safetensors.torch import load_file
from tiny import own
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlab

TIGHT = dict(rtol=1e-10, atol=1e-10)
NEAR = dict(rtol=1e-5, atol=1e-5)


perturb = functools.partial(tiny.perturb, size=0.3)


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x):
        return self.layer(x)


def one(**hyper) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(frozen layer, model with a mixture on it, the mixture)."""
    torch.manual_seed(1)
    base = One().double().requires_grad_(False)
    model = peftlab.wrap(copy.deepcopy(base), "mola", targets="layer", dtype=torch.float64, **hyper)
    return base.layer, perturb(model), model.layer.peftlab.default


X = torch.randn(2, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


# ---------------------------------------------------------------- the trained mixture


@pytest.mark.parametrize(("experts", "k"), [(4, 2), (4, 1), (3, 3), (1, 1)])
def test_mola_is_its_formula(experts, k):
    layer, model, m = one(experts=experts, k=k, r=2, alpha=3.0)
    x = X.clone().requires_grad_()
    t = dict(m.named_parameters())
    y, wanted = model(x), CALLS["mola"](layer.weight, layer.bias, x, t, dict(k=k, r=2, alpha=3.0))
    torch.testing.assert_close(y, wanted, **TIGHT)
    v = torch.randn(y.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * v).sum(), [*t.values(), x]) for out in (y, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def switch_loss(m: nn.Module, x: Tensor) -> Tensor:
    """Fedus et al. 2021, eq. 4-6, token by token; a choice of k counts 1 / k."""
    T = x.reshape(-1, x.shape[-1])
    f, P = torch.zeros(m.experts, dtype=x.dtype), torch.zeros(m.experts, dtype=x.dtype)
    for token in T:
        p = torch.softmax(m.W_g @ token, 0)
        P = P + p / len(T)
        for i in p.topk(m.k).indices:
            f[i] += 1 / (m.k * len(T))
    return m.experts * sum(f[i] * P[i] for i in range(m.experts))


@pytest.mark.parametrize("k", [1, 2])
def test_the_penalty_is_the_mean_of_the_load_balancing_losses(k):
    _, model, m = one(experts=4, k=k, r=2, balance=0.5)
    model.train()
    parts = [X[:1], X[1:], 2 * X]
    for x in parts:
        model(x)
    wanted = 0.5 * sum(switch_loss(m, x) for x in parts) / 3
    found = m.penalty()
    torch.testing.assert_close(found, wanted, **TIGHT)
    torch.testing.assert_close(*(torch.autograd.grad(loss, m.W_g)[0] for loss in (found, wanted)), **TIGHT)
    assert m.penalty() == 0, "it was handed out"
    model.eval()(X)
    assert m.penalty() == 0, "only training counts"


def test_schedule_adds_it():
    """One step with schedule is one step on loss + penalty, written out."""
    _, model, m = one(experts=4, k=2, r=2, balance=0.3)
    twin = copy.deepcopy(model)
    m2 = twin.layer.peftlab.default
    optimizer = torch.optim.SGD(own(model).values(), lr=0.1)
    peftlab.schedule(model, optimizer, total_steps=5)
    model.train()(X).square().mean().backward()
    optimizer.step()
    by_hand = torch.optim.SGD(own(twin).values(), lr=0.1)
    (twin.train()(X).square().mean() + 0.3 * switch_loss(m2, X)).backward()
    by_hand.step()
    for k, p in own(model).items():
        torch.testing.assert_close(p, own(twin)[k], **TIGHT)


def test_without_its_schedule_it_says_so():
    for hyper, raises in ((dict(), True), (dict(balance=0.0), False), (dict(experts=2, k=2), False)):
        _, model, _ = one(**dict(dict(experts=4, k=2, r=2), **hyper))
        for twin in (model, pickle.loads(pickle.dumps(model))):

            def steps(twin=twin):
                optimizer = torch.optim.SGD(own(twin).values(), lr=0.01)
                for _ in range(25):
                    optimizer.zero_grad()
                    twin(X).square().mean().backward()
                    optimizer.step()

            if raises:
                with pytest.raises(RuntimeError, match="without its schedule"):
                    steps()
            else:
                steps()


def test_the_loss_balances_the_experts():
    """A router that sends nearly everything to one expert; 300 steps on the loss alone spread the tokens evenly."""
    _, model, m = one(experts=4, k=1, r=2, balance=1.0)
    x = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        m.W_g[0] += 1

    def shares() -> Tensor:
        return torch.bincount((x @ m.W_g.T).argmax(1), minlength=4) / len(x)

    assert shares()[0] > 0.9
    optimizer = torch.optim.Adam([m.W_g], lr=0.005)
    peftlab.schedule(model, torch.optim.SGD(own(model).values(), lr=0.0), total_steps=300)
    for _ in range(300):
        optimizer.zero_grad()
        model.train()(x)
        m.penalty().backward()
        optimizer.step()
    assert shares().max() < 0.3
    assert shares().min() > 0.2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_what_one_lora_cannot(seed):
    """Two kinds of tokens, each with a rank-1 change of its own that undoes the other's: one LoRA of rank 1 is left with nearly all of it."""
    torch.manual_seed(seed)
    kind = torch.arange(256) % 2
    x = torch.randn(256, 6)
    x[:, 0] = torch.where(kind == 1, 3.0, -3.0)
    a, b = torch.randn(6), torch.randn(8)
    a[0] = 0
    base = One().requires_grad_(False)
    target = base(x) + torch.where(kind == 1, 1.0, -1.0)[:, None] * (x @ a)[:, None] * b

    def fit(name, **hyper) -> float:
        model = peftlab.wrap(copy.deepcopy(base), name, targets="layer", **hyper).train()
        optimizer = torch.optim.Adam(own(model).values(), lr=0.02)
        peftlab.schedule(model, optimizer, total_steps=400)
        for _ in range(400):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    start = (base(x) - target).square().mean().item()
    assert fit("mola", experts=2, k=2, r=1, alpha=2.0) < 0.05 * start
    assert fit("lora", r=1, alpha=2.0) > 0.8 * start


def test_it_merges_where_the_gates_are_the_same_for_every_token():
    for hyper, router in ((dict(experts=1, k=1), None), (dict(experts=3, k=3), 0.0)):
        layer, model, m = one(r=2, **hyper)
        if router is not None:
            nn.init.zeros_(m.W_g)
        y = model(X)
        assert peftlab.merge(model).layers == 1
        wanted = layer.weight + sum(8 / hyper["experts"] * m.B[i] @ m.A[i] for i in range(hyper["experts"]))
        torch.testing.assert_close(model.layer.weight, wanted, **TIGHT)
        torch.testing.assert_close(model(X), y, **TIGHT)
        peftlab.unmerge(model)
        assert torch.equal(model.layer.weight, layer.weight)
        torch.testing.assert_close(model(X), y, **TIGHT)


@pytest.mark.parametrize("hyper", [dict(experts=3, k=2), dict(experts=3, k=3), dict(experts=2, k=1)])
def test_else_it_refuses_to_merge_with_the_reason(hyper):
    _, model, m = one(r=2, **hyper)
    y = model(X)
    with pytest.raises(ValueError, match=rf"'default' changes the call, not the weight: every token is routed by itself, to {m.k} of {m.experts} experts, and cannot"):
        peftlab.merge(model)
    peftlab.wrap(model, "lora", targets="layer", name="beside", r=2)
    perturb(model)
    assert peftlab.merge(model).layers == 1  # what can be
    peftlab.unmerge(model)
    torch.testing.assert_close(peftlab.unwrap(model, "beside")(X).shape, y.shape)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", ["lora", "dora", "ia3", "bitfit", "full", "oft"])
def test_it_stacks_with_weight_methods_in_any_order(other, first):
    """Weights lie below the mixture, whatever was wrapped first."""
    layer, _, _ = one(r=2)
    model = One().double()
    model.layer.load_state_dict(layer.state_dict())
    order = [("mix", "mola", dict(experts=3, k=2, r=2)), ("other", other, {} if other in ("bitfit", "full", "ia3", "oft") else dict(r=2))]
    for name, method, hyper in order if first else order[::-1]:
        peftlab.wrap(model, method, targets="layer", name=name, dtype=torch.float64, **hyper)
    perturb(model, size=0.2)
    y, mix = model(X), model.layer.peftlab.mix
    with peftlab.using(model, "other"):
        below = model(X)
    t = {k: p for k, p in mix.named_parameters()}
    added = CALLS["mola"](torch.zeros_like(layer.weight), torch.zeros_like(layer.bias), X, t, dict(k=2, r=2, alpha=16.0))
    torch.testing.assert_close(y, below + added, **TIGHT)
    assert peftlab.merge(model).layers == 1
    torch.testing.assert_close(model(X), y, **TIGHT)
    with peftlab.disabled(model):
        torch.testing.assert_close(model(X), layer(X), rtol=0, atol=0)


@pytest.mark.parametrize(("hyper", "match"), [(dict(k=5), "k=5"), (dict(experts=0), "experts=0"), (dict(r=7), "r=7"), (dict(k=0), "k=0")])
def test_mola_refuses(hyper, match):
    with pytest.raises(ValueError, match=match):
        peftlab.wrap(One(), "mola", targets="layer", **{"r": 2, **hyper})


def test_mola_refuses_a_loss_that_favours_one_expert():
    with pytest.raises(ValueError, match="balance=-1"):
        peftlab.wrap(One(), "mola", targets="layer", r=2, balance=-1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.LSTM(8, 8), nn.Linear(8, 3)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), nn.Linear(8, 3)


@pytest.mark.parametrize("make", [Recurrent, Encoder])
def test_a_default_that_leaves_the_head_alone_is_refused(make):
    model = make()
    with pytest.raises(peftlab.PatternError, match="'head' alone.*without the layer being called"):
        peftlab.wrap(model, "mola", r=2)
    assert type(model.head) is nn.Linear
    assert [r.path for r in peftlab.plan(model, "mola", r=2, targets=":head").rows] == ["head"]
    assert "inner" in str(peftlab.plan(model, "lora", r=2))  # which fits there


def test_the_head_of_a_model_with_no_other_layer_is_its_place():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 3))
    assert [r.path for r in peftlab.plan(model, "mola", r=2).rows] == ["1"]


def test_a_choice_of_few_saves_copies_routes_and_is_recomputed(tmp_path):
    layer, model, m = one(r=2, experts=4, k=2)
    y = model.eval()(X)
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = One().double()
    fresh.layer.load_state_dict(layer.state_dict())
    peftlab.load(fresh, tmp_path / "a.safetensors")
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), y)
    with peftlab.route(model, [None, "default"]):
        routed = model(X)
    torch.testing.assert_close(routed, torch.stack([layer(X[0]), y[1]]), **TIGHT)
    assert torch.equal(model.layer(input=X), y)
    model.train()
    wanted = torch.autograd.grad(model(X).square().sum(), list(own(model).values()))
    checkpoint(model, X.clone().requires_grad_(), use_reentrant=True).square().sum().backward()
    for g, p in zip(wanted, own(model).values(), strict=True):
        torch.testing.assert_close(p.grad, g, **TIGHT)


def test_more_experts_in_higher_layers():
    model = peftlab.wrap(Transformer(), "mola", r=2, experts=2, overrides={"blocks.1": dict(experts=5)})
    counts = {s.rpartition(".peftlab")[0]: len(p) for s, p in own(model).items() if s.endswith("W_g")}
    assert {v for k, v in counts.items() if ".0." in k} == {2}
    assert {v for k, v in counts.items() if ".1." in k} == {5}


# ---------------------------------------------------------------- X-LoRA


def trained(dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    """(base, a copy that holds two trained LoRAs which are switched off)."""
    torch.manual_seed(0)
    base = Transformer().to(dtype).requires_grad_(False).eval()
    model = copy.deepcopy(base)
    peftlab.wrap(model, "lora", name="fr", r=2, targets=["q", "v", "mlp.0"], dtype=dtype)
    peftlab.wrap(model, "rslora", name="de", r=3, targets=["q", "o"], dtype=dtype)
    perturb(model)
    peftlab.activate(model, None)
    return base, model


H = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
SITES = ("q", "v", "o", "mlp.0")


def gates_of(common: nn.Module, h: Tensor) -> Tensor:
    z = h
    for i in range(common.depth):
        z = torch.einsum("btd,md->btm", z, getattr(common, f"W{i}")) + getattr(common, f"b{i}")
        z = z.clamp(min=0) if i + 1 < common.depth else z
    return z.reshape(*h.shape[:2], common.layers, -1)


@pytest.mark.parametrize("hyper", [dict(), dict(depth=2, dim=5), dict(layerwise=False, temperature=0.5), dict(softmax=False), dict(k=1)])
def test_xlora_is_its_formula(hyper):
    """Both runs by hand: the last hidden state of the frozen model, gates, and every layer's sum over experts."""
    base, model = trained()
    peftlab.wrap(model, "xlora", experts=["fr", "de"], r=3, name="mix", dtype=torch.float64, **hyper)
    peftlab.train_only(model, "mix")
    perturb(model)
    common = model.peftlab_shared.mix
    h = H
    for b in base.blocks:
        h = b(h)[0]
    g = gates_of(common, h) / hyper.get("temperature", 1.0)
    g = g.softmax(-1) if hyper.get("softmax", True) else g
    if "k" in hyper:
        g = torch.where(g == g.amax(-1, keepdim=True), g, 0)

    class Mixed(nn.Module):
        def __init__(self, path: str):
            super().__init__()
            self.path, self.layer = path, base.get_submodule(path)

        def forward(self, x):
            A, B = [], []
            for name, r, s in (("fr", 2, 8.0), ("de", 3, 16 / 3**0.5)):
                m = model.get_submodule(self.path).peftlab._modules.get(name)
                A.append(torch.zeros(3, x.shape[-1], dtype=x.dtype))
                B.append(torch.zeros(self.layer.out_features, 3, dtype=x.dtype))
                if m is not None:
                    A[-1][:r], B[-1][:, :r] = m.A.detach(), s * m.B.detach()
            return CALLS["xlora"](self.layer.weight, self.layer.bias, x, torch.stack(A), torch.stack(B), g[:, :, common.index[self.path]])

    twin = copy.deepcopy(base)
    for i in (0, 1):
        for p in SITES:
            path = f"blocks.{i}.{p}"
            parent, _, last = path.rpartition(".")
            twin.get_submodule(parent)._modules[last] = Mixed(path)
    wanted = twin(H)
    y = model(H)
    torch.testing.assert_close(y, wanted, **TIGHT)
    params = list(common.parameters())
    v = torch.randn(y.shape, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((y * v).sum(), params), torch.autograd.grad((wanted * v).sum(), params), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_the_router_alone_trains_and_the_file_holds_router_and_experts(tmp_path):
    base, model = trained(torch.float32)
    x = H.float()
    peftlab.wrap(model, "xlora", experts=["fr", "de"], r=3, name="mix")
    peftlab.train_only(model, "mix")
    assert all(".peftlab" not in k and "peftlab_shared.mix" in k for k in own(model))
    perturb(model)
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in own(model).values())
    peftlab.save(model, tmp_path / "mix.safetensors", names="mix")
    fresh = copy.deepcopy(base)
    peftlab.load(fresh, tmp_path / "mix.safetensors")
    assert torch.equal(fresh(x), y)
    peftlab.unwrap(model, ["fr", "de"])  # the factors were copied
    assert torch.equal(model(x), y)
    with peftlab.disabled(model):
        assert torch.equal(model(x), base(x))
    assert peftlab.check(model, x).ok
    with pytest.raises(ValueError, match="cannot be merged"):
        peftlab.merge(model)
    peftlab.unwrap(model)
    assert torch.equal(model(x), base(x))


def test_it_learns_to_choose():
    """Tokens of two kinds, for each of which another expert is right: the router finds out."""
    base, model = trained(torch.float32)
    torch.manual_seed(3)
    x = torch.randn(32, 4, 8)
    x[:, :, 0] = torch.where(torch.arange(32) % 2 == 1, 3.0, -3.0)[:, None]
    target = torch.empty(32, 4, 6)
    for i, name in enumerate(["fr", "de"]):
        with peftlab.using(model, name):
            target[i::2] = model(x[i::2]).detach()
    peftlab.wrap(model, "xlora", experts=["fr", "de"], r=3, name="mix")
    peftlab.train_only(model, "mix")
    optimizer = torch.optim.Adam(own(model).values(), lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_xlora_refuses_what_it_cannot_mix():
    _, model = trained(torch.float32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for hyper, match in (
        (dict(experts=["fr", "it"]), r"it.*hold \['de', 'fr'\]"),
        (dict(experts=["fr", "de"], r=2), "'de' has rank 3"),
        (dict(experts=0), "experts=0"),
        (dict(experts=["fr"], k=2), "there are 1 experts"),
        (dict(experts=["fr"], temperature=0.0), "temperature"),
        (dict(experts=["fr"], depth=0), "depth=0"),
    ):
        with pytest.raises(ValueError, match=match):
            peftlab.wrap(model, "xlora", name="mix", **{"r": 3, **hyper})
        assert model.state_dict().keys() == state.keys()
    peftlab.activate(model, "fr")
    with pytest.raises(ValueError, match="'fr' acts at"):
        peftlab.wrap(model, "xlora", name="mix", experts=["fr", "de"], r=3)
    peftlab.wrap(model, "ia3", name="scales", targets="q")
    peftlab.activate(model, None)
    with pytest.raises(ValueError, match="is a IA3"):
        peftlab.wrap(model, "xlora", name="mix", experts=["scales"], r=3)
    with pytest.raises(ValueError, match="one list of blocks"):
        peftlab.wrap(One(), "xlora", targets="layer", experts=2, r=2)


def test_its_options_hold_for_all_sites():
    _, model = trained(torch.float32)
    before = [type(m) for m in model.modules()]
    for options in (dict(k=1), dict(softmax=False), dict(temperature=2.0), dict(depth=2), dict(experts=["fr"])):
        key = next(iter(options))
        with pytest.raises(ValueError, match=rf"overrides: {key} would be .* at 'blocks.*all sites of xlora share"):
            peftlab.wrap(model, "xlora", name="mix", **{"experts": ["fr", "de"], "r": 3}, overrides={"blocks.1": options})
        assert [type(m) for m in model.modules()] == before
    peftlab.wrap(model, "xlora", name="mix", experts=["fr", "de"], r=3, overrides={"blocks.1": dict(r=4)})  # each site's own
    assert {len(m.A[0]) for m in (model.blocks[0].q.peftlab.mix, model.blocks[1].q.peftlab.mix)} == {3, 4}


def test_prefixes_share_their_network_and_not_their_number():
    network = dict(dim=4, n=2)
    for options in (dict(n=3), dict(dim=3), dict(net=False)):
        model = llama()
        with pytest.raises(ValueError, match=f"overrides: {next(iter(options))} would be"):
            peftlab.wrap(model, "prefix_tuning", **network, overrides={"layers.0": options})
        assert not any("peftlab" in k for k, _ in model.named_modules())
    model = peftlab.wrap(llama(), "prefix_tuning", n=2, net=False, overrides={"layers.0": dict(n=3)})  # nothing is shared
    assert [model.model.layers[i].self_attn.peftlab.default.n for i in (0, 1)] == [3, 2]
    model(prompts()[0])


def mixed_blocks() -> nn.Module:
    _, model = trained()
    peftlab.wrap(model, "xlora", experts=["fr", "de"], r=3, name="mix", dtype=torch.float64)
    peftlab.train_only(model, "mix")
    return perturb(model)


@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_forward_that_fails_leaves_nothing_behind(error, run):
    """Neither in the next forward, nor in the backward of the last one, which runs its blocks again."""
    model = mixed_blocks()
    wanted, alone = model(H).detach(), model.blocks[0](H)[0].detach()  # without the model around it no expert acts
    calls = [b.forward for b in model.blocks]
    for b, call in zip(model.blocks, calls, strict=True):
        b.forward = lambda h, call=call: checkpoint(call, h, use_reentrant=False)
    model(H).square().sum().backward()
    grads = {k: p.grad.clone() for k, p in own(model).items()}
    model.zero_grad()
    pending = model(H).square().sum()
    count = []

    def fail(*_):
        count.append(1)
        if len(count) == run:
            raise error

    hook = model.blocks[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(2 * H)
    hook.remove()
    pending.backward()
    for k, p in own(model).items():
        torch.testing.assert_close(p.grad, grads[k], **TIGHT)
    assert not model.peftlab_shared.mix.reading
    assert torch.equal(model.blocks[0](H)[0], alone)
    assert torch.equal(model(H), wanted)


def test_a_forward_after_one_under_vmap():
    model = mixed_blocks()
    wanted, params = model(H).detach(), own(model)
    with contextlib.suppress(RuntimeError):  # torch.func may refuse what a method does
        torch.func.vmap(torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x[None],)).square().mean()), (None, 0))(params, H)
    assert torch.equal(model(H), wanted)
    assert torch.equal(copy.deepcopy(model)(H), wanted)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["itself", "copy", "pickle"])
def test_threads_have_their_own_gates(copied):
    model = copied(mixed_blocks())
    xs = [H + i for i in range(4)]
    wanted = [model(x).detach() for x in xs]

    def work(i: int) -> list[bool]:
        with torch.no_grad():
            return [torch.equal(model(xs[i]), wanted[i]) for _ in range(25)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(work, range(4)))


@pytest.mark.parametrize("first", ["prompt_tuning", "prefix_tuning", "llama_adapter", "loreft", "houlsby", "ln_tuning"])
def test_the_default_place_is_where_weights_have_adapters(first):
    """What surrounds calls or takes virtual tokens says nothing of the layers that experts sit at."""
    small = {"prefix_tuning": dict(dim=4), "houlsby": dict(dim=2)}.get(first, {})
    plain = [r.path for r in peftlab.plan(llama(), "xlora", r=2, dim=4).rows]
    model = peftlab.wrap(llama(), first, name="first", **small)
    assert [r.path for r in peftlab.plan(model, "xlora", r=2, dim=4, name="mix").rows] == plain
    peftlab.wrap(model, "lora", r=2, name="weights", targets="q_proj")
    there = [r.path for r in peftlab.plan(model, "xlora", r=2, dim=4, name="mix").rows]
    assert [p for p in there if p in plain and p.endswith("_proj")] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


@pytest.mark.parametrize("mixture_first", [False, True])
def test_virtual_keys_have_no_gates(mixture_first):
    """llama_adapter's P goes through the projections of keys and values: no token of the input, so there is no hidden state to weigh experts by."""
    ids = prompts()[0]

    def both(**where):
        steps = [
            lambda m: peftlab.wrap(m, "llama_adapter", n=3, name="virtual"),
            lambda m: peftlab.wrap(m, "xlora", r=2, dim=4, experts=2, name="mix", **where),
        ]
        model = llama()
        for step in reversed(steps) if mixture_first else steps:
            step(model)
        return perturb(model)

    with pytest.raises(ValueError, match=r"k_proj' was called with \(1, 3, 16\).*llama_adapter.*exclude this layer"):
        both()(ids)
    model = both(exclude=["k_proj", "v_proj"])
    y = model(ids).logits
    assert all(not torch.allclose(alone, y) for alone in (shown(model, "mix", ids), shown(model, "virtual", ids)))


def shown(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    with peftlab.using(model, name):
        return model(ids).logits


def test_checkpointed_blocks_and_two_forwards_before_one_backward():
    """What a recomputed block mixes with is what it mixed with, and a reentrant block, which cuts the router off, is refused."""
    _, model = trained()
    peftlab.wrap(model, "xlora", experts=["fr", "de"], r=3, name="mix", dtype=torch.float64)
    peftlab.train_only(model, "mix")
    perturb(model)
    model.train()
    calls = [b.forward for b in model.blocks]

    def grads():
        model.zero_grad()
        (model(H).square().sum() + 3 * model(2 * H + 1).square().sum()).backward()
        return [p.grad.clone() for p in own(model).values()]

    wanted = grads()
    for reentrant in (False, True):
        for b, call in zip(model.blocks, calls, strict=True):
            b.forward = lambda h, call=call, reentrant=reentrant: checkpoint(call, h, use_reentrant=reentrant)
        if reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                grads()
            continue
        for a, b in zip(grads(), wanted, strict=True):
            torch.testing.assert_close(a, b, **TIGHT)


def test_rows_of_their_own():
    _, model = trained()
    peftlab.wrap(model, "xlora", experts=["fr", "de"], r=3, name="mix", dtype=torch.float64)
    perturb(model)
    x = torch.cat([H, H + 1])
    rows = []
    for i, who in enumerate(["mix", "fr", None, ["mix", "fr"]]):
        with peftlab.using(model, who):
            rows.append(model(x[i : i + 1]))
    with peftlab.route(model, ["mix", "fr", None, ["mix", "fr"]]):
        torch.testing.assert_close(model(x), torch.cat(rows), **TIGHT)


# ---------------------------------------------------------------- on transformers


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    c = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(c).eval().requires_grad_(False)


def prompts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def mixture() -> nn.Module:
    model = llama()
    for name in ("fr", "de"):
        peftlab.wrap(model, "lora", name=name, r=2, targets=["q_proj", "v_proj"])
    perturb(model)
    peftlab.activate(model, None)
    peftlab.wrap(model, "xlora", experts=["fr", "de"], r=2, name="mix")
    peftlab.train_only(model, "mix")
    return perturb(model)


@pytest.mark.parametrize("name", ["mola", "xlora"])
def test_generation(name):
    model = mixture() if name == "xlora" else perturb(peftlab.wrap(llama(), "mola", r=2))
    ids, mask = prompts()
    options = dict(max_new_tokens=6, do_sample=False)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    alone = model.generate(ids[:1, 3:], use_cache=False, **options)
    assert torch.equal(plain[0, -6:], alone[0, -6:])
    with peftlab.disabled(model):
        assert not torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), plain)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=True, **options), plain)
    beams = [model.generate(ids, attention_mask=mask, num_beams=3, use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*beams)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "rows", "kept"),
    [
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1], 6),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1], 6),
        (lambda cache: cache.reset(), [0, 1], 0),
    ],
    ids=["repeated", "chosen", "emptied"],
)
def test_a_cache_whose_rows_change_goes_on_as_if_nothing_were_cached(change, rows, kept):
    model, (ids, _) = mixture(), prompts()
    cache = model(ids[:, :6], use_cache=True).past_key_values
    change(cache)
    wanted = model(ids[rows], use_cache=False).logits[:, kept:]
    torch.testing.assert_close(model(ids[rows][:, kept:], past_key_values=cache).logits, wanted, **NEAR)


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_agreement_with_hf_peft(layerwise, depth, tmp_path):
    """The same experts and classifier: the same outputs and gradients."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = llama()
    for name in ("0", "1"):
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        theirs.save_pretrained(tmp_path / name)
    options = dict(xlora_depth=depth, xlora_size=5, layerwise_scalings=layerwise, xlora_dropout_p=0.0)
    adapters = {n: str(tmp_path / n) for n in ("0", "1")}
    hf_base = copy.deepcopy(base)
    hf_base.config.use_cache = False
    theirs = peft.get_peft_model(hf_base, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=adapters, **options)).eval()
    ours = copy.deepcopy(base)
    for name in ("0", "1"):
        peftlab.wrap(ours, "lora", name=name, r=2, alpha=4.0, targets=["q_proj", "v_proj"])
        with torch.no_grad():
            for k, t in load_file(tmp_path / name / "adapter_model.safetensors").items():
                path, _, factor = k.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
                getattr(ours.get_submodule(path).peftlab._modules[name], factor).copy_(t)
    peftlab.activate(ours, None)
    peftlab.wrap(ours, "xlora", experts=["0", "1"], r=2, name="mix", depth=depth, dim=5, layerwise=layerwise)
    peftlab.train_only(ours, "mix")
    common, classifier = ours.peftlab_shared.mix, theirs.base_model.internal_xlora_classifier
    linear = [m for m in classifier.layers if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for i, m in enumerate(linear):
            m.weight.copy_(0.5 * torch.randn_like(m.weight))
            m.bias.copy_(torch.randn_like(m.bias))
            getattr(common, f"W{i}").copy_(m.weight)
            getattr(common, f"b{i}").copy_(m.bias)
    ids, _ = prompts()
    y, wanted = ours(ids, use_cache=False).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(y.square().mean(), [getattr(common, f"W{i}") for i in range(depth)])
    for p in classifier.parameters():
        p.requires_grad_(True)
    expected = torch.autograd.grad(wanted.square().mean(), [m.weight for m in linear])
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_hfs_defect_the_file_lacks_the_router(tmp_path):
    """HF's file of an X-LoRA has no classifier in it, so that what was trained is lost; ours holds router and experts."""
    peft = pytest.importorskip("peft")
    base = llama()
    for name in ("0", "1"):
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(tmp_path / name)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters={n: str(tmp_path / n) for n in ("0", "1")})
    hf_base = copy.deepcopy(base)
    hf_base.config.use_cache = False
    theirs = peft.get_peft_model(hf_base, config)
    assert [k for k, p in theirs.named_parameters() if p.requires_grad and "internal_xlora_classifier" in k]
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    assert not file.exists() or not [k for k in load_file(file) if "classifier" in k]
    ours = mixture()
    peftlab.save(ours, tmp_path / "ours.safetensors", names="mix")
    assert {k.rpartition(".")[2] for k in load_file(tmp_path / "ours.safetensors") if "peftlab_shared" in k} == {"W0", "b0"}
