import dataclasses

import ml_collections
import pytest

from klbox_jax.weights.provenance import Provenance, check_provenance
from klbox_jax.weights.torch_file import WeightFileError

DETECTRON = Provenance(
    source="Detectron",
    pixel_mean=(122.7717, 115.9465, 102.9801),
    pixel_std=(1.0, 1.0, 1.0),
    channel_order="bgr",
    stride_in_1x1=True,
    anchor_offset=0.5,
    aligned_pooling=False,
)


def _config(**changes):
    config = ml_collections.ConfigDict(
        {
            "pixel_mean": (122.7717, 115.9465, 102.9801),
            "pixel_std": (1.0, 1.0, 1.0),
            "backbone": {"name": "bottleneck_resnet", "stride_in_1x1": True},
            "rpn": {"features": 256},
            "box_pooler": {"aligned": False},
        }
    )
    config.update_from_flattened_dict(changes)
    return config.lock()


def test_a_config_that_fits():
    check_provenance(_config(), DETECTRON)
    check_provenance(_config(pixel_mean=(122.77, 115.95, 102.98)), DETECTRON)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pixel_mean": (123.675, 116.28, 103.53)},
            r"config\.model\.pixel_mean = \(122\.7717, 115\.9465, 102\.9801\) \(it is \(123\.675",
        ),
        ({"pixel_std": (58.395, 57.12, 57.375)}, r"config\.model\.pixel_std = \(1\.0, 1\.0, 1\.0\)"),
        ({"backbone.stride_in_1x1": False}, r"config\.model\.backbone\.stride_in_1x1 = True \(it is False\)"),
        ({"box_pooler.aligned": True}, r"config\.model\.box_pooler\.aligned = False"),
    ],
)
def test_every_field_is_named_with_the_value_to_set(changes, message):
    with pytest.raises(WeightFileError, match=message):
        check_provenance(_config(**changes), DETECTRON)


def test_all_fields_at_once():
    config = _config(pixel_std=(2.0, 2.0, 2.0), **{"backbone.stride_in_1x1": False})
    with pytest.raises(WeightFileError, match=r"pixel_std.*stride_in_1x1"):
        check_provenance(config, DETECTRON)


def test_fields_that_one_side_does_not_have():
    config = _config()
    backbone = dataclasses.replace(DETECTRON, stride_in_1x1=None, anchor_offset=None, aligned_pooling=None)
    check_provenance(config, backbone)
    with config.unlocked():
        del config.backbone.stride_in_1x1
        del config.box_pooler
    check_provenance(config, DETECTRON)
