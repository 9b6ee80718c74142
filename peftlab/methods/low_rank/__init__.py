"""Low rank: a change of a weight that is a product of two thin matrices."""
