"""The box predictor: class, edges and edge variances of each RoI, and the losses of these predictions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from klbox_jax.losses.box_loss import BoxLoss
from klbox_jax.losses.detection import class_loss
from klbox_jax.losses.label_noise import label_stds
from klbox_jax.losses.reduction import masked_mean, masked_sum
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.structures import BoxPredictions, RoISamples, TrainOutputs


class BoxPredictor(nn.Module):
    """Linear layers for the class, the coded box and, if the box loss has variances, the log variance of each edge.

    The products are float32, whatever the dtype of the features: bfloat16 has eight bits of precision, so ranked
    scores would have ties.

    Attributes:
        num_classes: K, without the background.
        box_loss: regression loss of the edges. If it has variances, there is a log-variance branch (He et al. 2019,
            section 3.1), initialized with N(0, 1e-4), so that training starts at sigma = 1.
        box_coder: offsets between a RoI and its box.
        class_agnostic: one box for all classes instead of one box for each class.
        box_loss_weight: factor of `loss_box_reg`, for every box loss.
    """

    num_classes: int
    box_loss: BoxLoss
    box_coder: CornerBoxCoder | CenterBoxCoder = CornerBoxCoder()
    class_agnostic: bool = False
    box_loss_weight: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "n f"]) -> BoxPredictions:
        num_boxes = 1 if self.class_agnostic else self.num_classes
        normal = nn.initializers.normal

        def boxes(name, stddev):
            rows = nn.Dense(num_boxes * 4, kernel_init=normal(stddev), dtype=jnp.float32, name=name)(x)
            return rows.reshape(-1, num_boxes, 4)

        classes = self.num_classes + 1
        logits = nn.Dense(classes, kernel_init=normal(0.01), dtype=jnp.float32, name="cls_score")(x)
        return BoxPredictions(
            class_logits=logits,
            box_deltas=boxes("bbox_pred", 0.001),
            box_log_vars=boxes("bbox_log_var", 0.0001) if self.box_loss.has_variances else None,
        )

    def losses(
        self,
        predictions: BoxPredictions,
        samples: RoISamples,
        *,
        key: Key[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> TrainOutputs:
        """Returns `loss_cls` and `loss_box_reg`, each a sum over the global batch over the number of its valid RoIs.

        Only foreground RoIs have a box loss, but all valid RoIs are counted, as in detectron2. So an object in an image
        with many objects has the same weight as any other, and rows of a table have the same normalizer.

        Args:
            predictions: predictions for the samples, [b, r, ...].
            samples: RoIs and the objects that they are matched to, [b, r, ...].
            key: random key of a sampled loss.
            step: training step; a loss with a ramp needs it.

        Raises:
            ValueError: the box loss needs `key`, `step` or the label noise of each edge, and it is missing.
        """
        foreground = samples.is_foreground & samples.valid
        normalizer = jnp.maximum(samples.valid.sum(), 1)
        # The background has no box; its rows read class 0 and are masked below.
        classes = jnp.where(samples.is_foreground, samples.gt_classes, 0)
        deltas = _rows_of_class(predictions.box_deltas, classes)
        log_vars = _rows_of_class(predictions.box_log_vars, classes) if self.box_loss.has_variances else None
        targets, stds = self._targets(samples, foreground)
        box_loss = self.box_loss(deltas, log_vars, targets, label_stds=stds, key=key, step=step)
        box_loss = masked_sum(box_loss.sum(axis=-1), foreground) / normalizer
        cls_loss = (
            masked_sum(class_loss(predictions.class_logits, samples.gt_classes), samples.valid) / normalizer
        )

        correct = predictions.class_logits.argmax(axis=-1) == samples.gt_classes
        metrics = {
            "num_foreground": foreground.sum() / jnp.maximum(samples.valid.any(axis=1).sum(), 1),
            "box_error": masked_mean(jnp.abs(deltas - targets).mean(axis=-1), foreground),
            "accuracy_foreground": masked_mean(correct.astype(jnp.float32), foreground),
        }
        if log_vars is not None:
            variances = self.box_loss.variance_of(log_vars)
            metrics["mean_sigma"] = masked_mean(jnp.sqrt(variances).mean(axis=-1), foreground)
            metrics["mean_log_var"] = masked_mean(jnp.log(variances).mean(axis=-1), foreground)
        losses = {"loss_cls": cls_loss, "loss_box_reg": self.box_loss_weight * box_loss}
        return TrainOutputs(losses=losses, metrics=jax.lax.stop_gradient(metrics))

    def _targets(
        self, samples: RoISamples, foreground: Bool[Array, "b r"]
    ) -> tuple[Float[Array, "b r 4"], Float[Array, "b r 4"] | None]:
        """Returns the coded boxes of the objects and, if the loss needs them, the coded stds of their edges."""
        # A background RoI is its own target, so that its masked loss is finite.
        gt_boxes = jnp.where(foreground[:, :, None], samples.gt_boxes, samples.boxes)
        targets = self.box_coder.encode(gt_boxes, samples.boxes)
        if not self.box_loss.needs_label_stds:
            return targets, None
        stds = label_stds(
            gt_boxes,
            samples.gt_box_stds,
            source=self.box_loss.label_noise,
            value=self.box_loss.label_noise_value,
        )
        return targets, self.box_coder.encode_stds(stds, samples.boxes)


def _rows_of_class(rows: Float[Array, "b r Kb 4"], classes: Int[Array, "b r"]) -> Float[Array, "b r 4"]:
    """Returns the row of each RoI's class, or the only row of a class-agnostic head."""
    if rows.shape[2] == 1:
        return rows[:, :, 0]
    return jnp.take_along_axis(rows, classes[:, :, None, None], axis=2)[:, :, 0]
