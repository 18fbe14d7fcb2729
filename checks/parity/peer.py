"""torchvision's detectors with random weights, taken apart into stages.

All values are passed as NumPy arrays in our layout: channels last, boxes `x1, y1, x2, y2`.
"""

import itertools
import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from benchmarks import torchvision_peer

MODELS = {"fasterrcnn_resnet50_fpn": FasterRCNN, "maskrcnn_resnet50_fpn": MaskRCNN}


def build(name: str, *, seed: int, rois_per_image: int) -> nn.Module:
    """Returns the detector with seeded weights, biases and batch-norm statistics, every layer trained."""
    sizes = {"num_classes": 91, "box_batch_size_per_image": rois_per_image}
    model = torchvision_peer.build(MODELS[name], seed=seed, trainable_layers=5, **sizes)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if isinstance(module, FrozenBatchNorm2d):
                # The last norm of a block is weak, because each sum with its shortcut would double the variance.
                gain = 0.3 if module_name.endswith("bn3") else 1.0
                module.weight.uniform_(0.8 * gain, 1.2 * gain)
                module.bias.normal_(0.0, 0.1)
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            elif getattr(module, "bias", None) is not None:
                module.bias.normal_(0.0, 0.05)
    return model.eval()


def image_list(model: nn.Module, images: np.ndarray, sizes: np.ndarray) -> ImageList:
    """Returns the images normalized and padded by the model's own code; they are not resized."""
    tensors = [
        model.transform.normalize(torch.tensor(image[:h, :w]).permute(2, 0, 1).float() / 255)
        for image, (h, w) in zip(images, sizes, strict=True)
    ]
    shapes = [(int(h), int(w)) for h, w in sizes]
    return ImageList(model.transform.batch_images(tensors, size_divisible=32), shapes)


def save(model: nn.Module, path: pathlib.Path) -> None:
    """Writes the state dict."""
    torch.save(model.state_dict(), path)


def save_gradients(model: nn.Module, path: pathlib.Path) -> None:
    """Writes the gradients under the names of their parameters, and zeros for the batch-norm statistics.

    Read like a checkpoint, the file gives every gradient in our layout.
    """
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state |= {name: value.grad for name, value in model.named_parameters()}
    torch.save(state, path)


def num_parameters(model: nn.Module) -> int:
    """Returns the count of trained numbers."""
    return sum(value.numel() for value in model.parameters())


def hyper_parameters(model: nn.Module) -> dict[str, Any]:
    """Returns the model's settings under the names of our config."""
    rpn, heads = model.rpn, model.roi_heads
    return {
        "rpn.pre_nms_topk": tuple(rpn._pre_nms_top_n.values()),
        "rpn.post_nms_topk": tuple(rpn._post_nms_top_n.values()),
        "rpn.nms_threshold": rpn.nms_thresh,
        "rpn.min_size": rpn.min_size,
        "rpn.iou_thresholds": (rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold),
        "rpn.batch_size_per_image": rpn.fg_bg_sampler.batch_size_per_image,
        "rpn.positive_fraction": rpn.fg_bg_sampler.positive_fraction,
        "rpn.anchor_sizes": rpn.anchor_generator.sizes,
        "rpn.aspect_ratios": rpn.anchor_generator.aspect_ratios[0],
        "roi_heads.box_coder_weights": heads.box_coder.weights,
        "roi_heads.iou_threshold": heads.proposal_matcher.high_threshold,
        "roi_heads.batch_size_per_image": heads.fg_bg_sampler.batch_size_per_image,
        "roi_heads.positive_fraction": heads.fg_bg_sampler.positive_fraction,
        "box_pooler.resolution": heads.box_roi_pool.output_size[0],
        "box_pooler.sampling_ratio": heads.box_roi_pool.sampling_ratio,
        "box_pooler.canonical_box_size": heads.box_roi_pool.canonical_scale,
        "box_pooler.canonical_level": heads.box_roi_pool.canonical_level,
        "pixel_mean": tuple(255 * value for value in model.transform.image_mean),
        "pixel_std": tuple(255 * value for value in model.transform.image_std),
        "postprocess.score_threshold": heads.score_thresh,
        "postprocess.nms_threshold": heads.nms_thresh,
        "postprocess.detections_per_image": heads.detections_per_img,
        "data.short_side": model.transform.min_size[0],
        "data.long_side": model.transform.max_size,
    }


def activations(model: nn.Module, images: ImageList) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns the pyramid as torch has it, and the output of each convolution and norm by its name."""
    outputs: dict[str, np.ndarray] = {}
    hooks = []
    for name, module in model.backbone.named_modules(prefix="backbone"):
        if isinstance(module, (nn.Conv2d, FrozenBatchNorm2d)):
            keep = lambda *args, name=name: outputs.update({name: channels_last(args[2])})  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        features = model.backbone(images.tensors)
    for hook in hooks:
        hook.remove()
    return features, outputs


def channels_last(value: torch.Tensor) -> np.ndarray:
    """Returns NHWC from NCHW, as a copy: torch may write over its own array, as its rectifiers do."""
    return value.detach().permute(0, 2, 3, 1).numpy().copy()


def evaluate(model: nn.Module, images: ImageList, features) -> dict[str, Any]:
    """Returns the outputs of all stages after the pyramid, without training."""
    found: dict[str, Any] = {}
    heads = model.roi_heads
    with torch.no_grad():
        logits, deltas = model.rpn.head(list(features.values()))
        anchors = model.rpn.anchor_generator(images, list(features.values()))[0]
        found["rpn_logits"] = [channels_last(x).reshape(len(x), -1) for x in logits]
        found["rpn_deltas"] = [channels_last(x).reshape(len(x), -1, 4) for x in deltas]
        counts = [x.shape[1] for x in found["rpn_logits"]]
        found["anchors"] = [x.numpy() for x in anchors.split(counts)]
        proposals, _ = model.rpn(images, features)
        found["proposals"] = [x.numpy() for x in proposals]
        pooled = heads.box_roi_pool(features, proposals, images.image_sizes)
        found["pooled"] = channels_last(pooled)
        class_logits, box_deltas = heads.box_predictor(heads.box_head(pooled))
        found["class_logits"], found["box_deltas"] = class_logits.numpy(), box_deltas.numpy()
        sizes = images.image_sizes
        boxes, scores, labels = heads.postprocess_detections(class_logits, box_deltas, proposals, sizes)
        for name, values in (("boxes", boxes), ("scores", scores), ("labels", labels)):
            found[name] = [x.numpy() for x in values]
        if heads.has_mask():
            pooled = heads.mask_roi_pool(features, boxes, images.image_sizes)
            masks = heads.mask_predictor(heads.mask_head(pooled))
            masks = masks[torch.arange(len(masks)), torch.cat(labels)]
            found["mask_logits"] = [x.numpy() for x in masks.split([len(x) for x in boxes])]
    return found


def sampler(draw: Callable[[int, np.ndarray], np.ndarray]) -> Callable:
    """Returns a replacement of torchvision's random sampler.

    `draw` chooses rows of an image, as a Boolean array, from its number and the labels (1 or more, 0, -1).
    """

    def sample(labels: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        taken = [torch.tensor(draw(image, each.numpy())) for image, each in enumerate(labels)]
        positives = [(rows & (each >= 1)).to(torch.uint8) for rows, each in zip(taken, labels, strict=True)]
        negatives = [(rows & (each == 0)).to(torch.uint8) for rows, each in zip(taken, labels, strict=True)]
        return positives, negatives

    return sample


def train(
    model: nn.Module,
    images: ImageList,
    targets: list[dict[str, np.ndarray]],
    *,
    draw_anchors: Callable,
    draw_rois: Callable,
    mask_targets: Callable,
) -> dict[str, Any]:
    """Returns the proposals, the sampled RoIs and the losses of a training step; the gradients stay in the model.

    Args:
        model: the detector.
        images: the batch.
        targets: boxes, labels from 1, and masks of each image.
        draw_anchors, draw_rois: see `sampler`.
        mask_targets: image, boxes and objects to the mask of each box: our targets are 0 or 1, torchvision's
            are means over each bin.
    """
    model.train()
    model.zero_grad()
    heads = model.roi_heads
    model.rpn.fg_bg_sampler, heads.fg_bg_sampler = sampler(draw_anchors), sampler(draw_rois)
    targets = [{name: torch.tensor(value) for name, value in target.items()} for target in targets]
    sampled, select, numbers = {}, heads.select_training_samples, itertools.count()

    def selected(*args):
        sampled["boxes"], *rest = select(*args)
        return sampled["boxes"], *rest

    def project(gt_masks, boxes, gt_index, size):  # called image by image
        return torch.tensor(mask_targets(next(numbers), boxes.detach().numpy(), gt_index.numpy()))

    with (
        mock.patch.object(heads, "select_training_samples", selected),
        mock.patch("torchvision.models.detection.roi_heads.project_masks_on_boxes", project),
    ):
        features = model.backbone(images.tensors)
        proposals, rpn_losses = model.rpn(images, features, targets)
        _, losses = heads(features, proposals, images.image_sizes, targets)
    losses = rpn_losses | losses
    sum(losses.values()).backward()
    return {
        "proposals": [x.detach().numpy() for x in proposals],
        "samples": [x.detach().numpy() for x in sampled["boxes"]],
        "losses": {name: value.item() for name, value in losses.items()},
    }


def vgg16_features(images: np.ndarray, path: pathlib.Path, *, seed: int) -> np.ndarray:
    """Writes the state dict of a random VGG-16's convolutions, and returns its last map, before the last pooling.

    The images are normalized, channels last.
    """
    torch.manual_seed(seed)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.normal_(layer.bias, 0.0, 0.05)
    torch.save({f"features.{name}": value for name, value in layers.state_dict().items()}, path)
    with torch.no_grad():
        return channels_last(layers[:-1](torch.tensor(images).permute(0, 3, 1, 2)))
