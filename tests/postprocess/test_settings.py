import pytest

from klbox_jax.postprocess.settings import PostprocessSettings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suppression", "soft"),
        ("voting_variance", "sum"),
        ("box_voting_threshold", 1.1),
        ("wbf_threshold", -0.1),
        ("bayes_affinity", 1.0),
        ("bayes_calibration", 0.0),
        ("refine_steps", -1),
        ("refine_step_size", float("inf")),
        ("voting", "mean"),
        ("sigma_t", 0.0),
        ("soft_nms_sigma", float("nan")),
        ("nms_threshold", 1.5),
        ("score_threshold", -0.1),
        ("soft_nms_threshold", 2.0),
        ("soft_nms_min_score", -1.0),
        ("pre_nms_topk", 0),
        ("detections_per_image", -1),
        ("score_by_std", -0.5),
        ("score_by_std", float("inf")),
        ("score_by_std", float("nan")),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        PostprocessSettings(**{field: value})


def test_settings_are_hashable_values():
    assert PostprocessSettings(sigma_t=0.05) == PostprocessSettings(sigma_t=0.05)
    assert len({PostprocessSettings(), PostprocessSettings(), PostprocessSettings(voting="variance")}) == 2


@pytest.mark.parametrize("voting", ["variance", "variance_score", "bayes"])
def test_voting_by_variances_needs_a_head_that_has_them(voting):
    settings = PostprocessSettings(voting=voting)
    with pytest.raises(
        ValueError, match=rf"voting='{voting}' needs box_log_vars.*set config\.model\.box_loss"
    ):
        settings.check_head(has_variances=False, has_iou_head=True)
    settings.check_head(has_variances=True, has_iou_head=False)


def test_scores_by_the_std_need_a_head_that_has_it():
    settings = PostprocessSettings(score_by_std=4.0)
    with pytest.raises(
        ValueError, match=r"score_by_std=4\.0 needs box_log_vars.*config\.postprocess\.score_by_std"
    ):
        settings.check_head(has_variances=False, has_iou_head=True)
    settings.check_head(has_variances=True, has_iou_head=False)


def test_whole_pixels_have_no_mirror_image():
    with pytest.raises(ValueError, match="flip=True mirrors edges, and plus_one_widths=True"):
        PostprocessSettings(flip=True, plus_one_widths=True)


@pytest.mark.parametrize("voting", ["none", "iou", "iou_score", "box_voting", "wbf"])
def test_other_votings_need_no_variances(voting):
    PostprocessSettings(voting=voting).check_head(has_variances=False, has_iou_head=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"suppression": "iou_guided"},
            r"suppression='iou_guided' needs .* config\.postprocess\.suppression",
        ),
        ({"refine_steps": 5}, r"refine_steps=5 needs .* config\.postprocess\.refine_steps"),
        ({"score_by_iou": True}, r"score_by_iou=True needs .* config\.postprocess\.score_by_iou"),
    ],
)
def test_what_the_iou_head_does_needs_one(fields, message):
    settings = PostprocessSettings(**fields)
    assert settings.needs_predicted_ious
    with pytest.raises(ValueError, match=message) as error:
        settings.check_head(has_variances=True, has_iou_head=False)
    assert "config.model.iou_head.enabled=True" in str(error.value)
    settings.check_head(has_variances=False, has_iou_head=True)
