"""From one image to its detections: against torchvision's, and what voting and soft-NMS add."""

from benchmarks.speed import detector
from benchmarks.speed.measure import Measure, Sides, timed


def against_torchvision() -> Sides:
    """Ours with KL Loss, variance voting and soft-NMS; torchvision's with hard NMS."""
    from benchmarks.speed import peer

    ours = detector.make_eval_step("kl", suppression="soft_gaussian", voting="variance")
    theirs = peer.make_inference()
    if not len(theirs()[0]["boxes"]):
        raise ValueError("torchvision's detector found nothing, so that its post-processing had no work")
    return Sides(ours=timed(ours), peer=timed(theirs))


def against_hard_nms() -> Sides:
    """The same network's eval step with voting and soft-NMS, and with hard NMS alone."""
    return Sides(
        ours=timed(detector.make_eval_step("kl", suppression="soft_gaussian", voting="variance")),
        peer=timed(detector.make_eval_step("kl", suppression="hard", voting="none")),
    )


MEASURES = (
    Measure(
        name="inference",
        against="torchvision's with hard NMS",
        unit="s",
        must=1.0,
        goal=0.8,
        prepare=against_torchvision,
        seconds=50.0,
        needs_torch=True,
    ),
    Measure(
        name="voting_and_soft_nms",
        against="the eval step with hard NMS",
        unit="s",
        must=1.03,
        goal=1.0,
        prepare=against_hard_nms,
        pairs=60,
        seconds=70.0,
    ),
)
