"""What is there, what it costs, and whether it works."""
