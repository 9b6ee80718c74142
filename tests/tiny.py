"""Tiny transformers models with random weights, and a transformer written by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
CAUSAL = ("llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma3")
DECODERS = (*CAUSAL, "t5")
TEXT = (*CAUSAL, "bert", "t5")


def hf(name: str, dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    """A tiny model of that family, in eval mode, always the same."""
    import transformers as tf

    tf.logging.set_verbosity_error()
    grouped = dict(vocab_size=100, num_key_value_heads=2, **SIZES)
    gpt2 = dict(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    makers = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**grouped, **more)),
        "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**grouped, **more)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**grouped, **more)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(head_dim=8, **grouped, **more)),
        "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**(grouped | {"num_key_value_heads": 1}), head_dim=8, **more)),
        "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(head_dim=8, **grouped, **more)),
        "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(head_dim=8, sliding_window=6, **grouped, **more)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2, **more)),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(vocab_size=100, **SIZES, **more)),
        "bert_model": lambda: tf.BertModel(tf.BertConfig(vocab_size=100, **SIZES, **more)),
        "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(vocab_size=100, **SIZES, **more)),
        "t5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=100, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0, **more)
        ),
        "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SIZES, **more)),
    }
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = makers[name]().to(dtype).eval()
        # Random weights of deviation 0.02 make attention flat: sharper ones show a wrong mask or position.
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1 and id(p) not in tables:
                    p.mul_(4)
    return model


def batch(name: str, rows: int = 2, length: int = 9, padded: int = 3) -> dict[str, torch.Tensor]:
    """Token ids with the first row padded on the left."""
    g = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=g)}
    ids = torch.randint(5, 90, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    more = {"labels": torch.randint(5, 90, (rows, 5), generator=g)} if name == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def perturb(model: nn.Module, size: float = 0.5, seed: int = 0) -> nn.Module:
    """Noise on everything that trains."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
    return model


def methods_of(model: nn.Module, name: str = "default") -> dict[str, nn.Module]:
    """path of the host -> its adapter."""
    return {path: m.peftlab.get_submodule(name) for path, m in model.named_modules() if "peftlab" in m._modules and name in m.peftlab._modules}


class Mixer(nn.Module):
    """Attention of one's own, under names that nobody else uses; grouped heads."""

    def __init__(self, dim: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups = heads, groups
        self.ask, self.offer, self.tell = nn.Linear(dim, dim), nn.Linear(dim, dim * groups // heads), nn.Linear(dim, dim * groups // heads)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, keep):
        q = self.ask(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (self.groups, -1)).transpose(1, 2) for p in (self.offer, self.tell))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = mask if keep is None else mask & keep[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Own(nn.Module):
    """A language model of one's own: ids and a mask in, logits out."""

    def __init__(self, vocabulary: int = 40, dim: int = 16, depth: int = 2, length: int = 40):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.mixers = nn.ModuleList([Mixer(dim, 4, 2) for _ in range(depth)])
        self.widen = nn.ModuleList([nn.Linear(dim, dim) for _ in range(depth)])
        self.answer = nn.Linear(dim, vocabulary)

    def forward(self, ids, keep_mask=None):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for mixer, widen in zip(self.mixers, self.widen, strict=True):
            x = x + mixer(x, None if keep_mask is None else keep_mask.bool())
            x = x + torch.tanh(widen(x))
        return self.answer(x)


def own(model: nn.Module) -> dict[str, torch.Tensor]:
    """What trains, by path."""
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def peft_of(model: nn.Module, config) -> nn.Module:
    """The model under HF peft, in eval mode; config(peft) makes its configuration."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, config(peft)).eval()
