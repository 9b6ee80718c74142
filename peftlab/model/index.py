"""One walk over a model: its modules with all their paths, their parents, and which tensors are shared."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from peftlab.model.walk import named_base_modules


@dataclass
class ModelIndex:
    """One walk over a model: its modules with all their paths, their parents, and which storages are shared."""

    root: nn.Module
    paths: dict[int, list[str]] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    parents: dict[int, list[nn.Module]] = field(default_factory=dict)
    owners: dict[tuple, list[tuple[nn.Module, str]]] = field(default_factory=dict)  # identity of a tensor -> (module, parameter)
    at: dict[str, nn.Module] = field(default_factory=dict)  # path -> module

    @classmethod
    def of(cls, root: nn.Module) -> ModelIndex:
        self = cls(root)
        for path, m in named_base_modules(root, duplicates=True):
            self.at[path] = m
            known = id(m) in self.paths
            self.paths.setdefault(id(m), []).append(path)
            self.modules[id(m)] = m
            if path:
                self.parents.setdefault(id(m), []).append(self.at[path.rpartition(".")[0]])
            if not known:
                for name, p in m._parameters.items():
                    if isinstance(p, nn.parameter.UninitializedParameter):
                        raise ValueError(f"{path!r} is a {type(m).__name__} whose shape is not known yet: run one batch through the model first")
                    if p is not None:
                        self.owners.setdefault(tensor_identity(p), []).append((m, name))
        return self

    def path(self, m: nn.Module) -> str:
        return self.paths[id(m)][0]


def storage_id(t: Tensor) -> int:
    """An identity of the memory behind a tensor, real or meta."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(t)


def tensor_identity(t: Tensor) -> tuple:
    """The same for two tensors that are views of the same entries in the same order; parts of one flat buffer differ."""
    memory = storage_id(t)
    return (memory,) if memory == id(t) else (memory, t.storage_offset(), tuple(t.shape), t.stride())


def memory_extent(t: Tensor) -> tuple[int, int]:
    """The first entry of its memory that a tensor uses, and one past the last."""
    return t.storage_offset(), t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1


def join_path(*parts: str) -> str:
    """The parts of a module's path that are not empty, with dots between them."""
    return ".".join(p for p in parts if p)


def ensure_module(model: object) -> nn.Module:
    """`model` if it is a module, else TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return model


def refuse_inference_tensors(model: nn.Module) -> None:
    """Nothing can be trained through a tensor of torch's inference mode, and writes to it cannot be seen."""
    for path, m in named_base_modules(model):
        for n, t in [*m._parameters.items(), *m._buffers.items()]:
            if t is not None and t.is_inference():
                raise ValueError(f"{join_path(path, n)!r} was made inside torch.inference_mode(), so nothing can be trained through it: make the model outside")
