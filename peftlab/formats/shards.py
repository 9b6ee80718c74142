"""The tensors of a model in one or several safetensors files, read and replaced one at a time."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from peftlab.formats.file import checksum
from peftlab.formats.rebuild import method_class
from peftlab.model.patterns import did_you_mean
from peftlab.support.files import LoadError

INDEX = "model.safetensors.index.json"

TRIM = 1 << 22  # bytes

ADDED = "added.safetensors"  # adapted tensors that the model folder does not have, such as a new head

FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")  # other copies of the weights, then out of date

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def choose_files(header: dict, path: Path, names: str | Iterable[str] | None) -> tuple[list[dict], list[str]]:
    """(adapters to merge in stacking order, names of inactive ones); methods that cannot be merged raise."""
    there = {a["name"]: a for a in header["adapters"]}
    asked = [names] if isinstance(names, str) else None if names is None else list(names)
    for n in asked or ():
        if n not in there:
            raise LoadError(f"{str(path)!r} has no adapter {n!r}; it holds {list(there)}.{did_you_mean(n, there)}")
    chosen = [a for n, a in there.items() if (a.get("active", True) if asked is None else n in asked)]
    if not chosen:
        raise ValueError(f"{str(path)!r}: none of its adapters {list(there)} is active; say which to merge")
    for a in chosen:
        cls = method_class(a["method"])
        if cls.surrounds():
            raise ValueError(f"{a['name']!r} ({a['method']}) changes the call, not the weight, and cannot be merged")
    return chosen, [n for n, a in there.items() if a not in chosen and not a.get("active", True)]


def copy_folder(source: Path, to: Path) -> list[str]:
    """Copy the folder but for other copies of the weights; returns what was left out."""
    skipped = []
    for path in sorted(source.rglob("*")):
        rest = path.relative_to(source)
        if path.is_dir():
            continue
        if path.suffix in FOREIGN or path.name.endswith((".bin.index.json",)):
            skipped.append(str(rest))
            continue
        (to / rest).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / rest)
    return skipped


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes lie."""

    file: str
    start: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shards:
    """The tensors of a model folder, read one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        if index.is_file():
            self.files = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
        elif (folder / "model.safetensors").is_file():
            self.files = ["model.safetensors"]
        else:
            raise FileNotFoundError(f"{str(folder)!r} has neither model.safetensors nor {INDEX}; other formats are not read")
        self.places: dict[str, TensorPlace] = {}
        for name in self.files:
            self._scan(name)

    def _scan(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"the shard {str(path)!r}, which the index names, is missing")
        try:
            with safetensors.safe_open(path, "pt"):  # checks that the file is whole
                pass
        except (safetensors.SafetensorError, OSError) as e:
            raise LoadError(f"{str(path)!r} is not a whole safetensors file: {e}") from None
        with open(path, "rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            table = json.loads(f.read(size))
        for key, facts in table.items():
            if key != "__metadata__":
                start, end = facts["data_offsets"]
                self.places[key] = TensorPlace(name, 8 + size + start, end - start, TORCH_DTYPES.get(facts["dtype"]), tuple(facts["shape"]))

    def read(self, key: str) -> Tensor:
        """One tensor, as it is stored."""
        place = self.places[key]
        if place.dtype is None:
            raise ValueError(f"{key!r} has a data type that cannot be merged into")
        out = torch.empty(place.shape, dtype=place.dtype, device="cpu")
        with open(self.folder / place.file, "rb") as f:
            f.seek(place.start)
            if out.numel():
                f.readinto(out.reshape(-1).view(torch.uint8).numpy())
        return out

    def write(self, to: Path, key: str, value: Tensor) -> None:
        """Over the tensor's bytes in a copy of the folder."""
        place = self.places[key]
        if tuple(value.shape) != place.shape:
            raise ValueError(f"{key!r} has shape {place.shape} and cannot become {tuple(value.shape)}")
        data = value.to(place.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        with open(to / place.file, "r+b") as f:
            f.seek(place.start)
            f.write(data)


class ShardTensors(Mapping):
    """The adapter file's tensors, read and checked when they are asked for."""

    def __init__(self, file, header: dict, path: Path):
        self.file, self.listed, self.path = file, header["tensors"], path

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.listed:
            raise KeyError(key)
        dtype, shape, crc = self.listed[key]
        t = self.file.get_tensor(key)
        if str(t.dtype) != f"torch.{dtype}" or list(t.shape) != shape or checksum(t) != crc:
            raise LoadError(f"{str(self.path)!r} is damaged: tensor {key!r} is not the one that was saved")
        return t.clone()  # a view of the mapped file may be unaligned, and products of such tensors can differ in the last bit

    def __iter__(self) -> Iterator[str]:
        return iter(self.listed)

    def __len__(self) -> int:
        return len(self.listed)
