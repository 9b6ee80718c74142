"""Quantised bases: 4-bit and 8-bit codes of frozen weights, in plain PyTorch."""

from peftlab.quant.api import dequantize, packed_weights, quantize

__all__ = ["dequantize", "packed_weights", "quantize"]
