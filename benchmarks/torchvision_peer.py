"""torchvision's detectors, operators and data sets: the other side of the measures. Only this file imports torch here.

JAX is imported where it is needed: `full_scale` measures torchvision in a process without it.
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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

# The threads of one operation.
use_threads, num_threads = torch.set_num_threads, torch.get_num_threads
# Standard deviations of the outputs of the last layers after `scale_outputs`: anchors move, classes pass the score
# threshold, and no loss saturates.
OUTPUT_STDS = {
    "rpn.head.cls_logits": 1.0,
    "rpn.head.bbox_pred": 0.2,
    "roi_heads.box_predictor.cls_score": 2.0,
    "roi_heads.box_predictor.bbox_pred": 0.5,
    "roi_heads.mask_predictor.mask_fcn_logits": 1.0,
}


def versions() -> dict[str, str]:
    """Returns the versions of torch and torchvision."""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__}


def build(model: type[nn.Module], *, seed: int, trainable_layers: int, **sizes: Any) -> nn.Module:
    """Returns `FasterRCNN` or `MaskRCNN` with ResNet-50-FPN, frozen batch norm and random weights.

    The last `trainable_layers` stages of the backbone are trained; `sizes` are further arguments of `model`.
    """
    torch.manual_seed(seed)
    body = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    return model(_resnet_fpn_extractor(body, trainable_layers=trainable_layers), **sizes)


def scale_outputs(model: nn.Module, images: ImageList) -> None:
    """Scales the weights of the last layers so that their outputs have `OUTPUT_STDS`, one layer after the other."""
    modules = dict(model.named_modules())
    boxes = [torch.tensor([[8.0, 8.0, 60.0, 70.0], [30.0, 20.0, 90.0, 80.0]])] * len(images.image_sizes)
    for name, wanted in OUTPUT_STDS.items():
        if name not in modules:
            continue
        seen: list[torch.Tensor] = []
        hook = modules[name].register_forward_hook(lambda *args, seen=seen: seen.append(args[2]))
        with torch.no_grad():
            features = model.backbone(images.tensors)
            if name.startswith("rpn"):
                model.rpn.head(list(features.values()))
            else:
                _run_heads(model, features, boxes, images.image_sizes)
            hook.remove()
            modules[name].weight *= wanted / torch.cat([x.flatten() for x in seen]).std()


def _run_heads(model: nn.Module, features, boxes, image_sizes) -> None:
    heads = model.roi_heads
    heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, image_sizes)))
    if heads.has_mask():
        heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, image_sizes)))


def make_images(images: np.ndarray) -> list[torch.Tensor]:
    """Returns images, height x width x 3 each, as torchvision's detectors take them."""
    return [torch.tensor(image).permute(2, 0, 1).float().contiguous() / 255 for image in images]


def make_targets(boxes: np.ndarray, classes: np.ndarray) -> list[dict[str, torch.Tensor]]:
    """Returns the boxes and classes of each image as torchvision's detectors take them."""
    return [
        {"boxes": torch.tensor(of_image), "labels": torch.tensor(labels.astype(np.int64)) + 1}
        for of_image, labels in zip(boxes, classes, strict=True)
    ]


def train_step(
    model: nn.Module,
    images: Sequence[torch.Tensor],
    targets: Sequence[Mapping[str, torch.Tensor]],
    *,
    learning_rate: float,
) -> Callable[[], None]:
    """Returns a training step with smooth-L1 and SGD: forward, backward, update.

    It raises FloatingPointError if the loss is not finite.
    """
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=learning_rate, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss of torchvision's training step is not finite")

    return step


def inference(
    model: nn.Module, images: Sequence[torch.Tensor]
) -> Callable[[], list[dict[str, torch.Tensor]]]:
    """Returns a function from the pixels to the detections after hard NMS."""
    model.eval()

    def run():
        with torch.inference_mode():
            return model(images)

    return run


def make_speed_model() -> nn.Module:
    """Returns fasterrcnn_resnet50_fpn as its users build it, with the sizes of `benchmarks/speed/detector.py`.

    Its outputs vary as much as a trained network's.
    """
    from benchmarks.speed import detector

    model = build(
        FasterRCNN,
        seed=0,
        trainable_layers=3,
        num_classes=detector.CLASSES + 1,
        box_batch_size_per_image=detector.ROIS_PER_IMAGE,
        rpn_pre_nms_top_n_train=detector.PROPOSALS_BEFORE_NMS,
        rpn_pre_nms_top_n_test=detector.PROPOSALS_BEFORE_NMS,
        rpn_post_nms_top_n_train=detector.TRAIN_PROPOSALS,
        rpn_post_nms_top_n_test=detector.TEST_PROPOSALS,
        # The images have this size already; `_skip_resize` would skip resizing only in training.
        min_size=min(detector.CANVAS),
        max_size=max(detector.CANVAS),
    )
    for name, module in model.named_modules():
        if name.endswith("bn3"):
            module.weight.fill_(0.3)  # the factor of `benchmarks.steps.FACTORS`
    model.eval()
    images = make_images(detector.images(1).images)
    tensors = torch.stack([model.transform.normalize(image) for image in images])
    scale_outputs(model, ImageList(tensors, [detector.CANVAS]))
    return model


def make_train_step() -> Callable[[], None]:
    """Returns the training step of `make_speed_model` on the batch of the measures."""
    from benchmarks.speed import detector
    from benchmarks.steps import LEARNING_RATE

    batch = detector.images(detector.TRAIN_IMAGES)
    return train_step(
        make_speed_model(),
        make_images(batch.images),
        make_targets(batch.gt.boxes, batch.gt.classes),
        learning_rate=LEARNING_RATE,
    )


def make_inference() -> Callable[[], list[dict[str, torch.Tensor]]]:
    """Returns the inference of `make_speed_model` on one image of the measures."""
    from benchmarks.speed import detector

    return inference(make_speed_model(), make_images(detector.images(1).images))


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
    """Returns the examples of a COCO folder without end: decoded, flipped or not, resized, as uint8 tensors with boxes.

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
