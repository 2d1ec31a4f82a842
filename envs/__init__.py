"""Simulators and demonstrations. Nothing in here imports torch."""
