"""A plain PyTorch training loop that keeps the best adapter, stops on Ctrl-C between two steps, and resumes bit for bit.

What a later process needs to continue is one adapter file (`peftlab.save`) and one safetensors file with the optimizer's tensors, the
schedules and the generators; the second names the first, and each is written before the older pair is removed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import peftlab
from peftlab.cli.errors import Diverged, UserError
from peftlab.cli.tasks import Item, Task

STATE = "training.safetensors"
BEST = "best.safetensors"


@dataclass(frozen=True)
class Settings:
    """How to train; everything the result depends on beside the model, the method and the data."""

    epochs: int = 2
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # norm of the gradient
    evals: int = 2  # validations an epoch
    seed: int = 0


@dataclass
class History:
    """What happened so far."""

    step: int = 0
    train: list[float] = field(default_factory=list)  # loss of each step
    val: list[tuple[int, float, float | None]] = field(default_factory=list)  # (step, loss, accuracy)
    best_step: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0  # training alone, over all runs
    step_seconds: float = 0.0  # median of this run's steps


class Loop:
    """Trains the adapters of `model` on encoded examples.

    Args:
        folder: where the best adapter and the state for resuming are kept.
        run: facts that a resumed run must share (the model, the method, the data), kept in the state.
    """

    def __init__(self, model: nn.Module, task: Task, train: list[Item], val: list[Item], settings: Settings, folder: Path, run: dict | None = None):
        self.model, self.task, self.train, self.val, self.settings, self.folder = model, task, train, val, settings, folder
        self.facts = run or {}
        self.per_epoch = math.ceil(len(train) / settings.batch)
        self.total = settings.epochs * self.per_epoch
        every = self.per_epoch / settings.evals
        self.validate_at = {max(1, round(every * i)) for i in range(1, settings.epochs * settings.evals + 1)} | {self.total}
        matrices = any(p.ndim >= 2 for p in model.parameters() if p.requires_grad)
        decay = settings.weight_decay if matrices else 0.0  # only matrices decay; a method may train vectors alone
        self.optimizer = torch.optim.AdamW(peftlab.param_groups(model, lr=settings.lr, weight_decay=decay))
        warmup = max(1, round(settings.warmup * self.total))
        shape = lambda s: min(1.0, (s + 1) / warmup) * max(0.0, (self.total - s) / self.total)  # noqa: E731
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, shape)
        self.schedule = peftlab.schedule(model, self.optimizer, total_steps=self.total)
        self.history = History()
        torch.manual_seed(settings.seed)

    def run(
        self,
        on_step: Callable[[int, float], None] = lambda *_: None,
        on_eval: Callable[[int, float, float | None], None] = lambda *_: None,
        states: bool = True,
    ) -> bool:
        """Train to the end; False when Ctrl-C stopped it first. `states`: keep what resuming needs on disk, at each validation and then."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        times: list[float] = []
        self.model.train()
        with _interruptible() as stopped:
            for epoch in range(self.history.step // self.per_epoch, self.settings.epochs):
                batches = self.task.batches(self.train, self.settings.batch, self.settings.seed * 100_003 + epoch)
                for indices in batches[self.history.step - epoch * self.per_epoch :]:
                    start = time.perf_counter()
                    loss = self._step(params, indices)
                    times.append(time.perf_counter() - start)
                    self.history.seconds += times[-1]
                    self.history.step_seconds = statistics.median(times)
                    on_step(self.history.step, loss)
                    if self.history.step in self.validate_at:
                        self._validate(on_eval)
                    if states and (stopped() or self.history.step in self.validate_at):
                        self.save_state()
                    if stopped():
                        self.model.eval()
                        return False
        self.model.eval()
        return True

    def _step(self, params: list[Tensor], indices: list[int]) -> float:
        loss = self.task.loss(self.model, self.task.batch([self.train[i] for i in indices]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, self.settings.clip)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        value = loss.item()
        self.history.step += 1
        self.history.train.append(value)
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {self.history.step}: try a smaller --lr than {self.settings.lr:g}")
        return value

    def _validate(self, on_eval: Callable[[int, float, float | None], None]) -> None:
        scores = self.task.evaluate(self.model, self.val)
        self.history.val.append((self.history.step, scores.loss, scores.accuracy))
        if scores.loss < self.history.best_loss:
            self.history.best_loss, self.history.best_step = scores.loss, self.history.step
            peftlab.save(self.model, self.folder / BEST)
        on_eval(self.history.step, scores.loss, scores.accuracy)

    # ---- resuming

    def save_state(self) -> None:
        """Write all that a new process needs to continue with the next step."""
        adapter = self.folder / f"step-{self.history.step}.safetensors"
        peftlab.save(self.model, adapter)
        names = {id(p): name for name, p in self.model.named_parameters()}
        moments = {names[id(p)]: dict(state) for p, state in self.optimizer.state.items()}
        tensors: dict[str, Tensor] = {}
        info = {
            "adapter": adapter.name,
            "run": self.facts | asdict(self.settings),
            "history": asdict(self.history),
            "optimizer": _pack(moments, "optimizer", tensors),
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "rate": _pack({k: v for k, v in self.rate.state_dict().items() if k != "lr_lambdas"}, "rate", tensors),
            "schedule": _pack(self.schedule.state_dict(), "schedule", tensors),
        }
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.task.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.task.device)
        part = self.folder / f".{STATE}.part"
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, part, {"training": json.dumps(info)})
        os.replace(part, self.folder / STATE)
        for old in self.folder.glob("step-*.safetensors"):
            if old != adapter:
                old.unlink()

    def load_state(self) -> None:
        """Take up the state of `read_state(folder)`; the model already holds the adapters of that step."""
        info, tensors = read_state(self.folder)
        params = dict(self.model.named_parameters())
        moments = _unpack(info["optimizer"], tensors)
        if not moments.keys() <= params.keys():
            raise UserError(f"--resume: {self.folder / STATE} trained {sorted(moments.keys() - params.keys())[0]!r}, which this run does not have")
        for name, state in moments.items():
            # AdamW keeps its step counter on the CPU and the rest beside the parameter.
            self.optimizer.state[params[name]] = {k: v if k == "step" or not isinstance(v, Tensor) else v.to(params[name].device) for k, v in state.items()}
        for group, lr in zip(self.optimizer.param_groups, info["rates"], strict=True):
            group["lr"] = lr
        self.rate.load_state_dict({**self.rate.state_dict(), **_unpack(info["rate"], tensors)})
        self.schedule.load_state_dict(_unpack(info["schedule"], tensors))
        self.history = History(**info["history"])
        self.history.val = [tuple(row) for row in self.history.val]
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.task.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.task.device)


def read_state(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(facts, tensors) of a saved training state; UserError where there is none."""
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"--resume: {folder} holds no {STATE}; nothing to continue")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["training"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict


def _pack(value, path: str, tensors: dict[str, Tensor]):
    """A nested state as JSON; its tensors go to `tensors` and leave their key behind."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"items": [[_pack(k, "", {}), _pack(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]}
    return value


def _unpack(value, tensors: dict[str, Tensor]):
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "items" in value:
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in value["items"]}
    return [_unpack(v, tensors) for v in value["list"]]


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only sets a flag, so that no step is cut in half; the second one acts as ever."""
    hit = False

    def note(number, frame):
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: Ctrl-C does not arrive here
        yield lambda: False
        return
    try:
        yield lambda: hit
    finally:
        signal.signal(signal.SIGINT, before)
