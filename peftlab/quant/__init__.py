"""Quantised bases: 4-bit and 8-bit codes of frozen weights, in plain PyTorch, with kernels where there are any."""
