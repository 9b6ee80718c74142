"""Scaling: features multiplied by learned vectors."""
