"""Data of a run for a report, read from its folder: config, versions, training metrics and one evaluation."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from klbox_jax.files import read_json

# Metrics of the evaluation that are shown as curves if there are several evaluations.
EVALUATION_CURVES = ("AP", "AP50", "AP75", "AP80", "AP90", "NLL", "coverage_1sigma")
_MAX_POINTS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One evaluation of one run.

    Attributes:
        path: folder of the run.
        label: name of the run in the report.
        step: of the evaluated checkpoint.
        setting: name of the post-processing; "" for that of the config.
        config: content of config.json.
        versions: package -> version, and the devices.
        metrics: content of metrics.json.
        records: lines of metrics.jsonl.
        detections: COCO results, with `bbox_std` if the run has stds.
        evaluations: metrics of all finished evaluations of the run, by step and setting.
    """

    path: pathlib.Path
    label: str
    step: int
    setting: str
    config: dict
    versions: dict
    metrics: dict
    records: list[dict]
    detections: list[dict]
    evaluations: dict[tuple[int, str], dict]


def read_run(workdir: str | os.PathLike, *, step: int | None = None, setting: str | None = None) -> Run:
    """Reads a run's folder.

    Args:
        workdir: the folder.
        step: of the evaluation; the last one by default.
        setting: name of the post-processing of that step; by default that of the config, or the only one.

    Raises:
        ValueError: something is missing; the message is one sentence with the remedy.
    """
    path = pathlib.Path(workdir).absolute()
    if not path.is_dir():
        raise ValueError(f"{workdir} is not a folder; name the folder of a run with --workdir")
    if not (path / "config.json").exists():
        inside = ", ".join(sorted(p.parent.name for p in path.glob("*/config.json")))
        remedy = f"name one of the runs in it: {inside}" if inside else "name the folder of a run"
        raise ValueError(f"{workdir} is not a run, because it has no config.json; {remedy}")
    if not (path / "metrics.jsonl").exists():
        raise ValueError(
            f"{workdir} has no metrics.jsonl, the metrics of the training; restore it, or name another run"
        )
    config = read_json(path / "config.json")
    folders = _evaluations(path)
    step, settings = _choose_step(workdir, folders, step)
    setting = _choose_setting(workdir, settings, setting, step=step, own=config.get("postprocess"))
    folder = settings[setting]
    if not (folder / "detections.json").exists():
        raise ValueError(f"{folder} has no detections.json; evaluate again with --mode=eval")
    metrics = read_json(folder / "metrics.json")
    versions = path / "versions.json"
    return Run(
        path=path,
        label=path.name,
        step=step,
        setting=setting,
        config=config,
        versions=metrics.get("versions") or (read_json(versions) if versions.exists() else {}),
        metrics=metrics,
        records=_read_records(path / "metrics.jsonl"),
        detections=read_json(folder / "detections.json"),
        evaluations={
            (step, setting): read_json(folder / "metrics.json")
            for step, by_setting in sorted(folders.items())
            for setting, folder in by_setting.items()
        },
    )


def with_distinct_labels(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs with distinct labels.

    Raises:
        ValueError: they were evaluated on different data, or two are the same evaluation.
    """
    first = runs[0]
    for run in runs[1:]:
        if _data(run) != _data(first):
            raise ValueError(
                f"{first.path} was evaluated on {_data(first)} and {run.path} on {_data(run)}; "
                "compare runs that were evaluated on the same data"
            )
    for label in (
        lambda run: run.path.name,
        lambda run: f"{run.path.parent.name}/{run.path.name}",
        lambda run: f"{run.path.parent.name}/{run.path.name}, step {run.step} {run.setting}".rstrip(),
        lambda run: f"{run.path}, step {run.step} {run.setting}".rstrip(),
    ):
        labels = [label(run) for run in runs]
        if len(set(labels)) == len(labels):
            return [dataclasses.replace(run, label=text) for run, text in zip(runs, labels, strict=True)]
    raise ValueError(f"{first.path} is given twice; name two runs, or give each its --step or --setting")


def curves(run: Run) -> dict[str, tuple[list[int | float], list[float]]]:
    """Returns steps and values of every metric of the training, and of the evaluation if there are several.

    If a step has several records, the last one counts. Numbers that were not finite are left out. A long curve is
    reduced to means over equal intervals.
    """
    prefix = f"val/{run.setting}/" if run.setting else "val/"
    names = {prefix + key: f"evaluation/{key}" for key in EVALUATION_CURVES}
    points: dict[str, dict[int, float]] = {}
    for record in run.records:
        for key, value in record.items():
            if (key.startswith("train/") or key in names) and isinstance(value, int | float):
                points.setdefault(names.get(key, key), {})[record["step"]] = value
    found = {key: sorted(values.items()) for key, values in points.items() if len(values) > 1}
    return {key: _thinned(*zip(*values, strict=True)) for key, values in found.items()}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns dotted name -> JSON text for every leaf of a nested dictionary."""
    leaves = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            leaves |= flat(value, name)
        else:
            leaves[name] = json.dumps(value, ensure_ascii=False)
    return leaves


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int | float], list[float]]:
    if len(steps) <= _MAX_POINTS:
        return list(steps), list(values)
    parts = np.array_split(np.array([steps, values], np.float64), _MAX_POINTS, axis=1)
    means = np.stack([part.mean(axis=1) for part in parts])
    return means[:, 0].tolist(), means[:, 1].tolist()


def _evaluations(path: pathlib.Path) -> dict[int, dict[str, pathlib.Path]]:
    """Returns the folder of every finished evaluation, by step and setting."""
    found: dict[int, dict[str, pathlib.Path]] = {}
    for metrics in sorted((*path.glob("eval/*/metrics.json"), *path.glob("eval/*/*/metrics.json"))):
        parts = metrics.parent.relative_to(path / "eval").parts
        if parts[0].isdecimal():
            found.setdefault(int(parts[0]), {})["".join(parts[1:])] = metrics.parent
    return found


def _choose_step(
    workdir: str | os.PathLike, found: dict[int, dict[str, pathlib.Path]], step: int | None
) -> tuple[int, dict[str, pathlib.Path]]:
    if not found:
        raise ValueError(
            f"{workdir} has no finished evaluation; make one with python -m klbox_jax.main --mode=eval"
        )
    step = max(found) if step is None else step
    if step not in found:
        raise ValueError(
            f"{workdir} has no evaluation of step {step}; "
            f"choose --step from {', '.join(map(str, sorted(found)))}"
        )
    return step, found[step]


def _choose_setting(
    workdir: str | os.PathLike,
    found: dict[str, pathlib.Path],
    setting: str | None,
    *,
    step: int,
    own: dict | None,
) -> str:
    names = ", ".join(name or '""' for name in sorted(found))
    if setting is not None:
        if setting not in found:
            raise ValueError(
                f"{workdir} has no setting {setting!r} at step {step}; choose --setting from {names}"
            )
        return setting
    if len(found) == 1:
        return next(iter(found))
    # Results without a name are those of the config. An experiment that named all settings has the config's under one
    # of the names.
    for name in sorted(found):
        if name == "" or read_json(found[name] / "metrics.json").get("postprocess") == own:
            return name
    raise ValueError(f"{workdir} has several settings at step {step}; choose --setting from {names}")


def _data(run: Run) -> str:
    fingerprint = run.metrics.get("data_fingerprint")
    return f"{run.metrics.get('data')}{f' ({fingerprint[:12]})' if fingerprint else ''}"


def _read_records(path: pathlib.Path) -> list[dict]:
    """Returns the records of metrics.jsonl, without incomplete lines."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
