"""peftlab: parameter-efficient fine-tuning of any PyTorch module.

    import peftlab
    peftlab.wrap(model, "lora", r=8)

Public names load on first use, so that importing peftlab costs what importing torch costs.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING

import torch  # noqa: F401 - the one import that costs

if TYPE_CHECKING:
    from .check import CheckError, check, watch
    from .estimate import estimate
    from .io import LoadError, load, save
    from .method import Base, Method
    from .networks import drop_network, prefix_from
    from .patterns import PatternError
    from .positions import positions
    from .quant.api import dequantize, quantize
    from .quant.compiled import compile_decoding
    from .quant.load import load_quantized
    from .quant.starts import wrap_quantized
    from .registry import methods
    from .report import report
    from .route import route
    from .schedule import param_groups, schedule
    from .switch import activate, active, disabled, ema_update, merge, rescale, restore, snapshot, unmerge, unwrap, using, view
    from .wrap import Plan, freeze, plan, train_only, unfreeze, wrap

__version__ = "0.1.0"

_WHERE = {
    **dict.fromkeys(("wrap", "plan", "freeze", "unfreeze", "train_only", "Plan"), "wrap"),
    **dict.fromkeys(("activate", "active", "using", "rescale", "disabled", "merge", "unmerge", "unwrap"), "switch"),
    **dict.fromkeys(("view", "snapshot", "restore", "ema_update"), "switch"),
    **dict.fromkeys(("check", "CheckError", "watch"), "check"),
    **dict.fromkeys(("save", "load", "LoadError"), "io"),
    **dict.fromkeys(("schedule", "param_groups"), "schedule"),
    **dict.fromkeys(("Method", "Base"), "method"),
    **dict.fromkeys(("drop_network", "prefix_from"), "networks"),
    "positions": "positions",
    **dict.fromkeys(("quantize", "dequantize"), "quant.api"),
    "load_quantized": "quant.load",
    "compile_decoding": "quant.compiled",
    "wrap_quantized": "quant.starts",
    "report": "report",
    "route": "route",
    "estimate": "estimate",
    "methods": "registry",
    "PatternError": "patterns",
}

__all__ = [
    "Base", "CheckError", "LoadError", "Method", "PatternError", "Plan", "activate", "active", "check", "compile_decoding", "dequantize", "disabled",
    "drop_network", "ema_update", "estimate", "freeze", "load", "load_quantized", "merge", "methods", "param_groups", "plan", "positions", "prefix_from",
    "quantize", "report", "rescale", "restore", "route", "save", "schedule", "snapshot", "train_only", "unfreeze", "unmerge", "unwrap", "using", "view",
    "watch", "wrap", "wrap_quantized",
]  # fmt: skip


class _Package(types.ModuleType):
    """Some files are named after the one function they hold; the import system must not bind the file over the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _WHERE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name.startswith("__"):
        raise AttributeError(name)
    from .patterns import did_you_mean

    raise AttributeError(f"module 'peftlab' has no attribute {name!r}.{did_you_mean(name, _WHERE)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
