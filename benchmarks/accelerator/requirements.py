"""Check for the packages that the benchmark needs, before any of them is imported."""

import importlib.util

# Module name to the name of its package on PyPI.
REQUIRED = {
    "numpy": "numpy",
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "jaxtyping": "jaxtyping",
    "absl": "absl-py",
}
PEER = ("torch", "torchvision")


def missing_packages() -> list[str]:
    """Returns the PyPI names of the required packages that are not installed."""
    return [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]


def has_peer() -> bool:
    """Returns True if torch and torchvision are installed."""
    return all(importlib.util.find_spec(module) is not None for module in PEER)
