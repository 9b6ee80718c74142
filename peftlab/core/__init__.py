"""An adapted module: where adapters live, what acts, and what a call goes through."""
