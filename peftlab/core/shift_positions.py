"""One run of a stack with the positions of its tokens moved."""

from __future__ import annotations

import torch
from torch import Tensor

from peftlab.core.base import Base
from peftlab.core.insert_tokens import past_of_caller
from peftlab.model.arguments import past_in
from peftlab.model.tokens import token_arguments
from peftlab.model.walk import original_class
from peftlab.parts.token_slots import numbers_of_rows


def refuse_without_positions(base: Base) -> None:
    """For a method that moves positions."""
    if token_arguments(base.site.host).positions is None:
        raise ValueError(f"shift=True: {base.path!r}, a {original_class(base.site.host).__name__}, takes no position ids that could be moved")


def call_with_shifted_positions(base: Base, by: int | list[tuple[int, Tensor]], args: tuple, kwargs: dict):
    """What lies below, with the real tokens' positions moved, by so many or by so many for each group of rows."""
    inputs = token_arguments(base.site.host)
    named = inputs.named(args, kwargs)
    x = inputs.given(named)
    given = named.get(inputs.positions)
    if given is None:
        given = torch.arange(x.shape[1], device=x.device)[None] + past_of_caller(base, past_in(named))
    if not isinstance(by, int):
        by = numbers_of_rows(by, x.shape[0], x.device)[:, None]
    return base(**named | {inputs.positions: given + by})
