"""What `estimate` returns, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peftlab.support.table import table


@dataclass
class Estimate:
    """The cost of one method on one model; every figure in bytes unless it says entries. Printing it shows a table.

    `base_bytes`, `adapter_bytes`, `gradient_bytes`, `optimizer_bytes` and `file_bytes` are exact; `file_bytes` is the whole file that
    `save` writes while nothing but the adapter has changed, `tensor_bytes` its tensors. `activation_bytes` is what one forward leaves
    for backward (inputs and outputs included), `step_bytes` the most that activations, gradients and temporaries take together at one
    moment of a step, `peak_bytes` that and everything that stays. These three are None where `note` says why.
    """

    ACTIVATION_ERROR = 0.10  # relative; the worst case of benchmarks/estimate.py is below it
    PEAK_ERROR = 0.15

    method: str
    can: tuple[str, ...]  # see `capabilities`
    sites: int
    trainable: int  # entries
    total: int  # entries of the base, tied tensors once
    base_bytes: int
    adapter_bytes: int
    tensor_bytes: int
    file_bytes: int
    trained_bytes: int  # of the trained tensors themselves, wherever they lie
    gradient_bytes: int
    optimizer_bytes: int  # states and, with master=True, the float32 copies
    optimizer: str
    activation_bytes: int | None = None
    step_bytes: int | None = None
    peak_bytes: int | None = None
    note: str = ""

    @property
    def bytes_per_trained(self) -> float:
        """Bytes of weight, gradient and optimizer for each trained entry."""
        return (self.trained_bytes + self.gradient_bytes + self.optimizer_bytes) / self.trainable if self.trainable else 0.0

    @property
    def static_bytes(self) -> int:
        """What stays allocated between two steps."""
        return self.base_bytes + self.adapter_bytes + self.optimizer_bytes

    def __repr__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        rows = [
            ("base", f"{self.base_bytes:,}", human_bytes(self.base_bytes), f"{self.total:,} entries"),
            ("adapter", f"{self.adapter_bytes:,}", human_bytes(self.adapter_bytes), f"{self.trainable:,} trainable ({share:.3f} %)"),
            ("gradients", f"{self.gradient_bytes:,}", human_bytes(self.gradient_bytes), ""),
            ("optimizer", f"{self.optimizer_bytes:,}", human_bytes(self.optimizer_bytes), self.optimizer),
            ("file", f"{self.file_bytes:,}", human_bytes(self.file_bytes), f"{self.tensor_bytes:,} of tensors"),
        ]
        if self.activation_bytes is not None:
            rows[4:4] = [
                ("activations", f"{self.activation_bytes:,}", human_bytes(self.activation_bytes), f"within {self.ACTIVATION_ERROR:.0%}"),
                ("largest of a step", f"{self.step_bytes:,}", human_bytes(self.step_bytes), "activations, gradients, temporaries"),
                ("peak", f"{self.peak_bytes:,}", human_bytes(self.peak_bytes), f"within {self.PEAK_ERROR:.0%}"),
            ]
        text = f"{self.method} on {self.sites} sites ({', '.join(self.can)})\n{table(('', 'bytes', '', ''), rows, right=(1, 2))}"
        return f"{text}\n{self.note}" if self.note else text


@dataclass
class Comparison(Sequence):
    """Estimates of several methods on one model; `refused` says why a method cannot be had. Printing it shows one table."""

    rows: list[Estimate]
    refused: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, i):
        return self.rows[i]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        head = ("method", "sites", "trainable", "%", "file", "gradients", "optimizer", "activations", "peak", "can")
        body = [
            (
                e.method, e.sites, f"{e.trainable:,}", f"{100 * e.trainable / max(e.total, 1):.3f}", human_bytes(e.file_bytes), human_bytes(e.gradient_bytes),
                human_bytes(e.optimizer_bytes), human_bytes(e.activation_bytes), human_bytes(e.peak_bytes), ", ".join(e.can),
            )
            for e in self.rows
        ]  # fmt: skip
        notes = dict.fromkeys(e.note for e in self.rows if e.note)
        return "\n".join([table(head, body, right=range(1, 9)), *(f"{m}: {why}" for m, why in self.refused.items()), *notes])


def human_bytes(n: int | None) -> str:
    """Bytes with a binary unit, "-" for None."""
    if n is None:
        return "-"
    power = min(max(n, 1).bit_length() - 1, 49) // 10
    return f"{n / 1024**power:.{0 if power == 0 else 2}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
