"""The fields of every config with their defaults, and facts about them; imports nothing.

`BASE` explains each field in the comment on its line, and `EXTRA_FIELDS` explains the fields that only some families
have. `configs/explain.py` reads both.
"""

# By (short side, longest side): canvases whose sides are multiples of 16 and hold every photograph of that size.
# Most photographs are 4:3 or 3:4 and fit the two small ones.
CANVASES = {
    (800, 1333): ((800, 1088), (1088, 800), (800, 1344), (1344, 800)),
    (600, 1000): ((608, 800), (800, 608), (608, 1008), (1008, 608)),
}
# The layers that detectron2 freezes: the stem and the first stage.
FROZEN = ("backbone/stem", "backbone/stem_norm", "backbone/res2_0", "backbone/res2_1", "backbone/res2_2")

# Detectron's Faster R-CNN with ResNet-50-FPN on COCO, with corner coding and KL Loss. Canvases, slots and threads are
# our own.
BASE = dict(
    seed=0,  # seed of the parameters, the sampling and the order of the images
    data=dict(  # the images, and how they are resized
        name="coco",  # kind of data set: auto (finds coco, voc or yolo), coco, voc, yolo, tfds or scenes
        root="",  # folder of the data set; scenes are kept in the cache folder if it is empty
        annotation_file="",  # COCO's annotations if they are elsewhere, relative to root; {split} is the split
        image_dir="",  # folder of the images if it is elsewhere, relative to root; {split} is the split
        allow_links=False,  # accept image files that are links out of root
        voc_first_pixel=1,  # number of the first pixel in VOC's annotations: 1 as in the devkit, or 0
        train_split="train2017",  # split to train on
        eval_split="val2017",  # split to evaluate on
        calibration_split="",  # split to calibrate on if hold_out is 0; neither trained on nor reported
        hold_out=0.0,  # share of the training images to leave out of the training, to calibrate on
        short_side=800,  # length in pixels to which the short side of an image is resized
        long_side=1333,  # limit in pixels of the long side; an image that would exceed it is made smaller
        canvases=CANVASES[800, 1333],  # (height, width) of the padded images; a step is compiled for each
        max_gt=100,  # object slots of an image; an image with more objects is an error
        flip=True,  # mirror half of the training images
        scale_jitter=(1.0, 1.0),  # range of a random factor on the size of training images
        num_threads=8,  # threads that read and resize images
        on_bad_record="stop",  # faulty or unreadable images: stop with an error, or skip them
    ),
    model=dict(  # the detector
        box_loss="kl",  # loss of the box edges, by name: smooth_l1, l1, kl and others of docs/methods.md
        box_loss_settings=dict(  # numbers of the box loss
            log_var_clamp=(-7.0, 7.0),  # range of the log variances; for all losses with variances
            smooth_l1_beta=1.0,  # coded error where smooth L1 turns linear; for smooth_l1 and ramps
            beta_nll_beta=0.5,  # exponent of the variance that weights the loss; for beta_nll
            num_samples=100,  # draws for each edge; for energy_score
            label_noise="data",  # source of the labels' std: data, pixels or size; for lasernet_kl, gaussian_kl
            label_noise_value=1.0,  # std of the labels, in pixels or as a share of the box's sides
            ramp_steps=0,  # steps, or share of the training, in which the loss takes over from smooth L1; 0 for none
        ),
        dtype="float32",  # dtype of the activations: float32 or bfloat16
        init_weights="",  # file of weights to start from; random weights if empty
        init_partial=False,  # keep random values for the layers that the file does not fit
        backbone=dict(  # network that computes the feature maps
            name="bottleneck_resnet",  # resnet, bottleneck_resnet, mobilenet_v2, vgg16 or vgg_cnn_m_1024
            stage_blocks=(3, 4, 6, 3),  # residual blocks of each stage
        ),
        fpn=dict(  # feature pyramid on the backbone; None to use its feature map directly
            features=256,  # channels of every level
            levels=(2, 3, 4, 5),  # levels made from backbone stages; level l has stride 2**l
            extra_levels=1,  # coarser levels, subsampled from the last one
        ),
        rpn=dict(  # region proposal network
            features=256,  # channels of the 3x3 convolution
            levels=(2, 3, 4, 5, 6),  # pyramid levels with anchors, finest first
            anchor_sizes=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),  # sides in pixels, for each level
            aspect_ratios=(0.5, 1.0, 2.0),  # height over width of the anchors
            pre_nms_topk=(2000, 1000),  # candidates of a level before NMS, in training and in evaluation
            post_nms_topk=(2000, 1000),  # proposals of an image after NMS, in training and in evaluation
            nms_threshold=0.7,  # IoU above which the weaker of two proposals is removed
            iou_thresholds=(0.3, 0.7),  # an anchor is background below the first, an object from the second
            batch_size_per_image=256,  # anchors sampled for the losses
            positive_fraction=0.5,  # largest share of objects among the sampled anchors
        ),
        roi_heads=dict(  # second stage: sampling, coding and loss of the boxes
            box_coder="corner",  # offsets by corner, or by center and size (losses without variances only)
            box_coder_weights=(10.0, 10.0, 10.0, 10.0),  # factors of the four offsets
            class_agnostic=False,  # predict one box for all classes
            batch_size_per_image=512,  # RoIs sampled in training
            positive_fraction=0.25,  # largest share of objects among the sampled RoIs
            box_loss_weight=1.0,  # factor of the box loss
        ),
        box_pooler=dict(  # features of a RoI for the box head; mask_pooler has the same for the mask head
            method="align",  # align (RoIAlign), max (RoIPool) or precise (PrRoI pooling)
            levels=(2, 3, 4, 5),  # pyramid levels to pool from, finest first
            resolution=7,  # bins along each side
            sampling_ratio=2,  # samples along each side of a bin; for align
            canonical_box_size=224.0,  # side in pixels of a box that is pooled from canonical_level
            canonical_level=4,  # level from which a box of canonical_box_size is pooled
        ),
        box_head=dict(  # layers between the pooled features and the predictions
            name="two_mlp",  # two_mlp, res5 or vgg
            features=1024,  # width of the layers
        ),
        mask_head=dict(  # mask head of Mask R-CNN
            enabled=False,  # predict masks; needs data.mask_size above 0
            features=256,  # channels of the layers
            num_convs=4,  # 3x3 convolutions before the deconvolution
        ),
        iou_head=dict(  # IoU head of IoU-Net
            enabled=False,  # predict the IoU of a box with its object
            features=1024,  # width of the layers
            batch_size_per_image=512,  # jittered ground-truth boxes to train it on
            loss_weight=1.0,  # factor of the IoU loss
        ),
        pixel_mean=(122.7717, 115.9465, 102.9801),  # mean of the red, green and blue channel, subtracted
        pixel_std=(1.0, 1.0, 1.0),  # standard deviation of the channels, divided by
    ),
    optimizer=dict(  # the optimizer and its learning rate; steps are updates of the parameters
        name="sgd",  # sgd or adamw
        learning_rate=0.02,  # rate for 16 images an update; scaled linearly to the actual number
        warmup_steps=500,  # steps of linear warm-up, or their share of the training (0.05)
        warmup_factor=1.0 / 3.0,  # factor of the rate at the first step
        decay_at=(2.0 / 3.0, 8.0 / 9.0),  # shares of the training, or steps, after which the rate falls
        decay_factor=0.1,  # factor of each fall of the rate
        weight_decay=1e-4,  # weight decay of kernels; biases and norms have none
        momentum=0.9,  # momentum; for sgd
        clip_norm=0.0,  # largest norm of the gradient; 0 for no limit
        frozen=FROZEN,  # prefixes of the parameters that are not trained, such as backbone/stem
    ),
    train=dict(  # the training; steps are batches
        batch_size=16,  # images of a step, on all devices together
        num_epochs=0.0,  # length of the training in epochs
        num_steps=0,  # length of the training in steps; overrules num_epochs if it is not 0
        save_every=5000,  # steps between two checkpoints
        log_every=20,  # steps between two lines of the log
        eval_every=0,  # steps between two evaluations during the training; 0 for none
        keep_checkpoints=2,  # newest checkpoints to keep
        keep_best="",  # metric such as AP whose best checkpoints are kept too; empty for none
        keep_best_checkpoints=1,  # number of the best checkpoints to keep
        early_stopping_patience=0,  # evaluations without a better keep_best after which to stop; 0 for never
        accumulate_steps=1,  # batches averaged for an update; the learning rate follows the updates
        on_nonfinite="stop",  # steps with a loss or gradient that is not finite: stop, or skip them
        profile_steps=(),  # first and last step to write a profile of; empty for none
    ),
    evaluation=dict(  # the evaluation
        batch_size=8,  # images of a step, on all devices together
        coco_backend="pycocotools",  # pycocotools, or hotcoco: the same, faster (pip install 'klbox-jax[fast]')
        checkpoint="last",  # checkpoint that --mode=eval reads: last, or best by train.keep_best
        num_pictures=4,  # images that TensorBoard shows with their detections
    ),
    predict=dict(  # --mode=predict
        input="",  # an image, a folder of images, or a glob
        output="",  # folder of the results; predict in the workdir if empty
        draw=True,  # write pictures with the detections
        max_pictures=200,  # largest number of pictures
        score_threshold=0.5,  # lowest score of an object that is drawn
    ),
    calibrate=dict(  # --mode=calibrate
        method="coverage",  # coverage: 68.27 % of the errors within one std; likelihood: std is their RMS
    ),
    export=dict(  # --mode=export
        output="",  # folder of the files; export/STEP in the workdir if empty
        platforms=("cpu", "cuda", "tpu"),  # platforms that the programs run on; rocm is another
        canvas=(),  # height and width of the only canvas; those of data.canvases if empty
        batch_size=1,  # images that a program takes
        weights_dtype="float32",  # dtype of the weights file: float32 or float16
    ),
    postprocess=dict(  # from predictions to detections; more in PostprocessSettings
        suppression="soft_gaussian",  # hard, soft_linear, soft_gaussian, or iou_guided with an IoU head
        voting="variance",  # none, variance, iou and others of docs/methods.md
        sigma_t=0.02,  # width of the IoU weight; for variance, variance_score, iou and iou_score
        voters="all",  # candidates that vote: all, or the remaining ones as in the released code
        voting_iou_floor=0.0,  # IoU above which a candidate votes; for the methods with sigma_t
        variance_order="corners",  # corners, or detectron: variances of y1 and x2 exchanged, as in the released code
        voting_variance="average",  # std of a voted box: average, fused or winner
        box_voting_threshold=0.5,  # IoU from which a candidate votes; for box_voting
        wbf_threshold=0.55,  # IoU above which a candidate joins a cluster; for wbf
        bayes_affinity=0.7,  # IoU above which a candidate is fused; for bayes
        bayes_calibration=1.0,  # factor on the reported variance; for bayes
        nms_threshold=0.5,  # IoU above which a box is removed; for hard and iou_guided
        soft_nms_sigma=0.5,  # width of the decay; for soft_gaussian
        soft_nms_threshold=0.3,  # IoU from which scores decay; for soft_linear
        soft_nms_min_score=0.001,  # lowest score that soft NMS keeps
        score_threshold=0.05,  # a candidate has a class probability above this
        refine_steps=0,  # steps of the IoU head's gradient ascent on each box; 0 for none
        refine_step_size=0.5,  # step size of the ascent
        refine_keep_best=False,  # return the best box of the ascent, not the last one
        score_by_iou=False,  # multiply scores by the predicted IoU
        score_by_std=0.0,  # lower scores by exp(-score_by_std * std / side); good for kl: 4.0; 0 for none
        flip=False,  # detect on the mirrored image too
        pre_nms_topk=2000,  # candidates of an image before suppression
        detections_per_image=100,  # slots for detections of an image
        plus_one_widths=False,  # boxes are whole pixels, as in the released code
    ),
)

# The fields that only some families have.
EXTRA_FIELDS = {
    "data.mask_size": "cells along each side of an object's mask, which fills its box; 0 for no masks",
    "data.skip_empty_boxes": "leave out boxes without area, of which train2017 has two; for coco",
    "data.class_names": "names of the classes if they are not those of VOC; for voc",
    "data.tfds_name": "name of the prepared set, such as voc/2007; for tfds",
    "data.noise_scale": "factor on the label noise; for scenes",
    "data.num_images.train": "images of the training split; for scenes",
    "data.num_images.validation": "images of the validation split; for scenes",
    "data.num_images.calibration": "images of the calibration split; for scenes",
    "data.num_images.test": "images of the test split; for scenes",
    "model.backbone.stem_features": "channels of the first convolution",
    "model.backbone.stage_features": "channels of each stage",
    "model.backbone.group_size": "channels of a group of GroupNorm",
    "model.backbone.stride_in_1x1": "a bottleneck strides in its first 1x1 convolution, not in the 3x3 one",
    "model.backbone.out_stages": "stages that are returned; no later stage is built",
    "model.rpn.anchor_offset": "position of an anchor in its cell: 0.5 for the centre, 0 for the corner",
    "model.rpn.round_anchors": "round half of each anchor's sides to whole pixels, as torchvision does",
    "model.rpn.min_size": "side in pixels that a proposal has to exceed",
    "model.rpn.box_coder": "offsets of an anchor: by center and size, or by corner as in the released code",
    "model.rpn.smooth_l1_beta": "coded error where the smooth L1 loss turns linear",
    "model.rpn.plus_one_widths": "boxes are whole pixels, as in the released code",
    "model.roi_heads.iou_threshold": "IoU from which a RoI is an object",
    "model.box_pooler.aligned": "cell i of a map has its centre at (i + 0.5) * stride, not at i * stride",
    "model.box_pooler.plus_one_widths": "pool a region one pixel shorter, as the released code does",
    "model.box_head.blocks": "residual blocks; for res5",
    "model.box_head.stride_in_1x1": "a bottleneck strides in its first 1x1 convolution; as in the backbone, for res5",
    "model.box_head.dropout_rate": "share of each layer's outputs that training drops; for vgg",
}
