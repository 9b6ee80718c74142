"""Bottleneck adapters: small networks beside or behind sub-layers."""
