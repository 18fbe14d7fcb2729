"""Sizes of a run: the full benchmark, and a tiny one that a CPU finishes in a minute."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Networks, shapes and limits of a run.

    Attributes:
        network: network that is timed, a key of `network.NETWORKS`.
        canvas: height and width of its images.
        train_batches, eval_batches: batch sizes, the most important first.
        precisions: keys of `detector.PRECISIONS` that are timed, the most important first.
        checked: networks whose correctness is checked, each with its canvas.
        checked_precisions: keys of `detector.PRECISIONS` that are compared with float32 on the CPU.
        product_side: rows and columns of the matrices whose product gives the device's rate.
        pooled_images: batch of RoIAlign.
        seconds: longest duration of one timing, after its warm-up.
        compile_together: cells whose programs are compiled together, and programs compiled at the same time.
        torch_compile: measure torchvision with a compiled backbone too.
    """

    network: str
    canvas: tuple[int, int]
    train_batches: tuple[int, ...]
    eval_batches: tuple[int, ...]
    precisions: tuple[str, ...]
    checked: dict[str, tuple[int, int]]
    checked_precisions: tuple[str, ...]
    product_side: int
    pooled_images: int
    seconds: float
    compile_together: int
    torch_compile: bool


FULL = Sizes(
    network="resnet50_fpn",
    canvas=(800, 1344),
    train_batches=(16, 8, 32, 2),
    eval_batches=(32, 8, 1),
    precisions=("bfloat16", "tf32", "float32"),
    checked={"small": (128, 128), "resnet50_fpn": (256, 320)},
    checked_precisions=("float32", "tf32", "bfloat16"),
    product_side=8192,
    pooled_images=8,
    seconds=3.0,
    compile_together=4,
    torch_compile=True,
)
TINY = Sizes(
    network="small",
    canvas=(64, 96),
    train_batches=(2,),
    eval_batches=(2,),
    precisions=("bfloat16",),
    checked={"small": (64, 96)},
    checked_precisions=("float32", "bfloat16"),
    product_side=128,
    pooled_images=1,
    seconds=0.2,
    compile_together=2,
    torch_compile=False,
)
