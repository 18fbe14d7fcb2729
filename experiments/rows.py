"""Rows of tables, and those that several tables have."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: which network, and how its predictions become detections.

    Attributes:
        name: unique in its table; the folder of its results.
        loss: `config.model.box_loss` of the network.
        suppression, voting: of `PostprocessSettings`.
        settings: further fields of `PostprocessSettings`.
    """

    name: str
    loss: str
    suppression: str
    voting: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def labels(self) -> dict[str, str]:
        """Returns the columns that say what the row is."""
        return {
            "name": self.name,
            "loss": self.loss,
            "suppression": self.suppression,
            "voting": self.voting,
        }


# Results lie in their network's folder by row name, and tables share them: a name has one meaning.
BASELINE = Row("baseline", "smooth_l1", "hard", "none")
BOX_VOTING = Row("box_voting", "smooth_l1", "hard", "box_voting")
SOFT_NMS = Row("soft_nms", "smooth_l1", "soft_gaussian", "none")
IOU_NET = Row("iou_net", "iou_net", "iou_guided", "none", {"refine_steps": 5})
KL = Row("kl", "kl", "hard", "none")
KL_VOTING = Row("kl_voting", "kl", "hard", "variance")
KL_SOFT_NMS = Row("kl_soft_nms", "kl", "soft_gaussian", "none")
KL_VOTING_SOFT_NMS = Row("kl_voting_soft_nms", "kl", "soft_gaussian", "variance")
