"""What a layer type must say once, so that no method has to.

A rule sees one layer's weight as a matrix `(n_out, n_in)` and says how the layer's own operation runs with another matrix in
its place. Methods are written against these few verbs and therefore work on every layer that has a rule. Rules are stateless;
the layer `m` is always an argument. To add a layer type, write a rule and put it in `RULES`.

Legend: W canonical weight (n_out, n_in); M any matrix (rows, n_in); B (n_out, rows); h what `apply` returned; v a vector over
output features. Grouped convolutions share one matrix M among their groups, so there h carries groups * rows channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.model.packed import QuantizedModule, dense_meta, is_foreign_tensor

THICK = 64  # rows from which on a matrix is not thin (measured on CPU with ranks 8 to 256)


class NeedsWeight(ValueError):
    """A method asked an opaque layer for weight values that it does not give."""


def is_autocasting(device: torch.device) -> bool:
    """Whether autocast is on for a device; meta has none, and torch raises when asked."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class LayerRule:
    """How to see a raw parameter as a matrix, and how to run the layer with another one."""

    name = "matrix"
    weight: str | None = "weight"
    bias: str | None = "bias"
    pointwise = False  # acts on the last dimension of x alone
    call = False  # the layer can be run functionally, so that a method may surround the call
    linear = True  # output is linear in the weight

    def __new__(cls) -> LayerRule:
        """One object a class, so that copies of a model (deepcopy, pickle) hold the very rule."""
        if "_one" not in cls.__dict__:
            cls._one = super().__new__(cls)
        return cls._one

    def ndim(self, m: nn.Module, raw: Tensor) -> int:
        return raw.ndim

    def matrix(self, m: nn.Module, raw: Tensor) -> Tensor:
        """Raw parameter -> (n_out, n_in)."""
        return raw.flatten(1)

    def raw(self, m: nn.Module, W: Tensor, before: Tensor) -> Tensor:
        """(n_out, n_in) -> the raw layout of `before`."""
        return W.reshape(W.shape[0], *before.shape[1:])

    def ready(self, m: nn.Module) -> bool:
        """Whether this very layer may be surrounded rather than read (some settings are not linear)."""
        return self.call

    def affine(self, m: nn.Module, W: Tensor, b: Tensor | None, x: Tensor, *args, **kwargs) -> Tensor:
        raise NotImplementedError(f"{type(m).__name__} is read, not called")

    def apply(self, m: nn.Module, M: Tensor, x: Tensor) -> Tensor:
        """The layer's own operation with M in place of its weight, without bias."""
        raise NotImplementedError(f"{type(m).__name__} is read, not called")

    def mix(self, m: nn.Module, B: Tensor, h: Tensor) -> Tensor:
        """B (n_out, rows) over the feature axis of h."""
        return F.linear(h, B.to(h.dtype))

    def plus(self, m: nn.Module, W: Tensor, b: Tensor | None, x: Tensor, B: Tensor, h: Tensor) -> Tensor | None:
        """affine(matrix(W), b, x) + mix(B, h) of the raw weight W in fewer passes, or None where the rule knows no shorter way."""
        return None

    def along(self, m: nn.Module, v: Tensor, y: Tensor) -> Tensor:
        """v (features,) shaped to broadcast against the feature axis of y."""
        return v.to(y.dtype)

    def finish(self, m: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        """What the layer guarantees of its output whatever the weight (an embedding's padding row)."""
        return y


class Matrix(LayerRule):
    """A raw parameter that is only ever read."""


class Linear(LayerRule):
    name, pointwise, call = "linear", True, True

    def affine(self, m, W, b, x):
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    def apply(self, m, M, x):
        M = M.to(x.dtype)
        if M.shape[0] >= THICK:
            return F.linear(x, M)
        # The thin matrix on the left, in backward too: the BLAS is several times slower with few columns than with few rows.
        return (M @ x.reshape(-1, x.shape[-1]).t()).t().view(*x.shape[:-1], M.shape[0])

    def plus(self, m, W, b, x, B, h):
        # The product is a fresh tensor that nothing else holds and whose value no backward needs: adding in place saves two passes.
        return self._added(F.linear(x.reshape(-1, x.shape[-1]), self.matrix(m, W), b), x, B, h)

    def _added(self, y: Tensor, x: Tensor, B: Tensor, h: Tensor) -> Tensor:
        """B over h added in place to the fresh product y."""
        right = B.to(y.dtype).t()
        y.addmm_(h.reshape(-1, h.shape[-1]).to(y.dtype), right if B.shape[1] >= THICK else right.contiguous())
        # Nothing else holds the product, so its new shape need not be a view: those that edit a layer's output in place (and FSDP2, which
        # warns of views) then see what they see of a layer without adapters.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


class Conv1D(Linear):
    """The transposed linear of GPT-2 in transformers: weight (n_in, n_out). Known by name, so transformers is not imported."""

    name = "conv1d_hf"

    def matrix(self, m, raw):
        return raw.t()

    def raw(self, m, W, before):
        return W.t()


def how_to_make_plain(m: nn.Module) -> str:
    """How to make the weight of this layer a plain parameter, where torch computes it from other ones ("" where it does not)."""
    if torch.nn.utils.parametrize.is_parametrized(m, "weight"):
        return "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    if isinstance(m.__dict__.get("weight"), Tensor):  # the older way: a hook sets it before every call
        return "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)"
    return ""


def why_opaque(m: nn.Module) -> str:
    """What stands between a method and this layer's weight, and the remedy if there is one."""
    cure = how_to_make_plain(m)
    return (
        f"computes its weight from other parameters and only offers a call; {cure} makes it a plain layer" if cure else "keeps its weight packed and only offers a call"
    )


class Opaque(Linear):
    """A linear that can be called but whose weight is packed (a foreign quantised layer)."""

    name = "opaque"

    def matrix(self, m, raw):
        raise NeedsWeight(f"{type(m).__name__} {why_opaque(m)}")

    raw = matrix

    def affine(self, m, W, b, x):
        raise NeedsWeight(f"{type(m).__name__} {why_opaque(m)}")

    def plus(self, m, W, b, x, B, h):
        return None


class Conv(LayerRule):
    """Conv1d, 2d and 3d with groups, stride, dilation and every padding mode: the layer's own `_conv_forward` does the work."""

    name, call = "conv", True

    def affine(self, m, W, b, x):
        raw = W.reshape(W.shape[0], *m._parameters["weight"].shape[1:])
        return m._conv_forward(x, raw.to(x.dtype), None if b is None else b.to(x.dtype))

    def apply(self, m, M, x):
        return self.affine(m, M.repeat(m.groups, 1) if m.groups > 1 else M, None, x)

    def mix(self, m, B, h):
        nd = m._parameters["weight"].ndim - 2
        conv = (F.conv1d, F.conv2d, F.conv3d)[nd - 1]
        return conv(h, B.reshape(*B.shape, *(1,) * nd).to(h.dtype), groups=m.groups)

    def along(self, m, v, y):
        nd = m._parameters["weight"].ndim - 2
        if v.shape[0] != y.shape[-1 - nd]:
            v = v.repeat(m.groups)
        return v.reshape(-1, *(1,) * nd).to(y.dtype)


class ConvTranspose(Conv):
    """ConvTranspose1d, 2d and 3d; raw weight (in, out / groups, *kernel), canonical (out, in / groups * kernel)."""

    name = "conv_transpose"

    def matrix(self, m, raw):
        g, k = m.groups, raw[0, 0].numel()
        W = raw.reshape(g, raw.shape[0] // g, raw.shape[1], k)
        return W.transpose(1, 2).reshape(g * raw.shape[1], -1)

    def raw(self, m, W, before):
        g, k = m.groups, before[0, 0].numel()
        rows = W.shape[0] // g
        out = W.reshape(g, rows, before.shape[0] // g, k).transpose(1, 2)
        return out.reshape(before.shape[0], rows, *before.shape[2:])

    def affine(self, m, W, b, x, output_size=None):
        kernel = m._parameters["weight"]
        nd = kernel.ndim - 2
        raw = self.raw(m, W, kernel).to(x.dtype)
        pad = m._output_padding(x, output_size, m.stride, m.padding, m.kernel_size, nd, m.dilation)
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[nd - 1]
        return conv(x, raw, None if b is None else b.to(x.dtype), m.stride, m.padding, pad, m.groups, m.dilation)


class Embedding(LayerRule):
    """A lookup of the columns of the canonical matrix (dim, num_embeddings)."""

    name, bias, call = "embedding", None, True

    def matrix(self, m, raw):
        return raw.t()

    def raw(self, m, W, before):
        return keep_padding(m, W.t(), before)

    def ready(self, m):
        return m.max_norm is None and not m.scale_grad_by_freq

    def affine(self, m, W, b, x):
        # A lookup has no activation dtype of its own: it takes the frozen table's. Cast the rows, not the table.
        y = F.embedding(x, W.t(), m.padding_idx)
        y = self.finish(m, y, x)
        return y.to(dense_meta(m, "weight").dtype)

    def apply(self, m, M, x):
        return F.embedding(x, M.t()).to(dense_meta(m, "weight").dtype)

    def finish(self, m, y, x):
        if m.padding_idx is None:
            return y
        row = self.row(m, m.padding_idx)
        return torch.where((x == m.padding_idx)[..., None], row.to(y.dtype), y)

    def row(self, m: nn.Module, i: int) -> Tensor:
        """One row of the frozen table."""
        return m._parameters["weight"][i]


def keep_padding(m: nn.Module, table: Tensor, before: Tensor) -> Tensor:
    """An embedding's table with the padding row it had; other layers' tensors as they are."""
    pad = m.padding_idx if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) else None
    if pad is None:
        return table
    is_pad = torch.arange(table.shape[0], device=table.device) == pad
    return torch.where(is_pad[:, None], before.to(table.dtype), table)


class Bilinear(Matrix):
    name = "bilinear"


MATRIX, LINEAR, CONV1D, OPAQUE = Matrix(), Linear(), Conv1D(), Opaque()

RULES: dict[type, LayerRule] = {
    nn.Linear: LINEAR,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Conv()),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTranspose()),
    nn.Embedding: Embedding(),
    nn.Bilinear: Bilinear(),
}


def is_hf_conv1d(cls: type) -> bool:
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def _registered(cls: type) -> tuple[type, LayerRule] | None:
    for c in cls.__mro__:
        if c in RULES:
            return c, RULES[c]
        if is_hf_conv1d(c):
            return c, CONV1D
    return None


def is_opaque_linear(m: nn.Module) -> bool:
    """Has the features of a linear but no plain floating matrix of that shape: a packed, foreign quantised layer."""
    n_in, n_out = getattr(m, "in_features", None), getattr(m, "out_features", None)
    if not (isinstance(n_in, int) and isinstance(n_out, int)) or isinstance(m, nn.Bilinear):
        return False
    W = dense_meta(m, "weight")
    return W is None or not W.is_floating_point() or tuple(W.shape) != (n_out, n_in) or is_foreign_tensor(W)


def layer_rule(m: nn.Module) -> LayerRule | None:
    """The rule of this layer's main weight, or None where the layer has none.

    A subclass with a forward of its own keeps the rule's view of the weight, but `surrounds` says that it must be read.
    """
    if isinstance(m, QuantizedModule) and m._packed_rule is not None:
        return m._packed_rule
    if is_opaque_linear(m):
        return OPAQUE
    W = dense_meta(m, "weight")
    if is_foreign_tensor(W):
        return None  # neither a linear's call nor values that can be read
    found = _registered(type(m))
    if found and isinstance(m._parameters.get("weight"), Tensor):
        return found[1]
    n_in, n_out = getattr(m, "in_features", None), getattr(m, "out_features", None)
    if W is not None and n_in is not None and tuple(W.shape) == (n_out, n_in):
        return LINEAR  # a linear that is not nn.Linear; its own forward is unknown, so it is read
    return None


def runs_registered_forward(m: nn.Module, cls: type) -> bool:
    """Whether the layer runs its registered class's forward unchanged, so that the rule's functional form is its operation."""
    if is_opaque_linear(m) or (isinstance(m, QuantizedModule) and m._packed_rule is not None):
        return True
    found = _registered(cls)
    return found is not None and cls.forward is found[0].forward and found[1].ready(m)


def matrix_shape(m: nn.Module, rule: LayerRule, raw: Tensor | None) -> tuple[int, int]:
    """(n_out, n_in) without touching values."""
    if rule is OPAQUE:
        return m.out_features, m.in_features
    if rule is LINEAR:
        return tuple(raw.shape)
    with torch.device("meta"):
        return tuple(rule.matrix(m, torch.empty(raw.shape)).shape)


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def is_norm(m: nn.Module) -> bool:
    """A normalisation layer: torch's, or a module of that name whose parameters are all vectors (RMSNorm of one's own)."""
    vectors = [p.ndim == 1 for p in m._parameters.values() if p is not None]
    return isinstance(m, NORMS) or (bool(vectors) and all(vectors) and type(m).__name__.lower().endswith("norm"))


def adds_residual(m: nn.Module) -> bool:
    """Whether a module is one layer and then one norm, which BERT calls with the sub-layer's input as well: norm(layer(h) + x)."""
    kinds = ["layer" if isinstance(layer_rule(c), Linear) else "norm" for c in m._modules.values() if c is not None and (is_norm(c) or layer_rule(c) is not None)]
    return kinds == ["layer", "norm"] and type(m).forward is not nn.Sequential.forward
