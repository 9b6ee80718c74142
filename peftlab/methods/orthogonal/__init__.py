"""Orthogonal: weights that are rotated."""
