import pickle

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from klbox_jax.models.normalization import EPSILON
from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from klbox_jax.weights.convert import load_weights
from klbox_jax.weights.torch_file import WeightFileError
from tests.weights import small_detector
from tests.weights.pickles import write_old_pickle
from tests.weights.small_detector import SIDE, fresh_params, trained_params
from tests.weights.test_torch_file import write_zip

CENTER = CenterBoxCoder((10.0, 10.0, 5.0, 5.0))
UNIT_CORNER = CornerBoxCoder((1.0, 1.0, 1.0, 1.0))


def _load(path, params, **kwargs):
    return load_weights(params, path, pooled_side=SIDE, **kwargs)


def _flat(params):
    return {"/".join(path): np.asarray(value) for path, value in flatten_dict(params).items()}


def _same(loaded, trained, *, but=()):
    """Every parameter is the trained one, but those of `but`, layers that keep their initial values."""
    assert jax.tree.structure(loaded) == jax.tree.structure(trained)
    for name, value in _flat(loaded).items():
        wanted = np.full_like(value, -7.0) if name.startswith(but) and but else _flat(trained)[name]
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6, err_msg=name)


def _identity_norms(params):
    """Norms whose statistics are Detectron's: none."""

    def one(path, value):
        statistics = {"mean": 0.0, "var": 1.0 - EPSILON}
        return np.full_like(value, statistics.get(path[-1].key, 0.0)) if path[-1].key in statistics else value

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.fixture(scope="module")
def trained():
    return trained_params()


def test_torchvision(tmp_path, trained):
    path = write_zip(tmp_path / "weights.pth", small_detector.torchvision_state(trained))
    loaded, report = _load(path, fresh_params(), box_coder=CENTER)
    _same(loaded, trained)
    assert sorted(report.loaded) == sorted(_flat(trained))
    assert report.reinitialized == {}
    assert report.unused == ()
    assert report.provenance.channel_order == "rgb"
    assert report.provenance.stride_in_1x1 is False
    assert report.provenance.anchor_offset == 0.0


def test_old_torchvision_has_no_epsilon_in_its_norms(tmp_path, trained):
    # x / sqrt(var) there is x / sqrt(our var + 1e-5) here.
    path = write_zip(tmp_path / "weights.pth", small_detector.torchvision_state(trained, old_names=True))
    loaded, _ = _load(path, fresh_params(), box_coder=CENTER)
    _same(loaded, jax.tree_util.tree_map_with_path(_without_epsilon, trained))


def _without_epsilon(path, value):
    return value - np.float32(1e-5) if path[-1].key == "var" else value


def test_prefix_of_a_parallel_run(tmp_path, trained):
    state = {f"module.{name}": value for name, value in small_detector.torchvision_state(trained).items()}
    loaded, _ = _load(write_zip(tmp_path / "weights.pth", state), fresh_params(), box_coder=CENTER)
    _same(loaded, trained)
    root = {"model": state, "epoch": 3, "optimizer": {"state": {0: state}}}
    (tmp_path / "checkpoint.pkl").write_bytes(pickle.dumps(root))
    loaded, _ = _load(tmp_path / "checkpoint.pkl", fresh_params(), box_coder=CENTER)
    _same(loaded, trained)


def test_detectron2_reads_bgr(tmp_path, trained):
    state = small_detector.detectron2_state(trained)
    state["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
    loaded, report = _load(write_zip(tmp_path / "weights.pth", state), fresh_params(), box_coder=CENTER)
    _same(loaded, trained)
    assert report.provenance.channel_order == "bgr"
    assert report.provenance.stride_in_1x1 is True
    assert report.provenance.pixel_mean == (123.675, 116.28, 103.53)
    assert report.provenance.pixel_std == (1.0, 1.0, 1.0)


def test_detectron2_with_the_statistics_of_its_pixels(tmp_path, trained):
    state = small_detector.detectron2_state(trained, bgr=False)
    state["pixel_mean"] = np.asarray([123.675, 116.28, 103.53], np.float32).reshape(3, 1, 1)
    state["pixel_std"] = np.asarray([58.395, 57.12, 57.375], np.float32).reshape(3, 1, 1)
    loaded, report = _load(write_zip(tmp_path / "weights.pth", state), fresh_params(), box_coder=CENTER)
    _same(loaded, trained)
    assert report.provenance.channel_order == "rgb"
    assert report.provenance.stride_in_1x1 is False
    np.testing.assert_allclose(report.provenance.pixel_std, (58.395, 57.12, 57.375), rtol=1e-6)


def test_detectron2_imagenet_file(tmp_path, trained):
    prefix = "backbone.bottom_up."
    state = small_detector.detectron2_state(trained, bgr=False)
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    state["stem.fc.weight"] = np.zeros((10, 20), np.float32)
    path = write_old_pickle(tmp_path / "R-50.pkl", state)
    loaded, report = _load(path, fresh_params())
    _same(loaded, trained, but=("fpn", "rpn", "roi_heads"))
    assert report.provenance.channel_order == "rgb"
    assert report.provenance.box_coder is None


@pytest.mark.parametrize("config", [None, "RESNETS:\n  STRIDE_1X1: false\nXYXY: false\n"])
def test_detectron(tmp_path, trained, config):
    blobs = small_detector.detectron_blobs(trained)
    loaded, report = _load(
        write_old_pickle(tmp_path / "model_final.pkl", blobs, config), fresh_params(), box_coder=CENTER
    )
    _same(loaded, _identity_norms(trained))
    assert report.provenance.source == "Detectron"
    assert report.provenance.pixel_mean == (122.7717, 115.9465, 102.9801)
    assert report.provenance.stride_in_1x1 is (config is None)
    assert report.provenance.plus_one_widths


@pytest.mark.parametrize("has_log_vars", [True, False])
def test_kl_loss_orders_its_edges_otherwise(tmp_path, has_log_vars):
    trained = trained_params(log_vars=has_log_vars)
    blobs = small_detector.detectron_blobs(trained, kl=has_log_vars)
    if not has_log_vars:  # its baseline: nothing but the config says how the boxes are coded
        for name in ("bbox_pred_w", "bbox_pred_b", "rpn_bbox_pred_fpn2_w", "rpn_bbox_pred_fpn2_b"):
            blobs[name] = small_detector.in_order_x1_x2_y1_y2(blobs[name])
    path = write_old_pickle(tmp_path / "faster2x_log.pkl", blobs, "PRED_STD: true\nXYXY: true\n")
    fresh = fresh_params(log_vars=has_log_vars)
    loaded, report = _load(path, fresh, rpn_box_coder=UNIT_CORNER)
    _same(loaded, _identity_norms(trained))
    assert report.provenance.source == "KL-Loss"
    assert report.provenance.box_coder == CornerBoxCoder((10.0, 10.0, 10.0, 10.0))
    # Our RPN codes centres: its boxes do not fit, and nothing else.
    with pytest.raises(
        WeightFileError, match=r"rpn/head/anchor_deltas/kernel .its boxes are coded by Corner"
    ):
        _load(path, fresh)
    loaded, report = _load(path, fresh, init_partial=True)
    _same(loaded, _identity_norms(trained), but=("rpn/head/anchor_deltas",))
    assert list(report.reinitialized) == ["rpn/head/anchor_deltas"]


def test_by_hand_the_edges_of_kl_loss(tmp_path):
    # Outputs of class 0, after the background's four: x1 = 1, x2 = 2, y1 = 3, y2 = 4.
    blobs = small_detector.detectron_blobs(trained_params(log_vars=True), kl=True)
    blobs["bbox_pred_b"][4:8] = [1, 2, 3, 4]
    blobs["bbox_pred_std_b"][4:8] = [5, 6, 7, 8]
    path = write_old_pickle(tmp_path / "faster2x_log.pkl", blobs)
    loaded, _ = _load(path, fresh_params(log_vars=True), rpn_box_coder=UNIT_CORNER)
    predictor = loaded["roi_heads"]["box_predictor"]
    assert predictor["bbox_pred"]["bias"][:4].tolist() == [1, 3, 2, 4]
    assert predictor["bbox_log_var"]["bias"][:4].tolist() == [5, 7, 6, 8]


def test_by_hand_the_order_of_classes(tmp_path, trained):
    state = small_detector.torchvision_state(trained)
    state["roi_heads.box_predictor.cls_score.bias"] = np.asarray([10, 11, 12, 13], np.float32)
    path = write_zip(tmp_path / "weights.pth", state)
    loaded, _ = _load(path, fresh_params(), box_coder=CENTER)
    # Torchvision's class 0 is the background, which is our last.
    assert loaded["roi_heads"]["box_predictor"]["cls_score"]["bias"].tolist() == [11, 12, 13, 10]


def test_unused_classes_of_coco_are_cut(tmp_path):
    trained = trained_params(num_classes=90)
    state = small_detector.torchvision_state(trained)
    path = write_zip(tmp_path / "weights.pth", state)
    loaded, _ = _load(path, fresh_params(num_classes=90), box_coder=CENTER)
    _same(loaded, trained)
    loaded, _ = _load(path, fresh_params(num_classes=80), box_coder=CENTER)
    ours, theirs = (p["roi_heads"]["box_predictor"] for p in (loaded, trained))
    # Category ids 1 (person), 11 (fire hydrant), 13 (stop sign), 90 (toothbrush); row i of 90 is id i + 1.
    for kept, category_id in ((0, 1), (10, 11), (11, 13), (79, 90)):
        row = category_id - 1
        np.testing.assert_array_equal(ours["cls_score"]["bias"][kept], theirs["cls_score"]["bias"][row])
        box = theirs["bbox_pred"]["kernel"][:, 4 * row : 4 * row + 4]
        np.testing.assert_array_equal(ours["bbox_pred"]["kernel"][:, 4 * kept : 4 * kept + 4], box)
        logits = theirs_masks(trained)[..., row]
        np.testing.assert_array_equal(theirs_masks(loaded)[..., kept], logits)
    assert ours["cls_score"]["bias"][80] == theirs["cls_score"]["bias"][90]


def theirs_masks(params):
    return np.asarray(params["roi_heads"]["mask_head"]["mask_fcn_logits"]["kernel"])


def test_other_classes_keep_every_layer_that_fits(tmp_path, trained):
    path = write_zip(tmp_path / "weights.pth", small_detector.torchvision_state(trained))
    fresh = fresh_params(num_classes=5, log_vars=True)
    with pytest.raises(WeightFileError, match=r"config\.model\.init_partial = True") as error:
        _load(path, fresh, box_coder=CENTER)
    message = str(error.value)
    assert str(path) in message
    assert "cls_score/bias (roi_heads.box_predictor.cls_score.bias has shape (4,) here, not (6,))" in message
    assert "bbox_log_var/bias (the file has none, nearest roi_heads.box_predictor.bbox_pred.bias)" in message

    loaded, report = _load(path, fresh, box_coder=CENTER, init_partial=True)
    new = tuple(f"roi_heads/{name}" for name in ("box_predictor", "mask_head/mask_fcn_logits"))
    _same(loaded, trained_like(fresh, trained), but=new)
    assert sorted(report.reinitialized) == [
        "roi_heads/box_predictor/bbox_log_var",
        "roi_heads/box_predictor/bbox_pred",
        "roi_heads/box_predictor/cls_score",
        "roi_heads/mask_head/mask_fcn_logits",
    ]
    assert "has shape" in report.reinitialized["roi_heads/box_predictor/cls_score"]
    assert "cls_score keeps its initial values" in str(report)


def trained_like(fresh, trained):
    flat = flatten_dict(trained)
    return jax.tree_util.tree_map_with_path(lambda path, v: flat.get(tuple(k.key for k in path), v), fresh)


def test_boxes_of_another_coder_are_not_taken(tmp_path, trained):
    path = write_zip(tmp_path / "weights.pth", small_detector.torchvision_state(trained))
    with pytest.raises(
        WeightFileError, match=r"bbox_pred/kernel .its boxes are coded by Center.*ours by Corner"
    ):
        _load(path, fresh_params())
    loaded, report = _load(path, fresh_params(), init_partial=True)
    _same(loaded, trained, but=("roi_heads/box_predictor/bbox_pred",))
    assert list(report.reinitialized) == ["roi_heads/box_predictor/bbox_pred"]


def test_a_layer_is_filled_whole_or_not_at_all(tmp_path, trained):
    state = small_detector.torchvision_state(trained)
    state["roi_heads.box_head.fc6.weight"] = np.zeros((6, 4 * 7 * 7), np.float32)
    path = write_zip(tmp_path / "weights.pth", state)
    loaded, _ = _load(path, fresh_params(), box_coder=CENTER, init_partial=True)
    _same(loaded, trained, but=("roi_heads/box_head/fc1",))


def test_unexpected_tensors(tmp_path, trained):
    state = small_detector.torchvision_state(trained)
    state["roi_heads.box_head.fc8.weight"] = np.zeros((2, 2), np.float32)
    path = write_zip(tmp_path / "weights.pth", state)
    with pytest.raises(
        WeightFileError, match=r"no place for: roi_heads\.box_head\.fc8\.weight .unknown, nearest"
    ):
        _load(path, fresh_params(), box_coder=CENTER)
    loaded, report = _load(path, fresh_params(), box_coder=CENTER, init_partial=True)
    _same(loaded, trained)
    assert report.unused == ("roi_heads.box_head.fc8.weight",)
    assert "not used: roi_heads.box_head.fc8.weight" in str(report)


@pytest.mark.parametrize("blocks", [(1, 2, 2, 1), (1, 1, 1, 1)])
def test_another_backbone_is_never_taken(tmp_path, trained, blocks):
    path = write_zip(tmp_path / "weights.pth", small_detector.torchvision_state(trained))
    for init_partial in (False, True):
        with pytest.raises(WeightFileError, match=r"Set config\.model\.backbone") as error:
            _load(path, fresh_params(blocks=blocks), box_coder=CENTER, init_partial=init_partial)
        assert "init_partial" not in str(error.value)


def test_a_classifier_fills_the_backbone(tmp_path, trained):
    prefix = "backbone.body."
    state = small_detector.torchvision_state(trained)
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    state |= {"fc.weight": np.zeros((10, 20), np.float32), "fc.bias": np.zeros(10, np.float32)}
    loaded, report = _load(write_zip(tmp_path / "weights.pth", state), fresh_params())
    _same(loaded, trained, but=("fpn", "rpn", "roi_heads"))
    assert report.reinitialized == {}
    state.pop("layer2.1.conv2.weight")
    path = write_zip(tmp_path / "weights.pth", state)
    with pytest.raises(WeightFileError, match=r"backbone/res3_1/conv2/kernel .the file has none"):
        _load(path, fresh_params())


def test_values_that_are_not_finite(tmp_path, trained):
    state = small_detector.torchvision_state(trained)
    state["rpn.head.cls_logits.bias"] = np.asarray([0.0, np.nan], np.float32)
    path = write_zip(tmp_path / "weights.pth", state)
    with pytest.raises(WeightFileError, match=r"'rpn\.head\.cls_logits\.bias' is not finite"):
        _load(path, fresh_params(), box_coder=CENTER, init_partial=True)


def test_one_parameter_under_two_names(tmp_path, trained):
    state = small_detector.torchvision_state(trained)
    state["rpn.head.conv.weight"] = state["rpn.head.conv.0.0.weight"]
    path = write_zip(tmp_path / "weights.pth", state)
    with pytest.raises(WeightFileError, match="rpn/head/conv/kernel under two names"):
        _load(path, fresh_params(), box_coder=CENTER)


def test_unknown_layouts_and_formats(tmp_path):
    path = write_zip(tmp_path / "weights.pth", {"encoder.weight": np.zeros(3, np.float32)})
    with pytest.raises(WeightFileError, match=r"encoder\.weight, which are neither torchvision's"):
        _load(path, fresh_params())
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(WeightFileError, match=r"page\.pth: is not a pickle"):
        _load(tmp_path / "page.pth", fresh_params())
    with pytest.raises(WeightFileError, match=r"absent\.pth: cannot be read"):
        _load(tmp_path / "absent.pth", fresh_params())


def test_the_content_tells_the_format(tmp_path, trained):
    # A zip named .pkl, and a pickle named .pth.
    path = write_zip(tmp_path / "weights.pkl", small_detector.torchvision_state(trained))
    loaded, _ = _load(path, fresh_params(), box_coder=CENTER)
    _same(loaded, trained)
    path = write_old_pickle(tmp_path / "weights.pth", small_detector.detectron2_state(trained))
    loaded, _ = _load(path, fresh_params(), box_coder=CENTER)
    _same(loaded, trained)
