"""One safetensors file with a checked JSON header: written atomically, never unpickled, damage named on reading."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

FORMAT = 1
KEY = "peftlab"  # metadata entry that holds the header
CRC = "peftlab.crc"  # and its checksum


class LoadError(ValueError):
    """A file that cannot be used as it is, or not with this model."""


def checksum(t: Tensor) -> int:
    """CRC-32 of the tensor's bytes."""
    return zlib.crc32(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy()) if t.numel() else 0


def on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that are contiguous and share no memory, as the format demands."""
    out, seen = {}, set()
    for k, t in tensors.items():
        t = t.detach().cpu().contiguous()
        where = t.untyped_storage().data_ptr()
        if where in seen or t.untyped_storage().nbytes() != t.numel() * t.element_size():
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        out[k] = t
    return out


def write(path: str | os.PathLike, tensors: Mapping[str, Tensor], header: dict) -> tuple[int, int]:
    """Write all or nothing: a killed save leaves the earlier file as it was. Returns (file bytes, header bytes)."""
    path = Path(path)
    tensors = on_disk(tensors)
    facts = {k: [str(t.dtype).removeprefix("torch."), list(t.shape), checksum(t)] for k, t in tensors.items()}
    text = json.dumps({**header, "format": FORMAT, "tensors": facts}, separators=(",", ":"))
    blob = to_bytes(tensors, {"format": "pt", KEY: text, CRC: str(zlib.crc32(text.encode()))})
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; give a file name such as {str(path / 'adapter.safetensors')!r}")
    fd, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    data = sum(t.numel() * t.element_size() for t in tensors.values())
    return len(blob), len(blob) - data


def read_header(path: str | os.PathLike) -> dict:
    """The checked header of a file, without its tensors."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            return _header(path, f)
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError, UnicodeDecodeError) as e:
        raise LoadError(f"{str(path)!r} is not a whole safetensors file: {e}") from None


def read(path: str | os.PathLike, wanted=None) -> tuple[dict, dict[str, Tensor]]:
    """(header, tensors), every tensor checked against its checksum; `wanted(key)` may leave some out."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            header = _header(path, f)
            tensors = {k: f.get_tensor(k) for k in f.keys() if wanted is None or wanted(k)}  # noqa: SIM118 - not a dict
            stored = set(f.keys())
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError, UnicodeDecodeError) as e:
        raise LoadError(f"{str(path)!r} is not a whole safetensors file: {e}") from None
    listed = header["tensors"]
    if stored != listed.keys():
        odd = sorted(stored ^ listed.keys())
        raise LoadError(f"{str(path)!r} is damaged: {odd[0]!r} and {len(odd) - 1} more tensors are not those its header lists")
    for k, t in tensors.items():
        dtype, shape, crc = listed[k]
        if str(t.dtype) != f"torch.{dtype}" or list(t.shape) != shape or checksum(t) != crc:
            raise LoadError(f"{str(path)!r} is damaged: tensor {k!r} is not the one that was saved")
    return header, tensors


def _header(path, f) -> dict:
    meta = f.metadata() or {}
    if KEY not in meta:
        raise LoadError(f"{str(path)!r} is not a peftlab file; {_looks_like(list(f.keys()))}")
    text = meta[KEY]
    if meta.get(CRC) != str(zlib.crc32(text.encode())):
        raise LoadError(f"{str(path)!r} is damaged: its header does not match its checksum")
    header = json.loads(text)
    if header["format"] > FORMAT:
        raise LoadError(f"{str(path)!r} has format {header['format']}, written by peftlab {header['peftlab']}; this version reads up to {FORMAT}")
    return header


def _looks_like(keys: list[str]) -> str:
    if any(k.startswith("base_model.model.") for k in keys):
        return "its tensors are named as HF peft names them"
    if any(k.startswith(("lora_unet", "lora_te", "lycoris_")) for k in keys):
        return "its tensors are named as kohya and LyCORIS name them"
    return f"its tensors are {', '.join(keys[:3]) or 'none'} ..."
