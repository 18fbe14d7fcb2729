"""Compiled eval step from `Batch` to `Detections`, and the loop that runs it over a data set."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from klbox_jax.compilation import CountedJit
from klbox_jax.distributed import batch_sharding, gather, put_batch, replicated
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN, Predictions
from klbox_jax.postprocess.detect import detect, unscale
from klbox_jax.postprocess.flip_tta import concat_predictions, mirror_image, mirror_predictions
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import Batch, Detections


def eval_step(
    params, batch: Batch, *, model: GeneralizedRCNN, settings: Mapping[str, PostprocessSettings]
) -> dict[str, Detections]:
    """Returns the detections of a batch for each named setting, in pixels of the files.

    All settings share one forward pass. Settings with `flip` also use a second one, of the mirrored images.
    """
    predictions = model.apply({"params": params}, batch, method="predict")
    both = None
    if any(chosen.flip for chosen in settings.values()):
        both = join_mirrored(params, predictions, batch, model=model)
    return {
        name: detect_batch(params, both if chosen.flip else predictions, batch, model=model, settings=chosen)
        for name, chosen in settings.items()
    }


def join_mirrored(params, predictions: Predictions, batch: Batch, *, model: GeneralizedRCNN) -> Predictions:
    """Returns the predictions of a batch followed by those of the mirrored images, mirrored back.

    The feature pyramid is that of the original images.
    """
    widths = batch.image_size[:, 1]
    mirrored = batch.replace(images=jax.vmap(mirror_image)(batch.images, widths))
    other = model.apply({"params": params}, mirrored, method="predict")
    box_coder = model.roi_heads.box_coder

    def single(boxes, proposals, other_boxes, other_proposals, width):
        back = mirror_predictions(other_boxes, other_proposals, width, box_coder=box_coder)
        return concat_predictions((boxes, proposals), back)

    boxes, proposals = jax.vmap(single)(
        predictions.boxes, predictions.proposals, other.boxes, other.proposals, widths
    )
    return predictions.replace(boxes=boxes, proposals=proposals)


def detect_batch(
    params,
    predictions: Predictions,
    batch: Batch,
    *,
    model: GeneralizedRCNN,
    settings: PostprocessSettings,
) -> Detections:
    """Post-processes the raw predictions of a batch; returns detections in pixels of the files.

    Settings with `flip` need the predictions of `join_mirrored`.
    """
    heads = model.roi_heads

    def single(boxes, proposals, image_size, scale, pyramid):
        def predict_iou(boxes, classes):
            return model.apply({"params": params}, pyramid, boxes, classes, method="predict_iou")

        return detect(
            boxes,
            proposals,
            image_size,
            settings=settings,
            box_coder=heads.box_coder,
            variance_of=heads.box_loss.variance_of,
            predict_iou=None if heads.iou_head is None else predict_iou,
            scale=scale,
        )

    found = jax.vmap(single)(
        predictions.boxes, predictions.proposals, batch.image_size, batch.scale, predictions.pyramid
    )
    if heads.mask_head is not None:
        masks = model.apply(
            {"params": params}, predictions.pyramid, found.boxes, found.classes, method="predict_masks"
        )
        found = found.replace(masks=masks)
    return unscale(found, batch)


def compile_eval_step(mesh: Mesh, **static) -> CountedJit:
    """Returns `eval_step` jitted over the mesh: parameters replicated on every device, the batch sharded."""

    def step(params, batch):
        return eval_step(params, batch, **static)

    return CountedJit(
        step, in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=batch_sharding(mesh)
    )


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Runs a compiled eval step over batches and collects COCO results.

    Attributes:
        step: result of `compile_eval_step`.
        mesh: devices to run on.
        category_ids: the data set's category id of each dense class index.
    """

    step: Callable
    mesh: Mesh
    category_ids: tuple[int, ...]

    def __call__(
        self, params, batches: Iterable[Batch], *, on_batch: Callable[[int], None] = lambda finished: None
    ) -> dict[str, list[dict]]:
        """Returns the COCO results of each setting, in the order of the images; every process gets all of them.

        The host reads the detections of a batch while the device works on the next one.

        Args:
            params: of the model.
            batches: of this process.
            on_batch: called with the number of finished batches after each one.
        """
        results: dict[str, list[dict]] = {}
        pending = None
        for count, batch in enumerate(batches):
            running = (batch, self.step(params, put_batch(batch, self.mesh)))
            if pending is not None:
                self._collect(results, *pending)
                on_batch(count)
            pending = running
        if pending is not None:
            self._collect(results, *pending)
            on_batch(count + 1)
        return results

    def _collect(self, results: dict[str, list[dict]], batch: Batch, detections: dict[str, Detections]):
        # Not at the top: the compiled eval step needs no pycocotools, and a benchmark runs where it is missing.
        from klbox_jax.evaluation.coco import to_coco_results

        # Each process only knows its own share of the images, but collects the detections of all.
        image_id, valid, scale, size = gather((batch.image_id, batch.valid, batch.scale, batch.image_size))
        # Height and width of the file; a padding image may have scale 0.
        image_sizes = np.rint(size / np.where(scale > 0, scale, 1.0)[:, ::-1]).astype(int)
        for name, found in gather(detections).items():
            results.setdefault(name, []).extend(
                to_coco_results(found, image_id, valid, self.category_ids, image_sizes=image_sizes)
            )
