"""What is done around torch's optimizers."""
