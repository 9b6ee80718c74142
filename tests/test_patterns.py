"""What a pattern means: plain names, globs, expressions, callables; targets, exclude, overrides, layers; and what is said when it means nothing."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftlab
from peftlab.model.patterns import PatternError

DIM, VOCAB, LAYERS = 4, 10, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(DIM, DIM) for _ in range(4))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp, self.norm = Attention(), MLP(), nn.LayerNorm(DIM)


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.lm_head = Trunk(), nn.Linear(DIM, VOCAB, bias=False)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)


class MoEBlock(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gate, self.experts = nn.Linear(DIM, n), nn.ModuleList(Expert() for _ in range(n))


class MoE(nn.Module):
    def __init__(self, layers=3, experts=4):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(MoEBlock(experts) for _ in range(layers))


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.decoder = nn.ModuleList(Block() for _ in range(3))


def paths(model, method="lora", **kw):
    if method == "lora":
        kw.setdefault("r", 1)
    return [row.path for row in peftlab.plan(model, method, **kw).rows]


LINEARS = [p for p, m in LM().named_modules() if isinstance(m, nn.Linear)]
MATRICES = [p for p, m in LM().named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]


# ---------------------------------------------------------------- an independent matcher


def spread(pattern: str) -> list[str]:
    """All spellings of a brace pattern, by hand: the first closing brace ends the innermost opening one."""
    close = pattern.find("}")
    start = pattern.rfind("{", 0, close) if close >= 0 else -1
    if start < 0:
        return [pattern]
    return list(itertools.chain(*(spread(pattern[:start] + alt + pattern[close + 1 :]) for alt in pattern[start + 1 : close].split(","))))


def glob(p: str, s: str) -> bool:
    """One glob against one string, a character at a time."""
    if not p:
        return not s
    if p[0] == "*":
        return any(glob(p[1:], s[i:]) for i in range(len(s) + 1))
    if p[0] == "[" and "]" in p[2:]:
        end = p.index("]", 2)
        body = p[1:end]
        hit = bool(s) and ((s[0] not in body[1:]) if body[0] == "!" else s[0] in body)
        return hit and glob(p[end + 1 :], s[1:])
    return bool(s) and p[0] in ("?", s[0]) and glob(p[1:], s[1:])


def means(pattern: str, path: str) -> bool:
    if not any(c in pattern for c in "*?[{"):
        mine = pattern.split(".")
        return path.split(".")[-len(mine) :] == mine
    return any(glob(p, path) for p in spread(pattern))


def expected(pattern: str) -> list[str]:
    return [p for p in MATRICES if means(pattern, p) or means(pattern, f"{p}.weight")]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", LAYERS), ("self_attn.q_proj", LAYERS), ("model.layers.0.self_attn.q_proj", 1), ("0.self_attn.q_proj", 1),
        ("*.q_proj", LAYERS), ("*.{q,v}_proj", 2 * LAYERS), ("*.{q,{k,v}}_proj", 3 * LAYERS), ("model.layers.?.mlp.*", 2 * LAYERS),
        ("model.layers.[02].self_attn.*", 8), ("model.layers.[!0].self_attn.q_proj", LAYERS - 1), ("*", len(MATRICES)),
        ("*_proj", 6 * LAYERS), ("lm_head", 1), ("embed_tokens", 1), ("q_proj.weight", LAYERS), ("*.1.*", 6), ("model.*.self_attn.{q,k}_proj", 2 * LAYERS),
    ],
)  # fmt: skip
def test_strings(pattern, count):
    assert len(expected(pattern)) == count
    assert paths(LM(), targets=pattern) == expected(pattern)


NOT_HERE = ["proj", "q_pro", "elf_attn.q_proj", "attn.q_proj", "q_proj.", ".q_proj", "Q_PROJ", "*.Q_proj", "q_proj*", "layers.4.*", "", "0.q_proj"]


@pytest.mark.parametrize("pattern", NOT_HERE)
def test_a_plain_name_is_whole_components_and_a_glob_the_whole_path(pattern):
    assert not expected(pattern)
    with pytest.raises(PatternError):
        paths(LM(), targets=pattern)


PIECES = ["*", "?", ".", "model", "layers", "0", "2", "self_attn", "mlp", "q", "_proj", "{q,v}", "{up,down}", "[qk]", "[!v]", "[13]", "lm_head"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))
def test_any_string_means_what_the_naive_matcher_says(pieces):
    pattern = "".join(pieces)
    want = expected(pattern)
    if want:
        assert paths(LM(), targets=pattern) == want
    else:
        with pytest.raises(PatternError):
            paths(LM(), targets=pattern)


def test_expressions_are_matched_in_full():
    assert paths(LM(), targets=re.compile(r".*layers\.[13]\..*q_proj")) == ["model.layers.1.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]
    with pytest.raises(PatternError, match=r"layers.*matches nothing"):
        paths(LM(), targets=re.compile(r"layers\.1"))


def test_callables_get_the_path_and_the_module_there():
    model = LM()
    calls = []

    def wide(path, module):
        calls.append((path, module))
        return getattr(module, "out_features", 0) == 2 * DIM

    assert paths(model, targets=wide) == [f"model.layers.{i}.mlp.up_proj" for i in range(LAYERS)]
    here = dict(model.named_modules())
    for path, module in calls:  # a parameter's path comes with the module that owns it
        assert here.get(path, here.get(path.rpartition(".")[0])) is module, path


@pytest.mark.parametrize("argument", ["exclude", "overrides"])
def test_callables_for_blocks_get_the_block(argument):
    """`lambda p, m: isinstance(m, Block)` must see blocks, not the layers inside them."""
    model, calls = LM(), []

    def second(path, module):
        calls.append((path, module))
        return isinstance(module, MLP)

    kw = {"exclude": second} if argument == "exclude" else {"overrides": {second: dict(r=2)}}
    plan = peftlab.plan(model, "lora", r=1, targets="*_proj", **kw)
    here = dict(model.named_modules())
    for path, module in calls:
        assert here.get(path, here.get(path.rpartition(".")[0])) is module, path
    if argument == "exclude":
        assert [r.path for r in plan.rows] == [p for p in LINEARS if "self_attn" in p]
    else:
        assert {r.path: r.options["r"] for r in plan.rows} == {p: 2 if "mlp" in p else 1 for p in LINEARS if p != "lm_head"}


def test_a_list_is_a_union_in_the_models_order():
    union = ["v_proj", re.compile(r".*\.0\..*q_proj"), "*.0.self_attn.?_proj"]
    want = sorted({*expected("v_proj"), *expected("*.0.self_attn.?_proj")}, key=MATRICES.index)
    for order in itertools.permutations(union):
        assert paths(LM(), targets=list(order)) == want
    assert paths(LM(), targets=tuple(union)) == want


# ---------------------------------------------------------------- defaults


def test_default_is_every_linear_but_the_head():
    assert paths(LM()) == [p for p in LINEARS if p != "lm_head"]
    assert paths(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))) == ["0"]
    assert paths(nn.Linear(3, 4)) == [""]
    assert paths(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3))) == ["0", "2"]


def test_default_of_selective_methods_is_every_tensor_they_fit():
    rows = paths(LM(), "bitfit")
    assert rows == [n for n, _ in LM().named_parameters() if n.endswith("bias")]


# ---------------------------------------------------------------- what does not fit


def test_a_glob_passes_over_what_does_not_fit():
    assert paths(LM(), targets="model.layers.0.*") == [p for p in LINEARS if p.startswith("model.layers.0.")]
    assert paths(LM(), "tokens", targets="*", ids=[1]) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("method", "target", "kw", "words"),
    [
        ("lora", "norm", dict(r=1), ["'norm'", "LayerNorm", "lora does not fit"]),
        ("lora", "self_attn", dict(r=1), ["'self_attn'", "Attention", "lora does not fit", "use a glob", "q_proj"]),
        ("tokens", "lm_head", dict(ids=[1]), ["'lm_head'", "Linear", "tokens does not fit"]),
        ("oft", "embed_tokens", dict(block_size=2), ["'embed_tokens'", "Embedding", "oft does not fit"]),
        ("bitfit", "lm_head", {}, ["'lm_head'", "bitfit does not fit"]),
    ],
)
def test_a_plain_name_that_only_meets_what_does_not_fit_raises(method, target, kw, words):
    with pytest.raises(PatternError) as e:
        paths(LM(), method, targets=target, **kw)
    for word in words:
        assert word in str(e.value)


# ---------------------------------------------------------------- messages and counts


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("q_porj", "q_proj"),
        ("query_proj", "q_proj"),
        ("lmhead", "lm_head"),
        ("embed_token", "embed_tokens"),
        ("mlp.upproj", "mlp.up_proj"),
        ("model.layer.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_the_nearest_right_name_is_said(wrong, right):
    with pytest.raises(PatternError, match="matches nothing") as e:
        paths(LM(), targets=wrong)
    said = re.findall(r"'([^']*)'", str(e.value).split("Did you mean")[1])
    assert 1 <= len(said) <= 3
    assert any(s.endswith(right) for s in said), said
    assert all(s in MATRICES for s in said)  # real names only


def test_every_pattern_must_match_and_the_others_counts_are_said():
    with pytest.raises(PatternError) as e:
        paths(LM(), targets=["q_proj", "v_porj", "*.mlp.*", "gone"])
    text = str(e.value)
    assert "'v_porj' matches nothing" in text
    assert "'gone' matches nothing" in text
    assert re.search(rf"'?q_proj'?\W+{LAYERS}\b", text)
    assert re.search(rf"mlp\.\*'?\W+{2 * LAYERS}\b", text)


@pytest.mark.parametrize(
    "kw",
    [
        dict(exclude="gone"),
        dict(exclude=["lm_head", "k_porj"]),
        dict(overrides={"gone": dict(r=2)}),
        dict(overrides={"*.k_proj": dict(r=2)}, targets="q_proj"),
        dict(split={"gone": {"q": 1}}),
        dict(layout={"gone": "oi"}),
        dict(read="gone"),
        dict(layers=[0], of="gone"),
    ],
)
def test_every_other_pattern_must_match_too(kw):
    with pytest.raises(PatternError, match="match"):
        paths(LM(), **{"targets": "*", **kw})


def test_counts_are_per_pattern_and_uneven_ones_visible():
    model = LM()
    model.model.layers[2].self_attn.v_proj = nn.Identity()
    plan = peftlab.plan(model, "lora", r=1, targets=["q_proj", "v_proj", re.compile(r".*\.o_proj")])
    assert list(plan.counts.values()) == [LAYERS, LAYERS - 1, LAYERS]
    assert plan.counts["q_proj"] == LAYERS
    assert plan.counts["v_proj"] == LAYERS - 1
    for word in ("q_proj", "v_proj", str(LAYERS), str(LAYERS - 1)):
        assert word in repr(plan)


# ---------------------------------------------------------------- exclude


def test_exclude_takes_away_a_layer_or_everything_below():
    all_of = [p for p in LINEARS if p != "lm_head"]
    assert paths(LM(), exclude="mlp") == [p for p in all_of if ".mlp." not in p]
    assert paths(LM(), exclude=["q_proj", "*.mlp.up_proj"]) == [p for p in all_of if not p.endswith(("q_proj", "up_proj"))]
    assert paths(LM(), exclude="model.layers.0") == [p for p in all_of if ".0." not in p]
    last = ["model.embed_tokens", *(p for p in LINEARS if p == "lm_head" or ".3." in p)]
    assert paths(LM(), targets="*", exclude=re.compile(r"model\.layers\.[012]")) == last
    assert paths(LM(), exclude="lm_head") == all_of  # left out already, but it is there


def test_exclude_of_something_real_that_the_method_does_not_take():
    assert paths(LM(), exclude="norm") == [p for p in LINEARS if p != "lm_head"]


def test_excluding_everything_raises():
    with pytest.raises(PatternError, match="nothing is left"):
        paths(LM(), targets="q_proj", exclude="self_attn")


# ---------------------------------------------------------------- overrides


def ranks(**kw):
    return {r.path: r.options["r"] for r in peftlab.plan(LM(), "lora", **{"r": 1, "targets": "*.{q,v}_proj", **kw}).rows}


def test_an_override_acts_on_its_sites_alone():
    found = ranks(overrides={"v_proj": dict(r=2), "model.layers.0": dict(alpha=3.0)})
    assert found == {p: 2 if p.endswith("v_proj") else 1 for p in found}
    plan = peftlab.plan(LM(), "lora", r=1, targets="*.{q,v}_proj", overrides={"model.layers.0": dict(alpha=3.0)})
    assert {r.path: r.options["alpha"] for r in plan.rows} == {p: 3.0 if ".0." in p else 16.0 for p in found}
    model = peftlab.wrap(LM(), "lora", r=1, targets="*.{q,v}_proj", overrides={"v_proj": dict(r=2)})
    assert {p: model.get_submodule(p).peftlab.default.A.shape[0] for p in found} == found


def test_the_more_specific_override_wins_in_any_order():
    cases = [("v_proj", 2), ("model.layers.0.self_attn.v_proj", 3), ("*.1.self_attn.v_proj", 4), ("*", 5), (re.compile(r".*"), 5)]
    for order in itertools.permutations(cases):
        found = ranks(overrides={p: dict(r=min(r, 4)) for p, r in order})
        assert found["model.layers.0.self_attn.v_proj"] == 3
        assert found["model.layers.1.self_attn.v_proj"] == 4
        assert found["model.layers.2.self_attn.v_proj"] == 2
        assert found["model.layers.2.self_attn.q_proj"] == 4


def test_overrides_of_different_options_add_up():
    plan = peftlab.plan(LM(), "lora", r=1, targets="v_proj", overrides={"*.v_proj": dict(r=2, alpha=1.0), "model.layers.0.self_attn.v_proj": dict(r=3)})
    row = next(r for r in plan.rows if ".0." in r.path)
    assert (row.options["r"], row.options["alpha"]) == (3, 1.0)


def test_a_tie_raises_unless_both_say_the_same():
    with pytest.raises(PatternError, match="neither is more specific") as e:
        ranks(overrides={"*.0.*_proj": dict(r=2), "*.*.v_proj": dict(r=3), "*.1.*_proj": dict(r=2)})
    assert "*.0.*_proj" in str(e.value)
    assert "*.*.v_proj" in str(e.value)
    assert "model.layers.0.self_attn.v_proj" in str(e.value)
    same = ranks(overrides={"*.0.*_proj": dict(r=2), "*.*.v_proj": dict(r=2)})
    assert same == {p: 2 if p.endswith("v_proj") or ".0." in p else 1 for p in same}
    with pytest.raises(PatternError, match="neither is more specific"):
        ranks(overrides={re.compile(r".*v_proj"): dict(r=2), re.compile(r".*\.0\..*"): dict(r=3)})


def test_a_tie_below_the_winner_does_not_matter_in_any_order():
    rules = [("*.0.*_proj", 2), ("*.*.v_proj", 3), ("model.layers.0.self_attn.v_proj", 4)]
    for order in itertools.permutations(rules):
        found = ranks(targets="model.layers.0.self_attn.v_proj", overrides={p: dict(r=r) for p, r in order})
        assert found == {"model.layers.0.self_attn.v_proj": 4}, [p for p, _ in order]


@pytest.mark.parametrize("changes", [dict(rank=2), dict(r=0), dict(r=99)])
def test_an_impossible_override_names_itself(changes):
    with pytest.raises((TypeError, ValueError)) as e:
        ranks(overrides={"v_proj": changes})
    assert "v_proj" in str(e.value)
    assert ("rank" in str(e.value) and "'r'" in str(e.value)) or "r=" in str(e.value)


# ---------------------------------------------------------------- layers


def test_layers_with_negative_and_root_level_indices():
    want = [p for p in LINEARS if ".0." in p or ".3." in p]
    assert paths(LM(), layers=[0, -1]) == want
    assert paths(LM(), layers=[0, -1], of="model.layers") == want
    assert paths(LM(), layers=-1, of="layers") == [p for p in LINEARS if ".3." in p]
    assert paths(LM(), layers=range(2, 4), targets="q_proj") == ["model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]
    root = nn.ModuleList(Block() for _ in range(3))
    assert paths(root, layers=[-1], targets="q_proj") == ["2.self_attn.q_proj"]
    root = nn.Sequential(*(Block() for _ in range(12)))
    assert paths(root, layers=[1], targets="q_proj") == ["1.self_attn.q_proj"]  # and not 11


def test_layers_are_blocks_and_not_experts():
    found = paths(MoE(), layers=[0, -1], of="model.layers", targets="*")
    want = [p for p, m in MoE().named_modules() if isinstance(m, nn.Linear) and p.startswith(("model.layers.0.", "model.layers.2."))]
    assert found == want
    assert len(found) == 2 * (1 + 4 * 2)
    assert paths(MoE(), layers=[0, -1], targets="*") == want
    assert paths(MoE(), layers=[3], of="model.layers.1.experts", targets="*") == ["model.layers.1.experts.3.w1", "model.layers.1.experts.3.w2"]


def test_layers_of_an_ambiguous_model_must_say_which():
    with pytest.raises(PatternError) as e:
        paths(EncoderDecoder(), layers=[0])
    assert "'encoder'" in str(e.value)
    assert "'decoder'" in str(e.value)
    assert "of=" in str(e.value)
    assert paths(EncoderDecoder(), layers=[2], of="decoder", targets="q_proj") == ["decoder.2.self_attn.q_proj"]
    with pytest.raises(PatternError, match="encoder"):
        paths(EncoderDecoder(), layers=[0], of="encoders")
    with pytest.raises(PatternError):
        paths(MoE(), layers=[0], of="experts")  # three lists of that name


@pytest.mark.parametrize("layers", [[4], [-5], [True], ["0"], "0", [1.0], 7, [None], []])
def test_a_layer_that_is_not_there_raises(layers):
    with pytest.raises((ValueError, TypeError)) as e:
        paths(LM(), layers=layers)
    if layers and layers != "0":  # a text is no list of indices at all
        assert "model.layers" in str(e.value)
        assert "4" in str(e.value)


def test_of_without_layers_raises():
    with pytest.raises(ValueError, match="layers="):
        paths(LM(), of="model.layers")
    with pytest.raises(PatternError):
        paths(nn.Linear(2, 2), layers=[0])


# ---------------------------------------------------------------- parameters by name


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, DIM, 2 * DIM))
        self.down_proj = nn.Parameter(torch.randn(3, 2 * DIM, DIM))


def test_a_pattern_may_name_a_parameter():
    model = nn.ModuleDict({"experts": Experts(), "attn": nn.MultiheadAttention(DIM, 2)})
    rows = paths(model, targets="experts.gate_up_proj", layout={"gate_up_proj": "eio"})
    assert rows == [f"experts.gate_up_proj.{e}" for e in range(3)]
    assert paths(model, targets="experts.gate_up_proj.1", layout={"gate_up_proj": "eio"}) == ["experts.gate_up_proj.1"]
    assert paths(model, targets="in_proj_weight") == ["attn.in_proj_weight"]
    assert paths(model, targets="attn.q_proj") == ["attn.q_proj"]
    plain = paths(model, targets="*")
    assert "attn.in_proj_weight" not in plain
    assert "attn.q_proj" in plain
    assert peftlab.plan(model, "full", targets="experts.*").rows[0].path == "experts.gate_up_proj"


def test_every_path_of_a_shared_module_means_it_and_it_is_one_site():
    model = LM()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert paths(model, targets="mlp.up_proj") == [f"model.layers.{i}.mlp.up_proj" for i in (0, 2, 3)]
    assert paths(model, targets="model.layers.1.mlp.up_proj") == ["model.layers.0.mlp.up_proj"]


def test_library_modules_are_never_targets():
    model = peftlab.wrap(LM(), "lora", r=1)
    assert paths(model, targets="*", name="second") == MATRICES
    assert [p for p in paths(model, "full", targets="*", name="second") if "peftlab" in p] == []
    with pytest.raises(PatternError):
        paths(model, targets="*.peftlab.*", name="second")


def fused() -> nn.Module:
    return nn.ModuleDict({"qkv": nn.Linear(16, 40), "out": nn.Linear(16, 16), "head": nn.Linear(16, 16)})


SPLIT = {"qkv": {"q": 16, "k": 12, "v": 12}}


@pytest.mark.parametrize("targets", ["*", None])
def test_a_fused_projection_that_was_split_is_meant_by_its_parts(targets):
    rows = peftlab.plan(fused(), "lora", r=2, split=SPLIT, targets=targets, exclude="head" if targets else None).rows
    assert [r.path for r in rows] == ["qkv.q", "qkv.k", "qkv.v", "out"]
    assert [r.path for r in peftlab.plan(fused(), "lora", r=2, split=SPLIT, targets="qkv").rows] == ["qkv"]


@pytest.mark.parametrize(("model", "targets", "split"), [(fused(), ["qkv", "q"], SPLIT), (nn.MultiheadAttention(16, 2), ["in_proj_weight", "q_proj"], None)])
def test_one_adapter_does_not_change_a_weight_twice(model, targets, split):
    with pytest.raises(peftlab.PatternError, match="twice"):
        peftlab.plan(model, "lora", r=2, targets=targets, split=split)


def test_three_dimensions_need_a_stated_layout():
    model = nn.ParameterDict({"w": torch.randn(3, 4, 6)})
    with pytest.raises(ValueError, match=r"\(3, 4, 6\).*layout=.*'eoi' or 'eio'.*'flat'"):
        peftlab.plan(model, "lora", r=2, targets="w")
    assert [r.shape for r in peftlab.plan(model, "lora", r=2, targets="w", layout={"w": "flat"}).rows] == [(3, 24)]
    assert len(peftlab.plan(model, "lora", r=2, targets="w", layout={"w": "eoi"}).rows) == 3
