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
    from peftlab.attach.plan import Plan, plan
    from peftlab.attach.wrap import wrap
    from peftlab.core.base import Base
    from peftlab.core.method import Method
    from peftlab.formats.load import load
    from peftlab.formats.save import save
    from peftlab.inspect.check.check import check
    from peftlab.inspect.check.report import CheckError
    from peftlab.inspect.estimate.estimate import estimate
    from peftlab.inspect.report import report
    from peftlab.manage.copies import ema_update, restore, shared_base_copy, snapshot
    from peftlab.manage.freeze import freeze, train_only, unfreeze
    from peftlab.manage.merge import merge
    from peftlab.manage.positions import positions
    from peftlab.manage.reparametrize import drop_reparametrization, prefix_from
    from peftlab.manage.rescale import rescale
    from peftlab.manage.route import route
    from peftlab.manage.switch import activate, active, disabled, using
    from peftlab.manage.unmerge import unmerge
    from peftlab.manage.unwrap import unwrap
    from peftlab.model.patterns import PatternError
    from peftlab.quant.kernels.cpu import compile_decoding
    from peftlab.quant.load import load_quantized
    from peftlab.quant.quantize import dequantize, packed_weights, quantize
    from peftlab.quant.wrap_quantized import wrap_quantized
    from peftlab.registry import methods
    from peftlab.support.files import LoadError
    from peftlab.train.param_groups import param_groups
    from peftlab.train.schedule import schedule
    from peftlab.train.watch import watch

__version__ = "0.1.0"

_WHERE = {
    "Base": "core.base",
    "CheckError": "inspect.check.report",
    "LoadError": "support.files",
    "Method": "core.method",
    "PatternError": "model.patterns",
    "Plan": "attach.plan",
    "activate": "manage.switch",
    "active": "manage.switch",
    "check": "inspect.check.check",
    "compile_decoding": "quant.kernels.cpu",
    "dequantize": "quant.quantize",
    "disabled": "manage.switch",
    "drop_reparametrization": "manage.reparametrize",
    "ema_update": "manage.copies",
    "estimate": "inspect.estimate.estimate",
    "freeze": "manage.freeze",
    "load": "formats.load",
    "load_quantized": "quant.load",
    "merge": "manage.merge",
    "methods": "registry",
    "packed_weights": "quant.quantize",
    "param_groups": "train.param_groups",
    "plan": "attach.plan",
    "positions": "manage.positions",
    "prefix_from": "manage.reparametrize",
    "quantize": "quant.quantize",
    "report": "inspect.report",
    "rescale": "manage.rescale",
    "restore": "manage.copies",
    "route": "manage.route",
    "save": "formats.save",
    "schedule": "train.schedule",
    "shared_base_copy": "manage.copies",
    "snapshot": "manage.copies",
    "train_only": "manage.freeze",
    "unfreeze": "manage.freeze",
    "unmerge": "manage.unmerge",
    "unwrap": "manage.unwrap",
    "using": "manage.switch",
    "watch": "train.watch",
    "wrap": "attach.wrap",
    "wrap_quantized": "quant.wrap_quantized",
}

__all__ = [
    "Base", "CheckError", "LoadError", "Method", "PatternError", "Plan", "activate", "active", "check", "compile_decoding", "dequantize", "disabled",
    "drop_reparametrization", "ema_update", "estimate", "freeze", "load", "load_quantized", "merge", "methods", "packed_weights", "param_groups", "plan", "positions",
    "prefix_from", "quantize", "report", "rescale", "restore", "route", "save", "schedule", "shared_base_copy", "snapshot", "train_only", "unfreeze",
    "unmerge", "unwrap", "using", "watch", "wrap", "wrap_quantized",
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
