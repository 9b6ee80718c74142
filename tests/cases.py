"""The layer zoo of the conformance suite, and the one row that a method may need here.

A case is a model with the places to adapt in it, its inputs, and the keywords of `wrap` that mean those places. Which methods fit which
cases is asked of the library (`peftlab.plan` accepts the pair or refuses it), never decided by a name; the answers are recorded in `ROWS`, so
that a method that silently stops fitting a layer fails a test.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

import peftlab
from peftlab import registry
from peftlab.quant.quantize import packed_weights

# ---------------------------------------------------------------- modules that torch does not have


class Net(nn.Module):
    """One layer inside a model, so that it has a path; tuples are cut to their first entry."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        y = self.layer(*inputs)
        return y[0] if isinstance(y, tuple) else y


class Cell(Net):
    """A recurrent cell with a state that is not zero: else half of its weights would do nothing."""

    def forward(self, x, *state):
        y = self.layer(x, state if len(state) > 1 else state[0])
        return y[0] if isinstance(y, tuple) else y


class OwnForward(nn.Linear):
    """A linear whose forward does more: only its weight may be changed, never its operation."""

    def forward(self, x):
        return 2 * super().forward(x) + 1


class OwnInit(nn.Linear):
    """A linear with another constructor."""

    def __init__(self, size: int):
        super().__init__(size, size)


class ScaledEmbedding(nn.Embedding):
    """Gemma's: the looked-up rows are multiplied."""

    def forward(self, ids):
        return super().forward(ids) * self.embedding_dim**0.5


class Experts(nn.Module):
    """One matrix an expert in one 3-D parameter, as mixture-of-experts models hold them."""

    def __init__(self, experts: int, n_in: int, n_out: int, order: str):
        super().__init__()
        self.order = order
        self.up = nn.Parameter(torch.randn(experts, *((n_in, n_out) if order == "eio" else (n_out, n_in))))

    def forward(self, x):  # (experts, tokens, n_in)
        return torch.bmm(x, self.up if self.order == "eio" else self.up.mT)


class Raw(nn.Module):
    """A bare matrix that is only read."""

    def __init__(self, n_in: int, n_out: int, order: str = "oi"):
        super().__init__()
        self.order = order
        self.table = nn.Parameter(torch.randn(*((n_out, n_in) if order == "oi" else (n_in, n_out))))

    def forward(self, x):
        return torch.tanh(x @ (self.table.t() if self.order == "oi" else self.table))


class Packed(nn.Module):
    """A foreign quantised linear: eight-bit codes, and nothing but a call."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.weight = nn.Parameter(torch.randint(0, 256, (n_out * n_in, 1)).to(torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(n_out))
        self.register_buffer("step", torch.tensor(1 / 64))

    def dense(self) -> Tensor:
        return (self.weight.view(self.out_features, self.in_features).to(self.step.dtype) - 128) * self.step

    def forward(self, x):
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias.to(x.dtype))


class Tied(nn.Module):
    """A table that is looked up at one end and multiplied with at the other."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


class Two(nn.Module):
    """Two sites of different shapes, so that what sites share has something to fit to."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    """A transformer's block, hand-written: normalises first, returns a tuple."""

    def __init__(self, dim: int = 8, heads: int = 2, inner: int = 12):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, h):
        z = self.norm1(h)
        q, k, v = (p(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.o(a.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h)), a.mean()


class Transformer(nn.Module):
    """Blocks in a list, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 6)

    def forward(self, x):
        for b in self.blocks:
            x = b(x)[0]
        return self.head(x)


class LM(nn.Module):
    """A language model, hand-written: it takes ids and nothing else."""

    def __init__(self):
        super().__init__()
        self.tok, self.pos = nn.Embedding(12, 8), nn.Embedding(9, 8)
        self.blocks, self.norm, self.head = nn.ModuleList([Block(), Block()]), nn.LayerNorm(8), nn.Linear(8, 12)

    def forward(self, ids):
        h = self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for b in self.blocks:
            h = b(h)[0]
        return self.head(self.norm(h))


class Mapped(nn.Module):
    """A block that takes its input by keyword and returns a transformers ModelOutput, as models of that library do."""

    def __init__(self, dim: int = 6, inner: int = 10):
        super().__init__()
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, *, hidden_states, scale: float = 1.0):
        from transformers.modeling_outputs import BaseModelOutput

        h = scale * self.down(torch.tanh(self.up(hidden_states)))
        return BaseModelOutput(last_hidden_state=hidden_states + h, hidden_states=(hidden_states, h))


class ByKeyword(Net):
    def forward(self, x):
        return self.layer(hidden_states=x, scale=0.5).last_hidden_state


class Added(nn.Module):
    """The end of BERT's sub-layers: a layer, the residual sum, a norm."""

    def __init__(self, dim: int = 6, inner: int = 10):
        super().__init__()
        self.dense, self.norm = nn.Linear(inner, dim), nn.LayerNorm(dim)

    def forward(self, hidden_states, input_tensor):
        return self.norm(self.dense(hidden_states) + input_tensor)


def conv1d_hf(n_out: int, n_in: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(n_out, n_in)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 1)


# ---------------------------------------------------------------- the zoo


def x(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def ids() -> tuple[Tensor]:
    return (torch.tensor([[0, 3, 3, 11], [7, 1, 0, 5]]),)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    wrap: dict = field(default_factory=lambda: {"targets": "layer"})
    smooth: bool = True  # False: torch's own layer is not the derivative of its value
    batch_dim: int = 0  # the dimension of every input and of the output that counts the rows


def packed(make: Callable[[], nn.Module], targets: str, kind: str) -> Callable[[], nn.Module]:
    """The same model on a quantised base."""
    return lambda: peftlab.quantize(make(), kind, targets=targets)


def qkv(dims: tuple[int, int, int], tokens: int = 5) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(2, tokens, d) for d in dims)


def states(n: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(3, 4), *(torch.randn(3, 6) for _ in range(n)))


SIZES = {"q": 4, "k": 2, "v": 2}  # grouped-query attention: unequal parts
HEADS = {"q": [0, 3, 6], "k": [1, 4, 7], "v": range(2, 9, 3)}  # the three parts of a head lie side by side
ATTENTION = {"targets": ["layer", "layer.out_proj"]}

CASES = {
    "linear": Case(lambda: Net(nn.Linear(6, 8)), x(2, 3, 6)),
    "linear_nobias": Case(lambda: Net(nn.Linear(8, 6, bias=False)), x(5, 8)),
    "linear_own_forward": Case(lambda: Net(OwnForward(6, 4)), x(5, 6)),
    "linear_own_init": Case(lambda: Net(OwnInit(6)), x(5, 6)),
    "conv1d_hf": Case(lambda: Net(conv1d_hf(8, 6)), x(2, 3, 6)),
    "conv1d": Case(lambda: Net(nn.Conv1d(4, 6, 3, padding=2, dilation=2)), x(2, 4, 7)),
    "conv1d_reflect": Case(lambda: Net(nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode="reflect")), x(2, 4, 7)),
    "conv2d": Case(lambda: Net(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))), x(2, 4, 5, 6)),
    "conv2d_groups": Case(lambda: Net(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)), x(2, 4, 5, 6)),
    "conv2d_depthwise": Case(lambda: Net(nn.Conv2d(4, 8, 3, groups=4, bias=False)), x(2, 4, 5, 6)),
    "conv2d_same": Case(lambda: Net(nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2)), x(2, 4, 5, 6)),
    "conv2d_replicate": Case(lambda: Net(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="replicate")), x(2, 4, 5, 6)),
    "conv2d_circular": Case(lambda: Net(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", groups=2)), x(2, 4, 5, 6)),
    "conv3d": Case(lambda: Net(nn.Conv3d(4, 6, 2, stride=(1, 2, 1), dilation=(1, 1, 2), groups=2)), x(2, 4, 3, 4, 4)),
    "conv3d_replicate": Case(lambda: Net(nn.Conv3d(2, 4, 2, padding=1, padding_mode="replicate")), x(2, 2, 2, 3, 2)),
    "conv_transpose1d": Case(lambda: Net(nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)), x(2, 4, 5)),
    "conv_transpose2d": Case(lambda: Net(nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=1, groups=2)), x(2, 4, 3, 4)),
    "conv_transpose3d": Case(lambda: Net(nn.ConvTranspose3d(4, 6, 2, dilation=2, groups=2, bias=False)), x(2, 4, 2, 3, 2)),
    "embedding": Case(lambda: Net(nn.Embedding(12, 6)), ids),
    "embedding_padding": Case(lambda: Net(nn.Embedding(12, 6, padding_idx=3)), ids),
    "embedding_max_norm": Case(lambda: Net(nn.Embedding(12, 6, max_norm=1.0)), ids, smooth=False),
    "embedding_scaled": Case(lambda: Net(ScaledEmbedding(12, 6, padding_idx=3)), ids),
    "bilinear": Case(lambda: Net(nn.Bilinear(4, 3, 6)), lambda: (torch.randn(5, 4), torch.randn(5, 3))),
    "attention": Case(lambda: Net(nn.MultiheadAttention(8, 2, batch_first=True)), qkv((8, 8, 8)), ATTENTION),
    "attention_whole": Case(lambda: Net(nn.MultiheadAttention(8, 2, batch_first=True)), qkv((8, 8, 8)), {"targets": "in_proj_weight"}),
    "attention_kv_dims": Case(lambda: Net(nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)), qkv((8, 4, 6)), ATTENTION),
    "attention_nobias": Case(lambda: Net(nn.MultiheadAttention(8, 2, bias=False, batch_first=True)), qkv((8, 8, 8)), ATTENTION),
    "lstm": Case(lambda: Net(nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=2)), x(3, 2, 4), batch_dim=1),
    "gru": Case(lambda: Net(nn.GRU(4, 6, batch_first=True)), x(2, 3, 4)),
    "rnn": Case(lambda: Net(nn.RNN(4, 6, bias=False)), x(3, 2, 4), batch_dim=1),
    "lstm_cell": Case(lambda: Cell(nn.LSTMCell(4, 6)), states(2)),
    "gru_cell": Case(lambda: Cell(nn.GRUCell(4, 6)), states(1)),
    "rnn_cell": Case(lambda: Cell(nn.RNNCell(4, 6)), states(1)),
    "layer_norm": Case(lambda: Net(nn.LayerNorm(6)), x(2, 3, 6)),
    "group_norm": Case(lambda: Net(nn.GroupNorm(2, 6)), x(3, 6, 4)),
    "batch_norm": Case(lambda: Net(nn.BatchNorm1d(6)), x(7, 6)),
    "experts_eio": Case(lambda: Net(Experts(3, 4, 6, "eio")), x(3, 5, 4), {"targets": "layer.up", "layout": {"layer.up": "eio"}}, batch_dim=1),
    "experts_eoi": Case(lambda: Net(Experts(3, 4, 6, "eoi")), x(3, 5, 4), {"targets": "layer.up", "layout": {"layer.up": "eoi"}}, batch_dim=1),
    "experts_one": Case(lambda: Net(Experts(3, 4, 6, "eio")), x(3, 5, 4), {"targets": "layer.up.1", "layout": {"layer.up": "eio"}}, batch_dim=1),
    "fused": Case(lambda: Net(nn.Linear(6, 8)), x(2, 3, 6), {"targets": ["layer.q", "layer.v"], "split": {"layer": SIZES}}),
    "fused_heads": Case(lambda: Net(nn.Linear(6, 9)), x(2, 3, 6), {"targets": ["layer.q", "layer.v"], "split": {"layer": HEADS}}),
    "fused_conv1d_hf": Case(lambda: Net(conv1d_hf(8, 6)), x(2, 3, 6), {"targets": ["layer.q", "layer.v"], "split": {"layer": SIZES}}),
    "raw": Case(lambda: Net(Raw(6, 8)), x(5, 6), {"targets": "layer.table"}),
    "raw_io": Case(lambda: Net(Raw(6, 8, "io")), x(5, 6), {"targets": "layer.table", "layout": {"layer.table": "io"}}),
    "opaque": Case(lambda: Net(Packed(6, 8)), x(2, 3, 6)),
    "encoder": Case(encoder, x(2, 3, 8), {"targets": "*"}),
    "tied_share": Case(Tied, ids, {"targets": "embed", "tie": "share"}),
    "tied_untie": Case(Tied, ids, {"targets": "embed", "tie": "untie"}),
    "two": Case(Two, x(2, 3, 4), {"targets": "*"}),
    "block_tuple": Case(lambda: Net(Block()), x(2, 3, 8)),
    "block_mapped": Case(lambda: ByKeyword(Mapped()), x(2, 3, 6)),
    "block_added": Case(lambda: Net(Added()), lambda: (torch.randn(2, 3, 10), torch.randn(2, 3, 6))),
    "attention_call": Case(lambda: Net(nn.MultiheadAttention(8, 2, batch_first=True)), qkv((8, 8, 8))),
    "transformer": Case(lambda: Net(Transformer()), x(2, 4, 8), {}),
    "lm": Case(lambda: Net(LM()), ids, {}),
}

# Cases on a quantised base, and the dense ones that they are twins of: what fits the one fits the other.
PACKED = {"linear_nf4": "linear", "conv1d_hf_nf4": "conv1d_hf", "embedding_fp4": "embedding", "experts_nf4": "experts_eio", "linear_int8": "linear"}
KINDS = {c: c.rpartition("_")[2] for c in PACKED}
for name, dense in PACKED.items():
    twin = CASES[dense]
    CASES[name] = replace(twin, make=packed(twin.make, "layer.up" if dense.startswith("experts") else "layer", KINDS[name]))


# ---------------------------------------------------------------- the one row that a method may need

ALL = frozenset(CASES)
NORMS = frozenset({"layer_norm", "group_norm", "batch_norm"})
BLOCKS = frozenset({"block_tuple", "block_mapped", "block_added"})  # only a call is meant
MATRICES = ALL - NORMS - BLOCKS  # everything with a matrix
TABLES = frozenset(c for c in CASES if c.startswith(("embedding", "tied")))
WHOLE = ALL - {"experts_one", "fused", "fused_heads", "fused_conv1d_hf"}  # a method on whole parameters has no parts
ATTENDS = frozenset({"attention_call", "block_tuple", "encoder", "lm", "transformer"})  # runs attention through torch's function
CALLS = BLOCKS | {
    "attention_call",
    "conv1d_hf",
    "encoder",
    "layer_norm",
    "linear",
    "linear_nobias",
    "linear_own_forward",
    "linear_own_init",
    "lm",
    "opaque",
    "transformer",
    "two",
}  # a call whose features are its last dimension
NO_BIAS = frozenset({"linear_nobias", "conv2d_depthwise", "conv_transpose3d", "attention_whole", "attention_nobias", "rnn", "raw", "raw_io"})
SHOWN = frozenset(
    c for c in CASES if c.startswith(("linear", "fused")) or c in ("attention_call", "conv1d_hf", "lm", "opaque", "transformer", "two")
)  # the call's input is the matrix's


@dataclass(frozen=True)
class Row:
    """Small keywords for the zoo's small layers, and the cases that the method fits."""

    fits: frozenset[str] | None = None
    hyper: dict = field(default_factory=dict)


def row(fits: frozenset[str], **hyper) -> Row:
    return Row((fits - PACKED.keys()) | {c for c, dense in PACKED.items() if dense in fits}, hyper)


# An alias without a row of its own has its method's.
ROWS = {
    "adalora": row(MATRICES, r=2, init_r=2),
    "bitfit": row(WHOLE - NO_BIAS - TABLES - {"experts_eio", "experts_eoi"}),
    "corda": row(SHOWN - {"opaque"}, r=2),
    "dora": row(MATRICES - {"opaque"}, r=2),
    "eva": row(SHOWN, r=2),
    "fourierft": row(MATRICES, n=4, alpha=5.0),
    "full": row(WHOLE),
    "ia3": row(MATRICES),
    "l1": row(WHOLE),
    "houlsby": row(CALLS, dim=3),
    "lokr": row(MATRICES, r=1),
    "lora": row(MATRICES, r=2),
    "lora_ga": row(MATRICES - {"opaque"}, r=1),
    "oft": row(MATRICES - TABLES),
    "llama_adapter": row(ATTENDS, n=2),
    "loreft": row(CALLS, r=2),
    "mola": row(
        SHOWN - {"attention_call", "linear_own_forward", "fused", "fused_heads", "fused_conv1d_hf"}, r=2, experts=3, k=3
    ),  # fewer chosen ones jump with a rounding of x: tests/test_mixtures.py has them
    "olora": row(MATRICES - {"opaque"}, r=2),
    "p_tuning": row(frozenset({"lm"}), n=2, dim=3),
    "p_tuning_v2": row(ATTENDS, n=2),
    "parallel": row(CALLS, dim=3),
    "pfeiffer": row(CALLS, dim=3),
    "prefix_tuning": row(ATTENDS, n=2, dim=3),
    "prompt_tuning": row(frozenset({"lm"}), n=2),
    "pissa": row(MATRICES - {"opaque"}, r=2),
    "qalora": row(MATRICES - TABLES - {"conv2d_depthwise"}, r=1, group_size=2),
    "sparse": row(WHOLE, n=2),
    "tokens": row(TABLES | {"lm"}, ids=[1, 3]),
    "xlora": row(frozenset({"lm", "transformer"}), experts=2, r=2),
    "vera": row(MATRICES, r=4),
    "vpt": row(ATTENDS - {"attention_call", "lm"}, n=2),
}

# Methods whose start is the base only up to rounding; every other one starts bit for bit.
ROUNDED_START = {"dora": "m / |V| is one up to rounding"}

# Cases whose effective weight may reach torch in another memory layout than the frozen one: another kernel, another last bit.
RELAID = frozenset({"raw_io", "fused_conv1d_hf", "conv1d_hf_nf4"})

# (method, law) or (method, law, case) -> reason: the only place for exceptions. Strict: one that passes fails.
EXPECTED: dict[tuple[str, ...], str] = {
    **{
        (m, "law_13_routed_is_row_by_row", "lm"): "its positions are looked up once for all rows, which an adapter there refuses"
        for m in ("fish", "full", "l1", "sparse", "tokens")
    },
    ("lora_ga", "law_12_same_seed_same_values", "fused_conv1d_hf"): "the gradient that it starts from runs through the other adapter: the last bit differs",
    ("lora_ga", "law_14_it_can_learn", "attention_call"): "its loss falls to 5.3 % in the law's steps, not to 5 %",
    ("xlora", "law_04_unwrap_restores_everything"): "the model runs twice, and so do its hooks",
    ("xlora", "law_05_gradcheck", "transformer"): "no gradient flows through the run that the gates are computed from, as in the authors' code",
    ("dora", "law_05_gradcheck"): "no gradient flows through the norm (sec. 4.3 of the paper), so the derivative is not that of the value",
}

QUICK = ("linear", "conv2d_groups", "embedding")  # the default selection: these, or the first case that a method fits
PARTNERS = ("lora", "oft", "ia3", "full")  # what every method is stacked on and under


# ---------------------------------------------------------------- questions to the library


def methods() -> list[str]:
    """Every name of the registry, aliases included."""
    return [e.name for e in peftlab.methods()]


def row_of(method: str) -> Row:
    if method in ROWS:
        return ROWS[method]
    entry = next((e for e in peftlab.methods() if e.name == method), None)
    return ROWS.get(entry.method if entry else method, Row())


def seeded(f: Callable, seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return f()


def build(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of a case, always the same one; no tensor of it is left at a special value (zeros, ones)."""

    def make():
        model = CASES[case].make()
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point():
                    p.add_(0.2 * torch.randn(p.shape))
            for m in model.modules():
                if isinstance(m, nn.Embedding) and m.max_norm is not None:
                    m(torch.arange(m.num_embeddings))  # torch shortens rows of the table itself: with all of them short, the base stays as it is
                    m.weight.mul_(0.95)
        return model

    model = seeded(make, zlib.crc32(case.encode()))
    if case not in PACKED:
        return model.to(dtype)
    place = next(iter(packed_weights(model))).removesuffix(".weight")
    return peftlab.quantize(peftlab.dequantize(model).to(dtype), KINDS[case], targets=place)  # the dtype of the decoded values is that of the model


def inputs(case: str, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, ...]:
    found = seeded(CASES[case].inputs, seed)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in found)


def loss_of(model: nn.Module, batch) -> Tensor:
    return model(*batch).float().square().mean()


def data(case: str, dtype: torch.dtype = torch.float64) -> dict:
    """Batches and a loss, for the methods that start from them; the others ignore them."""
    return {"data": [inputs(case, dtype, seed=s) for s in (2, 3)], "loss": loss_of}


def keywords(method: str, case: str) -> dict:
    """Of `wrap`, for the pair; methods on whole tensors have no use for a layout."""
    tensors = registry.resolve(method)[0].on == "tensor"
    return {k: v for k, v in CASES[case].wrap.items() if not (tensors and k == "layout")} | row_of(method).hyper


@functools.cache
def fits(method: str, case: str) -> bool:
    """Whether the library accepts the pair."""
    try:
        peftlab.plan(CASES[case].make(), method, **keywords(method, case))
    except ValueError:
        return False
    return True


def fitting(method: str) -> list[str]:
    return [c for c in CASES if fits(method, c)]


def quick(method: str) -> list[str]:
    there = fitting(method)
    return [c for c in QUICK if c in there] or there[:1]


@functools.cache
def anywhere() -> list[str]:
    """Names of methods that find a place in any model; the others need attention, tokens or blocks, and have tests of their own."""
    return [m for m in methods() if any(fits(m, case) for case in ("linear", "embedding", "layer_norm"))]


def place_or_skip(method: str, model: nn.Module, **how) -> None:
    """Skips the test where a model does not have the place that the method needs; `plan` says so, to which other tests hold it."""
    try:
        peftlab.plan(model, method, **how)
    except peftlab.PatternError as e:
        pytest.skip(str(e)[:80])
