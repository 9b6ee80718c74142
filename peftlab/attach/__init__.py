"""From a call of `wrap` to an adapted model."""
