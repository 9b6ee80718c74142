"""Activations and peak memory of one training step, run on tensors without memory."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from peftlab.attach.attach import attach_methods
from peftlab.attach.build import build_methods
from peftlab.attach.request import make_request
from peftlab.core.stack import adapted_modules
from peftlab.inspect.estimate.counts import EstimateOptions, without_values
from peftlab.support.batches import call_with_batch, loss_in_output
from peftlab.support.contexts import preserved_rng


class StepUnknown(Exception):
    """Why a step cannot be run on shapes alone."""


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is born inside, until it is released."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.meet(t)
        return out

    def meet(self, t: Tensor) -> None:
        s = t.untyped_storage()
        key, n = s._cdata, s.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += n
            self.peak = max(self.peak, self.now)
            weakref.finalize(s, self.release, key, n)

    def release(self, key: int, n: int) -> None:
        self.alive.discard(key)
        self.now -= n

    def know(self, t: Tensor) -> None:
        """Leave out a tensor that was there before the step."""
        self.alive.add(t.untyped_storage()._cdata)


def bytes_of_one_step(model: nn.Module, method, want: EstimateOptions, where: dict, hyper: dict) -> tuple[int, int]:
    """(bytes alive after a forward, the most bytes alive at once) of one training step, beyond weights and optimizer."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        twin = _meta_copy(model)
    except Exception as e:  # copying runs code of the model's own
        raise StepUnknown(f"the model cannot be copied ({_error_text(e)})") from e
    req = make_request(twin, method, hyper=hyper, **where)
    with preserved_rng():
        attach_methods(twin, req, build_methods(req))
        twin.train()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
                _with_fake_tensors(twin)
                return _run_step(twin, tree_map(lambda t: without_values(t, "cpu") if isinstance(t, Tensor) else t, _step_batch(model, want)), want)
        except StepUnknown:
            raise
        except Exception as e:  # a forward that looks at values, an operation without a shape rule, a batch that does not fit
            raise StepUnknown(f"this model's step cannot run on shapes alone ({_error_text(e)})") from e


def _error_text(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"


def _run_step(twin: nn.Module, batch, want: EstimateOptions) -> tuple[int, int]:
    live = _LiveBytes()
    for t in (*twin.parameters(), *twin.buffers()):
        live.know(t)
    for t in tree_leaves(batch):
        if isinstance(t, Tensor):
            live.meet(t)
    with live:
        out = None if want.loss else call_with_batch(twin, batch)
        loss = want.loss(twin, batch) if want.loss else _step_loss(twin, out)
        kept = live.now
        if not loss.requires_grad:
            raise StepUnknown("no adapter is reached from the loss")
        loss.backward()
    return kept, live.peak


def _step_loss(model: nn.Module, out) -> Tensor:
    try:
        return loss_in_output(out)
    except ValueError:
        pass
    first = next((t for t in tree_leaves(dict(out) if isinstance(out, Mapping) else out) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if first is None:
        raise StepUnknown("the model returns no floating tensor; give loss=")
    words = _largest_embedding(model)
    if first.ndim > 1 and words is not None and first.shape[-1] == words.num_embeddings:
        return F.cross_entropy(first.flatten(0, -2), torch.zeros(first.shape[:-1].numel(), dtype=torch.long, device=first.device))
    return first.mean()


def _largest_embedding(model: nn.Module) -> nn.Embedding | None:
    """The token embedding: the largest vocabulary."""
    return max((m for m in model.modules() if isinstance(m, nn.Embedding)), key=lambda m: m.num_embeddings, default=None)


def _step_batch(model: nn.Module, want: EstimateOptions):
    """The batch that was given, or token numbers for a model with a token embedding."""
    if want.inputs is not None:
        return dict(want.inputs) if isinstance(want.inputs, Mapping) else want.inputs
    if _largest_embedding(model) is None:
        raise StepUnknown("this model has no token embedding to make a batch for; give inputs=")
    ids = torch.zeros(want.batch, want.length, dtype=torch.long, device="meta")
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        return ids
    return {"input_ids": ids, "labels": ids} if "labels" in takes and _predicts_tokens(model) else {"input_ids": ids}


def _predicts_tokens(model: nn.Module) -> bool:
    """Whether labels have one entry a token: some layer outside the embedding has as many outputs as there are words."""
    words = _largest_embedding(model).num_embeddings
    return any(getattr(m, "out_features", None) == words for m in model.modules())


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with tensors on meta and without the hooks, which are the user's."""
    memo = {}
    for m in model.modules():
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None:
                new = without_values(t, "meta")
                memo[id(t)] = nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
    twin = copy.deepcopy(model, memo)
    for m in twin.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(m, kind).clear()
    return twin


def _with_fake_tensors(twin: nn.Module) -> None:
    """Put fake CPU tensors in place of the meta ones: kernels are chosen by device, and attention's choice decides what is kept."""
    new: dict[int, Tensor] = {}
    for m in twin.modules():
        for held in (m._parameters, m._buffers):
            for k, t in held.items():
                if t is None:
                    continue
                if id(t) not in new:
                    like = without_values(t, "cpu")
                    new[id(t)] = nn.Parameter(like, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else like
                held[k] = new[id(t)]
        if isinstance(m, nn.RNNBase):
            m.__dict__["_flat_weights"] = [m._parameters.get(n) for n in m._flat_weights_names]
    for _, _, stack in adapted_modules(twin):
        stack.unready.clear()  # start values are of no interest
        for pairs in stack.sites.values():
            for _, method in pairs:
                method.scheduled = True
