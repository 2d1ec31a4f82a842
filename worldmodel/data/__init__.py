"""Windows of demonstrations and their cached targets."""
