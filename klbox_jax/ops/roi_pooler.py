"""Pooling of RoIs from a feature pyramid: chooses the level of each RoI and the pooling method."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klbox_jax.ops.precise_roi_pooling import multilevel_precise_roi_pool
from klbox_jax.ops.roi_max_pooling import roi_max_pool
from klbox_jax.ops.roi_pooling import multilevel_roi_align

POOLING_METHODS = ("align", "precise", "max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoIPooler:
    """Pools RoIs to square feature grids; detectron2's `ROIPooler`, with PrRoI pooling as a third method.

    Attributes:
        method: `align` (RoIAlign), `precise` (PrRoI pooling, smooth in the box) or `max` (RoIPool of Fast R-CNN, from a
            single level).
        levels: pyramid levels, finest first; level `l` has stride `2 ** l`.
        resolution: number of bins along each side, `output_size` of the pooling functions.
        sampling_ratio: for `align`: number of samples along each side of a bin.
        canonical_box_size, canonical_level: a box with sides of this length in pixels is pooled from this level.
        aligned: for `align` and `precise`: cell `i` of a map has its centre at `(i + 0.5) * stride`. If False, at
            `i * stride`.
        plus_one_widths: for weights of Detectron, whose boxes are whole pixels: pools from the start of the first to
            the start of the last pixel. The whole box still chooses the level. See `PostprocessSettings`.

    Raises:
        ValueError: `method` is unknown, or `max` has more than one level.
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
        """Returns the pooled RoIs of one image.

        The level is a step function of the box: the gradient is that of the box's level, and the value jumps where a
        box grows into the next level.

        Args:
            pyramid: feature maps `p2`, `p3`, ...; those of `levels` are read.
            boxes: RoIs in pixels of the canvas.
        """
        maps = {2**level: pyramid[f"p{level}"] for level in self.levels}
        if self.method == "max":
            ((stride, features),) = maps.items()
            return roi_max_pool(
                features, self._regions(boxes), output_size=self.resolution, spatial_scale=1.0 / stride
            )
        map_index = assign_boxes_to_levels(
            boxes,
            min_level=self.levels[0],
            max_level=self.levels[0] + len(self.levels) - 1,
            canonical_box_size=self.canonical_box_size,
            canonical_level=self.canonical_level,
        )
        arguments = (maps, self._regions(boxes), map_index)
        grid = {"output_size": self.resolution, "aligned": self.aligned}
        if self.method == "precise":
            return multilevel_precise_roi_pool(*arguments, **grid)
        return multilevel_roi_align(*arguments, **grid, sampling_ratio=self.sampling_ratio)

    def pool_batch(
        self, pyramid: dict[str, Float[Array, "b _h _w c"]], boxes: Float[Array, "b r 4"]
    ) -> Float[Array, "n s s c"]:
        """Returns the pooled RoIs of a batch, those of the first image first: n = b * r."""
        pooled = jax.vmap(self)(pyramid, boxes)
        if pooled.dtype == jnp.bfloat16:
            # On CPUs jax 0.12.0.1 fuses the products of RoIAlign with those of the next layer, and the result has NaN
            # rows (`--xla_cpu_experimental_ynn_fusion_type=` switches that fusion off). float32 is right.
            pooled = jax.lax.optimization_barrier(pooled)
        return pooled.reshape(boxes.shape[0] * boxes.shape[1], *pooled.shape[2:])

    def _regions(self, boxes: Float[Array, "r 4"]) -> Float[Array, "r 4"]:
        """Returns the regions to pool: the boxes, with `plus_one_widths` without the last pixel of each side."""
        return boxes - jnp.array([[0.0, 0.0, 1.0, 1.0]]) if self.plus_one_widths else boxes


def assign_boxes_to_levels(
    boxes: Float[Array, "r 4"],
    *,
    min_level: int,
    max_level: int,
    canonical_box_size: float = 224.0,
    canonical_level: int = 4,
) -> Int[Array, " r"]:
    """Returns the pyramid level of each box, counted from `min_level` (Lin et al., FPN, CVPR 2017, equation 1)."""
    sizes = jnp.sqrt(
        jnp.maximum(boxes[:, 2] - boxes[:, 0], 0.0) * jnp.maximum(boxes[:, 3] - boxes[:, 1], 0.0)
    )
    # The small constants keep log2 finite and a box of exactly the canonical size on its level.
    levels = jnp.floor(canonical_level + jnp.log2(sizes / canonical_box_size + 1e-8) + 1e-6)
    return jnp.clip(levels, min=min_level, max=max_level).astype(jnp.int32) - min_level
