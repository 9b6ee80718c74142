"""Torch's own modules that read a child's weight instead of calling the child."""

from __future__ import annotations

from torch import nn

from peftlab.model.index import ModelIndex


def parent_reads_weight(model: ModelIndex, m: nn.Module) -> bool:
    """Whether a parent reads this module's weight without calling it: attention's out_proj, the encoder layer's fused path."""
    return any(isinstance(p, READERS) for p in model.parents.get(id(m), ()))


# torch's own modules that read a child's weight: attention its out_proj, the encoder layer's fused path all of its children.
UNCALLING = (nn.MultiheadAttention, *filter(None, [getattr(nn, "LinearCrossEntropyLoss", None)]))  # they call none of their children

READERS = (*UNCALLING, nn.TransformerEncoderLayer)
