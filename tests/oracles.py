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
