"""Adds the folder `configs` to the package: it stays at the top of a checkout, and is `klbox_jax/configs` in a wheel.

Everything else is in pyproject.toml, which can name packages or find them, but not both.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["klbox_jax", "klbox_jax.*"]), "klbox_jax.configs"],
    package_dir={"klbox_jax.configs": "configs"},
)
