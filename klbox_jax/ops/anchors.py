"""Anchors of the RPN, as NumPy constants for one canvas size."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class AnchorGenerator:
    """Anchors of several sizes and aspect ratios at each cell of each feature level.

    Sizes and order are those of detectron2's `DefaultAnchorGenerator`. torchvision orders by ratio first and by
    size second, which is the same order when each level has a single size.

    Attributes:
        sizes: for each level, the square roots of the anchor areas, in pixels; all levels have the same number.
        strides: for each level, pixels between neighbouring cells. If a stride does not divide the canvas,
            torchvision shortens the cells of that level. If the largest stride divides both sides, there is no such
            level.
        aspect_ratios: height over width.
        offset: position of the anchor centre in its cell, in cells. 0.5 is the centre of the cell; detectron2 (by
            default) and torchvision have 0, the corner.
        round_sizes: round half of each side to whole pixels, as torchvision does.

    Raises:
        ValueError: `sizes` and `strides` have different numbers of levels, or the levels have different numbers
            of sizes.
    """

    sizes: tuple[tuple[float, ...], ...]
    strides: tuple[int, ...]
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    offset: float = 0.5
    round_sizes: bool = False

    def __post_init__(self):
        if len(self.sizes) != len(self.strides):
            raise ValueError(
                f"anchor sizes are given for {len(self.sizes)} levels and strides for {len(self.strides)}; "
                "give one tuple of sizes for each stride"
            )
        if len({len(level_sizes) for level_sizes in self.sizes}) != 1:
            raise ValueError(f"anchor sizes {self.sizes} differ in number; the levels share one RPN head")

    @property
    def num_anchors_per_cell(self) -> int:
        """Number of anchors at each cell, the same on every level."""
        return len(self.sizes[0]) * len(self.aspect_ratios)

    def grid(self, image_hw: tuple[int, int]) -> list[Float[np.ndarray, "_anchors 4"]]:
        """Returns the anchors of a canvas of `image_hw` = (height, width) pixels, one float32 array for each level.

        A level has ceil(height / stride) rows of ceil(width / stride) cells. Anchors are not clipped. Their order is
        that of a head's output [rows, columns, anchors]: by row, column, size, aspect ratio; the last index runs
        fastest.
        """
        return [
            self._level_grid(image_hw, level_sizes, stride)
            for level_sizes, stride in zip(self.sizes, self.strides, strict=True)
        ]

    def _level_grid(
        self, image_hw: tuple[int, int], sizes: tuple[float, ...], stride: int
    ) -> Float[np.ndarray, "_anchors 4"]:
        cell = np.array([_centred_box(size, ratio) for size in sizes for ratio in self.aspect_ratios])
        if self.round_sizes:
            cell = np.round(cell)
        rows, columns = (math.ceil(length / stride) for length in image_hw)
        x, y = np.meshgrid(
            (np.arange(columns) + self.offset) * stride, (np.arange(rows) + self.offset) * stride
        )
        centres = np.stack([x, y, x, y], axis=-1)
        return (centres[:, :, None, :] + cell[None, None, :, :]).reshape(-1, 4).astype(np.float32)


def _centred_box(size: float, aspect_ratio: float) -> tuple[float, float, float, float]:
    width = size / math.sqrt(aspect_ratio)
    height = size * math.sqrt(aspect_ratio)
    return (-width / 2, -height / 2, width / 2, height / 2)
