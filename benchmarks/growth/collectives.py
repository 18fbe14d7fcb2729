"""Collectives of a step: the messages between the devices of a mesh, read from its compiled program.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m benchmarks.growth.collectives

compiles both steps and prints the counts as JSON; `count_on` does so in a process of its own, because the number of
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
    """One instruction of a compiled program."""

    kind: str  # of `KINDS`
    arrays: int  # number of arrays in it; the compiler packs several into one
    bytes: int  # of its results, on one device
    is_repeated: bool  # it is outside of the program's entry, so in a loop that runs it in every round
    source: str  # the JAX operation that it came from; "" if the compiler does not name it


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
    """Returns the result of `count_here` in a process with a number of simulated devices.

    Raises ValueError if the process failed.
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
    """Compiles both steps for this process's devices, with `IMAGES_A_DEVICE` on each; returns a record for each step.

    The devices are CPUs, but every operation takes the branch of accelerators: on CPUs RoIAlign gathers features, which
    are not split along the batch.
    """
    import jax

    from benchmarks import steps
    from benchmarks.growth import programs

    records = []
    for kind in steps.KINDS:
        setting = Setting(batch=IMAGES_A_DEVICE * jax.device_count())
        with mock.patch.object(jax.lax, "platform_dependent", _default_branch):
            program = programs.lower(kind, setting)
        compiled = program.lowered.compile()
        record = {
            "step": kind,
            "devices": jax.device_count(),
            "images": setting.batch,
            "gradient_bytes": program.step.param_bytes(),
            "held_bytes": steps.held_bytes(compiled),
            "collectives": [dataclasses.asdict(one) for one in find_collectives(compiled.as_text())],
        }
        records.append(record)
    return records


if __name__ == "__main__":
    print(json.dumps(count_here()))
