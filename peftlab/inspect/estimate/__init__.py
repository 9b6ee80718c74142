"""What training would cost: counts and bytes from shapes, activations from one step without data."""
