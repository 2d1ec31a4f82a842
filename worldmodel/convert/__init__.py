"""Checkpoints as others release them -> plain diffusers folders."""
