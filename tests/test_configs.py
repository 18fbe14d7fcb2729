import dataclasses
import importlib
import itertools
import pathlib

import jax
import ml_collections
import pytest

from configs import common
from klbox_jax.data.build import build_preprocessing
from klbox_jax.models.build import build_model
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.loop import dummy_batch
from klbox_jax.train.optimizer import make_optimizer

FAMILIES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)
LOSSES, SUPPRESSIONS, VOTINGS = (
    ("smooth_l1", "kl"),
    ("hard", "soft_linear", "soft_gaussian"),
    ("none", "variance"),
)
VARIANTS = [
    f"loss={loss},suppression={suppression},voting={voting}"
    for loss, suppression, voting in itertools.product(LOSSES, SUPPRESSIONS, VOTINGS)
    if (loss, voting) != ("smooth_l1", "variance")
]


def get_config(family, arg=None):
    return importlib.import_module(f"configs.{family}").get_config(arg)


def leaves(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def test_every_family_is_found():
    assert {"scenes", "faster_rcnn_mobilenet_v2_fpn"} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_every_variant_builds(family, variant):
    config = get_config(family, variant)
    assert isinstance(config, ml_collections.ConfigDict)
    assert {type(leaf) for leaf in leaves(config.to_dict())} <= {str, int, float, bool}  # and so no lists
    settings = PostprocessSettings(**config.postprocess)
    assert set(config.postprocess) == {field.name for field in dataclasses.fields(settings)}
    model = build_model(config.model, num_classes=4)
    assert isinstance(model, GeneralizedRCNN)
    if variant is not None:
        expected = dict(item.split("=") for item in variant.split(","))
        assert config.model.box_loss == model.roi_heads.box_loss.name == expected["loss"]
        assert (settings.suppression, settings.voting) == (expected["suppression"], expected["voting"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_of_a_family_runs_on_its_canvases(family):
    config = get_config(family)
    assert build_preprocessing(config.data).canvases == config.data.canvases
    model = build_model(config.model, num_classes=4)
    batch = dummy_batch(config.data.canvases[0])
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: model.init(key, batch, key, method="train_forward"))
    for canvas in config.data.canvases:
        boxes = jax.eval_shape(
            lambda params, batch: model.apply(params, batch, method="predict").proposals.boxes,
            params,
            dummy_batch(canvas),
        )
        assert boxes.shape == (1, config.model.rpn.post_nms_topk[1], 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_optimizer_of_a_family_builds(family):
    fields = get_config(family).optimizer
    make_optimizer(
        schedule=lambda step: 0.1,
        **{name: fields[name] for name in ("name", "weight_decay", "momentum", "clip_norm", "frozen")},
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("loss", "voting"), [("kl", "variance"), ("smooth_l1", "none")])
def test_voting_follows_the_loss_where_it_is_not_named(family, loss, voting):
    assert get_config(family, f"loss={loss}").postprocess.voting == voting


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_losses_differ_in_nothing_else(family):
    kl, baseline = get_config(family, "loss=kl").to_dict(), get_config(family, "loss=smooth_l1").to_dict()
    assert (kl["model"].pop("box_loss"), baseline["model"].pop("box_loss")) == ("kl", "smooth_l1")
    assert (kl["postprocess"].pop("voting"), baseline["postprocess"].pop("voting")) == ("variance", "none")
    assert kl == baseline


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arg", ["los=kl", "loss", "kl", "loss=kl,depth=50"])
def test_an_unknown_argument_is_refused(family, arg):
    with pytest.raises(ValueError, match=r"is unknown; write key=value with a key of \['"):
        get_config(family, arg)


def test_values_take_the_type_of_their_default():
    defaults = {"name": "a", "count": 1, "rate": 0.5, "flag": False}
    assert common.parse_arg(None, **defaults) == defaults
    assert common.parse_arg("", **defaults) == defaults
    parsed = common.parse_arg("name=b,count=7,rate=2,flag=True", **defaults)
    assert parsed == {"name": "b", "count": 7, "rate": 2.0, "flag": True}
    assert [type(value) for value in parsed.values()] == [str, int, float, bool]
    assert common.parse_arg("name=x=y", **defaults)["name"] == "x=y"
    assert common.parse_arg("flag=False", **(defaults | {"flag": True}))["flag"] is False


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("count=1.5", "config argument 'count=1.5': expected a int"),
        ("rate=fast", "config argument 'rate=fast': expected a float"),
        ("flag=yes", "config argument 'flag=yes': write True or False"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(arg, message):
    with pytest.raises(ValueError, match=message):
        common.parse_arg(arg, count=1, rate=0.5, flag=False)
