"""Where the sub-layers of a transformer block begin and end, and how wide modules are, from their layers and the order of these.

A block's sub-layers are its attention and its feed-forward parts. Each ends in the layer that projects back to the block's width; the
feed-forward one is the last. Nothing here knows a model's name.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peftlab.model import layers
from peftlab.model.layers import is_norm
from peftlab.model.packed import dense_meta
from peftlab.model.walk import named_base_modules

CHANNEL_NORMS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)  # their features are no last dimension


def named_linear_layers(m: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of the linear-like layers and attention modules in `m`, in the order of registration."""
    inside: list[str] = []
    for path, child in named_base_modules(m):
        if any(path.startswith(p) for p in inside):
            continue
        if isinstance(child, nn.MultiheadAttention):
            inside.append(f"{path}." if path else "")
            yield path, child
        elif isinstance(layers.layer_rule(child), layers.Linear):
            yield path, child


def layer_widths(m: nn.Module) -> tuple[int, int]:
    """(n_in, n_out) of a linear-like layer or an attention module."""
    if isinstance(m, nn.MultiheadAttention):
        return m.embed_dim, m.embed_dim
    rule = layers.layer_rule(m)
    n_out, n_in = layers.matrix_shape(m, rule, dense_meta(m, rule.weight))
    return n_in, n_out


def module_widths(m: nn.Module) -> tuple[int, int]:
    """(n_in, n_out): the last dimension of what a module takes and gives, as its layers say; zeros where they say nothing.

    A module that also adds a residual is said to take that. One that holds several layers takes what its first layer takes. It gives what
    its own last layer gives if nothing inside takes that (a head); else the width it takes, where any layer comes back to it, as in a block.
    """
    if isinstance(m, nn.Embedding):
        return 0, m.embedding_dim
    if is_norm(m):
        size = 0 if isinstance(m, CHANNEL_NORMS) else next((p.shape[-1] for p in m._parameters.values() if p is not None), 0)
        return size, size
    found = list(named_linear_layers(m))
    there = [layer_widths(layer) for _, layer in found]
    if not there:
        sizes = [module_widths(c) for _, c in named_base_modules(m) if is_norm(c)]
        return sizes[-1] if sizes else (0, 0)
    if layers.adds_residual(m):
        return there[0][1], there[0][1]
    n_in, last = there[0][0], there[-1][1]
    if "." not in found[-1][0] and not _holds_experts(m) and all(n != last for n, _ in there):
        return n_in, last
    return n_in, n_in if any(n_out == n_in for _, n_out in there) else last


def sublayer_ends(block: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are those of the block's sub-layers, before anything is added to them; the feed-forward one is the last."""
    n = module_widths(block)[1]
    found = []
    for run in _layer_runs(block):
        if isinstance(run, list):  # layers that lie side by side: an end is followed by an expansion, or by nothing
            for m, after in zip(run, [*run[1:], None], strict=True):
                if layer_widths(m)[1] == n and (isinstance(m, nn.MultiheadAttention) or after is None or layer_widths(after)[1] > n):
                    found.append(m)
        elif (end := _output_layer(run, n)) is not None:
            found.append(end)
    return found


def _layer_runs(m: nn.Module) -> Iterator[nn.Module | list[nn.Module]]:
    """The children of a block that hold layers, one by one; neighbouring layers of its own together. Containers are looked into."""
    run: list[nn.Module] = []
    for child in _base_children(m):
        if isinstance(child, nn.MultiheadAttention) or isinstance(layers.layer_rule(child), layers.Linear):
            run.append(child)
            continue
        if not any(True for _ in named_linear_layers(child)) and not _holds_experts(child):
            continue
        if run:
            yield run
            run = []
        if isinstance(child, nn.ModuleList):
            yield from _layer_runs(child)
        else:
            yield child
    if run:
        yield run


def _base_children(m: nn.Module) -> list[nn.Module]:
    """Without peftlab's own."""
    return [c for p, c in named_base_modules(m) if p and "." not in p]


def _holds_experts(m: nn.Module) -> bool:
    """Whether it holds one matrix an expert in a parameter."""
    return any(p is not None and p.ndim == 3 for _, c in named_base_modules(m) for p in c._parameters.values())


def _output_layer(part: nn.Module, n: int) -> nn.Module | None:
    """The layer that projects back to width n; the part itself where experts do so side by side, None where nothing does."""
    if _holds_experts(part):
        return part
    hits = [(path, m) for path, m in named_linear_layers(part) if layer_widths(m)[1] == n]
    if not hits:
        return None
    path, last = hits[-1]
    lists = {p for p, m in named_base_modules(part) if isinstance(m, nn.ModuleList) and len(m) > 1 and path.startswith(f"{p}." if p else "")}
    return part if any(len({h.removeprefix(p).split(".")[1] for h, _ in hits if h.startswith(f"{p}.")}) > 1 for p in lists) else last


def parent_of_layer(block: nn.Module, layer: nn.Module) -> nn.Module:
    """The module in which a layer is a child."""
    return next((m for _, m in named_base_modules(block) if any(c is layer for c in m._modules.values())), block)


def closing_norm(block: nn.Module, end: nn.Module) -> nn.Module | None:
    """The normalisation that closes the sub-layer after the residual sum, where the structure says that there is one."""
    if isinstance(block, nn.TransformerEncoderLayer):
        return None if block.norm_first else block.norm2
    if isinstance(block, nn.TransformerDecoderLayer):
        return None if block.norm_first else block.norm3
    place = parent_of_layer(block, end)
    return next(c for c in _base_children(place) if is_norm(c)) if layers.adds_residual(place) else None


def feedforward_module(block: nn.Module) -> nn.Module | None:
    """The module that is called with the feed-forward sub-layer's input: the innermost that holds its layers, the module that also adds
    and normalises (called with the sub-layer's input second), or None where the layers lie in the block itself."""
    found = sublayer_ends(block)
    if not found:
        return None
    end, (n, _) = found[-1], module_widths(block)
    if any(end is m for m in _base_children(block)) and not isinstance(layers.layer_rule(end), layers.Linear):
        return end
    up = [m for _, m in named_base_modules(block) if m is not block and any(c is end for _, c in named_base_modules(m)) and m is not end]
    whole = [m for m in up if module_widths(m)[0] == n and sum(1 for _ in named_linear_layers(m)) > 1 and not any(is_norm(c) for c in _base_children(m))]
    if whole:
        return whole[-1]
    place = parent_of_layer(block, end)
    return place if layers.adds_residual(place) else None
