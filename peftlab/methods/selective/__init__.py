"""Selective: some of a model's own parameters are trained, in a copy."""
