"""Denoiser adapters over diffusers."""
