"""What `save` and `load` return."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SaveReport:
    """Bytes of a saved file: by adapter, of other things that were trained or changed, and of the header."""

    path: str
    bytes: int
    header_bytes: int
    adapters: dict[str, int]
    other: dict[str, int]

    def __repr__(self) -> str:
        parts = [f"{n}: {b:,}" for n, b in self.adapters.items()] + [f"{n}: {b:,}" for n, b in self.other.items()]
        return f"{self.path}: {self.bytes:,} bytes ({', '.join(parts)}, header: {self.header_bytes:,})"


@dataclass
class LoadReport:
    """What a load did."""

    path: str
    adapters: list[str]
    trainable: bool
    tensors: int
    unconsumed: list[str] = field(default_factory=list)
    unfilled: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)  # base tensors that were overwritten: heads, statistics

    def __repr__(self) -> str:
        state = "trainable" if self.trainable else "frozen"
        more = [f"{len(v)} {k}" for k, v in (("unconsumed", self.unconsumed), ("unfilled", self.unfilled)) if v]
        return f"{self.path}: adapters {self.adapters}, {self.tensors} tensors, {state}" + "".join(f", {m}" for m in more)
