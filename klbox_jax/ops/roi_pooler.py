"""Which pooling cuts a RoI's features out of the pyramid, and from which level."""

import dataclasses

from jaxtyping import Array, Float

from klbox_jax.ops.precise_roi_pooling import multilevel_precise_roi_pool
from klbox_jax.ops.roi_max_pooling import roi_max_pool
from klbox_jax.ops.roi_pooling import multilevel_roi_align, trim_boxes

POOLING_METHODS = ("align", "precise", "max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoIPooler:
    """RoIs in, feature grids out; detectron2's `ROIPooler` with PrRoI pooling beside the other two.

    Attributes:
        method: `align` (RoIAlign), `precise` (PrRoI pooling, smooth in the box) or `max` (RoIPool of Fast
            R-CNN, from a single level).
        levels: pyramid levels that RoIs are pooled from, finest first; level `l` has stride `2 ** l`.
        resolution: bins along each side.
        sampling_ratio: of `align`: samples along each side of a bin.
        canonical_box_size, canonical_level: a box of that side in pixels is pooled from that level.
        aligned: of `align` and `precise`: cell `i` of a map has its centre at `(i + 0.5) * stride`.
        plus_one_widths: pool up to the start of a box's last pixel, as Detectron does: a region one pixel shorter
            than the box, whose sides still choose the level; see `PostprocessSettings`.

    Raises:
        ValueError: naming the field.
    """

    method: str = "align"
    levels: tuple[int, ...] = (2, 3, 4, 5)
    resolution: int = 7
    sampling_ratio: int = 2
    canonical_box_size: float = 224.0
    canonical_level: int = 4
    aligned: bool = True
    plus_one_widths: bool = False

    def __post_init__(self):
        if self.method not in POOLING_METHODS:
            raise ValueError(
                f"A pooler's method must be one of {', '.join(POOLING_METHODS)}; got {self.method!r}."
            )
        if self.method == "max" and len(self.levels) > 1:
            raise ValueError(
                f"A pooler's method 'max' reads a single level; got levels {self.levels}. Use 'align'."
            )

    def __call__(
        self, pyramid: dict[str, Float[Array, "_h _w c"]], boxes: Float[Array, "r 4"]
    ) -> Float[Array, "r s s c"]:
        """Returns one image's pooled RoIs; `boxes` are in pixels of the canvas."""
        maps = [pyramid[f"p{level}"] for level in self.levels]
        strides = [2**level for level in self.levels]
        trim = 1.0 if self.plus_one_widths else 0.0
        if self.method == "max":
            regions = trim_boxes(boxes, trim)
            return roi_max_pool(maps[0], regions, output_size=self.resolution, spatial_scale=1.0 / strides[0])
        placement = {
            "strides": strides,
            "output_size": self.resolution,
            "min_level": self.levels[0],
            "canonical_box_size": self.canonical_box_size,
            "canonical_level": self.canonical_level,
            "aligned": self.aligned,
            "trim": trim,
        }
        if self.method == "precise":
            return multilevel_precise_roi_pool(maps, boxes, **placement)
        return multilevel_roi_align(maps, boxes, sampling_ratio=self.sampling_ratio, **placement)
