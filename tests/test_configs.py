import copy
import dataclasses
import importlib
import itertools
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import common, explain
from klbox_jax.data.build import build_preprocessing
from klbox_jax.data.transforms import resized_size
from klbox_jax.models.build import build_model
from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.checks import check_frozen
from klbox_jax.train.init_or_restore import dummy_batch
from klbox_jax.train.optimizer import build_optimizer, make_optimizer
from klbox_jax.weights import detectron_names, torchvision_names
from klbox_jax.weights.provenance import check_provenance
from klbox_jax.weights.restricted_unpickler import WeightFileError
from tests.golden import make_configs
from tests.thin import num_params

FAMILIES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    # torchvision's published detectors have no variants.
    if path.stem not in ("__init__", "base", "common", "explain", "torchvision")
)
FULL_SCALE = (
    "faster_rcnn_resnet50_c4",
    "faster_rcnn_resnet50_fpn",
    "faster_rcnn_vgg16",
    "faster_rcnn_vgg_cnn_m_1024",
    "mask_rcnn_resnet50_fpn",
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


@pytest.mark.parametrize("family", make_configs.VARIANTS)
def test_every_variant_is_as_in_the_golden_file(family):
    """Run `python -m tests.golden.make_configs` if a field is meant to change, and read the differences."""
    assert make_configs.resolve_family(family) == make_configs.read()[family]


def test_every_field_is_explained_in_one_line():
    texts = explain.explanations()
    fields, groups = set(), set()
    for family, variants in make_configs.VARIANTS.items():
        for arg in (None, *variants):
            fields |= make_configs.resolve(family, arg).keys()
    for field in fields:
        parts = field.split(".")
        groups |= {".".join(parts[:count]) for count in range(1, len(parts))}
    assert {field for field in fields if not texts.get(field)} == set()
    assert texts.keys() <= fields | groups
    assert texts["train.batch_size"] == "images of a step, on all devices together"
    assert texts["model.mask_pooler.resolution"] == texts["model.box_pooler.resolution"]
    assert texts["model.rpn.min_size"] == common.EXTRA_FIELDS["model.rpn.min_size"]
    assert texts["model.fpn"].startswith("feature pyramid")


def test_a_change_of_a_config_leaves_the_base_as_it_is():
    before = copy.deepcopy(common.BASE)
    config = common.base(common.VARIANT)
    config.model.rpn.features = 7
    config.model.mask_pooler.resolution = 5
    assert before == common.BASE
    assert config.model.box_pooler.resolution == 7


def test_a_tiny_scenes_config_keeps_its_variants():
    config = get_config("scenes", "loss=smooth_l1,noise_scale=2,size=tiny")
    assert config.model.box_loss == "smooth_l1"
    assert config.data.noise_scale == 2.0
    full = get_config("scenes")
    for group in ("data", "train", "postprocess", "evaluation"):
        assert config[group].keys() == full[group].keys()
    assert config.train.num_steps == 6


def test_every_family_is_found():
    assert {"scenes", "faster_rcnn_mobilenet_v2_fpn", *FULL_SCALE} <= set(FAMILIES)
    assert {*FAMILIES, "torchvision"} == set(make_configs.VARIANTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_every_variant_builds(family, variant):
    config = get_config(family, variant)
    assert isinstance(config, ml_collections.ConfigDict)
    assert {type(leaf) for leaf in leaves(config.to_dict())} <= {
        str,
        int,
        float,
        bool,
        type(None),
    }  # and so no lists
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
    step = jnp.zeros((), jnp.int32)
    params = jax.eval_shape(lambda: model.init(key, batch, key, step, method="train_forward"))
    check_frozen(config.optimizer.frozen, params["params"])
    for canvas in config.data.canvases[:2]:
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
@pytest.mark.parametrize("arg", ["los=kl", "loss", "kl", "loss=kl,deep=50"])
def test_an_unknown_argument_is_refused(family, arg):
    with pytest.raises(ValueError, match=r"is unknown; write key=value with a key of \['"):
        get_config(family, arg)


# Convolutions of ImageNet networks, from the published counts of torchvision's classifiers: ResNet-50 25,557,032 and
# ResNet-101 44,549,160, less the 2,049,000 of `fc` and two for each channel of batch norm, of which there are
# 26,560 and 52,672. VGG-16 138,357,544 with `fc6` and `fc7`, less the 4,097,000 of `fc8`.
RESNET50 = 25_557_032 - 2_049_000 - 2 * 26_560
RESNET101 = 44_549_160 - 2_049_000 - 2 * 52_672
VGG16 = 138_357_544 - 4_097_000
# torchvision's fasterrcnn_resnet50_fpn and maskrcnn_resnet50_fpn, published without frozen batch norms (buffers there).
# Each of its 91 classes, one of them the background, has a score, a box and a mask; ours are 80, and the background
# has a score alone.
TORCHVISION_PREDICTOR = 1025 * (91 + 4 * 91)
FASTER = 41_755_286 - TORCHVISION_PREDICTOR
MASKS = 44_401_393 - 41_755_286 - 257 * (91 - 80)


def predictor(features, classes):
    """Scores with the background; offsets and their log variances without."""
    return (features + 1) * (classes + 1 + 2 * 4 * classes)


def rpn(channels, features, anchors):
    return features * (9 * channels + 1) + (features + 1) * 5 * anchors


@pytest.mark.parametrize(
    ("family", "arg", "classes", "expected"),
    [
        # Four numbers a channel of frozen batch norm are parameters here, and not trained.
        ("faster_rcnn_resnet50_fpn", "", 80, FASTER + predictor(1024, 80) + 4 * 26_560),
        ("mask_rcnn_resnet50_fpn", "", 80, FASTER + predictor(1024, 80) + 4 * 26_560 + MASKS),
        (
            "mask_rcnn_resnet50_fpn",
            "depth=101",
            80,
            FASTER - RESNET50 + RESNET101 + predictor(1024, 80) + 4 * 52_672 + MASKS,
        ),
        (
            "faster_rcnn_resnet50_c4",
            "",
            80,
            RESNET50 + 4 * 26_560 + rpn(1024, 1024, 15) + predictor(2048, 80),
        ),
        ("faster_rcnn_vgg16", "", 80, VGG16 + rpn(512, 512, 12) + predictor(4096, 80)),
        ("faster_rcnn_vgg16", "data=voc", 20, VGG16 + rpn(512, 512, 9) + predictor(4096, 20)),
        (
            "faster_rcnn_vgg_cnn_m_1024",
            "",
            20,
            # Five convolutions, two layers over 6 x 6 cells.
            (96 * (49 * 3 + 1) + 256 * (25 * 96 + 1) + 512 * (9 * 256 + 1) + 2 * 512 * (9 * 512 + 1))
            + (4096 * (36 * 512 + 1) + 1024 * 4097)
            + rpn(512, 256, 9)
            + predictor(1024, 20),
        ),
    ],
)
def test_parameters_are_those_that_were_published(family, arg, classes, expected):
    model = build_model(get_config(family, arg).model, num_classes=classes)
    key, batch = jax.random.key(0), dummy_batch((64, 64))
    assert num_params(jax.eval_shape(lambda: model.init(key, batch, key, method="train_forward"))) == expected


@pytest.mark.parametrize(
    ("family", "arg", "steps", "rate"),
    [
        # The configs of the KL-Loss release for 8, 4 and 2 GPUs.
        ("faster_rcnn_resnet50_fpn", "", 180_000, 0.02),
        ("faster_rcnn_resnet50_fpn", "batch_size=8", 360_000, 0.01),
        ("mask_rcnn_resnet50_fpn", "batch_size=4", 720_000, 0.005),
        ("mask_rcnn_resnet50_fpn", "schedule=1x", 90_000, 0.02),
        ("faster_rcnn_resnet50_fpn", "schedule=4x", 360_000, 0.02),
        # Detectron's e2e_faster_rcnn_R-50-C4_2x.yaml.
        ("faster_rcnn_resnet50_c4", "", 360_000, 0.01),
        # py-faster-rcnn's solvers, in batches of 2, 2 and 1.
        ("faster_rcnn_vgg16", "batch_size=2", 490_000, 0.001),
        ("faster_rcnn_vgg16", "data=voc,batch_size=2", 70_000, 0.001),
        ("faster_rcnn_vgg_cnn_m_1024", "batch_size=1", 70_000, 0.001),
    ],
)
def test_schedules_are_those_of_their_sources(family, arg, steps, rate):
    config = get_config(family, arg)
    assert config.train.num_steps == steps
    _, schedule = build_optimizer(
        config.optimizer, batch_size=config.train.batch_size, accumulate_steps=1, total_steps=steps
    )
    fractions = (2 / 3, 8 / 9) if "resnet" in family else (5 / 7,)
    assert float(schedule(0)) == pytest.approx(rate / 3)
    for number, fraction in enumerate(fractions):
        decay = round(fraction * steps)
        assert float(schedule(decay - 1)) == pytest.approx(rate * 0.1**number)
        assert float(schedule(decay + 1)) == pytest.approx(rate * 0.1 ** (number + 1))


# What tells a backbone's file, and a whole detector's.
TENSOR = np.zeros(1, np.float32)
DETECTRON_FILES = ({"res2_0_branch2a_w": TENSOR}, {"res2_0_branch2a_w": TENSOR, "cls_score_w": TENSOR})


@pytest.mark.parametrize(
    "family", ["faster_rcnn_resnet50_fpn", "mask_rcnn_resnet50_fpn", "faster_rcnn_resnet50_c4"]
)
def test_the_weights_of_a_variant_suit_it(family):
    backbone, detector = (detectron_names.provenance(state, config="") for state in DETECTRON_FILES)
    torchvision = torchvision_names.provenance({"layer1.0.conv1.weight": TENSOR}, config="")
    check_provenance(get_config(family).model, backbone)
    check_provenance(get_config(family, "weights=torchvision").model, torchvision)
    check_provenance(get_config(family, "init=detector").model, detector)
    assert not get_config(family).model.init_partial
    assert get_config(family, "init=detector").model.init_partial
    with pytest.raises(WeightFileError, match=r"pixel_mean.*pixel_std.*stride_in_1x1"):
        check_provenance(get_config(family).model, torchvision)
    with pytest.raises(WeightFileError, match=r"box_pooler\.aligned = False.*mask_pooler\.aligned = False"):
        check_provenance(get_config(family).model, detector)


def test_the_weights_of_vgg_suit_it():
    detectron = detectron_names.provenance({"conv1_1_w": TENSOR}, config="")
    check_provenance(get_config("faster_rcnn_vgg16").model, detectron)
    check_provenance(get_config("faster_rcnn_vgg_cnn_m_1024").model, detectron)
    torchvision = torchvision_names.provenance({"features.0.weight": TENSOR}, config="")
    check_provenance(get_config("faster_rcnn_vgg16", "weights=torchvision,data=voc").model, torchvision)


@pytest.mark.parametrize("family", FULL_SCALE)
def test_every_photograph_fits_a_canvas(family):
    preprocessing = build_preprocessing(get_config(family).data)
    sides = {"short_side": preprocessing.short_side, "long_side": preprocessing.long_side}
    for short in range(20, 641, 20):
        for height, width in ((short, 640), (640, short)):
            size = resized_size(height, width, **sides)
            fitting = [canvas for canvas in preprocessing.canvases if np.all(np.less_equal(size, canvas))]
            assert fitting, size
            # 4:3 and squarer ones need no canvas for the long ones.
            assert short < 480 or min(max(canvas) for canvas in fitting) < preprocessing.long_side


@pytest.mark.parametrize(
    ("family", "arg", "message"),
    [
        ("faster_rcnn_resnet50_fpn", "depth=34", r"depth=34 is unknown; choose one of 50, 101"),
        ("mask_rcnn_resnet50_fpn", "schedule=3x", r"schedule='3x' is unknown; choose one of 1x, 2x, 4x"),
        ("faster_rcnn_resnet50_c4", "init=coco", r"init='coco' is unknown; choose one of imagenet, detector"),
        ("faster_rcnn_vgg16", "data=kitti", r"data='kitti' is unknown; choose one of coco, voc"),
        ("faster_rcnn_vgg16", "weights=caffe", r"weights='caffe' is unknown; choose one of detectron, torch"),
        ("scenes", "size=small", r"size='small' is unknown; choose one of full, tiny"),
        ("faster_rcnn_vgg_cnn_m_1024", "batch_size=0", r"batch_size=0: write a positive number"),
        ("faster_rcnn_vgg16", "legacy=caffe", r"legacy='caffe' is unknown; choose one of none, detectron"),
    ],
)
def test_an_unknown_choice_is_refused(family, arg, message):
    with pytest.raises(ValueError, match=f"^config argument {message}"):
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


LEGACY_FAMILIES = ("faster_rcnn_resnet50_fpn", "faster_rcnn_resnet50_c4", "faster_rcnn_vgg16")


@pytest.mark.parametrize("family", LEGACY_FAMILIES)
def test_the_habits_of_the_released_code(family):
    config = get_config(family, "legacy=detectron,suppression=hard")
    settings = PostprocessSettings(**config.postprocess)
    wanted = {
        "suppression": "hard",
        "voting": "variance",
        "sigma_t": 0.01,
        "voters": "remaining",
        "voting_iou_floor": 0.01,
        "variance_order": "detectron",
        "soft_nms_min_score": 0.001,
        "plus_one_widths": True,
    }
    assert {name: getattr(settings, name) for name in wanted} == wanted
    model = build_model(config.model, num_classes=80)
    pooler = model.roi_heads.box_pooler
    assert model.rpn.eval_proposals.plus_one_widths
    assert pooler.plus_one_widths
    assert pooler.method == "max" or not pooler.aligned
    # Without the argument nothing of it is left, and what it sets is all that differs.
    plain, none = get_config(family, "suppression=hard"), get_config(family, "suppression=hard,legacy=none")
    assert plain.to_dict() == none.to_dict()
    changed = {name for name, value in config.postprocess.items() if plain.postprocess[name] != value}
    assert changed == set(wanted) - {"suppression", "voting", "soft_nms_min_score"}
    default = PostprocessSettings()
    assert {name: plain.postprocess[name] for name in changed} == {
        name: getattr(default, name) for name in changed
    }


@pytest.mark.parametrize("family", LEGACY_FAMILIES)
def test_the_released_weights_suit_the_released_codes_habits(family):
    backbone = "conv1_1_w" if "vgg" in family else "res2_0_branch2a_w"
    state = dict.fromkeys((backbone, "cls_score_w", "bbox_pred_std_w"), TENSOR)
    released = detectron_names.provenance(state, config="XYXY: True")
    config = get_config(family, "legacy=detectron")
    check_provenance(config.model, released)
    model = build_model(config.model, num_classes=80)
    assert model.rpn.box_coder == released.rpn_box_coder
    assert model.roi_heads.box_coder == released.box_coder
    assert released.plus_one_widths
    assert not config.model.init_partial


def test_the_photographs_config_has_what_messages_tell_to_set():
    data = get_config("faster_rcnn_mobilenet_v2_fpn").data
    assert {"calibration_split", "hold_out", "mask_size", "class_names", "tfds_name"} <= set(data.keys())
    assert get_config("faster_rcnn_mobilenet_v2_fpn", "data=voc").data.name == "voc"
    with pytest.raises(
        ValueError, match="config argument data='cocoa' is unknown; choose one of auto, coco, voc, yolo, tfds"
    ):
        get_config("faster_rcnn_mobilenet_v2_fpn", "data=cocoa")
