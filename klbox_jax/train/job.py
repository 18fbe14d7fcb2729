"""The parts of a run, built from its config and checked before the first step."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import optax
from absl import logging
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
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train import checks
from klbox_jax.train.extensions import Extensions
from klbox_jax.train.optimizer import build_optimizer
from klbox_jax.train.schedules import find_unfit_lengths, with_ramp_in_steps
from klbox_jax.train.step import CompiledTrainStep, compile_train_step
from klbox_jax.train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Job:
    """A config, its folder, and the parts of the run; each part is built once, when it is first read.

    Attributes:
        config: the whole config.
        workdir: the folder of the run.
        trains: True for a run that trains. Its detector has the classes of the training set; that of any other run
            has those that the folder names, else those of the evaluation set, so that no training data are needed.
        extensions: the parts that the config may name.
    """

    config: Any
    workdir: Workdir
    trains: bool = False
    extensions: Extensions = dataclasses.field(default_factory=Extensions)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh of all devices. Raises ValueError if they cannot share a batch evenly."""
        mesh = distributed.make_mesh()
        checks.check_batch_sizes(self.config, num_devices=mesh.size)
        return mesh

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """Sizes and augmentation of the images."""
        return build_preprocessing(self.config.data)

    @functools.cached_property
    def train_source(self) -> Source:
        """The training set, without the images that `config.data.hold_out` keeps out."""
        return build_train_source(self.config.data, self.extensions.sources)

    @functools.cached_property
    def eval_source(self) -> Source:
        """The evaluation set. Raises ValueError if the run trains on other classes."""
        source = build_source(self.config.data, self.config.data.eval_split, self.extensions.sources)
        if self.trains:
            checks.check_same_classes(self.train_source, source)
        return source

    @functools.cached_property
    def calibration_source(self) -> Source:
        """The images that the stds are calibrated on.

        Raises:
            ValueError: there are none, some of them are in the evaluation set, or the two have different classes.
        """
        source = build_calibration_source(self.config.data, self.extensions.sources)
        checks.check_no_shared_images(source, self.eval_source)
        checks.check_same_classes(source, self.eval_source)
        return source

    @functools.cached_property
    def train_plan(self) -> TrainPlan:
        """The images of each training step. Raises DataError if an image of the training set does not fit."""
        return TrainPlan(
            check_fits(self.train_source, self.preprocessing),
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
        )

    @functools.cached_property
    def eval_plan(self) -> EvalPlan:
        """The images of each evaluation step. Raises DataError if an image of the evaluation set does not fit."""
        return EvalPlan(
            check_fits(self.eval_source, self.preprocessing), batch_size=self.config.evaluation.batch_size
        )

    @functools.cached_property
    def model(self) -> GeneralizedRCNN:
        """The detector. A run that does not train has the number of classes that the folder names."""
        num_classes = 0 if self.trains else self.workdir.num_classes()
        if not num_classes:
            num_classes = len((self.train_source if self.trains else self.eval_source).class_names)
        config = self.config.model
        # A ramp that is a share of the training needs its length; nothing else of a detector depends on it.
        if self.trains and isinstance(config.box_loss_settings.get("ramp_steps", 0), float):
            config = with_ramp_in_steps(config, self.total_steps)
        return self.extensions.build_model(config, num_classes=num_classes)

    @functools.cached_property
    def total_steps(self) -> int:
        """Steps of the whole training, one batch each; a multiple of `config.train.accumulate_steps`."""
        train = self.config.train
        updates = train.num_epochs * self.train_plan.steps_per_epoch / train.accumulate_steps
        return train.num_steps or max(1, round(updates)) * train.accumulate_steps

    @functools.cached_property
    def _optimizer_and_schedule(self) -> tuple[optax.GradientTransformation, optax.Schedule]:
        train = self.config.train
        return build_optimizer(
            self.config.optimizer,
            batch_size=train.batch_size,
            accumulate_steps=train.accumulate_steps,
            total_steps=self.total_steps,
        )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer."""
        return self._optimizer_and_schedule[0]

    @property
    def schedule(self) -> optax.Schedule:
        """The learning rate of each step."""
        return self._optimizer_and_schedule[1]

    @functools.cached_property
    def train_step(self) -> CompiledTrainStep:
        """The training step, compiled once for each canvas."""
        return compile_train_step(
            self.mesh,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            seed=self.config.seed,
            frozen=self.config.optimizer.frozen,
            skip_nonfinite=self.config.train.on_nonfinite == "skip",
        )

    def check(self, settings: Iterable[PostprocessSettings], *, evaluates: bool = True) -> None:
        """Builds the parts that the run needs, so that faults of config and data show before any work is done.

        Args:
            settings: the post-processings of the evaluation, the calibration or the export.
            evaluates: False for a run that only trains, which needs no evaluation set.

        Raises:
            ValueError, DataError: a field of the config, or the data, cannot be used; the message names it.
        """
        has_variances = self.check_without_data(settings, evaluates=evaluates)
        if self.trains:
            _ = self.train_source, self.train_plan
            checks.check_profile_steps(self.config.train.profile_steps, total_steps=self.total_steps)
            _ = self.optimizer
        if evaluates:
            _ = self.eval_source, self.eval_plan
        _ = self.model
        if self.trains:
            checks.check_label_noise(self.model, self.train_source)
            for sentence in find_unfit_lengths(
                self.config, total_steps=self.total_steps, has_variances=has_variances
            ):
                logging.warning("%s", sentence)

    def check_without_data(self, settings: Iterable[PostprocessSettings], *, evaluates: bool) -> bool:
        """Does what `check` does before it reads any data; returns True if the detector predicts variances."""
        config = self.config
        if self.trains:
            checks.check_train_config(config.train, evaluates=evaluates)
            # Its number of steps is not known yet, and no check of the optimizer depends on it.
            build_optimizer(config.optimizer, batch_size=1, accumulate_steps=1, total_steps=1)
        if evaluates:
            checks.check_evaluation_config(config)
        _ = self.mesh
        # The number of classes is not known yet, and no check of the network depends on it. A job that was given its
        # model has it already.
        is_built = isinstance(getattr(type(self), "model", None), functools.cached_property)
        model = self.extensions.build_model(config.model, num_classes=1) if is_built else self.model
        heads = model.roi_heads
        for chosen in settings:
            chosen.check_head(
                has_variances=heads.box_loss.has_variances, has_iou_head=heads.iou_head is not None
            )
        checks.check_masks(model, mask_size=self.preprocessing.mask_size)
        return heads.box_loss.has_variances
