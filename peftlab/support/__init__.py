"""What every room may use: contexts, progress, tables, values that a recomputed forward finds again."""
