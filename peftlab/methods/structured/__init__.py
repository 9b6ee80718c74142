"""Structured: changes with a structure other than low rank: Kronecker products, spectra."""
