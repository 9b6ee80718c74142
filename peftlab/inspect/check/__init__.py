"""The proof, with one sample batch, that every adapter of a model works."""
