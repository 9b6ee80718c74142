"""Shared: tensors that all sites have in common, and little at each."""
