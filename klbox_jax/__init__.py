"""Bounding-box regression with uncertainty (KL Loss, He et al., CVPR 2019) in JAX and Flax."""

__version__ = "0.1.0"
