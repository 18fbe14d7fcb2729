"""Measurements of torchvision's side.

The network is `fasterrcnn_resnet50_fpn` with frozen batch norm and three trained stages, in channels-last layout, with
torchvision's defaults everywhere else. Precisions: float32 without TF32, with TF32, and autocast to bfloat16.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from benchmarks import torchvision_peer
from benchmarks.accelerator.batch import make_images
from benchmarks.accelerator.network import NETWORKS
from benchmarks.accelerator.outcomes import failure, measured
from benchmarks.accelerator.plan import COMPILED, Cell
from benchmarks.accelerator.pooling import make_pooling_inputs
from benchmarks.accelerator.sizes import Sizes
from benchmarks.accelerator.timing import median_seconds

# So small that the weights stay as they are.
LEARNING_RATE = 1e-6
# As `param_factors` of our network.
FACTORS = {"bn3": 0.3, "inner_blocks": 0.1, "rpn.head.bbox_pred": 0.1, "box_predictor.bbox_pred": 0.3}


def environment() -> dict[str, Any]:
    """Returns the versions of torch's side."""
    cuda = {"cudnn of torch": torch.backends.cudnn.version(), "cuda of torch": torch.version.cuda}
    return {"versions": torchvision_peer.versions() | (cuda if torch.cuda.is_available() else {})}


def group_cells(cells: Sequence[Cell], sizes: Sizes) -> list[tuple[Cell, ...]]:
    """Returns each cell as a group of its own."""
    return [(cell,) for cell in cells]


def measure_group(cells: Sequence[Cell], sizes: Sizes) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yields each cell with its outcome; an error of one cell leaves the others."""
    measures = {"train": measure_train_step, "inference": measure_inference, "roi_align": measure_roi_align}
    for cell in cells:
        try:
            yield cell, measured(measures[cell.kind](cell, sizes))
        except Exception as error:
            yield cell, failure(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_train_step(cell: Cell, sizes: Sizes) -> dict[str, Any]:
    """Measures forward, backward and update of SGD, the batch already on the device."""
    model, (images, targets) = make_model(cell, sizes), make_inputs(cell, sizes)
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)

    def call() -> torch.Tensor:
        with autocast(cell):
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    result = _measure(call, cell, sizes)
    if not torch.isfinite(call()):
        raise FloatingPointError("the loss of torchvision's training step is not finite")
    return result


def measure_inference(cell: Cell, sizes: Sizes) -> dict[str, Any]:
    """Measures the way from the images on the device to the detections on the device, with hard NMS."""
    model, (images, _) = make_model(cell, sizes), make_inputs(cell, sizes)
    model.eval()

    def call() -> list[dict[str, torch.Tensor]]:
        with torch.inference_mode(), autocast(cell):
            return model(images)

    result = _measure(call, cell, sizes)
    return result | {"detections_per_image": float(np.mean([len(found["boxes"]) for found in call()]))}


def measure_roi_align(cell: Cell, sizes: Sizes) -> dict[str, Any]:
    """Measures RoIAlign of the pyramid, and RoIAlign with the gradient of the pyramid."""
    model = NETWORKS[sizes.network].model
    inputs, pooling = make_pooling_inputs(cell.batch, sizes.canvas, model), model["box_pooler"]
    pooler = MultiScaleRoIAlign(
        list(inputs.pyramid),
        pooling["resolution"],
        pooling["sampling_ratio"],
        canonical_scale=int(pooling["canonical_box_size"]),
        canonical_level=pooling["canonical_level"],
    )
    pyramid = {
        name: _to_device(features).permute(0, 3, 1, 2).requires_grad_()
        for name, features in inputs.pyramid.items()
    }
    boxes = list(_to_device(inputs.boxes))
    arriving = _to_device(inputs.cotangent).flatten(0, 1).permute(0, 3, 1, 2)
    shapes = [sizes.canvas] * cell.batch

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return pooler(pyramid, boxes, shapes)

    def forward_backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(pooler(pyramid, boxes, shapes), list(pyramid.values()), arriving)

    return {
        name: median_seconds(call, wait, seconds=sizes.seconds / 2)
        for name, call in {"forward": forward, "forward_backward": forward_backward}.items()
    }


def make_model(cell: Cell, sizes: Sizes) -> nn.Module:
    """Returns the detector on the device, with random weights drawn as ours are."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = cell.precision != "float32"
    model = torchvision_peer.build(
        FasterRCNN,
        seed=0,
        trainable_layers=3,
        num_classes=NETWORKS[sizes.network].num_classes + 1,
        # The images have this size already.
        min_size=min(sizes.canvas),
        max_size=max(sizes.canvas),
    )
    with torch.no_grad():
        for name, module in model.named_modules():
            factor = next((value for part, value in FACTORS.items() if part in name), 1.0)
            if isinstance(module, FrozenBatchNorm2d):
                module.weight.fill_(factor)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, factor * (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.zero_()
    model = model.to(device(), memory_format=torch.channels_last)
    if cell.variant == COMPILED:
        model.backbone = torch.compile(model.backbone)
    return model


def make_inputs(cell: Cell, sizes: Sizes) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Returns the images and the targets of our batch as torchvision's detectors take them, on the device."""
    batch = make_images(cell.batch, sizes.canvas, num_classes=NETWORKS[sizes.network].num_classes)
    images = [image.to(device()) for image in torchvision_peer.make_images(batch.images)]
    targets = [
        {name: value.to(device()) for name, value in target.items()}
        for target in torchvision_peer.make_targets(batch.gt.boxes, batch.gt.classes)
    ]
    return images, targets


def autocast(cell: Cell) -> contextlib.AbstractContextManager:
    """Returns the context of a forward pass: autocast for bfloat16."""
    if cell.precision == "bfloat16":
        return torch.autocast(device().type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def device() -> torch.device:
    """Returns the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(result: Any) -> None:
    """Returns once the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _measure(call: Callable[[], Any], cell: Cell, sizes: Sizes) -> dict[str, Any]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    timing = median_seconds(call, wait, seconds=sizes.seconds)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return timing | {"images_per_second": cell.batch / timing["seconds"], "device_bytes": peak}


def _to_device(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values).to(device())
