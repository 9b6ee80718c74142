"""A site: one place where a method can sit, and what its raw tensor looks like to the method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from peftlab.model import layers
from peftlab.model.layers import LayerRule
from peftlab.model.packed import QuantizedModule, dense_meta

ADAPTERS_CHILD = "peftlab"  # the one child module that an adapted module gains

STASH_PREFIX = "stash_"  # prefix of the buffers that keep a merged module's frozen bits


@dataclass(eq=False)
class Site:
    """One place where a method can sit: a parameter of a module (or a part of it), or a module's call.

    `rows` picks output features of a fused matrix, `expert` one matrix of a 3-D parameter, `transposed` says that the raw
    matrix is (n_in, n_out). `key` is the path below `host.peftlab.<adapter>` ("" for a layer's own weight).
    """

    host: nn.Module
    path: str
    key: str = ""
    kind: str = "matrix"  # matrix | tensor | module
    param: str | None = "weight"
    bias: str | None = None
    rule: LayerRule = layers.MATRIX
    rows: slice | Tensor | None = None
    bias_rows: slice | Tensor | None = None  # where the bias's part differs from the weight's (None: as `rows`)
    expert: int | None = None
    transposed: bool = False
    read_only: bool = False  # the parent reads the weight without calling the host
    names: tuple[str, ...] = ()  # every path that a pattern may use for it
    explicit: bool = False  # only a pattern that spells its last component means it
    unstated: bool = False  # a parameter with three dimensions of which nobody said which is which
    n_out: int = 0
    n_in: int = 0
    shape: tuple[int, ...] = ()
    tied: tuple = field(default=(), repr=False)  # (host, parameter) pairs that share the storage
    shared: bool = False  # ... and that are to see the same change
    view: str = "values"  # "values" | "shapes" (its tensors are on meta) | "unknown" (its weight is not to be looked at yet)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dense(self) -> bool:
        """Whether only the definition serves: one tensor of several, or a part of a layer that does not act on features alone."""
        return self.kind == "tensor" or (not (self.rule.pointwise and self.rule.call) if self.rows is not None else self.key != "")

    @property
    def has_bias(self) -> bool:
        return self.bias is not None and self.host._parameters.get(self.bias) is not None

    @property
    def bias_part(self) -> slice | Tensor | None:
        return self.rows if self.bias_rows is None else self.bias_rows

    @property
    def raw_tensor(self) -> Tensor | None:
        return None if self.param is None else self.host._parameters.get(self.param)

    @property
    def dtype(self) -> torch.dtype:
        W = dense_meta(self.host, self.param)
        if self.kind == "module":
            W = next((p for p in self.host.parameters() if p.is_floating_point()), None)
        return W.dtype if W is not None and W.is_floating_point() else torch.float32

    @property
    def device(self) -> torch.device:
        if self.view == "shapes":
            return torch.device("meta")
        W = self.raw_tensor
        if W is None:
            W = next(self.host.parameters(), None)
        if W is None:
            W = next(self.host.buffers(), None)
        return torch.device("cpu") if W is None else W.device

    # ---- raw <-> canonical
    def part(self, raw: Tensor) -> Tensor:
        return raw if self.expert is None else raw[self.expert]

    def get(self, piece: Tensor) -> Tensor:
        """Raw piece -> what the method calls W."""
        if self.kind != "matrix":
            return piece
        W = piece.t() if self.transposed else self.rule.matrix(self.host, piece)
        return W if self.rows is None else W[self.rows]

    def put(self, piece: Tensor, W: Tensor) -> Tensor:
        """W back into (a new tensor of) the raw layout."""
        if self.kind != "matrix":
            return layers.keep_padding(self.host, W, piece) if self.param == "weight" else W
        if self.rows is not None:
            whole = piece.t() if self.transposed else self.rule.matrix(self.host, piece)
            W = with_rows(whole, self.rows, W)
        return W.t() if self.transposed else self.rule.raw(self.host, W, piece)

    # ---- frozen values
    def frozen_weight(self) -> Tensor:
        """The frozen tensor itself, as the method sees W, whatever lies below and whatever is merged."""
        stand_in = self.stand_in_weight()
        return self.get(self.part(frozen_values(self.host, self.param))) if stand_in is None else stand_in

    def stand_in_weight(self) -> Tensor | None:
        """What is shown instead of the weight where values are not to be looked at; None where they are.

        Raises:
            NeedsWeight: where the weight is unknown, or packed by a library that does not show it.
        """
        if self.view == "unknown":
            raise layers.NeedsWeight(self.path)
        if self.rule is layers.OPAQUE:
            return self.rule.matrix(self.host, None)
        if self.view == "values":
            return None
        size = (self.n_out, self.n_in) if self.kind == "matrix" else self.shape
        return torch.empty(size, dtype=self.dtype, device="meta")

    def stand_in_bias(self) -> Tensor | None:
        """The same for the bias of a layer that has one."""
        if self.view == "unknown":
            raise layers.NeedsWeight(self.path)
        return None if self.view == "values" else torch.empty(self.n_out, dtype=self.dtype, device="meta")

    def seen_as(self, view: str) -> Site:
        """The same site with "values", with "shapes" alone (on meta), or with its weight still "unknown"."""
        return replace(self, view=view)


def with_rows(whole: Tensor, rows: slice | Tensor, part: Tensor) -> Tensor:
    """A copy of `whole` with `part` in the place of these rows."""
    dtype = torch.promote_types(whole.dtype, part.dtype)
    whole, part = whole.to(dtype), part.to(dtype)
    if isinstance(rows, slice):
        return torch.cat([whole[: rows.start], part, whole[rows.stop :]])
    return whole.index_copy(0, rows.to(whole.device), part)


def frozen_parameter(host: nn.Module, param: str) -> Tensor:
    """The frozen tensor, also while adapters are merged into the parameter."""
    stack = host._modules.get(ADAPTERS_CHILD)
    kept = None if stack is None else stack._buffers.get(STASH_PREFIX + param)
    return host._parameters[param] if kept is None else kept


def frozen_values(host: nn.Module, param: str) -> Tensor:
    """The values of the frozen tensor in its raw layout: `frozen_parameter`, or what its codes stand for."""
    raw = frozen_parameter(host, param)
    if raw.is_floating_point() or not isinstance(host, QuantizedModule):
        return raw
    stack = host._modules.get(ADAPTERS_CHILD)
    return host.peftlab_dense(param, {} if stack is None else {k.removeprefix(STASH_PREFIX): t for k, t in stack._buffers.items() if k.startswith(STASH_PREFIX)})
