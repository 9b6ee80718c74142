"""Compiled kernels for packed weights: C++ for CPUs, Triton for GPUs."""
