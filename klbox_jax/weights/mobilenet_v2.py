"""Names of the params of the MobileNetV2 backbone in torchvision's state dict."""

from klbox_jax.models.mobilenet import STAGES

NORM_NAMES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def torch_names() -> dict[tuple[str, ...], str]:
    """Returns torchvision's name of every param of `MobileNetV2(with_head=True)`, by its path."""
    names = {}

    def add(path: tuple[str, ...], conv: str, norm: str):
        names[*path, "conv", "kernel"] = f"{conv}.weight"
        for ours, theirs in NORM_NAMES.items():
            names[*path, "norm", ours] = f"{norm}.{theirs}"

    add(("stem",), "features.0.0", "features.0.1")
    expansions = [expansion for expansion, _, blocks, _ in STAGES for _ in range(blocks)]
    for number, expansion in enumerate(expansions, start=1):
        # Convolutions with an activation are wrapped with their norm; the last stands beside its own.
        wrapped = ["depthwise"] if expansion == 1 else ["expand", "depthwise"]
        torch_block = f"features.{number}.conv"
        for index, part in enumerate(wrapped):
            add((f"block_{number}", part), f"{torch_block}.{index}.0", f"{torch_block}.{index}.1")
        last = len(wrapped)
        add((f"block_{number}", "project"), f"{torch_block}.{last}", f"{torch_block}.{last + 1}")
    head = len(expansions) + 1
    add(("head",), f"features.{head}.0", f"features.{head}.1")
    return names
