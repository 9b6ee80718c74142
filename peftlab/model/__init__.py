"""What a model is, before any adapter: its modules, layers, places, and what its calls are handed."""
