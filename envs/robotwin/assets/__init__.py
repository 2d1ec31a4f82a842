"""The self-made asset pack: a dual-arm robot and objects, built from primitives and procedures in this repository."""
