"""Matrices that are sparse in the two-dimensional Fourier basis.

Legend: c (n,) real coefficients; index (n,) flat positions u * n_in + v in an (n_out, n_in) spectrum. The inverse transforms carry the
factors 1 / n_out and 1 / n_in; X' is the transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(c: Tensor, index: Tensor, n_out: int, n_in: int) -> Tensor:
    """Re ifft2 of the spectrum that holds c at index, (n_out, n_in)."""
    c = c.to(torch.promote_types(c.dtype, torch.float32))
    spectrum = c.new_zeros(n_out * n_in).index_add(0, index, c)
    return torch.fft.ifft2(spectrum.view(n_out, n_in)).real


def times_dense(x: Tensor, c: Tensor, index: Tensor, n_out: int, n_in: int) -> Tensor:
    """x (..., n_in) -> x dense(...)', (..., n_out), by one transform of x, n products and one transform back."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    u, v = index // n_in, index % n_in
    picked = torch.fft.ifft(h).index_select(-1, v) * c.to(h.dtype)
    spectrum = picked.new_zeros(*x.shape[:-1], n_out).index_add(-1, u, picked)
    return torch.fft.ifft(spectrum).real.to(x.dtype)
