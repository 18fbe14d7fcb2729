"""Inference on one image: against torchvision's, and with voting and soft-NMS against hard NMS."""

from benchmarks.speed import detector
from benchmarks.speed.measure import Measure, Sides, timed


def against_torchvision() -> Sides:
    """Returns ours with KL Loss, variance voting and soft-NMS, and torchvision's with hard NMS."""
    from benchmarks import torchvision_peer as peer

    ours = detector.eval_runner("kl", suppression="soft_gaussian", voting="variance")
    theirs = peer.make_inference()
    if not len(theirs()[0]["boxes"]):
        raise ValueError("torchvision's detector found nothing, so that its post-processing had no work")
    return Sides(ours=timed(ours), peer=timed(theirs))


def against_hard_nms() -> Sides:
    """Returns the eval step with voting and soft-NMS, and with hard NMS alone, of one network."""
    return Sides(
        ours=timed(detector.eval_runner("kl", suppression="soft_gaussian", voting="variance")),
        peer=timed(detector.eval_runner("kl", suppression="hard", voting="none")),
    )


MEASURES = (
    Measure(
        "inference",
        "torchvision's with hard NMS",
        against_torchvision,
        must=1.0,
        goal=0.8,
        seconds=50.0,
        needs_torch=True,
    ),
    Measure(
        "voting_and_soft_nms",
        "the eval step with hard NMS",
        against_hard_nms,
        must=1.03,
        goal=1.0,
        pairs=60,
        seconds=70.0,
    ),
)
