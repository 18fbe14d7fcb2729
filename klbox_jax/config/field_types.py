"""Types of config fields that their values do not show: lengths, elements of tuples, paths."""

# Fields that take a number of steps (a whole number) or a share of the training (a fraction up to 1.0).
STEPS_OR_SHARES = ("model.box_loss_settings.ramp_steps", "optimizer.warmup_steps", "optimizer.decay_at")
# Types of the elements of the tuples that may be empty, whose type no element shows.
ELEMENT_TYPES = {
    "data.class_names": str,
    "export.canvas": int,
    "export.platforms": str,
    "optimizer.decay_at": float,
    "optimizer.frozen": str,
    "train.profile_steps": int,
}
# Numbers of elements of the tuples that have a fixed number.
LENGTHS = {
    "data.scale_jitter": 2,
    "model.box_loss_settings.log_var_clamp": 2,
    "model.pixel_mean": 3,
    "model.pixel_std": 3,
    "model.roi_heads.box_coder_weights": 4,
    "model.rpn.iou_thresholds": 2,
    "model.rpn.post_nms_topk": 2,
    "model.rpn.pre_nms_topk": 2,
}
# Fields that are paths of this machine; a leading ~ is the home folder.
PATHS = (
    "data.annotation_file",
    "data.image_dir",
    "data.root",
    "export.output",
    "model.init_weights",
    "predict.input",
    "predict.output",
)
# Groups of fields that may be None.
OPTIONAL_GROUPS = ("model.fpn",)
