"""What a run is made of, built and checked from its config before the first step."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh

from klbox_jax import distributed
from klbox_jax.data.build import (
    build_calibration_source,
    build_preprocessing,
    build_source,
    build_train_source,
)
from klbox_jax.data.loader import check_fits
from klbox_jax.data.plan import EvalPlan, TrainPlan
from klbox_jax.data.source import Source
from klbox_jax.data.transforms import Preprocessing
from klbox_jax.models.build import build_model
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.best_checkpoint import FURTHER_HEADLINES, HEADLINES
from klbox_jax.train.profiling import check_profile_steps
from klbox_jax.train.workdir import Workdir

# What to do about a loss or a gradient that is not finite.
ON_NONFINITE = ("stop", "skip")


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
        """The training set, without the images that `config.data.hold_out` keeps."""
        return build_train_source(self.config.data)

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
    def calibration_source(self) -> Source:
        """The images that the stds are calibrated on.

        Raises:
            ValueError: there are none, some of them are in the evaluation set, or its classes are others.
        """
        source = build_calibration_source(self.config.data)
        reported = {record.file_name for record in self.eval_source.records}
        shared = sum(record.file_name in reported for record in source.records)
        if shared:
            raise ValueError(
                f"{shared} images of {source.name} are in {self.eval_source.name} too, whose results are reported; "
                "set config.data.calibration_split to a split without them"
            )
        if source.class_names != self.eval_source.class_names:
            raise ValueError(
                f"{source.name} has the classes {source.class_names}, but {self.eval_source.name} has "
                f"{self.eval_source.class_names}; give both annotation files the same categories"
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
        """Steps of the whole training, a multiple of `config.train.accumulate_steps`; each reads a batch."""
        train = self.config.train
        updates = train.num_epochs * self.train_plan.steps_per_epoch / train.accumulate_steps
        return train.num_steps or max(1, round(updates)) * train.accumulate_steps

    def check(self, settings: Iterable[PostprocessSettings], *, train: bool, evaluate: bool) -> None:
        """Builds what the modes need, so that what is wrong with config or data shows before any work is done."""
        if train:
            self._check_train(evaluate=evaluate)
            _ = self.train_source, self.train_plan, self.total_steps
            check_profile_steps(self.config.train.profile_steps, total_steps=self.total_steps)
        if evaluate:
            self.check_evaluation()
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

    def check_evaluation(self) -> None:
        """Raises ValueError, naming the field, for what `config.evaluation` cannot mean."""
        checkpoint = self.config.evaluation.checkpoint
        if checkpoint not in ("last", "best"):
            raise ValueError(f"config.evaluation.checkpoint = {checkpoint!r} is unknown; choose last or best")
        if checkpoint == "best" and not self.config.train.keep_best:
            raise ValueError(
                "config.evaluation.checkpoint = 'best' needs config.train.keep_best, the number that it is the best "
                "in, such as 'AP'"
            )

    def _check_train(self, *, evaluate: bool) -> None:
        """Raises ValueError, naming the field, for what `config.train` cannot mean."""
        train = self.config.train
        for field in ("save_every", "log_every"):
            if train[field] < 1:
                raise ValueError(f"config.train.{field} = {train[field]} must be at least 1 step")
        if train.num_steps < 0 or (not train.num_steps and train.num_epochs <= 0):
            raise ValueError(
                f"config.train.num_steps = {train.num_steps} with num_epochs = {train.num_epochs} is no training; give "
                "a positive number of steps, or 0 and a positive number of epochs"
            )
        if train.accumulate_steps < 1 or train.num_steps % train.accumulate_steps:
            raise ValueError(
                f"config.train.accumulate_steps = {train.accumulate_steps} does not divide config.train.num_steps = "
                f"{train.num_steps}; make the one a multiple of the other, or the last batches would change nothing"
            )
        if train.on_nonfinite not in ON_NONFINITE:
            raise ValueError(
                f"config.train.on_nonfinite = {train.on_nonfinite!r} is unknown; choose {' or '.join(ON_NONFINITE)}"
            )
        if train.early_stopping_patience and not train.keep_best:
            raise ValueError(
                f"config.train.early_stopping_patience = {train.early_stopping_patience} needs the number that is to "
                "become better; set config.train.keep_best, such as 'AP'"
            )
        if not train.keep_best:
            return
        if train.keep_best_checkpoints < 1:
            raise ValueError(
                f"config.train.keep_best_checkpoints = {train.keep_best_checkpoints} must be at least 1; keep_best = "
                "'' keeps none"
            )
        if not train.eval_every or not evaluate:
            raise ValueError(
                f"config.train.keep_best = {train.keep_best!r} needs evaluations to choose from; set "
                "config.train.eval_every to the steps between two of them, with --mode=train_and_eval, or keep_best "
                "to '' and early_stopping_patience to 0"
            )
        # Behind a slash, in the evaluations of an experiment, whose settings have names.
        if train.keep_best.rpartition("/")[2] not in (*HEADLINES, *FURTHER_HEADLINES):
            raise ValueError(
                f"config.train.keep_best = {train.keep_best!r} is unknown; choose one of "
                f"{', '.join((*HEADLINES, *FURTHER_HEADLINES))}"
            )
