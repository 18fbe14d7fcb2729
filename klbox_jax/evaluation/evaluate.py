"""The compiled eval step, from `Batch` to `Detections`, and the loop that runs it over a data set."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from klbox_jax.distributed import batch_sharding, put_batch, replicated
from klbox_jax.evaluation.coco import to_coco_results
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.detect import PostprocessSettings, detect, unscale
from klbox_jax.structures import Batch, Detections


def eval_step(
    params, batch: Batch, *, model: GeneralizedRCNN, settings: Mapping[str, PostprocessSettings]
) -> dict[str, Detections]:
    """Returns the detections of a batch, in pixels of the files, for each named setting.

    One forward pass feeds all settings.
    """
    predictions = model.apply({"params": params}, batch, method="predict")
    heads = model.roi_heads

    def detect_all(chosen: PostprocessSettings) -> Detections:
        def single(boxes, proposals, image_size):
            return detect(
                boxes,
                proposals,
                image_size,
                settings=chosen,
                box_coder=heads.box_coder,
                log_var_clamp=heads.log_var_clamp,
            )

        return unscale(jax.vmap(single)(predictions.boxes, predictions.proposals, batch.image_size), batch)

    return {name: detect_all(chosen) for name, chosen in settings.items()}


def compile_eval_step(mesh: Mesh, **static) -> Callable:
    """Returns `eval_step` jitted over the mesh: parameters on every device, the batch split among them."""

    def step(params, batch):
        return eval_step(params, batch, **static)

    return jax.jit(
        step, in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=batch_sharding(mesh)
    )


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Runs a compiled eval step over batches and gathers COCO results.

    Attributes:
        step: from `compile_eval_step`.
        mesh: the devices.
        category_ids: the data set's own id of each dense class.
    """

    step: Callable
    mesh: Mesh
    category_ids: tuple[int, ...]

    def __call__(
        self, params, batches: Iterable[Batch], *, on_batch: Callable[[int], None] = lambda finished: None
    ) -> dict[str, list[dict]]:
        """Returns the results of each setting, in the order of the images.

        The host reads a batch's detections while the device works on the next one.
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
        for name, found in jax.device_get(detections).items():
            results.setdefault(name, []).extend(
                to_coco_results(found, np.asarray(batch.image_id), np.asarray(batch.valid), self.category_ids)
            )
