"""From a method and patterns to an adapted model: plan, build, calibrate, attach. A call that raises changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from peftlab.attach.attach import attach_methods
from peftlab.attach.build import build_methods
from peftlab.attach.calibrate import calibrate
from peftlab.attach.request import make_request
from peftlab.core.method import Method
from peftlab.core.site import Site
from peftlab.model.walk import unwrap_parallel
from peftlab.support.contexts import paused_gc, preserved_rng
from peftlab.support.progress import Progress, check_progress


@paused_gc()
@torch.inference_mode(False)  # what trains cannot be made inside it
def wrap(
    model: nn.Module, method: str | type[Method], *, targets=None, exclude=None, layers=None, of: str | None = None, name: str = "default",
    overrides: Mapping | None = None, data: Iterable | None = None, loss: Callable | None = None, seed: int = 0, dtype: torch.dtype | None = None,
    tie: str | None = None, split: Mapping | None = None, layout: Mapping | None = None, read=None, progress: Progress = None, **hyper,
) -> nn.Module:  # fmt: skip
    """Attach a method to the places of `model` that the patterns mean, freeze everything else, and return the same model.

    Args:
        model: any module; it is changed in place, and stays the same object of the same class.
        method: a name of the registry (`peftlab.methods()`) or a subclass of `peftlab.Method`.
        targets, exclude: patterns (see `peftlab.patterns`); by default the method's structural rule.
        layers, of: indices of the blocks to stay in, and the list they index (needed where a model has several).
        name: the adapter's name; methods stack in the order of their wrapping.
        overrides: pattern -> options, for sites that differ; the most specific pattern wins.
        data, loss: batches for starts that are computed from data, and `loss(model, batch)` where the model returns none. In a process
            group every process calls `wrap` with its share of the batches, and all get the start of all of them.
        seed: start values depend on it, the adapter's name and the site's path alone; the global generators are not touched.
        dtype: of the adapter's tensors; float32 by default (float64 on a float64 base).
        tie: "share" or "untie", needed where a targeted tensor is tied to another.
        split: pattern -> {part: rows} names row blocks of fused projections, which targets can then mean.
        layout: pattern -> "oi" | "io" | "eoi" | "eio" states the orientation of raw 2-D and 3-D parameters.
        read: patterns of layers whose weight is read without their being called.
        progress: True for bars (drawn by tqdm), or a function that is called as progress(done, total, path) after each site's start, for
            starts that take long; and as progress(batches, of how many or None, "data") after each batch, before the starts that are
            computed from data.
        **hyper: the method's own options.

    Raises:
        PatternError, ValueError, TypeError: with the value, the limit and the nearest right name; the model is then unchanged.
    """
    req = make_request(model, method, targets=targets, exclude=exclude, layers=layers, of=of, name=name, overrides=overrides, seed=seed, dtype=dtype,
                   tie=tie, split=split, layout=layout, read=read, hyper=hyper)  # fmt: skip
    if loss is not None and not callable(loss):
        raise TypeError(f"loss={loss!r}: a function of (model, batch)")
    check_progress(progress)
    if data is not None and not isinstance(data, Iterable):
        raise TypeError(f"data={data!r}: an iterable of batches")
    with preserved_rng():
        methods = build_methods(req, progress)
        if any(m.needs_data == "codes" for m in methods):
            raise ValueError(f"this start of {req.label} is found while the base is quantised: peftlab.wrap_quantized(model, kind, init=...) does both")
        if any(m.needs_data for m in methods):
            if data is None:
                raise ValueError(f"{req.label} computes its start from data: give data=, an iterable of batches")
            _calibrate_checked(unwrap_parallel(model), list(zip(req.sites, methods, strict=True)), data, loss, progress)
    attach_methods(unwrap_parallel(model), req, methods)
    return model


class _CheckedLoss:
    """The caller's loss where its gradients are asked for: one number, which must depend on the weights in some batch."""

    def __init__(self, loss: Callable):
        self.loss, self.values, self.depends = loss, 0, False

    def __call__(self, model: nn.Module, batch) -> Tensor:
        value = self.loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise TypeError(f"loss= returned {what}: one number, as the floating tensor that its gradient is taken of")
        self.values, self.depends = self.values + 1, self.depends or value.grad_fn is not None
        return value


def _calibrate_checked(model: nn.Module, pairs: list[tuple[Site, Method]], data: Iterable, loss: Callable | None, progress: Progress) -> None:
    """`calibrate`, which says so where the loss has no gradient."""
    if loss is None or not any(m.needs_data == "gradients" for _, m in pairs):
        calibrate(model, pairs, data, loss, progress)
        return
    watched = _CheckedLoss(loss)
    try:
        calibrate(model, pairs, data, watched, progress)
    except ValueError as e:
        if watched.values and not watched.depends:
            raise ValueError("nothing that loss= returned depends on the weights: was it detached, or computed under torch.no_grad()?") from e
        raise
