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
    from peftlab.formats.file import LoadError
    from peftlab.formats.native import load, save
    from peftlab.inspect.check import CheckError, check, watch
    from peftlab.inspect.estimate import estimate
    from peftlab.inspect.report import report
    from peftlab.manage.positions import positions
    from peftlab.manage.reparametrize import drop_network, prefix_from
    from peftlab.manage.route import route
    from peftlab.method import Base, Method
    from peftlab.model.patterns import PatternError
    from peftlab.quant.api import dequantize, quantize
    from peftlab.quant.compiled import compile_decoding
    from peftlab.quant.load import load_quantized
    from peftlab.quant.starts import wrap_quantized
    from peftlab.registry import methods
    from peftlab.switch import activate, active, disabled, ema_update, merge, rescale, restore, snapshot, unmerge, unwrap, using, view
    from peftlab.train.schedule import param_groups, schedule
    from peftlab.wrap import Plan, freeze, plan, train_only, unfreeze, wrap

__version__ = "0.1.0"

_WHERE = {
    **dict.fromkeys(("wrap", "plan", "freeze", "unfreeze", "train_only", "Plan"), "wrap"),
    **dict.fromkeys(("activate", "active", "using", "rescale", "disabled", "merge", "unmerge", "unwrap"), "switch"),
    **dict.fromkeys(("view", "snapshot", "restore", "ema_update"), "switch"),
    **dict.fromkeys(("check", "CheckError", "watch"), "inspect.check"),
    **dict.fromkeys(("save", "load", "LoadError"), "formats.native"),
    **dict.fromkeys(("schedule", "param_groups"), "train.schedule"),
    **dict.fromkeys(("Method", "Base"), "method"),
    **dict.fromkeys(("drop_network", "prefix_from"), "manage.reparametrize"),
    "positions": "manage.positions",
    **dict.fromkeys(("quantize", "dequantize"), "quant.api"),
    "load_quantized": "quant.load",
    "compile_decoding": "quant.compiled",
    "wrap_quantized": "quant.starts",
    "report": "inspect.report",
    "route": "manage.route",
    "estimate": "inspect.estimate",
    "methods": "registry",
    "PatternError": "model.patterns",
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
    from peftlab.model.patterns import did_you_mean

    raise AttributeError(f"module 'peftlab' has no attribute {name!r}.{did_you_mean(name, _WHERE)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
