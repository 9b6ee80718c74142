"""What `finetune` and `compare` share: options, loading data and task, attaching a method with its head, memory."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import peftlab
from peftlab.cli import data as datasets
from peftlab.cli import tasks
from peftlab.cli.errors import UserError, blamed
from peftlab.cli.tasks import HEAD, Classify, Item, Task
from peftlab.registry import entries, keywords, resolve

ADAPTER, HEAD_ADAPTER = "default", "head"

RATE = 3e-3  # Adam's learning rate for a method whose file recommends none; `compare` searches around it on validation data


@dataclass
class Options:
    """What the user asked for."""

    method: str = "lora"
    hyper: dict = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    model: Path | None = None
    data: Path | None = None
    task: str = "classify"
    text_column: str = "text"
    label_column: str = "label"
    prompt_column: str | None = None
    train: int = 2000
    val: int = 500
    test: int = 1000
    max_length: int = 40
    device: str = "cpu"
    seed: int = 0
    data_seed: int = 0


@dataclass
class Work:
    """Data and task, ready to train on."""

    task: Task
    split: datasets.Split
    train: list[Item]
    val: list[Item]
    test: list[Item]
    model_name: str

    def labels(self, part: str) -> torch.Tensor:
        """Class numbers of "train", "val" or "test", (examples,)."""
        return torch.tensor([item.label for item in getattr(self, part)])

    def facts(self) -> dict:
        """What identifies model and data, for comparing runs."""
        rows = [self.split.train, self.split.val, self.split.test]
        return {
            "task": self.task.name,
            "model": self.model_name,
            "data": self.split.name,
            "max_length": self.task.max_length,
            "data_crc": zlib.crc32(repr(rows).encode()),
            "device": self.task.device.type,
        }


def prepare(options: Options) -> Work:
    """Read the data and the tokenizer and encode the three parts."""
    if options.task not in ("classify", "lm"):
        raise UserError(f"--task {options.task}: classify or lm")
    device = usable(options.device)
    if options.model is None and options.task == "lm":
        raise UserError("--task lm needs --model DIR, a local causal language model: the default model is a sentence encoder")
    for name in ("train", "val", "test", "max_length"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    folder = options.model if options.model is not None else tasks.default_folder()
    if options.data is None:
        rows, name = datasets.default_rows(), "Rotten Tomatoes"
    else:
        rows = datasets.read(options.data, options.task, options.text_column, options.label_column, options.prompt_column)
        name = options.data.name
    split = datasets.split(rows, name, options.task, (options.train, options.val, options.test), options.data_seed)
    task = tasks.make(options.task, folder, options.max_length, device, split)
    train, val, test = (task.encode(rows) for rows in (split.train, split.val, split.test))
    return Work(task, split, train, val, test, "all-MiniLM-L6-v2" if options.model is None else str(folder))


def usable(device: str) -> str:
    """The device, if this machine has it."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        raise UserError(f"--device {device}: not available here; there is {', '.join(k for k, v in there.items() if v)}")
    return device


def parse_set(pairs: list[str], method: str) -> dict:
    """`r=16` and the like as keywords of the method, each as the type that the method's own annotation and default show."""
    with blamed(f"--method {method}"):
        known = keywords(resolve(method)[0])
    values = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise UserError(f"--set {pair}: write it as name=value")
        default = known[key].default if key in known else None
        values[key] = _value(text, keep_text=isinstance(default, str))
    return values


def _value(text: str, keep_text: bool) -> object:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words and not keep_text:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    if "," in text and not keep_text:
        return [_value(part, keep_text) for part in text.split(",")]
    return text


def rate(method: str) -> float:
    """The learning rate for a method where none is given."""
    entry = entries().get(method)
    return RATE if entry is None or entry.rate is None else entry.rate


def wrap_options(task: Task, options: Options) -> dict:
    """The arguments of `wrap` and `plan`, the model apart; the task's own head always stays out."""
    where = {"targets": options.targets} if options.targets else {}
    where |= {"exclude": HEAD} if isinstance(task, Classify) else {}
    return where | options.hyper


def attach(model: nn.Module, work: Work, options: Options) -> nn.Module:
    """Wrap the model with the method and, for classify, its head with a trained copy, so that one file holds both."""
    task = work.task
    first = task.batches(work.train, 16, options.seed)[:16]
    batches = [task.batch([work.train[i] for i in indices]) for indices in first]
    with blamed(f"--method {options.method}"):
        peftlab.wrap(model, options.method, name=ADAPTER, seed=options.seed, data=batches, loss=task.loss, **wrap_options(task, options))
    if isinstance(task, Classify):
        peftlab.wrap(model, "full", targets=HEAD, name=HEAD_ADAPTER)
    return model


def mergeable(options: Options) -> bool:
    """Whether the method changes frozen weights by an equation, so that merging is defined."""
    cls = resolve(options.method)[0]
    return cls.defined() and not options.hyper.get("in_place", False)


class PeakMemory:
    """Most memory in use inside the block, above what was in use at its beginning, in bytes.

    On CUDA the allocator's own count; on Linux the process's resident set, whose high-water mark the kernel can reset; else None.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
        elif platform.system() == "Linux":
            with contextlib.suppress(AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # pages that earlier work freed must not hide what this work needs
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                self.start = None
            else:
                self.start = _status("VmRSS")
        else:
            self.start = None
        return self

    def __exit__(self, *exc) -> None:
        if self.start is None:
            return
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        self.bytes = None if peak is None else max(0, peak - self.start)


def _status(key: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None
