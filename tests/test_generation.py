"""One matrix for every method on activations, attention and tokens, and for every mixture: each of them on every architecture, in every way of running.

A row of `METHODS` (what follows a dash tells settings of one method apart) and one of `MODELS` is all that a pair says of itself; the pairs that are
refused, with the words of the refusal, are in `REFUSED`.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from tiny import Own, batch, hf, own, perturb
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlab

transformers = pytest.importorskip("transformers")

NEW = 6
GREEDY = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
METHODS = {
    "houlsby": dict(dim=4),
    "pfeiffer": dict(dim=4),
    "parallel": dict(dim=4),
    "loreft": dict(r=3),
    "prefix_tuning": dict(n=4, dim=8),
    "p_tuning_v2": dict(n=4),
    "p_tuning_v2-shift": dict(n=4, shift=True),
    "llama_adapter": dict(n=4),
    "prompt_tuning": dict(n=4),
    "prompt_tuning-template": dict(n=4, at=[0, 2, 2, 3]),
    "p_tuning": dict(n=4, at=1, dim=8),
    "p_tuning-lstm": dict(n=3, net="lstm", dim=8, depth=2),
    "vpt": dict(n=3),
    "vpt_shallow": dict(n=3),
    "mola": dict(r=2),
    "xlora": dict(experts=2, r=2),
}
ATTENTION = ("prefix_tuning", "p_tuning_v2", "p_tuning_v2-shift", "llama_adapter")
TOKENS = ("prompt_tuning", "prompt_tuning-template", "p_tuning", "p_tuning-lstm")
PATCHES = ("vpt", "vpt_shallow")
CAUSAL = ("llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
MODELS = (*CAUSAL, "t5", "bert", "vit")
REFUSED = {
    **{(m, name): "vpt finds nothing to sit at" for m in PATCHES for name in MODELS if name != "vit"},
    **{(m, "vit"): "finds nothing to sit at" for m in TOKENS},
    **{(m, "gemma2"): "caps the scores of its attention" for m in ATTENTION},  # torch's function has no such option
    ("xlora", "t5"): "one list of blocks",
    **{("p_tuning_v2-shift", name): "position ids that could be moved" for name in ("t5", "vit")},
}
QUICK = ("llama", "gpt2")  # the rest is the long matrix
PAIRS = [
    pytest.param(m, name, marks=() if name in QUICK or (m in PATCHES and name == "vit") else pytest.mark.slow)
    for m in METHODS for name in MODELS if (m, name) not in REFUSED
]  # fmt: skip


def pairs(names: tuple[str, ...]) -> list:
    return [p for p in PAIRS if p.values[1] in names]


def wrapped(method: str, model: nn.Module, size: float = 0.5, **more) -> nn.Module:
    return perturb(peftlab.wrap(model, method.partition("-")[0], **(METHODS[method] | more)), size)


def made(method: str, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    more = {}
    if name == "t5" and method == "loreft":
        more = dict(last=0)  # without a cache every token of the decoder is the last one once
    elif name == "t5" and "at" in METHODS[method]:
        more = dict(overrides={"decoder": {"at": "start"}})  # which begins with one token
    return wrapped(method, hf(name, dtype), dtype=dtype, **more)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """To so much of the largest entry."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-6)


# ---------------------------------------------------------------- the matrix


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_what_does_not_fit_says_why_and_changes_nothing(method, name):
    model = hf(name)
    before = {k: (id(m), type(m)) for k, m in model.named_modules()}, [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=REFUSED[method, name]):
        peftlab.wrap(model, method.partition("-")[0], **METHODS[method])
    assert before == ({k: (id(m), type(m)) for k, m in model.named_modules()}, [p.requires_grad for p in model.parameters()])


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_shapes_are_kept_everything_trains_and_the_base_comes_back(method, name):
    base, x = hf(name).requires_grad_(False), batch(name)
    wanted = base(**x).logits
    model = made(method, name)
    y = model(**x).logits
    assert y.shape == wanted.shape
    assert not torch.allclose(y, wanted)
    y.square().sum().backward()
    assert own(model)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own(model).values())
    with peftlab.disabled(model), torch.no_grad():
        assert torch.equal(model(**x).logits, wanted)
    assert peftlab.check(model, **x).ok
    peftlab.unwrap(model)
    assert torch.equal(model.requires_grad_(False)(**x).logits, wanted)


@pytest.mark.parametrize(("method", "name"), pairs((*CAUSAL, "t5")))
def test_generation(method, name):
    """Left-padded rows with a cache are those without, each is the row alone, and beams do not depend on the cache either."""
    model, x = made(method, name), batch(name, rows=3)
    x.pop("labels", None)
    y = model.generate(**x, **GREEDY)
    assert not torch.equal(y, hf(name).generate(**x, **GREEDY))
    with without_cache(method, model, x):
        assert torch.equal(y, model.generate(**x, use_cache=False, **GREEDY))
    alone = {k: v[:1, 3:] for k, v in x.items()}
    assert torch.equal(model.generate(**alone, **GREEDY)[0, -NEW:], y[0, -NEW:])
    beams = model.generate(**x, num_beams=3, **GREEDY)
    with without_cache(method, model, x):
        assert torch.equal(beams, model.generate(**x, num_beams=3, use_cache=False, **GREEDY))
    best = model.generate(**alone, num_beams=3, **GREEDY)
    assert torch.equal(best[0, -NEW:], beams[0, -NEW:])


def without_cache(method: str, model: nn.Module, x: dict):
    """loreft edits tokens of the prompt: where every step runs the whole sequence again, it is told which these are."""
    told = method == "loreft" and not model.config.is_encoder_decoder
    return peftlab.positions(model, x["attention_mask"].bool()) if told else contextlib.nullcontext()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_both_runs_of_xlora_keep_their_caches_in_step(name):
    """The user's own loop, a copied cache, one that is cut back; and one that other adapters have filled is refused."""
    model, x = made("xlora", name), batch(name, rows=1)["input_ids"][:, 3:]
    wanted = model(input_ids=x, use_cache=False).logits
    first = model(input_ids=x[:, :3], use_cache=True)
    branch = copy.deepcopy(first.past_key_values)
    cache = first.past_key_values
    steps = [model(input_ids=x[:, i : i + 1], past_key_values=cache).logits for i in range(3, x.shape[1])]
    close(torch.cat([first.logits, *steps], 1), wanted, 1e-4)
    close(model(input_ids=x[:, 3:4], past_key_values=branch).logits, wanted[:, 3:4], 1e-4)
    if name != "gemma3":  # sliding windows forget what cutting back would need
        branch.crop(-2)
        close(model(input_ids=x[:, 2:4], past_key_values=branch).logits, wanted[:, 2:4], 1e-4)
    with peftlab.disabled(model):
        alone = model(input_ids=x[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=x[:, 3:4], past_key_values=alone)
    close(model(input_ids=x, use_cache=False).logits, wanted, 0)  # the refusal has left nothing behind


def test_two_mixtures_each_keep_a_cache_of_their_own():
    model, x = made("xlora", "llama"), batch("llama", rows=2)
    x.pop("labels", None)
    wrapped("xlora", model, 0.3, name="second")
    peftlab.activate(model, ["default", "second"])
    assert torch.equal(model.generate(**x, **GREEDY), model.generate(**x, use_cache=False, **GREEDY))
    with peftlab.route(model, ["default", "second"]):
        assert torch.equal(model.generate(**x, **GREEDY), model.generate(**x, use_cache=False, **GREEDY))


@pytest.mark.parametrize(("method", "name"), pairs(CAUSAL))
def test_a_static_cache_is_refused_or_gives_the_same(method, name):
    model, x = made(method, name), batch(name)
    y = model.generate(**x, **GREEDY)
    if method in TOKENS:
        with pytest.raises(ValueError, match="static"):
            model.generate(**x, cache_implementation="static", **GREEDY)
    else:
        assert torch.equal(model.generate(**x, cache_implementation="static", **GREEDY), y)
    assert torch.equal(model.generate(**x, **GREEDY), y)


@pytest.mark.parametrize(("method", "name"), pairs((*CAUSAL, "bert")))
def test_a_padded_row_is_the_row_alone(method, name):
    dtype, tolerance = (torch.float32, 1e-4) if name == "gemma2" else (torch.float64, 1e-10)  # gemma2 has no numbers for padding in float64
    model, x = made(method, name, dtype), batch(name)
    at = (x["attention_mask"].cumsum(1) - 1).clamp_min(0)  # transformers counts padding where it is not told otherwise
    alone = model(input_ids=x["input_ids"][:1, 3:], attention_mask=x["attention_mask"][:1, 3:]).logits
    close(model(**x, position_ids=at).logits[:1, 3:], alone, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), pairs(("llama", "gpt2", "gemma3", "t5", "bert", "vit")))  # the others run the code of llama
def test_compile_without_breaks(method, name):
    model, x = made(method, name), batch(name)
    mine = list(own(model).values())
    kw = dict(use_cache=False) if method == "xlora" else {}
    torch._dynamo.reset()
    compiled = torch.compile(lambda **x: model(**x, **kw).logits, fullgraph=True, backend="aot_eager")
    wanted, y = model(**x, **kw).logits, compiled(**x)
    close(y, wanted, 1e-4)
    for a, b in zip(torch.autograd.grad(y.square().sum(), mine), torch.autograd.grad(wanted.square().sum(), mine), strict=True):
        close(a, b, 1e-3)


def without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        for name, value in vars(m).items():
            if "drop" in name and isinstance(value, float):
                setattr(m, name, 0.0)
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def gradients(model: nn.Module, x: dict) -> dict[str, Tensor]:
    model.zero_grad()
    model(**x, **({} if "pixel_values" in x else {"use_cache": False})).logits.square().mean().backward()
    return {k: p.grad.clone() for k, p in own(model).items()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_checkpointing(method, name, reentrant):
    """Of transformers, both kinds: the same gradients; where the reentrant one would lose some, that is said before any is lost."""
    model, x = without_dropout(made(method, name, torch.float64 if name == "t5" else torch.float32)).train(), batch(name)  # whose gradients are tiny
    wanted = gradients(model, x)
    assert all(g.abs().max() > 0 for g in wanted.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant and method == "xlora":
        with pytest.raises(RuntimeError, match="use_reentrant"):
            gradients(model, x)
        return
    if reentrant and name == "vit":  # transformers makes the embeddings of texts ask for a gradient, those of images not
        with pytest.raises(RuntimeError, match="no gradient|reentrant"):
            gradients(model, x)
        return
    found = gradients(model, x)
    for k, g in wanted.items():
        close(found[k], g, 1e-4)


# ---------------------------------------------------------------- a model of one's own


PLACED = {
    **{m: dict(targets="widen.*") for m in ("houlsby", "pfeiffer", "parallel", "loreft", "mola")},
    **{m: dict(targets="mixers.*", width=8) for m in ("prefix_tuning", "p_tuning_v2")},
    **{m: dict(targets="", causal=False) for m in TOKENS},
}


@pytest.mark.parametrize("method", PLACED)
def test_an_own_transformer_with_nothing_but_patterns(method, tmp_path):
    """Rows padded at their ends are the rows alone, a file brings the adapter back, and recomputed blocks give the same gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Own().double()
    state = base.state_dict()
    ids, mask = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(2)), torch.ones(3, 7)
    mask[1, 5:] = 0
    plain = base(ids, mask)
    model = wrapped(method, base, dtype=torch.float64, **PLACED[method])
    y = model(ids, mask)
    assert y.shape == plain.shape
    assert not torch.allclose(y, plain)
    if method != "loreft":  # a layer that is called without a mask edits the last column
        close(model(ids[1:2, :5], mask[1:2, :5])[0], y[1, :5], 1e-10)
    mine = list(own(model).values())
    wanted = torch.autograd.grad(y.square().sum(), mine)
    assert all(g.abs().max() > 0 for g in wanted)
    again = checkpoint(model, ids, mask, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), mine), wanted, strict=True):
        close(a, b, 1e-10)
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = Own().double()
    fresh.load_state_dict({k: v for k, v in state.items() if "peftlab" not in k})
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(ids, mask), y)


# ---------------------------------------------------------------- a real language model


# How far the trained tensors are moved: so that the text changes and is not noise.
MOVED = {"houlsby": 0.02, "pfeiffer": 0.02, "parallel": 0.02, "loreft": 0.2, "llama_adapter": 0.2, "mola": 0.02, "xlora": 0.05}


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m not in PATCHES])
def test_a_real_models_generation(smol, method):
    model, ids = smol
    texts = [ids("The capital of France is"), ids("The dog is in"), ids("My name is")]
    x = torch.full((3, 5), 2)
    for row, text in zip(x, texts, strict=True):
        row[5 - len(text) :] = torch.tensor(text)
    x = {"input_ids": x, "attention_mask": torch.tensor([[0] * (5 - len(t)) + [1] * len(t) for t in texts])}
    short = GREEDY | dict(max_new_tokens=5)
    plain = model.generate(**x, **short)
    wrapped(method, model, MOVED.get(method, 0.02))
    y = model.generate(**x, **short)
    assert not torch.equal(y, plain)
    with without_cache(method, model, x):
        assert torch.equal(y, model.generate(**x, use_cache=False, **short))
    for i, text in enumerate(texts):
        alone = model.generate(torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long), **short)
        assert torch.equal(alone[0, -5:], y[i, -5:])
    two = dict(num_beams=2) | (short | dict(max_new_tokens=3))
    beams = model.generate(**x, **two)
    with without_cache(method, model, x):
        assert torch.equal(beams, model.generate(**x, use_cache=False, **two))
    one = {k: v[2:, 2:] for k, v in x.items()}
    assert torch.equal(model.generate(**one, **two)[0, 3:], beams[2, 5:])
    with peftlab.disabled(model):
        assert torch.equal(model.generate(**x, **short), plain)
