"""`config.model.dtype`: the network computes in bfloat16, and everything about boxes and losses does not."""

import functools
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import mask_scenes
from klbox_jax.models.build import BACKBONES, BOX_HEADS, build_model
from klbox_jax.models.convolution import Conv
from klbox_jax.train.init_or_restore import dummy_batch
from klbox_jax.train.optimizer import build_optimizer
from klbox_jax.train.step import TrainStep, lower_create_state
from tests.thin import random_batch, scenes_config, thin_model

ALL_HEADS = {
    "model.mask_head": {"enabled": True, "features": 8, "num_convs": 1},
    "model.mask_pooler.resolution": 4,
}
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config_of(dtype):
    return scenes_config("loss=kl,iou_head=True", **ALL_HEADS, **{"model.dtype": dtype})


def batch_with_masks():
    batch = random_batch()
    masks = np.random.default_rng(1).integers(0, 2, (*batch.gt.classes.shape, 16, 16), np.uint8)
    return batch.replace(gt=batch.gt.replace(masks=masks))


def training(dtype):
    """The train step of all heads on flat lists, and example arguments."""
    config = config_of(dtype)
    model = build_model(config.model, num_classes=3)
    optimizer, schedule = build_optimizer(
        config.optimizer, batch_size=config.train.batch_size, accumulate_steps=1, total_steps=100
    )
    step = TrainStep(model=model, optimizer=optimizer, schedule=schedule, seed=0)
    state = lower_create_state(model, optimizer, batch=dummy_batch((64, 96))).out_info
    # Exporting puts descriptions of arrays into the types of its arguments, which refuse them: so flat lists.
    leaves, structure = jax.tree.flatten((state, batch_with_masks()))

    def run(leaves):
        return jax.tree.leaves(step(*jax.tree.unflatten(structure, leaves)))

    return jax.jit(run), leaves


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def dtypes_by_primitive(jaxpr):
    """Names of primitives, each with the floating-point dtypes that it reads or writes."""
    found = {}
    for equation in equations(jaxpr):
        for variable in (*equation.invars, *equation.outvars):
            dtype = getattr(variable.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                found.setdefault(equation.primitive.name, set()).add(str(dtype))
    return found


@pytest.fixture(scope="module")
def runs():
    """Losses, gradients and predictions of the same network under each dtype."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = build_model(config_of(dtype).model, num_classes=3)

        def run(key, batch, model=model):
            params = model.init(key, dummy_batch((64, 96)), key, method="train_forward")["params"]

            def total(params):
                outputs = model.apply({"params": params}, batch, key, method="train_forward")
                return sum(outputs.losses.values()), outputs

            (_, outputs), gradients = jax.value_and_grad(total, has_aux=True)(params)
            predictions = model.apply({"params": params}, batch, method="predict")
            classes = jnp.zeros((2, 5), jnp.int32)
            boxes = predictions.proposals.boxes[:, :5]
            masks = model.apply(
                {"params": params}, predictions.pyramid, boxes, classes, method="predict_masks"
            )
            return params, outputs, gradients, predictions, masks

        found[dtype] = jax.jit(run)(jax.random.key(0), batch_with_masks())
    return found


def test_what_leaves_the_heads_is_float32_and_the_maps_are_not(runs):
    params, outputs, gradients, predictions, masks = runs["bfloat16"]
    for tree in (params, gradients, outputs, predictions.boxes, predictions.proposals.boxes, masks):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {"float32"}
    assert predictions.proposals.objectness_logits.dtype == jnp.float32
    assert {str(leaf.dtype) for leaf in predictions.pyramid.values()} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in runs["float32"][3].pyramid.values()} == {"float32"}


def test_losses_of_bfloat16_are_those_of_float32_to_half_a_per_cent(runs):
    exact, low = (runs[dtype][1].losses for dtype in ("float32", "bfloat16"))
    assert set(low) == {
        *("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"),
        *("loss_mask", "loss_iou"),
    }
    assert any(float(low[name]) != float(exact[name]) for name in exact)
    for name, value in exact.items():
        np.testing.assert_allclose(low[name], value, rtol=5e-3, err_msg=name)


def test_gradients_of_bfloat16_are_finite_and_point_the_same_way(runs):
    exact, low = (flatten_dict(runs[dtype][2]) for dtype in ("float32", "bfloat16"))
    assert all(np.isfinite(leaf).all() for leaf in low.values())
    for part in ("backbone", "fpn", "rpn", "roi_heads"):
        ours, theirs = (
            np.concatenate([np.ravel(leaf) for path, leaf in tree.items() if path[0] == part])
            for tree in (low, exact)
        )
        cosine = ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs))
        assert cosine > 0.95, (part, cosine)


@pytest.fixture(scope="module")
def bfloat16_step():
    return training("bfloat16")


def test_a_step_convolves_in_bfloat16_and_never_takes_a_logarithm_in_it(bfloat16_step):
    step, leaves = bfloat16_step
    found = dtypes_by_primitive(step.trace(leaves).jaxpr.jaxpr)
    assert "bfloat16" in found["conv_general_dilated"]
    assert "bfloat16" in found["dot_general"]
    # Norms divide by a root; box coders and losses take exponentials and logarithms; scores and IoUs are ranked.
    precise = {"rsqrt", "sqrt", "exp", "log", "log1p", "logistic", "div", "top_k", "sort", "floor"}
    assert len(precise & set(found)) > 7
    for primitive in precise & set(found):
        assert found[primitive] == {"float32"}, primitive


def test_a_step_lowers_for_accelerators_to_bfloat16_convolutions(bfloat16_step):
    step, leaves = bfloat16_step
    program = jax.export.export(step, platforms=["cuda", "tpu"])(leaves)
    assert np.dtype(jnp.bfloat16) not in {aval.dtype for aval in program.out_avals}
    kernels = r"stablehlo\.convolution.*tensor<3x3x\d+x\d+x(\w+)>\) ->"
    wide = re.findall(kernels, program.mlir_module())
    assert len(wide) > 10
    assert set(wide) == {"bf16"}


@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 6), (3, 1)])
def test_every_form_of_a_convolution_computes_in_its_dtype(kernel_size, groups):
    module = Conv(6, kernel_size, strides=2, groups=groups, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 7, 8, 6))
    params = module.init(jax.random.key(1), x)

    def loss(module, params, x):
        y = module.apply(params, x)
        return jnp.square(y.astype(jnp.float32)).sum(), y

    def gradients(module):
        return jax.jit(jax.grad(functools.partial(loss, module), argnums=(0, 1), has_aux=True))

    low = gradients(module)
    (found, y), (expected, exact) = low(params, x), gradients(module.clone(dtype=None))(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.02 * np.abs(exact).max())
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())
    for platform in ("cpu", "cuda", "tpu"):
        text = jax.export.export(low, platforms=[platform])(params, x).mlir_module()
        products = re.findall(r"stablehlo\.(?:convolution|dot_general).*: \(tensor<[\dx]*x(\w+)>", text)
        assert set(products) <= {"bf16"}
        assert bool(products) == (platform != "cpu" or groups == 1)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_every_backbone_has_bfloat16_maps_and_float32_params(name):
    network = BACKBONES[name](dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    maps, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), images)
    assert {str(leaf.dtype) for leaf in maps.values()} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}


@pytest.mark.parametrize("name", sorted(BOX_HEADS))
def test_every_box_head_answers_in_bfloat16(name):
    pooled = jax.ShapeDtypeStruct((2, 4, 4, 16), jnp.bfloat16)
    head = BOX_HEADS[name](dtype=jnp.bfloat16)
    answer, variables = jax.eval_shape(head.init_with_output, jax.random.key(0), pooled)
    assert answer.dtype == jnp.bfloat16
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}


def test_every_config_starts_from_float32():
    others = ("__init__", "common", "base", "explain")
    families = [path.stem for path in CONFIGS.glob("*.py") if path.stem not in others]
    assert len(families) >= 7
    modules = [importlib.import_module(f"configs.{family}") for family in families]
    assert {module.get_config().model.dtype for module in (*modules, mask_scenes)} == {"float32"}


def test_bfloat16_predictions_are_finite_in_every_call():
    """A compiler of jax 0.12 fused pooling with the box head, whose rows were NaN then, others in each call."""
    model = thin_model("loss=kl", **{"model.dtype": "bfloat16"})
    batch = jax.tree.map(jnp.asarray, random_batch(size=2, canvas=(96, 128)))
    params = model.init(jax.random.key(0), batch, method="init_all_heads")["params"]
    predict = jax.jit(lambda params, batch: model.apply({"params": params}, batch, method="predict").boxes)
    for _ in range(3):
        for leaf in jax.tree.leaves(predict(params, batch)):
            assert np.isfinite(np.asarray(leaf)).all()
