"""`param_groups`: learning rates and weight decay for the tensors of adapters."""

from __future__ import annotations

from torch import nn

from peftlab.core.adapters import adapter_modules, trained_tensors
from peftlab.core.options import finite
from peftlab.model.index import ensure_module
from peftlab.model.walk import unwrap_parallel


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    b_ratio: float | None = None,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict]:
    """Parameter groups for any torch optimizer, with every trainable parameter of the model in exactly one.

    Groups, by name: "embedding" (tensors that change an embedding, where `embedding_lr` is given), "fast" (the tensors that a method
    marks, LoRA's B, where `b_ratio` is given: LoRA+, Hayou et al. 2024, arXiv 2402.12354), "adapter", and "base" for what trains
    outside adapters. With a weight decay, tensors of fewer than two dimensions go to "<name>_no_decay".

    Args:
        lr: learning rate of all but the groups below.
        b_ratio: the fast tensors' learning rate is `b_ratio * lr`.
        embedding_lr: learning rate of embeddings' adapters, fast tensors included, and of embeddings that train outside adapters.
        weight_decay: for tensors with at least two dimensions.

    Raises:
        ValueError: for values that are no positive number (weight_decay: no negative one), for a model without trainable
            parameters, and for a group that is asked for and would be empty.
    """
    for name, value in (("lr", lr), ("b_ratio", b_ratio), ("embedding_lr", embedding_lr)):
        if (value is not None or name == "lr") and finite(name, value) <= 0:
            raise ValueError(f"{name}={value!r}: must be positive")
    if finite("weight_decay", weight_decay) < 0:
        raise ValueError(f"weight_decay={weight_decay!r}: must not be negative")
    root = unwrap_parallel(ensure_module(model))
    params = [p for p in root.parameters() if p.requires_grad]
    if not params:
        raise ValueError("nothing in this model trains: unfreeze(model), or load(..., trainable=True)")
    kind = _group_kinds(root, b_ratio is not None, embedding_lr is not None)
    rates = {"adapter": lr, "base": lr, "fast": lr * (b_ratio or 1), "embedding": embedding_lr}
    groups: dict[str, dict] = {}
    for p in params:
        what, decay = kind.get(id(p), "base"), weight_decay if p.ndim >= 2 else 0.0
        name = what if decay or not weight_decay else f"{what}_no_decay"
        group = groups.setdefault(name, {"params": [], "lr": rates[what], "weight_decay": decay, "name": name})
        group["params"].append(p)
    there = {kind.get(id(p), "base") for p in params}
    if b_ratio is not None and "fast" not in there:
        raise ValueError(f"b_ratio={b_ratio}: no trainable adapter has a tensor for it (LoRA's B has)")
    if embedding_lr is not None and "embedding" not in there:
        raise ValueError(f"embedding_lr={embedding_lr}: no embedding trains in this model")
    if weight_decay and not any(g["weight_decay"] for g in groups.values()):
        raise ValueError(f"weight_decay={weight_decay}: no trainable tensor has two dimensions, it would act on nothing")
    return list(groups.values())


def _group_kinds(root: nn.Module, fast: bool, embedding: bool) -> dict[int, str]:
    """id of a tensor -> the kind of group that it belongs to, "base" where it is not there."""
    kind: dict[int, str] = {}
    if embedding:
        for m in root.modules():
            if isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
                kind |= {id(p): "embedding" for p in m._parameters.values() if p is not None}
    for _, _, site, m in adapter_modules(root):
        on_embedding = embedding and site is not None and isinstance(site.host, (nn.Embedding, nn.EmbeddingBag))
        for k, p in trained_tensors(site, m).items():
            kind[id(p)] = "embedding" if on_embedding else "fast" if fast and site is not None and k in m.fast else "adapter"
    return kind
