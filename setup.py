"""Lists the packages: every folder below the rooms, so that folders of YAML and weights ship too. Metadata: pyproject.toml."""

from setuptools import find_namespace_packages, setup

ROOMS = ("worldmodel", "planner", "policy", "envs", "configs")


def below(folder: str) -> list[str]:
    return find_namespace_packages(folder, exclude=["*__pycache__*"])


packages = ["physisforcing"] + [f"physisforcing.{name}" for name in below("physisforcing")]
for room in ROOMS:
    packages += [f"physisforcing.{room}"] + [f"physisforcing.{room}.{name}" for name in below(room)]

setup(packages=packages)
