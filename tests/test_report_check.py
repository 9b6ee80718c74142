"""`report`, `check` and `watch`: what they say is counted, provoked and compared, and the model is afterwards what it was.

Row numbers in the names are those of the list of promised behaviours.
"""

from __future__ import annotations

import random
import re
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftlab
from peftlab.core.base import Base
from peftlab.core.method import Method
from peftlab.core.preserve import checksum_bits as bits
from peftlab.core.site import ADAPTERS_CHILD as CHILD
from peftlab.core.stack import adapted_modules as stacks
from peftlab.inspect.check.outputs import output_distance as _distance
from peftlab.inspect.check.report import CheckReport
from peftlab.inspect.report import ReportRow as Row


class Block(nn.Module):
    def __init__(self, dim: int = 8):
        super().__init__()
        self.q, self.v, self.mlp = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.mlp(torch.tanh(self.q(x)) * torch.tanh(self.drop(self.v(x))))


class Net(nn.Module):
    """Everything that a forward may change: BatchNorm statistics, the generators (dropout, layer choice), a counter."""

    def __init__(self, depth: int = 3, dim: int = 8):
        super().__init__()
        self.embed = nn.Embedding(11, dim)
        self.layers = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.bn = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids):
        self.calls += 1
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        random.random(), np.random.rand()
        return self.head(self.bn(x.transpose(1, 2)).transpose(1, 2))


IDS = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(3))


def net(**kw) -> Net:
    torch.manual_seed(0)
    return Net(**kw)


def stir(model: nn.Module) -> nn.Module:
    """Adapters as after training: nothing is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for k, p in model.named_parameters():
            if f"{CHILD}." in k:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def everything(model: nn.Module) -> dict:
    """All of a model that a check could leave changed, generators included; tensors as copies with their identities."""
    tensors = {k: (t, t.detach().clone(), t.data_ptr()) for k, t in [*model.named_parameters(), *model.named_buffers()]}
    return {
        "tensors": tensors,
        "grads": {k: (p.grad, None if p.grad is None else p.grad.clone()) for k, p in model.named_parameters()},
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "classes": {k: type(m) for k, m in model.named_modules()},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()},
        "stacks": {k: (s.active, s.merged, s.links) for k, _, s in stacks(model)},
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]),
    }


def assert_untouched(model: nn.Module, before: dict) -> None:
    now = everything(model)
    assert now["tensors"].keys() == before["tensors"].keys()
    for k, (t, value, where) in before["tensors"].items():
        other, other_value, other_where = now["tensors"][k]
        assert other is t, k
        assert other_where == where, k
        assert torch.equal(other_value, value), k
    for k, (g, value) in before["grads"].items():
        other, other_value = now["grads"][k]
        assert other is g, k
        assert g is None or torch.equal(value, other_value), k
    assert torch.equal(now["random"][0], before["random"][0])
    assert now["random"][1:] == before["random"][1:]
    for what in ("flags", "modes", "classes", "hooks", "stacks"):
        assert now[what] == before[what], what


@pytest.fixture
def group(tmp_path):
    """One gloo process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def rows_of(model: nn.Module, *batch) -> dict[str, object]:
    """The check's rows by path, whether or not it passes."""
    try:
        found = peftlab.check(model, *batch)
    except peftlab.CheckError as e:
        found = e.report
    return {r.path: r for r in found.rows}


# ---------------------------------------------------------------- report


def direct(model: nn.Module, name: str | None = None) -> int:
    """Entries of the adapters' tensors, by their paths alone."""
    return sum(p.numel() for k, p in model.named_parameters() if re.search(rf"peftlab(_shared)?\.{name or '[^.]+'}(\.|$)", k))


def test_promise_55_report_rows_say_what_is_there():
    model = net()
    peftlab.wrap(model, "lora", r=2, alpha=6, targets=["q", "v"], name="one", dtype=torch.bfloat16)
    peftlab.wrap(model, "bitfit", targets="head.*", name="two")
    peftlab.activate(model, "one")
    peftlab.freeze(model, "two")
    found = peftlab.report(model)
    assert isinstance(found, list)
    assert all(isinstance(r, Row) for r in found)
    assert [r.path for r in found] == [f"layers.{i}.{p}" for i in range(3) for p in "qv"] + ["head.bias"]
    q, head = found[0], found[-1]
    assert (q.method, q.name, q.r, q.scale, q.dtype, q.device.type) == ("lora", "one", 2, 3.0, torch.bfloat16, "cpu")
    assert (q.active, q.merged, q.trainable, q.parameters, q.pattern) == (True, False, True, 2 * 16, "q")
    assert (head.method, head.active, head.trainable, head.parameters, head.r, head.scale) == ("bitfit", False, False, 4, None, None)
    assert all(r.used is None and r.grad_norm is None for r in found)
    peftlab.activate(model, ["one", "two"])
    peftlab.merge(model, "one")
    assert [r.merged for r in peftlab.report(model)] == [True] * 6 + [False]


def test_promise_55_counts_are_direct_counts():
    model = net()
    assert (len(peftlab.report(model)), peftlab.report(model).parameters) == (0, 0)
    assert peftlab.report(model).trainable == sum(p.numel() for p in model.parameters())
    peftlab.wrap(model, "lora", r=2, targets="q", name="a", bias=True)
    peftlab.wrap(model, "vera", r=3, targets=["v", "mlp"], name="b")
    peftlab.wrap(model, "full", targets="head.*", name="c", in_place=True)
    model.bn.weight.requires_grad_(True)
    peftlab.freeze(model, "a")
    found = peftlab.report(model)
    for name in "ab":
        assert sum(r.parameters for r in found if r.name == name) == direct(model, name)
    assert sum(r.parameters for r in found if r.name == "c") == model.head.weight.numel() + model.head.bias.numel()
    assert found.parameters == direct(model) + model.head.weight.numel() + model.head.bias.numel()
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert sum(r.parameters for r in found if r.trainable) + model.bn.weight.numel() == found.trainable
    assert found.elsewhere == ["bn.weight"]
    assert "bn.weight" in repr(found)


def test_promise_55_used_and_gradient_norms():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.on, self.off = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.on(x)

    torch.manual_seed(0)
    model = peftlab.wrap(Two(), "lora", r=2, targets=["on", "off"])
    assert [r.used for r in peftlab.report(model)] == [None, None]
    model(torch.randn(3, 4)).square().sum().backward()
    on, off = peftlab.report(model)
    grads = [p.grad for p in model.on.peftlab.parameters()]
    assert (on.used, off.used, off.grad_norm) == (True, False, None)
    assert on.grad_norm == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-6)
    assert on.grad_norm > 0
    peftlab.wrap(model, "ia3", targets="off", name="frozen")
    peftlab.freeze(model, "frozen")
    assert [r.used for r in peftlab.report(model)] == [True, False, None]
    model.zero_grad()
    assert [r.used for r in peftlab.report(model)] == [None, None, None]


def test_promise_55_the_table_groups_repeated_layers():
    model = net(depth=12)
    peftlab.wrap(model, "lora", r=2, targets=["q", "v"], overrides={"layers.3.q": dict(r=1)})
    lines = repr(peftlab.report(model)).splitlines()
    body = [line.split() for line in lines[2:-1]]
    assert [line[:2] for line in body] == [["layers.#.q", "11"], ["layers.#.v", "12"], ["layers.3.q", "1"]]
    assert f"{11 * 32:,}" in body[0]
    assert f"{12 * 32:,}" in body[1]
    assert "16" in body[2]
    share = 100 * (23 * 32 + 16) / sum(p.numel() for p in model.parameters())
    assert lines[-1].startswith(f"trainable {23 * 32 + 16:,} of")
    assert f"({share:.3f} %)" in lines[-1]
    assert all(len(line) < 160 for line in lines)
    peftlab.wrap(model, "ia3", targets=["layers.1.q", "layers.2.q"], name="b")
    model.layers[1].q.peftlab.b.l.requires_grad_(False)
    frozen, on = (line.split() for line in repr(peftlab.report(model)).splitlines() if "ia3" in line)
    assert (frozen[0], on[0]) == ("layers.1.q", "layers.2.q")
    assert "frozen" in frozen
    assert "frozen" not in on


def test_promise_59_report_says_where_the_fast_path_is_not_taken_and_why():
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.both, self.conv = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3)
            self.scaled = type("Scaled", (nn.Linear,), {"forward": lambda m, x: 2 * F.linear(x, m.weight)})(8, 8)
            self.attn, self.rnn = nn.MultiheadAttention(8, 2), nn.GRU(8, 8)
            self.matrix = nn.Parameter(torch.randn(8, 8))
            self.tied_a, self.tied_b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied_b.weight = self.tied_a.weight

    model = All()
    peftlab.wrap(model, "lora", r=2, targets=["plain", "scaled", "attn", "out_proj", "rnn.weight_ih_l0", "matrix", "tied_a"], tie="share")
    peftlab.wrap(model, "lora", r=2, targets=["x"], split={"{both,conv}": {"x": 4, "y": 4}}, name="part")
    mode = {r.path: r.mode for r in peftlab.report(model)}
    assert mode["plain"] == "call"
    assert "Scaled has a forward" in mode["scaled"]
    assert mode["scaled"].startswith("read")
    assert mode["attn.q_proj"].startswith("read (attention")
    assert "MultiheadAttention reads" in mode["attn.out_proj"]
    assert "recurrent" in mode["rnn.weight_ih_l0"]
    assert "raw parameter" in mode["matrix"]
    assert "tied" in mode["tied_a"]
    assert mode["both.x"] == "call"
    assert mode["conv.x"] == "call (dense: a part of the weight is adapted)"


def test_promise_59_read_by_hand_and_definition_only_say_so():
    class Scale(Method):
        def __init__(self, base: Base):
            super().__init__(base)
            self.c = nn.Parameter(torch.ones(1))

        def weight(self, W):
            return W * self.c

    model = net()
    peftlab.wrap(model, "lora", r=2, targets="head", read="head")
    peftlab.wrap(model, Scale, targets="q", name="scale")
    mode = {r.path: r.mode for r in peftlab.report(model)}
    assert mode["head"] == "read (asked for by read=)"
    assert mode["layers.0.q"] == "call (dense: the method is its definition alone)"


def test_promise_55_notes_start_error_shared_tensors_and_missing_schedule():
    model = net()
    peftlab.wrap(model, "pissa", r=2, targets="q")
    peftlab.wrap(model, "vera", r=3, targets="v", name="vera")
    peftlab.wrap(model, "adalora", r=1, init_r=2, targets="mlp", name="ada")
    found = peftlab.report(model)
    q = next(r for r in found if r.path == "layers.0.q")
    lora = model.layers[0].q.peftlab.default
    W = model.layers[0].q._parameters["weight"]
    error, floor = (float(x) for x in re.fullmatch(r"start error (\S+) \(at least (\S+)\)", q.note).groups())
    assert error == pytest.approx(torch.linalg.norm(W - lora.s * lora.B @ lora.A).item(), rel=1e-2)
    assert floor == pytest.approx(torch.linalg.svdvals(W)[2:].norm().item(), rel=1e-2)
    shared = next(r for r in found if r.mode == "shared" and r.name == "vera")
    assert (shared.path, shared.method, shared.parameters) == ("peftlab_shared.vera", "vera", 0)
    assert f"{2 * 8 * 3} fixed entries" in shared.note
    ada = [r for r in found if r.name == "ada" and r.mode != "shared"]
    assert [r.note for r in ada] == ["not scheduled"] * 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    peftlab.schedule(model, optimizer, total_steps=5)
    assert not any("scheduled" in r.note for r in peftlab.report(model))


def test_promise_55_report_under_wrappers_and_on_meta(group):
    model = net()
    peftlab.wrap(model, "lora", r=2, targets="q")
    want = list(peftlab.report(model))
    assert list(peftlab.report(torch.compile(model, backend="eager"))) == want
    assert list(peftlab.report(nn.parallel.DistributedDataParallel(model))) == want
    with torch.device("meta"):
        empty = Net()
    peftlab.wrap(empty, "lora", r=2, targets="q")
    rows = peftlab.report(empty)
    assert [r.parameters for r in rows] == [r.parameters for r in want]
    assert all("still to come" in r.note for r in rows)
    with pytest.raises(TypeError):
        peftlab.report("model")


# ---------------------------------------------------------------- check: what passes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", dict(r=2, dropout=0.1)),
        ("lora", dict(r=2, bias=True)),
        ("pissa", dict(r=2)),
        ("dora", dict(r=2)),
        ("vera", dict(r=3)),
        ("bitfit", {}),
        ("adalora", dict(r=2, init_r=3)),
        ("full", {}),
        ("full", dict(in_place=True)),
        ("oft", {}),
        ("tokens", dict(ids=[1, 2], targets="embed")),
    ],
)
def test_check_passes_and_leaves_everything_as_it_was(method, options, training):
    model = net().train(training)
    peftlab.wrap(model, method, **options)
    model(IDS).square().sum().backward()
    model.bn.eval()
    before = everything(model)
    found = peftlab.check(model, IDS)
    assert_untouched(model, before)
    assert found.ok
    assert isinstance(found, CheckReport)
    assert "all adapters pass" in repr(found)
    assert len(found.rows) == len([r for r in peftlab.report(model) if r.mode != "shared"])
    assert all(r.reached and r.moves and r.saves for r in found.rows)
    assert all(r.merges is (None if options.get("in_place") else True) for r in found.rows)


def test_check_of_several_adapters_some_off_some_frozen():
    model = net()
    peftlab.wrap(model, "lora", r=2, targets=["q", "v"], name="one")
    peftlab.wrap(model, "dora", r=2, targets=["q"], name="two")
    peftlab.wrap(model, "ia3", targets=["v"], name="three")
    stir(model)
    peftlab.activate(model, ["one", "two"])
    peftlab.freeze(model, "two")
    before = everything(model)
    found = peftlab.check(model, IDS)
    assert_untouched(model, before)
    assert {r.name for r in found.rows} == {"one", "two"}
    assert len(found.rows) == 9
    assert all((r.reached, r.moves, r.saves, r.merges) == (True,) * 4 for r in found.rows)


def test_check_uses_the_loss_of_the_output():
    class Losing(nn.Module):
        """Two heads, of which only one is in the loss."""

        def __init__(self):
            super().__init__()
            self.body, self.head, self.extra = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x, labels=None):
            h = torch.tanh(self.body(x))
            out = {"logits": self.head(h), "extra": self.extra(h)}
            return out if labels is None else out | {"loss": F.cross_entropy(out["logits"], labels)}

    torch.manual_seed(0)
    model, x = peftlab.wrap(Losing(), "lora", r=2, targets=["body", "head", "extra"]), torch.randn(4, 8)
    assert peftlab.check(model, x).ok
    with pytest.raises(peftlab.CheckError, match="'extra'") as e:
        peftlab.check(model, x, labels=torch.tensor([0, 1, 2, 3]))
    assert "'head'" not in str(e.value)
    assert "does not reach the loss" in str(e.value)


def test_promise_04_attention_and_the_fused_encoder_pass_in_both_modes():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    peftlab.wrap(encoder, "lora", r=2)
    x = torch.randn(2, 5, 8)
    for training in (True, False):
        encoder.train(training)
        before = everything(encoder)
        found = peftlab.check(encoder, x)
        assert_untouched(encoder, before)
        assert {r.path.rpartition(".")[2] for r in found.rows} >= {"q_proj", "out_proj", "linear1", "linear2"} - {"linear2"}
    attn = nn.MultiheadAttention(8, 2)
    peftlab.wrap(attn, "lora", r=2, targets=["q_proj", "out_proj"])
    assert peftlab.check(attn, x, x, x).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_check_in_other_precisions(dtype):
    model = net().to(dtype).eval()
    peftlab.wrap(model, "lora", r=2, targets=["q", "v", "head"])
    assert peftlab.check(model, IDS).ok


def test_check_under_autocast_and_compile():
    model = net().eval()
    peftlab.wrap(model, "lora", r=2, targets=["q", "v"])
    with torch.autocast("cpu", torch.bfloat16):
        assert peftlab.check(model, IDS).ok
    before = everything(model)
    assert peftlab.check(torch.compile(model, backend="eager"), IDS).ok
    assert_untouched(model, before)
    full = peftlab.wrap(net().eval(), "full", targets="layers.*.weight")
    with torch.autocast("cpu", torch.bfloat16):
        full(IDS)  # autocast keeps casts of the tensors as they are
        assert peftlab.check(full, IDS).ok
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert peftlab.check(model, IDS).ok


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("training", [True, False])
def test_check_under_reentrant_checkpointing(training):
    class Checkpointed(Net):
        def forward(self, ids):
            x = self.embed(ids).requires_grad_()
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=True)
            return self.head(x)

    torch.manual_seed(0)
    model = peftlab.wrap(Checkpointed().train(training), "lora", r=2, targets=["q", "v"])
    model(IDS).sum().backward()
    stepped = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(stepped.append)
    before = everything(model)
    assert peftlab.check(model, IDS).ok
    assert_untouched(model, before)
    assert not stepped
    model(IDS).sum().backward()
    assert stepped


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_promise_03_reentrant_checkpointing_that_cuts_the_adapters_off_is_told_in_both_modes():
    class Cut(Net):
        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=True)
            return self.head(x)

    torch.manual_seed(0)
    model = peftlab.wrap(Cut(), "lora", r=2, targets=["q", "head"])
    before = everything(model)
    with pytest.raises(RuntimeError, match=r"'layers\.0\.q' would get no gradient.*enable_input_require_grads"):
        peftlab.check(model, IDS)
    assert_untouched(model, before)
    with pytest.raises(peftlab.CheckError, match=r"3 of 4 adapters.*\n.*'layers\.2\.q'.*reentrant checkpointing"):
        peftlab.check(model.eval(), IDS)


def test_check_with_randomly_skipped_layers_and_a_cache_in_the_batch():
    class Skips(Net):
        def forward(self, ids, cache):
            x = self.embed(ids)
            for layer in self.layers:
                if not self.training or torch.rand(()) > 0.3:
                    x = layer(x)
            cache.append(x)
            return self.head(sum(cache))

    torch.manual_seed(0)
    model = peftlab.wrap(Skips(depth=4), "lora", r=2, targets="q")
    cache: list = []
    assert peftlab.check(model, IDS, cache).ok
    assert cache == []


def test_check_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=32)
    model = transformers.LlamaForCausalLM(config)
    peftlab.wrap(model, "lora", r=2)
    x = torch.randint(0, 31, (2, 6))
    before = everything(model)
    found = peftlab.check(model, input_ids=x, labels=x, attention_mask=torch.ones_like(x))
    assert_untouched(model, before)
    assert len(found.rows) == 14
    assert "layers.#.self_attn.q_proj" in repr(found)


def test_check_with_a_trained_head_outside_adapters_says_how_to_save_it():
    model = peftlab.wrap(net(), "lora", r=2, targets="q")
    model.head.weight.requires_grad_(True)
    found = peftlab.check(model, IDS)
    assert found.ok
    assert "include=['head.weight']" in repr(found)


def test_check_of_gradual_unfreezing_knows_that_layers_sleep():
    model = peftlab.wrap(net(), "full", gradual=True, targets="*.mlp.weight")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    peftlab.schedule(model, optimizer, total_steps=30)
    rows = rows_of(model, IDS)
    assert [r.note != "" for r in rows.values()] == [True, True, False]
    assert all(r.reached and r.moves for r in rows.values())


def test_check_says_what_it_could_not_try():
    class Locked(Net):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    found = peftlab.check(peftlab.wrap(Locked(), "lora", r=2, targets="q"), IDS)
    assert all((r.reached, r.moves, r.saves, r.merges) == (True, True, None, True) for r in found.rows)
    assert "saving was not tried" in repr(found)


def test_check_of_recurrent_tied_expert_and_packed_layers():
    class Packed(nn.Module):
        """A linear whose weight is packed."""

        in_features = out_features = 6

        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.randint(-8, 8, (6, 6), dtype=torch.int8))

        def forward(self, x):
            return F.linear(x, self.codes.to(x.dtype) / 8)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.packed = nn.Embedding(9, 6, padding_idx=0), nn.LSTM(6, 6, 2), Packed()
            self.experts = nn.Parameter(torch.randn(3, 6, 6))
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            x = self.packed(self.rnn(self.embed(ids))[0])
            return self.head(torch.einsum("eio,bsi->bso", self.experts, x))

    torch.manual_seed(0)
    model, ids = Odd(), torch.randint(0, 9, (3, 4))
    peftlab.wrap(model, "lora", r=2, targets=["embed", "rnn", "experts"], tie="share", layout={"experts": "eio"})
    peftlab.wrap(model, "lora", r=2, targets="packed", name="packed")
    before = everything(model)
    found = peftlab.check(model, ids)
    assert_untouched(model, before)
    assert {r.path: r.merges for r in found.rows if r.name == "packed"} == {"packed": None}
    assert len(found.rows) == 1 + 4 + 3 + 1
    assert all(r.merges for r in found.rows if r.name != "packed")


# ---------------------------------------------------------------- check: what fails, by name, with the remedy


class Reads(nn.Module):
    """One weight is read without a call, one branch is unused, one is detached, one runs without gradients."""

    def __init__(self):
        super().__init__()
        self.body, self.read, self.unused, self.detached, self.blind, self.head = (nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        h = torch.tanh(self.body(x))
        h = F.linear(h, self.read.weight, self.read.bias)
        h = h + self.detached(h).detach()
        with torch.no_grad():
            blind = self.blind(h)
        return self.head(h + blind)


def test_promise_04_every_dead_adapter_is_named_with_its_own_remedy():
    torch.manual_seed(0)
    model, x = Reads(), torch.randn(4, 8)
    peftlab.wrap(model, "lora", r=2, targets=["body", "read", "unused", "detached", "blind", "head"])
    model(x).sum().backward()
    before = everything(model)
    with pytest.raises(peftlab.CheckError) as e:
        peftlab.check(model, x)
    assert_untouched(model, before)
    text = str(e.value)
    assert text.startswith("4 of 6 adapters failed the check")
    names = ("body", "read", "unused", "detached", "blind", "head")
    remedy = {p: line for line in text.splitlines() for p in names if f"'{p}' (lora" in line}
    assert "read, not called: wrap(..., read=['read'])" in remedy["read"]
    assert "not used for this batch" in remedy["unused"]
    assert "exclude=['unused']" in remedy["unused"]
    assert "detached" in remedy["detached"]
    assert "no_grad" in remedy["blind"]
    assert "body" not in remedy
    assert "head" not in remedy
    rows = {r.path: r for r in e.value.report.rows}
    assert [rows[p].reached for p in rows] == [True, False, False, False, False, True]
    # A detached branch does act, it only does not train; the read and the unused one do not even act.
    assert [rows[p].moves for p in rows] == [True, False, False, True, True, True]
    assert all(r.saves for r in rows.values())
    assert "NO" in repr(e.value.report)
    assert "4 of 6 fail" in repr(e.value.report)


def test_promise_04_read_is_the_cure():
    torch.manual_seed(0)
    model, x = Reads(), torch.randn(4, 8)
    peftlab.wrap(model, "lora", r=2, targets=["body", "read", "head"], read=["read"])
    assert peftlab.check(model, x).ok


def test_promise_04_a_fused_path_that_ignores_the_adapter_is_found_although_the_gradient_is_there():
    """What nn.TransformerEncoderLayer does in eval, in a module that nobody knows."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            h = torch.tanh(self.b(h) if torch.is_grad_enabled() else F.linear(h, self.b.weight, self.b.bias))
            return self.c(h)

    torch.manual_seed(0)
    model, x = peftlab.wrap(Fused().eval(), "lora", r=2, targets=["a", "b", "c"]), torch.randn(4, 8)
    rows = rows_of(model, x)
    assert [rows[p].reached for p in "abc"] == [True] * 3
    assert [rows[p].moves for p in "abc"] == [True, False, True]
    assert "read=[{paths}]" in rows["b"].problems["moves"]
    assert [rows[p].merges for p in "abc"] == [True, False, True]


class Wrong(Method):
    """A low-rank change with a fault to choose."""

    additive = True
    fault = ""

    def __init__(self, base: Base, *, r: int = 2):
        super().__init__(base)
        self.A, self.B = nn.Parameter(torch.randn(r, base.n_in)), nn.Parameter(torch.zeros(base.n_out, r))
        if self.fault == "dead tensor":
            self.C = nn.Parameter(torch.zeros(3))
        if self.fault == "":  # a constant that is a parameter is no fault
            self.K = nn.Parameter(torch.ones(r), requires_grad=False)
        if self.fault == "unsaved buffer":
            self.register_buffer("S", torch.rand(r), persistent=False)
        if self.fault == "unsaved value":
            self.scale = 1.0

    def inner(self):
        A = self.A * self.S[:, None] if self.fault == "unsaved buffer" else self.A
        A = A * self.scale if self.fault == "unsaved value" else A * self.K.detach()[:, None] if self.fault == "" else A
        return A * 0 if self.fault == "no effect" else A.detach() if self.fault == "no gradient" else A

    def weight(self, W):
        return W + self.B @ self.inner()

    def forward(self, base: Base, x):
        if self.fault == "cut off":
            return base(x) + base.mix(self.B, base.apply(self.inner(), x)).detach()
        s = 2.0 if self.fault == "other forward" and base.path.endswith("1.v") else 1.0
        return base(x) + base.mix(self.B, s * base.apply(self.inner(), x))


@pytest.mark.parametrize(
    ("fault", "step", "paths", "remedy"),
    [
        ("", None, (), ""),
        ("dead tensor", "reached", ("layers.0.v", "layers.1.v", "layers.2.v"), "'C' of its tensors"),
        ("cut off", "reached", ("layers.0.v", "layers.1.v", "layers.2.v"), "the method's result does not depend on it"),
        ("no gradient", "reached", ("layers.0.v", "layers.1.v", "layers.2.v"), "'A' of its tensors"),
        ("no effect", "moves", ("layers.0.v", "layers.1.v", "layers.2.v"), "does not change the output"),
        ("unsaved buffer", "saves", ("layers.0.v", "layers.1.v", "layers.2.v"), "'S' is not the same after loading"),
        ("unsaved value", "saves", ("layers.0.v", "layers.1.v", "layers.2.v"), "something that acts is not saved"),
        ("other forward", "merges", ("layers.1.v",), "forward is not its definition"),
    ],
)
def test_promise_02_a_faulty_method_is_found_out(fault, step, paths, remedy, monkeypatch):
    monkeypatch.setattr(Wrong, "fault", fault)
    model = net().eval()
    peftlab.wrap(model, Wrong, targets="v")
    peftlab.wrap(model, "lora", r=2, targets="q", name="good")
    if fault == "unsaved value":
        for layer in model.layers:
            layer.v.peftlab.default.scale = 3.0
    if fault == "unsaved buffer":
        for layer in model.layers:
            layer.v.peftlab.default.S += 1
    before = everything(model)
    if step is None:
        assert peftlab.check(model, IDS).ok
    else:
        with pytest.raises(peftlab.CheckError, match=re.escape(remedy)) as e:
            peftlab.check(model, IDS)
        failed = {r.path for r in e.value.report.rows if getattr(r, step) is False}
        assert failed >= set(paths)
        assert fault == "unsaved value" or failed == set(paths)
        assert all(f"'{p}'" in str(e.value) for p in paths)
    assert_untouched(model, before)


@pytest.mark.parametrize("large", [False, True])
def test_check_puts_back_buffers_however_they_were_changed(large, monkeypatch):
    class Restless(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("behind", torch.arange(9))
            self.register_buffer("moved", torch.arange(3.0))
            self.register_buffer("bound", torch.arange(3.0), persistent=False)

        def forward(self, ids):
            self.behind.data += 1  # no version is counted
            self.moved.data = self.moved.data + 1
            self.bound = self.bound + 1
            self.register_buffer("new", torch.ones(1), persistent=False)
            return super().forward(ids) + torch.randn(4)  # in eval too

    if large:
        monkeypatch.setattr(sys.modules["peftlab.core.preserve"], "LARGE_BUFFER", 2)
    torch.manual_seed(0)
    model = peftlab.wrap(Restless(), "lora", r=2, targets="q")
    for training in (True, False):
        model.train(training)
        before = everything(model)
        assert peftlab.check(model, IDS).ok
        assert_untouched(model, before)


def test_check_finds_what_does_not_belong_in_the_file(monkeypatch):
    from peftlab.formats import save as save_file
    from peftlab.formats.file import read, write

    genuine = save_file.save

    def save(model, path, **kw):
        genuine(model, path, **kw)
        header, tensors = read(path)
        write(path, tensors | {"layers.0.q.stray": torch.ones(2)}, header)

    monkeypatch.setattr(save_file, "save", save)
    with pytest.raises(peftlab.CheckError, match=r"not saved.*'layers\.0\.q\.stray'"):
        peftlab.check(peftlab.wrap(net(), "lora", r=2, targets="q"), IDS)


def test_promise_09_an_unmerge_that_loses_a_bit_is_found(monkeypatch):
    there = sys.modules["peftlab.inspect.check.merges"]
    genuine = there.unmerge

    def unmerge(model, names=None):
        genuine(model, names)
        W = model.layers[1].q._parameters["weight"].data
        W[0, 0] = torch.nextafter(W[0, 0], torch.tensor(9.0))

    monkeypatch.setattr(there, "unmerge", unmerge)
    with pytest.raises(peftlab.CheckError, match=r"1 of 3 adapters.*\n.*'layers\.1\.q'.*does not give the frozen bits back"):
        peftlab.check(peftlab.wrap(net(), "lora", r=2, targets="q"), IDS)


def test_distances_see_behind_masks_and_not_numbers():
    inf, nan = float("inf"), float("nan")

    def distance(a, b, moved=None):
        return _distance(*([torch.tensor(t, dtype=torch.float64)] for t in (a, b, *([moved] if moved else []))))

    assert distance([1.0, -1e9, inf, nan], [1.0, -1e9, inf, nan]) == 0
    assert distance([2.0, -1e9, -inf], [2.5, -1e9, -inf]) == 0.25
    assert distance([2.0, 4.0, -1e9], [2.0, 4.4, -1e9], [1.0, 1.0, -1e9]) == pytest.approx(0.1)
    assert distance([2.0, 4.0, -1e9], [2.4, 4.0, -1e9], [1.0, 1.0, -1e9]) == pytest.approx(0.1)
    for a, b in (([nan], [1.0]), ([1.0], [nan]), ([inf], [1.0]), ([1.0], [inf]), ([inf], [-inf]), ([0.0], [1.0])):
        assert distance(a, b) == inf, (a, b)
    assert _distance([torch.ones(2)], [torch.ones(3)]) == inf


def test_bits_tell_tensors_apart():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool):
        for shape in ((), (1,), (7,), (3, 5), (0,)):
            t = (torch.randn(shape, generator=g) * 9).to(dtype)
            assert bits(t) == bits(t.clone())
            for i in range(t.numel()):
                other = t.clone()
                raw = other.reshape(-1).view(torch.uint8)
                raw[i * t.element_size()] ^= 1
                assert bits(other) != bits(t)
    t = torch.randn(4, 6, generator=g)
    assert bits(t.mT) == bits(t.mT.contiguous()) != bits(t)
    assert bits(t[1:, 1]) == bits(t[1:, 1].clone())
    assert bits(torch.arange(6.0)) != bits(torch.arange(6.0).flip(0))
    assert bits(torch.arange(7.0)[1:]) == bits(torch.arange(1.0, 7.0))


def test_check_in_the_middle_of_a_scheduled_run():
    """What a schedule remembers of the run is not the file's."""
    model = peftlab.wrap(net(), "adalora", r=1, init_r=2, targets="q")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    peftlab.schedule(model, optimizer, total_steps=30)
    loop(model, optimizer, 12)
    before = everything(model)
    assert peftlab.check(model, IDS).ok
    assert_untouched(model, before)


def test_check_names_what_cannot_be_saved(monkeypatch):
    model = peftlab.wrap(net(), "lora", r=2, targets="q")
    with torch.no_grad():
        model.head.weight += 1
    with pytest.raises(peftlab.CheckError, match=r"not saved.*head\.weight"):
        peftlab.check(model, IDS)


def test_check_after_a_forward_that_raises_leaves_everything_as_it_was():
    class Raises(Net):
        def forward(self, ids):
            y = super().forward(ids)
            if self.left == 0:
                raise KeyError("broken")
            self.left -= 1
            return y

    raised = 0
    for left in range(20):
        torch.manual_seed(0)
        model = Raises()
        model.left = left
        peftlab.wrap(model, "lora", r=2, targets="q")
        peftlab.wrap(model, "ia3", targets="v", name="frozen")
        peftlab.freeze(model, "frozen")
        before = everything(model)
        try:
            peftlab.check(model, IDS)
        except KeyError:
            raised += 1
        assert_untouched(model, before)
    assert 7 <= raised < 20


def test_check_refuses_what_it_cannot_judge():
    model = net()
    with pytest.raises(ValueError, match="no active adapter"):
        peftlab.check(model, IDS)
    peftlab.wrap(model, "lora", r=2, targets="q")
    stir(model)
    peftlab.merge(model)
    with pytest.raises(ValueError, match=r"'default' merged: unmerge"):
        peftlab.check(model, IDS)
    peftlab.unmerge(model)
    peftlab.activate(model, None)
    with pytest.raises(ValueError, match="no active adapter"):
        peftlab.check(model, IDS)
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ValueError, match="meta"):
        peftlab.check(peftlab.wrap(empty, "lora", r=2, targets="q"), IDS)
    silent = nn.Sequential(nn.Linear(8, 8))
    silent.forward = lambda x: None
    with pytest.raises(ValueError, match="no floating tensor"):
        peftlab.check(peftlab.wrap(silent, "lora", r=2, targets="0"), torch.randn(1, 8))


def test_check_writes_nowhere_it_can_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    peftlab.check(peftlab.wrap(net(), "lora", r=2, targets="q"), IDS)
    assert list(tmp_path.iterdir()) == []


def test_promise_23_check_looks_into_ddp(group):
    model = peftlab.wrap(net(), "lora", r=2, targets="q")
    ddp = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        before = everything(model)
        assert peftlab.check(ddp, IDS).ok
        assert_untouched(model, before)
        ddp(IDS).sum().backward()


@pytest.mark.skipif(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 7), reason="FSDP2 on the CPU needs torch 2.7")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_promise_55_report_and_watch_under_fsdp2_and_check_before_it(group):
    from torch.distributed.fsdp import fully_shard

    model = peftlab.wrap(net(), "lora", r=2, targets="q")
    want = peftlab.report(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = peftlab.report(model)
    assert (found.parameters, found.trainable, found.total) == (want.parameters, want.trainable, want.total)
    assert [(r.path, r.parameters, r.dtype) for r in found] == [(r.path, r.parameters, r.dtype) for r in want]
    with pytest.raises(ValueError, match="before fully_shard"):
        peftlab.check(model, IDS)
    optimizer = torch.optim.AdamW(peftlab.param_groups(model, 1e-2, b_ratio=2))
    watch = peftlab.watch(model, optimizer)
    loop(model, optimizer, 3)
    assert watch.done
    assert [r.used for r in peftlab.report(model)] == [True] * 3


def test_promise_39_two_trained_adapters_are_both_proved_and_a_missing_one_is_found():
    model = peftlab.wrap(net(), "lora", r=2, targets="q", name="a")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    peftlab.wrap(model, "lora", r=2, targets="q", name="b")
    found = peftlab.check(model, IDS)
    assert {(r.path, r.name) for r in found.rows} == {(f"layers.{i}.q", n) for i in range(3) for n in "ab"}
    with pytest.raises(ValueError, match=r"lacks 6 of 12 adapter tensors.*'layers\.0\.q\.peftlab\.b\.A'"):
        peftlab.watch(model, optimizer)
    optimizer.add_param_group({"params": [p for k, p in model.named_parameters() if ".b." in k]})
    peftlab.watch(model, optimizer)


# ---------------------------------------------------------------- watch


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=1e-3)])
def test_promise_11_a_sound_run_is_watched_and_let_go(make):
    model = peftlab.wrap(net(), "lora", r=2, targets=["q", "v"])
    optimizer = make(trained(model))
    watch = peftlab.watch(model, optimizer, steps=3)
    loop(model, optimizer, 1)  # B moves; the gradient of A is zero while B is
    assert not watch.done or isinstance(optimizer, torch.optim.AdamW)
    loop(model, optimizer, 2)
    assert watch.done
    assert not optimizer._optimizer_step_post_hooks


def test_promise_11_stale_references_raise_with_names():
    """The optimizer holds parameters that are no longer the model's: opacus#820."""
    model = peftlab.wrap(net(), "lora", r=2, targets=["q", "v"])
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    peftlab.watch(model, optimizer, steps=4)
    stale = model.layers[1].v.peftlab.default
    stale.B = nn.Parameter(stale.B.detach().clone())
    loop(model, optimizer, 3)
    with pytest.raises(RuntimeError, match=r"have not moved in 4 optimizer steps") as e:
        loop(model, optimizer, 1)
    # A stays too: its gradient is zero while B is.
    assert "'layers.1.v.peftlab.default.B'" in str(e.value)
    assert "layers.0" not in str(e.value)
    assert not optimizer._optimizer_step_post_hooks


def test_promise_11_an_unused_adapter_raises_with_names():
    class Unused(Net):
        def forward(self, ids):
            return self.head(self.layers[0](self.embed(ids)))

    torch.manual_seed(0)
    model = peftlab.wrap(Unused(), "lora", r=2, targets="q")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3, weight_decay=0.1)
    peftlab.watch(model, optimizer, steps=2)
    with pytest.raises(RuntimeError, match=r"4 adapter tensors.*layers\.1\.q.*have no gradient, check"):
        loop(model, optimizer, 2)


def test_promise_11_optimizers_that_lack_the_adapter_raise_at_once():
    """trl#6700: training with an empty optimizer."""
    model = peftlab.wrap(net(), "lora", r=2, targets="q")
    head = torch.optim.SGD(list(model.head.parameters()), lr=0.1)
    with pytest.raises(ValueError, match=r"lacks 6 of 6 adapter tensors.*'layers\.0\.q\.peftlab\.default\.A'"):
        peftlab.watch(model, head)
    empty = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    empty.param_groups[0]["params"].clear()
    with pytest.raises(ValueError, match="is empty"):
        peftlab.watch(model, empty)
    part = torch.optim.SGD([p for k, p in model.named_parameters() if k.endswith("default.B")], lr=0.1)
    with pytest.raises(ValueError, match=r"lacks 3 of 6 .*default\.A'") as e:
        peftlab.watch(model, part)
    assert "default.B" not in str(e.value)
    assert not any(o._optimizer_step_post_hooks for o in (head, empty, part))


def test_promise_11_nothing_to_watch_and_bad_steps_raise():
    model = peftlab.wrap(net(), "lora", r=2, targets="q")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for steps in (0, 1, -3, True, 2.0, "10"):
        with pytest.raises(ValueError, match="steps="):
            peftlab.watch(model, optimizer, steps=steps)
    with pytest.raises(TypeError):
        peftlab.watch(model, "sgd")
    peftlab.freeze(model)
    with pytest.raises(ValueError, match="no active adapter of this model trains"):
        peftlab.watch(model, optimizer)
    peftlab.unfreeze(model)
    peftlab.merge(stir(model))
    with pytest.raises(ValueError, match="no active adapter of this model trains"):
        peftlab.watch(model, optimizer)
    peftlab.unmerge(model)
    watch = peftlab.watch(model, optimizer, steps=2)
    grads = [p.requires_grad for p in peftlab.unwrap(model).parameters()]
    assert all(grads)
    loop(model, optimizer, 2)  # what is no longer there need not move
    assert watch.done


def test_promise_11_a_learning_rate_of_zero_is_named_and_remove_stops_the_watch():
    model = peftlab.wrap(net(), "lora", r=2, targets="q")
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    peftlab.watch(model, optimizer, steps=2)
    with torch.no_grad():
        model.layers[0].q.peftlab.default.B.neg_()  # -0.0 is no change
    with pytest.raises(RuntimeError, match=r"^6 adapter tensors.*learning rate"):
        loop(model, optimizer, 2)
    handle = peftlab.watch(model, optimizer, steps=2)
    handle.remove()
    loop(model, optimizer, 3)


def test_promise_11_in_place_training_is_watched_too():
    model = peftlab.wrap(net(), "full", in_place=True, targets="head.*")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    watch = peftlab.watch(model, optimizer)
    loop(model, optimizer, 1)
    assert watch.done
    with pytest.raises(ValueError, match="lacks"):
        peftlab.watch(model, torch.optim.SGD([model.head.weight], lr=0.1))


def test_watch_does_not_count_skipped_steps_and_lets_scheduled_methods_sleep():
    model = peftlab.wrap(net(), "full", gradual=True, targets="*.mlp.weight")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    peftlab.schedule(model, optimizer, total_steps=300)
    watch = peftlab.watch(model, optimizer, steps=3)
    loop(model, optimizer, 5)  # layers 0 and 1 sleep
    assert not watch.done
    model = peftlab.wrap(net(), "lora", r=2, targets="q")
    optimizer = torch.optim.AdamW(trained(model), lr=0.1, fused=True)
    watch = peftlab.watch(model, optimizer, steps=3)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # as GradScaler does after an overflow
    loop(model, optimizer, 1)
    assert watch.taken == 0
    assert len(watch.still) == 6
    optimizer.found_inf.zero_()
    loop(model, optimizer, 3)
    assert watch.done


def test_parts_that_were_wrapped_one_by_one_have_their_paths_in_the_whole():
    model = nn.ModuleDict({k: nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)) for k in ("enc", "dec")})
    for part in model.values():
        peftlab.wrap(part, "lora", r=2, targets=["0", "weight_ih_l0"])
    assert [r.path for r in peftlab.report(model)] == [f"{k}.{p}" for k in ("enc", "dec") for p in ("0", "1.weight_ih_l0")]
    peftlab.freeze(model, "default", targets="enc")
    assert [r.trainable for r in peftlab.report(model)] == [False, False, True, True]
    assert [r.path for r in peftlab.report(model["dec"])] == ["0", "1.weight_ih_l0"]
