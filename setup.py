"""Lists the packages: every folder with an ``__init__.py`` below the rooms. All metadata is in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("worldmodel", "planner", "policy", "envs", "configs")

packages = ["physisforcing"] + [f"physisforcing.{name}" for name in find_packages("physisforcing")]
for room in ROOMS:
    packages += [f"physisforcing.{room}"] + [f"physisforcing.{room}.{name}" for name in find_packages(room)]

setup(packages=packages)
