"""Writes a small run and its export with the installed jax, for the test that other versions read them.

    python -m tests.versions.make

Run it once for each line of jax that the project admits, and commit the folder. The folder is named by the version.
"""

import pathlib
import shutil

import jax
import numpy as np
from absl import flags

from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.serving.export import export
from klbox_jax.serving.predictor import load
from klbox_jax.train.job import Job
from tests.serving.thin_run import write_run
from tests.thin import coco_config

FOLDER = pathlib.Path(__file__).parent
CANVAS = (64, 96)


def make_image() -> np.ndarray:
    """Returns a picture of random squares, of the size of the canvas."""
    coarse = np.random.default_rng(0).integers(0, 256, (CANVAS[0] // 8, CANVAS[1] // 8, 3))
    return np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)


def small_config():
    """Returns the config of a detector whose files are small."""
    fields = {"data.canvases": (CANVAS,), "export.platforms": ("cpu",), "postprocess.score_threshold": 0.0}
    return coco_config("no data set is needed", "loss=kl,suppression=soft_gaussian", **fields)


def main() -> None:
    """Writes the folder of the installed version."""
    flags.FLAGS.mark_as_parsed()
    config = small_config()
    folder = FOLDER / f"jax_{jax.__version__.replace('.', '_')}"
    shutil.rmtree(folder, ignore_errors=True)
    workdir = write_run(folder / "run", config)
    export(Job(config, workdir), PostprocessSettings(**config.postprocess), folder / "export")
    found = load(workdir.path)(make_image())
    np.savez_compressed(folder / "found.npz", boxes=found.boxes, scores=found.scores, stds=found.box_stds)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*')) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
