"""The protocol: a method is one equation, on the weight or on the call; everything else is derived from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from peftlab.core.base import Base
from peftlab.core.site import Site
from peftlab.model.index import ModelIndex


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
    recipe: AdapterConfig
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
    def beside(cls, model: ModelIndex, hosts: list[nn.Module], hyper: dict) -> list[nn.Module]:
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


@dataclass(eq=False)
class AdapterConfig:
    """What made an adapter's method: enough to make its start values again, and to write them into a file's header."""

    cls: type[Method]
    label: str  # registry name, or module:class
    hyper: dict
    name: str
    seed: int
    common: nn.Module | None = None
    make_common: Callable[[], nn.Module] | None = None  # while `common` was built on meta
