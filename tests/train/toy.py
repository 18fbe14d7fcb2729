"""A detector that is one matrix: what a training loop needs, traced and compiled in no time."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.structures import TrainOutputs
from klbox_jax.train import extensions, init_or_restore
from klbox_jax.train import job as job_module
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import Workdir
from tests.coco_folder import write_folder
from tests.thin import coco_config, thin_model


class Toy(GeneralizedRCNN):
    """Guesses the number of objects from the mean colour; draws a number too, as the sampling of anchors does.

    `nan_on` are ids of images on which the loss is not a number.
    """

    nan_on: tuple[int, ...] = ()

    @nn.compact
    def train_forward(self, batch, key, step=None):
        kernel = self.param("kernel", nn.initializers.normal(0.1), (3, 2))
        bias = self.param("bias", nn.initializers.zeros, (2,))
        colour = batch.images.astype(jnp.float32).mean((1, 2)) / 255.0
        guess = (colour @ kernel + bias[None]).sum(1) + 0.1 * jax.random.normal(key)
        loss = jnp.square(guess - batch.gt.valid.sum(1)).mean()
        if self.nan_on:
            # The gradient is not one either.
            loss *= jnp.where(jnp.isin(batch.image_id, jnp.array(self.nan_on)).any(), jnp.nan, 1.0)
        return TrainOutputs(losses={"loss_box_reg": loss}, metrics={})

    def init_all_heads(self, batch):
        self.train_forward(batch, jax.random.key(0))


def toy(nan_on=()):
    model = thin_model("loss=kl")
    return Toy(
        backbone=model.backbone, fpn=model.fpn, rpn=model.rpn, roi_heads=model.roi_heads, nan_on=nan_on
    )


def toy_config(folder, **fields):
    """18 images of one canvas; 5 steps are an epoch and two images more."""
    root = folder / "pond"
    if not root.exists():
        write_folder(root, images_per_shape=6)
    defaults = {
        "train.batch_size": 4,
        "train.num_steps": 6,
        "train.log_every": 1,
        "data.num_threads": 1,
        "data.canvases": ((96, 96),),
        "optimizer.warmup_steps": 2,
        "optimizer.decay_at": (),
    }
    return coco_config(root, "loss=kl", **(defaults | fields))


@dataclasses.dataclass(frozen=True)
class JobOf(Job):
    """A job with a given model, instead of that of its config."""

    model: GeneralizedRCNN | None = None


def toy_job(folder, name="run", *, nan_on=(), **fields):
    """A training job that passed `check`."""
    config = toy_config(folder, **fields)
    job = JobOf(config, Workdir(folder / name), trains=True, model=toy(nan_on))
    job.check([])
    return job


_SHARED = {}


def share_programs(monkeypatch):
    """Lets runs share what they trace; their configs differ in nothing else that goes into it."""
    optimizer_of, step_of = job_module.build_optimizer, job_module.compile_train_step
    lowered_of, state_of = init_or_restore.lower_create_state, init_or_restore.compile_and_create_state

    def shared(make, *key):
        if key not in _SHARED:
            _SHARED[key] = make()
        return _SHARED[key]

    def optimizer(config, **numbers):
        return shared(lambda: optimizer_of(config, **numbers), *numbers.values())

    def step(mesh, **fields):
        key = (fields["model"], id(fields["optimizer"]), fields["skip_nonfinite"])
        return shared(lambda: step_of(mesh, **fields), *key)

    def lowered(model, optimizer, **others):
        return shared(lambda: lowered_of(model, optimizer, **others), model, id(optimizer))

    def state(program, *, seed):
        # Copied, because a step takes the memory of the state that it is given.
        return jax.tree.map(jnp.copy, shared(lambda: state_of(program, seed=seed), id(program), seed))

    monkeypatch.setattr(job_module, "build_optimizer", optimizer)
    monkeypatch.setattr(job_module, "compile_train_step", step)
    monkeypatch.setattr(init_or_restore, "lower_create_state", lowered)
    monkeypatch.setattr(init_or_restore, "compile_and_create_state", state)


def use_toy(monkeypatch, nan_on=()):
    """Makes `run` train the toy."""
    monkeypatch.setattr(extensions, "build_model", lambda *_, **__: toy(nan_on))
