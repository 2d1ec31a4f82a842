"""PhysisForcing losses (paper equations 1-13). Depends on torch alone."""
