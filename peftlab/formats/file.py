"""One safetensors file with a checked JSON header: written atomically, never unpickled, damage named on reading."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from peftlab.support.files import LoadError, whole

FORMAT = 1

KEY = "peftlab"  # metadata entry that holds the header

CRC = "peftlab.crc"  # and its checksum

NEEDED = {"peftlab": str, "adapters": list, "base": dict, "buffers": list, "included": list, "tensors": dict}


DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def raw_bytes(t: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(t.reshape(-1).view(torch.uint8).numpy())


def checksum(t: Tensor) -> str:
    """CRC-32 of the tensor's bytes, eight hexadecimal digits."""
    return f"{zlib.crc32(raw_bytes(t.detach().contiguous())) if t.numel() and not t.is_meta else 0:08x}"


def on_disk(t: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous; a tensor on meta stays there, so that sizes can be known beforehand."""
    t = t.detach()
    return (t if t.is_meta else t.cpu()).contiguous()


def encode(tensors: Mapping[str, Tensor], header: dict) -> bytes:
    """The file's head: eight bytes of length and the safetensors JSON with our header in its metadata. Same input, same bytes.

    Tensors follow in the order of `layout`. Checksums and fingerprints have fixed widths, so the size follows from shapes alone.
    """
    facts = {k: [str(t.dtype).removeprefix("torch."), list(t.shape), checksum(t)] for k, t in tensors.items()}
    text = json.dumps({**header, "format": FORMAT, "tensors": facts}, separators=(",", ":"))
    listed: dict[str, object] = {"__metadata__": {"format": "pt", KEY: text, CRC: f"{zlib.crc32(text.encode()):08x}"}}
    start = 0
    for k in layout(tensors):
        t = tensors[k]
        stop = start + t.numel() * t.element_size()
        listed[k] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, stop]}
        start = stop
    head = json.dumps(listed, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head


def layout(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide types first, so that everything stays aligned; then by name."""
    return sorted(tensors, key=lambda k: (-tensors[k].element_size(), k))


def write(path: str | os.PathLike, tensors: Mapping[str, Tensor], header: dict) -> tuple[int, int]:
    """Write all or nothing: a killed save leaves the earlier file as it was. Returns (file bytes, bytes that are not tensors)."""
    path = Path(path)
    tensors = {k: on_disk(t) for k, t in tensors.items()}
    unknown = [k for k, t in tensors.items() if t.dtype not in DTYPES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} has dtype {tensors[unknown[0]].dtype}, which the file format does not know")
    head = encode(tensors, header)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; give a file name such as {str(path / 'adapter.safetensors')!r}")
    try:
        fd, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as e:  # which names the file that was to be renamed
        raise OSError(e.errno, e.strerror, str(path)) from None
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(head)
            for k in layout(tensors):
                f.write(raw_bytes(tensors[k]))
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
    return len(head) + sum(t.numel() * t.element_size() for t in tensors.values()), len(head)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator:
    """A safetensors file; LoadError inside the block where it is none, or damaged."""
    if os.path.isdir(path):
        raise LoadError(f"{str(path)!r} is a folder; give the file that save wrote, such as {str(Path(path) / 'adapter.safetensors')!r}")
    with whole(path), safetensors.safe_open(path, "pt") as f:
        yield f


def read_header(path: str | os.PathLike) -> dict:
    """The checked header of a file, without its tensors."""
    with opened(path) as f:
        return _header(path, f)


def read(path: str | os.PathLike, wanted=None) -> tuple[dict, dict[str, Tensor]]:
    """(header, tensors), every tensor checked against its checksum; `wanted(key)` may leave some out."""
    with opened(path) as f:
        header = _header(path, f)
        tensors = {k: f.get_tensor(k) for k in f.keys() if wanted is None or wanted(k)}  # noqa: SIM118 - not a dict
        stored = set(f.keys())
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
    if meta.get(CRC) != f"{zlib.crc32(text.encode()):08x}":
        raise LoadError(f"{str(path)!r} is damaged: its header does not match its checksum")
    try:
        header = json.loads(text)
        version, writer = header["format"], header["peftlab"]
        sound = all(isinstance(header[k], kind) for k, kind in NEEDED.items()) and header["adapters"]
        sound = sound and all(isinstance(a, dict) and isinstance(a["name"], str) and a["sites"] for a in header["adapters"])
    except (ValueError, KeyError, TypeError) as e:
        raise LoadError(f"{str(path)!r}: its header is not one that peftlab writes ({type(e).__name__}: {e})") from None
    if isinstance(version, int) and version > FORMAT:
        raise LoadError(f"{str(path)!r} has format {version}, written by peftlab {writer}; this version reads up to {FORMAT}")
    if version != FORMAT or isinstance(version, bool) or not sound:
        raise LoadError(f"{str(path)!r}: its header is not one that peftlab writes (format {version!r})")
    return header


def _looks_like(keys: list[str]) -> str:
    if any(k.startswith("base_model.model.") for k in keys):
        return "its tensors are named as HF peft names them"
    if any(k.startswith(("lora_unet", "lora_te", "lycoris_")) for k in keys):
        return "its tensors are named as kohya and LyCORIS name them"
    return f"its tensors are {', '.join(keys[:3]) or 'none'} ..."
