import numpy as np
import pytest

from klbox_jax.weights import detectron2_names, detectron_names, torchvision_names
from klbox_jax.weights.convert import load_weights
from tests.weights.pickles import write_old_pickle
from tests.weights.test_torch_file import write_zip

TABLES = (torchvision_names, detectron2_names, detectron_names)


def _path(table, name):
    target = table.translate(name, pooled_side=7)
    return target and "/".join(target.path)


@pytest.mark.parametrize(
    ("table", "name", "path"),
    [
        (torchvision_names, "backbone.body.conv1.weight", "backbone/stem/kernel"),
        (torchvision_names, "bn1.running_var", "backbone/stem_norm/var"),
        (torchvision_names, "layer3.22.conv2.weight", "backbone/res4_22/conv2/kernel"),
        (torchvision_names, "layer4.0.downsample.1.bias", "backbone/res5_0/shortcut_norm/bias"),
        (torchvision_names, "features.28.bias", "backbone/conv5_3/bias"),
        (torchvision_names, "features.7.weight", "backbone/conv2_2/kernel"),
        (torchvision_names, "features.0.0.weight", "backbone/stem/conv/kernel"),
        (torchvision_names, "features.18.0.weight", ""),
        (torchvision_names, "features.1.weight", None),
        (torchvision_names, "backbone.fpn.layer_blocks.3.0.bias", "fpn/fpn_output5/bias"),
        (torchvision_names, "roi_heads.mask_head.3.0.weight", "roi_heads/mask_head/mask_fcn4/kernel"),
        (torchvision_names, "roi_heads.keypoint_head.0.weight", None),
        (torchvision_names, "fc.weight", ""),
        (detectron2_names, "backbone.bottom_up.stem.conv1.norm.weight", "backbone/stem_norm/scale"),
        (detectron2_names, "backbone.res4.5.conv3.norm.running_mean", "backbone/res4_5/norm3/mean"),
        (detectron2_names, "res2.0.shortcut.norm.bias", "backbone/res2_0/shortcut_norm/bias"),
        (detectron2_names, "roi_heads.res5.0.conv1.weight", "roi_heads/box_head/res5_0/conv1/kernel"),
        (detectron2_names, "roi_heads.mask_head.deconv.bias", "roi_heads/mask_head/conv5_mask/bias"),
        (detectron2_names, "stem.fc.weight", ""),
        (detectron2_names, "roi_heads.box_head.conv1.weight", None),
        (detectron2_names, "backbone.fpn_lateral2.norm.weight", None),
        (detectron_names, "res4_22_branch2b_w", "backbone/res4_22/conv2/kernel"),
        (detectron_names, "res2_0_branch1_bn_s", "backbone/res2_0/shortcut_norm/scale"),
        (detectron_names, "fpn_inner_res5_2_sum_w", "fpn/fpn_lateral5/kernel"),
        (detectron_names, "fpn_inner_res4_22_sum_lateral_b", "fpn/fpn_lateral4/bias"),
        (detectron_names, "fpn_res3_3_sum_w", "fpn/fpn_output3/kernel"),
        (detectron_names, "conv_rpn_w", "rpn/head/conv/kernel"),
        (detectron_names, "_[mask]_fcn4_w", "roi_heads/mask_head/mask_fcn4/kernel"),
        (detectron_names, "bbox_pred_std_b", "roi_heads/box_predictor/bbox_log_var/bias"),
        (detectron_names, "bbox_pred_w_momentum", ""),
        (detectron_names, "head_conv1_gn_s", None),
        (detectron_names, "kps_score_lowres_w", None),
    ],
)
def test_by_hand(table, name, path):
    assert _path(table, name) == path


def test_of_each_layout_one_table_knows_the_names():
    names = {
        torchvision_names: (
            "backbone.body.layer1.0.conv1.weight",
            "layer1.0.conv1.weight",
            "features.0.weight",
        ),
        detectron2_names: ("backbone.bottom_up.res2.0.conv1.weight", "res2.0.conv1.weight"),
        detectron_names: ("res2_0_branch2a_w", "conv1_1_w", "conv1_w"),
    }
    for table, examples in names.items():
        for name in examples:
            assert [other for other in TABLES if other.recognizes([name])] == [table], name
    assert not any(table.recognizes(["encoder.layers.0.weight"]) for table in TABLES)


def _zeros(shapes):
    tree = {}
    for path, shape in shapes.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.zeros(shape, np.float32)
    return tree


def test_vgg_of_detectron(tmp_path):
    # VGG-16's first layer and both layers over RoIs of 2 x 2 bins of 3 channels; an ImageNet file.
    rng = np.random.default_rng(0)
    blobs = {
        "conv1_1_w": rng.normal(size=(3, 3, 3, 3)).astype(np.float32),
        "conv1_1_b": np.arange(3, dtype=np.float32),
        "fc6_w": np.arange(12, dtype=np.float32).reshape(1, 12),
        "fc6_b": np.ones(1, np.float32),
        "fc7_w": np.ones((2, 1), np.float32),
        "fc7_b": np.ones(2, np.float32),
        "fc8_w": np.ones((1000, 2), np.float32),
    }
    params = _zeros(
        {
            "backbone/conv1_1/kernel": (3, 3, 3, 3),
            "backbone/conv1_1/bias": (3,),
            "roi_heads/box_head/fc6/kernel": (12, 1),
            "roi_heads/box_head/fc6/bias": (1,),
            "roi_heads/box_head/fc7/kernel": (1, 3),
            "roi_heads/box_head/fc7/bias": (3,),
            "rpn/head/conv/bias": (3,),
        }
    )
    loaded, report = load_weights(params, write_old_pickle(tmp_path / "VGG16.pkl", blobs), pooled_side=2)
    kernel = np.asarray(loaded["backbone"]["conv1_1"]["kernel"])
    # Blue is their first input and our last.
    assert kernel[0, 1, 2, 1] == blobs["conv1_1_w"][1, 0, 0, 1]
    # Channels 0, 1, 2 of the first bin are inputs 0, 4, 8 there.
    fc6 = np.asarray(loaded["roi_heads"]["box_head"]["fc6"]["kernel"])[:, 0]
    assert fc6.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    # Width 2 where ours is 3: a classifier's layers are taken where they fit.
    assert not np.asarray(loaded["roi_heads"]["box_head"]["fc7"]["kernel"]).any()
    assert report.unused == ("fc7_w", "fc7_b")
    assert report.reinitialized == {}
    assert report.provenance.stride_in_1x1 is None


def test_vgg_cnn_m_has_a_conv1_of_its_own(tmp_path):
    blobs = {"conv1_w": np.ones((4, 3, 7, 7), np.float32), "conv1_b": np.full(4, 2, np.float32)}
    params = _zeros({"backbone/conv1/kernel": (7, 7, 3, 4), "backbone/conv1/bias": (4,)})
    loaded, _ = load_weights(params, write_old_pickle(tmp_path / "VGG_CNN_M_1024.pkl", blobs))
    assert (loaded["backbone"]["conv1"]["bias"] == 2).all()


@pytest.mark.parametrize("layout", ["detectron2", "Detectron"])
def test_the_last_stage_of_c4_is_its_head(tmp_path, layout):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1)
    params = _zeros(
        {"backbone/res2_0/conv1/kernel": (1, 1, 3, 2), "roi_heads/box_head/res5_0/conv1/kernel": (1, 1, 3, 2)}
    )
    if layout == "Detectron":
        blobs = {"res2_0_branch2a_w": kernel, "res5_0_branch2a_w": kernel + 10}
        path = write_old_pickle(tmp_path / "weights.pkl", blobs)
    else:
        state = {
            "backbone.res2.0.conv1.weight": kernel,
            "roi_heads.res5.0.conv1.weight": kernel + 10,
        }
        path = write_zip(tmp_path / "weights.pth", state)
    loaded, _ = load_weights(params, path)
    assert loaded["roi_heads"]["box_head"]["res5_0"]["conv1"]["kernel"][0, 0, 1].tolist() == [11, 14]


def test_the_deconvolution_is_not_flipped():
    # Torch's transposed convolution of stride 2 puts weight [in, out, i, j] at cell (2 h + i, 2 w + j), as ours.
    theirs = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    name = "roi_heads.mask_predictor.conv5_mask.weight"
    ours = torchvision_names.translate(name, pooled_side=7).transform(theirs)
    assert ours.shape == (2, 2, 2, 3)
    for place in np.ndindex(2, 3, 2, 2):
        channel, out, i, j = place
        assert ours[i, j, channel, out] == theirs[place]
