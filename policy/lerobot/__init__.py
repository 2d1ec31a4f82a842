"""Policies in LeRobot's loops: the policy type ``physis``. LeRobot itself is imported by the ``*_physis`` modules alone, whose names it looks up."""
