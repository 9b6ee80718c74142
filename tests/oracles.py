"""One naive dense formula a method, written from the paper and never from our file.

An oracle takes the frozen weight in canonical form (n_out, n_in), the frozen bias (or None), the adapter's tensors by their paper
symbols, the hyper-parameters and the tensors that several sites share, and returns the adapted weight and bias. Everything is the most
literal thing that torch offers (explicit loops, `kron`, `block_diag`, `ifft2`, `solve`), slow on purpose, and differentiable, so that gradients
can be compared too. Tests call it in float64.

Methods of `RAW` change any single parameter, so they see it in its raw layout, and their tensors are called after it (`weight.C`, `bias.C`).

`canonical`, `raw` and `run` are the same for layer types: what the layer computes with another weight, through `torch.nn.functional`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Result = tuple[Tensor, Tensor | None]
ORACLES: dict[str, Callable[..., Result]] = {}
RAW = {"bitfit", "full", "l1", "sparse"}


def oracle(name: str):
    def register(f):
        assert name not in ORACLES, name
        ORACLES[name] = f
        return f

    return register


CALLS: dict[str, Callable] = {}


def called(name: str):
    """For methods that are no equation on a weight: the formula on the hidden state, token by token."""

    def register(f):
        assert name not in CALLS, name
        CALLS[name] = f
        return f

    return register


def outer_sum(B: Tensor, A: Tensor) -> Tensor:
    """sum_k b_k a_k^T, one rank at a time: B (n_out, r), A (r, n_in)."""
    total = torch.zeros(B.shape[0], A.shape[1], dtype=B.dtype)
    for k in range(B.shape[1]):
        total = total + torch.outer(B[:, k], A[k, :])
    return total


def lora_scale(hyper: Mapping) -> float:
    """alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) (Kalajdzievski 2023, eq. 2)."""
    r = hyper["r"]
    return hyper["alpha"] / (math.sqrt(r) if hyper.get("rank_stabilized") else r)


@oracle("lora")
def lora(W, b, t, hyper, common=None) -> Result:
    """Hu et al. 2021, eq. 3. With a start (PiSSA, OLoRA) the base keeps W and the start's own product is taken off: 2404.02948 eq. 5."""
    s = lora_scale(hyper)
    W2 = W + s * outer_sum(t["B"], t["A"])
    if "A0" in t:
        W2 = W2 - s * outer_sum(t["B0"], t["A0"])
    return W2, (b + t["d"] if "d" in t else b)


@oracle("qalora")
def qalora(W, b, t, hyper, common=None) -> Result:
    """Xu et al. 2023 (2309.14717), algorithm 1: A sees AvgPool(x) * (D_in // L), that is the sum of each of the L groups."""
    g = W.shape[1] // t["A"].shape[1]
    pool = torch.zeros(W.shape[1] // g, W.shape[1], dtype=W.dtype)
    for i in range(W.shape[1]):
        pool[i // g, i] = 1
    return W + lora_scale(hyper) * outer_sum(t["B"], t["A"]) @ pool, b


@oracle("dora")
def dora(W, b, t, hyper, common=None) -> Result:
    """Liu et al. 2024 (2402.09353) eq. 5; the norm is a constant for the gradient (section 4.3). One norm an output unit."""
    V = W + lora_scale(hyper) * outer_sum(t["B"], t["A"])
    rows = []
    for i in range(W.shape[0]):
        length = V[i].detach().pow(2).sum().sqrt()
        rows.append(t["m"][i] * V[i] / length)
    return torch.stack(rows), b


@oracle("adalora")
def adalora(W, b, t, hyper, common=None) -> Result:
    """Zhang et al. 2023 (2303.10512) eq. 3: W + P Lambda Q."""
    L = torch.diag(t["E"].flatten())
    return W + hyper["alpha"] / hyper["init_r"] * (t["P"] @ (L @ t["Q"])), b


@oracle("lokr")
def lokr(W, b, t, hyper, common=None) -> Result:
    """Yeh et al. 2023 (2309.14859): W + s (w1 kron w2), each factor full or a product."""
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    w2 = t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"]
    rows = []
    for i in range(w1.shape[0]):
        rows.append(torch.cat([w1[i, j] * w2 for j in range(w1.shape[1])], dim=1))
    return W + hyper["alpha"] / hyper["r"] * torch.cat(rows), b


def skew(q: Tensor, size: int) -> Tensor:
    """The skew-symmetric matrix whose strict upper triangle, read row by row, is q."""
    Q = torch.zeros(size, size, dtype=q.dtype)
    k = 0
    for i in range(size):
        for j in range(i + 1, size):
            E = torch.zeros(size, size, dtype=q.dtype)
            E[i, j], E[j, i] = 1, -1
            Q = Q + q[k] * E
            k += 1
    assert k == len(q)
    return Q


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1, Qiu et al. 2023 (2306.07280) section 3.2."""
    eye = torch.eye(Q.shape[0], dtype=Q.dtype)
    return torch.linalg.solve((eye - Q).T, (eye + Q).T).T


def oft_rotation(q: Tensor, n_in: int) -> Tensor:
    """Block diagonal R (n_in, n_in) from rows of upper triangles, q (blocks or 1, size (size - 1) / 2)."""
    size = round((1 + math.sqrt(1 + 8 * q.shape[1])) / 2)
    blocks = [cayley(skew(row, size)) for row in q]
    if len(blocks) == 1:
        blocks = blocks * (n_in // size)
    return torch.block_diag(*blocks)


@oracle("oft")
def oft(W, b, t, hyper, common=None) -> Result:
    """Qiu et al. 2023 eq. 4, z = (R w)^T x for every neuron w: rows of W are rotated, W' = W R^T."""
    return W @ oft_rotation(t["Q"], W.shape[1]).T, b


@oracle("ia3")
def ia3(W, b, t, hyper, common=None) -> Result:
    """Liu et al. 2022 (2205.05638) eq. 2 and 3: l * (W x + b) on the output, W (l * x) + b on the input."""
    L = torch.diag(t["l"])
    if hyper["side"] == "in":
        return W @ L, b
    return L @ W, None if b is None else L @ b


@oracle("vera")
def vera(W, b, t, hyper, common=None) -> Result:
    """Kopiczko et al. 2023 (2310.11454) eq. 2: W + Lambda_b B Lambda_d A; A (r, largest n_in) and B (largest n_out, r) are shared.

    Given with unit variance, they get Kaiming's, 2 / fan_in (their section 3.2), for the fan in of this layer.
    """
    n_out, n_in = W.shape
    A, B = common["A"][:, :n_in] * math.sqrt(2 / n_in), common["B"][:n_out, :] * math.sqrt(2 / hyper["r"])
    return W + torch.diag(t["b"]) @ B @ torch.diag(t["d"]) @ A, b


def inverse_dft(spectrum: Tensor) -> Tensor:
    """Real part of the two-dimensional inverse discrete Fourier transform, by two explicit matrices."""

    def matrix(n):
        k = torch.arange(n, dtype=torch.float64)
        return torch.exp(2j * math.pi * torch.outer(k, k) / n) / n

    h, w = spectrum.shape
    return (matrix(h) @ spectrum.to(torch.complex128) @ matrix(w)).real


@oracle("fourierft")
def fourierft(W, b, t, hyper, common=None) -> Result:
    """Gao et al. 2024 (2405.03003) eq. 3 and 4: n spectral coefficients at fixed entries, W + alpha Re(ifft2(F))."""
    spectrum = torch.zeros(W.shape, dtype=t["c"].dtype)
    for k, place in enumerate(t["places"].tolist()):
        u, v = divmod(place, W.shape[1])
        spectrum = spectrum.index_put((torch.tensor([u]), torch.tensor([v])), t["c"][k : k + 1])
    return W + hyper["alpha"] * inverse_dft(spectrum), b


@oracle("bitfit")
def bitfit(W, b, t, hyper, common=None) -> Result:
    """Ben Zaken et al. 2021 (2106.10199): the bias alone moves."""
    return W, b + t["bias.d"]


@oracle("full")
def full(W, b, t, hyper, common=None) -> Result:
    """A trained copy in place of the frozen tensor."""
    return t["weight.C"], t.get("bias.C")


@oracle("sparse")
def sparse(W, b, t, hyper, common=None) -> Result:
    """W plus trained values at fixed places (FISH mask 2111.09839, SHiRA 2406.13175, LT-SFT 2110.07560)."""

    def changed(x, values, places):
        delta = torch.zeros(x.numel(), dtype=values.dtype)
        for k, place in enumerate(places.tolist()):
            delta = delta.index_put((torch.tensor([place]),), values[k : k + 1])
        return x + delta.reshape(x.shape)

    return changed(W, t["weight.v"], t["weight.index"]), None if b is None else changed(b, t["bias.v"], t["bias.index"])


@oracle("l1")
def l1(W, b, t, hyper, common=None) -> Result:
    """A dense difference; sparsity comes from the penalty, not from the equation."""
    return W + t["weight.D"], None if b is None else b + t["bias.D"]


@oracle("tokens")
def tokens(W, b, t, hyper, common=None) -> Result:
    """Chosen rows of a lookup table are replaced; canonical W is (dim, vocabulary), so these are columns."""
    columns = list(W.T)
    for k, token in enumerate(t["ids"].tolist()):
        columns[token] = t["T"][k]
    return torch.stack(columns, dim=1), b


# ---- layer types


def is_conv1d(m: nn.Module) -> bool:
    """The transposed linear of GPT-2 in transformers."""
    return type(m).__mro__[-2] is nn.Module and any(c.__name__ == "Conv1D" for c in type(m).__mro__)


def canonical(m: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A layer's raw weight as (n_out, n_in), one output unit a row."""
    w = m.weight if weight is None else weight
    if isinstance(m, (nn.Linear, nn.LayerNorm)):
        return w
    if is_conv1d(m) or isinstance(m, nn.Embedding):
        return w.T
    if isinstance(m, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        per_in, per_out = m.in_channels // m.groups, m.out_channels // m.groups
        rows = []
        for o in range(m.out_channels):
            g, j = divmod(o, per_out)
            rows.append(torch.cat([w[i, j].flatten() for i in range(g * per_in, (g + 1) * per_in)]))
        return torch.stack(rows)
    return torch.stack([kernel.flatten() for kernel in w])


def raw(m: nn.Module, W: Tensor) -> Tensor:
    """The inverse of `canonical`."""
    if isinstance(m, (nn.Linear, nn.LayerNorm)):
        return W
    if is_conv1d(m) or isinstance(m, nn.Embedding):
        return W.T
    if isinstance(m, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        per_in, per_out = m.in_channels // m.groups, m.out_channels // m.groups
        size = math.prod(m.kernel_size)
        inputs = []
        for i in range(m.in_channels):
            g, a = divmod(i, per_in)
            inputs.append(torch.stack([W[g * per_out + j, a * size : (a + 1) * size].reshape(m.kernel_size) for j in range(per_out)]))
        return torch.stack(inputs)
    return torch.stack([row.reshape(m.in_channels // m.groups, *m.kernel_size) for row in W])


def run(m: nn.Module, W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
    """The layer's operation with canonical weight W and bias b, spelled out. The padding row of an embedding belongs to the model."""
    w = raw(m, W)
    if isinstance(m, nn.Linear) or is_conv1d(m):
        y = torch.einsum("...i,oi->...o", x, W)
        return y if b is None else y + b
    if isinstance(m, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + m.eps).sqrt() * w + b
    if isinstance(m, nn.Embedding):
        if m.padding_idx is not None:
            row = m.weight[m.padding_idx].detach()
            w = torch.cat([w[: m.padding_idx], row[None], w[m.padding_idx + 1 :]])
        return torch.stack([w[i] for i in x.flatten().tolist()]).reshape(*x.shape, -1)
    nd = len(m.kernel_size)
    if m.transposed:
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[nd - 1]
        return conv(x, w, b, m.stride, m.padding, m.output_padding, m.groups, m.dilation)
    conv = (F.conv1d, F.conv2d, F.conv3d)[nd - 1]
    padding = m.padding
    if m.padding_mode != "zeros":
        both = [p for n in reversed(padding) for p in (n, n)]
        x, padding = F.pad(x, both, mode=m.padding_mode), 0
    return conv(x, w, b, m.stride, padding, m.dilation, m.groups)


def changed(m: nn.Module, method: str, t: Tensors, hyper: Mapping, common: Tensors | None = None) -> Result:
    """What a method makes of this layer's weight, in canonical form, and of its bias."""
    bias = getattr(m, "bias", None)
    b = None if bias is None else bias.detach()
    if method in RAW:
        W, b = ORACLES[method](m.weight.detach(), b, t, hyper, common)
        return canonical(m, W), b
    return ORACLES[method](canonical(m).detach(), b, t, hyper, common)


def adapted(m: nn.Module, method: str, t: Tensors, hyper: Mapping, common: Tensors | None = None) -> Callable[[Tensor], Tensor]:
    """The adapted layer as a function of its input."""
    return lambda x: run(m, *changed(m, method, t, hyper, common), x)


# ---- the adapter's own tensors, seen from outside


def own(module: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Parameters and buffers of the adapter at this module, by their names: nothing else of it is looked at."""
    adapter = module.peftlab.get_submodule(name)
    return {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}


def fill(module: nn.Module, values: Mapping[str, Tensor], name: str = "default") -> None:
    """Puts values into an adapter; every trained tensor must be named, and shapes must be equal up to dimensions of size one."""
    found = own(module, name)
    trained = {k for k, t in found.items() if isinstance(t, nn.Parameter)}
    assert trained <= values.keys() <= found.keys(), f"tensors {sorted(found)}, given {sorted(values)}"
    with torch.no_grad():
        for k, v in values.items():
            assert [n for n in found[k].shape if n != 1] == [n for n in v.shape if n != 1], (k, found[k].shape, v.shape)
            found[k].copy_(v.reshape(found[k].shape))


# ---------------------------------------------------------------- methods that are no equation on a weight


NONLINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "tanh": lambda z: (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z)),
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "elu": lambda z: torch.where(z > 0, z, torch.exp(z.clamp(max=0)) - 1),
    "identity": lambda z: z,
}


def bottleneck(x: Tensor, t: Tensors, hyper: Mapping) -> Tensor:
    """s g (E f(D norm(x) + c) + e) of each token of x (..., n_in); what is not in `t` is not there."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        z = token
        if "gamma" in t:
            z = t["gamma"] * (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt() + t["beta"]
        z = torch.mv(t["D"], z) + t.get("c", 0)
        z = torch.mv(t["E"], NONLINEAR[hyper["activation"]](z)) + t.get("e", 0)
        rows.append(hyper["alpha"] * t.get("g", 1) * z)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@called("houlsby")
def houlsby(base: Callable, x: Tensor, t: Tensors, hyper: Mapping) -> Tensor:
    """Houlsby et al. 2019, sec. 2.1 and figure 2: the sub-layer's output, then down, nonlinearity, up, and a skip connection."""
    h = base(x)
    return h + bottleneck(h, t, hyper)


@called("pfeiffer")
def pfeiffer(base: Callable, x: Tensor, t: Tensors, hyper: Mapping) -> Tensor:
    """Pfeiffer et al. 2020 (MAD-X), eq. 1, around a norm: the adapter reads the normalised sum, its residual is the sum itself."""
    return base(x + bottleneck(base(x), t, hyper))


@called("parallel")
def parallel(base: Callable, x: Tensor, t: Tensors, hyper: Mapping) -> Tensor:
    """He et al. 2021, table 1, (scaled) parallel adapter: beside the part, from the part's input."""
    return base(x) + bottleneck(x, t, hyper)


@called("loreft")
def loreft(h: Tensor, R: Tensor, W: Tensor, b: Tensor, positions: list[list[int]]) -> Tensor:
    """Wu et al. 2024, eq. 2, at the given positions of each row of h (B, T, d): h + R^T (W h + b - R h)."""
    rows = [list(row) for row in h]
    for i, chosen in enumerate(positions):
        for p in chosen:
            v = rows[i][p]
            rows[i][p] = v + R.T @ (W @ v + b - R @ v)
    return torch.stack([torch.stack(row) for row in rows])


@called("mola")
def mola(W: Tensor, b: Tensor, x: Tensor, t: Tensors, hyper: Mapping) -> Tensor:
    """Gao et al. 2024 (2402.08562): top-k of a softmax router, renormalised, over LoRA experts; one expert keeps its probability (Switch)."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = torch.mv(t["W_g"], token)
        p = torch.exp(logits) / torch.exp(logits).sum()
        best = sorted(range(len(p)), key=lambda i: -p[i].item())[: hyper["k"]]
        total = sum(p[i] for i in best) if len(best) > 1 else 1.0
        y = torch.mv(W, token) + b
        for i in best:
            y = y + p[i] / total * hyper["alpha"] / hyper["r"] * torch.mv(t["B"][i], torch.mv(t["A"][i], token))
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@called("xlora")
def xlora(W: Tensor, b: Tensor | None, x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
    """Buehler and Buehler 2024 (2402.07148), one layer: W x + sum_i g_i B_i A_i x; x (B, T, n), gates (B, T, experts)."""
    rows = []
    for token, g in zip(x.reshape(-1, x.shape[-1]), gates.reshape(-1, gates.shape[-1]), strict=True):
        y = torch.mv(W, token) + (0 if b is None else b)
        for i in range(len(g)):
            y = y + g[i] * torch.mv(B[i], torch.mv(A[i], token))
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


# ---- virtual tokens


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T) v, one query of one head at a time: q (B, H, L, D), k, v (B, G, S, D), mask (B, H, L, S) of what is seen, or what is added."""
    B, H, L, D = q.shape
    rows = []
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for i in range(L):
                scores = torch.stack([q[b, h, i] @ k[b, g, j] for j in range(k.shape[2])]) * (scale or D**-0.5)
                m = mask[b, h, i]
                scores = torch.where(m, scores, -math.inf) if m.dtype == torch.bool else scores + m
                rows.append(torch.softmax(scores, 0) @ v[b, g])
    return torch.stack(rows).view(B, H, L, -1)


def by_head(K: Tensor, heads: int, rows: int) -> Tensor:
    """K (n, heads * D) as (rows, heads, n, D), one head's columns after the other."""
    D = K.shape[1] // heads
    return torch.stack([K[:, h * D : (h + 1) * D] for h in range(heads)]).expand(rows, heads, *K.shape[:1], D)


@called("prefix_tuning")
def prefix_tuning(q, k, v, mask, K, V, scale=None):
    """Li and Liang 2021, eq. 3: [P_k; k] and [P_v; v], every query sees all of the prefix. K (n, G D), V (n, G D')."""
    B, H, L, _ = q.shape
    n, G = K.shape[0], k.shape[1]
    front = torch.ones(B, H, L, n, dtype=torch.bool) if mask.dtype == torch.bool else torch.zeros(B, H, L, n, dtype=mask.dtype)
    k, v = torch.cat([by_head(K, G, B), k], 2), torch.cat([by_head(V, G, B), v], 2)
    return attention_by_hand(q, k, v, torch.cat([front, mask.expand(B, H, L, -1)], -1), scale)


@called("llama_adapter")
def llama_adapter(q, k, v, mask, K, V, g, scale=None):
    """Zhang et al. 2023 (LLaMA-Adapter): the two softmaxes are taken apart, the prompt's is multiplied by the gate."""
    B, H, L, _ = q.shape
    seen = torch.ones(B, H, L, K.shape[0], dtype=torch.bool)
    prompt = attention_by_hand(q, by_head(K, k.shape[1], B), by_head(V, k.shape[1], B), seen, scale)
    return attention_by_hand(q, k, v, mask.expand(B, H, L, -1), scale) + g * prompt


@called("prompt_tuning")
def prompt_tuning(tokens: list[Tensor], P: Tensor, at: list[int]) -> tuple[Tensor, list[int]]:
    """One row's vectors with P[j] before token at[j] (len(tokens): behind all), and where the tokens went."""
    out, where = [], []
    for i in range(len(tokens) + 1):
        out += [P[j] for j in range(len(P)) if at[j] == i]
        if i < len(tokens):
            where.append(len(out))
            out.append(tokens[i])
    return torch.stack(out), where


@called("p_tuning")
def p_tuning(E: Tensor, t: Tensors, layers: int) -> Tensor:
    """Liu et al. 2021 (P-tuning), the LSTM and the MLP: t holds torch's names of an LSTM (lstm.*) and of the head's linears (head.0, head.2, ...)."""
    rows = list(E)
    for i in range(layers if any(k.startswith("lstm") for k in t) else 0):
        both = [lstm(rows, t, f"l{i}"), lstm(rows[::-1], t, f"l{i}_reverse")[::-1]]
        rows = [torch.cat(pair) for pair in zip(*both, strict=True)]
    h = torch.stack(rows)
    linears = sorted({k.split(".")[1] for k in t if k.startswith("head")}, key=int)
    for j in linears:
        h = torch.stack([t[f"head.{j}.weight"] @ row + t[f"head.{j}.bias"] for row in h])
        h = h if j == linears[-1] else torch.where(h > 0, h, torch.zeros_like(h))
    return h


def lstm(rows: list[Tensor], t: Tensors, layer: str) -> list[Tensor]:
    """One direction of one layer, one step after the other; torch keeps the gates in the order i, f, g, o."""
    W, U, b, c = (t[f"lstm.{k}_{layer}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, cell, out = torch.zeros(U.shape[1], dtype=W.dtype), torch.zeros(U.shape[1], dtype=W.dtype), []
    for x in rows:
        i, f, g, o = (W @ x + b + U @ h + c).chunk(4)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(cell)
        out.append(h)
    return out


@called("vpt")
def vpt(blocks: list[Callable], x: Tensor, P: list[Tensor], at: int) -> Tensor:
    """Jia et al. 2022 (VPT): deep with one P a block, whose outputs are dropped; shallow with one P in all. x (B, T, d)."""
    n = P[0].shape[0]
    for i, block in enumerate(blocks):
        if i < len(P):
            rest = x[:, at:] if i == 0 else x[:, at + n :]
            x = torch.cat([x[:, :at], P[i].expand(x.shape[0], *P[i].shape), rest], 1)
        x = block(x)
    return torch.cat([x[:, :at], x[:, at + n :]], 1)
