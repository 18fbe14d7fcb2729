"""The anchors of the RPN, as NumPy constants of a canvas."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class AnchorGenerator:
    """Anchors of several sizes and shapes at each cell of each feature level.

    Sizes and order are detectron2's (`DefaultAnchorGenerator`); with one size on each level the order is
    torchvision's too, which lets sizes run faster than ratios.

    Attributes:
        sizes: for each level, the roots of the anchors' areas, in pixels; equally many on every level.
        aspect_ratios: height over width.
        strides: for each level, pixels between neighbouring cells. Where a level's cells do not divide the
            canvas, torchvision shortens them; sides that the largest stride divides have no such level.
        offset: where an anchor stands in its cell, in cells: 0.5 is the centre; detectron2's default and
            torchvision have 0, the corner.
        round_sizes: round half of each side to whole pixels, as torchvision does.

    Raises:
        ValueError: the levels of `sizes` and `strides` differ in number, or levels in their number of sizes.
    """

    sizes: tuple[tuple[float, ...], ...]
    aspect_ratios: tuple[float, ...]
    strides: tuple[int, ...]
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
        """How many anchors stand at a cell; the same on every level."""
        return len(self.sizes[0]) * len(self.aspect_ratios)

    def grid(self, image_hw: tuple[int, int]) -> list[Float[np.ndarray, "_anchors 4"]]:
        """The anchors of a canvas of `image_hw` pixels, one float32 array for each level.

        A level has ceil(height / stride) rows of ceil(width / stride) cells. Anchors are centred `offset` cells
        into their cell and not clipped. The order is that of a head's output [rows, columns, anchors]: by row, column,
        size, aspect ratio, the last running fastest.
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
