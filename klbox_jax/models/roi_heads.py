"""The second stage: samples RoIs, pools their features and runs the heads."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from klbox_jax.losses.box_loss import BoxLoss
from klbox_jax.models.box_predictor import BoxPredictor
from klbox_jax.models.iou_head import IoUHead
from klbox_jax.models.mask_head import MaskHead
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.ops.matcher import Label, match_boxes
from klbox_jax.ops.roi_pooler import RoIPooler
from klbox_jax.ops.sampling import subsample_labels
from klbox_jax.structures import BoxPredictions, GroundTruth, Proposals, RoISamples


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoISampling:
    """Labels and number of the RoIs that train the heads.

    Attributes:
        iou_threshold: a RoI is foreground if its IoU with an object is at least this.
        batch_size_per_image: number of RoIs drawn from each image.
        positive_fraction: largest share of foreground among them.
    """

    iou_threshold: float = 0.5
    batch_size_per_image: int = 512
    positive_fraction: float = 0.25

    @property
    def max_foreground(self) -> int:
        """Largest number of foreground RoIs of an image."""
        return int(self.batch_size_per_image * self.positive_fraction)


class RoIHeads(nn.Module):
    """The heads of the second stage. Each head owns its predictions and its losses.

    Attributes:
        box_pooler: pools the features of the box head.
        box_head: from pooled features, [n, s, s, c], to a vector for each RoI, [n, f]: a module with
            `__call__(pooled, key=None)`, where `key` draws the dropout of training.
        box_predictor: from the vectors to class, box and log variances.
        sampling: labels and number of the RoIs in training.
        mask_head: predicts the mask of each detection (He et al. 2017), or None.
        iou_head: predicts the IoU of a box with its object (Jiang et al. 2018), or None.
    """

    box_pooler: RoIPooler
    box_head: nn.Module
    box_predictor: BoxPredictor
    sampling: RoISampling = RoISampling()
    mask_head: MaskHead | None = None
    iou_head: IoUHead | None = None

    @property
    def box_loss(self) -> BoxLoss:
        """The regression loss of the edges."""
        return self.box_predictor.box_loss

    @property
    def box_coder(self) -> CornerBoxCoder | CenterBoxCoder:
        """The offsets between a RoI and its box."""
        return self.box_predictor.box_coder

    def __call__(
        self,
        pyramid: dict[str, Float[Array, "b _h _w c"]],
        boxes: Float[Array, "b r 4"],
        key: Key[Array, ""] | None = None,
    ) -> BoxPredictions:
        """Predicts class, box and log variances of each RoI; `key` draws the dropout of training."""
        features = self.box_head(self.box_pooler.pool_batch(pyramid, boxes), key)
        predictions = self.box_predictor(features)
        return jax.tree.map(lambda x: x.reshape(*boxes.shape[:2], *x.shape[1:]), predictions)

    def sample(
        self, proposals: Proposals, gt: GroundTruth, image_valid: Bool[Array, " b"], keys: Key[Array, " b"]
    ) -> RoISamples:
        """Returns the RoIs that train the heads, a fixed number for each image of the batch; see `sample_rois`."""

        def sample_image(proposals, gt, key):
            return sample_rois(
                proposals, gt, key, num_classes=self.box_predictor.num_classes, sampling=self.sampling
            )

        samples = jax.vmap(sample_image)(proposals, gt, keys)
        return samples.replace(valid=samples.valid & image_valid[:, None])

    def foreground_slots(self, samples: RoISamples) -> RoISamples:
        """Returns the rows that may be foreground; `sample` puts the foreground first."""
        return jax.tree.map(lambda x: x[:, : self.sampling.max_foreground], samples)


def sample_rois(
    proposals: Proposals,
    gt: GroundTruth,
    key: Key[Array, ""],
    *,
    num_classes: int,
    sampling: RoISampling,
) -> RoISamples:
    """Matches one image's proposals and ground-truth boxes to its objects, and draws the RoIs for training.

    The ground-truth boxes are candidates too, as in detectron2, so that training has foreground from the first step.

    Args:
        proposals: proposals of the image.
        gt: objects of the image. Padded slots and crowd regions are no candidates.
        key: random key of the draw.
        num_classes: K, the class of background RoIs.
        sampling: labels and number of the RoIs.
    """
    boxes = jnp.concatenate([proposals.boxes, gt.boxes])
    valid = jnp.concatenate([proposals.valid, gt.valid & ~gt.is_crowd])
    thresholds = (sampling.iou_threshold, sampling.iou_threshold)
    match = match_boxes(boxes, gt, thresholds=thresholds, allow_low_quality_matches=False)
    labels = jnp.where(valid, match.labels, Label.IGNORE)
    samples = subsample_labels(
        key,
        labels,
        num_samples=sampling.batch_size_per_image,
        positive_fraction=sampling.positive_fraction,
    )
    gt_index = match.gt_index[samples.indices]
    return RoISamples(
        boxes=boxes[samples.indices],
        gt_index=gt_index,
        gt_boxes=gt.boxes[gt_index],
        gt_classes=jnp.where(samples.is_positive, gt.classes[gt_index], num_classes),
        is_foreground=samples.is_positive,
        valid=samples.valid,
        gt_box_stds=None if gt.box_stds is None else gt.box_stds[gt_index],
    )
