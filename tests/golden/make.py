"""Writes the .npz files of this folder: outputs of torchvision's functions for small seeded inputs.

    python tests/golden/make.py

Imports torchvision and nothing of this repository. Each file contains inputs and outputs by name, the versions that
made them and the seed. Boxes are `x1, y1, x2, y2`; maps keep torch's order, channels first.
"""

import pathlib

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, batched_nms, nms, roi_align

FOLDER = pathlib.Path(__file__).parent
SEED = 20


def random_boxes(rng, count, *, canvas, sides):
    """Boxes inside or half outside of a canvas (height, width)."""
    size = rng.uniform(*sides, (count, 2))
    centre = rng.uniform(0, 1, (count, 2)) * canvas[::-1]
    return torch.tensor(np.concatenate([centre - size / 2, centre + size / 2], axis=1), dtype=torch.float32)


def normal(rng, *shape, std=1.0):
    return torch.tensor(rng.normal(0, std, shape), dtype=torch.float32)


def anchors(rng):
    generator = AnchorGenerator(sizes=((32,), (64,), (128,)), aspect_ratios=((0.5, 1.0, 2.0),) * 3)
    maps = [torch.zeros(1, 1, *size) for size in ((8, 12), (4, 6), (2, 3))]
    (found,) = generator(ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)]), maps)
    return {"anchors": found}


def box_coder(rng):
    references = random_boxes(rng, 40, canvas=(80, 100), sides=(5, 60))
    boxes = random_boxes(rng, 40, canvas=(80, 100), sides=(5, 60))
    deltas = normal(rng, 40, 4, std=2.0)
    deltas[::5, 2:] += 30.0  # beyond the largest growth
    found = {"references": references, "boxes": boxes, "deltas": deltas}
    for name, weights in (("box_head", (10.0, 10.0, 5.0, 5.0)), ("rpn", (1.0, 1.0, 1.0, 1.0))):
        coder = BoxCoder(weights)
        found[f"{name}_encoded"] = coder.encode([boxes], [references])[0]
        found[f"{name}_decoded"] = coder.decode(deltas, [references])[:, 0]
    return found


def pooling(rng):
    features = normal(rng, 1, 3, 16, 20)
    boxes = random_boxes(rng, 12, canvas=(64, 80), sides=(1, 60))
    boxes[0] = torch.tensor([70.0, 50.0, 95.0, 90.0])  # leaves the map
    found = {"features": features[0], "boxes": boxes}
    for name, aligned in (("aligned", True), ("not_aligned", False)):
        found[name] = roi_align(features, [boxes], 7, spatial_scale=0.25, sampling_ratio=2, aligned=aligned)
    pyramid = {str(i): normal(rng, 1, 2, 64 // 2**i, 96 // 2**i) for i in range(4)}
    boxes = random_boxes(rng, 16, canvas=(256, 384), sides=(20, 380))
    boxes[0] = torch.tensor([3.0, 5.0, 227.0, 229.0])  # exactly the canonical size
    found |= {f"level{name}": level[0] for name, level in pyramid.items()} | {"pyramid_boxes": boxes}
    pooler = MultiScaleRoIAlign(list(pyramid), output_size=7, sampling_ratio=2)
    return found | {"from_pyramid": pooler(pyramid, [boxes], [(256, 384)])}


def suppression(rng):
    boxes = random_boxes(rng, 80, canvas=(60, 60), sides=(15, 40))
    scores = torch.tensor(rng.permutation(80) / 80, dtype=torch.float32)
    classes = torch.tensor(rng.integers(0, 3, 80))
    found = {"boxes": boxes, "scores": scores, "classes": classes}
    for threshold in (0.3, 0.7):
        found[f"kept_{threshold}"] = nms(boxes, scores, threshold)
        found[f"kept_by_class_{threshold}"] = batched_nms(boxes, scores, classes, threshold)
    return found


def make_rpn(**fields):
    defaults = {
        "fg_iou_thresh": 0.7,
        "bg_iou_thresh": 0.3,
        "batch_size_per_image": 256,
        "positive_fraction": 0.5,
        "pre_nms_top_n": {"training": 40, "testing": 40},
        "post_nms_top_n": {"training": 25, "testing": 25},
        "nms_thresh": 0.7,
    }
    return RegionProposalNetwork(AnchorGenerator(), nn.Identity(), **(defaults | fields)).eval()


def proposals(rng):
    counts = [60, 24, 9]
    references = random_boxes(rng, sum(counts), canvas=(64, 80), sides=(8, 50))
    logits, deltas = normal(rng, 1, sum(counts), std=2.0), normal(rng, sum(counts), 4, std=0.3)
    rpn = make_rpn()
    boxes = rpn.box_coder.decode(deltas, [references]).view(1, -1, 4)
    found = {"anchors": references, "counts": torch.tensor(counts), "logits": logits[0], "deltas": deltas}
    for name, min_size in (("any", 1e-3), ("large", 16.0)):
        rpn.min_size = min_size
        kept, scores = rpn.filter_proposals(boxes, logits, [(60, 72)], counts)
        found |= {f"{name}_boxes": kept[0], f"{name}_scores": scores[0]}
    return found


def rpn_losses(rng):
    references = random_boxes(rng, 120, canvas=(64, 80), sides=(12, 40))
    gt_boxes = references[[3, 50, 90]] + normal(rng, 3, 4, std=2.0)
    logits, deltas = normal(rng, 1, 120).requires_grad_(), normal(rng, 120, 4, std=0.5).requires_grad_()
    rpn = make_rpn()
    labels, matched = rpn.assign_targets_to_anchors([references], [{"boxes": gt_boxes}])
    # As many samples as labels, so that the random draw takes all of them.
    count = int((labels[0] >= 0).sum())
    rpn = make_rpn(batch_size_per_image=count)
    targets = rpn.box_coder.encode(matched, [references])
    cls, loc = rpn.compute_loss(logits[0][:, None], deltas, labels, targets)
    (cls + 2 * loc).backward()
    return {
        "anchors": references,
        "gt_boxes": gt_boxes,
        "logits": logits[0],
        "deltas": deltas,
        "labels": labels[0],
        "num_samples": torch.tensor(count),
        "loss_rpn_cls": cls,
        "loss_rpn_loc": loc,
        "logits_gradient": logits.grad[0],
        "deltas_gradient": deltas.grad,
    }


def box_losses(rng):
    boxes = random_boxes(rng, 24, canvas=(64, 80), sides=(12, 40))
    gt_boxes = boxes + normal(rng, 24, 4, std=2.0)
    labels = torch.tensor(rng.integers(0, 4, 24))  # 0 is the background
    logits, deltas = normal(rng, 24, 4).requires_grad_(), normal(rng, 24, 16).requires_grad_()
    targets = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode([gt_boxes], [boxes])
    cls, reg = roi_heads.fastrcnn_loss(logits, deltas, [labels], list(targets))
    (cls + 2 * reg).backward()
    return {
        "boxes": boxes,
        "gt_boxes": gt_boxes,
        "labels": labels,
        "logits": logits,
        "deltas": deltas,
        "loss_cls": cls,
        "loss_box_reg": reg,
        "logits_gradient": logits.grad,
        "deltas_gradient": deltas.grad,
    }


def mask_losses(rng):
    masks = torch.tensor(rng.uniform(size=(2, 40, 50)) < 0.5).to(torch.uint8)
    boxes = random_boxes(rng, 6, canvas=(40, 50), sides=(8, 30))
    index, gt_labels = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([2, 3])
    logits = normal(rng, 6, 4, 14, 14).requires_grad_()
    loss = roi_heads.maskrcnn_loss(logits, [boxes], [masks], [gt_labels], [index])
    loss.backward()
    return {
        "logits": logits,
        "labels": gt_labels[index],
        "targets": roi_heads.project_masks_on_boxes(masks, boxes, index, 14),
        "loss_mask": loss,
        "logits_gradient": logits.grad,
    }


def detections(rng):
    heads = roi_heads.RoIHeads(
        None, None, None, 0.5, 0.5, 64, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 30
    ).eval()
    boxes = random_boxes(rng, 40, canvas=(64, 80), sides=(12, 40))
    logits, deltas = normal(rng, 40, 5, std=1.5), normal(rng, 40, 20)
    found = heads.postprocess_detections(logits, deltas, [boxes], [(60, 72)])
    return {"proposals": boxes, "logits": logits, "deltas": deltas} | {
        name: value[0] for name, value in zip(("boxes", "scores", "labels"), found, strict=True)
    }


def pasting(rng):
    # A border of zeros turns 8 cells into 10; with these boxes, the edges of the padded masks are whole numbers.
    centres = torch.tensor([[16.0, 20.0], [30.0, 12.0], [4.0, 33.0]])
    halves = torch.tensor([[8.0, 12.0], [4.0, 8.0], [12.0, 4.0]])
    masks = torch.tensor(rng.uniform(size=(3, 1, 8, 8)), dtype=torch.float32)
    boxes = torch.cat([centres - halves, centres + halves], dim=1)
    pasted = roi_heads.paste_masks_in_image(masks, boxes, (36, 44))
    return {"masks": masks[:, 0], "boxes": boxes, "pasted": pasted[:, 0]}


GOLDEN = (
    anchors,
    box_coder,
    pooling,
    suppression,
    proposals,
    rpn_losses,
    box_losses,
    mask_losses,
    detections,
    pasting,
)

if __name__ == "__main__":
    for make in GOLDEN:
        arrays = {name: value.detach().numpy() for name, value in make(np.random.default_rng(SEED)).items()}
        versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        np.savez_compressed(FOLDER / f"{make.__name__}.npz", **arrays, versions=versions, seed=SEED)
