"""Mathematics that several methods share: pure functions of tensors and numbers, no modules, no state."""
