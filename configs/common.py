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


# What the networks of ImageNet weights were trained under: the mean and deviation of the RGB channels, and whether
# a bottleneck strides in its first 1x1 convolution. Loading compares them with the file.
IMAGENET_WEIGHTS = {
    # The .pkl files that Detectron starts from: MSRA's ResNets, and the VGG networks of Caffe.
    "detectron": ((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0), True),
    # The .pth files of torchvision's classifiers.
    "torchvision": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False),
}


# By (short side, longest side): sides of whole cells of stride 16 that hold every photograph of that size.
CANVASES = {
    (800, 1333): ((800, 1088), (1088, 800), (800, 1344), (1344, 800)),
    (600, 1000): ((608, 800), (800, 608), (608, 1008), (1008, 608)),
}


def choose(choices: dict, variant: dict, key: str):
    """Returns what `choices` has for the value of the variant's `key`.

    Raises:
        ValueError: there is no such choice.
    """
    if variant[key] not in choices:
        raise ValueError(
            f"config argument {key}={variant[key]!r} is unknown; choose one of {', '.join(map(str, choices))}"
        )
    return choices[variant[key]]


def steps_for(images: int, *, batch_size: int) -> int:
    """Returns the steps in which batches of `batch_size` show `images` images.

    Raises:
        ValueError: the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"config argument batch_size={batch_size}: write a positive number")
    return round(images / batch_size)


def scenes_data(*, noise_scale: float) -> dict:
    """The embedded scenes; `root` is where they are kept once generated."""
    return dict(
        name="scenes",
        root="",
        train_split="train",
        eval_split="validation",
        calibration_split="calibration",
        hold_out=0.0,  # share of the training images kept out of it, to calibrate on
        short_side=192,
        long_side=192,
        canvases=((192, 192),),
        max_gt=8,
        flip=True,
        scale_jitter=(1.0, 1.0),
        num_threads=2,
        on_bad_record="stop",  # or skip: images that are at fault or unreadable
        mask_size=0,
        noise_scale=noise_scale,
        num_images=dict(train=4000, validation=500, calibration=500, test=500),
    )


def coco_data(
    *, size: tuple[int, int], splits: tuple[str, str], multi_scale: bool, mask_size: int = 0
) -> dict:
    """COCO, photographs of `size` (short side, at most so long), from a folder that `--config.data.root` names.

    Canvases, slots and threads are ours: most photographs are 4:3 or 3:4 and fill the small canvases; a training
    image of more than 100 objects would be named before the first step. `multi_scale` draws the short side
    between 0.8 of its length and all of it, detectron2's 640 to 800 pixels.
    """
    return dict(
        name="coco",
        root="",
        train_split=splits[0],
        eval_split=splits[1],
        calibration_split="",  # neither trained on nor reported; used where hold_out is 0
        hold_out=0.0,  # share of the training images kept out of it, to calibrate on
        short_side=size[0],
        long_side=size[1],
        canvases=CANVASES[size],
        max_gt=100,
        flip=True,
        scale_jitter=(0.8, 1.0) if multi_scale else (1.0, 1.0),
        num_threads=8,
        on_bad_record="stop",  # or skip: images that are at fault or unreadable
        mask_size=mask_size,
        # train2017 has two boxes of height 0.
        skip_empty_boxes=True,
    )


def voc_data(*, multi_scale: bool) -> dict:
    """VOC 2007 at py-faster-rcnn's 600 to 1000 pixels; `--config.data.root` names the folder with VOC2007 in it."""
    size = (600, 1000)
    return dict(
        name="voc",
        root="",
        train_split="2007_trainval",
        eval_split="2007_test",
        calibration_split="",  # neither trained on nor reported; used where hold_out is 0
        hold_out=0.0,  # share of the training images kept out of it, to calibrate on
        short_side=size[0],
        long_side=size[1],
        canvases=CANVASES[size],
        max_gt=64,
        flip=True,
        scale_jitter=(0.8, 1.0) if multi_scale else (1.0, 1.0),
        num_threads=8,
        on_bad_record="stop",  # or skip: images that are at fault or unreadable
        class_names=(),  # where they are not VOC's
    )


def train(
    *, batch_size: int, save_every: int, log_every: int, num_epochs: float = 0.0, num_steps: int = 0
) -> dict:
    """The training loop. `batch_size` is global; `num_steps` overrules `num_epochs` where it is not 0."""
    return dict(
        batch_size=batch_size,
        num_epochs=num_epochs,
        num_steps=num_steps,
        save_every=save_every,
        log_every=log_every,
        eval_every=0,
        keep_checkpoints=2,
        keep_best="",  # a number of the evaluations, such as "AP", whose best checkpoint is kept beside the last ones
        keep_best_checkpoints=1,  # of the best ones by keep_best, how many are kept
        early_stopping_patience=0,  # end after so many evaluations without a better keep_best; 0 for never
        # Batches to an update of the parameters. All steps here count batches; the learning rate follows the updates,
        # for which warm-up, decay and the scaling by batch_size * accumulate_steps are meant.
        accumulate_steps=1,
        on_nonfinite="stop",  # or skip: steps whose loss or gradient is not finite
        profile_steps=(),  # the first and last step to write a trace of
    )


def evaluation(*, batch_size: int) -> dict:
    """The evaluation; `batch_size` is global."""
    return dict(
        batch_size=batch_size,
        coco_backend="pycocotools",  # or hotcoco, the same numbers faster: pip install 'klbox-jax[fast]'
        checkpoint="last",  # or best, by config.train.keep_best: what --mode=eval reads
        num_pictures=4,  # images that TensorBoard shows with their detections
    )


def predict() -> dict:
    """Photographs for `--mode=predict`."""
    return dict(
        input="",  # an image, a folder of images, or a glob
        output="",  # a folder; by default predict in the workdir
        draw=True,  # write pictures, of ...
        max_pictures=200,  # ... so many images at most, ...
        score_threshold=0.5,  # ... with the objects from this score on
    )


def calibrate() -> dict:
    """The fit of `--mode=calibrate`."""
    return dict(
        method="coverage",  # 68.27 % of the labels within one std; or likelihood, whose std is the RMS of the errors
    )


def export() -> dict:
    """The files of `--mode=export`."""
    return dict(
        output="",  # a folder; by default export/<step> in the workdir
        platforms=("cpu", "cuda", "tpu"),  # that the programs run on; rocm is another
        canvas=(),  # height and width of the only one, in place of those of config.data
        batch_size=1,  # images that a program takes
        weights_dtype="float32",  # of the weights file, or float16
    )


def box_loss_settings(*, ramp_steps: int = 0) -> dict:
    """The numbers of `BoxLoss`; each concerns the losses that its comment names, and no other."""
    return dict(
        log_var_clamp=(-7.0, 7.0),  # all losses with variances
        smooth_l1_beta=1.0,  # smooth_l1, and what a ramp starts from
        beta_nll_beta=0.5,  # beta_nll
        num_samples=100,  # energy_score
        label_noise="data",  # lasernet_kl, gaussian_kl: data, pixels or size
        label_noise_value=1.0,  # the same: pixels, or a share of the box's sides
        ramp_steps=ramp_steps,  # all losses with variances
    )


def mask_head(*, enabled: bool, features: int = 256, num_convs: int = 4) -> dict:
    """The mask head of Mask R-CNN, left out unless enabled; it needs `config.data.mask_size` above 0."""
    return dict(enabled=enabled, features=features, num_convs=num_convs)


def iou_head(*, enabled: bool, features: int, batch_size_per_image: int, loss_weight: float) -> dict:
    """The IoU head of IoU-Net, left out unless enabled."""
    return dict(
        enabled=enabled, features=features, batch_size_per_image=batch_size_per_image, loss_weight=loss_weight
    )


# Whether to read and post-process the weights of the KL-Loss release as its own code does, see
# docs/legacy.md.
LEGACY = {"none": False, "detectron": True}


def postprocess(
    *,
    loss: str,
    suppression: str,
    voting: str,
    pre_nms_topk: int,
    detections_per_image: int,
    legacy: bool = False,
) -> dict:
    """Post-processing, by the names of `PostprocessSettings`; voting by variance is the default where there is one.

    `legacy` is that of the KL-Loss release.
    """
    return dict(
        suppression=suppression,
        voting=voting or ("none" if loss in ("smooth_l1", "l1") else "variance"),
        sigma_t=0.01 if legacy else 0.02,
        voters="remaining" if legacy else "all",
        voting_iou_floor=0.01 if legacy else 0.0,
        variance_order="detectron" if legacy else "corners",
        voting_variance="average",
        box_voting_threshold=0.5,
        wbf_threshold=0.55,
        bayes_affinity=0.7,
        bayes_calibration=1.0,
        nms_threshold=0.5,
        soft_nms_sigma=0.5,
        soft_nms_threshold=0.3,
        soft_nms_min_score=0.001,
        score_threshold=0.05,
        refine_steps=0,
        refine_step_size=0.5,
        refine_keep_best=False,
        score_by_iou=False,
        score_by_std=0.0,  # a good one for kl: 4.0
        flip=False,  # detect on the mirrored image too
        pre_nms_topk=pre_nms_topk,
        detections_per_image=detections_per_image,
        plus_one_widths=legacy,
    )
