"""Fields from the shell: their types, what is refused, and the names that are close to a wrong one."""

import pytest

from klbox_jax.config import field_types
from klbox_jax.config.family import ConfigError, load_config
from klbox_jax.config.overrides import (
    apply_overrides,
    check_complete,
    field_names,
    fill_free_fields,
    split_overrides,
    with_local_paths,
)
from klbox_jax.errors import WorkdirError


@pytest.fixture
def config():
    return load_config("faster_rcnn_mobilenet_v2_fpn").lock()


def value_of(config, name):
    for key in name.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optimizer.frozen=backbone,fpn", ("backbone", "fpn")),
        ("optimizer.frozen=backbone", ("backbone",)),
        ("optimizer.frozen=('backbone', 'fpn')", ("backbone", "fpn")),
        ("optimizer.frozen=[backbone,fpn]", ("backbone", "fpn")),
        ("optimizer.frozen=", ()),
        ("optimizer.frozen=()", ()),
        ("data.class_names=cat, big dog", ("cat", "big dog")),
        ("data.class_names=7,007", ("7", "007")),
        ("data.class_names='a, b','c'", ("a, b", "c")),
        ("export.canvas=3,4", (3, 4)),
        ("export.platforms=c,d", ("c", "d")),
        ("train.profile_steps=(11, 13)", (11, 13)),
        ("data.canvases=320,448", ((320, 448),)),
        ("data.canvases=((320, 448), (448, 320))", ((320, 448), (448, 320))),
        ("data.scale_jitter=0.5,1", (0.5, 1.0)),
        ("model.rpn.anchor_sizes=(16,),(8,9)", ((16.0,), (8.0, 9.0))),
        ("optimizer.decay_at=0.5,100", (0.5, 100)),
        ("optimizer.warmup_steps=0.1", 0.1),
        ("optimizer.warmup_steps=10", 10),
        ("model.box_loss_settings.ramp_steps=300", 300),
        ("data.flip=no", False),
        ("data.flip=TRUE", True),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("model.fpn=None", None),
        ("train.keep_best=AP=", "AP="),
    ],
)
def test_values_have_the_type_of_their_field(config, text, value):
    name, _, given = text.partition("=")
    apply_overrides(config, [(name, given)])
    found = value_of(config, name)
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lr=1", "no field optimizer.lr; the closest is optimizer.learning_rate"),
        ("optimizer.lerning_rate=1", "the closest is optimizer.learning_rate"),
        ("train.learning_rate=1", "the closest is optimizer.learning_rate"),
        ("optimiser.learning_rate=1", "the closest is optimizer.learning_rate"),
        ("zzzzz=1", "it has calibrate, data, evaluation"),
        ("optimizer=1", "optimizer is a group of fields; set one of optimizer.clip_norm"),
        ("seed.x=1", "seed is a field, not a group of fields; write --config.seed=VALUE"),
        ("train.batch_size=1.5", "train.batch_size is a whole number; its value so far is 8"),
        ("train.batch_size=many", "is a whole number"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate is a number"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is a number"),
        ("data.flip=maybe", "data.flip is true or false"),
        ("data.scale_jitter=1", "data.scale_jitter is a tuple of 2 numbers, separated by commas"),
        ("data.scale_jitter=a,b", "data.scale_jitter is a tuple of numbers"),
        ("data.canvases=320.5,448", "data.canvases is a tuple of whole numbers"),
        ("data.canvases=320,448,320", "data.canvases is a tuple of pairs (height, width)"),
        ("data.canvases=320", "data.canvases is a tuple of pairs (height, width)"),
        ("model.rpn.levels=3.5,4", "model.rpn.levels is a tuple of whole numbers"),
        ("model.rpn.pre_nms_topk=(1, True)", "model.rpn.pre_nms_topk is a tuple of whole numbers"),
        ("optimizer.warmup_steps=1.5", "a number of steps (such as 500), or a share of the training between"),
        (
            "optimizer.decay_at=0.5,soon",
            "a number of steps (such as 500), or a share of the training between",
        ),
        ("model.fpn.levels.x=1", "model.fpn.levels is a field, not a group"),
    ],
)
def test_what_does_not_fit_is_one_line(config, text, message):
    name, _, given = text.partition("=")
    before = config.to_dict()
    with pytest.raises(ConfigError) as error:
        apply_overrides(config, [(name, given)])
    assert str(error.value).startswith(f"--config.{text}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert config.to_dict() == before


def test_a_group_that_is_none_has_no_fields():
    config = load_config("faster_rcnn_vgg16").lock()
    with pytest.raises(ConfigError, match=r"model\.fpn is None in this config and has no fields"):
        apply_overrides(config, [("model.fpn.features", "8")])


def test_the_spellings_of_a_field():
    first = ["runs/kl", "--config.seed=3", "--config.train.batch_size", "4", "--config.data.flip", "a.jpg"]
    second = ["--noconfig.predict.draw", "--output=x", "--config=scenes", "--", "--config.seed=9"]
    fields, others = split_overrides([*first, *second])
    assert fields == [
        ("seed", "3"),
        ("train.batch_size", "4"),
        ("data.flip", None),
        ("predict.draw", "false"),
    ]
    assert others == ["runs/kl", "a.jpg", "--output=x", "--config=scenes", "--", "--config.seed=9"]
    with pytest.raises(
        ConfigError, match=r"--config\.seed: the value is missing; write --config\.seed=VALUE"
    ):
        split_overrides(["--config.seed", "--output=x"])


def test_paths_are_of_this_machine(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    apply_overrides(config, [("data.root", "~/pond"), ("predict.input", "~/a/**/*.jpg")])
    found = with_local_paths(config)
    assert (found.data.root, found.predict.input) == ("/home/me/pond", "/home/me/a/**/*.jpg")
    assert found.is_locked
    assert config.data.root == "~/pond"  # a copy was changed
    for field in ("data.root", "model.init_weights", "export.output"):
        changed = load_config("faster_rcnn_mobilenet_v2_fpn").lock()
        apply_overrides(changed, [(field, "s3://bucket/a")])
        with pytest.raises(
            WorkdirError, match=rf"^config\.{field} = 's3://bucket/a' is not a path of this machine"
        ):
            with_local_paths(changed)


def test_an_older_runs_config_gets_what_does_not_change_it(config):
    older = config.copy_and_resolve_references().unlock()
    del older["export"], older["train"]["keep_best"], older["postprocess"]["flip"]
    older["predict"] = {"input": "a.jpg"}
    fill_free_fields(older)
    assert older.export.to_dict() == config.export.to_dict()
    assert older.train.keep_best == ""
    assert older.predict.input == "a.jpg"
    assert older.predict.max_pictures == 200
    assert "flip" not in older.postprocess
    check_complete(older, source="runs/old/config.json")


def test_a_config_that_lacks_fields_is_refused(config):
    with config.unlocked():
        del config.train["log_every"], config.model["rpn"]
    with pytest.raises(
        ConfigError, match=r"^mine\.py lacks config\.model\.rpn, config\.train\.log_every; start from"
    ):
        check_complete(config, source="mine.py")


def test_every_family_is_complete():
    for family in ("scenes", "faster_rcnn_vgg16", "torchvision"):
        config = load_config(family)
        check_complete(config, source=family)
        assert set(field_types.PATHS) <= set(field_names(config))
