"""The parts that a config names: built in, or added by a user's own file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from klbox_jax.data.build import SOURCES, SourceMaker
from klbox_jax.losses.box_loss import BOX_LOSSES, LossFunction
from klbox_jax.models.build import BACKBONES, BOX_HEADS, build_model
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extensions:
    """Tables from the names in a config to parts. A user's own part is an entry more: `BACKBONES | {"mine": Mine}`.

    A user's own voting or suppression needs no table: it is a value of `PostprocessSettings`. docs/extend.md has an
    example of each.

    Attributes:
        box_losses: by `config.model.box_loss`.
        backbones: by `config.model.backbone.name`.
        box_heads: by `config.model.box_head.name`.
        sources: data sets by `config.data.name`.
    """

    box_losses: Mapping[str, LossFunction] = dataclasses.field(default_factory=lambda: BOX_LOSSES)
    backbones: Mapping[str, type[nn.Module]] = dataclasses.field(default_factory=lambda: BACKBONES)
    box_heads: Mapping[str, type[nn.Module]] = dataclasses.field(default_factory=lambda: BOX_HEADS)
    sources: Mapping[str, SourceMaker] = dataclasses.field(default_factory=lambda: SOURCES)

    def build_model(self, config: Any, *, num_classes: int) -> GeneralizedRCNN:
        """Returns the detector of a `config.model`; errors as in `klbox_jax.models.build.build_model`."""
        return build_model(
            config,
            num_classes=num_classes,
            backbones=self.backbones,
            box_heads=self.box_heads,
            box_losses=self.box_losses,
        )
