"""The folder of a run that was never trained, and photographs of several sizes and formats to call it on."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from klbox_jax.files import write_json
from klbox_jax.models.build import build_model
from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.init_or_restore import dummy_batch
from klbox_jax.train.state import TrainState
from klbox_jax.train.workdir import Workdir
from tests.coco_folder import CATEGORIES

# For `coco_config`: every photograph of at most 2:3 fits.
TWO_CANVASES = {"data.short_side": 64, "data.canvases": ((64, 96), (96, 64))}


def write_run(path, config, *, steps=(3,), categories=CATEGORIES):
    """Writes a run; each checkpoint has other random parameters."""
    workdir = Workdir(path)
    workdir.prepare(config.to_dict())
    names, ids = ([category[key] for category in categories] for key in ("name", "id"))
    write_json(workdir.classes, {"names": names, "category_ids": ids})
    model = build_model(config.model, num_classes=len(categories))
    batch = dummy_batch(config.data.canvases[0])
    init = jax.jit(lambda key: model.init(key, batch, method="init_all_heads")["params"])
    with Checkpoints(workdir.checkpoints, max_to_keep=len(steps)) as checkpoints:
        for step in steps:
            state = TrainState(
                step=jnp.array(step, jnp.int32), params=init(jax.random.key(step)), opt_state={}
            )
            checkpoints.save(state)
    return workdir


def copy_run(workdir, path, *left_out):
    """Copies the folder of a run, without the entries that match one of the patterns."""
    shutil.copytree(workdir.path, path, ignore=shutil.ignore_patterns(*left_out))
    return Workdir(path)


def write_photographs(folder):
    """Writes images of seven names, one of them not an image; returns the pixels of the readable ones, upright."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)

    def noise(height, width):
        return np.kron(rng.integers(0, 256, (height // 10, width // 10, 3)), np.ones((10, 10, 1))).astype(
            np.uint8
        )

    pixels = {
        "landscape.png": noise(100, 150),
        "portrait.PNG": noise(150, 100),
        "square <b>&.png": noise(80, 80),
        "four_by_three.png": noise(90, 120),
        "turned.png": noise(150, 100),
    }
    for name, image in pixels.items():
        if name != "turned.png":
            Image.fromarray(image).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right by a quarter
    Image.fromarray(np.rot90(pixels["turned.png"])).save(folder / "turned.png", exif=exif)
    grey = noise(100, 150)[..., 0]
    Image.fromarray(grey).save(folder / "grey.png")
    pixels["grey.png"] = np.repeat(grey[..., None], 3, axis=-1)
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    (folder / "notes.txt").write_text("not an image")
    return pixels
