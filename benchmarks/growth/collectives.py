"""What the devices of a mesh send each other in a step, read off its compiled program.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m benchmarks.growth.collectives

compiles both steps and prints what it found as JSON; `count_on` does so in a process of its own, as the number of
simulated devices is fixed when JAX starts.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from benchmarks.growth.settings import Setting

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
IMAGES_A_DEVICE = 2

_INSTRUCTION = re.compile(rf" = (?P<shapes>.*?) (?P<kind>{'|'.join(KINDS)})(?:-done)?\(")
_SHAPE = re.compile(r"\b(?P<type>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sides>[\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a compiled program.

    Attributes:
        kind: of `KINDS`.
        arrays: how many it carries; the compiler packs several into one.
        bytes: of its results, on one device.
        is_repeated: it stands outside the program's entry: in a loop, which runs it in every round.
        source: the JAX operation that it came from; "" where the compiler does not say.
    """

    kind: str
    arrays: int
    bytes: int
    is_repeated: bool
    source: str


def find_collectives(hlo: str) -> list[Collective]:
    """Returns the collectives of a compiled program's text, `compiled.as_text()`.

    One that is split into a start and a done counts once.
    """
    found, is_entry = [], False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            is_entry = line.startswith("ENTRY")
        match = _INSTRUCTION.search(line)
        if match is None:
            continue
        shapes = [_bytes(shape) for shape in _SHAPE.finditer(match["shapes"])]
        name = _OP_NAME.search(line)
        source = name[1] if name else ""
        found.append(Collective(match["kind"], len(shapes), sum(shapes), not is_entry, source))
    return found


def _bytes(shape: re.Match) -> int:
    bits = 8 if shape["type"] == "pred" else int(shape["bits"])
    return math.prod(int(side) for side in shape["sides"].split(",") if side) * bits // 8


def count_on(devices: int) -> list[dict]:
    """Returns what `count_here` finds in a process with so many simulated devices.

    Raises:
        ValueError: the process failed.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth.collectives"],
        env=os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        message = done.stderr.strip()[-2000:]
        raise ValueError(f"the collectives of {devices} devices were not counted: {message}")
    return json.loads(done.stdout.splitlines()[-1])


def _default_branch(*arguments: Any, default: Callable, **_: Callable) -> Any:
    return default(*arguments)


def count_here() -> list[dict]:
    """Compiles both steps for this process's devices, with `IMAGES_A_DEVICE` on each; a record for each step.

    The devices are CPUs, but every operation takes the branch of accelerators, which are what is asked about: on
    CPUs RoIAlign gathers features, by which a batch is not split.
    """
    import jax

    from benchmarks.growth import programs
    from benchmarks.steps import KINDS, held_bytes

    records = []
    for kind in KINDS:
        setting = Setting(batch=IMAGES_A_DEVICE * jax.device_count())
        with mock.patch.object(jax.lax, "platform_dependent", _default_branch):
            program = programs.lower(kind, setting)
        compiled = program.lowered.compile()
        record = {
            "step": kind,
            "devices": jax.device_count(),
            "images": setting.batch,
            "gradient_bytes": program.gradient_bytes() if kind == "train" else 0,
            "held_bytes": held_bytes(compiled),
            "collectives": [dataclasses.asdict(one) for one in find_collectives(compiled.as_text())],
        }
        records.append(record)
    return records


if __name__ == "__main__":
    print(json.dumps(count_here()))
