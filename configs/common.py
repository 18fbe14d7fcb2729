"""How a config's variants are named on the command line: `--config=configs/scenes.py:loss=kl,voting=variance`."""


def parse_arg(arg: str | None, **defaults):
    """Returns `defaults` with the fields that `arg` names replaced.

    `arg` is `key=value,key=value`. Values take the type of their default.

    Raises:
        ValueError: a key is unknown, or a value does not fit the default's type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, found, text = item.partition("=")
        if not found or key not in defaults:
            raise ValueError(
                f"config argument {item!r} is unknown; write key=value with a key of {sorted(defaults)}"
            )
        kind = type(defaults[key])
        if kind is bool:
            if text not in ("True", "False"):
                raise ValueError(f"config argument {item!r}: write True or False")
            values[key] = text == "True"
        else:
            try:
                values[key] = kind(text)
            except ValueError:
                raise ValueError(f"config argument {item!r}: expected a {kind.__name__}") from None
    return values


def scenes_data(*, noise_scale: float) -> dict:
    """The embedded scenes; `root` is where they are kept once generated."""
    return dict(
        name="scenes",
        root="",
        train_split="train",
        eval_split="validation",
        short_side=192,
        long_side=192,
        canvases=((192, 192),),
        max_gt=8,
        flip=True,
        scale_jitter=(1.0, 1.0),
        num_threads=2,
        noise_scale=noise_scale,
        num_images=dict(train=4000, validation=500, calibration=500, test=500),
    )


def train(*, batch_size: int, num_epochs: float, save_every: int, log_every: int) -> dict:
    """The training loop. `batch_size` is global; `num_steps` overrules `num_epochs` where it is not 0."""
    return dict(
        batch_size=batch_size,
        num_epochs=num_epochs,
        num_steps=0,
        save_every=save_every,
        log_every=log_every,
        eval_every=0,
        keep_checkpoints=2,
    )


def postprocess(
    *, loss: str, suppression: str, voting: str, pre_nms_topk: int, detections_per_image: int
) -> dict:
    """Post-processing, by the names of `PostprocessSettings`; voting by variance is the default where there is one."""
    return dict(
        suppression=suppression,
        voting=voting or ("none" if loss == "smooth_l1" else "variance"),
        sigma_t=0.02,
        nms_threshold=0.5,
        soft_nms_sigma=0.5,
        soft_nms_threshold=0.3,
        soft_nms_min_score=0.001,
        score_threshold=0.05,
        pre_nms_topk=pre_nms_topk,
        detections_per_image=detections_per_image,
    )
