"""Bounding-box regression with uncertainty (KL Loss, He et al., CVPR 2019) in JAX and Flax.

    detector = klbox_jax.load("runs/kl")
    found = detector("photo.jpg")

The names of `__all__` are imported when they are first used, so that `import klbox_jax` imports no library.
"""

import importlib

__version__ = "0.1.0"

# The module of each public name.
_PUBLIC = {
    "PostprocessSettings": "klbox_jax.postprocess.settings",
    "Prediction": "klbox_jax.serving.prediction",
    "Predictor": "klbox_jax.serving.predictor",
    "detect": "klbox_jax.postprocess.detect",
    "evaluate_detections": "klbox_jax.evaluation.coco",
    "evaluate_uncertainty": "klbox_jax.evaluation.uncertainty",
    "hard_nms": "klbox_jax.ops.nms",
    "kl_loss": "klbox_jax.losses.box_regression",
    "load": "klbox_jax.serving.predictor",
    "load_config": "klbox_jax.config.family",
    "pairwise_iou": "klbox_jax.ops.boxes",
    "roi_align": "klbox_jax.ops.roi_pooling",
    "run": "klbox_jax.main",
    "soft_nms": "klbox_jax.postprocess.soft_nms",
    "variance_voting": "klbox_jax.postprocess.voting",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'klbox_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
