"""Layers of one image in float64, tap by tap; params are trees of arrays like those of the modules."""

import numpy as np


def conv(x, kernel, strides, padding, bias=0.0):
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    side = kernel.shape[0]
    height, width = ((length - side) // strides + 1 for length in x.shape[:2])
    out = np.zeros((height, width, kernel.shape[3]))
    for row in range(height):
        for column in range(width):
            patch = x[row * strides : row * strides + side, column * strides : column * strides + side]
            out[row, column] = np.tensordot(patch, kernel, axes=3)
    return out + np.asarray(bias, np.float64)


def max_pool(x, side, strides, padding=0):
    """Caffe's pooling: every window that starts on the padded map, even if it ends outside."""
    height, width = (
        -(-(length + 2 * padding - side) // strides) + 1 - (padding > 0 and length % strides == 0)
        for length in x.shape[:2]
    )
    out = np.empty((height, width, x.shape[2]))
    for row in range(height):
        for column in range(width):
            top, left = row * strides - padding, column * strides - padding
            out[row, column] = x[max(top, 0) : top + side, max(left, 0) : left + side].max(axis=(0, 1))
    return out


def frozen_norm(x, params):
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    return (x - params["mean"]) / np.sqrt(params["var"] + 1e-5) * params["scale"] + params["bias"]


def relu(x):
    return np.maximum(x, 0.0)


def bottleneck(x, params, strides, stride_in_1x1):
    y = conv(x, params["conv1"]["kernel"], strides if stride_in_1x1 else 1, 0)
    y = relu(frozen_norm(y, params["norm1"]))
    y = conv(y, params["conv2"]["kernel"], 1 if stride_in_1x1 else strides, 1)
    y = relu(frozen_norm(y, params["norm2"]))
    y = frozen_norm(conv(y, params["conv3"]["kernel"], 1, 0), params["norm3"])
    if "shortcut" in params:
        x = frozen_norm(conv(x, params["shortcut"]["kernel"], strides, 0), params["shortcut_norm"])
    return relu(x + y)


def bottleneck_resnet(image, params, stage_blocks, stride_in_1x1):
    x = relu(frozen_norm(conv(image, params["stem"]["kernel"], 2, 3), params["stem_norm"]))
    x = max_pool(x, 3, 2, padding=1)
    outputs = {}
    for stage, blocks in enumerate(stage_blocks, start=2):
        for block in range(blocks):
            strides = 2 if stage > 2 and block == 0 else 1
            x = bottleneck(x, params[f"res{stage}_{block}"], strides, stride_in_1x1)
        outputs[f"res{stage}"] = x
    return outputs


def local_response_norm(x, size=5, alpha=5e-4, beta=0.75, k=2.0):
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    for channel in range(x.shape[-1]):
        low, high = max(channel - size // 2, 0), channel + size // 2 + 1
        total = (x[..., low:high] ** 2).sum(axis=-1)
        out[..., channel] = x[..., channel] / (k + alpha / size * total) ** beta
    return out


def vgg16(image, params, stage_convs):
    x = image
    for stage, convs in enumerate(stage_convs, start=1):
        if stage > 1:
            x = max_pool(x, 2, 2)
        for number in range(1, convs + 1):
            layer = params[f"conv{stage}_{number}"]
            x = relu(conv(x, layer["kernel"], 1, 1, layer["bias"]))
    return x


def vgg_cnn_m(padded_image, params):
    x = padded_image
    for name, padding in (("conv1", 0), ("conv2", 1)):
        x = relu(conv(x, params[name]["kernel"], 2, padding, params[name]["bias"]))
        x = max_pool(local_response_norm(x), 3, 2)
    for name in ("conv3", "conv4", "conv5"):
        x = relu(conv(x, params[name]["kernel"], 1, 1, params[name]["bias"]))
    return x


def deconv(x, kernel, bias):
    """Transposed convolution of stride 2: every cell adds its kernel to the finer map."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    height, width, _ = x.shape
    out = np.zeros((2 * height, 2 * width, kernel.shape[3]))
    for row in range(height):
        for column in range(width):
            for i in range(2):
                for j in range(2):
                    out[2 * row + i, 2 * column + j] += x[row, column] @ kernel[i, j]
    return out + np.asarray(bias, np.float64)


def mask_head(x, params, num_convs):
    for number in range(1, num_convs + 1):
        layer = params[f"mask_fcn{number}"]
        x = relu(conv(x, layer["kernel"], 1, 1, layer["bias"]))
    x = relu(deconv(x, params["conv5_mask"]["kernel"], params["conv5_mask"]["bias"]))
    logits = params["mask_fcn_logits"]
    return conv(x, logits["kernel"], 1, 0, logits["bias"]).transpose(2, 0, 1)
