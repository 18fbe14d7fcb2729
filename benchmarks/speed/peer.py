"""torchvision's side of the measures; the only file here that imports torch.

The network is built as its users build it: `FrozenBatchNorm2d`, three trainable stages, defaults everywhere else but
for the numbers of proposals and RoIs, which are those of `detector.py`.
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision import datasets
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, roi_align
from torchvision.transforms import v2

from benchmarks.speed import detector
from checks.parity import peer
from klbox_jax.structures import Batch

versions = peer.versions


def use_threads(count: int) -> None:
    """Sets the threads of one operation."""
    torch.set_num_threads(count)


def num_threads() -> int:
    """Returns the threads of one operation."""
    return torch.get_num_threads()


def make_model() -> nn.Module:
    """Returns fasterrcnn_resnet50_fpn with random weights whose outputs are as wide apart as a trained network's."""
    torch.manual_seed(0)
    body = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    model = FasterRCNN(
        _resnet_fpn_extractor(body, trainable_layers=3),
        num_classes=detector.CLASSES + 1,
        box_batch_size_per_image=detector.ROIS_PER_IMAGE,
        rpn_pre_nms_top_n_train=detector.PROPOSALS_BEFORE_NMS,
        rpn_pre_nms_top_n_test=detector.PROPOSALS_BEFORE_NMS,
        rpn_post_nms_top_n_train=detector.TRAIN_PROPOSALS,
        rpn_post_nms_top_n_test=detector.TEST_PROPOSALS,
        # The images have their size already; `_skip_resize` would skip it in training alone.
        min_size=min(detector.CANVAS),
        max_size=max(detector.CANVAS),
    )
    for name, module in model.named_modules():
        if name.endswith("bn3"):
            module.weight.fill_(0.3)  # as in `detector.FACTORS`
    model.eval()
    batch = detector.make_batch(1)
    tensors = torch.stack([model.transform.normalize(image) for image in make_images(batch)])
    peer.scale_outputs(model, ImageList(tensors, [detector.CANVAS]))
    return model


def make_images(batch: Batch) -> list[torch.Tensor]:
    """Returns the batch's images as torchvision's detectors take them."""
    return [torch.tensor(image).permute(2, 0, 1).float().contiguous() / 255 for image in batch.images]


def make_train_step() -> Callable[[], None]:
    """Returns a training step with smooth-L1 and SGD: forward, backward, update."""
    model, batch = make_model(), detector.make_batch(detector.TRAIN_IMAGES)
    model.train()
    images = make_images(batch)
    targets = [
        {"boxes": torch.tensor(boxes), "labels": torch.tensor(classes.astype(np.int64)) + 1}
        for boxes, classes in zip(batch.gt.boxes, batch.gt.classes, strict=True)
    ]
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=detector.LEARNING_RATE, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss of torchvision's training step is not finite")

    return step


def make_inference() -> Callable[[], list[dict[str, torch.Tensor]]]:
    """Returns inference on one image, from the pixels to the detections after hard NMS."""
    model, images = make_model(), make_images(detector.make_batch(1))

    def run():
        with torch.inference_mode():
            return model(images)

    return run


def make_roi_align(
    features: np.ndarray, boxes: np.ndarray, cotangent: np.ndarray | None = None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Returns RoIAlign of one map, channels last, and with a cotangent also the gradient of the map."""
    maps = torch.tensor(features).permute(2, 0, 1)[None].contiguous().requires_grad_(cotangent is not None)
    rois = torch.tensor(np.pad(boxes, ((0, 0), (1, 0))))
    arriving = None if cotangent is None else torch.tensor(cotangent).permute(0, 3, 1, 2).contiguous()

    def run() -> tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(cotangent is not None):
            pooled = roi_align(maps, rois, 7, spatial_scale=1.0, sampling_ratio=2, aligned=True)
            return (pooled,) if cotangent is None else (pooled, *torch.autograd.grad(pooled, maps, arriving))

    return run


def make_examples(
    root: pathlib.Path, split: str, *, short_side: int, long_side: int
) -> Iterator[tuple[torch.Tensor, dict]]:
    """Returns the examples of a COCO folder for ever: decoded, flipped or not, resized, as uint8 tensors with boxes.

    This is `CocoDetection` under the v2 transforms of torchvision's detection references, with the resizing that
    they leave to the model.
    """
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(0.5),
            v2.Resize(short_side, max_size=long_side, antialias=True),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    annotations = os.path.join(root, "annotations", f"instances_{split}.json")
    with contextlib.redirect_stdout(io.StringIO()):
        data = datasets.CocoDetection(os.path.join(root, split), annotations, transforms=transforms)
    data = datasets.wrap_dataset_for_transforms_v2(data, target_keys=("image_id", "boxes", "labels"))

    def examples():
        rng = np.random.default_rng(0)
        while True:
            for index in rng.permutation(len(data)):
                yield data[int(index)]

    return examples()
