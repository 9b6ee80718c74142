"""The protocol: a method is one equation, on the weight or on the call.

`Method` is what authors of methods subclass, `Base` is what a method sees below it. Everything else about attaching, stacking,
merging and saving is derived from these two.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from peftlab.model import layers

if TYPE_CHECKING:
    from peftlab.host import Recipe, Site
    from peftlab.sites import Model


class Method(nn.Module):
    """One trainable change at one site.

    A subclass creates its parameters in `__init__` and overrides `weight` (and `bias`), the definition from the paper, or
    `forward` alone where there is no such definition. A `forward` beside a definition is a fast path, which the conformance
    suite holds to the definition, gradients included. Hyper-parameters are the keyword-only arguments of `__init__`.
    """

    on: ClassVar[str] = "matrix"  # "matrix": (n_out, n_in) and bias | "tensor": one raw parameter | "module": a call
    place: ClassVar[str | None] = None  # structural name of where the method sits by default; None: the rule for its `on`
    elsewhere: ClassVar[str] = ""  # what targets= may say where the default finds no place, with the reason
    additive: ClassVar[bool] = False  # weight(W) - W does not depend on W, so the order of stacking does not matter
    opaque: bool = False  # the fast path never asks for base.weight
    neutral: bool = True  # the start is the base itself; not so for virtual tokens, or where it makes up for what codes lose of a weight
    replaces: ClassVar[bool] = False  # holds a trained copy: the frozen value does not matter
    any_layout: ClassVar[bool] = False  # around a call: its rows are told apart by the layout of the module, which may have the sequence first
    fast: ClassVar[tuple[str, ...]] = ()  # tensors that LoRA+ gives the larger learning rate
    needs_data: str | None = None  # "inputs" or "gradients": the start is computed from batches; "codes": while the weight is quantised
    seen: object = None  # what `observe` has kept of them
    in_place: bool = False  # trains the base tensor itself
    scheduled: bool = False  # set by `schedule`

    s: float | Tensor  # the scale that follows from `alpha`, where there is one; given as a float, kept as a float64 tensor that `rescale` changes
    site: Site
    recipe: Recipe
    shapes: dict[str, tuple[int, ...]]  # of the saved tensors when attached: what a shard is compared with
    common: nn.Module | None = None

    def __init__(self, base: Base):
        super().__init__()
        object.__setattr__(self, "common", base.common)  # plain reference: shared tensors live once, at the root

    def weight(self, W: Tensor) -> Tensor:
        """(n_out, n_in) -> (n_out, n_in), the paper's definition."""
        return W

    def bias(self, b: Tensor) -> Tensor:
        """(n_out,) -> (n_out,), for layers that have a bias."""
        return b

    def forward(self, base: Base, x: Tensor) -> Tensor:
        b = base.bias
        return base.affine(self.weight(base.weight), b if b is None else self.bias(b), x)

    @classmethod
    def routed(cls, base: Base, parts: list[tuple[Method, Tensor]], *args, **kwargs):
        """The surrounding call where the rows of a batch have different adapters (`on = "module"` only).

        parts: (method, row indices) of one class at one site; no row occurs twice, and rows in none of them are base's alone. Equal to
        running the rows one by one. A method on weights needs no such hook.
        """
        raise NotImplementedError(f"{cls.__name__} at {base.path!r} cannot be routed row by row")

    @classmethod
    def beside(cls, model: Model, hosts: list[nn.Module], hyper: dict) -> list[nn.Module]:
        """Further modules that the method must surround when it sits at `hosts`; it has no tensors there."""
        return []

    @classmethod
    def fits(cls, site: Site) -> bool:
        """Whether the method can sit at this site; shapes only."""
        return cls.on != "matrix" or site.ndim >= 2

    @classmethod
    def has_weight(cls) -> bool:
        return cls.weight is not Method.weight

    @classmethod
    def has_bias(cls) -> bool:
        return cls.bias is not Method.bias

    @classmethod
    def defined(cls) -> bool:
        """By an equation on the tensors, so that it merges and stacks exactly."""
        return cls.has_weight() or cls.has_bias()

    @classmethod
    def surrounds(cls) -> bool:
        """Whether it acts around the call: at a module, or at a layer of whose tensors it says no equation."""
        return cls.on == "module" or not cls.defined()

    def unmergeable(self) -> str | None:
        """Why this very method cannot be folded into its tensors now, after its adapter's name; None where it can."""
        return "changes the call, not the weight" if self.surrounds() else None

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={tuple(p.shape)}" for k, p in self.named_parameters(recurse=False))


class Base:
    """What lies below a method at its site: the frozen module with every earlier method applied.

    Shapes: n_out output features, n_in input features (kernel positions included), x whatever the layer is called with.
    """

    __slots__ = ("below", "common", "site")

    def __init__(self, site: Site, below: tuple = (), common: nn.Module | None = None):
        self.site, self.below, self.common = site, below, common

    # ---- facts
    @property
    def n_out(self) -> int:
        return self.site.n_out

    @property
    def n_in(self) -> int:
        return self.site.n_in

    @property
    def shape(self) -> tuple[int, ...]:
        """Raw shape of the parameter (of its part, for a slice)."""
        return self.site.shape

    @property
    def ndim(self) -> int:
        return len(self.site.shape)

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def has_bias(self) -> bool:
        return self.site.has_bias

    @property
    def pointwise(self) -> bool:
        return self.site.rule.pointwise

    @property
    def neighbours(self) -> dict[str, list[Method]]:
        """The adapters that sit at the host already, by name."""
        stack = self.site.host._modules.get("peftlab")
        return {} if stack is None else {name: [m for _, m in pairs] for name, pairs in stack.sites.items()}

    @property
    def acting(self) -> frozenset[str]:
        """Those of them that are active or merged."""
        stack = self.site.host._modules.get("peftlab")
        return frozenset() if stack is None else frozenset((*stack.active, *stack.merged))

    @property
    def is_norm(self) -> bool:
        """Whether the host is a normalisation layer."""
        return layers.is_norm(self.site.host)

    @property
    def adds(self) -> bool:
        """Whether the host is called with a residual, adds it and normalises."""
        return layers.adds_residual(self.site.host)

    @property
    def dtype(self) -> torch.dtype:
        return self.site.dtype

    @property
    def device(self) -> torch.device:
        return self.site.device

    @property
    def meta(self) -> bool:
        """True while only shapes are wanted (plan, estimate, load): values must not be looked at."""
        return self.device.type == "meta"

    # ---- tensors
    @property
    def weight(self) -> Tensor:
        """The effective weight of what lies below, (n_out, n_in)."""
        return self.site.read(self.below)

    @property
    def bias(self) -> Tensor | None:
        return self.site.read_bias(self.below)

    # ---- operations
    def __call__(self, *args, **kwargs):
        return self.site.run(self.below, args, kwargs)

    def affine(self, W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
        """The layer's own operation with weight W (n_out, n_in) and bias b (n_out,)."""
        return self.site.rule.affine(self.site.host, W, b, x)

    def apply(self, M: Tensor, x: Tensor) -> Tensor:
        """The layer's own operation with M (rows, n_in) in place of its weight, without bias."""
        return self.site.rule.apply(self.site.host, M, x)

    def mix(self, B: Tensor, h: Tensor) -> Tensor:
        """B (n_out, rows) over the features of h."""
        return self.site.rule.mix(self.site.host, B, h)

    def plus(self, x: Tensor, B: Tensor, h: Tensor) -> Tensor:
        """self(x) + mix(B, h), in place where the output of the call below is known to be fresh."""
        site = self.site
        # Forward hooks of the frozen call do not exist (it is the class's forward), so the functional form is the same call.
        if not self.below and not layers.autocasting(x.device):
            W = site.host._parameters.get(site.param)
            if W is not None and site.rows is None and (W.dtype == x.dtype or layers.holds_codes(site.host, site.param)):
                y = site.rule.plus(site.host, W, self.bias, x, B, h)
                if y is not None:
                    return y
        y = self(x)
        return y + self.mix(B, h).to(y.dtype)

    def scale(self, v: Tensor, y: Tensor) -> Tensor:
        """v (features,) times the feature axis of y."""
        return y * self.site.rule.along(self.site.host, v, y)

    def shift(self, b: Tensor, y: Tensor) -> Tensor:
        """b (features,) added on the feature axis of y."""
        return y + self.site.rule.along(self.site.host, b, y)


def positive_int(name: str, value: object, limit: int | None, base: Base | None = None) -> int:
    """`value` if it is a whole number in 1..limit, else a ValueError that says where."""
    where = f" at {base.path!r}" if base is not None and base.path else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not a whole number{where}")
    if value < 1:
        raise ValueError(f"{name}={value}{where}: must be at least 1")
    if limit is not None and value > limit:
        raise ValueError(f"{name}={value}{where}: at most {limit} (the smaller side of the matrix)")
    return value


def unit_interval(name: str, value: object) -> float:
    """`value` if 0 <= value < 1 (a dropout probability), else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must lie in [0, 1)")
    return float(value)


def finite(name: str, value: object) -> float:
    """`value` if it is a finite number, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: must be a finite number")
    return float(value)
