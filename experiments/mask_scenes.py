"""Config of Mask R-CNN in miniature: that of the scenes with a pyramid under the box head, and a mask head.

    python -m klbox_jax.main --config=experiments/mask_scenes.py:loss=kl --workdir=runs/mini_networks/mask_kl

The boxes are the annotated ones, of whole objects; the masks are the pixels that are seen. Table 2 and the last head
of Table 3 are its networks.
"""

import ml_collections

from configs import scenes

# Every object of more than 48 pixels is cut out of a coarser level than the smaller ones.
PYRAMID = {"levels": (3, 4, 5), "canonical_box_size": 48.0}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` names variants as for configs/scenes.py."""
    config = scenes.get_config(arg)
    config.data.mask_size = 28
    config.model.mask_head.update(enabled=True, features=48, num_convs=2)
    for pooler in (config.model.box_pooler, config.model.mask_pooler):
        pooler.update(PYRAMID)
    return config
