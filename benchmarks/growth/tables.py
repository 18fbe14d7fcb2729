"""The tables of docs/scaling.md, from the records of growth.json."""

import itertools
from collections.abc import Mapping, Sequence

from benchmarks.growth.extrapolate import Step
from benchmarks.growth.fit import MOST_LINEAR
from benchmarks.speed.table import quantity
from klbox_jax.report.tables import markdown_table

QUANTITIES = {"seconds": "step", "compile_seconds": "compile", "bytes": "memory"}
# The IoU matrix of NMS has the square of this axis.
MATRIX_AXIS = "proposals"


def growth_table(records: Sequence[Mapping], step: str) -> str:
    """Returns the table of a step: for each axis its sizes, and for each cost its range and its three exponents."""
    columns, rows = ["grows", "sizes"], []
    for name in QUANTITIES.values():
        columns += [name, f"{name}: all, last, beyond"]
    for record in records:
        if record["step"] != step:
            continue
        cells = [record["label"], f"{record['sizes'][0]:,} to {record['sizes'][-1]:,}"]
        for name in QUANTITIES:
            if record["enters"]:
                cells += [_range(record["costs"][name], name), _exponents(record["growth"][name])]
            else:
                cells += ["the same", "-"]
        rows.append(cells)
    return markdown_table(columns, rows)


def _range(costs: Sequence[float], name: str) -> str:
    if name == "bytes":
        return " to ".join(f"{cost / 2**20:,.1f}" for cost in (costs[0], costs[-1])) + " MiB"
    return " to ".join(quantity(cost, "s") for cost in (costs[0], costs[-1]))


def _exponents(growth: Mapping) -> str:
    beyond = growth["beyond_constant"]
    last = f"{growth['last_doubling']:.2f}"
    if growth["last_doubling"] > MOST_LINEAR:
        last = f"**{last}**"
    return f"{growth['exponent']:.2f}, {last}, {'-' if beyond is None else format(beyond, '.2f')}"


def verdict(records: Sequence[Mapping]) -> str:
    """Returns a paragraph that says what grows faster than linearly by the last doubling."""
    found = [
        (record, name)
        for record in records
        if record["enters"]
        for name in QUANTITIES
        if record["growth"][name]["last_doubling"] > MOST_LINEAR
    ]
    others = [(record, name) for record, name in found if record["field"] != MATRIX_AXIS]
    if not found:
        return f"**Nothing grows faster than linearly**: no last doubling is above {MOST_LINEAR}."
    if not others:
        return (
            "**Nothing grows faster than linearly but the IoU matrix**: the last doublings above "
            f"{MOST_LINEAR} are those of the boxes that enter the NMS of the RPN."
        )
    names = "; ".join(
        f"{record['label']}, {record['step']} step, {QUANTITIES[name]}: "
        f"{record['growth'][name]['last_doubling']:.2f}"
        for record, name in others
    )
    return f"**Last doublings above {MOST_LINEAR} beside those of the IoU matrix**: {names}."


def devices_table(records: Sequence[Mapping]) -> str:
    """Returns a row for each step and number of devices: what one device sends and holds."""
    columns = (
        *("step", "devices", "images", "all-reduces", "arrays", "bytes", "over the gradients'"),
        *("all-gathers", "bytes of an image", "others", "in loops", "memory of a device"),
    )
    rows = []
    for record in records:
        once = [one for one in record["collectives"] if not one["is_repeated"]]
        reduces = [one for one in once if one["kind"] == "all-reduce"]
        gathers = [one for one in once if one["kind"] == "all-gather"]
        num_bytes = sum(one["bytes"] for one in reduces)
        share = f"{num_bytes / record['gradient_bytes']:.6f}" if record["step"] == "train" else "-"
        rows.append(
            (
                record["step"],
                str(record["devices"]),
                str(record["images"]),
                str(len(reduces)),
                str(sum(one["arrays"] for one in reduces)),
                f"{num_bytes:,}",
                share,
                str(len(gathers)),
                f"{sum(one['bytes'] for one in gathers) / record['images']:,.0f}",
                str(len(once) - len(reduces) - len(gathers)),
                str(len(record["collectives"]) - len(once)),
                f"{record['held_bytes'] / 2**20:,.1f} MiB",
            )
        )
    return markdown_table(columns, rows)


def extrapolation_table(rows: Sequence[tuple[str, Step]]) -> str:
    """Returns a row for each chip and number of devices."""
    columns = (
        *("chip", "devices", "batch", "arithmetic", "reduce", "gather", "efficiency", "images/s"),
        *("cores a host", "learning rate", "steps, 1x", "hours, 1x", "evaluation"),
    )
    return markdown_table(
        columns,
        [
            (
                name,
                str(step.devices),
                f"{step.batch:,}",
                *(f"{1e3 * seconds:.1f} ms" for seconds in (step.compute, step.reduce, step.gather)),
                f"{100 * step.efficiency:.0f}%",
                f"{step.images_per_second:,.0f}",
                f"{step.host_cores:.1f}",
                f"{step.learning_rate:.2f}",
                f"{step.steps:,}",
                f"{step.training_hours:.2g}",
                f"{step.evaluation_seconds:.2g} s",
            )
            for name, step in rows
        ],
    )


def scatter(records: Sequence[Mapping]) -> str:
    """Returns a sentence on how well the times repeat; empty where no size took longer than the next one.

    Less work in more time is no growth but the machine's other business, so it bounds the noise from below.
    """
    falls = [
        (seconds / of_double, record)
        for record in records
        if record["enters"]
        for seconds, of_double in itertools.pairwise(record["costs"]["seconds"])
    ]
    worst, record = max(falls, key=lambda fall: fall[0], default=(0.0, None))
    if worst <= 1.0:
        return ""
    return (
        f"Times scatter: one size took up to {worst:.1f} times as long as its double ({record['label']}, "
        f"{record['step']} step)."
    )
