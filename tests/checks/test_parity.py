import numpy as np
import pytest

from checks.parity.comparison import Comparison, gradient, largest, summary, table
from checks.parity.inputs import padded, used
from configs import torchvision
from klbox_jax.data.build import build_preprocessing
from klbox_jax.models.build import build_model
from klbox_jax.ops.box_coder import CenterBoxCoder
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.weights import torchvision_names
from klbox_jax.weights.provenance import check_provenance


def test_errors_by_hand():
    # The largest difference is 1, the largest value 10.
    assert largest("layers", "a", [1.0, 9.0], [1.0, 10.0]).error == pytest.approx(0.1)
    assert largest("layers", "a", [0.0, 0.0], [0.0, 0.0]).error == 0.0
    assert largest("layers", "a", [1.0], [1.0, 1.0]).error == float("inf")
    # The difference has norm 0.5, the gradient norm 5.
    assert gradient("k", [3.0, 4.5], [3.0, 4.0]).error == pytest.approx(0.1)
    assert gradient("k", [5e-9], [0.0]).passed
    assert not gradient("k", [1e-6], [0.0]).passed
    assert not largest("layers", "a", [np.nan], [1.0]).passed


def test_the_table_and_the_summary_name_what_failed():
    rows = {
        "small": [Comparison("layers", "a", 1e-6), Comparison("settings", "b", 3e-3)],
        "large": [Comparison("end to end", "c", 0.01, 0.02), Comparison("rpn", "d", float("inf"))],
    }
    lines = table(rows).splitlines()
    assert len(lines) == 5
    assert lines[1].split() == ["small", "layers", "1", "1.0e-06", "1e-04"]
    assert lines[2].split() == ["small", "settings", "1", "3.0e-03", "1e-04", "FAILED:", "b"]
    assert lines[3].split() == ["large", "end", "to", "end", "1", "1.0e-02", "2e-02"]
    found = summary(rows, {"jax": "1"})
    # A setting is no tensor.
    assert (found["compared"], found["worst_unmatched"], found["versions"]) == (3, 0.01, {"jax": "1"})
    assert found["worst_relative"] is None  # not a finite number
    assert [(row["model"], row["name"], row["error"]) for row in found["failures"]] == [
        ("small", "b", 3e-3),
        ("large", "d", None),
    ]


def test_padding_is_undone():
    boxes = [np.arange(8, dtype=np.float32).reshape(2, 4), np.ones((1, 4), np.float32)]
    proposals = padded(boxes, 3)
    assert proposals.boxes.shape == (2, 3, 4)
    np.testing.assert_array_equal(used(proposals.boxes, proposals.valid), np.concatenate(boxes))


@pytest.mark.parametrize("name", torchvision.MODELS)
def test_the_preset_suits_its_weights_and_has_nothing_undefined(name):
    config = torchvision.get_config(f"model={name}")
    model = build_model(config.model, num_classes=90)
    names = ("backbone.body.layer1.0.conv1.weight", "roi_heads.box_head.fc6.weight")
    provenance = torchvision_names.provenance(dict.fromkeys(names, np.zeros(1)), config="")
    check_provenance(config.model, provenance)
    assert (model.roi_heads.box_coder, model.rpn.box_coder) == (
        provenance.box_coder,
        provenance.rpn_box_coder,
    )
    assert model.rpn.box_coder == CenterBoxCoder((1.0, 1.0, 1.0, 1.0))
    assert (model.roi_heads.mask_head is not None) == (config.data.mask_size > 0) == name.startswith("mask")
    assert set(config.postprocess) == set(vars(PostprocessSettings(**config.postprocess)))
    # On all of these the coarsest level's stride of 64 is torchvision's own.
    assert all(side % 64 == 0 for canvas in build_preprocessing(config.data).canvases for side in canvas)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"model='ssd300_vgg16' is unknown; choose one of fasterrcnn"):
        torchvision.get_config("model=ssd300_vgg16")
