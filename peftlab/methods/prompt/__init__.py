"""Prompts: trained vectors among the embedded tokens."""
