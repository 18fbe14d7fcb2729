"""What a run is made of, built and checked from its config before the first step."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh

from klbox_jax import distributed
from klbox_jax.data.build import build_preprocessing, build_source
from klbox_jax.data.loader import check_fits
from klbox_jax.data.plan import EvalPlan, TrainPlan
from klbox_jax.data.source import Source
from klbox_jax.data.transforms import Preprocessing
from klbox_jax.models.build import build_model
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Job:
    """A config, its folder, and what follows from them; each part is built once, when it is first read.

    Attributes:
        config: the whole config.
        workdir: the folder of the run.
    """

    config: Any
    workdir: Workdir

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices. Raises ValueError where they cannot share a batch evenly."""
        mesh = distributed.make_mesh()
        for field in ("train", "evaluation"):
            batch_size = self.config[field].batch_size
            if batch_size % mesh.size:
                raise ValueError(
                    f"config.{field}.batch_size = {batch_size} cannot be shared evenly by {mesh.size} devices; "
                    f"make it a multiple of {mesh.size}"
                )
        return mesh

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """How images become canvases."""
        return build_preprocessing(self.config.data)

    @functools.cached_property
    def train_source(self) -> Source:
        """The training set."""
        return build_source(self.config.data, self.config.data.train_split)

    @functools.cached_property
    def eval_source(self) -> Source:
        """The evaluation set. Raises ValueError where its classes are not those of the training set."""
        source = build_source(self.config.data, self.config.data.eval_split)
        if "train_source" in self.__dict__ and source.class_names != self.train_source.class_names:
            raise ValueError(
                f"{self.train_source.name} has the classes {self.train_source.class_names}, but {source.name} has "
                f"{source.class_names}; give both annotation files the same categories"
            )
        return source

    @functools.cached_property
    def train_plan(self) -> TrainPlan:
        """Which images each step of the training reads; making it checks that all of them fit."""
        return TrainPlan(
            check_fits(self.train_source, self.preprocessing),
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
        )

    @functools.cached_property
    def eval_plan(self) -> EvalPlan:
        """Which images each step of the evaluation reads; making it checks that all of them fit."""
        return EvalPlan(
            check_fits(self.eval_source, self.preprocessing), batch_size=self.config.evaluation.batch_size
        )

    @functools.cached_property
    def model(self) -> GeneralizedRCNN:
        """The detector."""
        source = self.__dict__.get("train_source") or self.eval_source
        return build_model(self.config.model, num_classes=len(source.class_names))

    @functools.cached_property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        train = self.config.train
        return train.num_steps or max(1, round(train.num_epochs * self.train_plan.steps_per_epoch))

    def check(self, settings: Iterable[PostprocessSettings], *, train: bool, evaluate: bool) -> None:
        """Builds what the modes need, so that what is wrong with config or data shows before any work is done."""
        if train:
            _ = self.train_source, self.train_plan, self.total_steps
        if evaluate:
            _ = self.eval_source, self.eval_plan
        _ = self.mesh
        heads = self.model.roi_heads
        for chosen in settings:
            chosen.check_head(
                has_variances=heads.box_loss.has_variances, has_iou_head=heads.iou_head is not None
            )
        if heads.mask_head is not None and self.preprocessing.mask_size == 0:
            raise ValueError(
                "config.model.mask_head.enabled = True needs the masks of the objects; set config.data.mask_size "
                "to their resolution, such as 112"
            )
        needs_stds = train and heads.box_loss.needs_label_stds and heads.box_loss.label_noise == "data"
        if needs_stds and any(record.box_stds is None for record in self.train_source.records):
            raise ValueError(
                f"config.model.box_loss = {heads.box_loss.name!r} with box_loss_settings.label_noise = 'data' "
                f"needs the label noise of each edge, which {self.train_source.name} does not have; set "
                "config.model.box_loss_settings.label_noise to 'pixels' or 'size', and label_noise_value"
            )
