"""Calling a model with a batch, and finding the loss in what it returns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def call_with_batch(model: nn.Module, batch):
    """The model's call with one batch: a mapping is keywords, a tuple or list positions, anything else the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def loss_in_output(output) -> Tensor:
    """The loss that a model returned: `.loss`, ["loss"], or a scalar."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    found = output if found is None else found
    if isinstance(found, (tuple, list)):
        found = found[0]
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise ValueError("the model returned no loss; give loss=, a function of (model, batch)")
    return found
