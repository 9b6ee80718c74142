"""Attention: keys and values that are nobody's tokens."""
