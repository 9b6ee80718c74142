"""Mixtures: several adapters at one place, weighed by a router."""
