import functools
import itertools
import re

import jax
import pytest

from benchmarks.model_report import example_batch
from configs import mask_rcnn_resnet50_fpn
from klbox_jax.evaluation.eval_step import eval_step
from klbox_jax.models.build import build_model
from klbox_jax.postprocess.settings import VOTING_METHODS, PostprocessSettings
from klbox_jax.train.init_or_restore import dummy_batch
from klbox_jax.train.optimizer import build_optimizer
from klbox_jax.train.step import TrainStep, lower_create_state, stop_frozen
from tests.lowered import count_operations, lower
from tests.thin import random_batch, scenes_config, thin_model

PLATFORMS = ["cpu", "cuda", "tpu"]
# A convolution in lowered text whose kernel has one row and one column.
POINTWISE = re.compile(r"stablehlo\.convolution.*tensor<1x1x\d+x\d+xf32>\) ->")
VARIANT = "loss=kl,voting=variance,suppression=soft_gaussian"


@pytest.fixture(scope="module")
def parts():
    config = scenes_config(VARIANT)
    optimizer, schedule = build_optimizer(
        config.optimizer, batch_size=config.train.batch_size, accumulate_steps=1, total_steps=100
    )
    model = thin_model(VARIANT)
    batch = random_batch(size=2, canvas=(192, 192))
    state = lower_create_state(model, optimizer, batch=dummy_batch((192, 192))).out_info
    return config, model, optimizer, schedule, state, batch


def exported(function, *arguments):
    # Exporting puts descriptions of arrays into the types of its arguments, which refuse them: so flat lists.
    leaves, structure = jax.tree.flatten(arguments)

    def flat(leaves):
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))

    program = jax.export.export(jax.jit(flat), platforms=PLATFORMS)(leaves)
    assert program.platforms == tuple(PLATFORMS)
    return sorted((aval.shape, str(aval.dtype)) for aval in program.out_avals)


def test_the_train_step_lowers_for_every_platform(parts):
    _, model, optimizer, schedule, state, batch = parts
    step = TrainStep(model=model, optimizer=optimizer, schedule=schedule, seed=0)
    found = exported(step, state, batch)
    kept = sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(state))
    # The new state, and the scalars: whatever else comes out has no axes.
    for leaf in kept:
        found.remove(leaf)
    assert len(found) > 10
    assert set(found) == {((), "float32")}


def test_the_eval_step_lowers_for_every_platform(parts):
    config, model, _, _, state, batch = parts
    settings = {"": PostprocessSettings(**config.postprocess)}
    assert (settings[""].voting, settings[""].suppression) == ("variance", "soft_gaussian")
    found = exported(functools.partial(eval_step, model=model, settings=settings), state.params, batch)
    # Of 2 images and 20 slots: boxes and their deviations; scores; classes and candidates; valid.
    assert found == sorted(
        2 * [((2, 20, 4), "float32")]
        + [((2, 20), "float32")]
        + 2 * [((2, 20), "int32")]
        + [((2, 20), "bool")]
    )


def test_every_method_lowers_for_every_platform_in_one_step():
    """All suppressions and votings, and IoU-Net's stages, on one model with both heads."""
    variant = "loss=lasernet_kl,iou_head=True"
    model = thin_model(variant)
    batch = random_batch(size=2, canvas=(96, 96))
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: model.init(key, dummy_batch((96, 96)), key, method="train_forward"))
    config = scenes_config(variant)
    fields = config.postprocess.to_dict()
    settings = {
        f"{suppression} {voting}": PostprocessSettings(
            **(fields | {"suppression": suppression, "voting": voting})
        )
        for suppression, voting in zip(
            itertools.cycle(("hard", "soft_linear", "soft_gaussian", "iou_guided")),
            VOTING_METHODS,
            strict=False,
        )
    }
    settings["refined"] = PostprocessSettings(
        **(fields | {"suppression": "iou_guided", "refine_steps": 2, "score_by_iou": True})
    )
    settings["mirrored"] = PostprocessSettings(**(fields | {"flip": True, "score_by_std": 4.0}))
    found = exported(functools.partial(eval_step, model=model, settings=settings), params["params"], batch)
    assert found.count(((2, 20), "bool")) == len(settings)
    assert found.count(((2, 20, 4), "float32")) == 2 * len(settings)


def test_a_full_scale_detector_lowers_to_convolutions_on_accelerators():
    """One step of Mask R-CNN with ResNet-50-FPN, as it is shipped; 1x1 convolutions are products on a CPU alone."""
    config = mask_rcnn_resnet50_fpn.get_config("loss=kl,voting=variance")
    model = build_model(config.model, num_classes=80)
    key = jax.random.key(0)

    def losses(params, batch):
        params = stop_frozen(params, config.optimizer.frozen)
        return sum(model.apply({"params": params}, batch, key, method="train_forward").losses.values())

    params = jax.eval_shape(lambda: model.init(key, dummy_batch((64, 64)), key, method="train_forward"))
    step = jax.jit(jax.grad(losses)).trace(params["params"], example_batch(config.data))
    on_cpu, on_cuda, on_tpu = (
        len(POINTWISE.findall(step.lower(lowering_platforms=(platform,)).as_text())) for platform in PLATFORMS
    )
    assert on_cpu == 0
    # Of 36 1x1 convolutions in the backbone 10 are frozen, and there are 4 laterals, 2 layers of the RPN's head on 5
    # levels and the masks' last one. The forward pass has one convolution for each.
    assert on_cuda == on_tpu >= 36 + 4 + 10 + 1


# The program of CUDA: what grows here costs launches, serial updates, or full sorts on a GPU.
EVAL_COUNTS = {"scatter": 0, "sort": 5, "while": 3}
TRAIN_COUNTS = {"scatter": 4, "sort": 7, "while": 2}


def at_most(found, limits):
    grown = {name: (found[name], limit) for name, limit in limits.items() if found[name] > limit}
    assert not grown, f"more operations than before (found, limit): {grown}"


def test_no_loop_of_the_eval_step_scatters_on_cuda(parts):
    config, model, _, _, state, batch = parts
    settings = {"": PostprocessSettings(**config.postprocess)}
    step = jax.jit(functools.partial(eval_step, model=model, settings=settings))
    everywhere, in_loops = count_operations(lower(step, state.params, batch, platform="cuda"))
    assert in_loops["scatter"] == in_loops["sort"] == 0
    at_most(everywhere, EVAL_COUNTS)
    # A CPU scatters in each round of the picking: there that is the faster form.
    _, on_cpu = count_operations(lower(step, state.params, batch, platform="cpu"))
    assert on_cpu["scatter"] == 2


def test_the_train_step_has_no_more_costly_operations_on_cuda(parts):
    _, model, optimizer, schedule, state, batch = parts
    step = jax.jit(TrainStep(model=model, optimizer=optimizer, schedule=schedule, seed=0))
    everywhere, in_loops = count_operations(lower(step, state, batch, platform="cuda"))
    assert in_loops["scatter"] == 0
    at_most(everywhere, TRAIN_COUNTS)


def test_votes_use_whole_float32_products(parts):
    """Coordinates times weights lose pixels in TF32 or bfloat16; these products ask for the highest precision."""
    config, model, _, _, state, batch = parts
    settings = {"": PostprocessSettings(**config.postprocess)}
    step = jax.jit(functools.partial(eval_step, model=model, settings=settings))
    text = step.trace(state.params, batch).lower(lowering_platforms=("cuda",)).as_text()
    # The vote: [20 kept, candidates] by [candidates, 12 columns].
    votes = [
        line
        for line in text.splitlines()
        if "dot_general" in line and re.search(r"x20x12xf32>$", line.strip())
    ]
    assert votes
    assert all("HIGHEST" in line for line in votes)
