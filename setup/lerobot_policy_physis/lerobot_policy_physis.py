"""Imported by LeRobot, by this name: registers the policy type ``physis``."""

from physisforcing.policy.lerobot.configuration_physis import PhysisConfig

__all__ = ["PhysisConfig"]
