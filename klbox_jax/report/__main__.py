"""Command line that writes an HTML report of one run or of two runs to compare, as a single offline file.

python -m klbox_jax.report --workdir=runs/kl
python -m klbox_jax.report --workdir=runs/kl --workdir=runs/smooth_l1 --output=compared.html
"""

import pathlib
import sys
from typing import Any

import ml_collections
from absl import app, flags, logging

from klbox_jax.data.build import build_source
from klbox_jax.report.page import make_page
from klbox_jax.report.page_accuracy import measure_accuracy
from klbox_jax.report.page_data import Run, read_run, with_distinct_labels
from klbox_jax.report.page_examples import find_examples


def write_report(
    workdirs: list[str],
    output: pathlib.Path,
    *,
    num_images: int = 500,
    steps: list[int] | None = None,
    settings: list[str] | None = None,
    data_root: str | None = None,
) -> None:
    """Writes the report; without the data set it has no pictures, which the page and standard error say.

    Raises:
        ValueError: a folder or a choice is wrong; the message is one sentence with the remedy.
    """
    if not 1 <= len(workdirs) <= 2:
        raise ValueError(f"give one run, or two to compare, with --workdir; {len(workdirs)} are given")
    choices = zip(
        workdirs,
        _each("step", steps or [], len(workdirs)),
        _each("setting", settings or [], len(workdirs)),
        strict=True,
    )
    runs = with_distinct_labels(
        [read_run(path, step=step, setting=setting) for path, step, setting in choices]
    )
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output.absolute().parent} is not a folder; create it, or choose another --output")
    examples, accuracies, reason = None, [], ""
    try:
        source = find_source(runs[0], data_root=data_root)
        accuracies = [measure_accuracy(run, source.coco_ground_truth()) for run in runs]
        examples = find_examples(runs, source, num_images=num_images)
    except (ValueError, OSError) as error:
        reason = f"{error} (if the data set is in another folder, name it with --data_root)"
        print(f"the report has no pictures: {reason}", file=sys.stderr)
    page = make_page(runs, examples, accuracies, missing=reason)
    output.write_text(page, encoding="utf-8")


def find_source(run: Run, *, data_root: str | None = None) -> Any:
    """Returns the data set on which a run was evaluated.

    Raises:
        ValueError: it is missing, or has changed since.
    """
    config = ml_collections.ConfigDict(run.config["data"])
    if data_root is not None:
        config.root = data_root
    # A checkpoint may have been evaluated on another split than the config's; names of data sets end with the split.
    source = build_source(config, run.metrics.get("data", config.eval_split).rpartition("/")[2])
    fingerprint = run.metrics.get("data_fingerprint")
    if fingerprint and fingerprint != source.fingerprint:
        raise ValueError(
            f"{source.name} has changed since {run.path} was evaluated (its fingerprint differs); evaluate again"
        )
    return source


def _each(name: str, values: list, count: int) -> list:
    """Returns one value for each run."""
    if len(values) > 1 and len(values) != count:
        raise ValueError(
            f"--{name} is given {len(values)} times for {count} runs; give it once, or once for each"
        )
    return values if len(values) == count else (values or [None]) * count


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError("Too many command-line arguments.")
    logging.set_verbosity(logging.ERROR)  # the data set library logs more than a user needs
    output = pathlib.Path(_OUTPUT.value)
    try:
        write_report(
            _WORKDIRS.value,
            output,
            num_images=_IMAGES.value,
            steps=_STEPS.value,
            settings=_SETTINGS.value,
            data_root=_DATA_ROOT.value,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    _WORKDIRS = flags.DEFINE_multi_string(
        "workdir", [], "Folder of a run; give it twice to compare two runs."
    )
    _OUTPUT = flags.DEFINE_string("output", "report.html", "File to write.")
    _IMAGES = flags.DEFINE_integer(
        "images",
        500,
        "Largest number of images in the browser, without those of the galleries.",
        lower_bound=1,
    )
    _STEPS = flags.DEFINE_multi_integer("step", [], "Evaluated step: one for all runs, or one for each.")
    _SETTINGS = flags.DEFINE_multi_string(
        "setting", [], "Name of the post-processing: one for all runs, or one for each."
    )
    _DATA_ROOT = flags.DEFINE_string("data_root", None, "Folder of the data set, if it is not the config's.")
    app.run(_main)
