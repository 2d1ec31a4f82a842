"""PhysisForcing's losses (arXiv 2606.28128, eq. (1)-(13)). Depends on torch alone: usable from other trainers."""
