"""Training loop, checkpoints, step line."""
