"""The tables of docs/scaling.md, from the records of growth.json."""

import itertools
from collections.abc import Mapping, Sequence

from benchmarks.growth.fit import MOST_LINEAR
from benchmarks.speed.table import quantity
from klbox_jax.report.columns import MISSING, Column, format_number, number, numbers, table, text

QUANTITIES = {"seconds": "step", "compile_seconds": "compile", "bytes": "memory"}


def growth_table(records: Sequence[Mapping], step: str) -> str:
    """Returns the table of a step: the sizes of each axis, and the range and the three exponents of each cost."""
    columns = [
        text("label", "grows"),
        Column("sizes", lambda record: f"{record['sizes'][0]:,} to {record['sizes'][-1]:,}"),
    ]
    for name, heading in QUANTITIES.items():
        columns += [
            Column(heading, lambda record, name=name: _range(record, name)),
            Column(f"{heading}: all, last, beyond", lambda record, name=name: _exponents(record, name)),
        ]
    return table(columns, [record for record in records if record["step"] == step])


def _range(record: Mapping, name: str) -> str:
    if not record["enters"]:
        return "the same"
    first, last = record["costs"][name][0], record["costs"][name][-1]
    if name == "bytes":
        return f"{first / 2**20:,.1f} to {last / 2**20:,.1f} MiB"
    return f"{quantity(first, 's')} to {quantity(last, 's')}"


def _exponents(record: Mapping, name: str) -> str:
    if not record["enters"]:
        return MISSING
    growth = record["growth"][name]
    last = f"{growth['last_doubling']:.2f}"
    if growth["last_doubling"] > MOST_LINEAR:
        last = f"**{last}**"
    return f"{growth['exponent']:.2f}, {last}, {format_number(growth['beyond_constant'], '.2f')}"


def verdict(records: Sequence[Mapping]) -> str:
    """Returns the costs whose last doubling is faster than linear, and a bound of the noise of the times.

    Less work in more time is not growth but other work of the machine, so it is a lower bound of the noise.
    """
    entering = [record for record in records if record["enters"]]
    fast = [
        f"{record['label']}, {record['step']} step, {heading} {record['growth'][name]['last_doubling']:.2f}"
        for record in entering
        for name, heading in QUANTITIES.items()
        if record["growth"][name]["last_doubling"] > MOST_LINEAR
    ]
    text = f"Last doublings above {MOST_LINEAR}: {'; '.join(fast) or 'none'}."
    falls = [
        (seconds / of_double, f"{record['label']}, {record['step']} step")
        for record in entering
        for seconds, of_double in itertools.pairwise(record["costs"]["seconds"])
    ]
    worst, name = max(falls, default=(0.0, ""))
    if worst > 1.0:
        text += f"\nTimes scatter: one size took up to {worst:.1f} times as long as its double ({name})."
    return text


def devices_table(records: Sequence[Mapping]) -> str:
    """Returns a row for each step and number of devices: the bytes that one device sends and holds."""
    columns = (
        *(text("step"), *numbers("d", ("devices", "images", "all-reduces", "arrays")), number("bytes", ",d")),
        *(number("share", ".6f", "over the gradients'"), number("all-gathers", "d")),
        *(number("gathered", ",.0f", "bytes of an image"), *numbers("d", ("others", "in loops"))),
        Column("memory of a device", lambda record: f"{record['held']:,.1f} MiB"),
    )
    return table(columns, [_sent(record) for record in records])


def _sent(record: Mapping) -> dict:
    """Counts and bytes of the collectives of a step."""
    once = [one for one in record["collectives"] if not one["is_repeated"]]
    reduces, gathers = ([one for one in once if one["kind"] == kind] for kind in ("all-reduce", "all-gather"))
    num_bytes = sum(one["bytes"] for one in reduces)
    return {
        **{key: record[key] for key in ("step", "devices", "images")},
        "all-reduces": len(reduces),
        "arrays": sum(one["arrays"] for one in reduces),
        "bytes": num_bytes,
        "share": num_bytes / record["gradient_bytes"] if record["step"] == "train" else None,
        "all-gathers": len(gathers),
        "gathered": sum(one["bytes"] for one in gathers) / record["images"],
        "others": len(once) - len(reduces) - len(gathers),
        "in loops": len(record["collectives"]) - len(once),
        "held": record["held_bytes"] / 2**20,
    }


def extrapolation_table(records: Sequence[Mapping]) -> str:
    """Returns a row for each chip and number of devices."""
    milliseconds = [
        Column(heading, lambda record, key=key: f"{1e3 * record[key]:.1f} ms")
        for heading, key in (("arithmetic", "compute"), ("reduce", "reduce"), ("gather", "gather"))
    ]
    columns = (
        *(text("chip"), number("devices", "d"), number("batch", ",d"), *milliseconds),
        *(number("efficiency", ".0%"), number("images_per_second", ",.0f", "images/s")),
        *(number("host_cores", ".1f", "cores a host"), number("learning_rate", ".2f", "learning rate")),
        *(number("steps", ",d", "steps, 1x"), number("training_hours", ".2g", "hours, 1x")),
        Column("evaluation", lambda record: f"{record['evaluation_seconds']:.2g} s"),
    )
    return table(columns, records)
