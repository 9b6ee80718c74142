"""Rows of one batch with adapters of their own: what the law (test_conformance, law 13) does not say. Promise 38 is tested here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftlab


def moved(model: nn.Module, *names: str, method: str = "lora", **more) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    more = ({"r": 2} if method == "lora" else {}) | more
    for name in names:
        peftlab.wrap(model, method, name=name, **more)
    for k, p in model.named_parameters():
        if "peftlab" in k:
            p.data.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)).double()


def llama() -> nn.Module:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100, pad_token_id=0)
    return tf.LlamaForCausalLM(config).eval()


NAMES = ["a", None, "b", "a"]


def test_promise_38_rows_of_a_batch_have_their_own_adapters():
    model, x = moved(net(), "a", "b"), torch.randn(4, 6).double()
    with peftlab.route(model, NAMES):
        y = model(x)
    for i, name in enumerate(NAMES):
        with peftlab.using(model, name):
            torch.testing.assert_close(y[i], model(x[i]), rtol=1e-10, atol=1e-12)
    assert peftlab.active(model) == ["a", "b"]


def test_promise_38_an_unknown_name_raises_and_changes_nothing():
    model, x = moved(net(), "fr", "de"), torch.randn(2, 6).double()
    before = model(x)
    with pytest.raises(ValueError, match="'fx'.*Did you mean 'fr'"), peftlab.route(model, ["fr", "fx"]):
        pass
    assert torch.equal(model(x), before)


def test_state_is_put_back_after_an_exception():
    model, x = moved(net(), "a", "b"), torch.randn(2, 6).double()
    before = model(x)
    with pytest.raises(RuntimeError, match="mine"), peftlab.route(model, ["a", None]):
        raise RuntimeError("mine")
    assert torch.equal(model(x), before)
    assert peftlab.active(model) == ["a", "b"]


def test_a_batch_of_another_size_is_refused():
    model = moved(net(), "a", "b")
    with peftlab.route(model, ["a", "b", None]), pytest.raises(ValueError, match=r"\(4, 6\).*multiple of the 3 rows"):
        model(torch.randn(4, 6).double())


@pytest.mark.parametrize("call", [lambda m: peftlab.activate(m, "a"), lambda m: peftlab.wrap(m, "lora", r=2, name="c"), peftlab.unwrap, peftlab.merge])
def test_adapters_cannot_be_changed_inside(call):
    model = moved(net(), "a", "b")
    with peftlab.route(model, ["a", "b"]), pytest.raises(ValueError, match="leave the block first"):
        call(model)


def test_a_merged_adapter_is_refused():
    model = moved(net(), "a", "b")
    peftlab.merge(model, ["a", "b"])
    with pytest.raises(ValueError, match="unmerge it first"), peftlab.route(model, ["a", None]):
        pass


def test_in_place_training_is_refused():
    model = moved(net(), "a", method="full", in_place=True, targets="0")
    with pytest.raises(ValueError, match="trained in place"), peftlab.route(model, ["a", None]):
        pass


@pytest.mark.parametrize("names", ["a", 3, []])
def test_what_is_no_list_of_rows_is_refused(names):
    model = moved(net(), "a")
    with pytest.raises((TypeError, ValueError), match="one entry a row"), peftlab.route(model, names):
        pass


def test_flattened_tokens_and_beams_have_their_rows_side_by_side():
    model, x = moved(net(), "a", "b"), torch.randn(4, 5, 6).double()
    with peftlab.route(model, NAMES):
        torch.testing.assert_close(model(x.flatten(0, 1)).unflatten(0, (4, 5)), model(x))


def test_sequence_first_models_say_so():
    model, x = moved(net(), "a", "b"), torch.randn(7, 4, 6).double()
    with peftlab.route(model, NAMES):
        wanted = model(x.transpose(0, 1)).transpose(0, 1)
    with peftlab.route(model, NAMES, batch_dim=1):
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_a_parent_reads(batch_first, training):
    """Attention's projections and the encoder layer's linears are read, in eval mode by one fused kernel."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first), 2, enable_nested_tensor=False).double()
    model = moved(encoder, "a", "b", targets="*").train(training)
    classes = [type(m) for m in model.modules()]
    x, dim = torch.randn(4, 4, 8).double(), 0 if batch_first else 1
    with torch.set_grad_enabled(training):
        with peftlab.route(model, NAMES, batch_dim=dim):
            y = model(x)
        for i, name in enumerate(NAMES):
            with peftlab.using(model, name):
                torch.testing.assert_close(y.narrow(dim, i, 1), model(x.narrow(dim, i, 1)), rtol=1e-9, atol=1e-10)
    assert [type(m) for m in model.modules()] == classes


def test_gradients_reach_each_adapter_from_its_own_rows():
    model, x = moved(net(), "a", "b", "c"), torch.randn(4, 6).double()
    with peftlab.route(model, NAMES):
        model(x).square().sum().backward()
    found = {k: p.grad for k, p in model.named_parameters() if "peftlab" in k}
    assert all(g is None for k, g in found.items() if ".c." in k)
    model.zero_grad()
    for i, name in enumerate(NAMES):
        if name is not None:  # the frozen model alone has nothing to train
            with peftlab.using(model, name):
                model(x[i]).square().sum().backward()
    for k, p in model.named_parameters():
        if "peftlab" in k and ".c." not in k:
            torch.testing.assert_close(found[k], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointed_activations_are_computed_with_the_same_rows(inside):
    model, x = moved(net(), "a", "b"), torch.randn(4, 6).double()
    with peftlab.route(model, NAMES):
        model(x).square().sum().backward()
        wanted = [p.grad for k, p in model.named_parameters() if "peftlab" in k]
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=False).square().sum()
        if inside:
            y.backward()
    if not inside:
        y.backward()
    for a, b in zip([p.grad for k, p in model.named_parameters() if "peftlab" in k], wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_methods_mix_in_one_batch():
    model, x = moved(net(), "a"), torch.randn(5, 6).double()
    moved(model, "b", method="ia3", targets="*")
    moved(model, "c", method="full", targets="2")
    names = ["c", ["a", "b"], None, "b", ["b", "c"]]
    with peftlab.route(model, names):
        y = model(x)
    for i, name in enumerate(names):
        with peftlab.using(model, name):
            torch.testing.assert_close(y[i], model(x[i]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "oft", "full"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_gives_each_row_its_own_text(method, beams):
    model = moved(llama(), "a", "b", method=method)
    ids = torch.randint(1, 100, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    how = dict(max_new_tokens=6, do_sample=False, num_beams=beams)
    with torch.no_grad(), peftlab.route(model, NAMES):
        together = model.generate(ids, attention_mask=mask, **how)
    for i, name in enumerate(NAMES):
        with torch.no_grad(), peftlab.using(model, name):
            alone = model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **how)
        assert torch.equal(together[i, : alone.shape[1]], alone[0])


def test_a_refused_module_method_names_itself():
    class Surround(peftlab.Method):
        on = "module"

        def __init__(self, base):
            super().__init__(base)
            self.c = nn.Parameter(torch.ones(()))

        def forward(self, base, x):
            return self.c * base(x)

    model = peftlab.wrap(net(), Surround, targets="0", name="a")
    with pytest.raises(ValueError, match="'0' changes a call as a whole"), peftlab.route(model, ["a", None]):
        pass
    with peftlab.route(model, [None, None]):
        model(torch.randn(2, 6).double())


def test_a_module_that_runs_once_a_group_is_refused_what_it_would_write_to():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.eye(4))

        def forward(self, x, cache=None):
            if cache is not None:
                cache["seen"] = cache.get("seen", 0) + 1
            return x @ self.table

    model = nn.Module()
    model.mixer = Mixer()
    moved(model, "a", method="full", targets="table")
    with peftlab.route(model, ["a", None]):
        model.mixer(torch.randn(2, 4))
        with pytest.raises(ValueError, match="dict, which every run would write to"):
            model.mixer(torch.randn(2, 4), cache={})


@pytest.mark.parametrize("names", [["a", None, "b", "a"], ["a", "a", "b", "b"]])
def test_a_routed_batch_compiles_without_breaks(names):
    """After batches of several sizes, too, which make torch.compile take the size for a variable."""
    torch._dynamo.reset()
    model = moved(net(), "a", "b")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for before, sizes in (((4,), (4,)), ((6, 8), (4, 8, 12, 4))):
        for n in before:
            compiled(torch.randn(n, 6).double())
        for n in sizes:
            x = torch.randn(n, 6).double()
            with peftlab.route(compiled, names):
                torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_an_encoder_with_a_padding_mask_in_eval_mode():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    model, x, padding = moved(encoder, "a"), torch.randn(3, 5, 16), torch.zeros(3, 5).bool()
    padding[0, 4] = True
    with torch.no_grad():
        with peftlab.route(model, ["a", None, "a"]):
            y = model(x, src_key_padding_mask=padding)
        for i, name in enumerate(["a", None, "a"]):
            with peftlab.using(model, name):
                alone = model(x[i : i + 1], src_key_padding_mask=padding[i : i + 1])
            torch.testing.assert_close(y[i, : 5 - int(padding[i].sum())], alone[0, : 5 - int(padding[i].sum())], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [-1, "a", 1.0, True])
def test_a_batch_dimension_is_a_number_from_zero(dim):
    model = moved(net(), "a")
    with pytest.raises(ValueError, match="batch_dim"), peftlab.route(model, ["a"], batch_dim=dim):
        pass


def test_one_adapter_for_all_rows_counts_them_too():
    model = moved(net(), "a")
    with peftlab.route(model, ["a"] * 3):
        assert model(torch.randn(3, 6).double()).shape == (3, 4)
        with pytest.raises(ValueError, match="no multiple of the 3 rows"):
            model(torch.randn(2, 6).double())


@pytest.mark.parametrize("n", [3, 4])
def test_ids_without_a_batch_dimension_are_refused(n):
    """Whether four ids are four rows or the positions of all cannot be known."""
    model = moved(nn.Sequential(nn.Embedding(9, 6)), "a")
    with peftlab.route(model, (["a", None] * 2)[:n]):
        with pytest.raises(ValueError, match="batch dimension"):
            model(torch.arange(4))
        assert model(torch.arange(4)[None]).shape == (n, 4, 6)


def layers(batch_first: bool, norm_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()


AROUND = {"parallel": dict(dim=4, targets=":blocks"), "pfeiffer": dict(dim=4), "houlsby": dict(dim=4), "xlora": dict(r=2, dim=4)}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("method", AROUND)
def test_rows_around_blocks_with_the_sequence_first_are_refused(method, norm_first):
    """The first dimension counts tokens there, and whoever would take rows from it would give tokens adapters of their own."""
    x = torch.randn(4, 4, 8).double()
    model = moved(layers(False, norm_first), "a", method=method, **AROUND[method])
    for dim in (0, 1):
        with pytest.raises(ValueError, match="has the sequence there .* batch_first=True"), peftlab.route(model, ["a", None] * 2, batch_dim=dim):
            pass
    with peftlab.route(model, [None] * 4):
        y = model(x)
    with peftlab.disabled(model):
        torch.testing.assert_close(y, model(x))
    model = moved(layers(True, norm_first), "a", method=method, **AROUND[method])
    with peftlab.route(model, ["a", None] * 2):
        y = model(x)
    for i, name in enumerate(["a", None] * 2):
        with peftlab.using(model, name):
            torch.testing.assert_close(y[i], model(x[i : i + 1])[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["p_tuning_v2", "llama_adapter", "vpt", "vpt_shallow"])
def test_rows_of_methods_that_know_the_layout(method):
    more = dict(n=2, targets="layers.*", at=0) if "vpt" in method else dict(n=2)
    model, x = moved(layers(False), "a", "b", method=method, **more), torch.randn(5, 4, 8).double()
    with peftlab.route(model, NAMES):
        y = model(x)
    for i, name in enumerate(NAMES):
        with peftlab.using(model, name):
            torch.testing.assert_close(y[:, i], model(x[:, i : i + 1])[:, 0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "more"),
    [("lora", {}), ("oft", {}), ("houlsby", dict(dim=4)), ("p_tuning_v2", dict(n=2)), ("prompt_tuning", dict(n=2))],
    ids=str,
)
def test_a_batch_of_one_row_is_not_several(method, more):
    """Ids of positions are the same for all rows; a batch of one is a batch of another size."""
    model, ids = moved(llama(), "a", "b", method=method, **more), torch.randint(1, 100, (1, 6))
    with peftlab.route(model, ["a", "b", None]), pytest.raises(ValueError, match=r"got \(1, 6.*no multiple of the 3 rows"):
        model(ids)


def test_positions_that_all_rows_share():
    """A table of positions that is looked up once for all rows gives each row its own."""

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.places, self.out = nn.Embedding(9, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.out(x + self.places(torch.arange(x.shape[1])[None]))

    x = torch.randn(4, 5, 6).double()
    for method, more in (("lora", {}), ("full", {}), ("ia3", {})):
        model = moved(Placed().double(), "a", "b", method=method, targets="places", **more)
        with peftlab.route(model, NAMES):
            y = model(x)
        for i, name in enumerate(NAMES):
            with peftlab.using(model, name):
                torch.testing.assert_close(y[i], model(x[i : i + 1])[0], rtol=1e-9, atol=1e-10)


def test_positions_of_no_rows_are_refused():
    model = moved(llama(), "a", method="loreft")
    with peftlab.positions(model, torch.zeros(0, 6, dtype=torch.bool)), pytest.raises(ValueError, match="of 0 rows were named, and a batch of 3 came"):
        model(torch.randint(1, 100, (3, 6)))
